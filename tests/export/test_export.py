"""`mue-hf export`: graphs beside a copy of a checkpoint, whole or not at all, and commands on what was written."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

from mue_hf import MuEForConditionalGeneration, MuEProcessor, cli
from mue_hf.calibration.presets import write_preset
from mue_hf.export import checkpoint as export
from mue_hf.export import scan
from mue_hf.export.graphs import Part, graph_of, parts_of, trunk_graph, with_weights
from mue_hf.export.images import CalibrationImages
from mue_hf.export.int8 import static_int8
from mue_hf.model.graph_files_mue import LINEAR, graph_names, sha256_of
from mue_hf.model.presets_mue import weights_fingerprint


@pytest.fixture
def traced(engine_folders, monkeypatch):
    """Graphs come from what was exported before, and the names of those that are asked for are noted."""
    import onnx

    asked = []
    files = {
        ("Trunk", ("features",)): "trunk",
        ("EncoderProjection", ("query_keys_values",)): "encoder_0_project",
        ("EncoderLayer", ("output",)): "encoder_0",
        ("DecoderProjection", ("keys", "values")): "decoder_0_project",
        ("CrossProjection", ("keys", "values")): "cross_0",
        ("DecoderLayer", ("output", "keys", "values")): "decoder_0",
        ("Matrix", ("logits",)): "head",
    }
    files |= {("Matrix", (name,)): name for names in LINEAR.values() for name in names}

    def load(part):
        asked.append(files[type(part.module).__name__, part.outputs])
        return onnx.load(engine_folders["float32"] / "onnx" / f"{asked[-1]}.onnx")

    monkeypatch.setattr(export, "graph_of", load)
    monkeypatch.setattr("mue_hf.export.graphs.graph_of", load)
    return asked


def test_the_folder(engine_folders):
    source, folder = engine_folders["torch"], engine_folders["int8"]
    manifest = json.loads((folder / "onnx/manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()} | {"onnx"}
    assert set(manifest["graphs"]) == {"trunk", *graph_names(tiny_model().config)}
    assert {path.name for path in (folder / "onnx").iterdir()} == {
        "manifest.json",
        *(graph[kind] for graph in manifest["graphs"].values() for kind in ("file", "data")),
    }
    for graph in manifest["graphs"].values():
        assert graph["sha256"] == sha256_of(folder / "onnx" / graph["file"])
        assert graph["data_sha256"] == sha256_of(folder / "onnx" / graph["data"])
    assert manifest["weights"] == {"model.safetensors": sha256_of(source / "model.safetensors")}
    precisions = {name: graph["precision"] for name, graph in manifest["graphs"].items()}
    assert precisions.pop("trunk") == "float32" and set(precisions.values()) == {"int8"}
    errors = {name: graph["error"] for name, graph in manifest["graphs"].items()}
    assert errors.pop("trunk") < 1e-5 and all(1e-4 < error < 0.1 for error in errors.values())
    whole = json.loads((engine_folders["float32"] / "onnx/manifest.json").read_text())
    assert all(graph["error"] < 1e-5 for graph in whole["graphs"].values())


def test_goes_on_after_an_interruption_and_keeps_what_is_whole(engine_folders, traced, tmp_path):
    target, seen = tmp_path / "new", []

    def stop(name, graph):
        seen.append((name, graph["kept"]))
        if name == "encoder_1" and not graph["kept"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export_checkpoint(engine_folders["torch"], target, report=stop)
    assert not target.exists()
    part = tmp_path / ".new.part/onnx"
    for name in ("encoder_0", "encoder_0_project"):
        (part / f"{name}.onnx").write_bytes(b"damaged")
    seen.clear()
    export.export_checkpoint(engine_folders["torch"], target, report=stop)
    linear = [name for names in LINEAR.values() for name in names]
    assert [name for name, kept in seen if kept] == ["trunk", *linear, "encoder_1_project", "encoder_1"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    expected = json.loads((engine_folders["float32"] / "onnx/manifest.json").read_text())
    assert expected["int8"] == [] and expected["calibration"] is None
    assert json.loads((target / "onnx/manifest.json").read_text()) == expected
    # a folder that is there whole stays, as it is
    seen.clear()
    traced.clear()
    export.export_checkpoint(engine_folders["torch"], target, report=stop)
    assert len(seen) == len(expected["graphs"]) and all(kept for _, kept in seen) and not traced


def test_each_kind_of_layer_is_traced_once(engine_folders, traced, tmp_path):
    export.export_checkpoint(engine_folders["torch"], tmp_path / "new")
    linear = [name for names in LINEAR.values() for name in names]
    layers = ["cross_0", "decoder_0", "decoder_0_project", "encoder_0", "encoder_0_project"]
    assert sorted(traced) == sorted([*layers, "head", "trunk", *linear])


def test_another_order_of_weights_is_seen(engine_folders):
    import onnx

    parts = dict(parts_of(tiny_model(vocab_size=100, dtype=torch.float32), None))
    graph = onnx.load(engine_folders["float32"] / "onnx/encoder_0.onnx")
    moved = with_weights(graph, parts["encoder_2"].module)
    expected = onnx.load(engine_folders["float32"] / "onnx/encoder_2.onnx")
    assert {x.name: x.raw_data for x in moved.graph.initializer} == {
        x.name: x.raw_data for x in expected.graph.initializer
    }
    assert with_weights(graph, parts["decoder_0"].module) is None
    graph.graph.initializer[0].name = "unknown"
    assert with_weights(graph, parts["encoder_2"].module) is None


class TestRefused:
    def test_what_is_there(self, engine_folders, traced, tmp_path):
        source = engine_folders["torch"]
        with pytest.raises(ValueError, match="another folder than the checkpoint"):
            export.export_checkpoint(source, source)
        with pytest.raises(ValueError, match="must be empty, new, or of the same weights.*--overwrite"):
            export.export_checkpoint(source, engine_folders["int8"])
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="only a checkpoint can be overwritten"):
            export.export_checkpoint(source, tmp_path, overwrite=True)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        with pytest.raises(ValueError, match="`precision` must be one of"):
            export.export_checkpoint(source, tmp_path / "new", precision="int4")

    def test_a_graph_that_gives_something_else(self, engine_folders, traced, tmp_path, monkeypatch):
        monkeypatch.setattr(export, "with_weights", lambda graph, module: graph)
        with pytest.raises(ValueError, match="graph 'encoder_1_project' must give what torch gives, but differs by"):
            export.export_checkpoint(engine_folders["torch"], tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_trunk_that_torch_cannot_export(self, monkeypatch):
        def fail(part):
            tried.append(part.fixed["pixels"])
            raise RuntimeError("no\nsuch operator")

        tried, model = [], tiny_model(dtype=torch.float32)
        monkeypatch.setattr("mue_hf.export.graphs.graph_of", fail)
        with pytest.raises(ValueError, match="the trunk must be one .* 'resnet': such operator; pass --torch-trunk"):
            trunk_graph(dict(parts_of(model, (64, 64)))["trunk"], model.config)
        assert tried == [(1,), (1, 2, 3)]

    def test_packages_that_are_missing(self, engine_folders, monkeypatch, tmp_path):
        monkeypatch.setattr(export, "PACKAGES", ("mue-hf", "no-such-package"))
        with pytest.raises(ValueError, match=r"needs the extra `export` .*pip install 'mue-hf\[export\]'"):
            export.export_checkpoint(engine_folders["torch"], tmp_path / "new")


def test_a_trunk_of_one_image_size_says_so(engine_folders, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "trunk_graph", lambda part, config: (export.graph_of(part), [64, 64]))
    export.export_checkpoint(engine_folders["torch"], tmp_path / "new")
    model = MuEForConditionalGeneration.from_pretrained(tmp_path / "new", engine="onnxruntime")
    assert model.trunk_features(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match=r"image size that the trunk was exported for, \[64, 64\], got \[64, 48\]"):
        model.trunk_features(torch.zeros(1, 3, 64, 48))


class TestCommands:
    def test_export_with_a_trunk_of_torch_and_caption(self, engine_folders, traced, photo, tmp_path, capsys):
        target = str(tmp_path / "new")
        assert cli.main(["export", str(engine_folders["torch"]), target, "--torch-trunk"]) == 0
        printed = capsys.readouterr().out
        assert printed.count(" error ") == len(graph_names(tiny_model().config)) and "trunk" not in traced
        records = []
        for engine in ("torch", "onnxruntime"):
            fixed = ["--repeats", "1", "--json", "--no-png", "--image-threshold", "0.5", "--decoder-threshold", "0.8"]
            assert cli.main(["caption", photo, "--model", target, "--engine", engine, *fixed]) == 0
            records.append(json.loads(capsys.readouterr().out))
        timed = ("seconds", "full_depth_seconds", "versions")
        slow, fast = ({name: x for name, x in one.items() if name not in timed} for one in records)
        assert fast == slow

    def test_publish_takes_the_graphs_along(self, engine_folders, tmp_path):
        source, target = shutil.copytree(engine_folders["float32"], tmp_path / "copy"), tmp_path / "published"
        assert cli.main(["publish", str(source), "--to", str(target)]) == 0
        assert {path.name for path in (target / "onnx").iterdir()} == {
            path.name for path in (source / "onnx").iterdir()
        }
        MuEForConditionalGeneration.from_pretrained(target, engine="onnxruntime")
        (source / "onnx/head.onnx").write_bytes(b"damaged")
        assert cli.main(["publish", str(source), "--to", str(tmp_path / "again")]) == 2
        assert not (tmp_path / "again").exists()

    def test_publish_knows_presets_of_the_graphs(self, engine_folders, tmp_path, capsys):
        """The card says what they hold for; where the graphs are others, they are presets of other weights."""
        model = MuEForConditionalGeneration.from_pretrained(engine_folders["int8"], engine="onnxruntime")
        promise = {"task": "captioning", "risk": "disagreement", "budget": 0.05, "delta": 0.1, "n": 300}
        promise |= {"method": "hoeffding-bentkus", "bound": 0.04, "decoder_exit_threshold": 0.5}
        for kind, code in (("int8", 0), ("float32", 2)):
            source = shutil.copytree(engine_folders[kind], tmp_path / kind)
            write_preset(source, "mine", promise | {"weights_fingerprint": weights_fingerprint(model)})
            assert cli.main(["publish", str(source), "--to", str(tmp_path / f"to-{kind}")]) == code
        card = (tmp_path / "to-int8/README.md").read_text()
        assert 'in int8 with `engine="onnxruntime"` alone' in card
        assert "the preset 'mine' was calibrated on other weights" in capsys.readouterr().err

    def test_what_contradicts(self, engine_folders, photo, capsys):
        fixed = ["caption", photo, "--engine", "onnxruntime", "--model"]
        assert cli.main([*fixed, str(engine_folders["torch"])]) == 2
        assert "mue-hf export CKPT DIR" in capsys.readouterr().err
        assert cli.main([*fixed, str(engine_folders["int8"]), "--dtype", "bfloat16"]) == 2
        assert "`dtype` must be left out" in capsys.readouterr().err
        assert cli.main(["bench", "--engine", "onnxruntime"]) == 2
        assert "pass `--model`" in capsys.readouterr().err

    def test_bench_keeps_torch_as_the_reference(self, engine_folders, tmp_path, capsys):
        what = ["--model", str(engine_folders["float32"]), "--engine", "onnxruntime", "--output", str(tmp_path / "x")]
        sizes = ["--batch-sizes", "2", "--beams", "1", "--tokens", "3", "--repeats", "1", "--json"]
        assert cli.main(["bench", *what, *sizes, "--variants", "stock", "plain", "lossless", "spread"]) == 0
        record = json.loads(capsys.readouterr().out)
        variants = record["cells"]["batch 2, beam 1"]["variants"]
        assert list(variants) == ["stock", "plain", "lossless", "spread", "lossless on float32", "spread on float32"]
        assert [one["engine"] for one in variants.values()] == ["torch"] * 4 + ["onnxruntime"] * 2


def test_graphs_of_the_decoder_take_one_row_and_biases_that_broadcast(engine_folders):
    import onnxruntime

    parts = dict(parts_of(tiny_model(vocab_size=100, dtype=torch.float32), None))
    part = parts["decoder_1"]
    feed = dict(zip(part.inputs, part.example, strict=True))
    broadcast = {name: feed[name][:1] for name in ("bias", "cross_bias")}
    # one row of one image
    alone = {name: value[:1] for name, value in feed.items()}
    alone |= {"fold": feed["fold"][:1, :4], "cross_bias": feed["cross_bias"][:1, :, :4]}
    session = onnxruntime.InferenceSession(engine_folders["float32"] / "onnx/decoder_1.onnx")
    for given in (feed, feed | broadcast, alone):
        got = session.run(None, {name: value.contiguous().numpy() for name, value in given.items()})
        with torch.no_grad():
            expected = part.module(**given)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-4)


def test_graphs_of_the_encoder_take_batches_of_one(engine_folders):
    import onnxruntime

    parts = dict(parts_of(tiny_model(vocab_size=100, dtype=torch.float32), None))
    for name in ("encoder_1_project", "encoder_1"):
        part = parts[name]
        session = onnxruntime.InferenceSession(engine_folders["float32"] / f"onnx/{name}.onnx")
        for rows, tokens in ((3, 7), (1, 7), (1, 1)):
            given = [value[:rows, :tokens] for value in part.example]
            got = session.run(None, {key: x.contiguous().numpy() for key, x in zip(part.inputs, given, strict=True)})
            with torch.no_grad():
                expected = part.module(*given)
            torch.testing.assert_close(torch.from_numpy(got[0]), expected, rtol=1e-4, atol=1e-4)


def test_layers_compute_no_shapes(engine_folders):
    import onnx

    for name in ("encoder_0", "encoder_0_project", "cross_0", "decoder_0", "decoder_0_project", "decoder_1"):
        graph = onnx.load(engine_folders["float32"] / f"onnx/{name}.onnx").graph
        made = {output for node in graph.node for output in node.output}
        assert not [node.op_type for node in graph.node if node.op_type in ("Shape", "Squeeze")]
        assert not [node.name for node in graph.node if node.op_type == "Reshape" and node.input[1] in made]
        used = {name for node in graph.node for name in node.input}
        assert {value.name for value in graph.initializer} <= used


def test_convolutions_that_pad_as_tensorflow_does_pad_by_themselves():
    layers = pytest.importorskip("timm.layers")
    import onnxruntime
    from torch import nn

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (
                layers.Conv2dSame(3, 4, 3, stride=2),
                layers.Conv2dSame(4, 4, 5, stride=2, groups=4),
            )

        def forward(self, pixels):
            return self.second(self.first(pixels).clamp(0, 6))

    module = Padded().eval()
    part = Part(module, (torch.randn(2, 3, 16, 16),), ("pixels",), ("features",), {"pixels": (1,)})
    graph, size = trunk_graph(part, None)
    assert size is None and "Pad" not in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for height, width in ((16, 16), (17, 15), (9, 30), (10, 11)):
        pixels = torch.randn(1, 3, height, width)
        got = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        torch.testing.assert_close(got, module(pixels), rtol=1e-4, atol=1e-4)


def test_the_tracer_leaves_shapes_open(engine_folders):
    part = dict(parts_of(tiny_model(vocab_size=100, dtype=torch.float32), None))["head"]
    (value,) = graph_of(part).graph.input
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == ["states_0", 32]


class TestInt8:
    @pytest.fixture
    def images(self, engine_folders, tmp_path):
        return calibration_images(engine_folders, photo_folder(tmp_path / "photos", 5))

    def test_the_trunk_is_calibrated_on_images(self, engine_folders, traced, images, tmp_path):
        import onnx

        source, target = engine_folders["torch"], tmp_path / "new"
        options = {"precision": "int8", "images": images, "int8_trunk": True, "keep_float": ["encoder_*", "head"]}
        manifest = export.export_checkpoint(source, target, **options)
        precisions = {name: graph["precision"] for name, graph in manifest["graphs"].items()}
        assert sorted(name for name, one in precisions.items() if one == "int8") == sorted(manifest["int8"])
        encoder = {f"encoder_{number}{end}" for number in range(3) for end in ("", "_project")}
        assert set(precisions) - set(manifest["int8"]) == {*encoder, "head"}
        assert manifest["calibration"]["images"] == 5 and manifest["calibration"]["method"] == "MinMax"
        assert 1e-4 < manifest["graphs"]["trunk"]["error"] < 0.1 and manifest["graphs"]["head"]["error"] < 1e-5
        # what follows a convolution clips its output before that is made 8 bits wide
        nodes = onnx.load(target / "onnx/trunk.onnx").graph.node
        maker = {name: node for node in nodes for name in node.output}
        convolutions = [node for node in nodes if node.op_type == "Conv"]
        assert len(convolutions) > 5
        assert all(maker[name].op_type == "DequantizeLinear" for node in convolutions for name in node.input[:2])
        clipped = {name for node in nodes if node.op_type in ("Relu", "Clip") for name in node.input}
        assert not clipped & {name for node in convolutions for name in node.output}
        pixels = next(images.batches(5))
        torch_model, model = (
            MuEForConditionalGeneration.from_pretrained(folder, **options)
            for folder, options in ((source, {"dtype": torch.float32}), (target, {"engine": "onnxruntime"}))
        )
        expected, got = (one.eval().trunk_features(pixels) for one in (torch_model, model))
        assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()

    def test_graphs_that_hold_shapes(self):
        import onnxruntime
        from onnx import helper, numpy_helper

        draw = np.random.default_rng(0)
        weight = draw.normal(size=(4, 3, 3, 3)).astype(np.float32)
        values = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([0, 4, -1]), "shape")]
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["r"])]
        nodes.append(helper.make_node("Reshape", ["r", "shape"], ["z"]))
        ends = [helper.make_tensor_value_info(*end) for end in (("x", 1, ["n", 3, 8, 8]), ("z", 1, ["n", 4, 36]))]
        graph = helper.make_model(
            helper.make_graph(nodes, "g", ends[:1], ends[1:], values), opset_imports=[helper.make_opsetid("", 20)]
        )
        pixels = torch.from_numpy(draw.normal(size=(2, 3, 8, 8)).astype(np.float32))
        quantised = static_int8(graph, iter([pixels]))
        expected, got = (
            onnxruntime.InferenceSession(one.SerializeToString()).run(None, {"x": pixels.numpy()})[0]
            for one in (graph, quantised)
        )
        assert 0 < np.abs(got - expected).max() < 0.05 * np.abs(expected).max()

    def test_other_images_start_anew(self, engine_folders, traced, images, tmp_path):
        def stop(name, graph):
            seen.append((name, graph["kept"]))
            raise KeyboardInterrupt

        others, seen = calibration_images(engine_folders, photo_folder(tmp_path / "others", 4)), []
        for given in (images, images, others):
            options = {"precision": "int8", "images": given, "int8_trunk": True, "report": stop}
            with pytest.raises(KeyboardInterrupt):
                export.export_checkpoint(engine_folders["torch"], tmp_path / "new", **options)
        assert seen == [("trunk", False), ("trunk", True), ("trunk", False)]

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"int8_trunk": True}, "`int8_trunk` needs images .*pass --calibrate-on IMAGES"),
            ({"int8_trunk": True, "trunk": False}, "`int8_trunk` needs the trunk among the graphs"),
            ({"int8_trunk": True, "precision": "float32"}, "`int8_trunk` goes with `precision"),
            ({"keep_float": ["head"], "precision": "float32"}, "`keep_float` goes with `precision"),
            ({"attention": "bfloat16", "precision": "float32"}, '`attention="bfloat16"` goes with `precision="int8"`'),
            ({"attention": "float16"}, "`attention` must be one of .*'bfloat16'.*, got 'float16'"),
            ({"keep_float": ["head", "encoder_9"]}, "`keep_float` must name graphs .* got 'encoder_9', .*'encoder_0'"),
            ({"keep_float": ["trunk"]}, "`keep_float` must name graphs that would be in int8, got 'trunk'"),
        ],
    )
    def test_refused(self, engine_folders, traced, tmp_path, options, what):
        with pytest.raises(ValueError, match=what):
            export.export_checkpoint(engine_folders["torch"], tmp_path / "new", **{"precision": "int8"} | options)
        assert not traced and not list(tmp_path.iterdir())

    def test_a_part_alone_is_an_export_with_the_others_in_float(
        self, engine_folders, traced, images, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(scan, "KINDS", ("trunk", "cross_*", "head"))
        monkeypatch.setattr(scan, "graph_names", lambda config: ["encoder_1", "head"])
        source, kept = engine_folders["torch"], ["encoder_*", "decoder_*", "cross_*", "pos_*", "image_proj"]
        alone = tmp_path / "alone"
        export.export_checkpoint(source, alone, precision="int8", keep_float=kept)
        (head,) = scan.sensitivities(source, alone, images)
        found = {one.name: one for one in scan.sensitivities(source, engine_folders["int8"], images, True)}
        assert list(found) == ["all", "trunk", "cross_*", "head", "encoder_1"]
        assert head.name == "all" and (head.same, head.error) == (found["head"].same, found["head"].error)
        assert all(0 <= one.same <= 1 and 1e-5 < one.error < 0.5 for one in found.values())
        assert len({one.error for one in found.values()}) == 5
        half = tmp_path / "bfloat16"
        export.export_checkpoint(source, half, precision="int8", attention="bfloat16", keep_float=["head"])
        rows = {one.name: one for one in scan.sensitivities(source, half, images, True)}
        assert list(rows) == ["all", "attention", "trunk", "cross_*", "head", "encoder_1"]
        assert rows["head"] == found["head"] and 1e-5 < rows["attention"].error < 0.02
        (exact,) = scan.sensitivities(source, engine_folders["float32"], images)
        assert exact.same == 1 and exact.error < 1e-4

    def test_the_command(self, engine_folders, traced, images, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(scan, "KINDS", ("head",))
        monkeypatch.setattr(scan, "graph_names", lambda config: ["head"])
        photos = str(tmp_path / "photos")
        command = ["export", str(engine_folders["torch"]), str(tmp_path / "new"), "--int8", "--calibrate-on", photos]
        assert cli.main([*command, "--calibration-images", "3", "--keep-float", "encoder_*,trunk"]) == 2
        assert "`keep_float` must name" in capsys.readouterr().err
        assert cli.main([*command, "--calibration-images", "3", "--int8-trunk", "--scan"]) == 0
        printed = capsys.readouterr().out
        assert "trunk                 int8" in printed and "on 3 images" in printed
        assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["all", "head", "wrote"]
        for option in (["--scan"], ["--calibrate-on", photos]):
            assert cli.main([*command[:3], *option]) == 2
            assert "pass --int8 too" in capsys.readouterr().err
        assert cli.main([*command[:4], "--scan"]) == 2
        assert "pass --calibrate-on IMAGES" in capsys.readouterr().err


def photo_folder(folder, count: int):
    """Images that differ, from one seed for each folder name."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(len(folder.name))
    for number in range(count):
        Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def calibration_images(engine_folders, *names, **options):
    processor = MuEProcessor.from_pretrained(engine_folders["torch"]).image_processor
    return CalibrationImages(processor, [str(name) for name in names], **options)


