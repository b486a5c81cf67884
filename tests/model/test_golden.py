"""The converted model in OFA's joint mode against OFA's own numbers, in float64 and float32."""

import json
from pathlib import Path

import pytest
import torch
from golden.weights import GOLDEN, make_weights, write_fairseq, write_fork
from safetensors.torch import load_file
from torch import Tensor

from mue_hf import MuEForConditionalGeneration
from mue_hf.convert.ofa import convert_ofa

CASES = ["caption", "long_text", "nonsquare", "patch_mask", "text_only", "ve_padded"]
INPUT_NAMES = {"patch_images": "pixel_values", "patch_masks": "patch_mask"}
OUTPUT_NAMES = {
    "enc_hidden": "encoder_hidden_states",
    "enc_last": "encoder_last_hidden_state",
    "dec_hidden": "decoder_hidden_states",
    "logits": "logits",
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}

GENERATION = json.loads((GOLDEN / "generation.json").read_text())
# OFA's limit of 16 tokens is followed by a forced </s>.
GREEDY = {"num_beams": 1, "do_sample": False, "max_new_tokens": 17, "min_new_tokens": 1, "no_repeat_ngram_size": 0}


def part(file: str, case: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / file)
    return {name.split(".")[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}


def inputs(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    named = {INPUT_NAMES.get(name, name): tensor for name, tensor in part("inputs.safetensors", case).items()}
    named = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in named.items()}
    return named | {"attention_mask": named["input_ids"].ne(1).long()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    convert_ofa(write_fork(root / "fork", make_weights()), root / "mue", image_size=64)
    return root / "mue"


@pytest.fixture(
    scope="module",
    params=[(torch.float64, None), (torch.float64, "eager"), (torch.float32, None)],
    ids=["float64", "float64-eager", "float32"],
)
def model(request: pytest.FixtureRequest, folder: Path) -> MuEForConditionalGeneration:
    dtype, attention = request.param
    return MuEForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def double(folder: Path) -> MuEForConditionalGeneration:
    return MuEForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


def test_weights_are_those_of_the_fixture(shared_dir: Path) -> None:
    made, stored = make_weights(), load_file(shared_dir / "fixtures" / "ofa_micro" / "weights.safetensors")
    assert made.keys() == stored.keys()
    assert [name for name in stored if not torch.equal(made[name], stored[name])] == []


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_every_state_and_logit(model: MuEForConditionalGeneration, case: str) -> None:
    expected = part("outputs_float64.safetensors", case)
    given = inputs(case, model.dtype)
    decoder_mask = given["decoder_input_ids"].ne(1).long()
    out = model(**given, decoder_attention_mask=decoder_mask, output_hidden_states=True)
    got = {name: getattr(out, field) for name, field in OUTPUT_NAMES.items()}
    got |= {name: torch.stack(got[name]) for name in ("enc_hidden", "dec_hidden")}
    got["enc_pos"] = model.get_encoder()(
        **{name: tensor for name, tensor in given.items() if not name.startswith("decoder")}
    ).position_embeddings
    got["dec_last"] = model.model.decoder.layer_norm(got["dec_hidden"][-1])
    if "resnet" in expected:
        got["resnet"] = model.model.encoder.embed_images(given["pixel_values"]).feature_maps[-1]
    assert got.keys() == expected.keys() - {"enc_pad"}
    for name, tensor in got.items():
        tensor = tensor.double().expand_as(expected[name])
        error = (tensor - expected[name]).abs().max().item()
        assert error <= TOLERANCE[model.dtype], f"{name} is off by {error:.1e}"


@torch.no_grad()
@pytest.mark.parametrize("case", ["caption", "patch_mask", "text_only", "ve_padded"])
def test_greedy_tokens(model: MuEForConditionalGeneration, case: str) -> None:
    given = inputs(case, model.dtype)
    given.pop("decoder_input_ids")
    tokens = model.generate(**given, **GREEDY)
    expected = [row[0]["tokens"] for row in GENERATION[f"{case}.greedy"]]
    assert tokens[:, 1:].tolist() == [row + [1] * (tokens.shape[1] - 1 - len(row)) for row in expected]


@torch.no_grad()
@pytest.mark.parametrize("case", ["caption", "patch_mask", "text_only", "ve_padded"])
@pytest.mark.parametrize("mode", ["greedy", "beam5_ng3"])
def test_scores_of_generated_sequences(double: MuEForConditionalGeneration, case: str, mode: str) -> None:
    """OFA's beams, teacher-forced: transformers' search would find others, since it scores the forced </s> as 0."""
    given = inputs(case, torch.float64)
    expected = GENERATION[f"{case}.{mode}"]
    rows = [row for row, beams in enumerate(expected) for _ in beams]
    targets = torch.tensor([beam["tokens"] for beams in expected for beam in beams])
    given = {name: tensor[rows] for name, tensor in given.items()}
    given["decoder_input_ids"] = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), targets[:, :-1]], dim=1)
    log_probs = double(**given).logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    wanted = torch.tensor([beam["score"] for beams in expected for beam in beams], dtype=torch.float64)
    torch.testing.assert_close(log_probs.mean(-1), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_answer_scores(model: MuEForConditionalGeneration) -> None:
    given = inputs("ve_padded", model.dtype)
    # The file pads the prompts on the right; an answer must follow its prompt at once.
    prompts = [[token for token in row if token != 1] for row in given["decoder_input_ids"].tolist()]
    width = max(map(len, prompts))
    given["decoder_input_ids"] = torch.tensor([[1] * (width - len(row)) + row for row in prompts])
    given["decoder_attention_mask"] = given["decoder_input_ids"].ne(1).long()
    scores = model.score_answers(GENERATION["ve_candidates"], **given)
    expected = torch.tensor(GENERATION["ve_scores"], dtype=scores.dtype)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 if model.dtype == torch.float64 else 2e-5)


@torch.no_grad()
def test_trie_beam(double: MuEForConditionalGeneration) -> None:
    """Three answers and three beams: the search is exhaustive, so OFA's order and scores must come out."""
    given = inputs("ve_padded", torch.float64)
    given.pop("decoder_input_ids")
    answers = [answer + [2] for answer in GENERATION["ve_candidates"]]

    def allowed(_: int, tokens: Tensor) -> list[int]:
        prefix = tokens.tolist()[1:]
        following = {answer[len(prefix)] for answer in answers if answer[: len(prefix)] == prefix and prefix != answer}
        return sorted(following) or [1]

    out = double.generate(
        **given,
        prefix_allowed_tokens_fn=allowed,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        no_repeat_ngram_size=0,
        forced_eos_token_id=None,
        renormalize_logits=True,
        return_dict_in_generate=True,
        output_scores=True,
    )
    expected = [beam for beams in GENERATION["trie_beam3"] for beam in beams]
    assert [[token for token in row[1:] if token != 1] for row in out.sequences.tolist()] == [
        beam["tokens"] for beam in expected
    ]
    wanted = torch.tensor([beam["score"] for beam in expected], dtype=out.sequences_scores.dtype)
    torch.testing.assert_close(out.sequences_scores, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_both_layouts_give_equal_logits(folder: Path, double: MuEForConditionalGeneration, tmp_path: Path) -> None:
    file = write_fairseq(tmp_path / "checkpoint_best.pt", make_weights())
    convert_ofa(file, tmp_path / "mue", vocab=folder.parent / "fork", image_size=64)
    other = MuEForConditionalGeneration.from_pretrained(tmp_path / "mue", dtype=torch.float64).eval()
    given = inputs("ve_padded", torch.float64)
    assert torch.equal(other(**given).logits, double(**given).logits)
