"""`python -m benchmarks.gpu` runs, small, without a GPU."""

import json

import pytest

from benchmarks import gpu
from hf_reparam.compress import clock


@pytest.mark.slow
@pytest.mark.usefixtures("quick_clock")
def test_every_part_runs_small_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "medians", clock.medians)
    parts = [part for part in gpu.PARTS if part is not gpu.tests]  # they run here anyway
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr("sys.argv", ["gpu", "--small", "--out", str(tmp_path / "found.json")])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["parts"]) == [part.__name__ for part in parts]
    results = {name: part["results"] for name, part in found["parts"].items()}
    assert all(row["ratio"].keys() == {"pair", "pivoted"} for row in results["layers"])
    assert [row["asked"] for row in results["speedup"]] == [1.05]
    assert results["calibration"]["calibration"] > 0
    assert f"{len(parts)} of {len(parts)} parts" in capsys.readouterr().out


def test_what_fails_and_what_is_late_is_said(tmp_path, monkeypatch, capsys):
    def broken(setting):
        raise ValueError("no such card")

    monkeypatch.setattr(gpu, "PARTS", [broken])
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path / "found.json")])
    assert gpu.main() == 1
    assert "no such card" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gpu", "--minutes", "-1", "--out", str(tmp_path / "found.json")])
    assert gpu.main() == 1
    assert "not run" in capsys.readouterr().out
