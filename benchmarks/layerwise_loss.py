"""Peak memory and time of a training step: last layer's loss, naive layer-wise loss, `layerwise_loss`.

A step is forward, loss and backward of a MuE model on random pictures (as trunk features, the trunk being frozen) and
random captions. The losses take turns in one process, so that whatever else the machine does hits them alike;
the figures are medians. Memory is what tensors take beyond the weights, at its peak: on the CPU from the profiler's
record of allocations in a step of its own, on CUDA from the allocator. The output is one JSON object, and a table.

    python benchmarks/layerwise_loss.py --images 4 --captions-per-image 5 --output loss.json --table loss.md
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from measuring import make_parser, write_results
from torch import Tensor
from torch.nn import functional as F

from mue_hf import MuEConfig, MuEForConditionalGeneration
from mue_hf.benchmarking.cells import load_average
from mue_hf.benchmarking.probes import peak_bytes
from mue_hf.benchmarking.tables import markdown_table
from mue_hf.cli.options import at_least
from mue_hf.evaluation.measure import environment
from mue_hf.inference.timing import in_turns, timed
from mue_hf.model.configuration_mue import SIZES
from mue_hf.training.losses import layerwise_loss

Loss = Callable[[MuEForConditionalGeneration, tuple[Tensor, ...], Tensor], Tensor]


def plain_loss(model: MuEForConditionalGeneration, state: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [] of one layer's state [rows, tokens, d]; pads are dropped before the head."""
    kept = labels != -100
    logits = model.lm_head(model.model.decoder.layer_norm(state[kept]))
    return F.cross_entropy(logits.float(), labels[kept], label_smoothing=0.1)


def last_layer(model: MuEForConditionalGeneration, states: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    return plain_loss(model, states[-1], labels)


def naive(model: MuEForConditionalGeneration, states: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    return sum(plain_loss(model, state, labels) for state in states)


def layerwise(
    model: MuEForConditionalGeneration, states: tuple[Tensor, ...], labels: Tensor, share: float = 1.0
) -> Tensor:
    norm, weight = model.model.decoder.layer_norm, model.lm_head.weight
    options = {"label_smoothing": 0.1, "intermediate_token_share": share}
    return layerwise_loss(states, norm, weight, labels, **options).loss


LOSSES: dict[str, Loss] = {
    "last_layer": last_layer,
    "naive": naive,
    "layerwise": layerwise,
    # the layers before the last on some of the tokens
    "layerwise_token_share_0.4": partial(layerwise, share=0.4),
}


def build(args: argparse.Namespace) -> tuple[MuEForConditionalGeneration, dict[str, Tensor]]:
    """A random model without its trunk's cost, and a batch for it."""
    torch.manual_seed(0)
    # the smallest trunk: it does not run, its channels are those of OFA's
    trunk = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 1024], "depths": [1, 1, 1]}
    trunk |= {"layer_type": "basic", "out_features": ["stage3"]}
    config = MuEConfig.from_size(args.size, backbone_config=trunk)
    model = MuEForConditionalGeneration(config).to(args.device).train()
    rows = args.images * args.captions_per_image
    labels = torch.randint(4, config.vocab_size, (rows, args.tokens))
    for row in range(rows):
        # captions of half to full length
        labels[row, args.tokens - row % (args.tokens // 2 + 1) :] = -100
    inputs = {
        "image_features": torch.randn(args.images, 1024, args.grid, args.grid),
        "input_ids": torch.randint(4, config.vocab_size, (args.images, 8)),
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels),
        "labels": labels,
    }
    return model, {name: tensor.to(args.device) for name, tensor in inputs.items()}


def step(model: MuEForConditionalGeneration, batch: dict[str, Tensor], loss: Loss, autocast: bool) -> float:
    """Forward, loss and backward; gradients do not add up over steps. Returns the loss."""
    model.zero_grad(set_to_none=True)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=autocast):
        states = model.model(**inputs, output_hidden_states=True, use_cache=False).decoder_hidden_states[1:]
        value = loss(model, states, batch["labels"])
    del states
    value.backward()
    return value.item()


