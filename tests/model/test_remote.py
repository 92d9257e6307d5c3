"""`save_pretrained(remote_code=True)`: folders that load in processes where hf_reparam cannot be imported."""

import ast
import builtins
import json
import shutil

import pytest
import torch
import transformers

import hf_reparam
from hf_reparam import Entry, LowRankConfig, RankPlan, convert
from hf_reparam.errors import CheckpointError
from hf_reparam.model.host import layer_name
from hf_reparam.structures import STRUCTURES
from hf_reparam.structures.heads import AttentionType, register_attention
from hf_reparam.structures.heads.attention import find_attentions
from tests import zoo
from tests.launch import Started, launch

CASES = [
    ("BertForMaskedLM", "pair"),
    ("GPT2LMHeadModel", "pivoted"),
    ("ViTForImageClassification", "pair"),
    ("GPT2LMHeadModel", "heads"),
    ("T5ForConditionalGeneration", "heads"),
    ("LlamaForCausalLM", "table"),
    ("T5ForConditionalGeneration", "table"),
    ("MixtralForCausalLM", "experts"),
]
WITHOUT = """
import sys
sys.modules["hf_reparam"] = None  # importing it raises ImportError
import torch, traceback, transformers

def work(folder, auto):
    kind = getattr(transformers, auto)
    model = kind.from_pretrained(folder, trust_remote_code=True)
    batch = torch.load(folder + "/batch.pt")
    with torch.no_grad():
        out = model(**batch)
    torch.save([v for v in out.values() if isinstance(v, torch.Tensor)], folder + "/outputs.pt")
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    if model.can_generate() and "input_ids" in batch:
        torch.save(model.generate(**batch, max_new_tokens=5, do_sample=False), folder + "/tokens.pt")
    model.save_pretrained(folder + "-again")
    twice = kind.from_pretrained(folder + "-again", trust_remote_code=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name]), name

for folder, auto in zip(sys.argv[1::2], sys.argv[2::2]):
    print("\\n@@", folder, file=sys.stderr, flush=True)
    try:
        work(folder, auto)
    except Exception:
        traceback.print_exc()
"""


def entries(model, form, rank):
    """Entries of a plan: all that a model can hold in this form."""
    (structure,) = [known for known in STRUCTURES if form in known.forms]
    sites = [site for site in structure.sites(model) if site.reason is None]
    assert sites
    return {layer_name(model, site.name): Entry(rank, form) for site in sites}


def made(base, form):
    """The converted model; narrower heads, for which GPT-2 has three layers instead of one, have low-rank layers."""
    model = BY_BASE[base].build()
    if form in zoo.FORMS:
        return convert(model, LowRankConfig(rank=6, form=form))
    small = convert(model, RankPlan(entries(model, form, 4), model.config.model_type))
    return convert(small, LowRankConfig(rank=6, form="pivoted")) if form == "heads" else small


def mixtral(**kw):
    return transformers.MixtralConfig(**zoo.LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, **kw)


BY_BASE = {**zoo.BY_BASE, "MixtralForCausalLM": zoo.Case("MixtralForCausalLM", "AutoModelForCausalLM", mixtral)}


def with_entry(name, form, rank):
    """A change of a stored configuration."""
    return lambda config: config["reparam"]["modules"].update({name: {"form": form, "rank": rank}})


LAYER, HEADS = "encoder.layer.0.output.dense", "encoder.layer.0.attention"
BROKEN = [
    (lambda c: c["reparam"].update(format_version=4), "format version 4"),
    (with_entry(HEADS, "heads", 99), "heads 99 wide, above the 8 they have"),
    (with_entry(HEADS, "heads", 4), "do not have the shapes that config.json gives them"),
    (with_entry("encoder.layer.0", "heads", 4), "it is of type BertLayer; of such there are"),
    (with_entry("embeddings.word_embeddings", "table", 99), "rank 99, above the 31"),
    (with_entry("embeddings.word_embeddings", "table", 4), "are missing or do not fit"),
    (with_entry(LAYER, "spiral", 4), "this hf_reparam knows"),
    (with_entry(LAYER, "pair", 500), "rank 500, above min(in, out) = 32"),
    (with_entry(LAYER, "pair", 5), "do not have the shapes that config.json gives them"),
]


@pytest.fixture(scope="module")
def loaded_without(tmp_path_factory):
    """By case: the folder, as one process that cannot import the package left it, and what that process said."""
    root = tmp_path_factory.mktemp("remote")
    broken = {("BertModel", f"broken {number}"): change for number, (change, _) in enumerate(BROKEN)}
    # Transformers names what it imports by the folder's last name, here that of a package of ours, and by the file: it
    # does so twice, for all cases
    folders = {case: root / "-".join(case).replace(" ", "-") / "model" for case in [*CASES, *broken]}
    whole = root / "whole" / "model"
    for base, form in CASES:
        made(base, form).save_pretrained(folders[base, form], remote_code=True)
        torch.save(BY_BASE[base].batch(), folders[base, form] / "batch.pt")
    made("BertModel", "pair").save_pretrained(whole, remote_code=True)
    torch.save(BY_BASE["BertModel"].batch(), whole / "batch.pt")
    for case, change in broken.items():
        shutil.copytree(whole, folders[case])
        config = json.loads((folders[case] / "config.json").read_text())
        change(config)
        (folders[case] / "config.json").write_text(json.dumps(config))
    pairs = [x for (base, _), folder in folders.items() for x in (folder, BY_BASE[base].auto)]
    parts = Started("-c", WITHOUT, *pairs).end().printed("err").split("\n@@ ")
    said = {folder: next(part for part in parts if part.startswith(f"{folder}\n")) for folder in folders.values()}
    return {case: (folder, said[folder]) for case, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "form"), CASES)
