"""Preprocessing, tokenizer, prompts and answer tries: equal to OFA's fixtures, and clear about bad input."""

import base64
import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import character_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from mue_hf.model.processing_mue import (
    MuEImageProcessor,
    MuEImageProcessorPil,
    MuEProcessor,
    MuETokenizer,
    load_image,
    normalize_text,
    to_rgb,
)

BACKENDS = [pytest.param(MuEImageProcessor, id="torchvision"), pytest.param(MuEImageProcessorPil, id="pil")]


@pytest.fixture(scope="module")
def processor() -> MuEProcessor:
    return MuEProcessor(MuEImageProcessorPil(size={"height": 8, "width": 8}), character_tokenizer())


@pytest.fixture(scope="module")
def ofa_tokenizer(shared_dir) -> MuETokenizer:
    return MuETokenizer.from_pretrained(shared_dir / "fixtures" / "tokenizer")


@pytest.fixture(scope="module")
def ofa_processor(ofa_tokenizer) -> MuEProcessor:
    return MuEProcessor(MuEImageProcessorPil(size={"height": 8, "width": 8}), ofa_tokenizer)


class Site:
    """A server whose `pages` say what it sends: bytes, and seconds to wait between them."""

    def __init__(self) -> None:
        self.pages: dict[str, list[bytes | float]] = {}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            path = connection.recv(2**16).split()[1].decode()
            for part in self.pages.get(path, [b"HTTP/1.0 404 Not Found\r\n\r\n"]):
                if isinstance(part, bytes):
                    connection.sendall(part)
                else:
                    time.sleep(part)


@pytest.fixture
def site():
    site = Site()
    yield site
    site.listener.close()