def measure(args: argparse.Namespace) -> dict:
    """One record with the medians of every loss, their ratios to the last layer's, and the circumstances."""
    model, batch = build(args)
    runs = {name: partial(step, model, batch, loss, args.bf16) for name, loss in LOSSES.items()}

    def clocked(run: Callable[[], float]) -> tuple[float, float]:
        """Seconds on the clock, and processor seconds, which other programs disturb less."""
        start = time.process_time()
        return timed(run, model.device)[1], time.process_time() - start

    before, peaks = load_average(), {}
    for name, run in runs.items():
        # the first step of a loss also warms it up
        run()
        model.zero_grad(set_to_none=True)
        peaks[name] = peak_bytes(run, model.device)[1]
    times = in_turns({name: partial(clocked, run) for name, run in runs.items()}, args.repeats)
    medians = {name: [median(kind) for kind in zip(*pairs, strict=True)] for name, pairs in times.items()}
    return {
        "losses": {
            name: {
                "peak_mib": round(peaks[name] / 2**20, 1),
                "seconds": round(medians[name][0], 4),
                "cpu_seconds": round(medians[name][1], 4),
                "seconds_all": [round(pair[0], 4) for pair in times[name]],
                "peak_ratio": round(peaks[name] / peaks["last_layer"], 3),
                "seconds_ratio": round(medians[name][0] / medians["last_layer"][0], 3),
                "cpu_seconds_ratio": round(medians[name][1] / medians["last_layer"][1], 3),
            }
            for name in runs
        },
        "weights_mib": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20, 1),
        "decoder_layers": model.config.decoder_layers,
        "vocabulary": model.config.vocab_size,
        "target_tokens": int((batch["labels"] != -100).sum()),
        "settings": {name: value for name, value in vars(args).items() if name not in ("output", "table")},
        "environment": environment(model, len(batch["labels"])),
        "load_average_before_and_after": [before, load_average()],
    }


def make_table(record: dict) -> str:
    """The record as a table in markdown."""
    settings, machine = record["settings"], record["environment"]
    before, after = ("-" if x is None else f"{x:.2f}" for x in record["load_average_before_and_after"])
    rows = [
        {
            "loss": name.replace("_", " "),
            "peak memory beyond the weights, MiB": one["peak_mib"],
            "memory over the last layer's": f"{one['peak_ratio']:.2f}x",
            "seconds": f"{one['seconds']:.2f}",
            "seconds over the last layer's": f"{one['seconds_ratio']:.2f}x",
        }
        for name, one in record["losses"].items()
    ]
    lines = [
        f"OFA-{settings['size']}, {settings['images']} images with {settings['captions_per_image']} captions each, "
        f"{record['target_tokens']} target tokens of a vocabulary of {record['vocabulary']}, "
        f"{record['decoder_layers']} decoder layers; {'bfloat16' if settings['bf16'] else 'float32'}, "
        f"medians of {settings['repeats']} rounds; {machine['hardware']}, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}; load {before} before and {after} after.",
        "",
        *markdown_table(rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--size", default="base", choices=sorted(SIZES), help="one of OFA's sizes")
    parser.add_argument("--images", type=at_least(1), default=4)
    parser.add_argument("--captions-per-image", type=at_least(1), default=1)
    parser.add_argument("--tokens", type=at_least(2), default=20, help="tokens of the longest caption")
    parser.add_argument("--grid", type=at_least(1), default=14, help="patches per side; 14 is 224 pixels, 30 is 480")
    parser.add_argument("--bf16", action="store_true", help="run under autocast to bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(argv)
    record = measure(args)
    write_results(args, record, make_table(record))


if __name__ == "__main__":
    main()
