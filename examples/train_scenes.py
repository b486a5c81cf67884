# /// script
# dependencies = ["mue-hf[train]"]
# ///
"""Train a small MuE from scratch on generated scenes: captions, and yes / no / maybe statements. No data is needed.

Scenes are drawn while they are needed, in the order of their numbers, so that no picture comes twice. Training goes in
stages, each a run of its own that starts from the one before:

* classification: the trunk learns what is in each of its 8 x 8 cells, and where. The rest stays random.
* captioning: every picture is encoded once, with the captioning prompt, and its captions and all of its statements are
  decoded from that. Of true statements (--caption_share of them) every word is learnt, not the answer alone, and after
  the name of an object its place, as a location bin in place of the next word.
* captioning again, with statements about one relation, then two, three and all four (--relations). Of all four at once
  nothing is learnt: where "left of" is true "right of" is false, so that no object's place alone says anything. With
  one relation it does, and the others then need little more than the right sign and axis.
* entailment: statements stand in the encoder's prompt too, as OFA has it, and their answers are learnt.

    python examples/train_scenes.py --stage classification --output_dir RUNS/trunk --max_steps 450 $OPTIONS
    python examples/train_scenes.py --stage captioning --trunk_from RUNS/trunk --layers 3 --output_dir RUNS/captions \\
        --max_steps 1000 --kinds existence counting relation --relations "left of" $OPTIONS
    python examples/train_scenes.py --stage captioning --start_from RUNS/captions --layers 3 --output_dir RUNS/left \\
        --max_steps 600 --kinds relation --relations "left of" --caption_share 0 $OPTIONS
    ...
    python examples/train_scenes.py --stage entailment --start_from RUNS/all --layers 6 --output_dir RUNS/entailment \\
        --max_steps 800 $OPTIONS

`make reproduce` runs these with all of their options; given again, it goes on where it was interrupted.
`mue-hf evaluate entailment --model RUNS/entailment --data scenes:0:1250` measures the result.
"""

import json
import random
import re
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from small_models import random_model, save_in_half, train_tokenizer
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, ResNetConfig, Trainer, TrainerCallback, set_seed

from mue_hf import MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor
from mue_hf.data import MuEDataCollator
from mue_hf.data.scenes import (
    COLORS,
    FORMS,
    GRID,
    RADIUS,
    RELATIONS,
    SHAPES,
    Scene,
    SceneDataset,
    draw_scene,
    make_scene,
)
from mue_hf.evaluation.processes import finish_processes
from mue_hf.model.engine_mue import cpu_has_bf16
from mue_hf.model.processing_mue import CAPTION_PROMPT, ENTAILMENT_PROMPT
from mue_hf.training.arguments import MuETrainingArguments
from mue_hf.training.trainer import MuETrainer

LAYER = re.compile(r"(.*coder\.(?:layers|\w+_table_list)\.)(\d+)(\..*)")
NAMES = (tuple(COLORS), SHAPES, tuple(RADIUS))
# Location bins of a column or a row of the picture; those of the rows follow, and one for nowhere.
BINS = 16
SHORT = ("existence", "counting")
# Names of version 0.1, and those that they have now.
RENAMED = {"--lesson": "--stage", "--told_share": "--caption_share", "--told-share": "--caption-share"}
RENAMED_STAGES = {"seeing": "classification", "telling": "captioning", "judging": "entailment"}
ANSWERS = list(MuEProcessor.entailment_answers.values())


@dataclass
class ModelArguments:
    """Sizes of the model."""

    d_model: int = 128
    ffn_dim: int = 256
    heads: int = 4
    layers: int = field(
        default=6, metadata={"help": "Encoder layers, and decoder layers; with --start_from, what it grows to."}
    )
    joint: bool = field(default=False, metadata={"help": "Image and text as one sequence, as in OFA."})
    init_std: float = field(default=0.05, metadata={"help": "Of OFA's 0.02 attention learns late in a narrow model."})
    trunk_from: str | None = field(default=None, metadata={"help": "Checkpoint folder whose trunk a new model gets."})
    start_from: str | None = field(default=None, metadata={"help": "Checkpoint folder to go on from, sizes included."})


@dataclass
class DataArguments:
    """Which scenes are drawn, and what is asked about them."""

    scene_seed: int = field(default=0, metadata={"help": "Of the generator."})
    first_scene: int = field(default=0, metadata={"help": "Number of the first scene."})
    statements: int = field(default=8, metadata={"help": "Statements per picture, which share its encoding."})
    captions_per_image: int = field(default=2, metadata={"help": "Captions per picture."})
    kinds: list[str] = field(default_factory=lambda: list(FORMS), metadata={"help": "Kinds of statements."})
    relations: list[str] = field(
        default_factory=lambda: list(RELATIONS), metadata={"help": "What statements of relations are about."}
    )
    stage: Literal["classification", "captioning", "entailment"] = field(
        default="entailment", metadata={"help": "What is learnt; see above."}
    )
    caption_share: float = field(
        default=1.0, metadata={"help": "Share of the true statements that captioning learns word by word."}
    )
    dev_scenes: int = field(default=64, metadata={"help": "Scenes of the split dev for each kind, for evaluation."})


