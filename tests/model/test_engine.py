"""ONNX Runtime under the same loop: what torch computes, and what is refused."""

import copy
import json
import shutil
import warnings
from functools import partial

import pytest
import torch
from conftest import tiny_inputs
from doors import COMMIT
from safetensors.torch import save_file
from stack import generate
from transformers import AutoModelForImageTextToText

from mue_hf import MuECache, MuEForConditionalGeneration
from mue_hf.data.features import trunk_fingerprint
from mue_hf.inference.flops import trunk_flops
from mue_hf.model import engine_mue, graph_files_mue
from mue_hf.model.criteria_mue import ExitPolicy
from mue_hf.model.presets_mue import weights_fingerprint
from mue_hf.model.views_mue import ImageView

ANSWERS = [[5, 6], [7], [5, 8, 9]]


@pytest.fixture(scope="module")
def reference(engine_folders):
    return MuEForConditionalGeneration.from_pretrained(engine_folders["torch"], dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(engine_folders):
    return MuEForConditionalGeneration.from_pretrained(engine_folders["float32"], engine="onnxruntime")


@pytest.fixture
def inputs():
    return tiny_inputs(4, dtype=torch.float32)


def depths(output) -> list:
    return [output[f"{stream}_exit_layers"].tolist() for stream in ("image", "text", "decoder")]


def mixed(run, criterion: str, **options) -> dict:
    """Options of a criterion by which decoder rows of `run` leave at different layers of the same step."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        chosen = {"exit_criterion": criterion, "decoder_exit_threshold": middle, **options}
        found = run(**chosen).decoder_exit_layers
        if any(len(step.unique()) > 1 for step in found.T):
            return chosen
        low, high = (middle, high) if found.max() == 1 else (low, middle)
    pytest.fail("no threshold separates the rows")


def exits(model, inputs, kind: str) -> dict:
    if kind == "off":
        return {"exit_criterion": "never"}
    if kind == "fixed":
        options = {"image_exit_layer": torch.tensor([1, 3, 2, 1]), "text_exit_layer": 1, "decoder_exit_layer": 3}
        return {"exit_criterion": "fixed", **options}
    streams = {"image_exit_threshold": [0.27, 0.815, 2.0], "text_exit_threshold": 0.5} if kind == "similarity" else {}
    return mixed(partial(generate, model, inputs), kind, **streams)


@torch.no_grad()
def steps(model, inputs, kv: str) -> list[torch.Tensor]:
    """The logits of steps of several tokens and of other depths in each row, between which rows change places."""
    draw, cache, logits = torch.Generator().manual_seed(3), MuECache(model.config, 1, kv), []
    encoded = model.get_encoder()(**inputs)
    for step, tokens in enumerate((1, 1, 1, 2, 1, 1, 3, 1, 1, 1)):
        ids = torch.randint(5, 90, (8, tokens), generator=draw)
        depth = torch.randint(1, model.config.decoder_layers + 1, (8,), generator=draw)
        policy = ExitPolicy("fixed", depth=depth) if step % 3 else ExitPolicy()
        given = {"encoder_outputs": encoded, "decoder_input_ids": ids, "cache": cache}
        logits.append(model(**given, exit_policy=policy).logits)
        cache.reorder_cache(torch.randint(0, 2, (8,), generator=draw) + torch.arange(8) // 2 * 2)
        if step == 6:
            cache.crop(-1)
    return logits


class TestSameAsTorch:
    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("kind", ["off", "fixed", "confidence", "margin", "similarity"])
    def test_tokens_depths_and_scores(self, reference, engine, inputs, kind, beams):
        options = exits(reference, inputs, kind) | {"num_beams": beams, "output_scores": True}
        slow, fast = generate(reference, inputs, **options), generate(engine, inputs, **options)
        assert fast.sequences.tolist() == slow.sequences.tolist()
        assert depths(fast) == depths(slow) and fast.executed_layers == slow.executed_layers
        torch.testing.assert_close(fast.scores, slow.scores, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    def test_keys_of_skipped_layers(self, reference, engine, inputs, kv, beams):
        options = mixed(partial(generate, reference, inputs), "similarity", exit_kv=kv, num_beams=beams)
        slow, fast = generate(reference, inputs, **options), generate(engine, inputs, **options)
        assert fast.sequences.tolist() == slow.sequences.tolist()
        assert depths(fast) == depths(slow) and fast.executed_layers == slow.executed_layers

    @pytest.mark.parametrize("kv", ["project", "copy", "exact"])
    def test_steps_of_other_depths_lengths_and_orders(self, reference, engine_folders, inputs, kv):
        """What the cache holds of a layer has room for more positions or not, by what ran before."""
        engine = MuEForConditionalGeneration.from_pretrained(engine_folders["float32"], engine="onnxruntime")
        slow, fast = steps(reference, inputs, kv), steps(engine, inputs, kv)
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
        # a layer is one graph, whatever it runs on
        projected = {name.startswith("decoder_") for name in engine.engine.sessions if name.endswith("_project")}
        assert (True in projected) == (kv == "project")

    def test_rescored_beams(self, reference, engine, inputs):
        options = {"num_beams": 3, "exit_rescore": True, "output_scores": True}
        options |= mixed(partial(generate, reference, inputs), "similarity", **options)
        slow, fast = generate(reference, inputs, **options), generate(engine, inputs, **options)
        assert fast.sequences.tolist() == slow.sequences.tolist()
        torch.testing.assert_close(fast.sequences_scores, slow.sequences_scores, rtol=1e-4, atol=1e-4)

    def test_rows_that_end_and_prompts_padded_on_the_left(self, reference, engine, inputs):
        first = generate(reference, inputs, max_new_tokens=2).sequences[0, 2].item()
        prompt = {
            "decoder_input_ids": torch.tensor([[1, 1, 0], [0, 9, 8], [1, 0, 7], [0, 5, 6]]),
            "decoder_attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]]),
        }
        for options in (
            {"eos_token_id": first},
            prompt,
            mixed(partial(generate, reference, inputs), "similarity") | prompt,
        ):
            slow, fast = generate(reference, inputs, **options), generate(engine, inputs, **options)
            assert fast.sequences.tolist() == slow.sequences.tolist() and depths(fast) == depths(slow)

    def test_images_that_are_missing_or_of_another_size(self, reference, engine, inputs):
        some = inputs | {"patch_mask": torch.tensor([True, False, True, False])}
        wide = inputs | {"pixel_values": inputs["pixel_values"][:, :, :48]}
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for given in (some, wide, text):
            with torch.no_grad():
                slow, fast = reference(**given), engine(**given)
            torch.testing.assert_close(fast.logits, slow.logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["never", "confidence", "similarity"])
    def test_score_answers(self, reference, engine, inputs, kind):
        slow, fast = (partial(m.score_answers, ANSWERS, return_dict=True, **inputs) for m in (reference, engine))
        options = {"exit_criterion": "never"} if kind == "never" else mixed(slow, kind)
        expected, got = slow(**options), fast(**options)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-4, atol=1e-4)
        assert depths(got) == depths(expected)

    def test_without_a_cache_and_constrained(self, reference, engine, inputs):
        ids = torch.tensor([[0, 5, 9, 7]] * 4)
        allowed = {"prefix_allowed_tokens_fn": lambda row, prefix: [5 + len(prefix), 40 + row]}
        for model in (reference, engine):
            model.found = generate(model, inputs, **allowed).sequences
            with torch.no_grad():
                model.logits = model(**inputs, decoder_input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(engine.logits, reference.logits, rtol=1e-4, atol=1e-4)
        assert engine.found.tolist() == reference.found.tolist()

    def test_the_trunk_takes_one_image_a_call(self, reference, engine, inputs, monkeypatch):
        sizes, run = [], engine.engine.run
        monkeypatch.setattr(engine.engine, "run", lambda name, *some: sizes.append(len(some[0])) or run(name, *some))
        for pixels in (inputs["pixel_values"], inputs["pixel_values"][:1]):
            found = engine.trunk_features(pixels)
            torch.testing.assert_close(found, reference.trunk_features(pixels), rtol=1e-4, atol=1e-4)
        assert sizes == [1] * 5

    def test_a_head_of_fewer_tokens_than_the_vocabulary(self, reference, engine):
        states, head = torch.randn(3, 2, 32), copy.deepcopy(engine.lm_head)
        assert torch.allclose(head(states), reference.lm_head(states), atol=1e-5)
        head.num_text_tokens = 99
        head.engine = type("Cut", (), {"run": lambda self, *args: [engine.engine.run(*args)[0][:, :99]]})()
        text = slice(0, 99)
        assert torch.allclose(head(states, text), reference.lm_head(states, text), atol=1e-5)
        assert torch.equal(head(states), reference.lm_head(states))

    def test_other_doors_copies_and_threads(self, reference, engine, inputs, engine_folders):
        other = AutoModelForImageTextToText.from_pretrained(engine_folders["float32"], engine="onnxruntime")
        expected, threads = generate(reference, inputs).sequences.tolist(), torch.get_num_threads()
        made = dict(engine.engine.sessions)
        try:
            for model in (other, copy.deepcopy(engine)):
                assert generate(model, inputs).sequences.tolist() == expected
            torch.set_num_threads(threads + 1)
            assert generate(engine, inputs).sequences.tolist() == expected
            taken = {
                name: session.get_session_options().intra_op_num_threads
                for name, (session, *_) in engine.engine.sessions.items()
            }
            assert {taken[name] for name in ("trunk", "image_proj", "encoder_0", "head")} == {threads + 1}
            # small layers take one
            assert taken["decoder_0"] == 1
            assert not {id(one) for one, *_ in made.values()} & {
                id(one) for one, *_ in engine.engine.sessions.values()
            }
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_take_turns_where_they_have_many_tokens(engine, monkeypatch, masked):
    """With one bias for all rows, and with one each."""
    layer = engine.model.encoder.layers[1]
    heads, draw = engine.config.encoder_attention_heads, torch.Generator().manual_seed(0)
    states = torch.randn(5, 16, engine.config.d_model, generator=draw)
    bias = torch.randn(5 if masked else 1, heads, 16, 16, generator=draw)
    expected, rows, run = layer(states, bias), [], engine.engine.run
    monkeypatch.setattr(engine.engine, "run", lambda name, *given: rows.append(len(given[0])) or run(name, *given))
    for most in (2 * 16, 1):
        monkeypatch.setattr(engine_mue, "MOST_TOKENS", most)
        torch.testing.assert_close(layer(states, bias), expected)
    assert rows == [2, 2, 2, 2, 1, 1, *[1] * 10]


@pytest.fixture
def in_bfloat16(engine_folders, tmp_path):
    """The graphs in float32, attention between them in bfloat16."""
    folder = shutil.copytree(engine_folders["float32"], tmp_path / "bfloat16")
    manifest = json.loads((folder / "onnx/manifest.json").read_text())
    (folder / "onnx/manifest.json").write_text(json.dumps(manifest | {"attention": "bfloat16"}))
    return folder


class TestAttentionInBfloat16:
    def test_is_near(self, reference, in_bfloat16, inputs):
        """With all patches, and with images that are missing."""
        model = MuEForConditionalGeneration.from_pretrained(in_bfloat16, engine="onnxruntime")
        assert model.engine.precision == "float32, attention in bfloat16"
        missing = inputs | {"patch_mask": torch.tensor([True, False, True, True])}
        with torch.no_grad():
            for given in (inputs, missing):
                expected, got = reference(**given).logits, model(**given).logits
                assert got.dtype == torch.float32
                assert 1e-5 < (got - expected).abs().max() < 0.02 * expected.abs().max()

    def test_takes_scores_of_positions_in_bfloat16_too(self, in_bfloat16, inputs, monkeypatch):
        """Those of a layer's bias before it is asked, and all that attention is given."""
        model, seen, attend = (
            MuEForConditionalGeneration.from_pretrained(in_bfloat16, engine="onnxruntime"),
            {"bias": set(), "attention": set()},
            torch.nn.functional.scaled_dot_product_attention,
        )

        def watched(*given, **options):
            seen["attention"].update(x.dtype for x in given)
            return attend(*given, **options)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        for layer in model.get_encoder().layers:
            layer.register_forward_pre_hook(lambda module, given: seen["bias"].add(given[1].dtype))
        with torch.no_grad():
            model.get_encoder()(**inputs)
        assert seen == {"bias": {torch.bfloat16}, "attention": {torch.bfloat16}}

    def test_is_another_model_to_presets(self, reference, in_bfloat16):
        model = MuEForConditionalGeneration.from_pretrained(in_bfloat16, engine="onnxruntime")
        assert weights_fingerprint(model) != weights_fingerprint(reference)

    @pytest.mark.parametrize("native", [True, False])
    def test_warns_where_it_is_slow(self, in_bfloat16, monkeypatch, caplog, native):
        monkeypatch.setattr(engine_mue, "cpu_has_bf16", lambda: native)
        monkeypatch.setattr(engine_mue.logger, "propagate", True)
        MuEForConditionalGeneration.from_pretrained(in_bfloat16, engine="onnxruntime")
        assert ("this CPU has no instructions for bfloat16" in caplog.text) != native


def test_slots_fold_and_unfold_as_views_do():
    for rows in (None, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3, 4, 8]), torch.tensor([5])):
        view, count = ImageView(rows, 9, 3), 9 if rows is None else len(rows)
        states = torch.randn(count, 2, 1, 4)
        fold, unfold = view.slots
        folded = states[fold.flatten()].unflatten(0, fold.shape).squeeze(3).transpose(1, 2)
        free = torch.ones(fold.numel(), dtype=torch.bool).index_fill_(0, unfold, False).view(fold.shape)
        assert torch.equal(folded.masked_fill(free[:, None, :, None], 0), view.fold(states))
        assert torch.equal(states[fold.flatten()][unfold], states)
        fold, unfold = view.places(3)
        states = torch.randn(count, 3, 4)
        queries = states.flatten(0, 1)[fold]
        assert queries.shape[:2] == (view.count, 3 * view.rows_per_image)
        assert torch.equal(queries.flatten(0, 1)[unfold], states)
        taken = torch.zeros(queries.shape[:2], dtype=torch.bool).flatten().index_fill_(0, unfold.flatten(), True)
        folded = view.fold(states.unsqueeze(1)).squeeze(1)
        assert torch.equal(queries.flatten(0, 1)[taken], folded.flatten(0, 1)[taken])


