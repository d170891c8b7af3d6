"""Series inside the aeon package and MNIST-1D: found without importing anything, verified, normalised, dropped."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import ROOT

from smpconv_zoo.data import mnist1d, ucr
from smpconv_zoo.data.protocol import dropped_positions
from smpconv_zoo.evaluation.test_sets import open_test_set
from smpconv_zoo.pretrained.cards import checkpoint_card
from smpconv_zoo.training.arrays import ArrayData, load_parts
from smpconv_zoo.training.augment import augment_series
from smpconv_zoo.training.recipe import SequenceRecipe, make_recipe
from smpconv_zoo.training.world import World

HEADER = "@problemName Small\n@timeStamps false\n@classLabel true a b\n@data\n"
TRAIN = HEADER + "1,2,3,6:0,0,0,0:a\n-1,-2:4,8:b\n5,1,1:2,2,2:a\n0,0,0,0:1,1,1,1:b\n"
TEST = HEADER + "7,7,7:1,2,3:b\n2,4,6,8:1,1,1,1:a\n"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of two channels and up to four steps in the place of GunPoint, inside a package that stands in for aeon."""
    folder = tmp_path / "datasets" / "data" / "Small"
    folder.mkdir(parents=True)
    for part, text in (("TRAIN", TRAIN), ("TEST", TEST)):
        (folder / f"Small_{part}.ts").write_text(text)
    hashes = (hashlib.sha256(text.encode()).hexdigest() for text in (TRAIN, TEST))
    spec = ModuleSpec("aeon", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(ucr, "find_spec", lambda name: spec)
    monkeypatch.setitem(ucr.UCR_SETS, "gunpoint", ucr._Set("Small", 4, ("a", "b"), *hashes))
    return folder


def recipe(**values: Any) -> SequenceRecipe:
    given = {"network": "smpconv_tcn", "data": "gunpoint", "epochs": 3, "batch_size": 2, "lr": 1e-3, **values}
    made = make_recipe("smpconv_tcn.gunpoint", given)
    assert isinstance(made, SequenceRecipe)
    return made


def test_parts_are_the_archives_and_scaled_by_what_is_learned_from(small: Path) -> None:
    parts = ucr.load_ucr("gunpoint")
    assert parts.classes == ("a", "b")
    assert parts.train[1].tolist() == [0, 1, 0, 1] and parts.test[1].tolist() == [1, 0]
    # Of the training values as they were read: what lengthens them is not counted, nor is a test value.
    first = np.array([1, 2, 3, 6, -1, -2, 5, 1, 1, 0, 0, 0, 0])
    second = np.array([0, 0, 0, 0, 4, 8, 2, 2, 2, 1, 1, 1, 1])
    assert parts.mean == pytest.approx([first.mean(), second.mean()])
    assert parts.std == pytest.approx([first.std(), second.std()])
    padded = torch.tensor([[-1.0, -2, -2, -2], [4, 8, 8, 8]])
    expected = (padded - torch.tensor(parts.mean)[:, None]) / torch.tensor(parts.std)[:, None]
    torch.testing.assert_close(parts.train[0][1], expected)
    torch.testing.assert_close(parts.test[0][0, 0], torch.full((4,), float((7 - first.mean()) / first.std())))


def test_dropped_steps_are_zero_and_say_so(small: Path) -> None:
    parts = ucr.load_ucr("gunpoint", 50)
    x = torch.cat([parts.train[0], parts.test[0]])
    assert x.shape == (6, 3, 4) and (parts.mean[-1], parts.std[-1]) == (0.0, 1.0)
    # The draws of CharacterTrajectories: training series first, then the test series.
    gone = torch.zeros(6, 4).scatter(1, dropped_positions(6, 4, 50), 1.0).bool()
    assert torch.equal(x[:, 2], (~gone).float())
    assert (x[:, :2].transpose(1, 2)[gone] == 0).all()
    # Statistics see what was observed alone.
    real = torch.tensor([4, 2, 3, 4])[:, None] > torch.arange(4)
    raw = parts.train[0][:, 0] * parts.std[0] + parts.mean[0]
    seen = raw[real & ~gone[:4]]
    assert parts.mean[0] == pytest.approx(seen.mean().item(), abs=1e-6)
    assert parts.std[0] == pytest.approx(seen.std(correction=0).item(), abs=1e-6)


@pytest.mark.parametrize("rate", [-1, 100])
def test_other_percentages_and_names_are_refused(rate: int) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 100\)"):
        ucr.load_ucr("gunpoint", rate)
    with pytest.raises(ValueError, match="no set 'coffee' inside aeon; there are acsf1, arrowhead"):
        ucr.load_ucr("coffee")


