"""transformers' `pipeline()` on a tiny random checkpoint: call forms, options, errors, both doors, other models."""

import base64
import io
import logging
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
from conftest import character_tokenizer, tiny_config
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    ImageTextToTextPipeline,
    pipeline,
)

from mue_hf import MuEForConditionalGeneration, MuEImageProcessorPil, MuEProcessor, MuETokenizer
from mue_hf.model.pipeline_mue import MuEImageTextToTextPipeline, MuEImageToTextPipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that says different things about different images, and its processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=100, max_position_embeddings=128, init_std=0.5)
    MuEForConditionalGeneration(config).save_pretrained(folder)
    MuEProcessor(MuEImageProcessorPil(size={"height": 64, "width": 64}), character_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rows, columns = np.mgrid[0:40, 0:50]
    paths = [str(folder / f"{name}.png") for name in "abc"]
    for turn, path in enumerate(paths):
        image = np.stack([rows * 6, columns * 5, (rows * columns * (turn + 1)) % 256], -1).astype(np.uint8)
        Image.fromarray(image).rotate(90 * turn).save(path)
    return paths


@pytest.fixture(scope="module")
def captioner(checkpoint):
    return pipeline("image-text-to-text", model=str(checkpoint), device="cpu", max_new_tokens=6)


def generated(outputs):
    return [output["generated_text"] for output in outputs]


@pytest.mark.parametrize("task", ["image-to-text", "image-text-to-text"])
def test_image_alone(checkpoint, photos, task, monkeypatch):
    # transformers 5.24 announces the redirect of the old name in a record that logging cannot format
    monkeypatch.setattr(logging.getLogger("transformers.pipelines"), "disabled", True)
    pipe = pipeline(task, model=str(checkpoint), device="cpu")
    assert type(pipe) is MuEImageTextToTextPipeline
    outputs = pipe(photos[0])
    assert [set(output) for output in outputs] == [{"generated_text"}]
    inputs = pipe.processor(images=photos[0])
    expected = pipe.model.generate(**inputs, max_new_tokens=17)
    assert generated(outputs) == pipe.processor.post_process_image_text_to_text(expected)


@pytest.mark.parametrize("kind", ["path", "pil", "array", "url", "base64"])
def test_kinds_of_image(captioner, photos, kind):
    data = open(photos[0], "rb").read()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        image = Image.open(io.BytesIO(data))
        sources = {
            "pil": image,
            "array": np.asarray(image),
            "url": f"http://127.0.0.1:{server.server_port}/a.png",
            "base64": f"data:image/png;base64,{base64.b64encode(data).decode()}",
        }
        assert captioner(sources.get(kind, photos[0])) == captioner(photos[0])
        server.shutdown()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lists(captioner, photos, batch_size):
    outputs = captioner(photos, batch_size=batch_size)
    assert outputs == [captioner(photo) for photo in photos]
    assert captioner(tuple(photos)) == outputs
    assert list(captioner(photo for photo in photos)) == outputs


def test_a_preset_for_other_settings_warns(checkpoint, photos):
    """Of what the pipeline asks for, beside what is saved with the checkpoint."""
    model = MuEForConditionalGeneration.from_pretrained(checkpoint)
    settings = {"num_beams": 1, "do_sample": False, "no_repeat_ngram_size": 0, "max_new_tokens": 6}
    model.generation_config.exit_presets = {"mine": {"decoder_exit_threshold": 0.5, "certified_for": settings}}
    processor = MuEProcessor.from_pretrained(checkpoint)
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the exit preset")
        pipe(photos[0], max_new_tokens=6, exit_preset="mine")
    with pytest.warns(UserWarning, match="num_beams=1 where this call has 2") as caught:
        pipe(photos[0], max_new_tokens=6, exit_preset="mine", num_beams=2)
    assert [one.filename for one in caught if "the exit preset" in str(one.message)] == [__file__]


def test_text(captioner, photos):
    output = captioner(photos[0], text=" what is it?")
    assert [set(record) for record in output] == [{"input_text", "generated_text"}]
    assert output[0]["input_text"] == " what is it?"
    texts = [" a", " what is it?"]
    both = captioner(photos[:2], text=texts, batch_size=2)
    assert both == [captioner(photo, text=text) for photo, text in zip(photos, texts, strict=False)]
    assert captioner(photos[0], text=texts) == [captioner(photos[0], text=text) for text in texts]
    assert captioner(photos[:2], text=" a") == [captioner(photo, text=" a") for photo in photos[:2]]
    assert captioner([{"images": photo, "text": " a"} for photo in photos[:2]]) == captioner(photos[:2], text=" a")
    assert generated(captioner(photos[0], text=" a", return_full_text=True))[0].startswith(" a")
    assert len(captioner(text=" a")) == 1


def test_chat(captioner, photos):
    parts = [{"type": "image", "path": photos[0]}, {"type": "text", "text": "what is it?"}]
    chat = [{"role": "user", "content": parts}]
    answer = generated(captioner(photos[0], text=" what is it?"))
    assert generated(captioner(text=chat, return_full_text=False)) == answer
    messages = captioner(chat)[0]["generated_text"]
    assert messages[-1] == {"role": "assistant", "content": answer[0]}


def test_generation_options(captioner, photos):
    many = captioner(photos[0], num_beams=3, num_return_sequences=2, max_new_tokens=4)
    assert len(many) == 2
    batched = captioner(photos[:2], num_beams=3, num_return_sequences=2, max_new_tokens=4, batch_size=2)
    assert [len(outputs) for outputs in batched] == [2, 2] and batched[0] == many
    direct = captioner(photos[0], max_new_tokens=3)
    assert captioner(photos[0], generate_kwargs={"max_new_tokens": 3}) == direct


def test_exit_options_reach_generate(checkpoint, photos):
    options = {"image_exit_threshold": -2.0, "text_exit_threshold": -2.0, "decoder_exit_threshold": -2.0}
    pipe = pipeline("image-text-to-text", model=str(checkpoint), device="cpu", max_new_tokens=6)
    inputs = pipe.processor(images=photos[0])
    expected = pipe.processor.post_process_image_text_to_text(
        pipe.model.generate(**inputs, max_new_tokens=6, **options)
    )
    assert generated(pipe(photos[0], **options)) == expected
    kept = pipeline("image-text-to-text", model=str(checkpoint), device="cpu", max_new_tokens=6, **options)
    assert generated(kept(photos[0], num_beams=1)) == expected
    with pytest.raises(ValueError, match="decoder_exit_treshold"):
        pipe(photos[0], decoder_exit_treshold=0.5)


def test_bad_input(captioner, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(open(photos[0], "rb").read()[:300])
    for call in (str(broken), [photos[0], str(broken)]):
        with pytest.raises(ValueError, match=r"broken.png\) must be a complete image"):
            captioner(call)
    with pytest.raises(ValueError, match=r"nothing.png\) must exist"):
        captioner("nothing.png")
    with pytest.raises(ValueError, match="`images` or `text` must be given"):
        captioner()
    with pytest.raises(ValueError, match="`images` must hold at least one sample"):
        captioner([])
    with pytest.raises(ValueError, match="got 1 texts for 2 images"):
        captioner(photos[:2], text=[" a"])
    with pytest.raises(ValueError, match="`text` must not be empty"):
        captioner(photos[0], text="")


@pytest.mark.parametrize("form", ["path", "chat"])
def test_image_files_have_a_size(captioner, photos, form, monkeypatch):
    monkeypatch.setattr("mue_hf.model.images_mue.MAX_PIXELS", 100)
    chat = [{"role": "user", "content": [{"type": "image", "path": photos[0]}]}]
    with pytest.raises(ValueError, match="must have at most 100 pixels, got 50 x 40; shrink it"):
        captioner(photos[0] if form == "path" else chat)


def test_the_logging_of_transformers_is_left_alone():
    script = (
        "import logging, transformers\n"
        "def state():\n"
        "    loggers = logging.root.manager.loggerDict.items()\n"
        "    loggers = [(name, logger) for name, logger in loggers if isinstance(logger, logging.Logger)]\n"
        "    return {name: (log.filters[:], log.handlers[:], log.level, log.disabled) for name, log in loggers}\n"
        "before = state()\n"
        "import mue_hf\n"
        "after = state()\n"
        "assert {name: after[name] for name in before} == before\n"
        "assert not any(filters for filters, *_ in after.values()), after\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_mixed_entailment_batch_scores_as_its_samples_do(checkpoint, photos):
    """The processor's batches mean the same as its single samples: missing images, decoder prompts of any length."""
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float64)
    answers = processor.encode_answers(["yes", "no", "maybe", "ye"])
    samples = [(photos[0], "a dog", "zebra"), (None, "two cats play", None), (photos[1], "x", None)]

    def inputs(images, hypothesis, premise):
        made = processor(images=images, task="entailment", hypothesis=hypothesis, premise=premise)
        return made.to(torch.float64)

    batch = inputs(*(list(column) for column in zip(*samples, strict=True)))
    scores = model.score_answers(answers, **batch)
    alone = torch.cat([model.score_answers(answers, **inputs(*sample)) for sample in samples])
    assert torch.allclose(scores, alone, rtol=0, atol=1e-9)
    trie = processor.answer_trie(["yes", "no", "maybe"], prompt_length=batch["decoder_input_ids"].shape[1])
    tokens = model.generate(**batch, prefix_allowed_tokens_fn=trie, max_new_tokens=8)
    words = processor.post_process_image_text_to_text(tokens[:, batch["decoder_input_ids"].shape[1] :])
    assert set(words) <= {"yes", "no", "maybe"}


def test_same_class_for_the_hub(checkpoint, photos, captioner):
    pipe = pipeline(
        "image-text-to-text",
        model=str(checkpoint),
        pipeline_class=MuEImageToTextPipeline,
        device="cpu",
        max_new_tokens=6,
    )
    assert type(pipe) is MuEImageToTextPipeline and pipe(photos[0]) == captioner(photos[0])


def test_other_models_are_untouched(checkpoint, photos):
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = BlipConfig(
        text_config={**tiny, "vocab_size": 100, "encoder_hidden_size": 8, "sep_token_id": 2, "pad_token_id": 1},
        vision_config={**tiny, "image_size": 32, "patch_size": 16},
    )
    tokenizer = MuETokenizer.from_pretrained(checkpoint)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    model = BlipForConditionalGeneration(config)
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    assert type(pipe) is ImageTextToTextPipeline
    with pytest.raises(ValueError, match="You must provide text"):
        pipe(Image.open(photos[0]))