class TestWeights:
    def test_those_in_graphs_are_not_read(self, engine_folders, monkeypatch):
        """Neither torch's modules of the parts in graphs are made nor their weights."""
        made = []
        monkeypatch.setattr("mue_hf.model.encoder_mue.load_trunk", lambda config: made.append(config))
        options = {"engine": "onnxruntime", "output_loading_info": True}
        model, info = MuEForConditionalGeneration.from_pretrained(engine_folders["float32"], **options)
        assert not made and not info["missing_keys"] and not info["unexpected_keys"]
        assert all(weight.device.type == "cpu" for weight in model.parameters())

    @pytest.mark.parametrize("size", [100, 5000, 200_000])
    def test_samples_of_a_file_notice_what_training_changes(self, tmp_path, size):
        path, values = tmp_path / "model.safetensors", {"a": torch.zeros(7), "b": torch.zeros(size)}
        save_file(values, path)
        marks = {graph_files_mue.sampled_sha256(path)}
        for name, place in (("a", 6), ("b", 0), ("b", 99)):
            values[name][place] += 1
            save_file(values, path)
            marks.add(graph_files_mue.sampled_sha256(path))
        save_file(values | {"b": torch.zeros(size + 1)}, path)
        assert len(marks | {graph_files_mue.sampled_sha256(path)}) == 5

    def test_every_byte_counts_where_files_are_read_whole(self, engine_folders, tmp_path):
        folder = shutil.copytree(engine_folders["float32"], tmp_path / "copy")
        assert graph_files_mue.read_manifest(folder, whole=True) == graph_files_mue.read_manifest(folder)
        for name in ("model.safetensors", "onnx/head.data"):
            flip(folder / name, -1)
            with pytest.raises(ValueError, match=f"{name} in .* must have the SHA-256"):
                graph_files_mue.read_manifest(folder, whole=True)
            flip(folder / name, -1)

    def test_are_held_once(self, reference, engine):
        kept = {name for name, _ in engine.named_parameters()}
        assert not any("layers." in name or "embed_images." in name for name in kept)
        assert engine.lm_head.weight is engine.get_input_embeddings().weight
        assert sum(p.numel() for p in engine.parameters()) < sum(p.numel() for p in reference.parameters()) / 2

    def test_fingerprints_and_operations(self, reference, engine, engine_folders):
        int8 = MuEForConditionalGeneration.from_pretrained(engine_folders["int8"], engine="onnxruntime")
        again = MuEForConditionalGeneration.from_pretrained(engine_folders["float32"], engine="onnxruntime")
        for part in (lambda model: model, lambda model: model.get_encoder().embed_images):
            marks = [trunk_fingerprint(part(model)) for model in (reference, engine, int8, again)]
            assert marks[1] == marks[3] and len(set(marks)) == 3
        torch.manual_seed(0)
        state = torch.random.get_rng_state()
        assert trunk_flops(engine, (3, 64, 64)) == trunk_flops(reference, (3, 64, 64))
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_what_is_in_int8_makes_another_model(self, engine_folders):
        manifest = json.loads((engine_folders["float32"] / "onnx/manifest.json").read_text())

        def mark(*int8: str, calibration=None, attention="float32") -> str:
            graphs = {
                name: graph | {"precision": "int8"} for name, graph in manifest["graphs"].items() if name in int8
            }
            given = {"graphs": manifest["graphs"] | graphs, "calibration": calibration, "fingerprint": "weights"}
            given["attention"] = attention
            return engine_mue.Engine(engine_folders["float32"] / "onnx", manifest | given).fingerprint

        marks = [mark("head"), mark("head", "cross_0"), mark("head", "trunk")]
        marks += [mark("head", "trunk", calibration={"images": count}) for count in (1, 2)]
        marks.append(mark("head", attention="bfloat16"))
        assert mark() == "weights" and len({*marks, "weights"}) == 7 and mark("head") == marks[0]

    def test_presets_hold_in_float32_alone(self, reference, engine, engine_folders):
        int8 = MuEForConditionalGeneration.from_pretrained(engine_folders["int8"], engine="onnxruntime")
        marks = [weights_fingerprint(model) for model in (reference, engine, int8)]
        assert marks[0] == marks[1] != marks[2]
        preset = {"decoder_exit_threshold": 0.5, "weights_fingerprint": marks[0]}
        inputs = tiny_inputs(1, dtype=torch.float32)
        for model in (engine, int8):
            model.generation_config.exit_presets = {"mine": preset}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.eval().generate(**inputs, exit_preset="mine")
        with pytest.warns(UserWarning, match="calibrated on other weights"):
            int8.generate(**inputs, exit_preset="mine")


