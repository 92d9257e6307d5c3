"""Model cards, and what `push_to_hub` sends: the commit is intercepted, the files are really written."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModelForSequenceClassification

import hf_reparam
from hf_reparam import LowRankConfig, convert, model_card
from hf_reparam.errors import TargetError
from tests import zoo

CASE = zoo.BY_BASE["BertForSequenceClassification"]


@pytest.fixture
def dense():
    model = CASE.build()
    model.config._name_or_path = "google-bert/bert-tiny"
    return model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub: cards by repository, and the files of every commit."""
    cards, commits = {"google-bert/bert-tiny": "---\nlicense: mit\npipeline_tag: text-classification\n---\nBERT"}, []

    def load(name, **_):
        if str(name) in cards:
            return ModelCard(cards[str(name)])
        raise EntryNotFoundError("no card")

    def create_commit(self, repo_id, operations, **options):
        folder = tmp_path.parent / f"{tmp_path.name}-commit-{len(commits)}"
        for operation in operations:
            path = folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())
        commits.append((repo_id, folder, options))
        cards[repo_id] = (folder / "README.md").read_text()
        return f"https://huggingface.co/{repo_id}/commit/{len(commits)}"

    monkeypatch.setattr(ModelCard, "load", load)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    return cards, commits


@pytest.mark.slow
def test_card_says_what_was_done(dense, hub):
    texts = [CASE.batch()]
    small = convert(dense, LowRankConfig(keep=0.5, min_rank=1, target_modules="*"), calibration=texts)
    report = hf_reparam.report(small)
    card = model_card(small)
    data = card.data.to_dict()
    assert data["base_model"] == "google-bert/bert-tiny"
    assert data["library_name"] == "transformers"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "text-classification"
    assert set(data["tags"]) == {"hf_reparam", "low-rank"}
    text = " ".join(card.text.split())
    for part in (
        f"{report.factored_before:,} dense, {report.factored_after:,} here",
        f"{report.parameters_before:,} dense, {report.parameters_after:,} here",
        f"calibration | {int(texts[0]['attention_mask'].sum())} tokens",
        "Fisher metric (K-FAC)",
        "from transformers import AutoModelForSequenceClassification",
        "hf_reparam.merge(model)",
        "| encoder.layer.*.attention.self.query x2 |".replace("encoder", "bert.encoder"),
    ):
        assert part in text, part
    errors = sorted(x.error for x in report.layers)
    assert f"{errors[0]:.3f} to {errors[-1]:.3f}" in text


@pytest.mark.slow
def test_record_survives_saving_refitting_and_a_second_conversion(tmp_path, dense):
    data = [{"input_ids": zoo._ids(4, 6, seed=i)} for i in range(5)]
    small = convert(dense, keep=0.6, calibration=data)
    measured = {x.name.removeprefix("bert."): x.error for x in hf_reparam.report(small).layers}
    refitted = hf_reparam.refit(small, dense, data).layers
    assert refitted
    small.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    record = hf_reparam.RankPlan.from_dict(loaded.config.reparam).record
    assert record.base_model == "google-bert/bert-tiny"
    assert record.calibration_tokens == 5 * 4 * 6
    assert record.refitted_layers == hf_reparam.report(loaded).refitted_layers == len(refitted)
    assert record.errors == pytest.approx(measured, rel=1e-3)
    again = convert(loaded, LowRankConfig(rank=2, target_modules="*.intermediate.dense"))
    second = hf_reparam.RankPlan.from_dict(again.config.reparam).record
    assert second.base_model == record.base_model
    changed = {name for name in record.errors if second.errors[name] != record.errors[name]}
    assert changed == {name for name in second.errors if name.endswith(".intermediate.dense")}


@pytest.mark.slow
def test_local_paths_stay_private(tmp_path, dense):
    dense.save_pretrained(tmp_path)
    small = convert(type(dense).from_pretrained(tmp_path), rank=4)
    assert small.config.reparam["record"]["base_model"] is None
    assert str(tmp_path) not in str(model_card(small))
    assert model_card(small, base_model="me/bert").data.base_model == "me/bert"