@pytest.fixture
def photo() -> Image.Image:
    """Asymmetric in both directions and in the channels."""
    rows, columns = np.mgrid[0:12, 0:20]
    return Image.fromarray(np.stack([rows * 20, columns * 12, rows + columns], -1).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def spell(processor: MuEProcessor, ids: torch.Tensor) -> list[str]:
    return processor.batch_decode(ids, skip_special_tokens=True)


class TestImages:
    @pytest.mark.parametrize("size", [64, 256, 480])
    def test_equals_ofa(self, shared_dir, size):
        fixture = load_file(shared_dir / "fixtures" / "preprocessing.safetensors")
        image, expected = Image.fromarray(fixture["u8"].numpy()), fixture[f"pix{size}"]
        square = {"height": size, "width": size}
        pil = MuEImageProcessorPil(size=square)(image, return_tensors="pt")["pixel_values"][0]
        vision = MuEImageProcessor(size=square)(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pil, expected)
        assert (vision - expected).abs().max() <= 2 / 127.5 + 1e-6

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_defaults(self, backend, photo):
        pixels = backend()(photo, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 480, 480) and pixels.dtype == torch.float32
        assert -1 <= pixels.min() < pixels.max() <= 1

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("kind", ["pil", "numpy", "first", "torch", "float", "bfloat16", "path", "str"])
    def test_kinds_of_input_agree(self, backend, kind, photo, tmp_path):
        array = np.asarray(photo)
        path = tmp_path / "photo.png"
        photo.save(path)
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        image = {
            "pil": photo,
            "numpy": array,
            "first": np.moveaxis(array, -1, 0),
            "torch": tensor,
            "float": tensor / 255,
            "bfloat16": (tensor / 255).bfloat16(),
            "path": path,
            "str": str(path),
        }[kind]
        make = backend(size={"height": 8, "width": 6})
        expected = make(photo, return_tensors="pt")["pixel_values"]
        got = make([image], return_tensors="pt")["pixel_values"]
        # bfloat16 has no 256 levels between 0 and 1.
        assert (got - expected).abs().max() <= (2 / 127.5 if kind == "bfloat16" else 0)

    def test_batch_of_arrays(self, photo):
        batch = np.stack([np.asarray(photo)] * 2)
        assert MuEImageProcessorPil()(batch, return_tensors="pt")["pixel_values"].shape == (2, 3, 480, 480)

    def test_bytes(self, photo):
        assert np.array_equal(load_image(png(photo)), photo)
        # Without an address in the message, which would differ from run to run.
        with pytest.raises(ValueError, match=r"`image` must be an image .* an error: it has no known format;"):
            load_image(b"no image")

    @pytest.mark.parametrize("kind", ["data URI", "plain", "lines"])
    def test_base64(self, photo, kind):
        """As transformers' `load_image` takes it."""
        text = base64.b64encode(png(photo)).decode()
        lines = base64.encodebytes(png(photo)).decode()
        given = {"data URI": f"data:image/png;base64,{text}", "plain": text, "lines": lines}[kind]
        assert np.array_equal(load_image(given), photo)

    @pytest.mark.parametrize("size", [None, 400], ids=["whole", "cut"])
    @pytest.mark.parametrize("start", ["data:image/png;base64,", "data:image/png;base64,!", "", "!"])
    def test_messages_do_not_repeat_base64(self, photo, start, size, monkeypatch):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
        text = base64.b64encode(png(noise)[:size]).decode()
        if size is None and "!" not in start:
            monkeypatch.setattr("mue_hf.model.images_mue.MAX_PIXELS", 100)
        with pytest.raises(ValueError, match="must") as caught:
            load_image(start + text)
        assert text[20:60] not in str(caught.value) and len(str(caught.value)) < 200

    def test_base64_has_a_size(self, monkeypatch):
        monkeypatch.setattr("mue_hf.model.images_mue.MAX_DOWNLOAD_BYTES", 2**20)
        with pytest.raises(ValueError, match="must have at most 1 MB as base64, got more; shrink it"):
            load_image("A" * 2**21)

    def test_mistyped_paths_are_no_base64(self):
        with pytest.raises(ValueError, match=r"`image` \(photos/cats\) must exist, got no such file; check the path"):
            load_image("photos/cats")

    def test_url(self, photo, site):
        site.pages["/photo.png"] = [b"HTTP/1.0 200 OK\r\n\r\n", png(photo)]
        site.pages["/moved.png"] = [b"HTTP/1.0 302 Found\r\nLocation: /photo.png\r\n\r\n"]
        assert np.array_equal(load_image(f"{site.url}/photo.png"), photo)
        assert np.array_equal(load_image(f"{site.url}/moved.png"), photo)
        with pytest.raises(ValueError, match=r"`image` \(http.*\) must be a URL that answers.*404"):
            load_image(f"{site.url}/missing.png")

    def test_downloads_have_a_size(self, site, monkeypatch):
        monkeypatch.setattr("mue_hf.model.images_mue.MAX_DOWNLOAD_BYTES", 2**20)
        site.pages["/large"] = [b"HTTP/1.0 200 OK\r\n\r\n", *[bytes(2**19)] * 4]
        with pytest.raises(ValueError, match="must have at most 1 MB to be downloaded, got more; shrink it"):
            load_image(f"{site.url}/large")

    def test_packed_downloads_stay_packed(self, site):
        """A small answer that unpacks to any size is not unpacked."""
        packed = zlib.compress(bytes(2**20))
        site.pages["/packed"] = [b"HTTP/1.0 200 OK\r\nContent-Encoding: deflate\r\n\r\n", packed]
        with pytest.raises(ValueError, match="it has no known format"):
            load_image(f"{site.url}/packed")

    @pytest.mark.parametrize("where", ["head", "body", "silence"])
    def test_downloads_have_a_time(self, site, where):
        """A server that keeps sending bytes, one by one, is left too."""
        start = {"head": [b"HTTP/1.0 200 OK\r\nX: "], "body": [b"HTTP/1.0 200 OK\r\n\r\n"], "silence": []}[where]
        site.pages["/slow"] = [*start, *[0.1, b"x"] * 100] if where != "silence" else [10.0]
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"must be downloaded within 0.5 seconds, got \d+ bytes by then"):
            load_image(f"{site.url}/slow", timeout=0.5)
        assert time.monotonic() - began < 5

    def test_redirects_end(self, site):
        site.pages["/round"] = [b"HTTP/1.0 302 Found\r\nLocation: /round\r\n\r\n"]
        with pytest.raises(ValueError, match="must be a URL that answers.*redirects"):
            load_image(f"{site.url}/round")

    @pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
    def test_bad_timeouts(self, timeout):
        with pytest.raises(ValueError, match="`timeout` must be a number of seconds above 0"):
            load_image("http://127.0.0.1:9/a.png", timeout=timeout)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
    def test_modes(self, mode):
        """Each mode shows the same grey, through a file where the mode has one."""
        level = 255 if mode == "1" else 102
        if mode in ("I;16", "I"):
            dtype = np.uint16 if mode == "I;16" else np.int32
            image = Image.fromarray(np.full((4, 6), level * 257, dtype))
        elif mode == "PA":
            image = Image.new("L", (6, 4), level).convert("P").convert("PA")
        else:
            image = Image.new("L", (6, 4), level).convert("RGB").convert(mode)
        rgb = to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == (6, 4)
        assert np.abs(np.asarray(rgb).astype(int) - level).max() <= 1

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_sixteen_bits_are_scaled(self, backend, tmp_path):
        levels = np.array([[0, 257, 32768, 65535]], np.uint16)
        Image.fromarray(levels).save(tmp_path / "deep.png")
        for image in (tmp_path / "deep.png", levels):
            got = backend(do_resize=False)(image, return_tensors="pt")["pixel_values"][0, :, 0]
            assert torch.allclose((got + 1) * 127.5, torch.tensor([0.0, 1, 128, 255]).expand(3, 4), atol=1e-4)

    def test_transparency_is_shown_on_white(self):
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (10, 20, 30, 255))
        assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]

    def test_palette_with_transparent_colour(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([9, 9, 9, 10, 20, 30])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "image.png", transparency=0)
        assert np.asarray(load_image(tmp_path / "image.png")).tolist() == [[[255, 255, 255], [10, 20, 30]]]

    def test_animation_counts_by_its_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
        assert load_image(tmp_path / "film.gif").getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_exif_orientation_is_applied(self, backend, photo, tmp_path):
        exif = Image.Exif()
        exif[274] = 6
        photo.save(tmp_path / "turned.png", exif=exif)
        upright = photo.transpose(Image.Transpose.ROTATE_270)
        make = backend(size={"height": 8, "width": 8})
        for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
            got = make(image, return_tensors="pt")["pixel_values"]
            assert torch.equal(got, make(upright, return_tensors="pt")["pixel_values"])

    def test_rgb_is_not_copied(self, photo):
        assert to_rgb(photo) is photo

    def bad(self, case: str, photo: Image.Image, folder) -> object:
        path = folder / "bad.png"
        photo.save(path)
        if case == "missing":
            return folder / "none.png"
        if case == "folder":
            return folder
        if case == "text":
            path.write_text("not an image")
        if case == "truncated":
            path.write_bytes(path.read_bytes()[:-40])
        if case == "truncated jpeg":
            path = folder / "bad.jpg"
            photo.resize((200, 200)).save(path)
            path.write_bytes(path.read_bytes()[:800])
        if case == "empty file":
            path.write_bytes(b"")
        if case == "pipe":
            path.unlink()
            os.mkfifo(path)
        if case == "postscript":
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
        if case in ("huge", "large"):
            side = {"huge": 60000, "large": 12000}[case]
            data = bytearray(path.read_bytes())
            data[16:24] = struct.pack(">II", side, side)
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
            path.write_bytes(data)
        arrays = {
            "zero-size": Image.new("RGB", (0, 4)),
            "zero-size array": np.zeros((4, 0, 3), np.uint8),
            "five channels": np.zeros((6, 6, 5), np.uint8),
            "one dimension": np.zeros(6, np.uint8),
            "wide floats": np.full((4, 4, 3), 2.0),
            "nan": np.full((4, 4, 3), np.nan),
            "negative": np.full((4, 4, 3), -1),
            "deep integers": Image.fromarray(np.full((4, 4), 70000, np.int32)),
            "fractions": Image.new("F", (4, 4), 3.5),
            "number": 7,
            "words": np.array([["a", "b"]]),
            "sparse": torch.eye(4).to_sparse(),
        }
        return arrays.get(case, path)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("missing", r"`images\[1\]` \(.*none.png\) must exist.*check the path"),
            ("folder", r"must be a file, got a folder, a pipe or a device"),
            ("pipe", r"must be a file, got a folder, a pipe or a device"),
            ("postscript", r"must hold pixels, got PostScript; save it as PNG or JPEG"),
            ("text", r"`images\[1\]` \(.*bad.png\) must be an image that Pillow can read.*save it again"),
            ("truncated", r"`images\[1\]` \(.*bad.png\) must be a complete image.*save it again"),
            ("truncated jpeg", r"must be a complete image.*truncated"),
            ("empty file", r"must be an image that Pillow can read"),
            ("huge", r"must have at most 134,217,728 pixels: .*exceeds limit.*; shrink it"),
            ("large", r"must have at most 134,217,728 pixels, got 12000 x 12000; shrink it"),
            ("words", r"must hold numbers, got an array of <U1"),
            ("sparse", r"must be a tensor that NumPy can hold"),
            ("zero-size", r"`images\[1\]` must have pixels, got size 0x4"),
            ("zero-size array", r"`images\[1\]` must not be empty, got an array of shape \(4, 0, 3\)"),
            ("five channels", r"must have 1, 3 or 4 channels, got shape \(6, 6, 5\)"),
            ("one dimension", r"must have 2 or 3 dimensions, got shape \(6,\)"),
            ("wide floats", r"must hold floats in \[0, 1\], got values in \[2.0, 2.0\]"),
            ("nan", r"must hold floats in \[0, 1\]"),
            ("negative", r"must hold levels in 0..255, got int64 values in \[-1, -1\]"),
            ("deep integers", r"must hold levels in 0..255, got int32 values in \[70000"),
            ("fractions", r"`images\[1\]` must hold floats in \[0, 1\], got values in \[3.5, 3.5\]"),
            ("number", r"`images\[1\]` must be an image, got int; pass a PIL image"),
        ],
        ids=lambda value: value if " " not in value else None,
    )
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_bad_images(self, backend, case, message, photo, tmp_path):
        bad = self.bad(case, photo, tmp_path)
        with pytest.raises(ValueError, match=message):
            backend()([photo, bad])
        with pytest.raises(ValueError, match=message):
            MuEProcessor(backend(), character_tokenizer())(images=[None, bad])

    def test_rescaling_cannot_be_turned_off_alone(self, photo):
        with pytest.raises(ValueError, match="`do_rescale` must be True with `do_normalize`"):
            MuEImageProcessor()(photo, do_rescale=False)
        levels = MuEImageProcessor(do_resize=False)(photo, do_rescale=False, do_normalize=False, return_tensors="pt")
        assert torch.equal(levels["pixel_values"][0], torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1))


