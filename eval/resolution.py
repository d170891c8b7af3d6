"""Accuracy of the shipped checkpoints at other resolutions than that of their training, zero-shot.

Resamples the digits of MNIST-5k to other image sizes, or sequences to other rates, and compares the network left as it
is, the input resized to what the network was trained on, and the kernels read off at the new grid. Writes a log of JSON
lines, and with --report a page with table and plot.

    python eval/resolution.py --log eval/results/resolution.jsonl --report runs/resolution
    python eval/resolution.py --split train+validation --every 8 --lesser --log eval/results/resolution_train.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from smpconv_zoo.environment import hardware
from smpconv_zoo.evaluation.report import write_report
from smpconv_zoo.evaluation.resolution import LESSER, WAYS, ResolutionResult, evaluate_resolution
from smpconv_zoo.training.sequence import RunLog

CHECKPOINTS = ["smpconv_resnet_mnist.mnist5k", "smpconv_tcn_mnist.smnist5k", "smpconv_tcn_mnist.pmnist5k"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", default=CHECKPOINTS)
    parser.add_argument("--split", default="test", help="part of the digits; anything is chosen by others than test")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th digit")
    parser.add_argument("--lesser", action="store_true", help="also lesser forms of the third way")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="folder for a page with table and plot")
    args = parser.parse_args()
    if args.lesser and args.split == "test":
        parser.error("the lesser forms are there to choose by; take another part than the test digits")
    results: list[ResolutionResult] = []
    with RunLog(args.log, hardware=hardware(args.device)) as log:

        def on_result(result: ResolutionResult) -> None:
            results.append(result)
            log.write(dataclasses.asdict(result))
            sys.stdout.write(f"{result.id:30} {result.size:5} {result.way:32} {result.top1:6.2f}\n")
            sys.stdout.flush()

        for checkpoint_id in args.ids:
            evaluate_resolution(
                checkpoint_id,
                ways=(*WAYS, *LESSER) if args.lesser else WAYS,
                split=args.split,
                every=args.every,
                device=args.device,
                on_result=on_result,
            )
    if args.report is not None:
        write_report([], args.report, resolution=results)


if __name__ == "__main__":
    main()
