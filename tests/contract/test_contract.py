"""What every form promises in every family: save, load, merge, train, stream, adapt, export, report."""

import copy
import pickle

import pytest
import torch
from torch import nn

import hf_reparam
from hf_reparam import RankPlan, merge
from hf_reparam.layers.factored import Factored
from hf_reparam.model.checks import count_parameters
from tests.contract.forms import CASES, made
from tests.launch import launch

QUICK = ("BERT", "plain")  # families that `make check` is content with


def cases(wanted):
    chosen = [case for case in CASES if wanted(case)]
    slow = [() if case.family in QUICK else pytest.mark.slow for case in chosen]
    return pytest.mark.parametrize(
        "case", [pytest.param(c, marks=m, id=c.id) for c, m in zip(chosen, slow, strict=True)]
    )


EVERY = cases(lambda case: True)
STREAMED = cases(lambda case: not case.plain)
EXPORTED = cases(lambda case: case.family in ("BERT", "GPT-2", "plain"))
FRESH = """
import pickle, sys, torch
from pathlib import Path
from tests.contract.forms import CASES

results = {}
for case in CASES:
    folder = Path(sys.argv[1]) / case.id
    loaded, pickled = case.load(folder), pickle.loads(folder.with_suffix(".pkl").read_bytes())
    results[case.id] = {"kind": type(loaded).__name__, "tensors": loaded.state_dict(), "outputs": case.outputs(loaded)}
    results[case.id] |= {"pickled": case.outputs(pickled)}
torch.save(results, Path(sys.argv[1]) / "results.pt")
"""


def close(got, expected, atol=1e-5):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def optimize(model, case):
    """One step downhill of all outputs."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    out = model(**case.batch())
    (out if case.plain else next(v for v in out.values() if isinstance(v, torch.Tensor))).square().mean().backward()
    optimizer.step()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What one new process finds in the folders that were saved in this one, and in the pickles."""
    folder = tmp_path_factory.mktemp("contract")
    for case in CASES:
        small = made(case).small
        case.save(small, folder / case.id)
        (folder / f"{case.id}.pkl").write_bytes(pickle.dumps(small))
    launch("-c", FRESH, folder, processes=1)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.slow
@EVERY
def test_a_fresh_process_loads_the_same(fresh, case):
    found, small = fresh[case.id], made(case).small
    assert found["kind"] == type(small).__name__
    assert equal(found["tensors"], small.state_dict())
    close(
        found["outputs"], case.outputs(small), 1e-6 if case.form == "table" or case.plain else 0
    )  # memory's alignment
    close(found["pickled"], case.outputs(small), 1e-6 if case.form == "table" or case.plain else 0)


@EVERY
def test_saved_and_loaded(case, tmp_path):
    small = made(case).small
    case.save(small, tmp_path / "small")
    again = case.load(tmp_path / "small")
    assert type(again) is type(small)
    assert equal(again.state_dict(), small.state_dict())
    assert count_parameters(again) == count_parameters(small)  # what was tied is
    close(case.outputs(again), case.outputs(small), 1e-6)


@EVERY
def test_it_differs_from_the_dense_model_which_is_as_it_was(case):
    dense, small = made(case).dense, made(case).small
    assert equal(dense.state_dict(), case.build().state_dict())
    assert any(
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(case.outputs(small), case.outputs(dense), strict=True)
    )
    inplace = case.build()
    assert case.convert(inplace, inplace=True) is inplace
    assert equal(inplace.state_dict(), small.state_dict())


@EVERY
def test_merged_it_is_stock(case, tmp_path):
    dense, small = made(case).dense, made(case).small
    merged = merge(small)
    assert [type(module) for module in merged.modules()] == [type(module) for module in dense.modules()]
    shapes = [[(name, value.shape) for name, value in model.state_dict().items()] for model in (merged, dense)]
    assert shapes[0] == shapes[1]
    assert count_parameters(merged) == count_parameters(dense)
    close(case.outputs(merged), case.outputs(small))
    if not case.plain:
        assert merged.all_tied_weights_keys == dense.all_tied_weights_keys
        merged.save_pretrained(tmp_path)
        close(case.outputs(type(dense).from_pretrained(tmp_path)), case.outputs(small))


@EVERY
def test_a_training_step_reaches_every_factor_and_can_be_merged(case):
    small = copy.deepcopy(made(case).small)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    optimize(small, case)
    factors = [m for m in small.modules() if isinstance(m, Factored)]
    assert factors
    unmoved = {name for name, value in small.named_parameters() if torch.equal(value, before[name])}
    names = {f"{n}.{p}" for n, m in small.named_modules() if m in factors for p, _ in m.named_parameters(recurse=True)}
    assert not {name for name in names & unmoved if name.endswith("weight")}
    close(case.outputs(merge(small)), case.outputs(small))


@STREAMED
def test_a_folder_streamed_gives_the_same_tensors(case, tmp_path):
    made(case).dense.save_pretrained(tmp_path / "dense")
    report = case.stream(tmp_path / "dense", tmp_path / "small")
    streamed = case.load(tmp_path / "small")
    assert equal(streamed.state_dict(), made(case).small.state_dict())
    assert report.parameters_after == made(case).report.parameters_after


@pytest.mark.slow
@EVERY
def test_adapters_train_and_merge(case):
    from peft import LoraConfig, get_peft_model

    small = made(case).small
    linears = [name for name, module in small.named_modules() if type(module) is nn.Linear and "lm_head" not in name]
    targets = linears if case.plain else "all-linear"
    adapted = get_peft_model(copy.deepcopy(small), LoraConfig(target_modules=targets, init_lora_weights=False))
    start = case.outputs(adapted)
    assert not torch.allclose(start[0], case.outputs(small)[0], atol=1e-3)
    optimize(adapted, case)
    assert {name.split(".")[-3] for name, p in adapted.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}
    changed = case.outputs(adapted)
    assert not torch.equal(changed[0], start[0])
    merged = adapted.merge_and_unload()
    close(case.outputs(merged), changed, 1e-4)
    close(case.outputs(merge(merged)), changed, 1e-4)


@pytest.mark.slow
@EXPORTED
def test_it_is_exported(case):
    small = made(case).small
    program = torch.export.export(small, (), case.batch())
    with torch.no_grad():
        out = program.module()(**case.batch())
    close([out if case.plain else out.logits], case.outputs(small)[:1], 1e-6)


@EVERY
def test_the_report_is_the_live_model(case):
    dense, small, report = made(case).dense, made(case).small, made(case).report
    assert report.parameters_before == count_parameters(dense) == sum(p.numel() for p in dense.parameters())
    assert report.parameters_after == count_parameters(small) == sum(p.numel() for p in small.parameters())
    assert report.parameters_after < report.parameters_before
    assert report.parameters_before - report.parameters_after == report.factored_before - report.factored_after
    rows = {row.name: (row.rank, row.form) for row in report.layers}
    low = {name: module for name, module in small.named_modules() if isinstance(module, Factored)}
    assert all((low[name].rank, low[name].form) == row for name, row in rows.items() if name in low)
    wanted = case.asked(dense)
    plan = wanted if isinstance(wanted, RankPlan) else hf_reparam.make_plan(dense, wanted)
    assert sorted(rows.values()) == sorted((entry.rank, entry.form) for entry in plan.modules.values())
    if plan.report is not None:  # it said so before the work
        assert plan.report.parameters_after == report.parameters_after
