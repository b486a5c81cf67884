"""What `MuETrainer` refuses before it trains: arguments that do not fit the model, each other, or the launch."""

from typing import Any

from transformers import Seq2SeqTrainer
from transformers.integrations import is_deepspeed_zero3_enabled

from .arguments import MuETrainingArguments

# What needs whole weights, or the same layers in all processes.
NOT_WITH_FSDP = {
    "ema_decay": "averages whole weights",
    "muon_learning_rate": "needs whole matrices",
    "random_exit_depth": "leaves out layers that another process waits for",
    "scst_samples": "generates with whole weights",
    "own_captions": "generates with whole weights",
}


def check_arguments(model: Any, args: Any, reward: Any, loss: Any) -> None:
    """Raises ValueError for arguments of `MuETrainer` that do not fit each other."""
    if not isinstance(args, MuETrainingArguments):
        raise ValueError(f"`args` must be MuETrainingArguments, got {type(args).__name__}; it has the same fields.")
    if model is None:
        raise ValueError("`model` must be given, got None; `model_init` is not supported.")
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "mue" or model.get_output_embeddings() is None:
        raise ValueError(f"`model` must be a MuEForConditionalGeneration, got {type(model).__name__}.")
    if loss is not None:
        raise ValueError("`compute_loss_func` would replace the layer-wise loss; use Seq2SeqTrainer for that.")
    factors, layers = args.layer_weights, config.decoder_layers
    if factors is not None and len(factors) != layers:
        raise ValueError(
            f"`layer_weights` must hold one factor for each of the {layers} decoder layers, got {factors}."
        )
    if args.scst_samples and reward is None:
        raise ValueError("`scst_samples` needs `reward`, got None; pass e.g. CiderDReward(training references).")
    if reward is not None and not args.scst_samples:
        raise ValueError("`reward` is used by `scst_samples` only, which is 0; set it to 2 or more.")


def check_launch(trainer: Seq2SeqTrainer) -> None:
    """Raises ValueError for processes and devices in which the loss cannot be computed."""
    args: Any = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"one process cannot share {args.n_gpu} GPUs here; start one process per GPU with `accelerate launch`, "
            "or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "the loss reads the whole output head, which DeepSpeed ZeRO-3 splits; use FSDP 2, DDP or ZeRO-1/2."
        )
    if not trainer.is_fsdp_enabled:
        return
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1)
    if version != 2:
        raise ValueError(f"`fsdp_version` must be 2, got {version}; see examples/fsdp.yaml.")
    for name, reason in NOT_WITH_FSDP.items():
        if getattr(args, name):
            raise ValueError(f"`{name}` (got {getattr(args, name)}) {reason}, which FSDP splits; drop it, or use DDP.")
    if args.predict_with_generate:
        raise ValueError(
            "`predict_with_generate` (got True) generates with whole weights, which FSDP splits; pass "
            "`--predict_with_generate False` and score the saved model with `mue-hf evaluate`."
        )


__all__ = ["check_arguments", "check_launch"]