def test_loads_without_the_package(loaded_without, base, form):
    case, (folder, said), small = BY_BASE[base], loaded_without[base, form], made(base, form)
    assert "Traceback" not in said, said
    for mine, theirs in zip(zoo.outputs(small, case.batch()), torch.load(folder / "outputs.pt"), strict=True):
        assert torch.equal(mine, theirs)
    assert (folder / "tokens.pt").exists() == (small.can_generate() and "input_ids" in case.batch())
    if (folder / "tokens.pt").exists():
        tokens = small.generate(**case.batch(), max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens, torch.load(folder / "tokens.pt"))
    again = folder.with_name(f"{folder.name}-again")
    back = getattr(transformers, case.auto).from_pretrained(again)  # saved without the package, loaded with it
    assert type(back) is type(small)
    assert torch.equal(zoo.outputs(back, case.batch())[0], zoo.outputs(small, case.batch())[0])


def defined(statement):
    """Names that a statement of a module defines, one each time."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", statement)]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


@pytest.mark.slow
def test_no_name_of_one_module_hides_that_of_another(tmp_path):
    """The file is put together of modules that each have names of their own, and import others under theirs."""
    small = convert(zoo.BY_BASE["BertModel"].build(), LowRankConfig(rank=6, target_modules="query"))
    small.save_pretrained(tmp_path, remote_code=True)
    owners = {}
    for statement in ast.parse((tmp_path / "modeling_reparam.py").read_text()).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            for alias in statement.names:
                origin = f"{getattr(statement, 'module', '')} {alias.name if alias.asname else ''}"
                owners.setdefault(alias.asname or alias.name.partition(".")[0], set()).add(origin)
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)):
            for name in defined(statement):
                owners.setdefault(name, set()).add(f"line {statement.lineno}")
    assert len(owners) > 200
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}


@pytest.mark.slow
def test_every_name_in_the_file_is_defined(tmp_path):
    small = convert(zoo.BY_BASE["BertModel"].build(), LowRankConfig(rank=6, target_modules="query"))
    small.save_pretrained(tmp_path, remote_code=True)
    nodes = list(ast.walk(ast.parse((tmp_path / "modeling_reparam.py").read_text())))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    known = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    known |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))}
    known |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {node.asname or node.name.partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    assert used - known - set(dir(builtins)) - {"__class__", "__file__", "__name__"} == set()


@pytest.mark.slow
@pytest.mark.parametrize("trust", [None, True])
def test_the_installed_package_is_preferred(tmp_path, trust):
    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6)
    small.save_pretrained(tmp_path, remote_code=True)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(loaded) is hf_reparam.ReparamBertForMaskedLM


@pytest.mark.slow
def test_the_file_gives_the_installed_packages_classes(tmp_path):
    convert(zoo.BY_BASE["BertModel"].build(), rank=6).save_pretrained(tmp_path, remote_code=True)
    code = (
        "import sys; from transformers import AutoModel; "
        "print(type(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)))"
    )
    assert "'hf_reparam.ReparamBertModel'" in launch("-c", code, tmp_path, processes=1)


@pytest.mark.slow
def test_auto_map_goes_with_the_file(tmp_path):
    small = convert(zoo.BY_BASE["BertForMaskedLM"].build(), rank=6)
    small.save_pretrained(tmp_path, remote_code=True)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written["AutoConfig"] == "modeling_reparam.ReparamBertConfig"
    assert written["AutoModelForMaskedLM"] == "modeling_reparam.ReparamBertForMaskedLM"
    assert not hasattr(small.config, "auto_map")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "plain")
    assert loaded.config.auto_map == written
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / "modeling_reparam.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "message"), list(enumerate(message for _, message in BROKEN)))
def test_a_folder_that_does_not_fit_fails_loudly(loaded_without, number, message):
    _, said = loaded_without["BertModel", f"broken {number}"]
    assert "Traceback" in said
    assert any(part in said for part in message.split("|")), said[-1500:]


def test_dense_types_of_ones_own_are_refused(tmp_path, own_linear):
    model = zoo.BY_BASE["BertModel"].build()
    model.pooler.dense = own_linear(32, 32)
    small = convert(model, LowRankConfig(rank=6, target_modules="pooler.dense"))
    small.config.auto_map = {"AutoTokenizer": ["tokenizer.Own", None]}
    with pytest.raises(CheckpointError, match=r"pooler\.dense is or stands for a OwnLinear"):
        small.save_pretrained(tmp_path, remote_code=True)
    assert small.config.auto_map == {"AutoTokenizer": ["tokenizer.Own", None]}


def test_attentions_of_ones_own_are_refused(tmp_path):
    class Own(type(find_attentions(zoo.BY_BASE["BartForConditionalGeneration"].build())[0].module)): ...

    register_attention(Own, AttentionType("q_proj", "k_proj", "v_proj", "out_proj"))
    model = zoo.BY_BASE["BartForConditionalGeneration"].build()
    model.model.encoder.layers[0].self_attn.__class__ = Own
    small = convert(model, RankPlan({"encoder.layers.0.self_attn": Entry(4, "heads")}, "bart"))
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.self_attn is or stands for a Own"):
        small.save_pretrained(tmp_path, remote_code=True)


@pytest.fixture
def own_linear():
    from hf_reparam.layers import dense

    class OwnLinear(torch.nn.Linear): ...

    hf_reparam.register_dense(
        OwnLinear,
        matrix=lambda module: module.weight,
        build=lambda i, o, bias, device, dtype: OwnLinear(i, o, bias, device=device, dtype=dtype),
    )
    yield OwnLinear
    del dense._registry[OwnLinear]
