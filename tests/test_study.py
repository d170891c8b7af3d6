"""`eval/study.py`: which runs there are, how options are chosen, what a log survives, and one run of each kind."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from golden_files import ROOT

from smpconv_zoo.training.recipe import load_recipe


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study", ROOT / "eval" / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return module


def record(option: str, seed: int, top1: float, loss: float = 1.0, **values: Any) -> dict[str, Any]:
    return {
        "stage": "choose",
        "data": "gunpoint",
        "kernel": "fixed",
        "option": option,
        "seed": seed,
        "validation_top1": top1,
        "validation_loss": loss,
        **values,
    }


def test_every_run_has_a_name_of_its_own_and_a_recipe(study: ModuleType) -> None:
    jobs = study.jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.data for job in jobs} == set(study.DATA)
    waiting = [job for job in jobs if job.option == "chosen"]
    assert {(job.data, job.kernel) for job in waiting} == {(d, k) for d, s in study.DATA.items() for k in s.kernels}
    for job in jobs:
        if job.option != "chosen" and job.stage != "time":
            recipe = study.recipe_of(job)
            assert recipe.seed == job.seed and recipe.lr == 1e-3 and recipe.protocol == "sound"
            assert recipe.held_out_draw == (job.seed if job.stage == "choose" else 0)


def test_the_settings_of_the_reference_and_of_options(study: ModuleType) -> None:
    plain = study.recipe_of(study.Job("final", "acsf1", "points", "", 1))
    assert plain.arguments == {"in_chans": 1, "num_classes": 10, "kernel_size": 1460, "init_radius": 0.001097}
    assert (plain.epochs, plain.batch_size, plain.warmup_epochs) == (300, 32, 15)
    wide = study.recipe_of(study.Job("final", "acsf1", "points", "mean+wide+spread", 1))
    assert wide.arguments["init_radius"] == pytest.approx(3 * 2 / 1459, rel=1e-3)
    assert (wide.arguments["global_pool"], wide.arguments["coord_std"]) == ("avg", 0.5)
    short = study.recipe_of(study.Job("final", "gunpoint", "short", "augment", 0))
    assert (short.arguments["kernel"], short.arguments["kernel_size"], short.jitter) == ("fixed", 32, 0.05)
    digits = study.recipe_of(study.Job("final", "pmnist5k", "mlp", "augment", 0))
    assert digits.arguments == {"kernel": "mlp", "omega": 43.46, "kernel_size": 784} or digits.arguments == {
        "kernel": "mlp",
        "omega": 43.46,
    }
    shipped = load_recipe("smpconv_tcn_mnist.pmnist5k")
    assert (digits.augment, digits.input_drop_rate, digits.epochs) == (True, shipped.input_drop_rate, shipped.epochs)
    with pytest.raises(ValueError, match="no option 'mixup'"):
        study.recipe_of(study.Job("final", "gunpoint", "points", "mixup", 0))


def test_options_are_chosen_by_means_on_held_out_data(study: ModuleType) -> None:
    records = [record(option, seed, 50.0) for option in ("", "mean", "mean+augment") for seed in range(3)]
    records[4] = record("mean", 1, 80.0)
    assert study.choice(records, "gunpoint", "fixed") == "mean"
    assert study.choice(records[:-1], "gunpoint", "fixed") is None
    assert study.choice(records, "gunpoint", "points") is None
    # What final runs show on the test data has no say.
    records += [record("mean+augment", 0, 100.0, 0.0, stage="final") for _ in range(9)]
    assert study.choice(records, "gunpoint", "fixed") == "mean"
    records[4] = record("mean", 1, 50.0)
    assert study.choice(records, "gunpoint", "fixed") == ""
    records[8] = record("mean+augment", 2, 50.0, 0.5)
    assert study.choice(records, "gunpoint", "fixed") == "mean+augment"
    vowels = [{**r, "data": "japanese-vowels"} for r in records]
    assert study.choice(vowels, "japanese-vowels-70", "fixed") == "mean+augment"
    assert study.choice([], "mnist5k-images", "points") == "augment"


def test_a_chosen_run_waits_for_the_choice_and_is_not_made_twice(study: ModuleType) -> None:
    job = study.Job("final", "gunpoint", "fixed", "chosen", 0)
    todo = [job]
    assert study._next(todo, {}, [], set()) is None and todo == [job]
    records = [
        record(option, seed, 50.0 + (option == "mean")) for option in ("", "mean", "mean+augment") for seed in range(3)
    ]
    found = study._next(todo, {}, records, set())
    assert found == study.Job("final", "gunpoint", "fixed", "mean", 0) and todo == []
    todo = [job]
    assert study._next(todo, {}, records, {found.name}) is None and todo == []


def test_half_a_line_is_passed_over_and_ended(study: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    study.append(path, {"job": "a"})
    with path.open("a") as file:
        file.write('{"job": "b", "te')
    study.append(path, {"job": "c"})
    study.append(path, {"job": "d", "error": "OSError: no"})
    assert [r["job"] for r in study.read_log(path)] == ["a", "c"]


def test_runs_measure_what_they_may(study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"dims": [4, 4], "n_points": 3}
    made = study.recipe_of

    def small(job: Any, epochs: int | None = None) -> Any:
        recipe = made(job, epochs)
        return study.dataclasses.replace(recipe, arguments={**recipe.arguments, **tiny})

    monkeypatch.setattr(study, "recipe_of", small)

    def closed(*_: Any) -> Any:
        raise AssertionError("the test part was opened")

    opened = study.test_part
    monkeypatch.setattr(study, "test_part", closed)
    choosing = study.run(study.Job("choose", "mnist1d", "fixed", "mean", 0), "cpu", None, "command", True, 1)
    assert "test" not in choosing and choosing["train"] == 3200 and choosing["validation_top1"] > 0
    monkeypatch.setattr(study, "test_part", opened)
    final = study.run(study.Job("final", "mnist1d", "points", "", 0), "cpu", str(tmp_path), "command", True, 1)
    assert final["validation_top1"] is None and final["train"] == 4000
    assert final["test"]["total"] == 1000 and final["test"]["top1"] == final["test"]["correct"] / 10
    assert (tmp_path / final["weights"]["file"]).is_file()
    assert json.loads(json.dumps(final)) == final
    assert "mnist1d" in study.summary([choosing, final])


def test_the_page_of_the_study_is_made_of_its_log(study: ModuleType) -> None:
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    tables = re.search(r"<!-- study: .*? -->\n(.*?)<!-- end -->", page, flags=re.S)
    assert tables is not None
    assert tables[1] == study.markdown(study.read_log(ROOT / "eval" / "results" / "study.jsonl"))
    # The commands are those of the script.
    for line in re.findall(r"^python eval/study\.py.*$", page, flags=re.M):
        assert set(re.findall(r"--[a-z]+", line)) <= set(
            re.findall(r"--[a-z]+", (ROOT / "eval" / "study.py").read_text(encoding="utf-8"))
        )


def test_the_tables_say_what_was_not_run(study: ModuleType) -> None:
    def final(option: str, seed: int, top1: float, kernel: str = "fixed") -> dict[str, Any]:
        test = {"top1": top1, "correct": 1, "total": 2}
        return record(option, seed, 0.0, stage="final", kernel=kernel, parameters=1234, test=test, alone=False)

    tried = [record(option, i, 90.0 if option == "mean" else 80.0) for option in ("", "mean") for i in range(3)]
    timed = {"data": "mnist1d", "kernel": "points", "option": "", "stage": "time", "step_ms": 2.5}
    records = [
        *tried,
        *(final("", seed, 70.0 + seed) for seed in range(5)),
        *(final("mean", seed, 90.0 + 2 * seed) for seed in range(2)),
        final("mean+augment", 0, 95.0),
        {**timed, "alone": True},
        {**timed, "data": "acsf1", "alone": False},
    ]
    text = study.markdown(records)
    assert "| gunpoint | fixed | 1,234 | 72.00 ± 1.58 (5) | mean | 91.00 ± 1.41 (2) |  |\n" in text
    assert "| gunpoint | points |  |  |  |  |  |\n" in text
    assert "| mnist1d | points |  |  |  |  | 2.50 |\n" in text and "| acsf1 | points |  |  |  |  |  |\n" in text
    assert "- gunpoint, fixed: runs to choose by mean+augment\n" in text
    assert "- gunpoint, fixed: 3 of 5 seeds with the chosen options\n" in text
    assert "- the time of a step with the GPU alone: 14 of 15 jobs\n" in text
    assert "added:\n\n- gunpoint fixed mean+augment: 95.00 (1)\n" in text
    # What others publish stays in its own columns.
    assert "| gunpoint |  |  | 100.00 | 100.00 | 100.00 |  |\n" in text
    assert "| mnist1d |  |  |  |  |  | MLP 68, CNN 94, GRU 91 |\n" in text
