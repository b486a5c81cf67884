"""A screened output head, measured: cheap scores of the whole vocabulary, exact scores of the few rows that can win.

A cheap matrix gives a score s_i for each row w_i of the head and a bound e_i on its error, so that w_i x lies in
[s_i - e_i, s_i + e_i]. A row whose upper end lies below the k-th largest lower end is not among the k best; the others
are computed exactly. Two cheap matrices:

* int8: w_i = a_i q_i + r_i and x = b p + t with integers q, p. s_i = a_i b (q_i p), which is exact in int32, and
  |w_i x - s_i| <= |r_i| |x| + |w_i - r_i| |t| (Cauchy-Schwarz).
* low rank: with the right singular vectors V of the head's largest singular values, s_i = (w_i V) (V' x) and
  |w_i x - s_i| <= |w_i - w_i V V'| |x - V V' x|.

The best row is exact, and so is greedy decoding. Beam search is not: it compares sums of log-probabilities, whose
normaliser needs every row, so the record has the width of the interval that the bounds leave for it beside. States are
those that the model's own captions reach. The record has the time of the head with either matrix and without, and of a
whole greedy caption; `most_speedup` is what a head that takes no time would give.

    python benchmarks/screened_head.py --size base --threads 2 --output screened-base.json
    python benchmarks/screened_head.py --model checkpoints/mue-photos-small --images examples/photos/*.jpg \\
        --threads 2 --output screened-small.json
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import fmean, median
from typing import Any

import torch
from measuring import add_caption_arguments, greedy, make_parser, seconds_in_turns, write_results
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from mue_hf.benchmarking.cells import ratio
from mue_hf.benchmarking.probes import component_seconds, hooked
from mue_hf.benchmarking.tables import markdown_table, ratio_cell
from mue_hf.cli.bench import load_timed_model
from mue_hf.cli.options import at_least
from mue_hf.evaluation.measure import environment

# Rounding of float32 sums of this many products, relative to |w| |x|.
SLACK = 1e-5


class Int8Screen:
    """Scores by integers, one scale for each row of the head and for each state."""

    def __init__(self, weight: Tensor):
        self.scale = weight.abs().amax(dim=1) / 127
        codes = (weight / self.scale.unsqueeze(1)).round()
        rest = weight - codes * self.scale.unsqueeze(1)
        self.codes = codes.to(torch.int8).t()
        self.rest_norm, self.kept_norm = rest.norm(dim=1), (weight - rest).norm(dim=1)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [rows, d] -> scores and bounds of their errors [rows, vocabulary]."""
        scale = states.abs().amax(dim=1, keepdim=True) / 127
        codes = (states / scale).round()
        rest = (states - codes * scale).norm(dim=1, keepdim=True)
        scores = torch._int_mm(codes.to(torch.int8), self.codes) * self.scale * scale
        return scores, self.rest_norm * states.norm(dim=1, keepdim=True) + self.kept_norm * rest


