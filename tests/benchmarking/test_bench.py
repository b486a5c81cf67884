"""`mue-hf bench`: the stock reference, forced depths, what is counted, the record, and the command on tiny models."""

import json
import shutil
import time
from functools import partial
from statistics import median
from typing import ClassVar

import pytest
import torch
from conftest import tiny_config, tiny_inputs, tiny_model
from torch.nn.modules import module
from torch.utils.flop_counter import FlopCounterMode
from transformers import BlipConfig, BlipForConditionalGeneration, EncoderDecoderCache

from mue_hf import cli
from mue_hf.benchmarking import cells, peers
from mue_hf.benchmarking import run as benchmark
from mue_hf.benchmarking.cells import measure_cell, ratio, summary
from mue_hf.benchmarking.models import load_exports
from mue_hf.benchmarking.probes import component_seconds, count_flops, peak_bytes
from mue_hf.benchmarking.record import Record
from mue_hf.benchmarking.stock import StockModel
from mue_hf.benchmarking.tables import draw_plot, markdown
from mue_hf.benchmarking.variants import (
    DEFAULT_VARIANTS,
    half_pattern,
    make_variants,
    spread_pattern,
    variant_names,
)
from mue_hf.inference.flops import caption_flops, trunk_flops
from mue_hf.inference.loading import load_checkpoint
from mue_hf.model.criteria_mue import CRITERIA, Criterion, LayerStates, register_criterion

STEPS = 6


def decoding(beams=1, **more):
    steps = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    return {"num_beams": beams, "do_sample": False, "return_dict_in_generate": True} | steps | more


def variants_of(model, inputs, names=DEFAULT_VARIANTS, beams=1, **exits):
    return {one.name: one for one in make_variants(names, model, inputs, exits, beams=beams, steps=STEPS)}


def inner_of(variant):
    """The model with the weights, which the stock reference wraps."""
    return variant.model.model if isinstance(variant.model, StockModel) else variant.model


def hooks(model):
    """How many hooks are on the modules of a model, and on all modules."""
    everywhere = len(module._global_forward_hooks) + len(module._global_forward_pre_hooks)
    return everywhere + sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "joint"])
@pytest.mark.parametrize("beams", [1, 4])
def test_stock_generates_what_the_model_generates(decomposed, beams, inputs):
    model = tiny_model(modality_decomposition=decomposed)
    options = decoding(beams, output_logits=True)
    ours, stock = model.generate(**inputs, **options), StockModel(model).generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(stock.logits), atol=1e-12, rtol=0)
    assert torch.equal(ours.sequences, stock.sequences)


def test_stock_keeps_keys_of_every_beam(model, inputs):
    seen = []
    stock = StockModel(model)
    stock.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["cache"]), with_kwargs=True)
    stock.generate(**inputs, **decoding(4))
    assert type(seen[0]) is EncoderDecoderCache
    assert seen[0].cross_attention_cache.layers[0].keys.shape[0] == 3 * 4


@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "joint"])
def test_depths_are_forced(decomposed, inputs):
    model = tiny_model(modality_decomposition=decomposed)
    for name in ("half", "spread", "synchronised"):
        variant = variants_of(model, inputs)[name]
        output = variant.run(decoding())
        assert torch.equal(output.decoder_exit_layers, variant.pattern.decoder.t())
        assert torch.equal(output.image_exit_layers, variant.pattern.image)
        if decomposed:
            assert output.text_exit_layers.tolist() == [variant.pattern.text] * 3
    assert hooks(model) == 0


def test_depths_of_all_beams_are_forced(model, inputs):
    variant = variants_of(model, inputs, beams=3)["spread"]
    assert variant.run(decoding(3)).executed_layers["decoder"] == int(variant.pattern.decoder.sum())


