"""Private names of other libraries: each is still there, and still called or read as the package takes for granted."""

import importlib
import logging

import pytest
import torch
import transformers as tf
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, attach_align_device_hook
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping, core_model_loading, initialization
from transformers.distributed import DistributedConfig

from hf_reparam.compat import accelerate, auto, loading, marks
from hf_reparam.compat.compiling import without_limit

MODEL = "transformers:PreTrainedModel"
NAMES = {
    # name: where it is, "module:attribute"; empty if only objects have it
    "ALL_PARALLEL_STYLES": "transformers.distributed.tensor_parallel",
    "OffloadedWeightsLoader": "accelerate.utils",
    "PrefixedDataset": "accelerate.utils",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "peft.utils.constants",
    "TensorParallelLayer": "transformers.distributed.tensor_parallel",
    "WeightRenaming": "transformers.core_model_loading",
    "_CAN_RECORD_REGISTRY": "transformers.modeling_utils",
    "_LazyAutoMapping": "transformers.models.auto.auto_factory",
    "_adjust_missing_and_unexpected_keys": MODEL,
    "_auto_class": MODEL,
    "_can_record_outputs": MODEL,
    "_can_set_experts_implementation": MODEL,
    "_expand_parallel_plan": MODEL,
    "_dynamo": "torch",
    "_finalize_model_loading": MODEL,
    "_hf_hook": "",
    "_init_weights": MODEL,
    "_is_hf_initialized": "",
    "_keys_to_ignore_on_load_unexpected": MODEL,
    "_load_pretrained_model": MODEL,
    "_model_mapping": "transformers:AutoModel",
    "_tied_weights_keys": MODEL,
    "_version": "torch:Tensor",
    "_weight_conversions": "",
    "align_module_device": "accelerate.utils",
    "attach_align_device_hook": "accelerate.hooks",
    "auto_factory": "transformers.models.auto",
    "big_modeling": "accelerate",
    "conversion_mapping": "transformers",
    "core_model_loading": "transformers",
    "get_checkpoint_conversion_mapping": "transformers.conversion_mapping",
    "get_model_conversion_mapping": "transformers.conversion_mapping",
    "initialization": "transformers",
    "modeling_auto": "transformers.models.auto",
    "modeling_utils": "transformers",
    "no_init_weights": "transformers.initialization",
    "offload_state_dict": "accelerate.utils",
    "register_checkpoint_conversion_mapping": "transformers.conversion_mapping",
    "remove_hook_from_submodules": "accelerate.hooks",
    "rename_source_key": "transformers.core_model_loading",
    "set_module_tensor_to_device": "accelerate.utils",
    "should_reduce_batch_size": "accelerate.utils.memory",
    "tensor_parallel": "transformers.distributed",
    "transform_inputs_pre_forward": "transformers.distributed.tensor_parallel:TensorParallelLayer",
}
NEWER = {"ALL_PARALLEL_STYLES", "TensorParallelLayer", "_CAN_RECORD_REGISTRY", "_expand_parallel_plan"}
NEWER |= {"tensor_parallel", "transform_inputs_pre_forward"}
OLD = Version(tf.__version__) < Version("5.24")  # the package does without them there
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.mark.parametrize("name", sorted(name for name, place in NAMES.items() if place))
def test_the_name_is_there(name):
    place, _, attribute = NAMES[name].partition(":")
    if name in NEWER and OLD:
        pytest.skip(f"not in {tf.__version__}")
    try:
        owner = importlib.import_module(place)
        owner = getattr(owner, attribute) if attribute else owner
        found = hasattr(owner, name) or importlib.util.find_spec(f"{place}.{name}") is not None
    except (ImportError, AttributeError):
        found = False
    assert found, f"{NAMES[name].replace(':', '.')} has no {name} any more, which hf_reparam.compat uses"


def bert(kind=tf.BertModel, **sizes):
    return kind(tf.BertConfig(**{**SIZES, "max_position_embeddings": 16, **sizes})).eval()


def ids():
    return torch.tensor([[3, 4, 5]])


def saved(folder, **more):
    """A folder with a tiny model and more tensors; the model."""
    model = bert()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    return model


class WrongShapesError(Exception):
    pass


class Seamed(loading.LoadingSeam, tf.BertModel):
    """Notes what is called of it."""

    base_class = tf.BertModel

    def before_loading(self, state, files):
        self.loaded = [*files]

    def on_wrong_shapes(self, wrong):
        raise WrongShapesError(wrong)

    def parallel_rules(self, rules):
        self.rules = rules
        return rules


