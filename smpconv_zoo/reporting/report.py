"""The report, put together: what is measured again for it, what is read from logs, and where each part stands."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from smpconv_zoo.data.protocol import pixel_permutation
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.evaluation.classification import evaluate_checkpoint, load_pretrained
from smpconv_zoo.evaluation.figures import require_matplotlib
from smpconv_zoo.evaluation.test_sets import open_test_set
from smpconv_zoo.files import write_whole
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.locate import load_weights
from smpconv_zoo.reporting.drawing import drawings_to_png
from smpconv_zoo.reporting.figure import Figure, form_look
from smpconv_zoo.reporting.log_figures import (
    STUDY,
    accuracy_figure,
    checkpoint_table,
    dropped_figure,
    resolution_figure,
    speed_figure,
    speed_tables,
    study_figures,
    study_tables,
    training_figure,
)
from smpconv_zoo.reporting.logs import find_clone, read_study
from smpconv_zoo.reporting.network_figures import Look, Samples, confusion_figure, kernel_figure, receptive_figure
from smpconv_zoo.reporting.page import Links, Section, Tile, render_page
from smpconv_zoo.reporting.start import recreate_start
from smpconv_zoo.training.arrays import load_parts, pixels_as_input
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, list_recipes, load_recipe

__all__ = ["Written", "log_sections", "look_at", "network_sections", "write_report_page"]

TITLE = "SMPConv, measured"
LEAD = (
    "Convolution kernels made of a few learned points that move: what networks of them reach on real data, what the "
    "points do in training, and how fast it goes. Every figure links to the log behind it."
)

# Validation samples for a receptive field, at most.
SAMPLES = 500
# Figures in the head of the page, at most.
TILES = 6


@dataclasses.dataclass(frozen=True)
class Written:
    """A report on the disk: the page, figures as PNG files, and what its reader should know.

    ``differing`` are checkpoints whose accuracy is not that of their card, ``left_out`` sentences on what is missing.
    """

    page: Path
    pictures: tuple[Path, ...]
    differing: tuple[str, ...]
    left_out: tuple[str, ...]


def write_report_page(
    out: str | os.PathLike[str],
    *,
    repository: Path | None = None,
    png: str | os.PathLike[str] | None = None,
    batch_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Measure the shipped checkpoints again, read the logs, and write the page; what cannot be measured is left out.

    Args:
        out: The HTML file; its folder is made if need be.
        repository: The clone whose logs are shown; the one that this package lies in if None.
        png: A folder for the figures as PNG files, too.
        batch_size: Samples at a time.
        progress: Called with the steps done and in all.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: No clone of the repository.
        ImportError: matplotlib, for PNG files, or a package with data is not installed; the message names it.
        ValueError: A log is not what it should be.
        OSError: A file cannot be read or written.
    """
    page = Path(out)
    root = find_clone(repository)
    if png is not None:
        require_matplotlib()
    cards = _cards()
    sections = log_sections(root)
    embedded = [card for card in cards if card.status == "embedded"]
    # All data are opened before the first network runs.
    missing = [card for card in embedded if not _has_data(card)]
    embedded = [card for card in embedded if card not in missing]
    page.parent.mkdir(parents=True, exist_ok=True)
    looks = []
    for done, card in enumerate(embedded):
        if progress is not None:
            progress(done, len(embedded) + 1)
        looks.append(look_at(card, batch_size))
    if progress is not None:
        progress(len(embedded), len(embedded) + 1)
    # Those with most to see first: long sequences and large pictures.
    sections |= network_sections(sorted(looks, key=lambda look: -look.card.macs))
    ordered = [sections[name] for name in ORDER if name in sections]
    made = (
        f"Made by smpconv-zoo report on {hardware('cpu').partition(',')[0]}, with "
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}. Networks ran in float32 on the "
        "CPU; times are from the logs alone."
    )
    content = render_page(TITLE, LEAD, _tiles(embedded), ordered, made, Links(root, page))
    pictures = () if png is None else _write_pictures(Path(png), ordered)
    write_whole(page, content.encode())
    return Written(
        page,
        pictures,
        differing=tuple(look.card.id for look in looks if look.result.agrees is False),
        left_out=(
            *(section.lead for section in ordered if not section.parts),
            *(f"{card.id} is not measured again: {card.data.name} is not there" for card in missing),
        ),
    )


def _has_data(card: CheckpointCard) -> bool:
    """Whether the test part of a shipped checkpoint is at hand."""
    try:
        open_test_set(card)
    except FileNotFoundError:
        return False
    return True


# Sections by their ids, as the page has them.
ORDER = ("results", "study", "training", "kernels", "fields", "confusions", "resolutions", "speed")


def _cards() -> list[CheckpointCard]:
    return sorted(map(checkpoint_card, list_checkpoints()), key=lambda card: (card.status != "embedded", card.id))


