"""What train_scenes.py and train_photos.py share: tokenizer, random model, and how it is saved."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GenerationConfig

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEProcessor, MuETokenizer

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_tokenizer(corpus: Iterable[str], vocab_size: int, folder: Path, num_bins: int = 0) -> MuETokenizer:
    """A byte-level BPE of what comes at least twice in a corpus; its files are written to a folder."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size, min_frequency=2, special_tokens=SPECIAL_TOKENS, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    return MuETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), num_codes=0, num_bins=num_bins)


def random_model(sizes: Any, generation: dict[str, int], **fields: Any) -> MuEForConditionalGeneration:
    """A MuE with random weights.

    Args:
        sizes: `d_model`, `ffn_dim`, `heads`, `layers` and `init_std`.
        generation (`dict`): options of its generation config, besides the special tokens.
        fields: further fields of its config.
    """
    config = MuEConfig(
        d_model=sizes.d_model,
        encoder_ffn_dim=sizes.ffn_dim,
        decoder_ffn_dim=sizes.ffn_dim,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        init_std=sizes.init_std,
        max_position_embeddings=64,
        token_bucket_size=32,
        **fields,
    )
    # On CPUs autocast to bfloat16 is several times faster with plain matrix products than with sdpa.
    model = MuEForConditionalGeneration._from_config(config, attn_implementation="eager")
    special = [f"{name}_token_id" for name in ("bos", "eos", "pad", "decoder_start")]
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in special}, **generation)
    return model


def save_in_half(model: MuEForConditionalGeneration, processor: MuEProcessor, folder: str) -> None:
    """Writes the checkpoint in half precision: on disk only, CPUs are slow in it."""
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