# loading


def test_loading_shows_the_file_to_the_model_first(tmp_path):
    saved(tmp_path)
    model = Seamed.from_pretrained(tmp_path)
    assert hasattr(model, "loaded"), "from_pretrained no longer calls _load_pretrained_model"
    assert model.loaded == [str(tmp_path / "model.safetensors")], "it gets something else than paths of files"


@pytest.mark.slow
def test_adapters_come_with_the_keys_to_expect(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path)
    adapted = peft.get_peft_model(tf.BertModel.from_pretrained(tmp_path), peft.LoraConfig(target_modules=["query"]))
    adapted.save_pretrained(tmp_path / "adapter")
    model = Seamed.from_pretrained(tmp_path)
    del model.loaded
    model.load_adapter(str(tmp_path / "adapter"))
    assert not hasattr(model, "loaded"), "load_adapter no longer gives _load_pretrained_model expected_keys"


def test_loading_asks_the_model_about_wrong_shapes_before_it_draws(tmp_path):
    saved(tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # the base's, if it is the first to look
        Seamed.from_pretrained(tmp_path, vocab_size=21)
    assert isinstance(caught.value, WrongShapesError), "from_pretrained no longer calls _finalize_model_loading"
    shape = torch.Size([20, 8]), torch.Size([21, 8])
    assert caught.value.args[0] == [("embeddings.word_embeddings.weight", *shape)], "mismatched_keys has another form"
    Seamed.from_pretrained(tmp_path, vocab_size=21, ignore_mismatched_sizes=True)  # load_config says so


@pytest.mark.skipif(OLD, reason="Transformers has no hook for it")
def test_sharding_asks_the_model_for_parallel_rules():
    class Mesh:
        def get_mesh(self, names):
            return None

    model = Seamed.maybe_distribute_model(bert(Seamed), DistributedConfig(), Mesh())
    assert hasattr(model, "rules"), "maybe_distribute_model no longer calls _expand_parallel_plan"


def test_names_that_a_class_ignores_can_be_seen(tmp_path):
    class Deaf(tf.BertModel):
        def __init__(self, config):
            super().__init__(config)
            marks.ignore_in_files(self, ["^extra"])

    saved(tmp_path, extra=torch.ones(1), other=torch.ones(1))
    with loading.unexpected_names(Deaf) as found:
        _, info = Deaf.from_pretrained(tmp_path, output_loading_info=True)
    assert found == {"extra", "other"}, "loading no longer calls _adjust_missing_and_unexpected_keys"
    unexpected = set(info["unexpected_keys"])
    assert unexpected == {"other"}, "loading no longer reads the model's _keys_to_ignore_on_load_unexpected"
    assert "_adjust_missing_and_unexpected_keys" not in vars(Deaf)


def test_a_model_that_no_constructor_made_gives_hidden_states():
    class Twin(tf.BertModel):
        pass

    model, tokens = bert(), ids()
    model.__class__ = Twin
    assert OLD or model(tokens, output_hidden_states=True).hidden_states is None, "record_outputs_as is not needed"
    loading.record_outputs_as(tf.BertModel, Twin)
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert hidden is not None, "outputs to record are no longer looked up in modeling_utils._CAN_RECORD_REGISTRY"


# initialisation


def test_what_was_loaded_has_numbers(tmp_path):
    saved(tmp_path)
    loaded = tf.BertModel.from_pretrained(tmp_path)
    parts = [loaded, loaded.pooler.dense]
    assert all(marks.has_numbers(part) for part in parts), "loading no longer sets _is_hf_initialized"
    assert not marks.has_numbers(nn.Linear(2, 2))


def test_what_a_checkpoint_did_not_have_is_known_until_it_is_trained(tmp_path):
    saved(tmp_path)
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    drawn = marks.drawn_parameters(loaded)
    assert drawn == ["classifier.weight", "classifier.bias"], "loading no longer sets _is_hf_initialized of tensors"
    assert not marks.drawn_parameters(tf.BertModel(loaded.config)), "nothing of it was loaded"
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(torch.tensor([[3, 4]]), labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert not marks.drawn_parameters(loaded), "a step of an optimizer no longer counts in _version of a tensor"


def test_a_head_that_a_fused_optimizer_has_trained_is_not_fresh(tmp_path):
    tf.BertModel(tf.BertConfig(**SIZES)).save_pretrained(tmp_path)
    loaded = tf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert marks.drawn_parameters(loaded)
    loaded(input_ids=torch.arange(4)[None], labels=torch.tensor([1])).loss.backward()
    torch.optim.AdamW(loaded.parameters(), fused=True).step()
    assert not marks.drawn_parameters(loaded)


def test_no_numbers_are_drawn_for_what_has_them():
    model = bert()
    for part in model.modules():
        vars(part).pop("_is_hf_initialized", None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    marks.set_initialized(model.pooler.dense)
    marks.set_initialized(model.embeddings.word_embeddings.weight)
    model.initialize_weights()
    kept = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert "pooler.dense.weight" in kept, "initialize_weights no longer reads _is_hf_initialized of modules"
    assert "embeddings.word_embeddings.weight" in kept, "initialisers no longer read _is_hf_initialized of tensors"
    assert "encoder.layer.0.output.dense.weight" not in kept


def test_tensors_are_filled_unless_they_have_numbers():
    for value, wanted in ((torch.ones(9), 1.0), (0.0, 0.0), (3.0, None)):
        tensor, loaded = torch.full((9,), 7.0), torch.full((9,), 7.0)
        marks.set_initialized(loaded)
        loading.fill(tensor, value)
        loading.fill(loaded, value)
        assert (tensor == wanted).all() if wanted is not None else (tensor != 7).all() and tensor.std() > 0.5
        assert (loaded == 7).all(), "transformers.initialization no longer reads _is_hf_initialized"


def test_a_class_draws_numbers_by_its_init_weights(monkeypatch):
    drawn = []
    monkeypatch.setattr(tf.BertModel, "_init_weights", lambda self, module: drawn.append(module))
    model = bert()
    assert set(drawn) == set(model.modules()), "initialize_weights no longer calls _init_weights for every module"
    loading.draw_as_class(model, model.pooler)
    assert drawn[-1] is model.pooler


def test_a_model_is_built_without_numbers(monkeypatch):
    drawn = []
    monkeypatch.setattr(tf.BertModel, "_init_weights", lambda self, module: drawn.append(module))
    monkeypatch.setattr(initialization, "normal_", lambda *args, **kwargs: drawn.append(args))
    with loading.drawing_nothing():
        bert()
    assert not drawn, "no_init_weights no longer keeps a model from drawing numbers"


# names and ties of tensors


def test_tensors_are_renamed_as_loading_renames_them(tmp_path):
    class Old(tf.BertModel):
        pass

    class New(tf.BertModel):
        pass

    Old.__module__ = "transformers.models.old"
    rule = core_model_loading.WeightRenaming("ancient", "pooler")
    conversion_mapping.register_checkpoint_conversion_mapping("Old", [rule], overwrite=True)
    loading.inherit_conversions(Old, New)
    model = bert(New)
    name = loading.renaming_for(model, model.state_dict())("ancient.dense.weight")
    assert name == "pooler.dense.weight", "get_model_conversion_mapping no longer looks for the name of the class"
    state = {key.replace("pooler", "ancient"): value for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    loaded, info = New.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"], "loading no longer renames as get_model_conversion_mapping says"
    assert "_weight_conversions" in vars(loaded), "loading no longer leaves _weight_conversions on the model"
    loaded.save_pretrained(tmp_path / "again")
    assert "ancient.dense.weight" in load_file(tmp_path / "again" / "model.safetensors")
    marks.forget_conversions(loaded)
    conversion_mapping.register_checkpoint_conversion_mapping("New", [], overwrite=True)
    loaded.save_pretrained(tmp_path / "new")
    names = load_file(tmp_path / "new" / "model.safetensors").keys()
    assert "pooler.dense.weight" in names, "saving no longer reads the model's _weight_conversions"


def test_ties_are_read_from_the_model():
    model = bert(tf.BertForMaskedLM)
    known = marks.tied_keys(model)
    assert set(known) == {"_tied_weights_keys", "all_tied_weights_keys"}, "models name their ties otherwise"
    own, model._tied_weights_keys = model._tied_weights_keys, {"a.weight": "b.weight"}
    said = "get_expanded_tied_weights_keys no longer reads the object's _tied_weights_keys"
    assert model.get_expanded_tied_weights_keys() == {"a.weight": "b.weight"}, said
    model.cls.predictions.decoder.weight = nn.Parameter(torch.zeros(20, 8))
    model._tied_weights_keys, model.all_tied_weights_keys = own, {}
    model.tie_weights(recompute_mapping=False)
    said = "tie_weights no longer reads the object's all_tied_weights_keys"
    assert not model.cls.predictions.decoder.weight.any(), said


class Own(tf.BertModel):
    """With code that its folders bring along, once it is registered."""


class OwnConfig(tf.BertConfig):
    """As `Own`."""


@pytest.mark.parametrize("kind", [Own, OwnConfig])
def test_no_file_of_code_goes_beside_a_class_that_wants_none(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(kind, "_auto_class", None)
    kind.register_for_auto_class()
    quiet = type("Quiet", (kind,), {**marks.NO_CODE_FILE, "__module__": __name__, "__init__": kind.__init__})
    make = bert if kind is Own else lambda kind: kind(**SIZES)
    make(kind).save_pretrained(tmp_path / "loud")
    make(quiet).save_pretrained(tmp_path / "quiet")
    said = "save_pretrained no longer writes code for classes with an _auto_class"
    assert [*(tmp_path / "loud").glob("*.py")], said
    assert not [*(tmp_path / "quiet").glob("*.py")], "save_pretrained writes code for a class whose _auto_class is None"


# Auto classes and PEFT


class NewConfig(tf.BertConfig):
    """As a derived configuration."""


class NewModel(tf.BertModel):
    """As a derived model."""

    config_class = NewConfig


class TinyConfig(tf.BertConfig):
    """Of a type of its own."""

    model_type = "tiny_new"


def test_auto_classes_know_their_models():
    said = "Auto classes no longer keep their models in a _LazyAutoMapping, _model_mapping"
    known = {name: kinds for name, _, kinds in auto.auto_classes(tf.BertConfig)}
    assert known["AutoModel"] == (tf.BertModel,), said
    assert auto.auto_class_of(tf.BertForMaskedLM) == "AutoModelForMaskedLM", said
    assert auto.auto_class_of(tf.BertModel) == "AutoModel", said
    assert auto.auto_class_of(tf.T5EncoderModel) == "AutoModelForTextEncoding", said
    assert auto.auto_class_of(tf.BartForConditionalGeneration) == "AutoModelForSeq2SeqLM", said
    assert auto.auto_class_of(tf.GPT2LMHeadModel) == "AutoModelForCausalLM", said
    assert auto.default_model(tf.BertConfig) is tf.BertModel, said
    assert auto.default_model(NewConfig) is None


def test_auto_classes_may_list_a_class_that_is_not_there(monkeypatch):
    """Transformers 5.24 does so for a part of VoxtralRealtime."""
    mapping = tf.AutoModel._model_mapping
    monkeypatch.setitem(mapping._model_mapping, "bert", "NoSuchModel")
    with pytest.raises(ValueError, match="NoSuchModel"):
        mapping.get(tf.BertConfig, None)
    assert auto.default_model(tf.BertConfig) is None


def test_a_derived_class_becomes_known_wherever_its_base_is(monkeypatch):
    mapping = tf.AutoModel._model_mapping
    tokenizers = importlib.import_module("transformers.models.auto.tokenization_auto").TOKENIZER_MAPPING
    try:
        auto.register_like(tf.BertConfig, NewConfig, lambda kind: NewModel if kind is tf.BertModel else kind)
        made = tf.AutoModel.from_config(NewConfig(**SIZES))
        assert type(made) is NewModel, "AutoModel no longer looks for classes in its _model_mapping"
        assert tokenizers[NewConfig] == tokenizers[tf.BertConfig], "AutoTokenizer has no TOKENIZER_MAPPING any more"
    finally:
        for known in [m for _, m, _ in auto.auto_classes(NewConfig)]:
            del known._extra_content[NewConfig]
        del tokenizers._extra_content[NewConfig]
    assert mapping.get(NewConfig, None) is None


@pytest.mark.parametrize("kind", auto._PREPROCESSORS)
def test_preprocessors_have_a_mapping_of_their_own(kind):
    names = vars(importlib.import_module(f"transformers.models.auto.{kind}_auto"))
    found = [value for value in names.values() if type(value).__name__ == "_LazyAutoMapping"]
    assert found, f"transformers.models.auto.{kind}_auto has no _LazyAutoMapping any more"


@pytest.mark.slow
def test_peft_looks_for_targets_by_the_model_type(monkeypatch):
    peft = pytest.importorskip("peft")
    targets = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    auto.name_lora_targets("tiny_new", ["pooler.dense"])
    try:
        model = tf.BertModel(TinyConfig(**SIZES))
        adapted = peft.get_peft_model(model, peft.LoraConfig())
    finally:
        del targets["tiny_new"]
    found = {name for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    said = "PEFT no longer reads peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    assert found == {"base_model.model.pooler.dense.lora_A"}, said


@pytest.mark.skipif(OLD, reason="Transformers has no hook for it")
def test_a_style_of_parallelism_prepares_inputs():
    from transformers.distributed import tensor_parallel

    loading.register_style("test_twice", lambda module, x, mesh: 2 * x)
    style = tensor_parallel.ALL_PARALLEL_STYLES["test_twice"]
    layer = nn.Linear(2, 2)
    wanted = layer(2 * torch.ones(1, 2))
    style.install_forward(layer, None)
    said = "TensorParallelLayer no longer calls transform_inputs_pre_forward(module, args, kwargs, mesh)"
    assert torch.equal(layer(torch.ones(1, 2)), wanted), said


# accelerate


def test_a_hook_is_found_on_its_module():
    layer, hook = nn.Linear(2, 2), ModelHook()
    assert marks.hook_of(layer) is None
    add_hook_to_module(layer, hook)
    assert marks.hook_of(layer) is hook, "accelerate no longer keeps a module's hook in _hf_hook"


def test_layers_are_read_from_a_folder_and_recalled(tmp_path):
    layer, x = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval(), torch.ones(1, 3)
    wanted, device = layer(x), torch.device("cpu")
    accelerate.write_tensors(tmp_path, layer.state_dict())
    with init_empty_weights(include_buffers=False):
        empty = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    accelerate.leave_in(tmp_path, empty, device)
    first = empty[0]
    said = "accelerate's hooks no longer read weights from a folder when a module computes"
    assert torch.equal(empty(x), wanted), said
    assert first.weight.is_meta, said
    with accelerate.aligned(empty):
        assert torch.equal(first.weight, layer[0].weight), "align_module_device no longer brings weights into memory"
    assert accelerate.is_offloaded(first), "accelerate's hooks no longer say `offload`"
    assert accelerate.execution_device(first) == device, "accelerate's hooks no longer say `execution_device`"
    accelerate.recall(empty)
    said = "accelerate's hooks no longer bring weights to their `original_devices` when they are removed"
    assert torch.equal(first.weight, layer[0].weight), said
    assert not any("forward" in vars(part) for part in empty.modules())
    assert torch.equal(empty(x), wanted)


def test_several_hooks_on_a_module_are_told_apart():
    layer = nn.Linear(2, 2)
    attach_align_device_hook(layer, execution_device="cpu", offload=True, weights_map=layer.state_dict())
    add_hook_to_module(layer, ModelHook(), append=True)
    assert isinstance(marks.hook_of(layer), SequentialHook)
    assert accelerate.is_offloaded(layer), "accelerate's SequentialHook no longer has `hooks`"


def test_weights_left_on_disk_say_where_they_are(tmp_path, caplog):
    saved(tmp_path)
    with accelerate.meant_for_disk(), caplog.at_level(logging.INFO):
        model = tf.BertModel.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off")
    said = "hooks no longer have a `weights_map`, a PrefixedDataset with `prefix` and a `dataset` with an `index`"
    places = accelerate.places_in_files(model).get(str(tmp_path / "model.safetensors"), {})
    assert places.get("pooler.dense.weight") == ("pooler.dense.weight", torch.Size([8, 8])), said


def test_what_stays_on_disk_is_said_by_accelerates_logger(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        logging.getLogger("accelerate.big_modeling"), "_log", lambda level, *a, **k: heard.append(level)
    )
    saved(tmp_path)
    load = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    tf.BertModel.from_pretrained(tmp_path, **load)
    assert logging.WARNING in heard, "accelerate.big_modeling no longer warns of parameters on disk"
    heard.clear()
    with accelerate.meant_for_disk():
        tf.BertModel.from_pretrained(tmp_path, **load)
    assert not heard


def test_classes_of_experts_say_so():
    assert tf.MixtralModel._can_set_experts_implementation(), "a class of experts no longer says it has several ways"


def test_torch_compiles_one_function_a_limited_number_of_times():
    config = torch._dynamo.config
    with without_limit():
        assert config.recompile_limit == config.accumulated_recompile_limit > 1_000
    assert config.recompile_limit < 100, "torch has another limit of compilations by itself"
