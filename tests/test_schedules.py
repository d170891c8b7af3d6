"""Learning rates against the reference's, step by step, and the properties of the schedule for new work."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden_files import golden
from hypothesis import given
from hypothesis import strategies as st

from smpconv_zoo.training.schedules import cosine_schedule, sequence_schedule, warmup_cosine

# float64 formulas written in another order
EXACT = {"rtol": 1e-12, "atol": 1e-18}
# The reference multiplies up to 226,000 factors; our closed form has none of their rounding.
RECURSION = {"rtol": 1e-9, "atol": 0.0}

RUNS = ("smnist", "pmnist", "scifar10", "chartrajectories", "speechcommands_mfcc", "speechcommands_raw", "cifar10")


def test_cosine_schedule_in_every_stored_case() -> None:
    cases = json.loads(golden("cosine_scheduler.json").read_text())["cases"]
    assert len(cases) == 6
    for case in cases:
        settings = case["settings"]
        values = cosine_schedule(
            settings["base_value"],
            settings["final_value"],
            settings["epochs"],
            settings["niter_per_ep"],
            warmup_epochs=settings.get("warmup_epochs", 0),
            start_warmup=settings.get("start_warmup_value", 0.0),
            warmup_steps=settings.get("warmup_steps", -1),
        )
        np.testing.assert_allclose(values, case["values"], **EXACT)


def test_cosine_schedule_refuses_what_makes_the_reference_fail() -> None:
    stored = json.loads(golden("cosine_scheduler.json").read_text())
    assert stored["warmup_steps_without_warmup_epochs"] == "AssertionError"
    with pytest.raises(ValueError, match="warmup_steps=3 needs warmup_epochs"):
        cosine_schedule(0.1, 0.0, 2, 5, warmup_steps=3)


def test_cosine_schedule_at_the_edges() -> None:
    np.testing.assert_allclose(cosine_schedule(0.1, 0.0, 1, 5, warmup_epochs=1), np.linspace(0, 0.1, 5), **EXACT)
    assert cosine_schedule(0.1, 0.0, 1, 1).tolist() == [0.1]
    with pytest.raises(ValueError, match="6 of 5 steps"):
        cosine_schedule(0.1, 0.0, 1, 5, warmup_epochs=1, warmup_steps=6)
    with pytest.raises(ValueError, match="10 of 5 steps"):
        cosine_schedule(0.1, 0.0, 1, 5, warmup_epochs=2)
    for sizes in [(0, 5, 0), (5, 0, 0), (5, 5, -1)]:
        with pytest.raises(ValueError, match="must be positive"):
            cosine_schedule(0.1, 0.0, *sizes)


@pytest.mark.parametrize("run", RUNS)
def test_sequence_schedule_of_each_published_run(run: str) -> None:
    stored = json.loads(golden("seq_lr_schedules.json").read_text())["runs"]
    assert set(stored) == set(RUNS)
    stored = stored[run]
    assert stored["columns"] == ["step", "others", "no_decay", "radius"]
    table = np.array(stored["lr_used_at_step"])
    steps = table[:, 0].astype(int)
    total, warmup = stored["total_steps"], stored["warmup_steps"]
    assert steps[-1] == total - 1
    for column, base in ((1, stored["base_lr"]), (2, stored["base_lr"]), (3, stored["radius_lr"])):
        rates = sequence_schedule(base, total, warmup, final=stored["eta_min"])
        assert rates.shape == (total,)
        np.testing.assert_allclose(rates[steps], table[:, column], **RECURSION)


def test_sequence_schedule_step_by_step() -> None:
    short = json.loads(golden("seq_lr_schedules.json").read_text())["short"]
    training = json.loads(golden("seq_train.json").read_text()).values()
    runs = [(run, run["lr_used_at_step"]) for run in short]
    runs += [(run["train"], run["lr_used_at_step"]) for run in training]
    assert len(runs) == 5
    for settings, table in runs:
        steps_per_epoch = math.ceil(settings["dataset_size"] / settings["batch_size"])
        total = settings["epochs"] * steps_per_epoch
        warmup = max(settings["warmup_epochs"], 0) * steps_per_epoch  # the reference's -1 is no warm-up
        for column, factor in enumerate((1, 1, settings["radius_lr_factor"])):
            rates = sequence_schedule(settings["lr"] * factor, total, warmup)
            np.testing.assert_allclose(rates, np.array(table)[:, column], **RECURSION)


@given(st.integers(1, 30), st.integers(1, 60))
def test_sequence_schedule_is_torchs_recursion_from_the_overshoot(warmup: int, after: int) -> None:
    total = warmup + after
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=after, eta_min=1e-6)
    rates = []
    for step in range(total):
        if step <= warmup + 1:
            optimizer.param_groups[0]["lr"] = 0.01 * step / warmup
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        if step > warmup:
            cosine.step()
    np.testing.assert_allclose(sequence_schedule(0.01, total, warmup), rates, **RECURSION)


def test_warmup_cosine_by_hand() -> None:
    cosine = [2 + 2 * math.cos(math.pi * k / 4) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(warmup_cosine(4.0, 6, 2), [2.0, 4.0, *cosine], **EXACT)


@given(st.integers(2, 80), st.data(), st.floats(1e-5, 1.0), st.floats(0.0, 1.0))
def test_warmup_cosine_rises_to_base_and_falls_to_final(
    total: int, data: st.DataObject, base: float, fraction: float
) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    final = fraction * base
    rates = warmup_cosine(base, total, warmup, final)
    assert rates.shape == (total,)
    peak = max(warmup - 1, 0)
    assert rates[0] == pytest.approx(base / max(warmup, 1), rel=1e-12)
    assert rates[peak] == pytest.approx(base, rel=1e-12)
    assert rates[-1] == pytest.approx(final, rel=1e-12, abs=1e-15)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) <= 1e-15).all()


def test_one_step_of_training_uses_base() -> None:
    assert warmup_cosine(0.1, 1, 0).tolist() == [0.1]


@pytest.mark.parametrize("schedule", [sequence_schedule, warmup_cosine])
@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (5, 5), (5, 9), (5, -1)])
def test_warmup_must_be_shorter_than_training(schedule: Callable[..., np.ndarray], total: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"{warmup} of {total} steps"):
        schedule(0.1, total, warmup)
