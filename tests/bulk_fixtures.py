"""What the tests of bulk work share: a tiny checkpoint, and images of which some are damaged."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor, MuETokenizer

SPECIAL_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
PHOTO_SIZE = (90, 60)
BALANCED = {"image_exit_threshold": -2.0, "text_exit_threshold": 2.0, "decoder_exit_threshold": -2.0}
DAMAGES = ("truncated", "text", "empty", "bomb", "postscript", "missing")


def byte_tokenizer() -> MuETokenizer:
    """Its tokens are the bytes."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    return MuETokenizer({name: index for index, name in enumerate(names)}, [], num_codes=0, num_bins=0)


def make_checkpoint(folder: Path) -> Path:
    """A tiny random model whose tokens are bytes, and its processor."""
    tokenizer = byte_tokenizer()
    config = MuEConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=64,
        token_bucket_size=16,
        image_bucket_size=16,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "out_features": ["stage2"],
        },
    )
    torch.manual_seed(1)
    model = MuEForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.generation_config = GenerationConfig(
        **SPECIAL_IDS,
        max_new_tokens=5,
        # Five different letters, and no early end.
        no_repeat_ngram_size=1,
        suppress_tokens=[0, 1, 2, 3],
        exit_presets={"balanced": BALANCED},
    )
    model.save_pretrained(folder)
    MuEProcessor(MuEImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def make_images(folder: Path, count: int, damaged: float, seed: int) -> dict[str, str | None]:
    """Images of many sizes, modes and formats: name to what is wrong with it, None for a good one."""
    draw = random.Random(seed)
    folder.mkdir(exist_ok=True)
    made: dict[str, str | None] = {}
    for number in range(count):
        damage = draw.choice(DAMAGES) if draw.random() < damaged else None
        suffix, mode = draw.choice([("png", "RGB"), ("png", "RGBA"), ("png", "L"), ("jpg", "RGB"), ("webp", "RGB")])
        path = folder / f"{number:05d}.{'png' if damage == 'bomb' else suffix}"
        size = draw.randint(40, 120), draw.randint(40, 120)
        # Dark and light, plain and rough, so that captions differ.
        numbers = np.random.default_rng([seed, number])
        low, high = np.sort(numbers.integers(0, 256, (2, 3)), axis=0)
        noise = numbers.integers(low, high + 1, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
        made[path.name] = damage
        if damage is not None:
            spoil(path, damage)
    return made


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
        return
    if damage == "bomb":
        # A header that claims a thousand times more pixels than there are.
        content = bytearray(content)
        content[16:24] = struct.pack(">II", 30000, 30000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    contents = {
        "truncated": content[: len(content) // 3],
        "text": b"no image",
        "empty": b"",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
    }
    path.write_bytes(contents.get(damage, content))
