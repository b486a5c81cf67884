"""Self-speculation, measured: draft tokens with the first layers, check them with all of them, keep what agrees.

The drafts and the check share the model, its head and one cache (policy "exact"): the deep layers run on all drafted
tokens in one batch. Greedy decoding, one image at a time, exits off; the tokens are those of full depth, which is
checked. The record has, for each number of draft layers and drafted tokens, the share of drafts that were kept and
the seconds beside the package's own greedy `generate`, in turns and with the image trunk. With random weights the
share means nothing; `speedup_if_all_kept` is then what no share can exceed.

    python benchmarks/self_speculation.py --size base --threads 2 --output speculation-base.json
    python benchmarks/self_speculation.py --model checkpoints/mue-photos-small --images examples/photos/*.jpg \\
        --threads 2 --output speculation-small.json
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring import add_caption_arguments, greedy, make_parser, write_results
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from mue_hf.benchmarking.cells import ratio
from mue_hf.benchmarking.tables import markdown_table, ratio_cell
from mue_hf.cli.bench import load_timed_model
from mue_hf.cli.options import at_least
from mue_hf.evaluation.measure import environment
from mue_hf.inference.timing import in_turns, timed
from mue_hf.model.cache_mue import MuECache
from mue_hf.model.criteria_mue import ExitPolicy

# Whether a drafted token [] is kept, given the token of all layers.
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
    Greedy decoding of one image by drafting and checking; </s> is never generated.

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
        # The deep layers run on all drafted tokens and on the last one at once.
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
    return greedy(model, inputs, new_tokens)[0].tolist()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One record: a row for each number of draft layers and drafted tokens."""
    subject = load_timed_model(args)
    model, layers = subject.model, subject.model.config.decoder_layers
    if not all(1 <= depth < layers for depth in args.draft_layers or []):
        raise ValueError(f"`--draft-layers` must lie in [1, {layers - 1}], got {args.draft_layers}.")
    shapes = [(depth, length) for depth in args.draft_layers or range(1, layers) for length in args.draft_tokens]
    batch, calls = subject.inputs(args.count), {}
    for image in range(args.count):
        inputs = {key: value[image : image + 1] for key, value in batch.items()}
        calls["plain", image] = partial(plain, model, inputs, args.tokens)
        for shape in shapes:
            calls["ours", *shape, image] = ours = partial(speculate, model, inputs, args.tokens, *shape)
            calls["free", *shape, image] = partial(ours, keep=lambda *_: True)
    with tqdm(total=len(calls) * (args.repeats + 1), unit="caption", file=sys.stderr) as progress:

        def run(call: Callable[[], Any]) -> tuple[Any, float]:
            progress.update()
            return timed(call, model.device)

        # The first round warms up.
        rounds = in_turns({key: partial(run, call) for key, call in calls.items()}, args.repeats + 1)

    def seconds(*way: Any) -> list[float]:
        return [taken for image in range(args.count) for _, taken in rounds[*way, image][1:]]

    def row(*shape: int) -> dict[str, Any]:
        ours = [rounds["ours", *shape, image][0][0] for image in range(args.count)]
        same = [tokens == rounds["plain", image][0][0] for image, (tokens, _, _) in enumerate(ours)]
        return {
            "draft_layers": shape[0],
            "of_layers": layers,
            "draft_tokens": shape[1],
            "kept": sum(kept for _, _, kept in ours) / max(sum(drafted for _, drafted, _ in ours), 1),
            "same_tokens": sum(same) / len(same),
            "plain_seconds": median(seconds("plain")),
            "seconds": median(seconds("ours", *shape)),
            "free_seconds": median(seconds("free", *shape)),
            "speedup": ratio(seconds("plain"), seconds("ours", *shape)),
            "speedup_if_all_kept": ratio(seconds("plain"), seconds("free", *shape)),
        }

    return {
        "name": subject.name,
        "new_tokens": args.tokens,
        "images": args.count,
        "repeats": args.repeats,
        "environment": environment(model, 1),
        "rows": [row(*shape) for shape in shapes],
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    machine = record["environment"]
    rows = [
        {
            "draft layers": f"{row['draft_layers']} of {row['of_layers']}",
            "draft tokens": row["draft_tokens"],
            "kept": f"{row['kept']:.0%}",
            "same tokens": f"{row['same_tokens']:.0%}",
            "speed-up over greedy": ratio_cell(row["speedup"], "x"),
            "if all were kept": f"{row['speedup_if_all_kept']['value']:.2f}x",
        }
        for row in record["rows"]
    ]
    return (
        f"{record['name']}, {record['new_tokens']} new tokens, greedy, batch 1 ({machine['hardware']}, "
        f"{machine['threads']} threads).\n\n" + "\n".join(markdown_table(rows)) + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5)
    add_caption_arguments(parser)
    parser.add_argument("--draft-layers", type=int, nargs="+", help="default: every number below all layers")
    parser.add_argument("--draft-tokens", type=at_least(1), nargs="+", default=[2, 4], help="drafted before a check")
    args = parser.parse_args(argv)
    record = measure(args)
    write_results(args, record, markdown(record))


if __name__ == "__main__":
    main()
