"""The README.md of a published checkpoint: what its card says, in the Hub's form. The same card gives the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml

from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.models.build import PAPER, create_on_meta, sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard

__all__ = ["model_card"]

# Data set of a card -> its name on the Hub, where it has one.
HUB_DATASETS = {
    "ImageNet-1k": "ILSVRC/imagenet-1k",
    "CIFAR-10": "uoft-cs/cifar10",
    "MNIST": "ylecun/mnist",
    "mnist5k": "ylecun/mnist",
    "Speech Commands, 10 words": "google/speech_commands",
}

CITATION = """\
@inproceedings{kim2023smpconv,
  title = {SMPConv: Self-moving Point Representations for Continuous Convolution},
  author = {Kim, Sanghyeon and Park, Eunbyung},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023}
}"""


def model_card(card: CheckpointCard, repo: str, metadata: dict[str, str]) -> str:
    """Text of the model card.

    Args:
        card: The checkpoint.
        repo: Where it is published, ``organisation/name``.
        metadata: That of the weight file.
    """
    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True, width=10_000)
    sections = {
        "How to use": _use(card, repo, metadata),
        "Results": _results(card),
        "Data and split": [f"{card.data.name}, {card.data.input}. Split: {card.data.split}."],
        "Where the weights come from": _provenance(card),
        "Limits": _limits(card),
        "How to verify": _verification(card),
        "Citation": ["```bibtex", CITATION, "```"],
    }
    lines = [f"# {card.id}", "", *_what(card)]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return f"---\n{front}---\n\n" + "\n".join(lines) + "\n"


def _front_matter(card: CheckpointCard) -> dict[str, Any]:
    task, title = _task(card)
    front: dict[str, Any] = {"license": card.license.lower(), "library_name": "timm"}
    if task != "other":
        front["pipeline_tag"] = task
    front["tags"] = ["timm", "smpconv", "continuous-convolution", "large-kernel-convolution"]
    hub_name = HUB_DATASETS.get(card.data.name)
    if hub_name:
        front["datasets"] = [hub_name]
    # An image as a sequence, or a part of a data set, is another task than the Hub's: no figure beside those on it.
    kind = hub_name if hub_name and task != "other" else card.data.name
    dataset = {"name": f"{card.data.name}, {card.data.input}", "type": kind}
    results = []
    for name, top1, source in _figures(card):
        metric = {"type": "accuracy", "name": f"top-1, {name}", "value": top1}
        entry: dict[str, Any] = {"task": {"type": task, "name": title}, "dataset": dict(dataset), "metrics": [metric]}
        if source:
            entry["source"] = {"name": source, "url": PAPER["origin_url"]}
        results.append(entry)
    if results:
        front["model-index"] = [{"name": card.id, "results": results}]
    return front


def _task(card: CheckpointCard) -> tuple[str, str]:
    """The Hub's name of what the network does, and ours."""
    if card.data.input.startswith("image"):
        return "image-classification", "Image classification"
    if card.data.name.startswith("Speech"):
        return "audio-classification", "Audio classification"
    return "other", "Sequence classification"


def _figures(card: CheckpointCard) -> list[tuple[str, float, str]]:
    """Kind, percent and source of every figure there is; ours has no source but the card."""
    figures = []
    if card.measured is not None:
        figures.append(("measured", card.measured.top1, ""))
    if card.paper is not None:
        figures.append(("paper", card.paper.top1, card.paper.source))
    return figures


def _what(card: CheckpointCard) -> Sequence[str]:
    return [
        f"`{card.network}` of smpconv_zoo with weights for {card.data.name} ({card.data.input}): "
        f"{card.parameters:,} parameters, {card.macs:,} multiply-accumulates for one input.",
        "",
        "Its convolution kernels are made of a few learned points that move: "
        f"[{PAPER['paper_name']}](https://arxiv.org/abs/{PAPER['paper_ids'].removeprefix('arXiv:')}) "
        "(Kim & Park, CVPR 2023).",
    ]


def _use(card: CheckpointCard, repo: str, metadata: dict[str, str]) -> Sequence[str]:
    own = sample_shape(create_on_meta(card.network, **card.arguments))
    shape = (1, *(own if card.golden is None else card.golden.shape[1:]))
    lines = [
        "```python",
        "import timm",
        "import torch",
        "",
        "import smpconv_zoo  # registers the networks with timm",
        "",
        f'net = timm.create_model("hf-hub:{repo}", pretrained=True).eval()',
        f"logits = net(torch.zeros{shape})",
        "```",
    ]
    if "permutation" in metadata:
        lines += ["", "The order of the pixels is in the metadata of `model.safetensors`, under `permutation`."]
    elif card.data.input.startswith("permuted"):
        lines += ["", "The order of the pixels is not in the file: it has to be made as the authors' code makes it."]
    return lines


def _results(card: CheckpointCard) -> Sequence[str]:
    if not _figures(card):
        return ["No figure has been published or measured for these weights."]
    rows = []
    if card.paper is not None:
        rows.append((f"{card.paper.top1:.2f}", "paper", card.paper.source))
    if card.measured is not None:
        m = card.measured
        where = f"{m.correct} of {m.total}; `{m.command}`; log `{m.log}`; {m.hardware}; {_versions(m.versions)}"
        rows.append((f"{m.top1:.2f}", "measured with these weights", where))
    return markdown_table(("top-1, %", "kind", "where"), rows, right=(0,)).splitlines()


def _provenance(card: CheckpointCard) -> Sequence[str]:
    if card.source is not None:
        source = card.source
        kind = "the running average of the weights" if source.averaged else "the weights as trained, not averaged"
        return [
            f"Converted from `{source.name}` ({source.bytes:,} bytes, sha256 `{source.sha256}`), imported on "
            f"{source.date} from {source.url or card.origin}: {kind}. The authors publish no hash of that file; it was "
            "trusted on first use."
        ]
    if card.training is not None:
        t = card.training
        return [
            f"{card.origin[:1].upper()}{card.origin[1:]}: `{t.command}`, seed {t.seed}; {t.hardware}; "
            f"{_versions(t.versions)}.",
            f"Chosen by: {t.chosen_by}. Log: `{t.log}`.",
        ]
    return [f"{card.origin[:1].upper()}{card.origin[1:]}."]


def _limits(card: CheckpointCard) -> Sequence[str]:
    limits = []
    if card.measured is not None:
        share, total = card.measured.correct / card.measured.total, card.measured.total
        error = 100 * math.sqrt(share * (1 - share) / total)
        limits.append(f"- Measured on {total:,} samples: one standard error is {error:.2f} points.")
    else:
        limits.append("- We did not measure these weights: any figure above is the authors'.")
    if card.paper is None:
        limits.append("- There is no published figure for this task to stand beside.")
    return [
        *limits,
        "- A research model for the classes of this one data set. Other data, robustness and bias were not looked at.",
    ]


def _verification(card: CheckpointCard) -> Sequence[str]:
    lines = [
        "```sh",
        f"echo '{card.files[0].sha256}  model.safetensors' | sha256sum --check",
        f"smpconv-zoo verify {card.id}",
        f"smpconv-zoo eval {card.id}",
        "```",
        "",
        "`card.json` is the card that all of this was generated from.",
    ]
    if card.golden is not None:
        lines[-1] += (
            f" Under `golden` it holds the logits that these weights give for the input "
            f"`numpy.random.RandomState({card.golden.seed}).standard_normal({card.golden.shape})`, in float32."
        )
    return lines


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
