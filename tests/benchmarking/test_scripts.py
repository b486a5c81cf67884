"""The scripts of benchmarks/ on tiny models: what they measure is exact, and their records."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_inputs, tiny_model
from PIL import Image

from mue_hf import MuEConfig
from mue_hf.benchmarking.models import random_model
from mue_hf.inference.loading import load_checkpoint
from mue_hf.model.presets_mue import weights_fingerprint
from mue_hf.publishing.checkpoint import check_folder


def script(name):
    """A module of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        return import_module(name)


@pytest.mark.parametrize("draft_layers", [1, 2, 3])
@pytest.mark.parametrize("draft_tokens", [1, 3, 20])
@pytest.mark.parametrize("seed", [1, 2])
def test_self_speculation_generates_what_greedy_decoding_generates(draft_layers, draft_tokens, seed):
    speculation = script("self_speculation")
    model, inputs = tiny_model(seed=seed, std=0.3), tiny_inputs(batch=1, seed=seed)
    tokens, drafted, kept = speculation.speculate(model, inputs, 12, draft_layers, draft_tokens)
    assert tokens == speculation.plain(model, inputs, 12)
    assert 0 <= kept <= drafted


def test_self_speculation_counts_layers_when_all_drafts_are_kept(model):
    speculation, calls = script("self_speculation"), []
    handles = [
        layer.register_forward_hook(lambda *_, at=at: calls.append(at))
        for at, layer in enumerate(model.get_decoder().layers)
    ]
    _, drafted, kept = speculation.speculate(model, tiny_inputs(batch=1), 12, 2, 3, keep=lambda *_: True)
    for handle in handles:
        handle.remove()
    # Three times three drafts and a token of all layers, in whose call they catch up.
    assert drafted == kept == 9
    assert [calls.count(layer) for layer in range(4)] == [12, 12, 3, 3]


@pytest.mark.parametrize("spread", [0.01, 1.0], ids=["low rank", "full rank"])
@pytest.mark.parametrize("screen", ["int8", "rank"])
def test_screened_head_is_exact_and_its_bound_holds(spread, screen):
    screened = script("screened_head")
    torch.manual_seed(0)
    weight = 0.3 * torch.randn(2000, 8) @ torch.randn(8, 64) + spread * torch.randn(2000, 64)
    states = torch.randn(50, 64)
    head = torch.nn.Linear(64, 2000, bias=False).requires_grad_(False)
    head.weight.copy_(weight)
    screen = screened.Int8Screen(weight) if screen == "int8" else screened.LowRankScreen(weight, 8)
    scores, bounds = screen(states)
    exact = states.double() @ weight.double().t()
    ours = screened.ScreenedHead(head, screen, best=3)
    assert ((scores - exact).abs() <= bounds + ours.slack * states.norm(dim=1, keepdim=True)).all()
    assert torch.equal(ours(states).topk(3).indices, exact.topk(3).indices)
    assert ours.candidates(states).sum(1).min() >= 3


def test_scripts_write_their_records(tiny_sizes, tmp_path):
    common = ["--image-size", "32", "--tokens", "4", "--count", "1", "--repeats", "1"]
    for name, arguments in {
        "self_speculation": ["--draft-tokens", "2"],
        "screened_head": ["--rows", "1", "3", "--ranks", "4"],
    }.items():
        output, table = tmp_path / f"{name}.json", tmp_path / f"{name}.md"
        script(name).main([*common, *arguments, "--output", str(output), "--table", str(table)])
        record = json.loads(output.read_text())
        assert record["environment"]["hardware"]
        assert table.read_text().count("\n|") >= 4
        if name == "screened_head":
            assert all(row[screen]["same_best"] == 1 for row in record["heads"] for screen in ("int8", "rank 4"))
        else:
            assert [row["draft_layers"] for row in record["rows"]] == [1, 2, 3]