class TestTokenizer:
    def test_equals_ofa(self, shared_dir, ofa_tokenizer):
        samples = json.loads((shared_dir / "fixtures" / "tokenizer" / "sample_ids.json").read_text(encoding="utf-8"))
        for text, ids in samples.items():
            assert ofa_tokenizer(text)["input_ids"] == [0, *ids, 2]
            assert ofa_tokenizer.decode([0, *ids, 2, 1], skip_special_tokens=True) == text

    def test_vocabulary(self, ofa_tokenizer):
        assert len(ofa_tokenizer) == 59457
        names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<code_0>", "<code_8191>", "<bin_0>", "<bin_999>"]
        assert ofa_tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 50264, 50265, 58456, 58457, 59456]

    def test_written_specials_are_text(self, ofa_tokenizer):
        assert ofa_tokenizer("</s><pad>", add_special_tokens=False)["input_ids"][0] > 3
        assert not {0, 1, 2, 3} & set(ofa_tokenizer("<s></s><pad><unk>", add_special_tokens=False)["input_ids"])

    def test_bins_survive_decoding(self, ofa_tokenizer):
        ids = ofa_tokenizer(" a<bin_7>")["input_ids"]
        assert ids == [0, 10, 58464, 2]
        assert ofa_tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "a<bin_7>"

    def test_pads_on_the_right(self, ofa_tokenizer):
        assert ofa_tokenizer([" a", " a man"], padding=True)["input_ids"] == [[0, 10, 2, 1], [0, 10, 313, 2]]

    def test_save_and_load(self, ofa_tokenizer, tmp_path):
        ofa_tokenizer.save_pretrained(tmp_path)
        loaded = MuETokenizer.from_pretrained(tmp_path)
        assert loaded.get_vocab() == ofa_tokenizer.get_vocab()
        text = " two dogs <bin_3> </s> café"
        assert loaded(text)["input_ids"] == ofa_tokenizer(text)["input_ids"]

    def test_small_vocabulary(self, tmp_path):
        tokenizer = character_tokenizer()
        assert len(tokenizer) == 100 and tokenizer.mask_token_id == 99
        tokenizer.save_pretrained(tmp_path)
        loaded = MuETokenizer.from_pretrained(tmp_path)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.decode(loaded(" a dog")["input_ids"], skip_special_tokens=True) == " a dog"

    def test_without_vocabulary(self, tmp_path):
        with pytest.raises(ValueError, match="`vocab` must be given, got None"):
            MuETokenizer()

    def test_bad_counts(self):
        with pytest.raises(ValueError, match="`num_bins` must be an integer of at least 0, got -1"):
            MuETokenizer(vocab={"<s>": 0}, merges=[], num_bins=-1)