def test_other_content_a_missing_file_and_no_package(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "Small_TEST.ts").write_text(TEST.replace("7,7,7", "7,7,8"))
    with pytest.raises(ValueError, match=r"Small_TEST\.ts has unexpected content: sha256 [0-9a-f]{64}, expected"):
        ucr.load_ucr("gunpoint")
    (small / "Small_TEST.ts").unlink()
    with pytest.raises(FileNotFoundError, match=r"aeon lacks .*Small_TEST\.ts: pip install"):
        ucr.load_ucr("gunpoint")
    monkeypatch.setattr(ucr, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install --no-deps "aeon>=1\.6"'):
        ucr.load_ucr("gunpoint")


def test_a_recipe_learns_from_them_and_leaves_the_test_part_closed(small: Path) -> None:
    parts = ucr.load_ucr("gunpoint")
    sound = load_parts(recipe(held_out=0.5))
    assert sound.validation is not None
    assert sorted(sound.train[1].tolist()) == sorted(sound.validation[1].tolist()) == [0, 1]
    assert sorted(map(tuple, torch.cat([sound.train[0], sound.validation[0]]).flatten(1).tolist())) == sorted(
        map(tuple, parts.train[0].flatten(1).tolist())
    )
    others = [load_parts(recipe(held_out=0.5, held_out_draw=draw)).train[0] for draw in range(6)]
    assert torch.equal(others[0], sound.train[0]) and any(not torch.equal(other, others[0]) for other in others)
    whole = load_parts(recipe(held_out=0))
    assert whole.validation is None and torch.equal(whole.train[0], parts.train[0]) and "last epoch" in whole.split
    assert load_parts(recipe(), final=True).validation is None
    reference = load_parts(recipe(protocol="reference"))
    assert reference.validation is not None and torch.equal(reference.validation[0], parts.test[0])
    assert load_parts(recipe(dropped=50)).train[0].shape[1] == 3
    assert load_parts(recipe()).mean == parts.mean


def test_eval_measures_a_card_on_the_closed_part(small: Path) -> None:
    card = checkpoint_card("smpconv_tcn_mnist.smnist5k")
    for form, rate in (("sequence", 0), ("sequence, 50 % dropped", 50)):
        named = dataclasses.replace(card, data=dataclasses.replace(card.data, name="gunpoint", input=form))
        found = open_test_set(named)
        x, y = ucr.load_ucr("gunpoint", rate).test
        assert len(found) == 2 and torch.equal(found.samples[1][0], x[1]) and found.samples[1][1] == y[1]


@pytest.mark.skipif(find_spec("aeon") is None, reason="needs aeon, which carries the series")
@pytest.mark.parametrize(
    ("name", "shape", "tested"),
    [
        ("acsf1", (100, 1, 1460), 100),
        ("arrowhead", (36, 1, 251), 175),
        ("basic-motions", (40, 6, 100), 40),
        ("gunpoint", (50, 1, 150), 150),
        ("italy-power-demand", (67, 1, 24), 1029),
        ("japanese-vowels", (270, 12, 29), 370),
        ("osuleaf", (200, 1, 427), 242),
    ],
)
def test_the_sets_themselves(name: str, shape: tuple[int, ...], tested: int) -> None:
    parts = ucr.load_ucr(name)
    assert parts.train[0].shape == shape and len(parts.test[1]) == tested
    assert set(parts.train[1].tolist()) == set(range(len(parts.classes))) == set(parts.test[1].tolist())


def test_mnist1d_is_the_authors_and_needs_no_package() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['scipy', 'requests', 'mnist1d']));"
        "from smpconv_zoo.data.mnist1d import mnist1d_sequences as s;"
        "(x, y), (u, v) = s('train'), s('test');"
        "assert x.shape == (4000, 1, 40) and u.shape == (1000, 1, 40) and y.bincount().min() > 380;"
        "assert abs(float(x.mean())) < 1e-2 and abs(float(x.std()) - 1) < 1e-2"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="train or test, got 'validation'"):
        mnist1d.mnist1d_sequences("validation")