def test_random_checkpoint_is_what_the_benchmark_times(monkeypatch, engine_folders, tmp_path):
    monkeypatch.setattr(MuEConfig, "from_size", classmethod(lambda cls, size, **_: tiny_config(vocab_size=100)))
    target, script_main = tmp_path / "tiny", script("random_checkpoint").main
    arguments = [str(target), "--size", "tiny", "--processor", str(engine_folders["torch"]), "--image-size"]
    script_main([*arguments, "48"])
    check_folder(target)
    model, processor = load_checkpoint(str(target))
    assert weights_fingerprint(model) == weights_fingerprint(random_model("tiny", 48).model)
    assert not model.get_input_embeddings().weight[model.config.num_text_tokens :].any()
    assert processor(images=Image.new("RGB", (9, 9)))["pixel_values"].shape[2:] == (48, 48)
    with pytest.raises(ValueError, match="must be empty or new"):
        script_main([*arguments, "48"])
    arguments[0] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="must be a multiple of 16 up to 96, got 112"):
        script_main([*arguments, "112"])
    monkeypatch.setattr(MuEConfig, "from_size", classmethod(lambda cls, size, **_: tiny_config(vocab_size=50)))
    with pytest.raises(ValueError, match="must have at most 50 tokens, got"):
        script_main([*arguments, "48"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_layerwise_loss_script_compares_the_same_loss(tiny_sizes, tmp_path):
    benchmark = script("layerwise_loss")
    output, table = tmp_path / "loss.json", tmp_path / "loss.md"
    options = ["--images", "2", "--captions-per-image", "2", "--tokens", "4", "--grid", "3", "--repeats", "1"]
    benchmark.main([*options, "--output", str(output), "--table", str(table)])
    record = json.loads(output.read_text())
    assert record["losses"].keys() == benchmark.LOSSES.keys() and table.read_text().count("\n|") == 6
    assert all(one["peak_mib"] > 0 and one["seconds"] > 0 for one in record["losses"].values())
    model, batch = benchmark.build(SimpleNamespace(**record["settings"]))
    losses, gradients = {}, {}
    for name in ("last_layer", "naive", "layerwise"):
        losses[name] = benchmark.step(model.eval(), batch, benchmark.LOSSES[name], False)
        gradients[name] = model.lm_head.weight.grad.clone()
    assert losses["layerwise"] == pytest.approx(losses["naive"], rel=1e-5)
    assert losses["naive"] > 1.5 * losses["last_layer"]
    torch.testing.assert_close(gradients["layerwise"], gradients["naive"])


def test_scripts_of_the_engine_start_processes(engine_folders, photos, tmp_path):
    """What fresh processes say of themselves, for torch and an export."""
    models = ["--model", str(engine_folders["torch"]), "--exports", str(engine_folders["int8"]), "--repeats", "1"]
    output, table = tmp_path / "record.json", tmp_path / "table.md"
    files = ["--batch-sizes", "2", "--output", str(output), "--table", str(table)]
    script("cold_start").main([*models, *files, "--beams", "1", "--tokens", "3", "--images", *photos])
    rows = json.loads(output.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["torch", "int8"] and table.read_text().count("\n|") == 4
    assert rows[1]["environment"]["engine"].endswith("int8") and "engine" not in rows[0]["environment"]
    for row in rows:
        stages = [row[stage] for stage in ("imports", "loading", "caption")]
        assert all(0 < stage["cpu_seconds"] for stage in stages)
        assert row["total"]["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
        assert row["mib"]["peak"] >= max(row["mib"]["loaded"], row["mib"]["caption"]) > 50
    options = ["--threads", "1", "--workers", "0", "1", "--beams", "1"]
    script("bulk").main([*photos, *models, *files, *options])
    record = json.loads(output.read_text())
    assert record["decoding"]["prepare"] > record["decoding"]["decode"] > 0
    assert [(row["engine"], row["workers"]) for row in record["rows"]] == [
        (engine, workers) for workers in (0, 1) for engine in ("torch", "int8")
    ]
    for row in record["rows"]:
        assert row["rows"] == 3 and row["bad"] == 0 and row["images_per_second"] > 0 and row["main_mib"] > 50
        assert (row["worker_mib"] > 50) == (row["workers"] == 1)


def test_quality_of_exports(engine_folders, photos, tmp_path):
    """An export in float32 is torch; of one in int8 the figures are what its captions give."""
    data, output, table = (tmp_path / name for name in ("data.jsonl", "record.json", "table.md"))
    lines = [{"image": photo, "split": "test", "references": ["a cat", "a dog on a mat"]} for photo in photos[:3]]
    data.write_text("\n".join(map(json.dumps, lines)))
    exports = [str(engine_folders[name]) for name in ("float32", "int8")]
    given = ["--model", str(engine_folders["torch"]), "--exports", *exports, "--data", str(data), "--flips", "2"]
    script("engine_quality").main([*given, "--output", str(output), "--table", str(table)])
    models = json.loads(output.read_text())["models"]
    assert list(models) == ["torch", "float32", "int8"] and table.read_text().count("\n|") == 8
    assert models["float32"] == models["torch"]
    assert all(found["same"] == 1 and found["flip"] == 0 for found in models["torch"].values())
    model, processor = load_checkpoint(exports[1], engine="onnxruntime")
    reference, _ = load_checkpoint(str(engine_folders["torch"]))
    options = {"num_beams": 5, "exit_criterion": "never"}
    same = 0
    for photo in photos[:3]:
        inputs = processor(images=Image.open(photo))
        one, other = (processor.post_process_captions(way.generate(**inputs, **options)) for way in (model, reference))
        same += one == other
    assert models["int8"]["five beams"]["same"] == pytest.approx(same / 3)
