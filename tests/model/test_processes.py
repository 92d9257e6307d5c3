"""Work in several processes: everything once, all get everything, and an error reaches all."""

import pytest

from hf_reparam.layers import processes
from tests.launch import launch

SCRIPT = """
import sys, torch
from hf_reparam.layers.processes import connected, distributed, is_first, own_share, spread, total, wait_for_all

with connected():
    assert distributed()
    rank = torch.distributed.get_rank()
    done = []
    costs = {"a": 1.0, "b": 9.0, "c": 5.0, "d": 5.0, "e": 0.5}
    results = spread(costs, lambda name: done.append(name) or torch.full((2,), ord(name)), desc="Testing")
    assert list(results) == list(costs)
    assert all(int(value[0]) == ord(name) for name, value in results.items())
    assert done == [["b", "a", "e"], ["c", "d"]][rank], done
    assert int(total(torch.tensor(rank + 1))) == 3
    assert own_share("abcde") == ["ace", "bd"][rank]
    assert is_first() == (rank == 0)

    def failing(name):
        if name == "d":
            raise ValueError("d is too hard")
        return name

    try:
        spread(costs, failing, desc="Testing")
    except ValueError as error:
        assert str(error) == "d is too hard"
        print("raised")
    wait_for_all()
assert not distributed()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    assert launch(tmp_path / "script.py").count("raised") == 2


def test_one_process():
    done = []
    costs = {"a": 1.0, "b": 2.0}
    assert processes.spread(costs, lambda name: done.append(name) or name * 2, desc="Testing") == {"a": "aa", "b": "bb"}
    assert done == ["a", "b"]
    assert processes.own_share([1, 2]) == [1, 2]
    assert processes.is_first()
    with processes.connected():
        assert not processes.distributed()
