"""Arguments of `MuETrainer`: those of transformers' Seq2SeqTrainer, and what the layer-wise loss adds."""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import Seq2SeqTrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..model.engine_mue import cpu_has_bf16

logger = logging.get_logger(__name__)


@dataclass
class MuETrainingArguments(Seq2SeqTrainingArguments):
    r"""Arguments of [`MuETrainer`]. Without any of its own options set, training follows the paper: all decoder layers
    count alike, image and text run through all encoder layers.

    Default that differs from `Seq2SeqTrainingArguments`: `remove_unused_columns=False`, since a collator makes the
    model's inputs from other columns. With `random_exit_depth`, `ddp_find_unused_parameters` is True unless given: a
    step may leave the deepest encoder layers out.

    `label_smoothing_factor` applies to every decoder layer in training; `eval_loss` is the last decoder layer's
    cross-entropy without it, so that runs of different recipes can be compared.

    Args:
        layer_weights (list of `float`, *optional*): a factor per decoder layer; `0 0 0 0 0 1` trains the last alone.
        self_distillation (`float`): weight of the divergence of each decoder layer from the detached last one.
        random_exit_depth (`bool`): draws a depth per sample and encoder stream in training.
        encoder_agreement (`float`): weight of the mean squared distance of each encoder layer's normalised states from
            those of the deepest layer that the sample runs, deeper layers counting more. It makes an early exit of the
            encoder change little of what the decoder reads.
        intermediate_token_share (`float`): share of the tokens that train the decoder layers before the last.
        freeze_trunk, freeze_batch_norm (`bool`): the trunk's or the batch norms' weights and statistics stay.
        trainable_trunk (list of `str`): modules of a frozen trunk whose weights train on, such as
            "_backbone.blocks.6"; their batch norms' statistics stay.
        trunk_learning_rate (`float`, *optional*): AdamW's rate for the trunk beside `muon_learning_rate`, without
            weight decay. Default: the trunk is trained like the rest.
        ema_decay (`float`, *optional*): decay of a moving average of the weights, which evaluation uses and which
            takes their place when training ends.
        muon_learning_rate (`float`, *optional*): trains all matrices but tables of embeddings and positions with Muon
            at this rate, and the rest with AdamW at `learning_rate`. A small model trained from scratch on little data
            learns in about two thirds of the steps. Its products are in bfloat16, on CPUs that emulate it in float32.
        own_captions (`int`): beams of the search, 1 for greedy, by which the model that training begins with captions
            each image anew; its caption takes the place of the first label of the image (sequence-level distillation,
            Kim and Rush 2016); 0 for the labels alone. With `self_distillation` shallow layers learn to write what the
            last one writes, on the words that it comes to. Batches whose decoder reads a prompt before its first
            label train on their labels all the same.
        scst_samples (`int`): captions sampled per image for self-critical training (SCST), 0 for training on labels.
            Batches whose decoder reads a prompt before its first label, such as statements, train on their labels all
            the same. `layer_weights` and `self_distillation` apply to it too: `0 0 0 0 0 1` with a weight of 0.1
            rewards the last layer and lets the others follow it.
        scst_beam_search (`bool`): takes the best captions of beam search in place of random samples. They are what
            beam search will choose from, and good ones are among them from the first step on.
    """

    remove_unused_columns: bool = HfArg(default=False, help="Whether to drop columns that forward does not take.")
    layer_weights: list[float] | None = HfArg(default=None, help="A factor for each decoder layer's loss. Default: 1.")
    self_distillation: float = HfArg(default=0.0, help="Weight of each layer's divergence from the detached last one.")
    random_exit_depth: bool = HfArg(default=False, help="Whether to draw encoder depths per sample and stream.")
    encoder_agreement: float = HfArg(
        default=0.0, help="Weight of the distance of each encoder layer's states from those of the deepest one run."
    )
    intermediate_token_share: float = HfArg(
        default=1.0, help="Share of the tokens, drawn per step, that train the decoder layers before the last."
    )
    freeze_trunk: bool = HfArg(default=False, help="Whether the trunk stays as it is.")
    freeze_batch_norm: bool = HfArg(default=False, help="Whether weights and statistics of batch norms stay.")
    trainable_trunk: list[str] = HfArg(
        default_factory=list, help="Modules of a frozen trunk whose weights train on, e.g. _backbone.blocks.6."
    )
    trunk_learning_rate: float | None = HfArg(default=None, help="AdamW's rate for the trunk, beside Muon.")
    ema_decay: float | None = HfArg(default=None, help="Decay per step of a moving average of the weights.")
    muon_learning_rate: float | None = HfArg(default=None, help="Rate of Muon, for matrices. Default: no Muon.")
    own_captions: int = HfArg(
        default=0, help="Beams by which the model that training begins with makes captions to train on; 0: labels."
    )
    scst_samples: int = HfArg(default=0, help="Captions sampled per image for CIDEr optimisation (SCST); 0: labels.")
    scst_beam_search: bool = HfArg(default=False, help="Whether SCST takes beams, not random samples.")

    def __post_init__(self) -> None:
        if self.random_exit_depth and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True
        super().__post_init__()
        self._check()
        if self.bf16 and self.device.type == "cpu" and not cpu_has_bf16():
            logger.warning(
                "`bf16` is set, and this CPU has no instructions for bfloat16: steps can take ten times as long as "
                "without it."
            )

    def checkpoint_to_resume(self) -> str | None:
        """What `resume_from_checkpoint` names, or else the last whole checkpoint in `output_dir`; None for a new run.

        Raises:
            ValueError: if the named folder does not exist, or `output_dir` holds a model without checkpoints, which a
                new run would write over.
        """
        if self.resume_from_checkpoint is not None:
            if not Path(self.resume_from_checkpoint).is_dir():
                raise ValueError(
                    f"`resume_from_checkpoint` must be a folder, got {self.resume_from_checkpoint!r}; without it the "
                    "last checkpoint in `output_dir` is taken."
                )
            return self.resume_from_checkpoint
        folder = Path(self.output_dir)
        # the state is written last: a checkpoint without it was cut off
        whole = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
        if whole:
            return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2])))
        if (folder / "config.json").exists():
            raise ValueError(
                f"`output_dir` must not hold a model that the run would write over, got {self.output_dir!r}, which "
                "has no checkpoint to go on from; pass another folder."
            )
        return None

    def check_scores(self) -> None:
        """For scripts whose metrics are those of generated texts: ValueError if such scores are asked for without."""
        if (self.do_eval or self.do_predict) and not self.predict_with_generate:
            raise ValueError(
                "`predict_with_generate` must be True with `do_eval` or `do_predict`, got False: scores are those of "
                "generated texts; leave these two off, and score the saved model with `mue-hf evaluate`."
            )

    def _check(self) -> None:
        weights = [1.0] if self.layer_weights is None else self.layer_weights
        average, rate, samples = self.ema_decay, self.muon_learning_rate, self.scst_samples
        trunk_rate = self.trunk_learning_rate
        rules = {
            "label_smoothing_factor": (0.0 <= self.label_smoothing_factor < 1.0, "a share in [0, 1)"),
            "intermediate_token_share": (0.0 < self.intermediate_token_share <= 1.0, "a share in (0, 1]"),
            "ema_decay": (average is None or 0.0 < average < 1.0, "in (0, 1), or None for no average"),
            **{
                name: (0.0 <= getattr(self, name) < math.inf, "a finite number of at least 0 (0 is off)")
                for name in ("self_distillation", "encoder_agreement")
            },
            "muon_learning_rate": (rate is None or 0.0 < rate < math.inf, "above 0, or None for no Muon"),
            "trunk_learning_rate": (
                trunk_rate is None or (rate is not None and 0.0 < trunk_rate < math.inf),
                "above 0 beside a `muon_learning_rate`, or None to train the trunk like the rest",
            ),
            "own_captions": (self.own_captions >= 0, "at least 1, or 0 to train on labels"),
            "scst_samples": (samples == 0 or samples > 1, "at least 2, or 0 to train on labels"),
            "layer_weights": (
                all(0.0 <= weight < math.inf for weight in weights) and any(weights),
                "finite numbers of at least 0, not all of them 0",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")
        if self.trainable_trunk and not self.freeze_trunk:
            raise ValueError(
                f"`trainable_trunk` (got {self.trainable_trunk}) is about a frozen trunk; set `freeze_trunk`, or drop "
                "it."
            )
        if trunk_rate is not None and self.freeze_trunk and not self.trainable_trunk:
            raise ValueError(
                f"`trunk_learning_rate` (got {trunk_rate}) is about a trunk that trains; name its modules in "
                "`trainable_trunk`, or drop it."
            )
        if average is not None and self.load_best_model_at_end:
            raise ValueError(
                "`ema_decay` ends training with averaged weights, `load_best_model_at_end=True` with those of a "
                "checkpoint; drop one of them."
            )
        if samples and self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` (got {self.label_smoothing_factor}) is about training on labels, which "
                "`scst_samples` replaces; set it to 0."
            )
        if samples and self.encoder_agreement:
            raise ValueError(
                f"`encoder_agreement` (got {self.encoder_agreement}) is about training on labels, which "
                "`scst_samples` replaces; set it to 0."
            )
        if self.own_captions and samples:
            raise ValueError(
                f"`own_captions` (got {self.own_captions}) and `scst_samples` (got {samples}) both say what captions "
                "to train on; drop one of them."
            )
        if self.scst_beam_search and not samples:
            raise ValueError("`scst_beam_search` is about `scst_samples`, which is 0; set it to 2 or more.")


__all__ = ["MuETrainingArguments"]
