"""Bulk work on ONNX Runtime: the rows of torch, the journal between engines, audits, processes without sessions."""

import json

import pytest
from bulk_fixtures import make_images

from mue_hf import MuEProcessor, cli
from mue_hf.inference.decoders import Decoders
from mue_hf.inference.journal import Journal

ROWS = 13
EXITS = ["--image-threshold", "0.5", "--decoder-threshold", "0.8"]
# Captions of different letters.
LETTERS = ["--generate", "no_repeat_ngram_size=1"]


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A list of images, of which some are damaged or missing."""
    folder = tmp_path_factory.mktemp("images")
    made = make_images(folder, ROWS, 0.3, seed=5)
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in made), encoding="utf-8")
    return folder / "list.txt"


@pytest.fixture
def bulk(engine_folders, tmp_path, capsys):
    """Runs `mue-hf` on a checkpoint, with the engine of its kind: exit code, rows, and what was written."""

    def run(kind, source, *arguments, out="out.jsonl", command="caption", workers=0):
        engine = "torch" if kind == "torch" else "onnxruntime"
        given = [command, source, "--model", engine_folders[kind], "--engine", engine, "--workers", workers]
        given += [*EXITS, *(LETTERS if command == "caption" else []), "--out", tmp_path / out]
        code = cli.main([str(word) for word in [*given, *arguments]])
        path = tmp_path / out
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return code, rows, capsys.readouterr()

    return run


def stop_after(rows):
    """What a kill does to a journal."""
    append = Journal.append

    def stopped(journal, records):
        append(journal, records)
        if journal.counts["rows"] >= rows:
            raise KeyboardInterrupt

    return stopped


def test_rows_are_those_of_torch_in_any_batch_with_any_workers(bulk, listed):
    columns = ["--columns", "image_exit_layers,decoder_exit_layers,flops_skipped"]
    code, expected, _ = bulk("torch", listed, *columns)
    assert code == 1 and len(expected) == ROWS and len({row["caption"] for row in expected}) > 2
    for size, workers in ((1, 0), (4, 2)):
        out = f"{size}.jsonl"
        assert bulk("float32", listed, *columns, "--batch-size", size, out=out, workers=workers)[:2] == (1, expected)


def test_processes_that_decode_know_no_engine(bulk, engine_folders, listed):
    """They are made while sessions are there, and are given none."""
    bulk("float32", listed)
    decoders = Decoders(MuEProcessor.from_pretrained(engine_folders["float32"]).image_processor, 1)
    try:
        assert decoders.pool.submit(eval, "'onnxruntime' in __import__('sys').modules").result() is False
    finally:
        decoders.close()


@pytest.mark.parametrize(("first", "then"), [("torch", "float32"), ("float32", "torch"), ("int8", "int8")])
def test_a_kill_costs_nothing(bulk, listed, monkeypatch, first, then):
    """In float32 the engine may change between two runs, as a device may."""
    _, expected, _ = bulk(first, listed, "--batch-size", 1, out="whole.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop_after(5))
        assert bulk(first, listed, "--batch-size", 1)[0] == 130
    # int8 depends on its batch
    size = 1 if first == "int8" else 3
    assert bulk(then, listed, "--batch-size", size)[:2] == (1, expected)


@pytest.mark.parametrize(("first", "then"), [("torch", "int8"), ("int8", "float32")])
def test_another_precision_is_another_model(bulk, listed, tmp_path, monkeypatch, first, then):
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", stop_after(5))
        assert bulk(first, listed)[0] == 130
    kept = (tmp_path / "out.jsonl.part").read_bytes()
    code, rows, output = bulk(then, listed)
    assert code == 2 and not rows and "was begun with others: weights '" in output.err
    assert (tmp_path / "out.jsonl.part").read_bytes() == kept
    assert bulk(then, listed, "--overwrite")[0] == 1


def test_audits_are_those_of_torch(bulk, listed):
    arguments = ["--audit", "0.6", "--json"]
    found = {kind: bulk(kind, listed, *arguments, out=f"{kind}.jsonl") for kind in ("torch", "float32")}
    assert found["torch"][1] == found["float32"][1] and any(row["changed"] for row in found["torch"][1])
    slow, fast = (json.loads(output.out)["audit"] for _, _, output in found.values())
    assert slow == fast and slow["rows"] > 2


def test_answers_are_those_of_torch(bulk, listed, tmp_path):
    statements = ("a cat", "two red boxes", "nothing at all")
    names = listed.read_text().split()[:4]
    pairs = [{"image": str(listed.parent / name), "hypothesis": text} for name in names for text in statements]
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = {"command": "answer", "workers": 1}
    slow, fast = (
        bulk(kind, table, "--columns", "decoder_exit_layers,scores", out=f"{kind}.jsonl", **given)[1]
        for kind in ("torch", "float32")
    )
    assert len(slow) == len(pairs)
    for one, other in zip(slow, fast, strict=True):
        scores = [row.pop("scores") for row in (one, other)]
        assert one == other and scores[0] == (None if one["error"] else pytest.approx(scores[1], abs=1e-4))
