"""Bulk captioning on a local Ray cluster, one of whose actors is killed: the rows are those of one process."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from bulk_fixtures import BALANCED, make_checkpoint, make_images

from mue_hf import cli
from mue_hf.calibration.presets import write_preset

pytest.importorskip("ray.data", reason="needs the extra `ray`")
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds Ray's processes in /proc")


def parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def actors() -> list[int]:
    """Processes of actors whose line of parents leads here."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = (folder / "cmdline").read_bytes().startswith(b"ray::MapWorker")
        except OSError:
            continue
        ancestor = int(folder.name) if named else 0
        while ancestor > 1 and ancestor != os.getpid():
            ancestor = parent(ancestor)
        if ancestor == os.getpid():
            found.append(int(folder.name))
    return found


def kill_an_actor(part: Path, killed: list[int]) -> None:
    """Once there are results, of the first that is at work."""
    end = time.monotonic() + 300
    while time.monotonic() < end and not killed:
        if part.exists() and part.stat().st_size and (found := actors()):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])
        time.sleep(0.01)


def test_a_killed_actor_costs_nothing(tmp_path, capsys):
    made = make_images(tmp_path / "images", 120, 0.2, seed=11)
    (tmp_path / "images" / "list.txt").write_text("".join(f"{name}\n" for name in made))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    command = ["caption", tmp_path / "images" / "list.txt", "--model", checkpoint, "--dtype", "float64"]
    command = [str(word) for word in [*command, "--workers", 0, "--json", "--batch-size", 1, "--out"]]
    assert cli.main([*command, str(tmp_path / "alone.jsonl")]) == 1
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_actor, args=(tmp_path / "ray.jsonl.part", killed), daemon=True)
    killer.start()
    assert cli.main([*command, str(tmp_path / "ray.jsonl"), "--ray", "--actors", "1"]) == 1
    killer.join(1)
    assert killed
    alone, together = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("alone", "ray"))
    assert together == alone and len(together) == 120
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert second["compute_skipped"] == pytest.approx(first["compute_skipped"])


def test_an_audit_that_goes_on_at_full_depth(tmp_path, capsys):
    """Until the budget is refuted rows are those of one process; new actors run the rest at full depth."""
    made = make_images(tmp_path / "images", 40, 0.2, seed=11)
    (tmp_path / "images" / "list.txt").write_text("".join(f"{name}\n" for name in made))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    promise = {"risk": "disagreement", "task": "captioning", "budget": 0.05}
    write_preset(checkpoint, "bold", BALANCED | promise)
    command = ["caption", tmp_path / "images" / "list.txt", "--model", checkpoint, "--dtype", "float64"]
    command = [str(word) for word in [*command, "--workers", 0, "--json", "--batch-size", 1, "--preset", "bold"]]
    for name, more in (("alone", ["--audit", "0.5"]), ("ray", ["--audit", "0.5", "--on-drift", "full", "--ray"])):
        with pytest.warns(UserWarning, match="is refuted after row"):
            assert cli.main([*command, "--out", str(tmp_path / f"{name}.jsonl"), *more]) == 1
    assert cli.main([*command, "--out", str(tmp_path / "full.jsonl"), "--generate", "exit_criterion=never"]) == 1
    alone, together, full = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("alone", "ray", "full")
    )
    first, second, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    refuted_at = first["audit"]["refuted_at"]
    assert second["audit"]["refuted_at"] == refuted_at < 30 and second["audit_seconds"] > 0
    assert together[: refuted_at + 1] == alone[: refuted_at + 1]
    rest = range(refuted_at + 1, 40)
    assert [together[row]["caption"] for row in rest] == [full[row]["caption"] for row in rest]
    assert [together[row]["full_depth"] for row in rest] == [full[row]["error"] is None for row in rest]


def test_actors_run_an_engine(engine_folders, tmp_path):
    made = make_images(tmp_path / "images", 12, 0.2, seed=11)
    (tmp_path / "images" / "list.txt").write_text("".join(f"{name}\n" for name in made))
    command = ["caption", tmp_path / "images" / "list.txt", "--model", engine_folders["int8"], "--batch-size", 1]
    command += ["--engine", "onnxruntime", "--workers", 0, "--decoder-threshold", 0.8]
    command += ["--generate", "no_repeat_ngram_size=1", "--out"]
    rows = []
    for name, more in (("alone", []), ("ray", ["--ray"])):
        out = tmp_path / f"{name}.jsonl"
        assert cli.main([str(word) for word in [*command, out, *more]]) < 2
        rows.append(out.read_text())
    assert rows[0] == rows[1] and rows[0].count("\n") == 12


def test_bad_arguments_start_no_cluster(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a.png\n")
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    command = ["caption", str(tmp_path / "list.txt"), "--model", str(checkpoint), "--out", str(tmp_path / "out.jsonl")]
    assert cli.main([*command, "--ray", "--columns", "nosuch"]) == 2
    assert "`columns` must be among" in capsys.readouterr().err
