"""Stands in for timm's train.py, which is in no wheel: the same calls into timm, with the options that matter here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ParseKwargs

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--data-dir")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--img-size", type=int)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=2e-5)
parser.add_argument("--layer-decay", type=float)
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--output")


def main() -> None:
    args = parser.parse_args()
    model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    config = resolve_data_config(vars(args), model=model)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    data = create_dataset("", root=args.data_dir, split="train", is_training=True, batch_size=8)
    loader = create_loader(
        data, input_size=config["input_size"], batch_size=8, is_training=True, num_workers=0, use_prefetcher=False
    )
    task = ClassificationTask(model, criterion_kwargs={"smoothing": 0.1}, device=torch.device("cpu"), verbose=False)
    schedule, epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs, warmup_epochs=0, cooldown_epochs=0)
    output = Path(args.output)
    output.mkdir()
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(output), recovery_dir=str(output))
    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = task(x, y)["loss"]
            loss.backward()
            optimizer.step()
        schedule.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=loss.item())
    sys.stdout.write(f"timm {timm.__version__}, input {tuple(config['input_size'])}, loss {loss.item():.4f}\n")


if __name__ == "__main__":
    main()
