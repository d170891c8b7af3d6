"""The report: marks and axes, logs and the study, starts drawn again, receptive fields, and the page as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_files import ROOT
from test_evaluation import PNG, make_checkout
from torch import nn

import smpconv_zoo
from smpconv_zoo.evaluation.classification import EvaluationResult, load_pretrained
from smpconv_zoo.layers import SMPConv1d
from smpconv_zoo.pretrained.cards import checkpoint_card, list_checkpoints
from smpconv_zoo.reporting.drawing import COLOURS, Dots, Drawing, Line, Picture, Text, drawing_to_svg, drawings_to_png
from smpconv_zoo.reporting.figure import Figure
from smpconv_zoo.reporting.log_figures import _labels, dropped_figure, study_figures, study_tables, wilson_interval
from smpconv_zoo.reporting.logs import StudyRun, read_study, read_training, summarize
from smpconv_zoo.reporting.network_figures import Look, Samples, silent_points
from smpconv_zoo.reporting.page import Links, render_section
from smpconv_zoo.reporting.panel import Axis, Panel, log_ticks, round_ticks, short_number
from smpconv_zoo.reporting.receptive import receptive_field, share_of_newest
from smpconv_zoo.reporting.report import log_sections, network_sections
from smpconv_zoo.reporting.start import Start, _inverse, _inverse_truncated_normal, point_layers, recreate_start
from smpconv_zoo.training.recipe import SequenceRecipe, load_recipe

PAGE = ROOT / "docs" / "report.html"


def made_study() -> list[dict[str, object]]:
    """Lines as a study leaves them: four kinds of kernels, two data sets, two seeds, one set with dropped samples.

    Mean read-out is better on held-out data, and the reference's settings on the test part, which has no say.
    """
    lines: list[dict[str, object]] = []
    for i, kernel in enumerate(("fixed", "points", "mlp", "something new")):
        run = {"kernel": kernel, "parameters": 10**5 * (i + 1), "command": "study --device cuda", "x": {}}
        for data, shares in (("gunpoint", (0,)), ("japanese-vowels", (0, 30, 70))):
            lines.append(run | {"stage": "time", "data": data, "option": "", "step_ms": 2.5 + i, "alone": True})
            for option, validation in (("", 80.0), ("mean", 90.0)):
                for seed in (0, 1):
                    one = run | {"data": data, "option": option, "seed": seed}
                    curve = [[1, 2.0, None], [5, 1.0, validation - 20], [10, 0.5, validation + seed]]
                    lines.append(one | {"stage": "choose", "validation_top1": validation, "curve": curve})
                    for dropped in shares:
                        top1 = 95.0 - i + 2 * seed - dropped / 10 - (0 if option else -2)
                        name = f"{data}-{dropped}" if dropped else data
                        final = {"stage": "final", "data": name, "recipe": {"dropped": dropped}, "step_ms": 99.0}
                        lines.append(one | final | {"test": {"top1": top1, "correct": 1, "total": 2}})
    return [*lines, {"job": "x", "error": "out of memory", "stage": "final", "data": "lost", "kernel": "points"}]


def write_lines(path: Path, lines: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------- marks and axes


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", sorted(COLOURS.keys() - {"ground", "rule"}))
@pytest.mark.parametrize("hour", [0, 1], ids=["day", "night"])
def test_every_colour_can_be_read_on_its_ground(name: str, hour: int) -> None:
    lights = sorted((luminance(COLOURS[name][hour]), luminance(COLOURS["ground"][hour])))
    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def test_a_drawing_says_what_it_shows_and_keeps_markup_out() -> None:
    marks = (Text(1, 2, "a < b & c"), Line(((0, 0), (1.25, 2)), "first"), Dots(((3, 4),), "wrong", title='"<x>"'))
    svg = drawing_to_svg(Drawing(10, 20, marks, 'one "two" <three>'))
    assert "a &lt; b &amp; c" in svg and 'aria-label="one &quot;two&quot; &lt;three&gt;"' in svg
    assert 'points="0,0 1.2,2"' in svg and "<x>" not in svg
    with pytest.raises(ValueError, match="nan"):
        drawing_to_svg(Drawing(10, 20, (Line(((0, math.nan), (1, 1)), "first"),), ""))


def test_a_picture_is_as_seen_through_as_its_values_are_small(tmp_path: Path) -> None:
    import base64
    import io

    from PIL import Image

    values = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    svg = drawing_to_svg(Drawing(2, 2, (Picture(0, 0, 2, 2, values),), ""))
    data = re.search(r"base64,([^\"]+)", svg)
    assert data is not None
    image = Image.open(io.BytesIO(base64.b64decode(data[1])))
    pixels = [image.getpixel((x, y)) for y in range(2) for x in range(2)]
    assert [pixel[3] for pixel in pixels] == [255, 0, 255, 128]
    assert pixels[0][:3] == pixels[3][:3] and pixels[0][2] > pixels[0][0] and pixels[2][0] > pixels[2][2]


def test_all_marks_become_a_png_file() -> None:
    panel = Panel("A title with $ in it", Axis("x", 0, 1), Axis("y", 0, 1))
    panel.line([(0, 0), (1, 1)], "first")
    panel.band([(0, 0, 0.1), (1, 0.9, 1)], "first")
    panel.whisker(0.5, 0.4, 0.6, "second")
    for shape in ("circle", "square", "triangle", "diamond", "ring"):
        panel.dots([(0.5, 0.5)], "third", shape=shape)
    panel.reference(0.3, "here")
    panel.marks.append(Picture(50, 60, 20, 20, torch.eye(3)))
    drawing = panel.drawn("all marks")
    picture = drawings_to_png([drawing] * 4, "Four", [("a line", "first", None), ("a ring", "second", "ring")])
    assert picture.startswith(PNG)
    assert "polygon" in drawing_to_svg(drawing)


def test_axes_place_and_mark_values() -> None:
    assert [Axis("", 1, 100, log=True).share(value) for value in (1, 10, 100)] == [0, 0.5, 1]
    assert Axis("", 20, 0).share(5) == 0.75 and Axis("", 20, 0).marked()[0] == (0, "0")
    assert round_ticks(0.13, 0.98) == pytest.approx((0.2, 0.4, 0.6, 0.8))
    assert log_ticks(8e4, 3e6) == pytest.approx((1e5, 3e5, 1e6, 3e6)[: len(log_ticks(8e4, 3e6))])
    assert all(3 <= len(log_ticks(1.0, high)) <= 9 for high in (2.0, 5.0, 12.0, 400.0, 1e6))
    assert [short_number(n) for n in (784, 16000, 370_960, 26_705_248, 0.05)] == [
        "784",
        "16k",
        "371k",
        "26.71M",
        "0.05",
    ]


def test_labels_of_close_places_do_not_overlap() -> None:
    panel = Panel("", Axis("x", 0, 1), Axis("y", 0, 100))
    panel.labels(
        [(0.1, y, f"label {y}", "muted") for y in (99.7, 99.5, 99.1, 97.7)] + [(0.99, 50, "far right", "muted")]
    )
    *close, far = sorted((mark for mark in panel.marks if isinstance(mark, Text)), key=lambda text: text.y)
    assert all(b.y - a.y >= 12 for a, b in itertools.pairwise(close))
    assert [text.words for text in close] == ["label 99.7", "label 99.5", "label 99.1", "label 97.7"]
    assert far.anchor == "end" and far.x < panel.right


# --------------------------------------------------------------------------------------------------------------- logs


def test_a_study_is_read_with_what_each_line_has(tmp_path: Path) -> None:
    lines = [
        {"command": "a"},
        {"stage": "choose", "data": "d", "kernel": "points", "option": None, "curve": [[1, 2.0, None], [2, 1.0, 70]]},
        {"stage": "final", "data": "d-30", "kernel": "fixed", "option": "mean", "seed": 3, "test": {"top1": 91}},
        {"note": "no run", "command": "a"},
    ]
    lines[2] |= {"recipe": {"dropped": 30}, "parameters": 1000.0, "step_ms": "2.5", "alone": False, "unknown": {}}
    path = write_lines(tmp_path / "study.jsonl", lines)
    path.write_text(path.read_text() + '{"stage": "final", "da')
    study = read_study(path)
    assert study is not None and study.commands == ("a",)
    assert study.runs == (
        StudyRun("choose", "d", "points", curve=((2.0, 70.0),)),
        StudyRun("final", "d", "fixed", "mean", 3, 30.0, test=91.0, parameters=1000, step_ms=2.5, alone=False),
    )
    assert read_study(tmp_path / "absent.jsonl") is None
    assert read_study(write_lines(tmp_path / "no_final.jsonl", lines[:2])) is None


@pytest.mark.parametrize("value", ['"test": {"top1": "high"}', '"test": 91', '"seed": NaN', '"curve": [1, 2]'])
def test_a_study_with_a_value_of_another_kind_names_the_line(value: str, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    path.write_text(
        f'{{"command": "x"}}\n{{"stage": "final", "data": "d", "kernel": "k", {value}}}\n', encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"study\.jsonl, line 2"):
        read_study(path)


def test_settings_are_chosen_by_held_out_data_alone(tmp_path: Path) -> None:
    study = read_study(write_lines(tmp_path / "study.jsonl", made_study()))
    assert study is not None and ("lost", 0.0) not in study.sets
    assert {run.option for run in study.chosen("gunpoint", 0, "points")} == {"mean"}
    # Dropped samples go with what was chosen on the complete data.
    assert [run.test for run in study.chosen("japanese-vowels", 30, "points")] == [91.0, 93.0]
    # Without final runs of the best settings there is nothing to show: the reference's would not be what was chosen.
    # So it is for a kernel without a choice where others have one; where none has, it is the reference's.
    lines = made_study()
    without = [line for line in lines if (line.get("stage"), line.get("option")) != ("final", "mean")]
    others = [line for line in lines if (line.get("stage"), line.get("kernel")) != ("choose", "mlp")]
    nobody = [line for line in lines if line.get("stage") != "choose"]
    for left, options in ((without, set()), (others, set()), (nobody, {""})):
        study = read_study(write_lines(tmp_path / "study.jsonl", left))
        assert study is not None and {run.option for run in study.chosen("gunpoint", 0, "mlp")} == options


def test_the_logs_of_shipped_checkpoints_are_read_and_others_are_not(tmp_path: Path) -> None:
    log = read_training(ROOT / "eval" / "results" / "smpconv_tcn_mnist.smnist5k.jsonl")
    assert log is not None and len(log.losses) == len(log.seconds) == 100 and log.recipe["seed"] == 0
    assert min(log.seconds) <= log.typical_seconds < log.seconds[0]
    assert read_training(write_lines(tmp_path / "other.jsonl", [{"command": "x"}, {"epoch": 1}])) is None
    (tmp_path / "log.txt").write_text("epoch 1")
    assert read_training(tmp_path / "log.txt") is None


def test_summaries_and_intervals() -> None:
    assert summarize([1.0, 3.0]) == summarize([3.0, 1.0]) and summarize([1.0, 3.0]).deviation == pytest.approx(2**0.5)
    assert summarize([4.0]).deviation == 0
    # Half of ten: 0.237 to 0.763, as tables of the Wilson interval have it.
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1 and wilson_interval(10, 10)[0] > 0.72


# ------------------------------------------------------------------------------------------- networks, before and after


RECIPE = SequenceRecipe(
    id="smpconv_tcn_mnist.x",
    network="smpconv_tcn_mnist",
    arguments={"dims": [6], "kernel_size": 60},
    data="mnist5k",
    epochs=2,
    batch_size=8,
    lr=1e-3,
    seed=5,
)


def trained(seed: int, inverse: bool) -> nn.Module:
    """A network of this seed whose points have moved a little."""
    import contextlib

    with torch.random.fork_rng(), _inverse() if inverse else contextlib.nullcontext():
        torch.manual_seed(seed)
        model = smpconv_zoo.create_model(RECIPE.network, **RECIPE.arguments)
        for _, layer in point_layers(model):
            layer.coords.data += 0.02 * torch.randn_like(layer.coords)
    return model


def test_a_start_is_found_in_either_way_of_drawing_and_not_where_there_is_none() -> None:
    state, drawing = torch.random.get_rng_state(), nn.init.trunc_normal_
    for inverse, words in ((False, f"PyTorch {torch.__version__.partition('+')[0]}"), (True, "inverse cumulative")):
        start = recreate_start(RECIPE, trained(5, inverse))
        assert start is not None and words in start.drawn and start.correlation > 0.9
        with torch.random.fork_rng(), _inverse() if inverse else torch.random.fork_rng():
            torch.manual_seed(5)
            expected = smpconv_zoo.create_model(RECIPE.network, **RECIPE.arguments).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in start.model.state_dict().items())
        assert recreate_start(RECIPE, trained(6, inverse)) is None
    assert torch.equal(state, torch.random.get_rng_state()) and nn.init.trunc_normal_ is drawing


def test_the_shipped_image_network_began_where_its_seed_says() -> None:
    name = "smpconv_resnet_mnist.mnist5k"
    start = recreate_start(load_recipe(name), load_pretrained(checkpoint_card(name)))
    assert start is not None and start.correlation > 0.85 and "2.11" in start.drawn


def test_truncated_normals_through_the_inverse() -> None:
    drawn = _inverse_truncated_normal(torch.empty(4000), 0.5, 2.0, -1.0, 1.0, torch.Generator().manual_seed(0))
    assert drawn.min() >= -1 and drawn.max() <= 1
    low, high = (torch.special.ndtr(torch.tensor((end - 0.5) / 2)) for end in (-1.0, 1.0))
    shares = (torch.special.ndtr((drawn.sort().values - 0.5) / 2) - low) / (high - low)
    assert (shares - torch.linspace(0, 1, 4000)).abs().max() < 0.03  # Kolmogorov-Smirnov, far beyond 5 %


class Filter(nn.Module):
    """Features that are one convolution of the input."""

    def __init__(self, kernel: torch.Tensor) -> None:
        super().__init__()
        self.kernel = kernel

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 3:
            return torch.nn.functional.conv1d(nn.functional.pad(x, (self.kernel.size(-1) - 1, 0)), self.kernel)
        return torch.nn.functional.conv2d(x, self.kernel, padding="same")


def test_a_receptive_field_is_the_size_of_the_kernel() -> None:
    kernel = torch.tensor([[[0.0, 1.0, -2.0, 1.0]]])
    field = receptive_field(Filter(kernel), torch.randn(5, 1, 9), batch_size=2)
    assert torch.equal(field, torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 1]).double() / 4)
    assert share_of_newest(field).tolist() == pytest.approx([0.25, 0.75, *[1.0] * 7])
    image = torch.zeros(1, 2, 3, 3)
    image[0, 1, 0, 2] = -3.0
    field = receptive_field(Filter(image), torch.randn(2, 2, 7, 7))
    assert field[2, 4] == 1 and field.sum() == 1
    with pytest.raises(ValueError, match="do not depend"):
        receptive_field(Filter(torch.zeros(1, 1, 3)), torch.randn(1, 1, 9))


def test_silent_points_have_no_part_in_the_kernel() -> None:
    layer = SMPConv1d(2, 3, 41, n_points=8)
    with torch.no_grad():
        layer.radius.uniform_(0.001, 0.05, generator=torch.Generator().manual_seed(1))
        silent = silent_points(layer)
        assert 0 < silent.float().mean() < 1
        before = layer.kernel().clone()
        layer.weight[silent[:, None].expand_as(layer.weight)] = 7.0
        assert torch.equal(layer.kernel(), before)
        out, point = (~silent).nonzero()[0].tolist()
        layer.weight[out, :, point] += 1.0
        assert not torch.equal(layer.kernel(), before)


def look_of(name: str, inputs: torch.Tensor, picture: bool, **arguments: object) -> Look:
    """A small network before and after some moves, with the card of another and a made result."""
    card = dataclasses.replace(checkpoint_card(name), network="any")
    start, model = (smpconv_zoo.create_model(card.id.partition(".")[0], **arguments).eval() for _ in range(2))
    model.load_state_dict(start.state_dict())
    for _, layer in point_layers(model):
        layer.coords.data += 0.01
    order = torch.randperm(inputs.size(-1)) if picture else None
    confusion = ((9, 1), (0, 10))
    result = EvaluationResult(name, 19, 20, 95.0, 1.0, None, None, None, confusion, "sound", "sound", (), "cpu", {})
    return Look(card, model, Start(start, "as it is drawn", 0.99), Samples(inputs, order, picture), result)


def test_figures_of_networks_show_before_and_after(tmp_path: Path) -> None:
    looks = [
        look_of("smpconv_tcn_mnist.pmnist5k", torch.randn(3, 1, 64), True, dims=[5], kernel_size=64, n_points=7),
        look_of("smpconv_resnet_mnist.mnist5k", torch.randn(3, 1, 12, 12), False, dims=[4], kernel_size=13),
    ]
    sections = network_sections(looks)
    assert [len(figure.drawings) for figure in sections["kernels"].parts] == [6, 6]
    sequence, image = sections["kernels"].parts
    assert "correlate by 0.99" in sequence.caption and "from seed 0, as it is drawn" in sequence.caption
    # All points moved by 0.01 along both axes, half a kernel being 6 taps.
    assert f"less than {0.01 * 6 * 2**0.5:.2f} taps" in image.caption
    assert "half of them moved by less than 0.3 samples" in sequence.drawings[3].description
    fields = sections["fields"].parts
    assert [len(figure.drawings) for figure in fields] == [3, 2] and "random order" in fields[0].caption
    (confusion,) = sections["confusions"].parts
    assert "0 taken for 1, 1 times" in confusion.drawings[0].description and "19 of 20" in confusion.caption
    for section in sections.values():
        assert render_section(section, Links(ROOT, tmp_path / "x.html")).count("<svg viewBox") >= 2


def test_a_network_without_start_or_samples_is_shown_as_it_is() -> None:
    look = look_of("smpconv_tcn_mnist.smnist5k", torch.randn(3, 1, 64), False, dims=[5], kernel_size=64, n_points=7)
    sections = network_sections([dataclasses.replace(look, start=None, samples=None)])
    assert sections.keys() == {"kernels", "confusions"}
    (figure,) = sections["kernels"].parts
    assert len(figure.drawings) == 5 and "could not be drawn again" in figure.caption


# -------------------------------------------------------------------------------------------------- figures and page


def figures_of(root: Path) -> list[Figure]:
    return [part for section in log_sections(root).values() for part in section.parts if isinstance(part, Figure)]


def test_every_part_of_the_report_leads_to_a_log_that_exists() -> None:
    parts = [part for section in log_sections(ROOT).values() for part in section.parts]
    assert {"accuracy", "training-figure", "resolution", "speed-figure", "checkpoints"} <= {part.id for part in parts}
    for part in parts:
        assert part.sources and all((ROOT / source.path).is_file() for source in part.sources), part.id
        assert any(source.command for source in part.sources), part.id


def test_the_page_of_the_repository_shows_the_logs_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for section in log_sections(ROOT).values():
        assert render_section(section, Links(ROOT, PAGE)) in page, f"{section.id} has changed: make report"
    for card in map(checkpoint_card, list_checkpoints()):
        if card.status == "embedded" and card.measured is not None:
            counted = f"{card.id} {card.measured.correct} of {card.measured.total}, as its card says"
            assert counted in page, f"{card.id} is not what it was, or new: make report"
    assert "kernels-smpconv_tcn_mnist-smnist5k" in page and "<script" not in page
    assert PAGE.stat().st_size < 2e6 and (ROOT / "docs" / "report.png").stat().st_size < 4e5


def test_of_many_marks_the_ends_are_named() -> None:
    few = [(1.0, 90.0 + i, "first") for i in range(8)]
    assert [text for _, _, text, _ in _labels(few)] == [f"{90 + i}.00" for i in range(8)]
    many = [*few, (2.0, 50.0, "third")]
    assert _labels(many) == [
        (1.0, 90.0, "90.00", "first"),
        (1.0, 97.0, "97.00", "first"),
        (2.0, 50.0, "50.00", "third"),
    ]


def test_the_study_is_shown_where_it_is_and_said_to_be_missing_where_it_is_not(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "eval" / "results", tmp_path / "eval" / "results")
    path = tmp_path / "eval" / "results" / "study.jsonl"
    path.unlink(missing_ok=True)
    section = log_sections(tmp_path)["study"]
    assert section.parts == () and "study.jsonl" in section.lead
    write_lines(path, made_study())
    study = read_study(path)
    assert study is not None
    chosen, reference, settings = study_tables(study)
    assert chosen.header == ("data", "points that move", "fixed grid", "made by an MLP", "something new")
    assert chosen.rows[0] == ("gunpoint", *(f"{v:.2f} ± 1.41 (2)" for v in (95.0, 96.0, 94.0, 93.0)))
    assert chosen.rows[2][:2] == ("japanese-vowels, 30 % dropped", "92.00 ± 1.41 (2)")
    plain = read_study(
        write_lines(tmp_path / "plain.jsonl", [line for line in made_study() if line["stage"] != "choose"])
    )
    assert plain is not None
    (only,) = study_tables(plain)
    assert (only.id, only.rows, only.folded) == ("study-reference", reference.rows, False)
    assert "Nothing chosen" in only.caption
    assert reference.rows[0][1] == "97.00 ± 1.41 (2)" and settings.rows[0] == ("gunpoint", *["mean"] * 4)
    found = {figure.id: figure for figure in study_figures(study)}
    panels = {name: len(figure.drawings) for name, figure in found.items()}
    assert panels == {"study-size": 2, "study-time": 2, "study-way": 2}
    assert "points that move 95.00 % at 3.50 ms" in found["study-time"].drawings[0].description
    dropped = dropped_figure(study)
    assert dropped is not None and len(dropped.drawings) == 1
    assert "points that move at 70 % 88.0 %" in dropped.drawings[0].description
    looks = [figure.legend for figure in (found["study-size"], found["study-time"], dropped)]
    assert all(look == looks[0] for look in looks) and len({(c, s) for _, c, s in looks[0]}) == 4
    section = log_sections(tmp_path)["study"]
    assert {part.id for part in section.parts} == {
        *found,
        "study-chosen",
        "study-reference",
        "study-settings",
        dropped.id,
    }
    assert "study --device cuda" in render_section(section, Links(tmp_path, tmp_path / "report.html"))
    assert "left out" not in section.lead
    # Steps that were timed beside other runs, and kernels with nothing beside them, are not drawn.
    lines = [{**line, "alone": False} if line.get("stage") == "time" else line for line in made_study()]
    alone = ("gunpoint", "points")
    lines = [x for x in lines if x.get("data") != "gunpoint" or (x.get("data"), x.get("kernel")) == alone]
    write_lines(path, lines)
    section = log_sections(tmp_path)["study"]
    assert "no step was timed with nothing else running" in section.lead
    assert "study-time" not in {part.id for part in section.parts}
    (size,) = (part for part in section.parts if part.id == "study-size")
    assert isinstance(size, Figure) and len(size.drawings) == 1


def test_the_command_writes_a_page_and_pictures_of_any_checkpoints(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "clone", rows_correct_by=1)
    (checkout / "eval" / "results").mkdir(parents=True)
    out, figures = tmp_path / "some" / "report.html", tmp_path / "figures"
    command = [sys.executable, "-m", "smpconv_zoo.cli", "report", "--out", str(out), "--png", str(figures), "--json"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    missing, differing = done.stderr.splitlines()
    assert "study.jsonl" in missing and differing.endswith("not equal to the card's figure: smpconv_tcn_mnist.rows")
    answer = json.loads(done.stdout)
    assert answer["page"] == str(out) and answer["differing"] == ["smpconv_tcn_mnist.rows"]
    assert len(answer["left_out"]) == 1 and "study.jsonl" in answer["left_out"][0]
    names = {"accuracy", "confusion", "kernels-smpconv_tcn_mnist-rows", "kernels-smpconv_tcn_mnist-shuffled"}
    assert {path.stem for path in figures.iterdir()} == names
    assert all(path.read_bytes().startswith(PNG) for path in figures.iterdir())
    page = out.read_text(encoding="utf-8")
    assert "NOT what its card says" in page and "could not be drawn again" in page
    assert "../clone/weights/smpconv_tcn_mnist.rows.safetensors" in page and "http" not in page


def test_without_a_clone_the_command_says_where_the_logs_are(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, error = call("report", "--out", str(tmp_path / "x" / "report.html"), "--repository", str(tmp_path))
    assert (status, out) == (1, "") and "--repository" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