class TestNormalisation:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("A Man, in RED.", "a man, in red."),
            (",.!?*#:;~two", "two"),
            ("well-known and/or", "well known and or"),
            ("a <person> runs", "a person runs"),
            ("  a   b\t\tc \n", "a b c"),
            ("a\n", "a"),
            ("...", ""),
            (" ".join(map(str, range(90))), " ".join(map(str, range(80)))),
        ],
        ids=["case", "leading", "dashes", "person", "spaces", "newline", "nothing", "words"],
    )
    def test_examples(self, text, expected):
        assert normalize_text(text) == expected

    @settings(deadline=None)
    @given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 .,!?'/-]{0,8}", fullmatch=True), min_size=1, max_size=100))
    def test_idempotent(self, words):
        """From a text that begins with a word; OFA's order of steps is not idempotent on leading punctuation."""
        once = normalize_text(" ".join(words))
        assert normalize_text(once) == once

    @settings(deadline=None)
    @given(st.text())
    def test_laws(self, text):
        normalized = normalize_text(text)
        assert len(normalized.split(" ")) <= 80
        assert not {"-", "/"} & set(normalized) and "  " not in normalized
        assert normalized == normalized.strip(" ") and normalized.lower() == normalized


class TestPrompts:
    def test_captioning(self, ofa_processor, photo):
        inputs = ofa_processor(images=photo)
        assert inputs["input_ids"].tolist() == [[0, 99, 473, 5, 2274, 6190, 116, 2]]
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}

    def test_text_is_used_as_it_is(self, processor, photo):
        assert spell(processor, processor(images=photo, text=" What?")["input_ids"]) == [" What?"]

    def test_entailment_equals_ofa(self, shared_dir, ofa_processor, photo):
        samples = json.loads((shared_dir / "fixtures" / "tokenizer" / "sample_ids.json").read_text(encoding="utf-8"))
        inputs = ofa_processor(
            images=photo,
            task="entailment",
            premise="A man in a red shirt rides a bike.",
            hypothesis="!A man is   outdoors.",
        )
        text = ' can image and text1 " a man in a red shirt rides a bike. " imply text2 " a man is outdoors. "?'
        assert inputs["input_ids"].tolist() == [[0, *samples[text], 2]]
        assert inputs["decoder_input_ids"].tolist() == [[0, *samples[text]]]
        assert inputs["decoder_attention_mask"].tolist() == [[1] * (1 + len(samples[text]))]

    def test_entailment_batch(self, processor, photo):
        inputs = processor(
            images=[photo, photo], task="entailment", hypothesis=["Two dogs", "A cat"], premise=[None, "dogs-and cats"]
        )
        texts = [
            ' does the image describe " two dogs "?',
            ' can image and text1 " dogs and cats " imply text2 " a cat "?',
        ]
        assert spell(processor, inputs["input_ids"]) == texts
        assert spell(processor, inputs["decoder_input_ids"]) == texts
        assert inputs["decoder_attention_mask"].sum(-1).tolist() == [1 + len(text) for text in texts]
        for row, mask in zip(inputs["decoder_input_ids"], inputs["decoder_attention_mask"], strict=True):
            assert mask.tolist() == sorted(mask.tolist())
            assert row[mask == 0].eq(1).all() and row[mask == 1][0] == 0 and row[-1] != 2

    def test_one_premise_for_several_hypotheses(self, processor, photo):
        inputs = processor(images=photo, task="entailment", hypothesis=["a", "b"], premise="c")
        assert inputs["pixel_values"].shape[0] == 1
        assert spell(processor, inputs["input_ids"]) == [
            f' can image and text1 " c " imply text2 " {letter} "?' for letter in "ab"
        ]

    def test_long_hypothesis_is_cut(self, processor, photo):
        text = spell(processor, processor(images=photo, task="entailment", hypothesis="a " * 100)["input_ids"])[0]
        assert text == ' does the image describe " ' + "a " * 80 + '"?'

    @pytest.mark.parametrize(
        ("question", "expected"),
        [("What COLOR is it?", " what color is it?"), ("how many dogs", " how many dogs?")],
        ids=["mark", "no mark"],
    )
    def test_vqa(self, processor, photo, question, expected):
        inputs = processor(images=photo, text=question, task="vqa")
        assert spell(processor, inputs["input_ids"]) == [expected]
        assert "decoder_input_ids" not in inputs

    def test_chat(self, processor, photo):
        def user(*parts):
            return [{"role": "user", "content": list(parts)}]

        image = {"type": "image", "image": photo}
        words = [{"type": "text", "text": text} for text in ("what is it?", "a dog?")]
        chats = [user(image, *words), user(image), [{"role": "user", "content": "who?"}]]
        inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
        assert spell(processor, inputs["input_ids"]) == [
            " what is it? a dog?",
            " what does the image describe?",
            " who?",
        ]
        assert inputs["patch_mask"].tolist() == [True, True, False]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "`images` or `text` must be given, got neither"),
            ({"text": ""}, "`text` must not be empty"),
            ({"text": [" a", "  "]}, "`text` must not be empty"),
            ({"text": []}, "`text` must hold at least one sample"),
            ({"text": 3}, "`text` must be a string or a list of strings, got int"),
            ({"text": " a", "task": "caption"}, "`task` must be one of .*captioning.*, got 'caption'"),
            ({"task": "vqa"}, '`text` must be given with task="vqa"'),
            ({"task": "vqa", "text": "?!"}, "`text` must hold words"),
            ({"task": "entailment"}, "`hypothesis` must be given"),
            ({"task": "entailment", "hypothesis": ""}, "`hypothesis` must not be empty"),
            ({"task": "entailment", "hypothesis": "..."}, "`hypothesis` must hold words, got '...'"),
            ({"task": "entailment", "hypothesis": "a", "premise": " "}, "`premise` must not be empty"),
            ({"task": "entailment", "hypothesis": "a", "text": "b"}, "`text` must be None"),
            (
                {"task": "entailment", "hypothesis": ["a", "b"], "premise": ["c"]},
                "2 in `hypothesis` and 1 in `premise`",
            ),
            ({"text": " a", "hypothesis": "b"}, '`hypothesis` and `premise` belong to task="entailment"'),
            ({"text": " a", "hypothesys": "b"}, r"got \['hypothesys'\]; check the spelling"),
            ({"text": " a", "audio": [1.0]}, "`audio` must be None"),
            ({"text": " a\ud800"}, r"`text` must be valid Unicode, got a lone surrogate, '\\ud800', at character 2"),
            ({"task": "entailment", "hypothesis": "\udfff"}, "`hypothesis` must be valid Unicode"),
            ({"text": " a", "text_kwargs": 3}, "`text_kwargs` must be a dict of options, got 3"),
        ],
        ids=lambda value: None,
    )
    def test_bad_texts(self, processor, arguments, message):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)


