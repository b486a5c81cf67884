"""`MuETrainer`: transformers' Seq2SeqTrainer with MuE's layer-wise loss, its options, and SCST for captions."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import write_whole
from ..model.criteria_mue import LAYER_OPTIONS
from ..model.engine_mue import cpu_has_bf16
from ..model.exit_options_mue import CONFIG_NAMES
from .arguments import MuETrainingArguments
from .average import WeightAverage
from .card import trainer_card
from .checks import check_arguments, check_launch
from .losses import IGNORED, LayerwiseLoss, layerwise_loss
from .muon import Muon

AVERAGE_NAME = "average.safetensors"

# Captions as token ids, and the references of each -> a score of each.
Reward = Callable[[Sequence[list[int]], Sequence[list[list[int]]]], Sequence[float]]


class MuETrainer(Seq2SeqTrainer):
    """Trains a [`MuEForConditionalGeneration`] on all decoder layers at once (MuE, section 3.3).

    Batches hold what the model's `forward` takes, and `labels` [rows, tokens]; several rows per image are allowed.
    `decoder_input_ids` are made from the labels unless given. The logs have the loss and accuracy of every decoder
    layer, averaged over the tokens since the last log; evaluation has them over its whole data, and `eval_loss` is
    the last layer's cross-entropy without smoothing. Gradient accumulation and several processes give the gradients
    of one big batch.

    With `predict_with_generate` predictions are those of [`predict`]: the decoder reads what stands before the labels
    in `decoder_input_ids`, under the exits that are saved with the model or passed to `evaluate`. In several processes
    an image must then have one text, since what fills the last batch up is counted in images.

    Args:
        model (`MuEForConditionalGeneration`): what to train. Frozen parts lose `requires_grad`.
        args (`MuETrainingArguments`, *optional*): how.
        reward (`Callable`, *optional*): for `scst_samples`: captions as lists of token ids, and the references of
            each -> a score of each, e.g. [`CiderDReward`]. The references are the rows of `labels` of an image.
        answers (list of lists of `int`, *optional*): a closed set of answers, from `processor.encode_answers([...])`:
            with `predict_with_generate` the predictions are the tokens of the best of them by `score_answers`.
        kwargs: what `Seq2SeqTrainer` takes.

    Raises:
        ValueError: for options that do not fit the model, each other, or the way the processes were started.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MuETrainingArguments | None = None,
        reward: Reward | None = None,
        answers: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ):
        args = MuETrainingArguments() if args is None else args
        check_arguments(model, args, reward, kwargs.get("compute_loss_func"))
        super().__init__(model, args, **kwargs)
        check_launch(self)
        # every layer's loss is smoothed here; the base class would smooth the last layer's alone
        self.label_smoother = None
        if args.scst_samples or args.own_captions:
            # the number of generated tokens is not known before the batches of a step are: a mean of means
            self.loss_is_scaled_for_ga = False
        self.reward, self.answers = reward, answers
        self._gen_kwargs: dict[str, Any] = {}
        # what a resumed run goes on with is loaded later: this is the model that training began with
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False) if args.own_captions else None
        self.frozen = freeze(model, args.freeze_trunk, args.freeze_batch_norm, args.trainable_trunk)
        self.average = None if args.ema_decay is None else WeightAverage(self.model, args.ema_decay)
        if self.average is not None:
            self.add_callback(self.average)
        self._sums: dict[str, Tensor] = {}
        self._rewards: list[Tensor] = []

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `Trainer`, or Muon; see `muon_learning_rate`."""
        if self.args.muon_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": self.args.muon_learning_rate},
            {"params": [], "use_fallback": True, "weight_decay": 0.0},
        ]
        rate = self.args.trunk_learning_rate
        if rate is not None:
            groups.append({"params": [], "lr": rate, "use_fallback": True, "weight_decay": 0.0})
        trunk = set() if rate is None else set(self.model.model.encoder.embed_images.parameters())
        # in the model's order, by which a resumed run finds the state of each
        for name, parameter in self.model.named_parameters():
            if parameter in trunk and parameter.requires_grad:
                groups[2]["params"].append(parameter)
            elif parameter.requires_grad:
                # a table is no map from one space to another
                matrix = parameter.ndim > 1 and not any(part in name for part in ("shared", "embed", "table"))
                groups[0 if matrix else 1]["params"].append(parameter)
        self.optimizer = Muon(
            groups,
            lr=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            # Emulated bfloat16 takes fifty times as long as float32.
            dtype=torch.float32 if self.args.device.type == "cpu" and not cpu_has_bf16() else torch.bfloat16,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The layer-wise loss in training, the last layer's cross-entropy otherwise; see `Trainer.compute_loss`."""
        if "labels" not in inputs:
            raise ValueError(f"the batch must hold `labels`, got {sorted(inputs)}; the collator makes them.")
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if model.training:
            self._rest_frozen()
            # a decoder that reads a prompt is to answer it
            if self.args.scst_samples and not (labels[:, 0] == IGNORED).any():
                return self._scst_loss(model, inputs, labels)
            if self.args.own_captions and not (labels[:, 0] == IGNORED).any():
                inputs, labels = self._with_own_captions(inputs, labels)
            if self.loss_is_scaled_for_ga is False:
                # a mean over the batch, which the training loop divides by the batches of a step
                num_items_in_batch = None
        else:
            labels = self._without_repeats(inputs, labels)
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels)
        outputs = self._run(model, inputs, with_logits=return_outputs)
        result = self._layerwise(outputs, labels, model.training, num_items_in_batch)
        mode = "train" if model.training else "eval"
        sums = torch.stack([result.loss_sums.float(), result.correct.float(), result.tokens.float()])
        self._sums[mode] = self._sums.get(mode, 0) + sums
        loss = result.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # the processes' gradients are averaged, but the tokens were counted over all of them
            loss = loss * self.accelerator.num_processes
        if model.training and self.args.encoder_agreement:
            # a mean over samples: accumulation divides what it is not given the number of tokens for
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.args.encoder_agreement * encoder_disagreement(outputs.encoder_hidden_states) / steps
        return (loss, {"loss": loss, "logits": outputs.logits}) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        """See `Trainer`; what is frozen is in evaluation mode before a subclass's `compute_loss` runs any of it."""
        if self.model.training:
            self._rest_frozen()
        return super().compute_loss_context_manager()

    def _rest_frozen(self) -> None:
        for module in self.frozen:
            module.eval()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each layer's loss and accuracy to what the training loop logs; see `Trainer.log`."""
        if "loss" in logs:
            logs = logs | self._layer_means("train", "")
            if self._rewards:
                reward = self.accelerator.reduce(torch.stack(self._rewards).mean(), "mean")
                logs["reward"], self._rewards = reward.item(), []
        super().log(logs, start_time)

    def _layer_means(self, mode: str, prefix: str) -> dict[str, float]:
        if mode not in self._sums:
            return {}
        losses, correct, tokens = self.accelerator.reduce(self._sums.pop(mode), "sum").cpu()
        means = {"loss": losses / tokens.clamp_min(1), "accuracy": correct / tokens.clamp_min(1)}
        return {
            f"{prefix}{name}_layer_{layer}": value
            for name, values in means.items()
            for layer, value in enumerate(values.tolist(), start=1)
        }

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Adds each layer's loss and accuracy to the metrics, under the averaged weights if there are any."""
        self._sums.pop("eval", None)
        if self.accelerator.num_processes > 1:
            # what fills the last batch up is no prediction; one process fills nothing up
            self.gather_function = self.accelerator.gather_for_metrics
        with nullcontext() if self.average is None else self.average.applied():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._layer_means("eval", f"{metric_key_prefix}_")
        if means:
            # exact over tokens, where the base class has a mean over batches
            last = means[f"{metric_key_prefix}_loss_layer_{self.model.config.decoder_layers}"]
            output.metrics.update(means | {f"{metric_key_prefix}_loss": last})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of every layer also beside `generate`, and without the logits of all tokens where nobody reads them."""
        generates = self.args.predict_with_generate and not prediction_loss_only
        if "labels" not in inputs or not (generates or prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if "decoder_input_ids" in inputs:
            inputs |= self._decoder_prompts(inputs.pop("decoder_input_ids"), labels)
        if self.answers is None:
            tokens = super().prediction_step(model, inputs, False, ignore_keys, **gen_kwargs)[1]
        else:
            tokens = self._best_answers(inputs, gen_kwargs or self._gen_kwargs)
        images = _images(inputs)
        if self.accelerator.num_processes > 1 and len(tokens) != images:
            raise ValueError(
                f"evaluation in several processes needs one text for each image, got {len(tokens)} for {images}; "
                "give each text a row of its own."
            )
        # several references of an image: its first one stands beside the prediction
        return loss, tokens, labels[:: len(labels) // len(tokens)]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md from this package's template; see `Trainer.create_model_card` for the arguments."""
        if self.is_world_process_zero():
            write_whole(Path(self.args.output_dir) / "README.md", trainer_card(self, *args, **kwargs))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # before the trainer's state, the mark of a whole checkpoint
        if self.average is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            self.average.save(folder / AVERAGE_NAME)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint, AVERAGE_NAME))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _without_repeats(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """`labels` with -100 in rows of images that only fill up the last batch of several processes."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        images = _images(inputs)
        kept = max(0, state.remainder - self.accelerator.process_index * images) * len(labels) // images
        return labels.masked_fill(torch.arange(len(labels), device=labels.device).unsqueeze(1) >= kept, IGNORED)

    def _decoder_prompts(self, decoder_input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the decoder reads before its first label, padded on the left; empty for the start token alone."""
        lengths = ((labels != IGNORED).int().argmax(1) + 1).tolist()
        if max(lengths) == 1:
            return {}
        prompts = [ids[:length] for ids, length in zip(decoder_input_ids, lengths, strict=True)]
        pad = self.model.config.pad_token_id
        return {
            "decoder_input_ids": pad_sequence(prompts, True, pad, padding_side="left"),
            "decoder_attention_mask": pad_sequence(list(map(torch.ones_like, prompts)), True, 0, padding_side="left"),
        }

    @torch.no_grad()
    def _best_answers(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        """The tokens of each row's best answer [rows, tokens], padded on the right."""
        exits = {name: value for name, value in options.items() if name in CONFIG_NAMES}
        scores = self.model.score_answers(self.answers, **inputs, **exits)
        tokens = pad_sequence([torch.tensor(list(answer)) for answer in self.answers], True, IGNORED)
        return tokens.to(scores.device)[scores.argmax(1)]

    # --- training on labels ----------------------------------------------------------------------------------------

    def _run(self, model: nn.Module, inputs: dict[str, Any], with_logits: bool = False) -> Any:
        depths = self._random_depths(inputs) if model.training and self.args.random_exit_depth else {}
        # The head runs piece by piece in the loss. It still takes part here, over no token: several processes learn
        # from the output which parameters a step uses.
        keep = 0 if with_logits else torch.empty(0, dtype=torch.long, device=self.args.device)
        return model(**inputs, **depths, output_hidden_states=True, use_cache=False, logits_to_keep=keep)

    def _random_depths(self, inputs: dict[str, Any]) -> dict[str, Any]:
        images = inputs.get("pixel_values", inputs.get("image_features"))
        text = inputs.get("input_ids")
        streams = {"image": images, "text": text}
        if not self.model.config.modality_decomposition:
            streams = {"encoder": images if text is None else text}
        config = self.model.config
        depths = {
            LAYER_OPTIONS[name]: torch.randint(1, config.layers_of(name) + 1, (len(stream),))
            for name, stream in streams.items()
            if stream is not None
        }
        return {"exit_criterion": "fixed"} | depths

    def _layerwise(
        self, outputs: Any, labels: Tensor, training: bool, num_items_in_batch: Tensor | int | None, **options: Any
    ) -> LayerwiseLoss:
        args, states = self.args, outputs.decoder_hidden_states[1:]
        if training:
            options |= {
                "label_smoothing": args.label_smoothing_factor,
                "layer_weights": args.layer_weights,
                "self_distillation": args.self_distillation,
                "intermediate_token_share": args.intermediate_token_share,
            }
        else:
            options |= {"layer_weights": [0.0] * (len(states) - 1) + [1.0]}
        with self._whole_head(training) as (norm, weight), self.accelerator.autocast():
            return layerwise_loss(states, norm, weight, labels, num_items_in_batch=num_items_in_batch, **options)

    @contextmanager
    def _whole_head(self, training: bool) -> Iterator[tuple[nn.Module, Tensor]]:
        """The decoder's last norm and the output head, which FSDP keeps in pieces outside of the model's forward."""
        sharded = isinstance(self.model, FSDPModule)
        if sharded:
            self.model.unshard()
        yield self.model.model.decoder.layer_norm, self.model.lm_head.weight
        # in training the backward pass needs them, and takes them apart when it is through
        if sharded and not training:
            self.model.reshard()

    # --- training on own captions ----------------------------------------------------------------------------------

    def _with_own_captions(self, inputs: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The inputs, and the labels with the caption of the model that training began with in the place of the first
        one of each image."""
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        own = self._generated(self.teacher, inputs, do_sample=False, num_beams=self.args.own_captions)[1]
        width, per_image = max(own.shape[1], labels.shape[1]), len(labels) // len(own)
        rows = labels.new_full((len(labels), width), IGNORED)
        rows[:, : labels.shape[1]] = labels
        rows[::per_image] = nn.functional.pad(own, (0, width - own.shape[1]), value=IGNORED)
        return inputs, rows

    # --- self-critical training ------------------------------------------------------------------------------------

    def _scst_loss(self, model: nn.Module, inputs: dict[str, Any], references: Tensor) -> Tensor:
        """Sampled captions, each weighted by its reward above the mean of the others of its image."""
        inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        sequences, labels = self._sample(inputs)
        count = self.args.scst_samples
        images = len(sequences) // count
        per_image = len(references) // images
        truths = _token_lists(references)
        truths = [truths[image * per_image : (image + 1) * per_image] for image in range(images) for _ in range(count)]
        rewards = self.reward(_token_lists(labels), truths)
        rewards = torch.tensor(rewards, dtype=torch.float32, device=labels.device)
        self._rewards.append(rewards.mean())
        outputs = self._run(model, inputs | {"decoder_input_ids": sequences[:, :-1]})
        advantages = scst_advantages(rewards.view(images, count)).flatten()
        return self._layerwise(outputs, labels, True, None, row_weights=advantages).loss

    def _sample(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Captions of the full-depth model [images x samples, 1 + tokens], and their tokens as labels."""
        count = self.args.scst_samples
        self.model.eval()
        sequences, labels = self._generated(
            self.model,
            inputs,
            do_sample=not self.args.scst_beam_search,
            num_beams=count if self.args.scst_beam_search else 1,
            num_return_sequences=count,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            no_repeat_ngram_size=0,
        )
        self.model.train()
        self._rest_frozen()
        return sequences, labels

    @torch.no_grad()
    def _generated(self, model: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
        """Captions of a full-depth model [captions, 1 + tokens], and their tokens as labels."""
        with self.accelerator.autocast():
            sequences = model.generate(**inputs, exit_criterion="never", return_dict_in_generate=False, **options)
        # without an end token every caption has the full length
        eos = self.model.generation_config.eos_token_id
        eos = torch.tensor([] if eos is None else eos, dtype=torch.long, device=sequences.device)
        ends = torch.isin(sequences[:, 1:], eos)
        return sequences, sequences[:, 1:].masked_fill(ends.cumsum(1) - ends.long() > 0, IGNORED)


def scst_advantages(rewards: Tensor) -> Tensor:
    """Rewards [images, samples] above the mean of the image's other samples (self-critical training without a greedy
    pass). They sum to 0 for each image."""
    count = rewards.shape[1]
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (count - 1)


def encoder_disagreement(states: Sequence[Tensor]) -> Tensor:
    """How far the encoder's layers are from the last one: mean over layers, each weighted by its number over that of
    all, and over tokens of the squared distance per channel of states that are normalised to mean 0 and variance 1.

    Args:
        states (sequence of `Tensor` [samples, tokens, d]): the embedding and every layer's output, as `forward`
            returns them; a sample that exited repeats its exit state, and so is compared with that.

    Returns:
        `Tensor` []: between 0 and 4; gradients go to both sides.
    """
    last = nn.functional.layer_norm(states[-1], states[-1].shape[-1:])
    layers = len(states) - 1
    total = states[-1].new_zeros(())
    for layer, state in enumerate(states[1:-1], start=1):
        total = total + layer / layers * (nn.functional.layer_norm(state, state.shape[-1:]) - last).square().mean()
    return total / max(layers - 1, 1)


def _images(inputs: dict[str, Any]) -> int:
    """The number of images in a batch, or of texts where there are none."""
    return next(len(inputs[name]) for name in ("pixel_values", "image_features", "input_ids") if name in inputs)


def _token_lists(labels: Tensor) -> list[list[int]]:
    """Rows of labels [rows, tokens] as lists without what is ignored."""
    return [[token for token in row if token != IGNORED] for row in labels.tolist()]


def freeze(
    model: nn.Module, trunk: bool = False, batch_norm: bool = False, trainable: Sequence[str] = ()
) -> list[nn.Module]:
    """Takes the trunk, but for its modules named `trainable`, or every batch norm of a
    [`MuEForConditionalGeneration`] out of training; returns the modules to be kept in evaluation mode.

    Raises:
        ValueError: if there are no batch norms, or no modules of these names.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if batch_norm and not norms:
        raise ValueError("`freeze_batch_norm=True`, but the model has no batch norm; drop it.")
    parts = dict(model.model.encoder.embed_images.named_modules())
    for name in trainable:
        if name not in parts:
            raise ValueError(
                f"`trainable_trunk` must name modules of the trunk, got {name!r}; there are {list(parts)[1:8]} ..."
            )
    whole, norms = [model.model.encoder.embed_images] if trunk else [], norms if batch_norm else []
    for modules, trains in ((whole, False), ([parts[name] for name in trainable], True), (norms, False)):
        for module in modules:
            module.requires_grad_(trains)
    return whole + norms


__all__ = ["MuETrainer", "WeightAverage", "encoder_disagreement", "freeze", "scst_advantages"]
