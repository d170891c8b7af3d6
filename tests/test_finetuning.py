"""Fine-tuning from folders of the user's own pictures and sequences, to a network that predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from smpconv_zoo.predicting import predict_files
from smpconv_zoo.pretrained.cards import load_card
from smpconv_zoo.pretrained.store import CheckpointError, read_safetensors
from smpconv_zoo.training import finetuning
from smpconv_zoo.training.finetuning import FREEZES, find_start, finetune, freeze_, image_values, sequence_values
from smpconv_zoo.training.recipe import make_recipe
from smpconv_zoo.verifying import failed, verify

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
# The first steps of a network without weights: what they learn is the mean colour.
QUICK = {"lr": 1e-2, "batch_size": 8, "image_size": 32, "color_jitter": 0.0, "auto_augment": None, "erasing": 0.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of each of three colours."""
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "my colours"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.clip(np.array(colour) + draw.normal(0, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def sequences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two channels of 40 steps: the class is the frequency of the first, the second is noise in a unit of its own."""
    draw = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data") / "waves"
    time = np.arange(40) / 40
    for name, frequency in (("flat", 0), ("fast", 6), ("slow", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            wave = np.sin(2 * np.pi * frequency * time + draw.uniform(0, 6)) + draw.normal(0, 0.1, 40)
            values = np.stack([wave, draw.normal(300, 50, 40)]).astype(np.float32)
            if i % 2:
                np.save(folder / name / f"{i}.npy", values)
            else:
                np.savetxt(folder / name / f"{i}.csv", values, delimiter=",")
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on the pictures, from random weights."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    return finetune("test_smpconv", pictures, out, overrides={**QUICK, "epochs": 14}, workers=0, license="CC0")


@pytest.fixture(scope="module")
def heard(sequences: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run on the sequences, from random weights."""
    out = tmp_path_factory.mktemp("runs") / "waves"
    return finetune("test_smpconv_tcn", sequences, out, overrides={"epochs": 40, "lr": 1e-2, "held_out": 0.2})


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / "model.safetensors")[0]


# --- from a folder to predictions


def test_pictures_become_a_network_that_tells_them_apart(trained: Any, pictures: Path) -> None:
    assert trained.classes == ("blue", "green", "red")
    assert trained.outcome.best.top1 > 90
    assert failed(verify(trained.folder)) is None
    assert trained.predict_command == f"smpconv-zoo predict local-dir:{trained.folder} FILES"
    found = predict_files(f"local-dir:{trained.folder}", [pictures])
    right = [row.name == Path(row.file).parent.name for row in found.predictions]
    assert len(right) == 72 and sum(right) > 65
    model: Any = timm.create_model(f"local-dir:{trained.folder}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32) and model.num_classes == 3


def test_its_card_says_how_it_came_to_be(trained: Any) -> None:
    card = load_card(trained.folder / "card.json")
    assert card == trained.card and card.id == "test_smpconv.my_colours"
    assert card.arguments["img_size"] == 32 and card.arguments["num_classes"] == 3
    assert (card.data.input, card.license) == ("image 32 x 32", "CC0")
    assert "held out" in card.data.split and card.measured is None
    best = trained.outcome.best
    assert card.training is not None and f"{best.top1:.2f} %: epoch {best.epoch} of" in card.training.chosen_by
    assert card.origin == "trained by smpconv_zoo from random initialisation"


def test_the_best_epoch_is_kept_not_the_last(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smpconv_zoo.training.engine import Engine

    measured = iter([{"loss": 2.0, "top1": 50.0, "top5": 50.0}, {"loss": 1.0, "top1": 60.0, "top5": 60.0}])
    worse = {"loss": 3.0, "top1": 10.0, "top5": 10.0}
    monkeypatch.setattr(Engine, "_measure", lambda self: next(measured, worse))
    states: list[dict[str, torch.Tensor]] = []
    write = Engine._write_weights

    def noted(self: Engine, name: str) -> None:
        if name == "best":
            states.append({key: tensor.clone() for key, tensor in self.measured.state_dict().items()})
        write(self, name)

    monkeypatch.setattr(Engine, "_write_weights", noted)
    done = finetune(
        "test_smpconv", pictures, tmp_path / "run", overrides={**QUICK, "epochs": 9, "early_stop": 3}, workers=0
    )
    assert done is not None and done.outcome.best is not None and done.outcome.stopped_early
    assert (done.outcome.best.epoch, done.outcome.last.epoch) == (2, 5)
    assert len(states) == 2
    saved = state_of(done.folder)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in states[1].items())


def test_sequences_become_a_network_that_tells_them_apart(heard: Any, sequences: Path) -> None:
    assert heard.classes == ("fast", "flat", "slow")
    card = load_card(heard.folder / "card.json")
    assert card.arguments["kernel_size"] == 40 and card.arguments["in_chans"] == 2
    assert failed(verify(heard.folder)) is None
    found = predict_files(f"local-dir:{heard.folder}", [sequences])
    right = [row.name == Path(row.file).parent.name for row in found.predictions]
    # Files in their own unit: mean and deviation are in the network's folder.
    assert len(right) == 60 and sum(right) >= 48
    cfg = timm.create_model(f"local-dir:{heard.folder}", pretrained=True).pretrained_cfg
    assert cfg["input_size"] == (2, 1, 40) and cfg["mean"][1] == pytest.approx(300, abs=5)


# --- from weights


def test_a_network_of_ones_own_goes_on_at_another_size(trained: Any, pictures: Path, tmp_path: Path) -> None:
    seen: list[nn.Module] = []
    done = finetune(
        f"local-dir:{trained.folder}",
        pictures,
        tmp_path / "run",
        overrides={**QUICK, "epochs": 6, "image_size": 48, "lr": 2e-3},
        keep_head=True,
        workers=0,
        on_plan=lambda _, model: seen.append(model),
    )
    assert done is not None and done.outcome.best is not None
    # From random weights six such epochs end at a third, which is chance; the kernels were read off at the new size.
    assert done.outcome.best.top1 > 90
    assert done.card.arguments["img_size"] == 48 and done.card.origin.endswith(f"from local-dir:{trained.folder}")
    assert failed(verify(done.folder)) is None
    model: Any = timm.create_model(f"local-dir:{done.folder}", pretrained=True)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)


@pytest.mark.parametrize("keep_head", [True, False])
def test_a_new_classifier_unless_it_is_kept(keep_head: bool, trained: Any, pictures: Path, tmp_path: Path) -> None:
    before, seen = state_of(trained.folder), {}
    finetune(
        f"local-dir:{trained.folder}",
        pictures,
        tmp_path / "run",
        overrides={"epochs": 1, "batch_size": 8},
        keep_head=keep_head,
        workers=0,
        dry_run=True,
        on_plan=lambda _, model: seen.update(model.state_dict()),
    )
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in seen.items() if not name.startswith("head.fc"))
    assert torch.equal(seen["head.fc.weight"], before["head.fc.weight"]) == keep_head
    if not keep_head:
        assert not seen["head.fc.bias"].any() and 0.005 < seen["head.fc.weight"].std() < 0.015