def test_int8_is_near(reference, engine_folders, inputs):
    model = MuEForConditionalGeneration.from_pretrained(engine_folders["int8"], engine="onnxruntime")
    with torch.no_grad():
        expected, got = reference(**inputs).logits, model(**inputs).logits
    assert 0 < (got - expected).abs().max() < 0.2 * expected.abs().max()


class TestHub:
    """A repository that is in the cache of the Hub; nothing is downloaded."""

    @pytest.fixture
    def where(self, engine_folders, tmp_path):
        for kind in ("float32", "torch"):
            cached = tmp_path / f"models--someone--{kind}"
            shutil.copytree(engine_folders[kind], cached / "snapshots" / COMMIT)
            (cached / "refs").mkdir()
            (cached / "refs/main").write_text(COMMIT)
        return {"engine": "onnxruntime", "cache_dir": tmp_path, "local_files_only": True}

    @pytest.mark.parametrize("door", [MuEForConditionalGeneration, AutoModelForImageTextToText])
    def test_a_repository_is_what_its_folder_is(self, reference, inputs, where, door):
        model = door.from_pretrained("someone/float32", **where)
        assert model.engine.folder == where["cache_dir"] / "models--someone--float32/snapshots" / COMMIT / "onnx"
        assert generate(model, inputs).sequences.tolist() == generate(reference, inputs).sequences.tolist()
        assert door.from_pretrained("someone/float32", revision=COMMIT, **where).engine is not None

    def test_what_is_not_there(self, where):
        with pytest.raises(ValueError, match="needs a folder that `mue-hf export CKPT DIR` wrote, got .* without"):
            MuEForConditionalGeneration.from_pretrained("someone/torch", **where)
        with pytest.raises(ValueError, match="or a repository of the Hub with its files, got 'someone/none': "):
            MuEForConditionalGeneration.from_pretrained("someone/none", **where)
        with pytest.raises(ValueError, match="a repository of the Hub with its files, got 'no/such/folder'"):
            MuEForConditionalGeneration.from_pretrained("no/such/folder", **where)