class TestBatches:
    def test_one_image_for_several_texts(self, processor, photo):
        inputs = processor(images=photo, text=[" a", " bc"])
        assert inputs["pixel_values"].shape == (1, 3, 8, 8)
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]

    def test_one_text_for_several_images(self, processor, photo):
        inputs = processor(images=[photo, photo], text=" a")
        assert inputs["input_ids"].shape[0] == inputs["pixel_values"].shape[0] == 2

    def test_missing_images(self, processor, photo):
        inputs = processor(images=[photo, None, photo.rotate(180)], text=[" a", " b", " c"])
        assert inputs["patch_mask"].tolist() == [True, False, True] and inputs["patch_mask"].dtype == torch.bool
        assert not inputs["pixel_values"][1].any()
        alone = processor(images=photo.rotate(180), text=" c")
        assert torch.equal(inputs["pixel_values"][2], alone["pixel_values"][0])
        assert "patch_mask" not in alone

    @pytest.mark.parametrize("images", [None, [None, None]], ids=["none", "list of none"])
    def test_text_only(self, processor, images):
        assert set(processor(images=images, text=[" a", " b"])) == {"input_ids", "attention_mask"}

    def test_mismatch(self, processor, photo):
        with pytest.raises(ValueError, match="2 in `images` and 3 in `text`; make them equally long"):
            processor(images=[photo, photo], text=[" a", " b", " c"])
        with pytest.raises(ValueError, match="`images` must hold at least one sample"):
            processor(images=[], text=" a")
        with pytest.raises(ValueError, match=r"`images\[0\]` must be one image, got 2"):
            processor(images=[[photo, photo]])

    def test_lists(self, processor):
        inputs = processor(text=[" a", " bc"], return_tensors=None, padding=False)
        assert [len(row) for row in inputs["input_ids"]] == [4, 5]

    def test_options_reach_both_halves(self, processor, photo):
        inputs = processor(images=photo, text=" abcdef", size={"height": 4, "width": 6}, truncation=True, max_length=5)
        assert inputs["pixel_values"].shape == (1, 3, 4, 6) and inputs["input_ids"].shape == (1, 5)

    def test_options_by_kind(self, processor, photo):
        """As transformers' `ProcessorMixin` takes them."""
        inputs = processor(
            images=photo,
            text=" abcdef",
            text_kwargs={"truncation": True, "max_length": 5},
            images_kwargs={"size": {"height": 4, "width": 6}},
            common_kwargs={"return_tensors": "np"},
        )
        assert inputs["pixel_values"].shape == (1, 3, 4, 6) and inputs["input_ids"].shape == (1, 5)
        assert all(isinstance(value, np.ndarray) for value in inputs.values())

    def test_model_input_names(self, processor, photo):
        inputs = processor(images=[photo, None], task="entailment", hypothesis="a")
        assert set(inputs) == set(processor.model_input_names)