def log_sections(root: Path) -> dict[str, Section]:
    """What is read off the cards and the logs of the clone at ``root``, by the ids of the sections.

    Raises:
        ValueError: A log is not what it should be.
        OSError: A log cannot be read.
    """
    cards = _cards()
    accuracy = accuracy_figure(cards, root)
    training, resolution = training_figure(cards, root), resolution_figure(root)
    found = [
        Section("results", "Checkpoints", "", (checkpoint_table(cards), *(() if accuracy is None else (accuracy,)))),
        _study_section(root),
    ]
    speed = (*(() if (bars := speed_figure(root)) is None else (bars,)), *speed_tables(root))
    if speed:
        found.append(Section("speed", "Speed", "As recorded in the logs; nothing was timed for this page.", speed))
    if training is not None:
        found.append(Section("training", "Training", "", (training,)))
    if resolution is not None:
        found.append(Section("resolutions", "Other resolutions", "", (resolution,)))
    return {section.id: section for section in found}


def _study_section(root: Path) -> Section:
    study = read_study(root / STUDY)
    title = "Points or grids"
    if study is None:
        return Section(
            "study",
            title,
            f"The comparison with fixed grids, kernels made by an MLP and dropped samples is left out: there is no "
            f"{STUDY} yet.",
        )
    dropped = dropped_figure(study)
    parts = (
        *study_tables(study)[:1],
        *study_figures(study),
        *(() if dropped is None else (dropped,)),
        *study_tables(study)[1:],
    )
    lead = "What the points are worth: the same networks, trained alike, with large kernels of other kinds."
    if not any(run.stage == "time" and run.alone for run in study.runs):
        lead += " Accuracy against the time of a step is left out: no step was timed with nothing else running yet."
    return Section("study", title, lead, parts)


def look_at(card: CheckpointCard, batch_size: int = 100) -> Look:
    """A checkpoint whose data are at hand: measured on its test part, its start drawn again, samples to look with.

    Raises:
        FileNotFoundError: Its data are not there.
        ImportError: A package with data is not installed.
    """
    model = load_pretrained(card).requires_grad_(False)
    recipe = _recipe_of(card)
    return Look(
        card=card,
        model=model,
        start=None if recipe is None else recreate_start(recipe, model),
        samples=_validation_samples(recipe) if isinstance(recipe, SequenceRecipe) else None,
        result=evaluate_checkpoint(card.id, batch_size=batch_size),
    )


def _recipe_of(card: CheckpointCard) -> SequenceRecipe | ImageRecipe | None:
    """By what a checkpoint was trained: the recipe of its name, or the one in its weights; None for neither."""
    if card.id in list_recipes():
        return load_recipe(card.id)
    try:
        return SequenceRecipe(**json.loads(load_weights(card).metadata["recipe"]))
    except (KeyError, TypeError, ValueError):
        return None


def _validation_samples(recipe: SequenceRecipe) -> Samples | None:
    parts = load_parts(recipe)
    if parts.validation is None:
        return None
    images, _ = parts.validation
    images = images[torch.linspace(0, len(images) - 1, min(SAMPLES, len(images))).round().long()]
    order = None
    if recipe.permutation_seed is not None:
        order = torch.from_numpy(pixel_permutation(recipe.permutation_seed, n=images[0, 0].numel()))
    square = images.dim() == 4 and images.size(-1) == images.size(-2) and not recipe.input.startswith("image")
    return Samples(pixels_as_input(images, recipe.input, order), order, square)


def network_sections(looks: list[Look]) -> dict[str, Section]:
    """What is read off the networks themselves, by the ids of the sections."""
    kernels = _first_open([figure for look in looks if (figure := kernel_figure(look)) is not None])
    confusion = confusion_figure(looks)
    found = [
        Section(
            "kernels",
            "Kernels and points",
            "A kernel is drawn by its points: each has a place, a radius and a value for every channel, all learned.",
            kernels,
        ),
        Section(
            "fields",
            "Receptive fields",
            "How strongly each sample or pixel moves the features at the last step, or at the centre of a picture: the "
            "size of the gradient, averaged over real samples that are not of the test part.",
            _first_open([figure for look in looks if (figure := receptive_figure(look)) is not None]),
        ),
        Section("confusions", "Confusions", "", () if confusion is None else (confusion,)),
    ]
    return {section.id: section for section in found if section.parts}


def _first_open(figures: list[Figure]) -> tuple[Figure, ...]:
    """Of many figures of one kind, those behind the third are folded."""
    return tuple(dataclasses.replace(figure, folded=i >= 3) for i, figure in enumerate(figures))


def _tiles(cards: list[CheckpointCard]) -> list[Tile]:
    """Of the checkpoints measured here those with the largest test parts."""
    measured = sorted(cards, key=lambda card: 0 if card.measured is None else -card.measured.total)
    return [
        Tile(
            f"{card.measured.top1:.2f} %",
            f"{card.data.name}, {form_look(card.data.input)[0]}s",
            f"{card.measured.correct:,} of {card.measured.total:,} · {card.parameters:,} parameters",
            card.measured.log,
        )
        for card in measured[:TILES]
        if card.measured is not None
    ]


def _write_pictures(folder: Path, sections: list[Section]) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in (part for section in sections for part in section.parts if isinstance(part, Figure)):
        written.append(folder / f"{figure.id}.png")
        write_whole(written[-1], drawings_to_png(figure.drawings, figure.title, figure.legend))
    return tuple(written)
