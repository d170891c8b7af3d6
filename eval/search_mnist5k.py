"""Choose the recipes of the MNIST-5k checkpoints on the validation part.

Trains every candidate on the 3,500 training digits and measures the 500 validation digits after each epoch; the test
digits are never read. Prints one line per candidate and seed, and writes all epochs to a log.

    python eval/search_mnist5k.py --device cuda --log eval/results/search_mnist5k.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

from smpconv_zoo.environment import hardware
from smpconv_zoo.training.recipe import load_recipe
from smpconv_zoo.training.sequence import RunLog, train_sequences

CANDIDATES = {
    "plain": {"augment": False, "input_drop_rate": 0.0},
    "input dropout": {"augment": False, "input_drop_rate": 0.1},
    "augmented": {"augment": True, "input_drop_rate": 0.1},
    "augmented, twice as long": {"augment": True, "input_drop_rate": 0.1, "epochs": 200},
    "augmented, twice the rate": {"augment": True, "input_drop_rate": 0.1, "lr": 2e-3},
    "augmented, block dropout": {"augment": True, "input_drop_rate": 0.1, "arguments": {"block_drop_rate": 0.1}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--ids", nargs="+", default=["smpconv_tcn_mnist.smnist5k", "smpconv_tcn_mnist.pmnist5k"])
    args = parser.parse_args()
    with RunLog(args.log, hardware=hardware(args.device)) as log:
        for checkpoint_id, name, seed in itertools.product(args.ids, args.only, args.seeds):
            recipe = load_recipe(checkpoint_id, **{**CANDIDATES[name], "seed": seed})
            log.write({"candidate": name, "recipe": dataclasses.asdict(recipe)})
            result = train_sequences(
                recipe, device=args.device, on_epoch=lambda epoch: log.write(dataclasses.asdict(epoch))
            )
            sys.stdout.write(
                f"{checkpoint_id:28} {name:26} seed {seed}  validation {result.last.top1:.1f}  "
                f"loss {result.last.train_loss:.4f}  {result.last.seconds:.2f} s/epoch\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