class LowRankScreen:
    """Scores in the span of the largest singular values."""

    def __init__(self, weight: Tensor, rank: int):
        # The Gram matrix is small where the head is tall.
        self.basis = torch.linalg.eigh(weight.t().double() @ weight.double()).eigenvectors[:, -rank:].float()
        self.rows = weight @ self.basis
        self.rest_norm = (weight - self.rows @ self.basis.t()).norm(dim=1)

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [rows, d] -> scores and bounds of their errors [rows, vocabulary]."""
        inside = states @ self.basis
        rest = (states - inside @ self.basis.t()).norm(dim=1, keepdim=True)
        return inside @ self.rows.t(), self.rest_norm * rest


class ScreenedHead(nn.Module):
    """
    Logits of the rows that can be among the k best, -inf elsewhere.

    Args:
        head (`nn.Linear`): the head, without a bias.
        screen (`Callable`): states -> scores and bounds of the head's first rows, those of text.
        best (`int`): k; 1 and the tokens that may be suppressed.
    """

    # The model says which token ids it may emit.
    takes_ids = True

    def __init__(self, head: nn.Linear, screen: Callable[[Tensor], tuple[Tensor, Tensor]], best: int = 2):
        super().__init__()
        self.weight, self.screen, self.best = head.weight, screen, best
        self.slack = SLACK * head.weight.norm(dim=1).max()

    def candidates(self, states: Tensor) -> Tensor:
        """States [rows, d] -> which rows of the head [rows, rows of the screen] can be among the k best."""
        scores, bounds = self.screen(states)
        bounds = bounds + self.slack * states.norm(dim=1, keepdim=True)
        least = (scores - bounds).topk(self.best, dim=1).values[:, -1:]
        return scores + bounds >= least

    def forward(self, states: Tensor, ids: slice | None = None) -> Tensor:
        """States [..., d] -> logits [..., vocabulary]. `ids`, which the model passes, are those of the screen."""
        flat = states.flatten(0, -2)
        some = self.candidates(flat).any(dim=0).nonzero().flatten()
        logits = flat.new_full((len(flat), len(self.weight)), -torch.inf)
        logits[:, some] = flat @ self.weight[some].t()
        return logits.unflatten(0, states.shape[:-1])


def collect_states(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """The states [tokens, d] that the head is given while the model captions."""
    seen: list[Tensor] = []
    layer_norm = model.get_decoder().layer_norm
    with hooked(layer_norm.register_forward_hook(lambda _, __, output: seen.append(output.flatten(0, -2)))):
        greedy(model, inputs, tokens)
    return torch.cat(seen)


def caption(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int, head: nn.Module | None = None) -> Tensor:
    """Greedy tokens, with another head if one is passed."""
    own = model.lm_head
    try:
        model.lm_head = head or own
        return greedy(model, inputs, tokens)
    finally:
        model.lm_head = own


def head_row(
    heads: dict[str, ScreenedHead], full: Callable[[Tensor], Tensor], states: Tensor, repeats: int
) -> dict[str, Any]:
    """The heads on states [rows, d] at once: seconds, exactness, how many rows were left to compute, and how far the
    bounds leave the normaliser open."""
    best = full(states).topk(2, dim=1).indices
    ways = {"full": partial(full, states)} | {name: partial(head, states) for name, head in heads.items()}
    taken = seconds_in_turns(ways, repeats, states.device)
    row: dict[str, Any] = {"rows": len(states), "full_seconds": median(taken["full"])}
    for name, head in heads.items():
        scores, bounds = head.screen(states)
        open_width = (scores + bounds).logsumexp(dim=1) - (scores - bounds).logsumexp(dim=1)
        row[name] = {
            "seconds": median(taken[name]),
            "speedup": ratio(taken["full"], taken[name]),
            "same_best": (head(states).topk(2, dim=1).indices == best).double().mean().item(),
            "candidates": head.candidates(states).double().sum(dim=1).mean().item(),
            "normaliser_interval": open_width.mean().item(),
        }
    return row


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One record: the heads on batches of states, and whole captions."""
    subject = load_timed_model(args)
    model, inputs = subject.model, subject.inputs(args.count)
    head, text = model.lm_head, slice(0, model.config.num_text_tokens)
    weight = head.weight[text]
    screens = {"int8": Int8Screen(weight)}
    screens |= {f"rank {rank}": LowRankScreen(weight, rank) for rank in args.ranks if rank < head.in_features}
    heads = {name: ScreenedHead(head, screen).eval() for name, screen in screens.items()}
    states = collect_states(model, inputs, args.tokens)
    # Neighbouring steps of one image are alike, a batch is not.
    states = states[torch.randperm(len(states), generator=torch.Generator().manual_seed(0))]
    rows = []
    for count in tqdm(args.rows, desc="heads", file=sys.stderr):
        some = states.repeat(-(-count // len(states)), 1)[:count]
        rows.append(head_row(heads, lambda states: head(states, text), some, args.repeats))

    one = {key: value[:1] for key, value in inputs.items()}
    ways = {"full": partial(caption, model, one, args.tokens)}
    ways |= {name: partial(caption, model, one, args.tokens, head) for name, head in heads.items()}
    tokens = {name: way() for name, way in tqdm(ways.items(), desc="captions", file=sys.stderr)}
    taken = seconds_in_turns(ways, args.repeats, model.device)
    share = fmean(
        seconds["head"] / sum(seconds.values())
        for seconds in (component_seconds(model, ways["full"]) for _ in range(3))
    )
    return {
        "name": subject.name,
        "vocabulary": len(weight),
        "repeats": args.repeats,
        "environment": environment(model, 1),
        "heads": rows,
        "caption": {
            "new_tokens": args.tokens,
            "seconds": median(taken["full"]),
            "head_share": share,
            "most_speedup": 1 / (1 - share),
            **{
                name: {
                    "speedup": ratio(taken["full"], taken[name]),
                    "same_tokens": bool(torch.equal(tokens["full"], tokens[name])),
                }
                for name in heads
            },
        },
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table of heads and a line on whole captions."""
    machine, whole = record["environment"], record["caption"]
    names = [name for name in record["heads"][0] if name not in ("rows", "full_seconds")]
    rows = [
        {
            "states": row["rows"],
            "full head ms": f"{1000 * row['full_seconds']:.1f}",
            "screen": name,
            "speed-up": ratio_cell(row[name]["speedup"], "x"),
            "same two best": f"{row[name]['same_best']:.0%}",
            "rows that can win": f"{row[name]['candidates']:.0f}",
            "normaliser known to": f"{row[name]['normaliser_interval']:.3f}",
        }
        for row, name in product(record["heads"], names)
    ]
    ways = []
    for name in names:
        tokens = "the same" if whole[name]["same_tokens"] else "other"
        ways.append(f"{name} {whole[name]['speedup']['value']:.2f}x ({tokens} tokens)")
    lines = [
        f"{record['name']}, {record['vocabulary']} rows of the head ({machine['hardware']}, {machine['threads']} "
        "threads).",
        "",
        *markdown_table(rows),
        "",
        f"A greedy caption of {whole['new_tokens']} tokens at batch 1, end to end: the head takes "
        f"{whole['head_share']:.0%} of the time, so a free one would give {whole['most_speedup']:.2f}x. Screened: "
        f"{', '.join(ways)}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=10)
    add_caption_arguments(parser)
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[1, 5, 16, 80], help="states at once")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[64, 192])
    args = parser.parse_args(argv)
    if args.dtype != "float32" or args.device != "cpu":
        parser.error("the integer product that is timed is that of the CPU, beside float32")
    record = measure(args)
    write_results(args, record, markdown(record))


if __name__ == "__main__":
    main()