def test_a_folder_that_is_named_like_a_hub_id_is_none(tmp_path, dense, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense.save_pretrained("bert")
    assert convert(type(dense).from_pretrained("bert"), rank=4).config.reparam["record"]["base_model"] is None


@pytest.mark.slow
def test_a_later_refit_is_remembered(dense):
    data = [{"input_ids": zoo._ids(4, 6, seed=i)} for i in range(5)]
    small = convert(dense, LowRankConfig(rank=4, target_modules="*"))
    assert small.config.reparam["record"]["refitted_layers"] == 0
    report = hf_reparam.refit(small, dense, data)
    assert small.config.reparam["record"]["refitted_layers"] == len(report.layers) > 0
    assert f"layers fitted again afterwards | {len(report.layers)} |" in model_card(small).text


def test_push_writes_weights_config_and_card(dense, hub):
    _, commits = hub
    small = convert(dense, rank=4)
    url = small.push_to_hub("me/small", tags=["mine"], commit_message="first")
    ((repo_id, folder, options),) = commits
    assert url.endswith("/commit/1")
    assert (repo_id, options["commit_message"]) == ("me/small", "first")
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.tags == ["hf_reparam", "low-rank", "mine"]
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(loaded(**CASE.batch()).logits, small(**CASE.batch()).logits)


def test_a_card_of_pushed_code_says_how_it_is_trusted(dense, hub):
    _, commits = hub
    small = convert(dense, rank=4)
    how = 'AutoModelForSequenceClassification.from_pretrained("THIS_REPOSITORY", trust_remote_code=True)'
    for remote_code in (False, True):
        small.push_to_hub("me/small", remote_code=remote_code)
        assert (how in (commits[-1][1] / "README.md").read_text()) == remote_code


def test_the_library_of_a_folder_is_kept(dense):
    base = ModelCard("---\nlibrary_name: sentence-transformers\n---\n")
    assert model_card(convert(dense, rank=4), base_card=base).data.library_name == "sentence-transformers"


def test_push_keeps_what_a_person_wrote(dense, hub):
    cards, _ = hub
    cards["me/small"] = "---\nlicense: apache-2.0\ntags: [mine]\n---\n# My model\n\nWritten by me.\n"
    convert(dense, rank=4).push_to_hub("me/small")
    first = cards["me/small"]
    assert ModelCard(first).data.license == "apache-2.0"
    assert ModelCard(first).data.tags == ["mine", "hf_reparam", "low-rank"]
    cards["me/small"] = first.replace("# My model", "# My model, edited") + "\nAdded below.\n"
    convert(dense, rank=2).push_to_hub("me/small")
    second = cards["me/small"]
    assert second.count("## Low-rank layers") == 1
    assert second.index("# My model, edited") < second.index("Written by me.") < second.index("## Low-rank layers")
    assert second.rstrip().endswith("Added below.")
    assert first.partition("## Low-rank layers")[2] not in second


def test_push_stops_where_the_card_cannot_be_read(dense, hub, monkeypatch):
    def unreachable(name, **_):
        raise LocalEntryNotFoundError("the Hub was not reached")

    small = convert(dense, rank=4)
    monkeypatch.setattr(ModelCard, "load", unreachable)
    with pytest.raises(LocalEntryNotFoundError):
        small.push_to_hub("me/small")
    assert hub[1] == []


@pytest.mark.slow
def test_saving_can_push_what_it_has_written(tmp_path, dense, hub):
    _, commits = hub
    small = convert(dense, rank=4)
    (tmp_path / "private.txt").write_text("not of the model")
    small.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/small", remote_code=True)
    ((repo_id, folder, _),) = commits
    assert repo_id == "me/small"
    files = {path.name for path in folder.iterdir()}
    assert files >= {"modeling_reparam.py", "model.safetensors", "config.json", "README.md"}
    assert files == {path.name for path in tmp_path.iterdir() if path.is_file()} - {"private.txt"}


@pytest.mark.slow
@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_tied_weights_on_disk_are_counted_once(tmp_path, base):
    dense = zoo.BY_BASE[base].build()
    dense.save_pretrained(tmp_path / "dense")
    report = hf_reparam.convert_folder(tmp_path / "dense", tmp_path / "small", rank=4, stream=True)
    text = (tmp_path / "small" / "README.md").read_text()
    assert f"{report.parameters_before:,} dense, {report.parameters_after:,} here" in text
    assert report.parameters_before == dense.num_parameters()


def test_card_errors(dense):
    with pytest.raises(TargetError, match="no converted"):
        model_card(dense)
    with pytest.raises(TargetError, match="Hub id"):
        model_card(convert(dense, rank=4), base_model="/home/me/bert")
