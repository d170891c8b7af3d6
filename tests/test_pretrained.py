"""Weights: those that ship, those that a user brings, and everything that must not be loaded; and their cards."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_files import ROOT, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smpconv_zoo
from smpconv_zoo.checkpoints import convert_checkpoint, write_safetensors
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.evaluation.golden import golden_error
from smpconv_zoo.models.build import create_on_meta, sample_shape
from smpconv_zoo.pretrained.cards import CardError, checkpoint_card, list_checkpoints, load_card, weights_dir
from smpconv_zoo.pretrained.locate import load_weights
from smpconv_zoo.pretrained.store import CheckpointError, read_checkpoint, read_safetensors, sha256_of

SERIES = [
    f"smpconv_tcn.{tag}"
    for tag in (
        "acsf1",
        "arrowhead",
        "basic_motions",
        "gunpoint",
        "italy_power_demand",
        "japanese_vowels",
        "japanese_vowels_30",
        "japanese_vowels_50",
        "japanese_vowels_70",
        "mnist1d",
        "osuleaf",
    )
]
EMBEDDED = ["smpconv_tcn_mnist.pmnist5k", "smpconv_tcn_mnist.smnist5k", "smpconv_resnet_mnist.mnist5k", *SERIES]
IMPORTABLE = [name for name in list_checkpoints() if name not in EMBEDDED]
TINY = {"kernel_sizes": [13, 11, 9, 7], "depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "num_classes": 10}


def stored(checkpoint: str) -> dict[str, Tensor]:
    return load_file(weights_dir() / f"{checkpoint}.safetensors")


def same(model: nn.Module, tensors: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    """Every tensor of the model equals the one of that name, and none is left over, those starting with `but` apart."""
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(but or "\n")}
    expected = {key: value for key, value in tensors.items() if not key.startswith(but or "\n")}
    assert state.keys() == expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


def from_file(name: str, path: Path | str, **kwargs: Any) -> Any:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


# --- embedded checkpoints


@pytest.mark.parametrize("checkpoint", EMBEDDED)
def test_embedded_weights_are_those_of_the_file(checkpoint: str) -> None:
    tensors = stored(checkpoint)
    for create in (timm.create_model, smpconv_zoo.create_model):
        model: Any = create(checkpoint, pretrained=True)
        same(model, tensors)
        assert model.pretrained_cfg["tag"] == checkpoint.rpartition(".")[2]
        assert "state_dict" not in model.pretrained_cfg
        assert not [value for value in model.pretrained_cfg.values() if isinstance(value, Tensor | dict)]
    random: Any = timm.create_model(checkpoint)
    assert not torch.equal(random.head.fc.weight, tensors["head.fc.weight"])


def test_the_network_without_a_tag_takes_its_default() -> None:
    same(timm.create_model("smpconv_tcn_mnist", pretrained=True), stored("smpconv_tcn_mnist.smnist5k"))


def test_other_classes() -> None:
    tensors = stored(EMBEDDED[0])
    model: Any = timm.create_model(EMBEDDED[0], pretrained=True, num_classes=7)
    assert model.head.fc.weight.shape == (7, 30)
    same(model, tensors, but=("head.fc.",))
    headless = timm.create_model(EMBEDDED[0], pretrained=True, num_classes=0)
    same(headless, {key: value for key, value in tensors.items() if not key.startswith("head.fc.")})


def test_other_input_channels() -> None:
    tensors = stored(EMBEDDED[0])
    model = timm.create_model(EMBEDDED[0], pretrained=True, in_chans=2).eval()
    first = ("blocks.0.conv1.large.conv.weight", "blocks.0.conv1.small.conv.weight", "blocks.0.shortcut.weight")
    same(model, tensors, but=first)
    # timm's rule: one channel repeated, divided so that two equal channels give what the one gave.
    original = timm.create_model(EMBEDDED[0], pretrained=True).eval()
    x = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x.expand(1, 2, 100)), original(x), rtol=1e-4, atol=1e-4)


def test_features_only() -> None:
    original: Any = timm.create_model(EMBEDDED[1], pretrained=True).eval()
    model = timm.create_model(EMBEDDED[1], pretrained=True, features_only=True, out_indices=(0, 3)).eval()
    x = torch.randn(1, 1, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, expected = model(x), original.forward_intermediates(x, indices=[0, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package and its weights in another place, to be damaged."""
    shutil.copytree(ROOT / "smpconv_zoo", tmp_path / "smpconv_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(weights_dir(), tmp_path / "weights")
    return tmp_path


def create_in(checkout: Path, checkpoint: str) -> str:
    """What loading a checkpoint says in another checkout."""
    script = f"import timm, smpconv_zoo; timm.create_model({checkpoint!r}, pretrained=True); print('loaded')"
    done = subprocess.run([sys.executable, "-c", script], cwd=checkout, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_a_flipped_byte_is_refused_with_both_hashes(checkout: Path) -> None:
    assert create_in(checkout, EMBEDDED[0]) == "loaded\n"
    path = checkout / "weights" / f"{EMBEDDED[0]}.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    answer = create_in(checkout, EMBEDDED[0])
    assert "loaded" not in answer.splitlines()
    last = answer.strip().splitlines()[-1]
    assert last.startswith("smpconv_zoo.pretrained.errors.") and "it was not loaded" in last
    for sha256 in (checkpoint_card(EMBEDDED[0]).files[0].sha256, sha256_of(bytes(data))):
        assert sha256 in last


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = stored(EMBEDDED[0])
    for value in (float("nan"), float("inf")):
        tensors["blocks.3.conv1.large.conv.radius"][2, 1] = value
        path = tmp_path / "w.safetensors"
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=r"blocks\.3\.conv1\.large\.conv\.radius holds NaN or Inf"):
            from_file("smpconv_tcn_mnist", path)
        torch.save({"model": tensors}, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=r"blocks\.3\.conv1\.large\.conv\.radius holds NaN or Inf"):
            from_file("smpconv_tcn_mnist", tmp_path / "w.pth")


# --- files of the user


def test_files_of_the_authors_image_code() -> None:
    path = golden("tiny_checkpoint.pth")
    model = from_file("smpconv_t", path, **TINY)
    converted = convert_checkpoint(path, "smpconv_t", **TINY)
    assert list(converted) == list(model.state_dict())
    same(model, converted)
    other = from_file("smpconv_t", path, **{**TINY, "num_classes": 3})
    assert other.head.fc.weight.shape == (3, 32)
    same(other, converted, but=("head.fc.",))


def test_files_of_the_authors_sequence_code() -> None:
    path = golden("seq_smnist.pth")
    model = from_file("smpconv_tcn_mnist.smnist", path)
    same(model, convert_checkpoint(path, "smpconv_tcn_mnist"))
    assert "state_dict" not in model.pretrained_cfg


def test_our_own_files(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = timm.create_model("test_smpconv")
    path = tmp_path / "w.safetensors"
    assert write_safetensors(path, source.state_dict()) == sha256_of(path.read_bytes())
    same(from_file("test_smpconv", path), source.state_dict())
    same(from_file("test_smpconv", path, features_only=True).model, source.state_dict(), but=("head.", "norm."))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    same(from_file("test_smpconv", tmp_path / "w.pth"), source.state_dict())
    same(timm.create_model("test_smpconv", checkpoint_path=str(path)), source.state_dict())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("smpconv_tcn", {"num_classes": 3, "in_chans": 2, "dims": (4, 4)}),
        ("smpconv_resnet", {"num_classes": 4, "in_chans": 1, "dims": (4, 4), "n_points": 3}),
        ("test_smpconv", {"num_classes": 5, "in_chans": 4}),
    ],
)
def test_weights_of_ones_own_network_keep_their_classifier(name: str, arguments: dict, tmp_path: Path) -> None:
    source = timm.create_model(name, **arguments)
    write_safetensors(tmp_path / "w.safetensors", source.state_dict())
    same(from_file(name, tmp_path / "w.safetensors", **arguments), source.state_dict())