class TestAnswers:
    def test_equal_ofa(self, ofa_processor):
        assert ofa_processor.encode_answers(["yes", "no", "maybe"]) == [[4420], [117], [2085]]
        answers = [ofa_processor.entailment_answers[name] for name in ("entailment", "contradiction", "neutral")]
        assert answers == ["yes", "no", "maybe"]

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            ([], "`answers` must be a list of answers"),
            ("yes", "`answers` must be a list of answers"),
            (["yes", " "], "`answers` must not be empty"),
            (["yes", "no", " yes "], r"`answers` must differ from each other, got \[' yes'\]"),
        ],
        ids=["none", "string", "empty", "twice"],
    )
    def test_bad_answers(self, processor, answers, message):
        with pytest.raises(ValueError, match=message):
            processor.encode_answers(answers)

    @settings(deadline=None)
    @given(
        answers=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=6, unique=True),
        prompt=st.lists(st.integers(0, 99), min_size=1, max_size=5),
    )
    def test_trie_spells_the_answers_and_nothing_else(self, processor, answers, prompt):
        allowed = processor.answer_trie(answers, prompt_length=len(prompt))
        eos = processor.tokenizer.eos_token_id

        def spelled(row):
            for token in allowed(0, torch.tensor(row)):
                yield from [row[len(prompt) :]] if token == eos else spelled([*row, token])

        assert sorted(spelled(prompt)) == sorted(processor.encode_answers(answers))

    def test_trie_outside_of_answers(self, processor):
        allowed = processor.answer_trie(["ab"])
        assert allowed(3, torch.tensor([0, 98])) == [processor.tokenizer.eos_token_id]

    def test_trie_needs_the_start_token(self, processor):
        with pytest.raises(ValueError, match="`prompt_length` must be at least 1, got 0"):
            processor.answer_trie(["a"], prompt_length=0)