@pytest.mark.parametrize("layers", [1, 2, 6, 12])
@pytest.mark.parametrize("batch", [1, 16])
def test_spread_depths_are_half_on_average(layers, batch):
    config = tiny_config(encoder_layers=layers, decoder_layers=layers)
    spread, half = (make(config, batch, 5, 30) for make in (spread_pattern, half_pattern))
    assert spread.decoder.double().mean() == pytest.approx(max(layers, 2) / 2, rel=0.1)
    assert set(spread.decoder.unique().tolist()) == set(range(1, max(layers, 2)))
    assert set(half.decoder.flatten().tolist()) == {(layers + 1) // 2}
    together = spread.synchronised()
    assert torch.equal(together.decoder, spread.decoder.amax(1, keepdim=True).expand(30, batch * 5))
    assert set(together.image.tolist()) == {int(spread.image.max())}
    assert spread.text == together.text == half.text


def test_unused_exits_change_nothing(model, inputs):
    enabled, lossless = (variants_of(model, inputs)[name].run(decoding()) for name in ("enabled", "lossless"))
    assert torch.equal(enabled.sequences, lossless.sequences)
    assert enabled.executed_layers == lossless.executed_layers


def test_unused_exits_of_every_criterion_look_and_change_nothing(monkeypatch):
    model, inputs = tiny_model(dtype=torch.float32), tiny_inputs(dtype=torch.float32)
    looking = ["confidence", "margin", "entropy", "patience", "agreement"]
    names = [name for name in variant_names() if name.startswith("enabled")]
    assert names == ["enabled", *(f"enabled-{name}" for name in looking)]
    variants, heads, looks = variants_of(model, inputs, ["lossless", *names]), [], []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    logits = LayerStates.logits
    monkeypatch.setattr(LayerStates, "logits", lambda *args: looks.append(1) or logits(*args))
    lossless, calls = variants["lossless"].run(decoding()), len(heads)
    assert not looks
    for name in names:
        heads.clear()
        looks.clear()
        output = variants[name].run(decoding())
        assert torch.equal(output.sequences, lossless.sequences)
        assert output.executed_layers == lossless.executed_layers
        # after every layer but the last, at a list of tokens whose rows have been taken out of the head
        assert len(looks) == (0 if name == "enabled" else calls * (model.config.decoder_layers - 1))
        assert len(heads) == calls


def test_stock_and_plain_run_an_unfolded_trunk_of_their_own(model, inputs):
    def norms(model):
        return sum(isinstance(one, torch.nn.BatchNorm2d) for one in model.get_encoder().embed_images.modules())

    found = norms(model)
    model.fold_batch_norms()
    variants = variants_of(model, inputs)
    for name, variant in variants.items():
        assert norms(inner_of(variant)) == (found if name in ("stock", "plain") else 0)
    lossless, plain = variants["lossless"].model, variants["plain"].model
    assert (lossless.config._attn_implementation, plain.config._attn_implementation) == ("sdpa", "eager")
    assert plain.lm_head.weight is lossless.lm_head.weight
    tokens = {name: variants[name].run(decoding()).sequences for name in ("stock", "plain", "lossless")}
    assert torch.equal(tokens["lossless"], tokens["plain"]) and torch.equal(tokens["lossless"], tokens["stock"])


@pytest.mark.parametrize(("name", "beams"), [("stock", 3), ("lossless", 3), ("spread", 1), ("spread", 3)])
def test_counts_what_torch_counts_with_eager_attention(name, beams):
    model, inputs = tiny_model(dtype=torch.float32).requires_grad_(False), tiny_inputs(dtype=torch.float32)
    variant = variants_of(model, inputs, beams=beams)[name]
    # The first run prepares what later ones use.
    variant.run(decoding(beams))
    _, ours = count_flops(lambda: variant.run(decoding(beams)))
    inner_of(variant).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        variant.run(decoding(beams))
    assert ours == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", ["lossless", "half", "spread"])
def test_counts_what_follows_from_the_sizes(name):
    inputs = tiny_inputs(batch=1, dtype=torch.float32)
    model = tiny_model(dtype=torch.float32).requires_grad_(False)
    variant = variants_of(model, inputs)[name]
    output, flops = count_flops(lambda: variant.run(decoding()))
    trunk, channels, image_tokens = trunk_flops(model, inputs["pixel_values"].shape[1:])
    parts = caption_flops(
        model.config,
        output.decoder_exit_layers[0].tolist(),
        image_tokens=image_tokens,
        text_tokens=inputs["input_ids"].shape[1],
        image_exit_layers=int(output.image_exit_layers),
        text_exit_layers=int(output.text_exit_layers),
        channels=channels,
        max_tokens=STEPS,
        trunk=trunk,
    )
    assert flops == sum(parts.values())


def test_memory_of_the_decode(model, inputs):
    megabyte = torch.ones(1 << 17, dtype=torch.float64)

    @torch.no_grad()
    def run():
        megabyte.repeat(8)
        model.get_encoder()(**inputs)
        one = megabyte + 1
        del one
        return megabyte + 2

    output, peak = peak_bytes(run, model.device, after=model.get_encoder())
    assert output[0] == 3
    # The encoder's own tensors, the eight and the one do not add up.
    assert megabyte.nbytes * 0.9 < peak < 1.2 * megabyte.nbytes
    assert peak_bytes(run, model.device)[1] >= 8 * megabyte.nbytes
    assert hooks(model) == 0


def test_stock_takes_more_memory_for_beams(model, inputs):
    peaks = {}
    for name, variant in variants_of(model, inputs, beams=4).items():
        _, peaks[name] = peak_bytes(partial(variant.run, decoding(4)), model.device, variant.model.get_encoder())
    assert peaks["stock"] > 1.5 * max(peak for name, peak in peaks.items() if name != "stock")


@pytest.mark.parametrize("decomposed", [True, False], ids=["decomposed", "joint"])
@pytest.mark.parametrize("name", ["stock", "lossless", "spread"])
def test_components(name, decomposed, inputs, monkeypatch):
    model = tiny_model(modality_decomposition=decomposed)
    variant = variants_of(model, inputs)[name]
    # The final norm of the decoder is no component: it comes between the layers and the head.
    for slow, pause in ((variant.model.lm_head, 0.02), (inner_of(variant).get_decoder().layer_norm, 0.05)):
        forward = slow.forward
        monkeypatch.setattr(
            slow, "forward", lambda *args, call=forward, pause=pause: (time.sleep(pause), call(*args))[1]
        )
    start = time.perf_counter()
    seconds = component_seconds(variant.model, lambda: variant.run(decoding()))
    assert sum(seconds.values()) <= time.perf_counter() - start
    streams = {"image_encoder", "text_encoder"} if decomposed else {"encoder"}
    assert seconds.keys() == streams | {"trunk", "cross_keys", "decoder_layers", "head", "bookkeeping"}
    assert seconds["head"] >= STEPS * 0.02
    assert seconds["bookkeeping"] >= STEPS * 0.05
    assert min(seconds.values()) > 0
    assert hooks(variant.model) == 0


def test_timing_components_changes_nothing_that_runs():
    inputs = tiny_inputs(batch=2, dtype=torch.float32)
    # One prompt, which the model encodes once.
    inputs |= {name: inputs[name][:1].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    model = tiny_model(dtype=torch.float32).requires_grad_(False)
    variant = variants_of(model, inputs)["lossless"]
    _, flops = count_flops(lambda: variant.run(decoding()))
    _, watched = count_flops(lambda: component_seconds(model, lambda: variant.run(decoding())))
    assert watched == flops


def test_a_cell_compares_its_variants(inputs):
    model, inputs = tiny_model(dtype=torch.float32).requires_grad_(False), tiny_inputs(dtype=torch.float32)
    variants = variants_of(model, inputs, ("stock", "lossless", "half"), low={"decoder_exit_threshold": -2.0})
    runs = []
    cell = measure_cell(list(variants.values()), decoding(), repeats=4, advance=lambda: runs.append(1))
    assert len(runs) == 4 * (4 + 3)
    assert cell["rounds"] == 4
    figures = cell["variants"]
    assert list(figures) == ["stock", "lossless", "half", "low"]
    for one in figures.values():
        assert len(one["seconds"]) == 4
        assert one["quartiles"][0] <= one["p50"] <= one["quartiles"][1] <= one["p95"]
        assert 0 < one["encoder_seconds"] < one["p50"]
        assert one["time_ratio"]["interval"][0] <= one["time_ratio"]["value"] <= one["time_ratio"]["interval"][1]
    assert figures["lossless"]["time_ratio"]["value"] == figures["lossless"]["flop_ratio"] == 1
    assert figures["stock"]["speedup_over_stock"]["value"] == 1
    assert figures["stock"]["identical"] == 1
    assert figures["stock"]["encoder_passes"] > 1
    assert figures["half"]["layers"]["ratio"] == (2 + 2 + 2) / (3 + 3 + 4)
    assert figures["low"]["layers"]["decoder"] == 1
    assert figures["half"]["flop_ratio"] < 1
    saved = 1 - figures["half"]["flop_ratio"]
    assert figures["half"]["realised_saving"] == pytest.approx((1 - figures["half"]["time_ratio"]["value"]) / saved)
    assert "realised_saving" not in figures["lossless"]


def test_rounds_end_after_the_time_is_up(model, inputs):
    variants = variants_of(model.requires_grad_(False), inputs, ("lossless",))
    assert measure_cell(list(variants.values()), decoding(), repeats=9, max_seconds=1e-9)["rounds"] == 3


def test_summary_and_ratio():
    one = summary([(float(x), x / 2) for x in range(1, 101)])
    assert one["p50"] == 50.5
    assert one["quartiles"] == [25.75, 75.25]
    assert one["p95"] == pytest.approx(95.05)
    assert one["encoder_seconds"] == 25.25
    # Both variants twice as slow in some rounds, which the ratio does not see.
    noise = [1.0, 2.0, 1.0, 2.0, 1.0]
    assert ratio([3 * x for x in noise], noise) == {"value": 3.0, "interval": (3.0, 3.0)}
    low, high = ratio([3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, 2.0])["interval"]
    assert low < median([3, 4, 5, 6]) < high


HEAD = {"settings": {"name": "x", "variants": ["half"]}, "environment": {"threads": 1}}


def test_a_record_goes_on(tmp_path):
    path = tmp_path / "deep" / "speed.json"
    record = Record(path, HEAD)
    record.add("batch 1, beam 1", {"variants": {}, "pair": (1, 2)})
    again = Record(path, HEAD)
    assert "batch 1, beam 1" in again and "batch 1, beam 5" not in again
    assert again.content == json.loads(path.read_text())
    assert again.content == HEAD | {"cells": {"batch 1, beam 1": {"variants": {}, "pair": [1, 2]}}}
    assert [file.name for file in path.parent.iterdir()] == ["speed.json"]


@pytest.mark.parametrize(
    ("content", "head", "message"),
    [
        ("{}", HEAD, "is no record"),
        ("[]", HEAD, "is no record"),
        ("nonsense", HEAD, "is no record"),
        (json.dumps(HEAD | {"cells": {}}), HEAD | {"environment": {"threads": 2}}, "threads = 1, this run has 2"),
    ],
    ids=["empty", "list", "text", "threads"],
)
def test_another_record_is_not_touched(content, head, message, tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Record(path, head)
    assert path.read_text() == content


@pytest.fixture
def small_peers(monkeypatch):
    """A peer of one layer."""

    def build(image_size):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BlipConfig(vision_config=sizes | {"image_size": image_size}, text_config=sizes | {"vocab_size": 99})
        config.text_config.update({"bos_token_id": 90, "sep_token_id": 91, "eos_token_id": 91, "pad_token_id": 0})
        ids = torch.tensor([[90, 91]])
        return BlipForConditionalGeneration(config), (image_size // 16) ** 2 + 1, ids

    monkeypatch.setattr(peers, "PEERS", {"small": (build, 16, 48)})


@pytest.fixture
def run_bench(tmp_path, capsys):
    """Runs the command on a tiny scale; returns its exit code and what it printed."""

    def run(*arguments):
        fixed = ["--tokens", "4", "--repeats", "1", "--output", str(tmp_path / "speed.json")]
        code = cli.main(["bench", *fixed, *map(str, arguments)])
        return code, capsys.readouterr()

    return run


SMALL = ("--image-size", 32, "--beams", 2, "--batch-sizes")


def test_the_command_measures_shows_and_goes_on(run_bench, tiny_sizes, small_peers, tmp_path, monkeypatch):
    table, folder = tmp_path / "speed.md", tmp_path / "plots"
    names = ("stock", "lossless", "spread")
    common = (
        "--variants",
        *names,
        "--peers",
        "small",
        "small:native",
        "--exits",
        'low={"decoder_exit_threshold": -2}',
    )
    common += SMALL
    code, captured = run_bench(*common, 1)
    assert code == 0
    assert "Batch 1, beam 2 (1 rounds" in captured.out
    rows = [line.split(" | ") for line in captured.out.splitlines() if line.startswith("|")]
    for name in (*names, "low", "small", "small:native"):
        assert [row for row in rows if row[:3] == [f"| {name}", "torch", "float32"] and len(row) == 15]
    assert len({len(row) for row in rows if row[0] == "| stock"}) == 2

    measured = []
    monkeypatch.setattr(benchmark, "measure_cell", lambda *a, **k: (measured.append(1), measure_cell(*a, **k))[1])
    code, captured = run_bench(*common, 1, 2, "--table", table, "--plots", folder, "--json")
    assert code == 0
    assert len(measured) == 1
    record = json.loads(captured.out)
    assert record == json.loads((tmp_path / "speed.json").read_text())
    assert list(record["cells"]) == ["batch 1, beam 2", "batch 2, beam 2"]
    assert record["settings"]["image_tokens"] == 4
    # As many tokens, and one for the whole image.
    assert [peer["image_size"] for peer in record["settings"]["peers"].values()] == [32, 48]
    assert [peer["image_tokens"] for peer in record["settings"]["peers"].values()] == [5, 10]
    assert record["environment"]["hardware"] and record["environment"]["versions"]["torch"]
    cell = record["cells"]["batch 2, beam 2"]
    assert cell["variants"]["small"]["layers"] is cell["variants"]["small"]["components"] is None
    assert cell["variants"]["small"]["flop_ratio"] > 0
    assert cell["variants"]["low"]["layers"]["decoder"] == 1
    assert table.read_text() == markdown(record)
    assert draw_plot(record, folder).read_bytes().startswith(b"\x89PNG")

    code, captured = run_bench(*common, 1, "--tokens", 5)
    assert code == 2
    assert "new_tokens = 4, this run has 5" in captured.err


def test_on_a_checkpoint(run_bench, checkpoint, photos):  # noqa: F811
    arguments = ("--model", checkpoint, "--images", *photos, "--preset", "balanced", "--variants", "stock", "lossless")
    code, captured = run_bench(*arguments, "--batch-sizes", 2, "--beams", 1, 2, "--json")
    assert code == 0
    record = json.loads(captured.out)
    assert record["settings"]["name"].endswith("on 3 photos")
    for cell in record["cells"].values():
        assert list(cell["variants"]) == ["stock", "lossless", "balanced"]
        assert cell["variants"]["stock"]["identical"] == 1
        assert cell["variants"]["balanced"]["layers"]["decoder"] == 1


class TestExports:
    """Variants on what `mue-hf export` wrote, beside torch."""

    def arguments(self, folders, *exports):
        return ("--model", folders["torch"], "--batch-sizes", 2, "--beams", 1, "--exports", *exports)

    def test_engines_are_rows_beside_torch(self, engine_folders, run_bench, tmp_path):
        names = ("stock", "lossless", "enabled", "spread", "synchronised")
        common = ("--variants", *names, "--exits", 'low={"decoder_exit_threshold": -2}', "--plots", tmp_path / "plots")
        common += self.arguments(engine_folders, engine_folders["float32"], engine_folders["int8"])
        code, captured = run_bench(*common, "--json")
        assert code == 0, captured.err
        record = json.loads(captured.out)
        figures = record["cells"]["batch 2, beam 1"]["variants"]
        shared = ("lossless", "enabled", "spread", "low")
        on_exports = [f"{name} on {export}" for export in ("float32", "int8") for name in shared]
        assert list(figures) == [*names, "low", *on_exports]
        assert {(one["engine"], one["precision"]) for one in list(figures.values())[:6]} == {("torch", "float32")}
        for row in on_exports:
            name, export = row.split(" on ")
            one, own = figures[row], figures[f"lossless on {export}"]
            assert (one["engine"], one["precision"]) == ("onnxruntime", export)
            assert (one["variant"], one["export"]) == (name, export)
            assert one["flops"] == figures[name]["flops"] and one["decode_peak_bytes"] is None
            assert one["components"].keys() == figures[name]["components"].keys()
            assert one["time_ratio"]["value"] == pytest.approx(one["p50"] / figures["lossless"]["p50"])
            assert one["speedup_over_stock"]["value"] == pytest.approx(figures["stock"]["p50"] / one["p50"])
            assert one["speedup_over_full_depth"]["value"] == pytest.approx(own["p50"] / one["p50"])
            if name in ("spread", "low"):
                saved = 1 - figures[name]["flop_ratio"]
                assert one["realised_saving"] == pytest.approx((1 - one["p50"] / own["p50"]) / saved)
        assert {figures[f"{name} on float32"]["identical"] for name in shared} == {1}
        assert record["settings"]["exports"].keys() == {"float32", "int8"}
        assert record["environment"]["versions"]["onnxruntime"]

        _, captured = run_bench(*common)
        rows = [line.split(" | ") for line in captured.out.splitlines() if line.startswith("| spread on int8")]
        assert [row[:3] for row in rows] == [["| spread on int8", "onnxruntime", "int8"]] * 2
        assert rows[0][-2] == "-" and "int8: an export, int8, SHA-256 of its manifest" in captured.out

        manifest = engine_folders["int8"] / "onnx/manifest.json"
        other = shutil.copytree(engine_folders["int8"], tmp_path / "int8")
        (other / "onnx/manifest.json").write_text(manifest.read_text() + "\n")
        code, captured = run_bench(*common[:-1], other)
        assert code == 2 and "holds cells with exports = " in captured.err

    def test_the_same_variant_in_torch_is_compared_with(self, engine_folders):
        model, inputs = load_checkpoint(str(engine_folders["torch"]))[0], tiny_inputs(dtype=torch.float32)
        export = load_exports([engine_folders["float32"]], model.requires_grad_(False))["float32"]
        sizes = {"beams": 1, "steps": STEPS}
        variants = make_variants(("lossless", "half"), model, inputs, {}, **sizes)
        variants += make_variants(("stock", "half"), export, inputs, {}, export="float32", **sizes)
        figures = measure_cell(variants, decoding(), repeats=1)["variants"]
        assert list(figures) == ["lossless", "half", "half on float32"]
        assert figures["half"]["identical"] < figures["half on float32"]["identical"] == 1
        # there is no full depth of this engine
        assert "speedup_over_full_depth" not in figures["half on float32"]

    def changed(self, folders, tmp_path, file, **fields):
        """A copy of the checkpoint with other fields in a file."""
        copy = shutil.copytree(folders["torch"], tmp_path / "changed", dirs_exist_ok=True)
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | fields))
        return copy

    def test_presets_are_those_of_the_model(self, engine_folders, run_bench, tmp_path):
        presets = {"low": {"decoder_exit_threshold": -2.0}}
        model = self.changed(engine_folders, tmp_path, "generation_config.json", exit_presets=presets)
        arguments = self.arguments({"torch": model}, engine_folders["float32"])
        code, captured = run_bench(*arguments, "--preset", "low", "--variants", "lossless", "--json")
        assert code == 0, captured.err
        figures = json.loads(captured.out)["cells"]["batch 2, beam 1"]["variants"]
        assert figures["low on float32"]["layers"] == figures["low"]["layers"]
        assert figures["low"]["layers"]["decoder"] == 1

    @pytest.mark.parametrize("precision", ["float32", "int8"])
    def test_exports_of_another_model_are_refused(self, precision, engine_folders, tmp_path):
        folder, model = engine_folders[precision], load_checkpoint(str(engine_folders["torch"]))[0]
        model.get_decoder().layers[1].fc1.weight.data[0, 0] += 1
        with pytest.raises(ValueError, match=f"{precision} has other weights; run `mue-hf export`"):
            load_exports([folder], model)
        model = load_checkpoint(str(self.changed(engine_folders, tmp_path, "config.json", text_layers=2)))[0]
        with pytest.raises(ValueError, match=r"has another configuration \(text_layers\); run"):
            load_exports([folder], model)
        with pytest.raises(ValueError, match="`exports` must be folders of different names"):
            load_exports([folder, tmp_path / precision], model)

    def test_bad_input_is_a_message_and_code_2(self, engine_folders, run_bench, tmp_path):
        good = engine_folders["float32"]
        for arguments, message in (
            (("--exports", good), "need the checkpoint that `mue-hf export` ran on; pass `--model`"),
            (
                self.arguments(engine_folders, tmp_path / "none"),
                "`--exports` must be folders that `mue-hf export` wrote",
            ),
            (
                self.arguments(engine_folders, engine_folders["torch"]),
                "without onnx/manifest.json; export the checkpoint",
            ),
            ((*self.arguments(engine_folders, good), "--dtype", "bfloat16"), "`dtype` must be left out"),
            ((*self.arguments(engine_folders, good), "--variants", "stock"), "`exports` run none of the variants"),
        ):
            code, captured = run_bench(*arguments)
            assert code == 2 and message in captured.err
        assert not (tmp_path / "speed.json").exists()


def test_old_options_are_accepted_and_warned_of(run_bench, tiny_sizes):
    code, captured = run_bench("--arms", "lossless", "--cost-model", *SMALL, 1, "--json")
    assert code == 0
    assert list(json.loads(captured.out)["cells"]["batch 1, beam 2"]["variants"]) == ["lossless"]
    assert "mue-hf bench: --arms is now --variants" in captured.err
    assert "mue-hf bench: --cost-model is ignored" in captured.err


def test_a_record_of_version_0_1_goes_on_and_is_shown(run_bench, tiny_sizes, tmp_path):
    path, options = tmp_path / "speed.json", ("--variants", "stock", "lossless", "half", *SMALL, 1)
    run_bench(*options)
    record = json.loads(path.read_text())
    figures = record["cells"]["batch 1, beam 2"]["variants"].values()
    assert record["settings"]["exports"] == {} and all(one.pop("speedup_over_full_depth") for one in figures)
    shown = markdown(record)
    assert {(one.pop("engine"), one.pop("precision")) for one in figures} == {("torch", "float32")}
    del record["settings"]["exports"]
    old = json.dumps(record).replace('"variants"', '"arms"').replace('"realised_saving"', '"saving_kept"')
    old = json.loads(old) | {"exit_costs": {"cpu": {"decoder": {"fixed": 1.0, "per_row": 1.0, "shrink": 0.0}}}}
    old["settings"]["cost_model"] = True
    path.write_text(json.dumps(old))
    assert markdown(old) == shown
    assert "saving_kept" not in markdown(old) and draw_plot(old, tmp_path).is_file()
    _, again = run_bench(*options)
    assert again.out == f"{shown}\n"


@pytest.fixture
def registered():
    """A criterion that a user has registered."""

    @register_criterion
    class Norm(Criterion):
        name = "norm"
        summary = "the state is large enough"
        scores: ClassVar[list[torch.Tensor]] = []

        @classmethod
        def sweep(cls, num_layers):
            return (100.0, 10.0)

        def score(self, states):
            self.scores.append(states.current.flatten(1).norm(dim=1))
            return self.scores[-1]

    yield Norm
    del CRITERIA["norm"]


def test_a_registered_criterion_shows_up(registered, run_bench, tiny_sizes, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    assert "enabled-norm" in capsys.readouterr().out
    exits = 'taken={"exit_criterion": "norm", "decoder_exit_threshold": 0}'
    code, captured = run_bench("--variants", "lossless", "enabled-norm", "--exits", exits, *SMALL, 1, "--json")
    assert code == 0, captured.err
    variants = json.loads(captured.out)["cells"]["batch 1, beam 2"]["variants"]
    assert list(variants) == ["lossless", "enabled-norm", "taken"]
    assert registered.scores and variants["enabled-norm"]["identical"] == 1
    assert variants["enabled-norm"]["layers"] == variants["lossless"]["layers"]
    assert variants["taken"]["layers"]["decoder"] == 1


def test_no_load_average_on_windows(model, inputs, monkeypatch):
    monkeypatch.delattr(cells.os, "getloadavg")
    variants = variants_of(model.requires_grad_(False), inputs, ("lossless",))
    cell = measure_cell(list(variants.values()), decoding(), repeats=1)
    assert cell["load_average"] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "fast"], "needs a checkpoint"),
        (["--images", "a.png"], "needs a checkpoint"),
        (["--image-size", 70], "must be a multiple of 16 up to 96, got 70"),
        (["--image-size", 112], "must be a multiple of 16 up to 96, got 112"),
        (["--exits", "half={}"], "names that no other variant has, got ['half']"),
        (["--exits", "new=3"], "with options in JSON"),
        (["--image-size", 64, "--exits", 'new={"decoder_exit_threshhold": 1}'], "did you mean"),
        (["--plots", "x", "--variants", "stock"], "needs the variant lossless"),
        (["--device", "nowhere"], "`--device` must be"),
        (["--image-size", 64, "--peers", "clip"], "must name some of"),
        (["--image-size", 64, "--peers", "blip-base:30"], "must have a multiple of 16"),
    ],
    ids=[
        "preset",
        "images",
        "odd size",
        "large size",
        "name",
        "value",
        "option",
        "plots",
        "device",
        "peer",
        "peer size",
    ],
)
def test_bad_input_is_a_message_and_code_2(arguments, message, run_bench, tiny_sizes, tmp_path):
    if "--image-size" not in arguments:
        arguments = ["--image-size", 64, *arguments]
    code, captured = run_bench(*arguments)
    assert code == 2
    assert message in captured.err
    assert not (tmp_path / "speed.json").exists()
