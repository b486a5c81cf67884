"""The laws under options drawn at random: hooks agree with what is reported, a row alone is a row in a batch."""

import random

import pytest
import torch
from conftest import tiny_inputs, tiny_model
from stack import count_calls

LAYERS = {"image": 3, "text": 3, "encoder": 3, "decoder": 4}
# between "nobody leaves" and "everybody leaves at once", for the tiny models
RANGES = {"similarity": (0.3, 0.95), "confidence": (0.02, 0.9), "margin": (0.0, 0.5), "entropy": (0.3, 1.0)}


def draw_options(draw: random.Random, decomposed: bool) -> dict:
    """Exit options that are valid together."""
    criterion = draw.choice(["similarity", "similarity", "confidence", "margin", "entropy", "patience", "fixed"])
    options = {"exit_criterion": criterion, "exit_kv": draw.choice(["project", "copy", "exact"])}
    if draw.random() < 0.2:
        options["exit_warmup"] = draw.uniform(0, 0.6)
    if criterion == "fixed":
        return options | {"decoder_exit_layer": draw.randint(1, 4)}
    for stream in ("image", "text") if decomposed else ("encoder",):
        options[f"{stream}_exit_threshold"] = [draw.uniform(0.1, 0.95) for _ in range(LAYERS[stream])]
    if draw.random() < 0.2:
        options["exit_min_layers"] = draw.randint(1, 3)
    if criterion == "patience":
        return options | {"exit_patience": draw.randint(1, 3)}
    options["decoder_exit_threshold"] = [draw.uniform(*RANGES[criterion]) for _ in range(LAYERS["decoder"])]
    if draw.random() < 0.4:
        options |= {"exit_decay_beta": draw.uniform(0.5, 1), "exit_decay_tau": draw.uniform(0, 4)}
    return options


def draw_decoding(draw: random.Random) -> dict:
    beams = draw.choice([1, 1, 2, 4])
    options = {"num_beams": beams, "max_new_tokens": draw.randint(1, 9), "return_dict_in_generate": True}
    if beams > 1:
        options["num_return_sequences"] = draw.randint(1, beams)
    if draw.random() < 0.4:
        options["eos_token_id"] = [2, *draw.sample(range(4, 99), 12)]
    return options


def draw_prompts(draw: random.Random, batch: int) -> list[list[int]]:
    if draw.random() < 0.6:
        return [[0]] * batch
    return [[0, *(draw.randint(4, 98) for _ in range(draw.randint(0, 4)))] for _ in range(batch)]


def left_padded(prompts: list[list[int]]) -> dict:
    width = max(map(len, prompts))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"decoder_input_ids": ids, "decoder_attention_mask": mask}


def alone(inputs: dict, row: int, prompt: list[int]) -> dict:
    """One sample without any padding, and without pixels if it has no image."""
    length = int(inputs["attention_mask"][row].sum())
    sample = {name: inputs[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
    if inputs["patch_mask"][row]:
        sample["pixel_values"] = inputs["pixel_values"][row : row + 1]
    return sample | {"decoder_input_ids": torch.tensor([prompt])}


@pytest.mark.parametrize("seed", range(24))
def test_laws(seed):
    draw = random.Random(seed)
    decomposed = draw.random() < 0.7
    model = tiny_model(std=draw.choice([0.15, 0.3, 0.5]), modality_decomposition=decomposed)
    batch = draw.randint(1, 6)
    inputs = tiny_inputs(batch, length=draw.choice([5, 7, 9]), seed=seed)
    inputs["patch_mask"] = torch.tensor([draw.random() < 0.8 for _ in range(batch)])
    prompts = draw_prompts(draw, batch)
    options, decoding = draw_options(draw, decomposed), draw_decoding(draw)
    if decoding["num_beams"] > 1:
        options["exit_rescore"] = draw.random() < 0.5
    outputs = []
    prompted = inputs | left_padded(prompts)
    calls = count_calls(model, lambda: outputs.append(model.generate(**prompted, **options, **decoding)))
    output, width = outputs[0], max(map(len, prompts))
    assert calls["decoder"] == output.executed_layers["decoder"]
    assert calls.total() - calls["decoder"] == output.executed_layers["image"] + output.executed_layers["text"]
    depths = output.decoder_exit_layers
    if decoding["num_beams"] == 1 and options["exit_kv"] != "exact":
        # the first step runs the whole prompt
        assert calls["decoder"] == depths.sum() + (width - 1) * depths[:, 0].sum()
    returned = decoding.get("num_return_sequences", 1)
    for row, prompt in enumerate(prompts):
        single = model.generate(**alone(inputs, row, prompt), **options, **decoding)
        for i in range(returned):
            tokens = single.sequences[i, len(prompt) :]
            together = row * returned + i
            assert torch.equal(tokens, output.sequences[together, width : width + len(tokens)])
            assert torch.equal(single.decoder_exit_layers[i], depths[together, : len(tokens)])
        assert single.image_exit_layers[0] == output.image_exit_layers[row]
        assert single.text_exit_layers[0] == output.text_exit_layers[row]
