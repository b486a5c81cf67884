"""Closed answer sets: which token may follow which, and the log-probabilities of candidates as OFA scores them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def answer_tree(answers: Sequence[Sequence[int]], eos_token_id: int) -> dict[tuple[int, ...], list[int]]:
    """Maps every prefix of an answer to the tokens that may follow it, in ascending order; a whole answer may end.

    Args:
        answers (list of lists of `int`): token ids without special tokens.

    Raises:
        ValueError: if there is no answer, an empty one, or one twice.
    """
    paths = [tuple(int(token) for token in answer) for answer in answers]
    if not paths or not all(paths):
        raise ValueError(f"`answers` must hold at least one answer and no empty one, got {list(answers)!r}.")
    if len(set(paths)) < len(paths):
        raise ValueError(f"`answers` must differ from each other, got {list(answers)!r}; drop the repeated one.")
    tree: dict[tuple[int, ...], set[int]] = {}
    for path in paths:
        for i, token in enumerate((*path, eos_token_id)):
            tree.setdefault(path[:i], set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in tree.items()}


class AnswerContexts(NamedTuple):
    """The prefixes where answers part, as decoder rows: `input_ids` and `attention_mask` [batch * contexts, length]
    (row r belongs to sample r // contexts), and `last` [batch * contexts], each row's last valid position."""

    input_ids: Tensor
    attention_mask: Tensor
    last: Tensor


def answer_contexts(
    prefixes: Sequence[tuple[int, ...]], prompt: Tensor, prompt_mask: Tensor, pad_token_id: int
) -> AnswerContexts:
    """Appends each prefix to each decoder prompt [batch, length] (padded on the left) and pads on the right."""
    batch, width = prompt.shape[0], max(len(prefix) for prefix in prefixes)
    ids = prompt.new_full((len(prefixes), width), pad_token_id)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, prefix in enumerate(prefixes):
        ids[i, : len(prefix)] = prompt.new_tensor(prefix)
        mask[i, : len(prefix)] = True
    lengths = mask.sum(1)
    input_ids = torch.cat([prompt.repeat_interleave(len(prefixes), 0), ids.repeat(batch, 1)], dim=1)
    attention_mask = torch.cat([prompt_mask.bool().repeat_interleave(len(prefixes), 0), mask.repeat(batch, 1)], dim=1)
    return AnswerContexts(input_ids, attention_mask, prompt.shape[1] - 1 + lengths.repeat(batch))


def answer_scores(
    answers: Sequence[Sequence[int]], tree: dict[tuple[int, ...], list[int]], log_probs: dict[tuple, Tensor], eos: int
) -> list[Tensor | float]:
    """Sums log-probabilities over each answer's tokens and its end; a step with one allowed token adds nothing.

    Args:
        log_probs (dict prefix -> `Tensor` [batch, allowed tokens]): at the prefixes where answers part.
    """
    scores: list[Tensor | float] = []
    for answer in answers:
        path = tuple(int(token) for token in answer)
        total: Tensor | float = 0.0
        for i, token in enumerate((*path, eos)):
            if path[:i] in log_probs:
                total = total + log_probs[path[:i]][:, tree[path[:i]].index(token)]
        scores.append(total)
    return scores


__all__ = ["AnswerContexts", "answer_contexts", "answer_scores", "answer_tree"]