@pytest.mark.parametrize(("length", "arguments"), [(784, {}), (40, {"length": 40})])
def test_kernels_of_weights_are_read_off_for_other_lengths(
    length: int, arguments: dict[str, int], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        np.save(tmp_path / "data" / name / "x.npy", np.random.default_rng(0).random((8, 1, length), np.float32))
    done = finetune(
        "smpconv_tcn_mnist", tmp_path / "data", tmp_path / "run", overrides={"epochs": 1, "lr": 1e-6}, freeze="backbone"
    )
    assert done is not None
    expected = {"num_classes": 2, "in_chans": 1, "drop_path_rate": 0.0, **arguments}
    assert done.card.arguments == expected and failed(verify(done.folder)) is None
    model: Any = timm.create_model("smpconv_tcn_mnist", pretrained=True, **arguments)
    saved = state_of(done.folder)
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.fc") or torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("freeze", FREEZES)
def test_what_is_frozen_stays_bit_for_bit(freeze: str, trained: Any, pictures: Path, tmp_path: Path) -> None:
    before = state_of(trained.folder)
    done = finetune(
        f"local-dir:{trained.folder}",
        pictures,
        tmp_path / "run",
        overrides={"epochs": 1, "batch_size": 8},
        freeze=freeze,
        workers=0,
    )
    assert done is not None
    after = state_of(done.folder)
    # Buffers among them: batch norms go on with the statistics that they have.
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    moved = {name for name in before if name not in same and not name.endswith("grid")}
    kept = {"none": set(), "stem": {"stem"}, "backbone": {"stem", "stages", "norm"}}[freeze]
    assert {name for name in before if name.split(".")[0] in kept} <= same
    assert {name.split(".")[0] for name in moved} == {"stem", "stages", "norm", "head"} - kept


def test_frozen_norms_stay_in_eval_mode_and_learn_nothing() -> None:
    model: Any = timm.create_model("test_smpconv_tcn")
    freeze_(model, "backbone")
    x = torch.randn(4, 1, 32)
    model.train()
    model(x)
    assert not model.blocks[0].conv1.large.norm.training and model.head.training
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.fc.weight", "head.fc.bias"]
    with pytest.raises(ValueError, match="SMPConvTCN has no layers in front of the first block to freeze"):
        freeze_(model, "stem")


def test_a_run_goes_on_after_an_interrupt_as_if_there_had_been_none(pictures: Path, tmp_path: Path) -> None:
    def run(out: str, stop_at: int | None = None, **options: Any) -> Any:
        def step(done: int, _: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        overrides = {**QUICK, "epochs": 3}
        return finetune(
            "test_smpconv", pictures, tmp_path / out, overrides=overrides, workers=0, on_step=step, **options
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=12)
    with pytest.raises(FileExistsError, match="go on with it by --resume"):
        run("cut")
    resumed = run("cut", resume=True)
    assert resumed.card.files[0].sha256 == whole.card.files[0].sha256
    before = {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds a finished run, network and all"):
        run("cut", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "cut").rglob("*") if path.is_file()}


# --- where to start from


def test_starts() -> None:
    assert not find_start("smpconv_tcn").pretrained and find_start("smpconv_tcn").takes_sequences
    start = find_start("smpconv_resnet_mnist")
    assert (start.name, start.pretrained, start.takes_sequences) == ("smpconv_resnet_mnist.mnist5k", True, False)
    assert start.classes == tuple("0123456789")
    assert find_start("smpconv_tcn_mnist").name == "smpconv_tcn_mnist.smnist5k"
    assert find_start("smpconv_tcn_mnist.pmnist5k").name == "smpconv_tcn_mnist.pmnist5k"
    assert find_start("smpconv_t", pretrained=False) == finetuning.Start("smpconv_t", "smpconv_t", False, {}, None)


@pytest.mark.parametrize(
    ("name", "pretrained", "error", "message"),
    [
        ("smpconv_t", None, CheckpointError, r"run `smpconv-zoo import smpconv_t.in1k`, or download .*--no-pretrained"),
        ("smpconv_t", True, CheckpointError, r"run `smpconv-zoo import smpconv_t.in1k`"),
        ("smpconv_tcn", True, ValueError, "has no checkpoint to start from: leave --pretrained out"),
        ("smpconv_tt", None, ValueError, "did you mean smpconv_t"),
        ("smpconv_tcn_mnist.smnist5", None, ValueError, "did you mean smpconv_tcn_mnist.smnist5k"),
        ("smpconv_tcn_mnist.smnist5k", False, ValueError, "names weights, to start without any give the network's"),
        ("local-dir:nowhere", False, ValueError, "names weights"),
        ("local-dir:nowhere", None, FileNotFoundError, r"nowhere is no folder of a network: it has no config.json"),
    ],
)
def test_what_cannot_be_started_from(
    name: str, pretrained: bool | None, error: type[Exception], message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        finetune(name, pictures, tmp_path / "run", pretrained=pretrained)
    assert list(tmp_path.iterdir()) == []


# --- recipes


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("samples", [2, 15, 16, 100, 100_000])
def test_defaults_make_recipes(samples: int, pretrained: bool) -> None:
    for values in (image_values(pretrained, samples), image_values(pretrained, samples, "cuda")):
        recipe = make_recipe("test_smpconv.a", {"network": "test_smpconv", **values})
        assert 2 <= recipe.batch_size <= 64 and recipe.batch_size <= max(2, samples)
        assert recipe.protocol == "sound" and recipe.early_stop and (recipe.layer_decay is not None) == pretrained
    recipe = make_recipe("test_smpconv_tcn.a", {"network": "test_smpconv_tcn", **sequence_values(pretrained, samples)})
    assert recipe.data == "series" and (recipe.layer_decay is not None) == pretrained


def test_one_epoch_needs_no_warm_up(pictures: Path, tmp_path: Path) -> None:
    recipes: list[Any] = []
    for epochs, warmup in ((1, 0), (2, 1), (10, 2)):
        overrides = {"epochs": epochs, "arguments": {"drop_path_rate": 0.3}}
        finetune(
            "test_smpconv",
            pictures,
            tmp_path / "run",
            overrides=overrides,
            workers=0,
            dry_run=True,
            on_recipe=recipes.append,
        )
        assert recipes[-1].warmup_epochs == warmup
    assert recipes[-1].arguments == {"num_classes": 3, "drop_path_rate": 0.3}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "head"}, "freeze must be one of none, stem, backbone, got 'head'"),
        ({"keep_head": True}, "test_smpconv starts from random weights, there is no classifier to keep"),
        ({"overrides": {"epoch": 3}}, "no field 'epoch'; did you mean epochs"),
        ({"overrides": {"arguments": {"num_classes": 5}}}, "the data have 3 classes, num_classes asks for another"),
        ({"overrides": {"arguments": [1]}}, "arguments must be a mapping"),
        ({"overrides": {"epochs": "many"}}, "epochs must be int"),
        ({"overrides": {"batch_size": 128}}, "lower batch_size"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        finetune("test_smpconv", pictures, tmp_path / "run", workers=0, **options)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_are_not_those_of_a_kept_classifier(
    trained: Any, sequences: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"3 that it does not know \(blue, green, red\) and 10 too few \(0, 1, 2, \.\.\.\)"
    ):
        finetune("smpconv_resnet_mnist", pictures, tmp_path / "run", keep_head=True)
    other = tmp_path / "other"
    for name in ("blue", "red"):
        (other / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (32, 32)).save(other / name / f"{i}.png")
    with pytest.raises(ValueError, match=r"do not match those of local-dir:.*: 1 too few \(green\)"):
        finetune(f"local-dir:{trained.folder}", other, tmp_path / "run", keep_head=True)
    with pytest.raises(ValueError, match="holds no picture"):
        finetune(f"local-dir:{trained.folder}", sequences, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_files_is_left_as_it_is(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds other files"):
        finetune("test_smpconv", pictures, tmp_path, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- the command line


def test_the_command_line(
    pictures: Path, sequences: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ["finetune", "test_smpconv", "--data-dir", str(pictures), "--out", str(tmp_path / "run")]
    arguments += ["--epochs", "1", "--batch-size", "8", "--image-size", "32", "--workers", "0"]
    status, out, err = call(*arguments, "--dry-run")
    assert status == 0 and "chosen by" in out and "starts from random weights" in err
    assert list(tmp_path.iterdir()) == []
    status, out, _ = call(*arguments, "--lr", "1e-3", "--set", "smoothing=0", "--json")
    assert status == 0
    told = json.loads(out)
    assert told["classes"] == ["blue", "green", "red"] and told["best"]["epoch"] == 1
    # What it says to do next works.
    program, *rest, files = told["predict"].split()
    assert (program, files) == ("smpconv-zoo", "FILES")
    status, out, _ = call(*rest, str(pictures / "red" / "0.png"))
    assert status == 0 and "red" in out
    status, _, err = call(*arguments)
    assert status == 1 and "holds a finished run" in err
    status, out, _ = call(
        *("finetune", "test_smpconv_tcn", "--data-dir", str(sequences), "--out", str(tmp_path / "tcn")),
        *("--epochs", "1", "--no-pretrained", "--set", "arguments={dims: [4, 4]}"),
    )
    assert status == 0 and f"next    smpconv-zoo predict local-dir:{tmp_path / 'tcn' / 'network'} FILES" in out
    assert load_card(tmp_path / "tcn" / "network" / "card.json").arguments["dims"] == [4, 4]
