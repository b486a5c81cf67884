"""Predictions against single calls of `generate` and `score_answers`, whatever the batches."""

import pytest
import torch
from conftest import byte_parts

from mue_hf.data.scenes import SceneDataset
from mue_hf.inference.predict import predict

EXITS = {"image_exit_threshold": 0.9, "text_exit_threshold": 0.6, "decoder_exit_threshold": 0.5}


@pytest.fixture(scope="module")
def parts():
    """A tiny random model in float64 whose tokens are bytes, and its processor."""
    return byte_parts(generation={"max_new_tokens": 5})


@pytest.fixture(scope="module")
def statements():
    """Seven statements on three scenes: three, one and three."""
    rows = []
    for scene, count in zip(SceneDataset(3, seed=4, statements=3), (3, 1, 3), strict=True):
        for hypothesis in scene["hypothesis"][:count]:
            rows.append({"image": scene["image"], "image_id": scene["image_id"], "hypothesis": hypothesis})
    return rows


def untimed(predictions):
    return [{name: value for name, value in vars(one).items() if name != "seconds"} for one in predictions]


@pytest.mark.parametrize("beams", [1, 2])
def test_captions_are_those_of_generate(beams, parts):
    model, processor = parts
    rows = [SceneDataset(4)[index] for index in range(4)]
    options = EXITS | {"num_beams": beams, "max_new_tokens": 4}
    predictions = predict(model, processor, rows, "captioning", options, batch_size=3, progress=False)
    assert [one.image_id for one in predictions] == [row["image_id"] for row in rows]
    for row, one in zip(rows, predictions, strict=True):
        inputs = processor(images=row["image"])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        output = model.generate(**inputs, **options, return_dict_in_generate=True)
        depths = [depth for depth in output.decoder_exit_layers[0].tolist() if depth]
        assert one.decoder_exit_layers == tuple(depths)
        assert one.token_ids == tuple(output.sequences[0, 1 : 1 + len(depths)].tolist())
        assert one.output == processor.post_process_captions(output.sequences)[0]
        assert (one.image_exit_layers, one.text_exit_layers) == (
            output.image_exit_layers[0],
            output.text_exit_layers[0],
        )
        assert one.text_tokens == inputs["attention_mask"].sum()
        assert one.seconds > 0


@pytest.mark.parametrize("prompt_type", ["prev_output", "none"])
def test_answers_are_those_of_score_answers(prompt_type, parts, statements):
    model, processor = parts
    options = {"batch_size": 4, "prompt_type": prompt_type, "progress": False}
    predictions = predict(model, processor, statements, "entailment", EXITS, **options)
    answers = ["yes", "no", "maybe"]
    for row, one in zip(statements, predictions, strict=True):
        inputs = processor(images=row["image"], task="entailment", hypothesis=row["hypothesis"])
        inputs["pixel_values"] = inputs["pixel_values"].double()
        if prompt_type == "none":
            del inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
        output = model.score_answers(processor.encode_answers(answers), **inputs, **EXITS, return_dict=True)
        assert one.output == answers[int(output.scores.argmax())]
        assert one.decoder_exit_layers == tuple(output.decoder_exit_layers[0].tolist())
        assert (one.image_exit_layers, one.text_exit_layers) == (
            output.image_exit_layers[0],
            output.text_exit_layers[0],
        )


@pytest.mark.parametrize("task", ["captioning", "entailment"])
def test_batches_do_not_matter(task, parts, statements):
    results = [
        untimed(predict(*parts, statements, task, EXITS, batch_size=size, progress=False)) for size in (1, 2, 3, 4, 7)
    ]
    assert all(result == results[0] for result in results)


def test_features_stand_for_images(parts, statements):
    model, processor = parts
    rows = []
    for row in statements:
        pixels = processor(images=row["image"])["pixel_values"].double()
        features = model.model.trunk_features(pixels)[0]
        rows.append({name: row[name] for name in ("image_id", "hypothesis")} | {"image_features": features})
    from_images, from_features = (
        untimed(predict(model, processor, some, "entailment", EXITS, batch_size=4, progress=False))
        for some in (statements, rows)
    )
    assert from_images == from_features


def test_rows_without_images(parts, statements):
    rows = [row | {"image": None if index < 3 else row["image"]} for index, row in enumerate(statements)]
    predictions = predict(*parts, rows, "entailment", batch_size=4, progress=False)
    assert [one.image_exit_layers for one in predictions] == [0, 0, 0, 3, 3, 3, 3]
    assert untimed(predict(*parts, rows[:3], "entailment", progress=False)) == untimed(predictions[:3])


def test_premises_are_read(parts, statements):
    rows = [row | {"premise": "a red circle"} for row in statements]
    with_premise, without = (predict(*parts, some, "entailment", progress=False) for some in (rows, statements))
    assert all(one.text_tokens > other.text_tokens for one, other in zip(with_premise, without, strict=True))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_depth_for_each_row(size, parts, statements):
    options = {
        "exit_criterion": "fixed",
        "image_exit_layer": torch.tensor([1, 1, 1, 2, 3, 3, 3]),
        "text_exit_layer": torch.tensor([1, 2, 3, 1, 2, 3, 1]),
    }
    predictions = predict(*parts, statements, "entailment", options, batch_size=size, progress=False)
    assert [one.image_exit_layers for one in predictions] == options["image_exit_layer"].tolist()
    assert [one.text_exit_layers for one in predictions] == options["text_exit_layer"].tolist()


def test_one_caption_for_each_row_whatever_is_saved(parts, statements, monkeypatch):
    expected = untimed(predict(*parts, statements, "captioning", {"num_beams": 2}, progress=False))
    for name in ("num_beams", "num_return_sequences"):
        monkeypatch.setattr(parts[0].generation_config, name, 2)
    assert untimed(predict(*parts, statements, "captioning", progress=False)) == expected


def test_training_mode_is_restored(parts, statements):
    model, processor = parts
    model.train()
    try:
        predict(model, processor, statements[:1], "entailment", progress=False)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "vqa"}, "`task` must be one of"),
        ({"rows": []}, "`rows` must hold at least one row"),
        ({"rows": [{"image_id": "a", "image": None}]}, "`rows` must have image_id, image or image_features, hypoth"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"prompt_type": "src"}, "`prompt_type` must be"),
        ({"options": {"num_beams": 3}}, "exit options, got"),
        ({"options": {"exit_criterian": "never"}}, "did you mean"),
        ({"options": {"exit_preset": "nosuch"}}, "must name a preset"),
        ({"options": {"image_exit_layer": torch.ones(3)}}, "one depth per row, 7, got 3"),
        ({"task": "captioning", "options": {"num_return_sequences": 2}}, "`num_return_sequences` must be 1"),
    ],
    ids=["task", "no rows", "columns", "batch", "prompt", "beams", "misspelt", "preset", "depths", "sequences"],
)
def test_bad_input(changes, message, parts, statements):
    call = {"rows": statements, "task": "entailment", "options": None, "progress": False} | changes
    with pytest.raises(ValueError, match=message):
        predict(*parts, **call)
