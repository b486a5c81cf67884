"""Makes the golden OFA model from the names of its tensors, and writes it in both of OFA's layouts.

`shapes.json` lists the tensors of the OFA checkpoint (fork layout) behind `inputs.safetensors` and
`outputs_float64.safetensors`: trunk blocks [2, 2, 2], width 32, two encoder and two decoder layers, vocabulary 400.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

GOLDEN = Path(__file__).parent

# Fork's part of a name -> fairseq's; the first two are told apart by the stack.
FAIRSEQ_NAMES = (
    ("encoder.layers.{}.self_attn_mid_layer_norm", "encoder.layers.{}.attn_ln"),
    ("decoder.layers.{}.self_attn_mid_layer_norm", "decoder.layers.{}.self_attn_ln"),
    ("decoder.layers.{}.cross_attn_mid_layer_norm", "decoder.layers.{}.cross_attn_ln"),
    ("decoder.layers.{}.cross_attn_layer_norm", "decoder.layers.{}.encoder_attn_layer_norm"),
    ("decoder.layers.{}.cross_attn.", "decoder.layers.{}.encoder_attn."),
    ("encoder.layers.{}.ffn_layer_norm", "encoder.layers.{}.ffn_layernorm"),
    ("decoder.layers.{}.ffn_layer_norm", "decoder.layers.{}.ffn_layernorm"),
)


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor `name`: normal noise seeded by the name, scaled by the kind of parameter."""
    noise = np.random.Generator(np.random.PCG64([0, zlib.crc32(name.encode())])).standard_normal(shape, dtype="f4")
    if name.endswith("c_attn"):
        return 1 + 0.3 * noise
    if name.endswith(("running_mean", "bias")):
        return 0.1 * noise
    if "_rel_pos_table" in name:
        return 0.5 * noise
    if "_positions" in name:
        return noise
    if len(shape) == 1:
        gain = 0.25 if ".bn3." in name else 0.3 if name == "decoder.layernorm_embedding.weight" else 1.0
        return gain * (1 + 0.1 * noise)
    if len(shape) == 4:
        return noise * math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    scaled = noise * (1 / math.sqrt(shape[1]))
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return scaled * np.float32(1.6)
    return scaled * np.float32(2.0) if name == "encoder.embed_tokens.weight" else scaled


def make_weights() -> dict[str, torch.Tensor]:
    """All weights by their names in the fork's layout.

    The running variances are exp(0.2 * noise); they are read from a file because the last bit of a float32 `exp`
    depends on the processor, and the golden outputs are compared to 1e-9.
    """
    shapes = json.loads((GOLDEN / "shapes.json").read_text())
    weights = {name: torch.from_numpy(make_weight(name, tuple(shape))) for name, shape in shapes.items()}
    return weights | load_file(GOLDEN / "running_var.safetensors")


def index_buffers(fairseq: bool) -> dict[str, torch.Tensor]:
    """What OFA stores beside its parameters, and what a converter drops."""
    buffers = {"decoder.image_position_idx": torch.arange(1026 if fairseq else 1025)}
    for stack in ("encoder", "decoder"):
        buffers |= {f"{stack}.token_rp_bucket": torch.zeros(4, 4).long()}
        buffers |= {f"{stack}.image_rp_bucket": torch.zeros(65, 65).long()}
        if fairseq:
            buffers[f"{stack}.version"] = torch.tensor([3.0])
    return buffers


def fork_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` as the transformers fork saves them: with buffers and the tied copies."""
    tied = weights["encoder.embed_tokens.weight"]
    return weights | index_buffers(False) | {"decoder.embed_tokens.weight": tied.clone()}


def fairseq_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` under fairseq's names: with versions, buffers, batch counters and the tied copies."""
    renamed = {}
    for name, tensor in weights.items():
        for layer in range(2):
            for fork, fairseq in FAIRSEQ_NAMES:
                name = name.replace(fork.format(layer), fairseq.format(layer))
        renamed[name] = tensor
        if name.endswith("running_var"):
            renamed[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    tied = weights["encoder.embed_tokens.weight"]
    copies = {"decoder.embed_tokens.weight": tied, "decoder.output_projection.weight": tied}
    return renamed | index_buffers(True) | copies


def write_fork(folder: Path, weights: dict[str, torch.Tensor], **settings: object) -> Path:
    """A folder as the transformers fork writes it: config.json, pytorch_model.bin, vocab.json, merges.txt."""
    write_vocabulary(folder)
    config = {"model_type": "ofa", "d_model": 32, "encoder_layers": 2, "normformer": True, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config | settings))
    torch.save(fork_weights(weights), folder / "pytorch_model.bin")
    return folder


def write_fairseq(file: Path, weights: dict[str, torch.Tensor], **extra: object) -> Path:
    """A training checkpoint as fairseq writes it, with the arguments and scores beside the weights."""
    arguments = argparse.Namespace(arch="ofa_micro", disable_entangle=True, attn_scale_factor=2.0, dropout=0.1)
    state = {"best": np.float64(1.25), "epoch": 3}
    content = {"args": None, "cfg": {"model": arguments}, "model": fairseq_weights(weights), "extra_state": state}
    torch.save(content | extra, file)
    return file


def write_vocabulary(folder: Path) -> Path:
    """A byte-level vocabulary of 261 tokens with OFA's special ones, ids 0 to 3 where OFA has them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


__all__ = [
    "GOLDEN",
    "fairseq_weights",
    "fork_weights",
    "make_weight",
    "make_weights",
    "write_fairseq",
    "write_fork",
    "write_vocabulary",
]
