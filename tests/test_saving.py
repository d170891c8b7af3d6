"""A trained network as a folder that loads, predicts, exports and verifies."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from smpconv_zoo.description import load_described
from smpconv_zoo.predicting import predict_files
from smpconv_zoo.pretrained.cards import Data, load_card
from smpconv_zoo.pretrained.store import CheckpointError
from smpconv_zoo.training import saving
from smpconv_zoo.training.saving import plain_tag, save_network
from smpconv_zoo.verifying import failed, verify

DATA = Data("images of birds", "image 96 x 96", "a tenth set aside to choose by")
NAMES = ["auk", "emu", "кука"]
IMAGE = {"num_classes": 3, "img_size": 96}
SEQUENCE = {"num_classes": 3, "in_chans": 5, "kernel_size": 50, "dims": [6, 6], "n_points": 5}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "image": ("test_smpconv", IMAGE, {"crop_pct": 1.0, "mean": (0.5, 0.4, 0.3)}, (3, 96, 96)),
    "wide image": ("test_smpconv", {**IMAGE, "img_size": [64, 96]}, {}, (3, 64, 96)),
    "image as it is": ("test_smpconv", {"num_classes": 3}, {"interpolation": "bilinear"}, (3, 64, 64)),
    "grey image": ("smpconv_resnet_mnist", {"num_classes": 3, "dims": [4, 4], "img_size": 14}, {}, (1, 14, 14)),
    "sequence": ("smpconv_tcn", SEQUENCE, {"mean": (0.5,) * 5, "std": (1.0, 2.0, 3.0, 4.0, 5.0)}, (5, 50)),
    "longer sequence": ("test_smpconv_tcn", {"num_classes": 3, "length": 48}, {}, (1, 48)),
    "faster sequence": ("test_smpconv_tcn", {"num_classes": 3, "sample_rate": 2.0}, {}, (1, 64)),
}


def trained(network: str, arguments: dict[str, Any]) -> nn.Module:
    """Weights that no initialisation gives: every buffer and parameter moved."""
    torch.manual_seed(0)
    model = timm.create_model(network, **arguments)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "grid" not in name:
                tensor.add_(0.01 * torch.rand_like(tensor))
    return model.eval()


def save(folder: Path, kind: str = "image", **changes: Any) -> tuple[nn.Module, Any]:
    network, arguments, entries, _ = KINDS[kind]
    model = trained(network, arguments)
    settings = {"arguments": arguments, "data": DATA, "entries": {**entries, "label_names": NAMES}, **changes}
    return model, save_network(folder, f"{network}.birds", model, **settings)


def inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_everywhere(kind: str, tmp_path: Path) -> None:
    network, arguments, entries, shape = KINDS[kind]
    folder = tmp_path / "net"
    model, card = save(folder, kind)
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert load_card(folder / "card.json") == card and card.arguments == arguments

    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = inputs(shape)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["label_names"] == NAMES
    assert {name: loaded.pretrained_cfg[name] for name in entries} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in entries.items()
    }
    # As a start for other classes, the rest of the weights come along.
    other: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert other.head.fc.out_features == 7
    assert all(
        torch.equal(tensor, other.state_dict()[name])
        for name, tensor in model.state_dict().items()
        if "head.fc" not in name
    )

    steps = verify(folder)
    assert failed(steps) is None and [step.ok for step in steps[:4]] == [True] * 4
    _, description = load_described(f"local-dir:{folder}")
    assert description.classes == tuple(NAMES) and description.checkpoint == f"{network}.birds"
    assert description.preprocessing.input_size == shape
    mean = entries.get("mean")
    assert mean is None or description.preprocessing.mean == mean


def test_a_loaded_network_goes_to_another_size_again(tmp_path: Path) -> None:
    save(tmp_path / "net")
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, img_size=64)
    plain: Any = timm.create_model("test_smpconv", num_classes=3)
    assert loaded.pretrained_cfg["input_size"] == (3, 64, 64)
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}


def test_the_command_line_takes_it(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    save(tmp_path / "net")
    save(tmp_path / "tcn", "sequence")
    Image.fromarray(np.full((50, 70, 3), 99, np.uint8)).save(tmp_path / "bird.png")
    np.save(tmp_path / "bird.npy", np.ones((5, 50), np.float32))
    for folder, file in (("net", "bird.png"), ("tcn", "bird.npy")):
        status, out, err = call("predict", f"local-dir:{tmp_path / folder}", str(tmp_path / file), "--json")
        assert (status, err) == (0, "")
        assert json.loads(out)["predictions"][0]["name"] in NAMES
        assert call("verify", str(tmp_path / folder))[0] == 0
    exported = tmp_path / "net.pt2"
    arguments = ("export", f"local-dir:{tmp_path / 'net'}", "--format", "torch-export", "--out", str(exported))
    assert call(*arguments)[0] == 0
    ours = predict_files(f"local-dir:{tmp_path / 'net'}", [tmp_path / "bird.png"], top_k=3).predictions
    theirs = predict_files(str(exported), [tmp_path / "bird.png"], top_k=3).predictions
    assert [row.name for row in ours] == [row.name for row in theirs]


def test_a_changed_byte_is_noticed_on_load(tmp_path: Path) -> None:
    save(tmp_path / "net")
    weights = tmp_path / "net" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file its card declares"):
        timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)


def test_rounded_weights_are_not_saved(tmp_path: Path) -> None:
    model = trained("test_smpconv", IMAGE).bfloat16()
    with pytest.raises(ValueError, match=r"is torch.bfloat16: a network is saved as it trained, in float32"):
        save_network(tmp_path / "net", "test_smpconv.half", model, arguments=IMAGE, data=DATA)


@pytest.mark.parametrize("there", ["a folder", "an empty folder", "a file", "a dangling link"])
def test_nothing_is_overwritten(there: str, tmp_path: Path) -> None:
    place = tmp_path / "net"
    if "folder" in there:
        place.mkdir()
        if there == "a folder":
            (place / "mine").write_text("x")
    elif there == "a file":
        place.write_text("x")
    else:
        place.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="net exists and was left as it is"):
        save(place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arguments": {"num_classes": 3}}, r"the arguments .* do not build this network: stages.0.blocks.0.* differ"),
        ({"arguments": {"num_classes": 4, "img_size": 96}}, "head.fc.weight, head.fc.bias differ"),
        ({"arguments": {**IMAGE, "pretrained": True}}, "pretrained are no arguments of a network"),
        ({"entries": {"label_names": ["a", "b"]}}, "the data have 2 classes, the network has 3"),
        ({"entries": {"num_classes": 5}}, "the data have 5 classes, the network has 3"),
        ({"entries": {"colour": "red"}}, "colour: no entries that data decide"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "net", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["smpconv_t.birds", "test_smpconv", "test_smpconv.", "test_smpconv.a b", "nothing.a"])
def test_an_id_is_of_the_network(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no id of a test_smpconv|not a plain name|no network is called"):
        save_network(tmp_path / "net", name, trained("test_smpconv", IMAGE), arguments=IMAGE, data=DATA)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    model = trained("test_smpconv", IMAGE)
    with torch.no_grad():
        model.head.fc.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match=r"head\.fc\.bias holds NaN or Inf"):
        save_network(tmp_path / "net", "test_smpconv.nan", model, arguments=IMAGE, data=DATA)
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_a_parent(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder: make it first"):
        save(tmp_path / "no" / "net")


@pytest.mark.parametrize("step", ["write_safetensors", "write_whole", "_read_back", "os.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_nothing(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    if step == "os.replace":
        replace = os.replace

        def fail_at_the_end(source: Any, target: Any) -> None:
            if Path(target).name == "net":
                raise error
            replace(source, target)

        monkeypatch.setattr(saving.os, "replace", fail_at_the_end)
    else:
        monkeypatch.setattr(saving, step, fail)
    kind = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match="cannot be written: No space" if isinstance(error, OSError) else None):
        save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_reads_back_otherwise_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = saving.write_safetensors

    def garbled(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
        return write(path, {**tensors, "head.fc.bias": tensors["head.fc.bias"] + 1}, metadata)

    monkeypatch.setattr(saving, "write_safetensors", garbled)
    with pytest.raises(CheckpointError, match=r"head\.fc\.bias was read back as something else"):
        save(tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_tags() -> None:
    assert plain_tag("my images, 2026.11") == "my_images_2026_11"
    assert plain_tag("..") == "own" and plain_tag("птицы") == "own" and len(plain_tag("a" * 300)) == 100
