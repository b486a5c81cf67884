# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[export,timm]"]
# ///
"""Export the encoder and each decoder layer with torch.export and to ONNX, and decode with exits from these parts.

    python examples/export.py photo.jpg --model OFA --output runs/export

A model with exits does not export as a whole: how many layers run depends on values. What lies between two decisions
does: encoder (photos of this size, the captioning prompt, full depth), decoder_N (any number of tokens), embedding,
head. `decode` decides after each layer whether to go on. These parts have no cache.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEProcessor
from mue_hf.model.views_mue import ImageView


class Encoder(nn.Module):
    """Pixels [1, 3, height, width] -> what the decoder attends to [1, source, d]; prompt and biases are constants."""

    def __init__(self, encoder: nn.Module, biases: list[Tensor], prompt: Tensor):
        super().__init__()
        self.encoder, self.biases, self.prompt = encoder, nn.Buffer(torch.stack(biases)), nn.Buffer(prompt)

    def forward(self, pixels: Tensor) -> Tensor:
        encoder = self.encoder
        patches = encoder.embed_images(pixels).feature_maps[-1].flatten(2).transpose(1, 2)
        states = encoder.patch_layernorm_embedding(encoder.image_proj(patches) + encoder.type_embedding.weight[1])
        for index, layer in enumerate(encoder.layers[: len(self.biases)]):
            states = layer(states, self.biases[index])
        return torch.cat([encoder.layer_norm(states), self.prompt], dim=1)


class DecoderLayer(nn.Module):
    """States [1, tokens, d] and the encoder's output -> states; biases for the longest caption are constants."""

    def __init__(self, layer: nn.Module, self_bias: Tensor, cross_bias: Tensor):
        super().__init__()
        self.layer, self.self_bias, self.cross_bias = layer, nn.Buffer(self_bias), nn.Buffer(cross_bias)

    def forward(self, states: Tensor, source: Tensor) -> Tensor:
        biases = self.self_bias[:, :, : states.shape[1], : states.shape[1]], self.cross_bias[:, :, : states.shape[1]]
        return self.layer(states, source, *biases, tokens=None, images=ImageView(None, 1, 1))


@torch.no_grad()
def parts_of(model: MuEForConditionalGeneration, inputs: dict, tokens: int = 20) -> dict[str, tuple]:
    """Name -> module and example inputs. Biases are noted down in a run over more than the most `tokens`."""
    calls: dict[nn.Module, list[Tensor]] = {}
    encoder, decoder = model.model.encoder, model.model.decoder
    start = torch.full((1, tokens + 1), model.config.decoder_start_token_id)
    # a layer's first call stays: that of the image stream, before the prompt's
    with nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: calls.update({module: [x.clone() for x in args if isinstance(x, Tensor)]} | calls)
    ):
        source = model(**inputs, decoder_input_ids=start).encoder_last_hidden_state
    prompt = source[:, calls[encoder.layers[0]][0].shape[1] :]
    layers = encoder.layers[: model.config.layers_of("image")]
    parts = {"encoder": (Encoder(encoder, [calls[x][1] for x in layers], prompt), (inputs["pixel_values"],))}
    parts["embedding"] = (nn.Sequential(decoder.embed_tokens, decoder.layernorm_embedding), (start[:, :2],))
    for index, (states, _, *biases) in enumerate(calls[layer] for layer in decoder.layers):
        parts[f"decoder_{index}"] = (DecoderLayer(decoder.layers[index], *biases), (states[:, :2], source))
    parts["head"] = (nn.Sequential(decoder.layer_norm, model.lm_head), (states[:, :2],))
    return parts


def decode(run: dict, pixels: Tensor, config: MuEConfig, tokens: int = 20, threshold: float = 0.9) -> tuple:
    """Greedy decoding with the parts in `run`, a token exits above `threshold`; its tokens and their depths."""
    source, ids, depths = run["encoder"](pixels), [config.decoder_start_token_id], []
    while ids[-1] != config.eos_token_id and len(ids) < tokens:
        states = run["embedding"](torch.tensor([ids]))
        for depth in range(1, config.decoder_layers + 1):
            previous, states = states, run[f"decoder_{depth - 1}"](states, source)
            if torch.cosine_similarity(previous.flatten(1), states.flatten(1)) > threshold:
                break
        depths.append(depth)
        ids.append(int(run["head"](states)[0, -1].argmax()))
    return ids, depths


def main(argv: list[str] | None = None) -> None:
    """Exports, and captions the photo with what was exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", default="examples/photos/cat.jpg")
    parser.add_argument("--model", default="checkpoints/mue-photos-small", help="checkpoint folder or Hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/export"))
    args = parser.parse_args(argv)

    processor = MuEProcessor.from_pretrained(args.model)
    model = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    inputs = processor(images=Image.open(args.photo))
    args.output.mkdir(parents=True, exist_ok=True)
    run = {}
    for name, (module, example) in parts_of(model, inputs).items():
        shapes = ({} if name == "encoder" else {1: torch.export.Dim.DYNAMIC}, {})[: len(example)]
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        run[name] = program.module()
        torch.onnx.export(program, f=args.output / f"{name}.onnx", dynamo=True, external_data=False, verbose=False)
    ids, depths = decode(run, inputs["pixel_values"], model.config)
    print(f"{processor.decode(ids, skip_special_tokens=True)}  (depths {depths} of {model.config.decoder_layers})")


if __name__ == "__main__":
    main()