class TestImages:
    @pytest.fixture
    def take(self, engine_folders):
        return partial(calibration_images, engine_folders)

    @staticmethod
    def table(path, *splits: str):
        photo_folder(path.parent, len(splits))
        rows = [{"image": f"{number}.png", "split": split} for number, split in enumerate(splits)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def test_rows_of_the_split_and_no_others(self, take, tmp_path):
        path = self.table(tmp_path / "data/captions.jsonl", "train", "test", "dev", "train", "test")
        names = {split: [row.name for row in take(path, split=split).rows] for split in ("train", "dev", "train+dev")}
        assert names == {"train": ["0.png", "3.png"], "dev": ["2.png"], "train+dev": ["0.png", "2.png", "3.png"]}
        # metadata.jsonl says what is in its folder
        path.rename(path.with_name("metadata.jsonl"))
        assert len(take(path.parent)) == 2

    def test_drawn_once_and_recorded(self, take, tmp_path):
        one, other = photo_folder(tmp_path / "one", 6), photo_folder(tmp_path / "other", 3)
        whole, drawn, again = take(one, other, one), take(one, other, count=4), take(one, other, count=4)
        assert len(whole) == 9 and len({row.image for row in drawn.rows}) == 4
        assert drawn.record == again.record and drawn.record["images"] == 4
        assert drawn.record["sha256"] != take(one, other, count=5).record["sha256"]
        assert [len(batch) for batch in drawn.batches(3)] == [3, 1]
        assert next(drawn.batches(1)).shape == (1, 3, 64, 64)
        assert next(take(one, size=(32, 48)).batches(2)).shape == (2, 3, 32, 48)

    def test_no_test_split(self, take, tmp_path):
        mixed = self.table(tmp_path / "data/captions.jsonl", "train", "test")
        alone = self.table(tmp_path / "held/captions.jsonl", "test", "test")
        folder = photo_folder(tmp_path / "all/test", 1).parent
        fine = photo_folder(tmp_path / "all/test_of_my_camera", 1)
        for name, split in ((mixed, "test"), (mixed, "train+test"), (mixed, "test2015")):
            with pytest.raises(ValueError, match="must be of no test split, got the split 'test.*another split"):
                take(name, split=split)
        with pytest.raises(ValueError, match=r"rows of the split 'train', got \['test'\] .* no test split"):
            take(alone)
        for name in (folder, folder / "test"):
            with pytest.raises(ValueError, match="must be of no test split, got the folder 'test'"):
                take(name)
        assert len(take(fine)) == 1

    def test_what_else_is_refused(self, take, tmp_path):
        folder = photo_folder(tmp_path / "photos", 2)
        (folder / "broken.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match="calibration images must be whole, got the image .*broken.jpg"):
            take(folder)
        with pytest.raises(ValueError, match="`source` must exist"):
            take(tmp_path / "none")
        with pytest.raises(ValueError, match="`calibration_images` must be at least 1"):
            take(folder, count=0)