def test_conversion_round_trip(tmp_path: Path) -> None:
    source = golden("tiny_checkpoint.pth")
    tensors = convert_checkpoint(source, "smpconv_t", **TINY)
    path = tmp_path / "converted.safetensors"
    sha256 = write_safetensors(path, tensors, {"from": "the authors"})
    again, metadata = read_safetensors(path, sha256)
    assert metadata == {"from": "the authors"} and again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    twice = convert_checkpoint(path, "smpconv_t", **TINY)
    assert all(torch.equal(twice[key], tensors[key]) for key in tensors)
    assert write_safetensors(tmp_path / "twice.safetensors", twice, {"from": "the authors"}) == sha256


def test_nothing_is_written_where_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/w\.safetensors cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "nowhere" / "w.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"taken\.safetensors cannot be written: "):
        write_safetensors(tmp_path / "taken.safetensors", {"a": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_that_cannot_be_read(suffix: str, tmp_path: Path) -> None:
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"w.{suffix}"
    tensors = timm.create_model("test_smpconv").state_dict()
    if suffix == "pth":
        torch.save(tensors, whole)
    else:
        write_safetensors(whole, tensors)
    with pytest.raises(CheckpointError, match=rf"w\.{suffix} does not exist"):
        from_file("test_smpconv", path)
    for size in (0, 7, 300, whole.stat().st_size - 1):
        path.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=rf"w\.{suffix} is not a "):
            from_file("test_smpconv", path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=rf"w\.{suffix} is a directory, not a checkpoint file"):
        from_file("test_smpconv", path)


class Payload:
    """A pickle that creates a file when it is loaded the unsafe way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    target = tmp_path / "created"
    content = {"state_dict": {"a": torch.zeros(1)}, "payload": Payload(target)}
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(content))
    torch.save(content, tmp_path / "zip.pth")
    for name, reason in (
        ("plain.pth", "it is not a file of weights"),
        ("zip.pth", r"it asks for (_io|io)\.open, which"),
    ):
        sentence = f"{name} is not a checkpoint that can be read safely: {reason}"
        with pytest.raises(CheckpointError, match=sentence):
            from_file("test_smpconv", tmp_path / name)
        with pytest.raises(CheckpointError, match=sentence):
            convert_checkpoint(tmp_path / name, "test_smpconv")
        assert not target.exists()
    # The same bytes are alive: loaded the unsafe way they do create the file.
    pickle.loads((tmp_path / "plain.pth").read_bytes())["payload"].close()
    assert target.exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"a": 1}}, {}])
def test_files_without_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"w\.pth holds no state dict: expected 'state_dict_ema', 'state_dict' or"
    ):
        read_checkpoint(tmp_path / "w.pth")


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_safetensors(path, timm.create_model("test_smpconv_tcn").state_dict())
    with pytest.raises(
        CheckpointError, match=r"not of this network: missing keys stem\.0.* more, unexpected keys blocks\.0\..* more"
    ):
        from_file("test_smpconv", path)
    tensors = dict(timm.create_model("test_smpconv_tcn").state_dict())
    radius = tensors.pop("blocks.1.conv2.large.conv.radius")
    write_safetensors(path, tensors)
    sentence = r"missing keys blocks\.1\.conv2\.large\.conv\.radius, unexpected keys none"
    with pytest.raises(CheckpointError, match=sentence):
        from_file("test_smpconv_tcn", path)
    with pytest.raises(CheckpointError, match=sentence):
        convert_checkpoint(path, "test_smpconv_tcn")
    write_safetensors(path, {**tensors, "blocks.1.conv2.large.conv.radius": radius[:, 1:]})
    with pytest.raises(
        CheckpointError, match=r"blocks\.1\.conv2\.large\.conv\.radius has shape \(6, 6\), the network expects \(6, 7\)"
    ):
        from_file("test_smpconv_tcn", path)


def test_weights_for_other_arguments_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.\d\..* has shape .*, the network expects"):
        timm.create_model(EMBEDDED[0], pretrained=True, n_points=8)
    with pytest.raises(CheckpointError, match=r"unexpected keys blocks\.5\."):
        timm.create_model(EMBEDDED[0], pretrained=True, dims=(30,) * 5)


# --- checkpoints that do not ship


@pytest.mark.parametrize("checkpoint", IMPORTABLE)
def test_how_to_get_what_does_not_ship(checkpoint: str) -> None:
    card = checkpoint_card(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        timm.create_model(checkpoint, pretrained=True)
    sentence = str(caught.value)
    assert card.origin in sentence and "\n" not in sentence
    assert f"`smpconv-zoo import {checkpoint}`" in sentence
    assert f"`smpconv-zoo import {checkpoint} --file FILE`" in sentence


def test_networks_without_checkpoints_say_so() -> None:
    for name in ("smpconv_tcn", "smpconv_resnet", "test_smpconv", "test_smpconv_tcn"):
        with pytest.raises(CheckpointError, match=f"^there are no pretrained weights for {name}; create it with"):
            timm.create_model(name, pretrained=True)


# --- cards


def test_the_cards_are_those_of_the_weights_folder() -> None:
    assert [name for name in list_checkpoints() if checkpoint_card(name).status == "embedded"] == sorted(EMBEDDED)
    declared = {file.name for name in list_checkpoints() for file in checkpoint_card(name).files}
    assert declared == {path.name for path in weights_dir().glob("*.safetensors")}
    with pytest.raises(CardError, match=r"no checkpoint is called 'smpconv_t\.in1'; did you mean smpconv_t\.in1k"):
        checkpoint_card("smpconv_t.in1")
    with pytest.raises(CardError, match=r"no checkpoint is called 'qwertz'; there are: smpconv_b\.in1k, "):
        checkpoint_card("qwertz")


@pytest.mark.parametrize("checkpoint", list_checkpoints())
def test_a_card_is_true(checkpoint: str) -> None:
    card = checkpoint_card(checkpoint)
    assert card.id == checkpoint == f"{card.network}.{card.tag}"
    model: Any = timm.create_model(card.network, device=torch.device("meta"), **card.arguments)
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    assert len(model.state_dict()) == card.tensors
    assert card.license == "MIT" and card.origin
    cfg: Any = timm.get_pretrained_cfg(checkpoint)
    assert cfg.license == "mit" and card.data.name in cfg.description
    for file in card.files:
        data = (weights_dir() / file.name).read_bytes()
        assert (len(data), sha256_of(data)) == (file.bytes, file.sha256)
        tensors = load_weights(card).tensors
        assert tensors.keys() == model.state_dict().keys()
    if card.measured is not None:
        assert card.measured.top1 == pytest.approx(100 * card.measured.correct / card.measured.total)
        assert (ROOT / card.measured.log).is_file()
    if card.training is not None:
        assert (ROOT / card.training.log).is_file()


def card_json(checkpoint: str = EMBEDDED[0]) -> dict[str, Any]:
    return json.loads((weights_dir() / f"{checkpoint}.json").read_text(encoding="utf-8"))


def put(card: Any, where: tuple[Any, ...], value: Any) -> Any:
    """A copy of the card with another value at the path `where`."""
    card = copy.deepcopy(card)
    place = card
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    return card


@pytest.mark.parametrize(
    ("where", "value", "sentence"),
    [
        (
            ("id",),
            "smpconv_tcn_mnist.other",
            "declares id 'smpconv_tcn_mnist.other' and network .* do not fit",
        ),
        (("network",), "smpconv_tcn", "which do not fit its name"),
        (("status",), "lost", r"status must be one of \('embedded', .*'importable'\), got 'lost'"),
        (("status",), "importable", "a checkpoint has files unless it is importable, this one is importable"),
        (("files",), [], "a checkpoint has files unless it is importable, this one is embedded"),
        (("files", 0, "name"), "../w.safetensors", "is not a plain name"),
        (("files", 0, "sha256"), "abc", "needs a full sha256, got 'abc'"),
        (("files", 0, "sha256"), "A" * 64, "needs a full sha256"),
        (("files", 0, "bytes"), 1.5, r"files\[0\]: bytes must be int, got float"),
        (("files", 0, "bytes"), True, r"files\[0\]: bytes must be int, got bool"),
        (("files",), {}, "files must be a list, got dict"),
        (("parameters",), "many", "parameters must be int, got str"),
        (("arguments",), [], "arguments must be an object, got list"),
        (("data",), None, "data must be an object, got NoneType"),
        (("data", "colour"), "red", r"data: unknown fields \['colour'\], missing fields \[\]"),
        (("extra",), 1, r"unknown fields \['extra'\]"),
        (("measured", "top1"), "99", "measured: top1 must be float, got str"),
        (("measured", "versions", "torch"), 2, "measured: versions: torch must be str, got int"),
    ],
)
def test_false_cards_are_refused(where: tuple[Any, ...], value: Any, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / f"{EMBEDDED[0]}.json"
    path.write_text(json.dumps(put(card_json(), where, value)), encoding="utf-8")
    with pytest.raises(CardError, match=sentence):
        load_card(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"card"', "\xff"])
def test_files_that_are_no_cards(content: str, tmp_path: Path) -> None:
    path = tmp_path / f"{EMBEDDED[0]}.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CardError, match=re.escape(path.name)):
        load_card(path)


def leaves(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything inside a card but the arguments, whose values are free."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [path for key, item in items if key != "arguments" for path in leaves(item, (*where, key))]
    return [*([where] if where else []), *inner]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200)
@given(data=st.data())
def test_a_changed_card_is_refused_or_read_as_it_stands(data: st.DataObject, tmp_path_factory: Any) -> None:
    card = card_json()
    where = data.draw(st.sampled_from(leaves(card)))
    path = tmp_path_factory.mktemp("card") / f"{EMBEDDED[0]}.json"
    path.write_text(json.dumps(put(card, where, data.draw(JSON))), encoding="utf-8")
    try:
        load_card(path)
    except CardError as error:
        assert path.name in str(error) and "\n" not in str(error)
    # A missing field is always refused.
    *parents, last = where
    place: Any = card
    for step in parents:
        place = place[step]
    if isinstance(place, dict) and parents[-1:] != ["versions"]:
        del place[last]
        path.write_text(json.dumps(card), encoding="utf-8")
        with pytest.raises(CardError, match="missing fields"):
            load_card(path)


@pytest.mark.parametrize("name", list_checkpoints())
def test_what_is_cheap_on_a_card_is_computed_again(name: str) -> None:
    """Parameters, tensors and multiply-accumulates, from a network without memory; golden logits where there are."""
    card = checkpoint_card(name)
    model = create_on_meta(card.network, **card.arguments)
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    assert len(model.state_dict()) == card.tensors
    shape = sample_shape(model) if card.golden is None else card.golden.shape[1:]
    assert count_macs(model, (1, *shape))["total"] == card.macs
    if card.golden is not None:
        # Logits in float32 on a CPU, of another processor or PyTorch than the card's.
        assert golden_error(timm.create_model(name, pretrained=True), card.golden) < 1e-4
