"""Self-speculation, measured: draft tokens with the first layers, check them with all of them, keep what agrees.

The drafts and the check share the model, its head and one cache (policy "exact"): the deep layers run on all drafted
tokens in one batch. Greedy decoding, one image at a time, exits off; the tokens are those of full depth, which is
checked. The record has, for each number of draft layers and drafted tokens, the share of drafts that were kept and
the seconds beside the package's own greedy `generate`, in turns and with the image trunk. With random weights the
share means nothing; `speedup_if_all_kept` is then what no share can exceed.

    python benchmarks/self_speculation.py --size base --threads 2 --output speculation-base.json
    python benchmarks/self_speculation.py --model checkpoints/mue-flickr8k-small --images examples/photos/*.jpg \\
        --threads 2 --output speculation-small.json
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mue_hf.benchmarking.cells import ratio
from mue_hf.benchmarking.run import add_model_arguments, load_model
from mue_hf.evaluation.measure import environment
from mue_hf.files import write_whole
from mue_hf.model.cache_mue import MuECache
from mue_hf.model.criteria_mue import ExitPolicy

# Whether a drafted token [] is kept, given the token that all layers say.
Keep = Callable[[Tensor, Tensor], bool]


@torch.no_grad()
def speculate(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    new_tokens: int,
    draft_layers: int,
    draft_tokens: int,
    keep: Keep = torch.equal,
) -> tuple[list[int], int, int]:
    """
    Greedy decoding of one image by drafting and checking; </s> is never said.

    Args:
        new_tokens (`int`): how many to make.
        draft_layers (`int`): decoder layers of a draft.
        draft_tokens (`int`): tokens that are drafted before a check.
        keep (`Callable`): (drafted token, token of all layers) -> whether the draft is kept.

    Returns:
        `tuple[list[int], int, int]`: the tokens, and how many were drafted and kept.
    """
    decoder, config = model.get_decoder(), model.config
    encoded = model.get_encoder()(**inputs)
    cache = MuECache(config, new_tokens + draft_tokens + 1, "exact")
    shallow = ExitPolicy("fixed", depth=draft_layers)

    def best(states: Tensor) -> Tensor:
        logits = model.lm_head(states, slice(0, config.num_text_tokens))
        logits[..., config.eos_token_id] = -torch.inf
        return logits.argmax(-1)

    start = torch.tensor([[config.decoder_start_token_id]], device=model.device)
    tokens, drafted, kept = [start], 0, 0
    while len(tokens) <= new_tokens:
        token, drafts, known = tokens[-1], [], cache.length
        for _ in range(min(draft_tokens, new_tokens - len(tokens))):
            output = decoder(encoded, input_ids=token, cache=cache, policy=shallow)
            token = best(output.last_hidden_state)
            drafts.append(token)
        # The deep layers first catch up with all drafted tokens, then run on the last one.
        last = decoder(encoded, input_ids=token, cache=cache).last_hidden_state
        states = [last]
        if drafts:
            states = [decoder.layer_norm(cache.states[:, known : known + len(drafts)]), last]
        checked = best(torch.cat(states, dim=1)).split(1, dim=1)
        agreed = 0
        while agreed < len(drafts) and keep(drafts[agreed], checked[agreed]):
            agreed += 1
        tokens += [*drafts[:agreed], checked[agreed]]
        cache.crop(len(tokens) - 1 - cache.length)
        drafted, kept = drafted + len(drafts), kept + agreed
    return [int(token) for token in tokens[1 : new_tokens + 1]], drafted, kept


def plain(model: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int) -> list[int]:
    """The same by the package's own `generate`."""
    options = {"num_beams": 1, "do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    options |= {"no_repeat_ngram_size": 0, "exit_criterion": "never"}
    return model.generate(**inputs, **options)[0, -new_tokens:].tolist()


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    output = run()
    return output, time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One record: a row for each number of draft layers and drafted tokens."""
    model, make_inputs, name = load_model(args)
    batch = make_inputs(args.count)
    samples = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(args.count)]
    layers = model.config.decoder_layers
    if not all(1 <= depth < layers for depth in args.draft_layers or []):
        raise ValueError(f"`--draft-layers` must lie in [1, {layers - 1}], got {args.draft_layers}.")
    shapes = [(depth, length) for depth in args.draft_layers or range(1, layers) for length in args.draft_tokens]
    rows: dict[tuple[int, int], dict[str, list]] = {
        shape: {"free": [], "ours": [], "plain": [], "same": [], "drafted": [], "kept": []} for shape in shapes
    }
    with tqdm(total=len(shapes) * args.count * (args.repeats + 1), unit="image", file=sys.stderr) as progress:
        for repeat in range(args.repeats + 1):
            for shape, row in rows.items():
                for inputs in samples:
                    ways = {
                        "plain": lambda x=inputs: plain(model, x, args.tokens),
                        "ours": lambda x=inputs, s=shape: speculate(model, x, args.tokens, *s),
                        "free": lambda x=inputs, s=shape: speculate(model, x, args.tokens, *s, keep=lambda *_: True),
                    }
                    outputs = {}
                    for way in ways if repeat % 2 else reversed(ways):
                        outputs[way], taken = seconds(ways[way])
                        # The first round warms up.
                        if repeat:
                            row[way].append(taken)
                    row["same"].append(outputs["ours"][0] == outputs["plain"])
                    row["drafted"].append(outputs["ours"][1])
                    row["kept"].append(outputs["ours"][2])
                    progress.update()
    return {
        "name": name,
        "new_tokens": args.tokens,
        "images": args.count,
        "repeats": args.repeats,
        "environment": environment(model, 1),
        "rows": [
            {
                "draft_layers": depth,
                "of_layers": layers,
                "draft_tokens": length,
                "kept": sum(row["kept"]) / max(sum(row["drafted"]), 1),
                "same_tokens": sum(row["same"]) / len(row["same"]),
                "plain_seconds": median(row["plain"]),
                "seconds": median(row["ours"]),
                "free_seconds": median(row["free"]),
                "speedup": ratio(row["plain"], row["ours"]),
                "speedup_if_all_kept": ratio(row["plain"], row["free"]),
            }
            for (depth, length), row in rows.items()
        ],
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    machine = record["environment"]
    lines = [
        f"{record['name']}, {record['new_tokens']} new tokens, greedy, batch 1 ({machine['hardware']}, "
        f"{machine['threads']} threads).",
        "",
        "| draft layers | draft tokens | kept | same tokens | speed-up over greedy | if all were kept |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        (speedup, (low, high)), most = row["speedup"].values(), row["speedup_if_all_kept"]["value"]
        lines.append(
            f"| {row['draft_layers']} of {row['of_layers']} | {row['draft_tokens']} | {row['kept']:.0%} | "
            f"{row['same_tokens']:.0%} | {speedup:.2f}x [{low:.2f}, {high:.2f}] | {most:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--count", type=int, default=2, help="images")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens")
    parser.add_argument("--draft-layers", type=int, nargs="+", help="default: every number below all layers")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4], help="drafted before a check (2 4)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the JSON record; default: standard output")
    parser.add_argument("--table", type=Path, help="file for a Markdown table")
    args = parser.parse_args(argv)
    for name in ("count", "tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.draft_tokens) < 1:
        parser.error(f"--draft-tokens must be at least 1, got {min(args.draft_tokens)}")
    record = measure(args)
    text = json.dumps(record, indent=1) + "\n"
    if args.table is not None:
        write_whole(args.table, markdown(record).encode())
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_whole(args.output, text.encode())


if __name__ == "__main__":
    main()
