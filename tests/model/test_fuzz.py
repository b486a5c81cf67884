"""Anything into processor, configuration, generate options and converter: it works, or an error says what to do.

Never another exception, never a hang, and never code from a file.
"""

import ast
import io
import json
import os
import pickle
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import character_tokenizer, tiny_config, tiny_inputs, tiny_model
from golden.weights import fork_weights, make_weights, write_fairseq, write_fork, write_vocabulary
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

import mue_hf
from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEImageProcessorPil, MuEProcessor
from mue_hf.convert.ofa import convert_ofa
from mue_hf.model.exit_options_mue import CONFIG_NAMES
from mue_hf.model.processing_mue import load_image

# Inputs of each kind; `FUZZ=20` tries twenty times as many.
EXAMPLES = int(os.environ.get("FUZZ", "1"))
SECONDS = 60


def fuzz(examples: int):
    """A machine that does other things must not fail a test by its speed: what hangs is found by `documented`."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    # the default suite tries the same inputs every time, so that it fails for a change and not for luck
    settled = EXAMPLES == 1
    return settings(max_examples=examples * EXAMPLES, deadline=None, suppress_health_check=slow, derandomize=settled)


@contextmanager
def limit(seconds: int):
    def stop(*_):
        raise TimeoutError(f"no answer in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def documented(call):
    """The result, or None where the documented error was raised: it names something and says what to do."""
    try:
        with limit(SECONDS):
            return call()
    except (ValueError, StrictDataclassError) as error:
        rules = r"\b(must|needs|holds|lacks|belong|contradicts|has not|did you mean|(select|use) one of|Validation)\b"
        assert re.search(rules, str(error)), repr(error)
        return None


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.sampled_from([10**400, -1, 0, 1, 2, 3, 0.5, "never", "fixed", "balanced"]),
)
JUNK = st.one_of(PLAIN, st.lists(PLAIN, max_size=5), st.dictionaries(st.text(max_size=4), PLAIN, max_size=3))


class TestProcessor:
    @pytest.fixture(scope="class", params=[MuEImageProcessor, MuEImageProcessorPil], ids=["torchvision", "pil"])
    def processor(self, request):
        return MuEProcessor(request.param(size={"height": 16, "width": 16}), character_tokenizer())

    dtypes = st.one_of(
        npst.scalar_dtypes(),
        npst.unicode_string_dtypes(max_len=2),
        st.sampled_from([np.dtype(object), np.dtype([("a", int)])]),
    )
    arrays = npst.arrays(st.one_of(st.sampled_from([np.uint8, np.float32]), dtypes), npst.array_shapes(max_dims=5))
    files = st.one_of(
        st.binary(max_size=64),
        st.text(max_size=12),
        st.text(max_size=6).map(Path),
        st.sampled_from(
            ["http://", "http://[", "https://127.0.0.1:1/a.png", "http://\x00", ".", "/dev/zero", "a" * 5000]
            + ["data:", "data:image/png;base64,", "data:image/png;base64,iVBORw0KGgo=", "iVBORw0KGgo=", "R0lG"]
        ),
    )
    tensors = arrays.filter(lambda array: array.dtype.kind in "buif" and array.dtype.isnative).map(
        lambda array: torch.from_numpy(np.ascontiguousarray(array))
    )
    pictures = st.builds(
        Image.new,
        st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LAB", "I;16", "PA", "La"]),
        st.tuples(st.integers(0, 40), st.integers(0, 40)),
    )
    images = st.one_of(JUNK, arrays, files, tensors, pictures)
    words = st.one_of(st.text(max_size=30), st.text(alphabet=st.characters(), max_size=5), JUNK)

    @fuzz(150)
    @given(image=images)
    def test_images(self, processor, image):
        inputs = documented(lambda: processor(images=image))
        if inputs is not None and "pixel_values" in inputs:
            pixels = inputs["pixel_values"]
            assert pixels.shape[1:] == (3, 16, 16) and pixels.isfinite().all() and pixels.abs().max() <= 1.001

    @fuzz(100)
    @given(
        images=st.one_of(st.none(), st.lists(st.one_of(st.none(), pictures), max_size=3)),
        task=st.one_of(st.sampled_from(["captioning", "entailment", "vqa"]), JUNK),
        texts=st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(["text", "hypothesis", "premise"], st.one_of(words, st.lists(words, max_size=3))),
        ),
    )
    def test_texts(self, processor, images, task, texts):
        inputs = documented(lambda: processor(images=images, task=task, **texts))
        if inputs is not None:
            assert inputs["input_ids"].shape == inputs["attention_mask"].shape

    @fuzz(100)
    @given(
        options=st.dictionaries(
            st.sampled_from(
                ["size", "do_resize", "do_rescale", "do_normalize", "image_mean", "image_std", "resample", "padding"]
                + ["truncation", "max_length", "return_tensors", "crop_size", "videos", "nosuch", "do_center_crop"]
                + ["text_kwargs", "images_kwargs", "common_kwargs"]
            ),
            JUNK,
            min_size=1,
            max_size=2,
        )
    )
    def test_options(self, processor, options):
        documented(lambda: processor(images=Image.new("RGB", (8, 8)), **options))

    @fuzz(100)
    @given(answers=st.one_of(JUNK, st.lists(st.text(max_size=6), max_size=4)))
    def test_answers(self, processor, answers):
        documented(lambda: processor.encode_answers(answers))

    @fuzz(60)
    @given(
        data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "PCX", "TGA"])
    )
    def test_damaged_files(self, data, kind):
        """Bytes changed, cut out and cut off."""
        whole = io.BytesIO()
        noise = np.random.default_rng(3).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(whole, kind)
        content = bytearray(whole.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
        cut = data.draw(st.integers(0, len(content)))
        image = documented(lambda: load_image(bytes(content[:cut] if data.draw(st.booleans()) else content)))
        assert image is None or image.mode == "RGB"


class TestConfig:
    names = st.one_of(st.sampled_from(sorted(MuEConfig.__annotations__)), st.text(max_size=6)).filter("self".__ne__)

    @fuzz(150)
    @given(fields=st.dictionaries(names, JUNK, min_size=1, max_size=3))
    def test_fields(self, fields):
        config = documented(lambda: tiny_config(**fields))
        assert config is None or config.d_model % config.encoder_attention_heads == 0

    @fuzz(60)
    @given(
        name=st.sampled_from(["d_model", "dropout", "eos_token_id", "backbone_config", "encoder_layers"]), value=JUNK
    )
    def test_changes(self, name, value):
        documented(lambda: setattr(tiny_config(), name, value))


class TestGenerate:
    @pytest.fixture(scope="class")
    def model(self):
        return tiny_model()

    options = st.dictionaries(
        st.one_of(st.sampled_from(sorted(CONFIG_NAMES)), st.sampled_from(["exit_treshold", "image_exit"])),
        st.one_of(JUNK, st.floats(-2, 2), st.lists(st.floats(-2, 2), min_size=3, max_size=4), st.integers(1, 4)),
        min_size=1,
        max_size=3,
    )

    @fuzz(150)
    @given(options=options)
    def test_options(self, model, options):
        output = documented(lambda: model.generate(**tiny_inputs(2), **options, max_new_tokens=3))
        assert output is None or output.shape[0] == 2

    @fuzz(60)
    @given(options=options)
    def test_forward_and_scores(self, model, options):
        inputs = tiny_inputs(1)
        documented(lambda: model(**inputs, decoder_input_ids=torch.tensor([[0, 5]]), **options))
        documented(lambda: model.score_answers([[5], [6, 7]], **inputs, **options))


class TestConvert:
    @pytest.fixture(scope="class")
    def weights(self):
        return make_weights()

    @pytest.fixture(scope="class")
    def words(self, tmp_path_factory):
        return write_vocabulary(tmp_path_factory.mktemp("words"))

    @pytest.fixture(scope="class")
    def whole(self, weights, tmp_path_factory):
        return write_fairseq(tmp_path_factory.mktemp("whole") / "whole.pt", weights).read_bytes()

    def convert(self, source, words, folder):
        target = folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        result = documented(lambda: convert_ofa(source, target, vocab=words, image_size=64))
        assert result is not None or not target.exists()
        return result

    @fuzz(40)
    @given(content=st.one_of(st.binary(max_size=200), JUNK.map(pickle.dumps)))
    def test_any_file(self, content, words, tmp_path):
        (tmp_path / "any.pt").write_bytes(content)
        assert self.convert(tmp_path / "any.pt", words, tmp_path) is None

    @fuzz(40)
    @given(content=JUNK, wrapped=st.booleans())
    def test_any_object(self, content, wrapped, words, tmp_path):
        torch.save({"model": content, "args": content} if wrapped else content, tmp_path / "any.pt")
        assert self.convert(tmp_path / "any.pt", words, tmp_path) is None

    @fuzz(15)
    @given(data=st.data())
    def test_damaged_files(self, data, whole, words, tmp_path):
        file, content = tmp_path / "damaged.pt", bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
        self.convert(file, words, tmp_path)

    @fuzz(15)
    @given(data=st.data())
    def test_changed_tensors(self, data, weights, words, tmp_path):
        changed = dict(fork_weights(weights))
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(sorted(changed)))
            shape = data.draw(st.lists(st.integers(0, 9), max_size=4))
            change = data.draw(st.sampled_from(["shape", "drop", "rename", "dtype"]))
            tensor = changed.pop(name)
            if change == "shape":
                changed[name] = torch.zeros(shape)
            if change == "rename":
                changed[data.draw(st.text(min_size=1, max_size=30)) + name] = tensor
            if change == "dtype":
                changed[name] = tensor.to(data.draw(st.sampled_from([torch.int8, torch.bool, torch.complex64])))
        folder = tmp_path / "fork"
        folder.mkdir(exist_ok=True)
        write_fork(folder, weights)
        torch.save(changed, folder / "pytorch_model.bin")
        self.convert(folder, None, tmp_path)

    @fuzz(20)
    @given(
        fields=st.dictionaries(
            st.sampled_from(
                ["d_model", "vocab_size", "encoder_layers", "normformer", "attn_scale_factor", "resnet_type"]
                + ["dropout", "token_bucket_size", "use_cache", "pad_token_id", "activation_function", "model_type"]
            ),
            JUNK,
            min_size=1,
            max_size=2,
        )
    )
    def test_changed_settings(self, fields, weights, tmp_path):
        folder = tmp_path / "fork"
        folder.mkdir(exist_ok=True)
        write_fork(folder, weights)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields, default=str))
        self.convert(folder, None, tmp_path)


class Payload:
    """What an attacker pickles: unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class TestPickles:
    """Code in a downloaded or converted file does not run unless it was asked for."""

    def test_converter(self, tmp_path):
        words, weights = write_vocabulary(tmp_path / "words"), make_weights()
        file = write_fairseq(tmp_path / "evil.pt", weights, optimizer=Payload(tmp_path / "ran"))
        fork = tmp_path / "fork"
        fork.mkdir()
        write_fork(fork, weights)
        torch.save(fork_weights(weights) | {"x": Payload(tmp_path / "ran")}, fork / "pytorch_model.bin")
        for source in (file, fork):
            with pytest.raises(ValueError, match="--allow-pickle"):
                convert_ofa(source, tmp_path / "out", vocab=words, image_size=64)
            assert not (tmp_path / "ran").exists()
        convert_ofa(file, tmp_path / "out", vocab=words, image_size=64, allow_pickle=True)
        assert (tmp_path / "ran").exists()

    def test_from_pretrained(self, tmp_path):
        model = tiny_model(dtype=torch.float32)
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict() | {"x": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
        with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
            MuEForConditionalGeneration.from_pretrained(tmp_path)
        assert not (tmp_path / "ran").exists()

    def test_no_other_place_unpickles(self):
        """`torch.load` says how everywhere, and nothing else that runs code from data is called."""
        for file in Path(mue_hf.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    called = ast.unparse(node.func)
                    named = {keyword.arg for keyword in node.keywords}
                    assert called != "torch.load" or "weights_only" in named, file
                    assert called.split(".")[0] not in ("pickle", "joblib", "dill", "marshal", "shelve"), file
                    assert called != "np.load" or "allow_pickle" not in named, file
