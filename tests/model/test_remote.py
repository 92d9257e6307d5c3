"""`save_pretrained(remote_code=True)`: folders that load in processes where hf_reparam cannot be imported."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

import hf_reparam
from hf_reparam import LowRankConfig, RankPlan, convert
from hf_reparam.errors import CheckpointError
from hf_reparam.model.host import layer_name
from hf_reparam.structures.heads import AttentionType, register_attention
from hf_reparam.structures.heads.attention import find_attentions
from tests import zoo

CASES = [
    ("BertForMaskedLM", "pair"),
    ("BertModel", "pivoted"),
    ("GPT2LMHeadModel", "pivoted"),
    ("LlamaForCausalLM", "pair"),
    ("T5ForConditionalGeneration", "pivoted"),
    ("ViTForImageClassification", "pair"),
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


def narrow(model):
    """Heads half as wide, and low-rank layers in them: of GPT-2 three in the place of a fused one."""
    widths = {layer_name(model, a.name): 4 for a in find_attentions(model)}
    assert widths
    half = convert(model, RankPlan({}, model.config.model_type, head_widths=widths))
    return convert(half, LowRankConfig(rank=6, form="pivoted"))


CASES += [(base, "heads") for base in ("BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration")]


BROKEN = [
    (lambda c: c["reparam"].update(format_version=4), "format version 4"),
    (lambda c: c["reparam"].update(head_widths={"encoder.layer.0.attention": 99}), "cannot be 99 wide"),
    (lambda c: c["reparam"].update(head_widths={"encoder.layer.0.attention": 4}), "size mismatch|do not fit"),
    (lambda c: c["reparam"].update(head_widths={"encoder.layer.0": 4}), "cannot be made narrower"),
    (lambda c: c["reparam"]["modules"]["encoder.layer.0.output.dense"].update(rank=500), "does not fit"),
    (lambda c: c["reparam"]["modules"]["encoder.layer.0.output.dense"].update(rank=5), "size mismatch|do not fit"),
]


def made(base, form):
    model = zoo.BY_BASE[base].build()
    return narrow(model) if form == "heads" else convert(model, LowRankConfig(rank=6, form=form))


@pytest.fixture(scope="module")
def loaded_without(tmp_path_factory):
    """By case: the folder, as one process that cannot import the package left it, and what that process said."""
    root = tmp_path_factory.mktemp("remote")
    broken = {("BertModel", f"broken {number}"): change for number, (change, _) in enumerate(BROKEN)}
    folders = {case: root / "-".join(case).replace(" ", "-") for case in [*CASES, *broken]}
    for (base, form), folder in folders.items():
        made(base, "pair" if form.startswith("broken") else form).save_pretrained(folder, remote_code=True)
        torch.save(zoo.BY_BASE[base].batch(), folder / "batch.pt")
    for case, change in broken.items():
        config = json.loads((folders[case] / "config.json").read_text())
        change(config)
        (folders[case] / "config.json").write_text(json.dumps(config))
    pairs = [str(x) for (base, _), folder in folders.items() for x in (folder, zoo.BY_BASE[base].auto)]
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, *pairs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = done.stderr.split("\n@@ ")
    said = {folder: next(part for part in parts if part.startswith(f"{folder}\n")) for folder in folders.values()}
    return {case: (folder, said[folder]) for case, folder in folders.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "form"), CASES)
def test_loads_without_the_package(loaded_without, base, form):
    case, (folder, said), small = zoo.BY_BASE[base], loaded_without[base, form], made(base, form)
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
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "'hf_reparam.ReparamBertModel'" in done.stdout


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
    with pytest.raises(CheckpointError, match=r"pooler\.dense stands for a OwnLinear"):
        small.save_pretrained(tmp_path, remote_code=True)


def test_attentions_of_ones_own_are_refused(tmp_path):
    class Own(type(find_attentions(zoo.BY_BASE["BartForConditionalGeneration"].build())[0].module)): ...

    register_attention(Own, AttentionType("q_proj", "k_proj", "v_proj", "out_proj"))
    model = zoo.BY_BASE["BartForConditionalGeneration"].build()
    model.model.encoder.layers[0].self_attn.__class__ = Own
    widths = {"encoder.layers.0.self_attn": 4}
    small = convert(model, RankPlan({}, "bart", head_widths=widths))
    with pytest.raises(CheckpointError, match="is a Own with narrower heads"):
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
