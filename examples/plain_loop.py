# /// script
# requires-python = ">=3.11"
# dependencies = ["mue-hf[timm,train]"]
# ///
"""Fine-tune in a plain PyTorch loop with accelerate: the layer-wise loss and gradient checkpointing without a trainer.

    accelerate launch examples/plain_loop.py --model OFA --data captions.jsonl --gradient-checkpointing

With --gradient-checkpointing the backward pass runs each layer again in place of keeping what is inside it: the same
gradients, less memory, more time. transformers now calls it activation checkpointing, and so does `MuETrainer`.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from mue_hf import CaptionPairs, MuEDataCollator, MuEForConditionalGeneration, MuEProcessor
from mue_hf.evaluation.processes import finish_processes
from mue_hf.evaluation.rows import load_rows, row_fields
from mue_hf.training.losses import layerwise_loss


def training_loss(model: torch.nn.Module, inner: MuEForConditionalGeneration, batch: dict) -> torch.Tensor:
    """The sum over all decoder layers of their cross-entropy; `model` is `inner` as accelerate wraps it."""
    labels = batch.pop("labels")
    # the loss makes logits itself, some tokens at a time; DDP must see the head used in here, if for no token
    nothing = torch.empty(0, dtype=torch.long, device=labels.device)
    outputs = model(**batch, output_hidden_states=True, use_cache=False, logits_to_keep=nothing)
    layers = outputs.decoder_hidden_states[1:]
    return layerwise_loss(layers, inner.model.decoder.layer_norm, inner.lm_head.weight, labels).loss


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, writes the model, and returns the loss of each step in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/mue-photos-small", help="checkpoint folder or Hub id")
    parser.add_argument("--data", default="scenes:0:64", help="what load_captioning reads, or scenes:SEED:COUNT")
    parser.add_argument("--output", default="runs/plain")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="captions in each process")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    # an encoder or decoder has weights that captions alone do not reach
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    set_seed(args.seed)
    processor = MuEProcessor.from_pretrained(args.model)
    inner = MuEForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32)
    if args.gradient_checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    rows = load_rows("captioning", args.data, "train")
    pairs = CaptionPairs(rows, [row["references"] for row in row_fields(rows)])
    loader = DataLoader(pairs, args.batch_size, shuffle=True, collate_fn=MuEDataCollator(processor), drop_last=True)
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.learning_rate, weight_decay=0.01)
    model, optimizer, loader = accelerator.prepare(inner, optimizer, loader)

    model.train()
    losses: list[float] = []
    with tqdm(total=args.steps, unit="step", disable=not accelerator.is_main_process) as progress:
        while len(losses) < args.steps:
            for batch in loader:
                loss = training_loss(model, inner, batch)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                progress.set_postfix(loss=f"{losses[-1]:.3f}")
                progress.update()
                if len(losses) == args.steps:
                    break

    if accelerator.is_main_process:
        inner.save_pretrained(args.output)
        processor.save_pretrained(args.output)
    return losses


if __name__ == "__main__":
    main()
    finish_processes()