class TestCaptions:
    def test_targets(self, processor):
        labels = processor.encode_captions(["Two dogs, playing.", "a " * 30])
        assert spell(processor, labels) == [" two dogs playing", " " + " ".join("a" * 20)]
        assert all(row[-1] == 2 and 0 not in row for row in labels)

    def test_nothing_left(self, processor):
        with pytest.raises(ValueError, match=r"`captions\[1\]` must hold words, got '...'"):
            processor.encode_captions(["a", "..."])

    def test_back_to_text(self, processor):
        ids = processor.tokenizer([" Two dogs, playing. "])["input_ids"]
        assert processor.post_process_image_text_to_text(ids) == ["Two dogs, playing."]
        assert processor.post_process_captions(ids) == ["Two dogs playing"]


class TestSaving:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_save_and_load(self, backend, photo, tmp_path):
        processor = MuEProcessor(backend(size={"height": 16, "width": 8}), character_tokenizer())
        processor.save_pretrained(tmp_path)
        loaded = MuEProcessor(
            backend.from_pretrained(tmp_path), MuETokenizer.from_pretrained(tmp_path), processor.chat_template
        )
        expected, got = processor(images=photo), loaded(images=photo)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert (tmp_path / "chat_template.jinja").exists()

    def test_loads_without_the_package(self, processor, photo, tmp_path):
        processor.save_pretrained(tmp_path / "checkpoint")
        photo.save(tmp_path / "photo.png")
        script = (
            "import sys, torch\n"
            "from transformers import AutoProcessor\n"
            "for backend in ('pil', 'torchvision'):\n"
            "    processor = AutoProcessor.from_pretrained('checkpoint', trust_remote_code=True, backend=backend)\n"
            "    assert type(processor.image_processor).__name__.endswith('Pil') == (backend == 'pil')\n"
            "    torch.save(dict(processor(images='photo.png')), backend + '.pt')\n"
            "assert 'mue_hf' not in sys.modules\n"
        )
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
        expected, got = processor(images=photo), torch.load(tmp_path / "pil.pt")
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        vision = torch.load(tmp_path / "torchvision.pt")["pixel_values"]
        assert (vision - expected["pixel_values"]).abs().max() <= 2 / 127.5 + 1e-6

    def test_remote_classes_by_backend(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil", trust_remote_code=True)
        assert type(loaded).__name__ == "MuEImageProcessorPil"
