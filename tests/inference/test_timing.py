"""The loop in which runs take turns: its order, its end, and what it keeps."""

from itertools import count
from unittest.mock import patch

import torch

from mue_hf.inference.timing import compare, in_turns, timed

CPU = torch.device("cpu")


def test_every_run_is_as_often_early_as_late():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    measured = in_turns(runs, 6)
    rounds = ["".join(order[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]
    assert measured["a"] == [1, 6, 8, 12, 13, 17]
    order.clear()
    in_turns({name: runs[name] for name in "ab"}, 4)
    assert "".join(order) == "abbabaab"


def test_rounds_end_when_their_time_is_up_but_for_three():
    with patch("mue_hf.inference.timing.time.perf_counter", side_effect=count().__next__):
        assert len(in_turns({"a": lambda: 0}, 9, max_seconds=0)["a"]) == 3
    with patch("mue_hf.inference.timing.time.perf_counter", side_effect=count().__next__):
        assert len(in_turns({"a": lambda: 0}, 9, max_seconds=3)["a"]) == 6
    assert len(in_turns({"a": lambda: 0}, 9)["a"]) == 9


def test_seconds_and_results():
    with patch("mue_hf.inference.timing.time.perf_counter", side_effect=[1.0, 3.5]):
        assert timed(lambda: "output", CPU) == ("output", 2.5)
    calls = []
    results, seconds = compare({"one": lambda: calls.append(1) or "x", "other": lambda: "y"}, 4, CPU)
    assert results == {"one": "x", "other": "y"} and len(calls) == 5
    assert all(value > 0 for value in seconds.values())