def test_mnist1d_drawn_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist1d, "SEED", 43)
    with pytest.raises(ValueError, match="drawn otherwise"):
        mnist1d.mnist1d_sequences("test")


# ---------------------------------------------------------------------------------------------------- changes of series


def test_series_move_by_whole_steps_and_repeat_their_ends() -> None:
    series = torch.arange(10.0).repeat(200, 2, 1) + torch.tensor([0.0, 100.0])[:, None]
    moved = augment_series(series, torch.Generator().manual_seed(0), time_shift=0.2)
    shifts = set()
    for one in moved:
        shift = int(series[0, 0, 5] - one[0, 5])
        shifts.add(shift)
        expected = series[0][:, (torch.arange(10) - shift).clamp(0, 9)]
        assert torch.equal(one, expected)
    assert shifts == {-2, -1, 0, 1, 2}


def test_factors_are_of_channels_and_noise_is_of_values() -> None:
    series = torch.ones(500, 3, 8)
    scaled = augment_series(series, torch.Generator().manual_seed(0), scaling=0.1)
    assert torch.equal(scaled, scaled[:, :, :1].expand(-1, -1, 8))
    assert scaled[:, :, 0].std().item() == pytest.approx(0.1, rel=0.1) and scaled.mean().item() == pytest.approx(
        1, abs=0.02
    )
    noisy = augment_series(series, torch.Generator().manual_seed(0), jitter=0.1)
    assert (noisy - 1).std(dim=2).min() > 0 and (noisy - 1).std().item() == pytest.approx(0.1, rel=0.1)


def test_a_stretch_is_blanked_and_counts_as_not_observed() -> None:
    x = torch.rand(300, 2, 40) + 1
    observed = (torch.rand(300, 1, 40) > 0.3).float()
    series = torch.cat([x * observed, observed], dim=1)
    out = augment_series(series, torch.Generator().manual_seed(0), jitter=0.1, scaling=0.1, time_mask=0.5, masked=True)
    mask = out[:, 2]
    assert set(mask.unique().tolist()) == {0.0, 1.0} and (mask <= observed[:, 0]).all()
    assert (out[:, :2].transpose(1, 2)[mask == 0] == 0).all()
    for lost in (observed[:, 0] - mask).bool():
        places = lost.nonzero()[:, 0]
        # One piece, but for what had not been observed before.
        assert len(places) == 0 or int(places[-1] - places[0]) < 21
    assert 0.1 < float((observed[:, 0] - mask).mean() / observed.mean()) < 0.4


def test_nothing_asked_for_changes_nothing_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    series = torch.rand(3, 2, 5)
    assert torch.equal(augment_series(series, generator), series) and torch.equal(generator.get_state(), before)


def test_recipes_change_what_is_learned_from_alone(small: Path) -> None:
    changed = recipe(jitter=0.1, held_out=0.5)
    data = ArrayData(changed, load_parts(changed), World(torch.device("cpu")))
    plain = recipe(held_out=0.5)
    untouched = ArrayData(plain, load_parts(plain), World(torch.device("cpu")))
    (x, _), (u, _) = next(data.epoch(0)), next(untouched.epoch(0))
    assert not torch.equal(x, u) and (x - u).abs().max() < 1
    assert torch.equal(next(data.validation())[0], next(untouched.validation())[0])


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"jitter": -0.1}, "jitter is a deviation"),
        ({"time_mask": 0.6}, "time_mask is a share"),
        ({"held_out_draw": -1}, "held_out_draw"),
        ({"data": "mnist1d", "dropped": 30}, "recorded"),
        ({"data": "mnist5k", "scaling": 0.1}, "scaling change series, and mnist5k holds pictures"),
        ({"augment": True}, "augment changes pictures"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_parts(recipe(**values))