def flip(path, place):
    """Changes one byte of a file, None for the first one of the tensors."""
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") if place is None else place] ^= 1
    path.write_bytes(content)


class TestRefused:
    @pytest.mark.parametrize(
        ("act", "what"),
        [
            (lambda model: model.train(), "training is not possible .*load the model without `engine`"),
            (lambda model: model.to(torch.bfloat16), "bfloat16 is not possible"),
            (lambda model: model.half(), "float16 is not possible"),
            (lambda model: model.to("meta"), "meta, .* is not possible"),
            (lambda model: model.model.to(torch.bfloat16), "bfloat16 is not possible"),
            (lambda model: model.get_encoder().to("meta"), "meta, .* is not possible"),
            (lambda model: model.get_decoder().double(), "float64 is not possible"),
            (lambda model: model.lm_head.half(), "float16 is not possible"),
            (lambda model: model.save_pretrained("x"), "`save_pretrained` is not possible .*copy the folder"),
            (lambda model: model.state_dict(), "`state_dict` is not possible"),
            (lambda model: model.set_attn_implementation("eager"), "`set_attn_implementation` is not possible"),
        ],
    )
    def test_on_the_model(self, engine, act, what):
        with pytest.raises(ValueError, match=what):
            act(engine)
        assert engine.to("cpu").eval().dtype == torch.float32
        assert {weight.dtype for weight in engine.model.to("cpu").parameters()} == {torch.float32}

    def test_gradients_and_attentions(self, engine, inputs):
        embeds = engine.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
        with pytest.raises(ValueError, match="gradients do not flow .*load the model without"):
            engine(**inputs, inputs_embeds=embeds)
        for call in (engine, engine.generate):
            with pytest.raises(
                ValueError, match="`output_attentions=True` needs attention in torch.*without `engine`"
            ):
                call(**tiny_inputs(1, dtype=torch.float32), output_attentions=True)

    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"engine": "tensorrt"}, "`engine` must be one of .* got 'tensorrt'"),
            ({"dtype": torch.bfloat16}, "`dtype` must be left out .*bfloat16"),
            ({"device_map": "auto"}, "`device_map` must be left out"),
            ({"attn_implementation": "eager"}, "`attn_implementation` must be left out"),
        ],
    )
    def test_on_loading(self, engine_folders, options, what):
        with pytest.raises(ValueError, match=what):
            MuEForConditionalGeneration.from_pretrained(
                engine_folders["float32"], **{"engine": "onnxruntime"} | options
            )

    def test_a_folder_without_graphs(self, engine_folders):
        with pytest.raises(ValueError, match="needs a folder that `mue-hf export CKPT DIR` wrote"):
            MuEForConditionalGeneration.from_pretrained(engine_folders["torch"], engine="onnxruntime")

    @pytest.mark.parametrize(
        ("damage", "what"),
        [
            (lambda m, d: m.update(opset=21), "must have format 4 and `opset` 20, got 4 and 21; run `mue-hf export`"),
            (lambda m, d: m.update(format=1), "must have format 4 .* got 1 and 20; run `mue-hf export` again"),
            (lambda m, d: m.pop("weights"), "must be the manifest of an export, got KeyError"),
            (lambda m, d: m["graphs"].pop("cross_2"), "must list the graph 'cross_2'"),
            (lambda m, d: (d / "onnx/head.onnx").unlink(), "must hold onnx/head.onnx"),
            (lambda m, d: (d / "onnx/head.onnx").write_bytes(b"x"), "onnx/head.onnx in .* must have the SHA-256"),
            (lambda m, d: (d / "model.safetensors").open("ab").write(b" "), "model.safetensors in .* must have"),
            (lambda m, d: (d / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors in .* must have"),
            (lambda m, d: (d / "onnx/head.data").unlink(), "must hold onnx/head.data"),
            (lambda m, d: flip(d / "onnx/head.data", 5), "onnx/head.data in .* must have the SHA-256"),
            (lambda m, d: flip(d / "model.safetensors", None), "model.safetensors in .* must have the SHA-256"),
            (lambda m, d: m.pop("samples"), "must be the manifest of an export, got KeyError"),
        ],
    )
    def test_a_manifest_that_does_not_match(self, engine_folders, tmp_path, damage, what):
        folder = shutil.copytree(engine_folders["float32"], tmp_path / "copy")
        path = folder / "onnx/manifest.json"
        manifest = json.loads(path.read_text())
        damage(manifest, folder)
        path.write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=what):
            MuEForConditionalGeneration.from_pretrained(folder, engine="onnxruntime")

    def test_no_onnxruntime(self, engine_folders, monkeypatch):
        def absent(name):
            raise ImportError(f"No module named {name!r}")

        monkeypatch.setattr(engine_mue, "import_module", absent)
        with pytest.raises(ValueError, match=r"needs the extra `export` .*pip install 'mue-hf\[export\]'"):
            MuEForConditionalGeneration.from_pretrained(engine_folders["float32"], engine="onnxruntime")