@dataclass
class SceneTrainingArguments(MuETrainingArguments):
    """MuETrainer's arguments, in which precision, and when to stop."""

    native_bf16: bool = field(default=False, metadata={"help": "bf16, but float32 on a CPU that would emulate it."})
    max_minutes: float | None = field(default=None, metadata={"help": "Save and stop after so many minutes."})

    def __post_init__(self) -> None:
        self.bf16 = self.bf16 or (self.native_bf16 and (not self.use_cpu or cpu_has_bf16()))
        super().__post_init__()


class Scenes(Dataset):
    """Training scenes in batches of equally long texts: short statements, then long ones and the captions, in turn."""

    def __init__(self, data: DataArguments, count: int, batch: int):
        self.first, self.count, self.batch, self.data = data.first_scene, count, batch, data
        kinds = [kind for kind in data.kinds if kind in SHORT], [kind for kind in data.kinds if kind not in SHORT]
        # Statements are drawn evenly from all relations: enough of them, that some have the wanted ones.
        drawn = data.statements * (4 if len(data.relations) < len(RELATIONS) else 1)
        options = {"statements": drawn, "seed": data.scene_seed}
        self.parts = [
            SceneDataset(self.first + count, captions=some is kinds[1], kinds=some, **options)
            for some in kinds
            if some
        ]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.parts[index // self.batch % len(self.parts)][self.first + index] | {"train": True}
        # Drawn by the number of the scene: a resumed run draws the same.
        rng = random.Random(self.first + index)
        rng.shuffle(row.get("references", []))
        scene = make_scene(self.first + index, self.data.scene_seed)
        if "hypothesis" in row:
            self._keep_wanted(row)
        texts = row.get("hypothesis", ())
        row["captions"] = [rng.random() < self.data.caption_share for _ in texts]
        row["places"] = [places(scene, text, rng) for text in texts]
        return row

    def _keep_wanted(self, row: dict[str, Any]) -> None:
        """Leaves the first statements about wanted relations, over again where there are too few."""
        unwanted = set(RELATIONS) - set(self.data.relations)
        wanted = [
            place for place, text in enumerate(row["hypothesis"]) if not any(one in text for one in unwanted)
        ] or [0]
        chosen = [wanted[place % len(wanted)] for place in range(self.data.statements)]
        for name in ("hypothesis", "label", "kind"):
            row[name] = [row[name][place] for place in chosen]


def places(scene: Scene, text: str, rng: random.Random) -> dict[int, str]:
    """Where the objects named in `text` are, by the place of each name's last word: the location bin of one such
    object's column or row, whichever comes up, or that for nowhere."""
    words, bins = text.split(), {}
    for place, name in enumerate(pairwise(words), start=1):
        if name[0] in COLORS and name[1] in SHAPES:
            found = [one for one in scene.visible if (one.color, one.shape) == name]
            one = rng.choice(found) if found else None
            lines = [2 * BINS] if one is None else [one.x * BINS // GRID, BINS + one.y * BINS // GRID]
            bins[place] = f"<bin_{rng.choice(lines)}>"
    return bins


@dataclass
class SceneCollator(MuEDataCollator):
    """Batches of scenes; with `captioning`, see the top of this file."""

    captioning: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        tokenizer, training = self.processor.tokenizer, rows[0].get("train", False)
        if not training:
            # </s> is no news.
            batch["labels"].masked_fill_(batch["labels"] == tokenizer.eos_token_id, -100)
        if self.captioning:
            if training:
                self._add_word_labels(batch, rows)
            prompt = torch.tensor(tokenizer(CAPTION_PROMPT)["input_ids"])
            batch["input_ids"] = prompt.expand(len(rows), -1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch

    def _add_word_labels(self, batch: dict[str, Tensor], rows: Sequence[dict[str, Any]]) -> None:
        """Makes labels of the words of true statements that serve as captions, and of the places of what is named."""
        (yes,) = self.processor.encode_answers(ANSWERS[:1])[0]
        opening = self.processor.tokenizer(ENTAILMENT_PROMPT.partition(" {")[0])["input_ids"][:-1]
        labels, following = batch["labels"][:, :-1], batch["decoder_input_ids"][:, 1:]
        statements = (batch["decoder_input_ids"][:, : len(opening)] == torch.tensor(opening)).all(1)
        true = (labels == yes).any(1)
        true[statements] &= torch.tensor([one for row in rows for one in row["captions"]], dtype=torch.bool)
        words = true.unsqueeze(1) & (labels == -100) & (following != self.processor.tokenizer.pad_token_id)
        words[:, : len(opening) - 1] = False
        labels[words] = following[words]
        named = [bins for row in rows for bins in row["places"]]
        for statement, bins in zip(statements.nonzero().flatten().tolist(), named, strict=True):
            for place, name in bins.items():
                labels[statement, len(opening) + place] = self.processor.tokenizer.convert_tokens_to_ids(name)


class Cells(Dataset):
    """Pictures, and what is in each of their 8 x 8 cells: an object is in the cell of its centre."""

    def __init__(self, first: int, count: int, seed: int, split: str, processor: MuEProcessor):
        self.first, self.count, self.seed, self.split, self.processor = first, count, seed, split, processor

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = make_scene(self.first + index, self.seed, self.split)
        # Of each cell: colour, shape and size, where 0 is nothing and 1 the panel; then its column and its row.
        kinds, places = torch.zeros(3, 8, 8, dtype=torch.long), torch.zeros(2, 8, 8)
        if scene.panel is not None:
            column, row = scene.panel
            kinds[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
        for one in scene.visible:
            names = [
                names.index(name) + 2 for names, name in zip(NAMES, (one.color, one.shape, one.size), strict=True)
            ]
            kinds[:, one.y // 8, one.x // 8] = torch.tensor(names)
            places[:, one.y // 8, one.x // 8] = torch.tensor([one.x, one.y]) / 32 - 1
        pixels = self.processor.image_processor(draw_scene(scene), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "kinds": kinds, "places": places}


class CellReader(nn.Module):
    """The trunk of a MuE, and linear maps from its features to what is in a cell, and where."""

    def __init__(self, model: MuEForConditionalGeneration):
        super().__init__()
        self.trunk = model.model.encoder.embed_images
        width = model.model.encoder.image_proj.in_features
        self.kinds = nn.ModuleList([nn.Conv2d(width, len(names) + 2, 1) for names in NAMES])
        self.lines, self.places = nn.Conv2d(width, 16, 1), nn.Conv2d(width, 2, 1)

    def forward(self, pixel_values: Tensor, kinds: Tensor, places: Tensor) -> dict[str, Tensor]:
        features = self.trunk(pixel_values).feature_maps[-1]
        loss = 0.0
        for index, head in enumerate(self.kinds):
            logits = head(features).float()
            # Most cells hold nothing.
            weight = torch.ones(logits.shape[1]).index_fill(0, torch.tensor([0, 1]), 0.1)
            loss = loss + nn.functional.cross_entropy(logits, kinds[:, index], weight.to(logits))
        lines = self.lines(features).float()
        row = torch.arange(8, device=lines.device).view(1, 8, 1).expand(len(lines), 8, 8)
        for logits, line in ((lines[:, :8], row), (lines[:, 8:], row.transpose(1, 2))):
            loss = loss + 0.5 * nn.functional.cross_entropy(logits, line)
        objects = kinds[:, :1] > 1
        misplaced = (self.places(features).float() - places).abs() * objects
        right = (self.kinds[1](features).argmax(1) == kinds[:, 1])[objects[:, 0]]
        return {"loss": loss + 5 * misplaced.sum() / objects.sum(), "right": right.float().mean()}


class TimeLimit(TrainerCallback):
    """Saves and stops after some minutes."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.end:
            control.should_save = control.should_training_stop = True


def build_processor(folder: Path) -> MuEProcessor:
    """Pictures of 64 pixels as they are, and a vocabulary in which each word of the scenes is one token."""
    rows = [SceneDataset(300)[index] for index in range(300)]
    texts = [text for row in rows for text in (*row["references"], *row["hypothesis"])] + ANSWERS
    corpus = [" " + text for text in texts] + [CAPTION_PROMPT, ENTAILMENT_PROMPT.format(hypothesis="there")]
    # What comes twice is merged to the end.
    tokenizer = train_tokenizer(corpus * 2, 1000, folder, num_bins=2 * BINS + 1)
    return MuEProcessor(MuEImageProcessor(size={"height": 64, "width": 64}, do_resize=False), tokenizer)


def build_model(sizes: ModelArguments, vocab_size: int) -> MuEForConditionalGeneration:
    """A random MuE; its trunk, a ResNet of two stages, makes 8 x 8 image tokens of 64 x 64 pixels."""
    return random_model(
        sizes,
        {"num_beams": 1, "max_new_tokens": 24},
        vocab_size=vocab_size,
        # No picture comes twice, so there is nothing to overfit.
        dropout=0.0,
        image_bucket_size=8,
        modality_decomposition=not sizes.joint,
        add_position_embedding=True,
        backbone_config=ResNetConfig(
            embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic", out_features=["stage2"]
        ),
    )


def grow(small: MuEForConditionalGeneration, layers: int) -> MuEForConditionalGeneration:
    """The same function with more layers: after each layer come copies of it whose branches are silent at first."""
    config = deepcopy(small.config)
    config.encoder_layers = config.decoder_layers = layers
    model = MuEForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.generation_config = small.generation_config
    state, old = model.state_dict(), small.state_dict()
    sources = [layer * small.config.decoder_layers // layers for layer in range(layers)]
    for name, tensor in state.items():
        parts = LAYER.match(name)
        source = name if parts is None else f"{parts[1]}{sources[int(parts[2])]}{parts[3]}"
        tensor.copy_(old[source])
        if parts is not None and int(parts[2]) and sources[int(parts[2])] == sources[int(parts[2]) - 1]:
            if "mid_layer_norm" in name or ".fc2." in name:
                tensor.zero_()
    return model


def make_trainer(
    model: MuEForConditionalGeneration, processor: MuEProcessor, data: DataArguments, args: Any, count: int
) -> Trainer:
    """The trainer of a stage on `count` scenes."""
    if data.stage == "classification":
        cells = Cells(data.first_scene, count, data.scene_seed, "train", processor)
        dev = Cells(0, data.dev_scenes, data.scene_seed, "dev", processor)
        return Trainer(model=CellReader(model), args=args, train_dataset=cells, eval_dataset=dev)
    dev = {
        kind: SceneDataset(data.dev_scenes, split="dev", captions=False, statements=4, kinds=[kind])
        for kind in data.kinds
    }
    return MuETrainer(
        model=model,
        args=args,
        train_dataset=Scenes(data, count, args.train_batch_size),
        eval_dataset=dev | {"captions": SceneDataset(data.dev_scenes, split="dev", statements=0)},
        data_collator=SceneCollator(
            processor,
            captions_per_image=data.captions_per_image,
            random_captions=False,
            captioning=data.stage == "captioning",
        ),
    )


def current_names(arguments: Sequence[str]) -> list[str]:
    """Arguments in which what version 0.1 called differently has its present name; those are warned of."""
    words: list[str] = []
    for argument in arguments:
        option = argument.partition("=")[0]
        for word in argument.split("=", 1) if option in (*RENAMED, "--stage") else [argument]:
            new = (RENAMED_STAGES if words[-1:] == ["--stage"] else RENAMED).get(word, word)
            if new != word:
                print(f"{word} is now {new}", file=sys.stderr)
            words.append(new)
    return words


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains and saves; returns, and writes beside the checkpoint, steps, seconds, and accuracy by kind on dev."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SceneTrainingArguments), description=__doc__)
    sizes, data, args = parser.parse_args_into_dataclasses(current_names(sys.argv[1:] if argv is None else argv))
    if args.max_steps < 1:
        parser.error("--max_steps must be given: scenes have no end.")
    if not data.relations or not set(data.relations) <= set(RELATIONS):
        parser.error(f"--relations must be some of {list(RELATIONS)}, got {data.relations}: check the spelling.")
    args.train_sampling_strategy, args.label_names, args.prediction_loss_only = "sequential", ["labels"], True
    set_seed(args.seed)
    checkpoint = args.checkpoint_to_resume()
    if sizes.start_from is None:
        processor = build_processor(Path(args.output_dir) / "tokenizer")
        model = build_model(sizes, len(processor.tokenizer))
        if sizes.trunk_from is not None:
            trunk = MuEForConditionalGeneration.from_pretrained(sizes.trunk_from).model.encoder.embed_images
            model.model.encoder.embed_images.load_state_dict(trunk.state_dict())
    else:
        processor = MuEProcessor.from_pretrained(sizes.start_from)
        model = MuEForConditionalGeneration.from_pretrained(
            sizes.start_from, attn_implementation="eager", modality_decomposition=not sizes.joint
        )
        if sizes.layers != model.config.decoder_layers:
            model = grow(model, sizes.layers)
    count = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer = make_trainer(model, processor, data, args, count)
    if args.max_minutes is not None:
        trainer.add_callback(TimeLimit(args.max_minutes))
    seconds = trainer.train(resume_from_checkpoint=checkpoint).metrics["train_runtime"]
    metrics = trainer.evaluate()
    last = f"accuracy_layer_{model.config.decoder_layers}"
    accuracy = {name.removeprefix("eval_").removesuffix(f"_{last}"): x for name, x in metrics.items() if last in name}
    report = {"steps": trainer.state.global_step, "seconds": seconds, "bf16": args.bf16, "accuracy": accuracy}
    save_in_half(model, processor, args.output_dir)
    Path(args.output_dir, "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    finish_processes()
    return report


if __name__ == "__main__":
    main()
