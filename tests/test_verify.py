"""`verify`: embedded checkpoints pass, and every fault fails exactly its own step."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import smpconv_zoo
from smpconv_zoo import verifying
from smpconv_zoo.evaluation.golden import golden_logits
from smpconv_zoo.pretrained.cards import CardError, Hub, checkpoint_card, list_checkpoints, load_card, weights_dir
from smpconv_zoo.pretrained.home import add_to_store
from smpconv_zoo.pretrained.store import CheckpointError, sha256_of
from smpconv_zoo.pretrained.structure import check_structure
from smpconv_zoo.verifying import STEPS, failed, verify

EMBEDDED = [name for name in list_checkpoints() if checkpoint_card(name).status == "embedded"]
NETWORK = "test_smpconv_tcn"
ID = f"{NETWORK}.made"


@pytest.fixture(autouse=True)
def nothing_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path_factory.mktemp("home")))
    for name in ("SMPCONV_PUBLIC_KEY", "SMPCONV_REQUIRE_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dict and card of a tiny network with random weights."""
    torch.manual_seed(0)
    model = smpconv_zoo.create_model(NETWORK)
    card = {
        **json.loads((weights_dir() / f"{EMBEDDED[0]}.json").read_text(encoding="utf-8")),
        "id": ID,
        "network": NETWORK,
        "status": "imported",
        "tensors": len(model.state_dict()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "measured": None,
        "golden": dataclasses.asdict(golden_logits(model)),
    }
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, card


class Folder:
    """A checkpoint in hub layout, written anew for each fault; its card follows the bytes unless told otherwise."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor], card: dict[str, Any]) -> None:
        self.path, self.tensors, self.card = path, dict(tensors), json.loads(json.dumps(card))

    def write(self, data: bytes | None = None, **changes: Any) -> Path:
        data = safetensors.torch.save(self.tensors) if data is None else data
        files = [{"name": "model.safetensors", "sha256": sha256_of(data), "bytes": len(data)}]
        card = {**self.card, "files": files, **changes}
        (self.path / "model.safetensors").write_bytes(data)
        (self.path / "card.json").write_text(json.dumps(card), encoding="utf-8")
        (self.path / "config.json").write_text("{}", encoding="utf-8")
        return self.path


@pytest.fixture
def folder(tmp_path: Path, made: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> Folder:
    return Folder(tmp_path, *made)


def verdicts(path: Path | str, **options: Any) -> list[bool | None]:
    steps = verify(path, **options)
    assert tuple(step.name for step in steps) == STEPS
    assert all("\n" not in step.message and step.message for step in steps)
    return [step.ok for step in steps]


def assert_fails_at(step: str, path: Path, *parts: str) -> None:
    """Steps before it pass, it fails with one line, those after it are not taken; the files stay as they are."""
    before = {name: (path / name).read_bytes() for name in os.listdir(path)}
    at = STEPS.index(step)
    steps = verify(path)
    assert [s.ok for s in steps] == [True] * at + [False] + [None] * (len(STEPS) - at - 1), steps
    assert failed(steps) == step and "\n" not in steps[at].message
    for part in parts:
        assert part in steps[at].message
    assert {name: (path / name).read_bytes() for name in os.listdir(path)} == before


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_checkpoints_pass_every_step(name: str) -> None:
    assert verdicts(name) == [True, True, True, True, None]


def test_a_folder_a_file_and_the_store_pass(folder: Folder, tmp_path: Path) -> None:
    path = folder.write()
    assert verdicts(path) == verdicts(path / "model.safetensors") == [True, True, True, True, None]
    # The name `<id>.json` beside `<id>.safetensors`, as in the package.
    (other := tmp_path / "other").mkdir()
    shutil.copy(path / "model.safetensors", other / f"{ID}.safetensors")
    shutil.copy(path / "card.json", other / f"{ID}.json")
    assert verdicts(other / f"{ID}.safetensors") == [True, True, True, True, None]
    card = load_card(path / "card.json")
    add_to_store(card, (path / "model.safetensors").read_bytes())
    assert verdicts(ID) == [True, True, True, True, None]


def test_without_a_card_only_the_structure_is_checked(folder: Folder) -> None:
    path = folder.write()
    (path / "card.json").unlink()
    steps = verify(path)
    assert [step.ok for step in steps] == [None, True, None, None, None]
    assert "no card" in steps[0].message
    assert verdicts(path, signature="require")[-1] is False


def test_a_card_without_golden_logits(folder: Folder) -> None:
    steps = verify(folder.write(golden=None))
    assert steps[3].ok is None and "no golden logits" in steps[3].message


# --- hash


def test_a_flipped_bit(folder: Folder) -> None:
    path = folder.write()
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert_fails_at("hash", path, "sha256")


def test_a_truncated_file(folder: Folder) -> None:
    path = folder.write()
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])
    assert_fails_at("hash", path, f"{len(data) - 100:,} bytes")


def test_a_card_of_other_bytes(folder: Folder) -> None:
    data = safetensors.torch.save(folder.tensors)
    file = {"name": "model.safetensors", "sha256": sha256_of(data), "bytes": len(data) + 1}
    assert_fails_at("hash", folder.write(data, files=[file]), f"the card declares {len(data) + 1:,}")


# --- structure


def hostile(change: Callable[[dict[str, Any]], Any], payload: bytes = bytes(16)) -> bytes:
    """Two tensors of 8 bytes each with ``change`` applied to the header, which may return the header's text."""
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + payload


HOSTILE = {
    "empty": (b"", "claims 0 bytes in a file of 0"),
    "huge header": ((1 << 63).to_bytes(8, "little") + b"{}", "the header claims"),
    "header beyond the end": ((100).to_bytes(8, "little") + b"{}", "the header claims 100 bytes"),
    "no brace": (hostile(lambda h: " " + json.dumps(h)), "brace"),
    "not JSON": (hostile(lambda h: "{"), "not JSON"),
    "duplicate key": (hostile(lambda h: json.dumps(h)[:-1] + ', "a": {}}'), "'a' is declared twice"),
    "duplicate inside": (
        hostile(lambda h: json.dumps(h).replace('"shape": [2]', '"shape": [9], "shape": [2]')),
        "'shape' is declared twice",
    ),
    "overlap": (hostile(lambda h: h["b"].update(data_offsets=[4, 12])), "'b' overlaps"),
    "gap": (hostile(lambda h: h["b"].update(data_offsets=[12, 20]), bytes(20)), "'b' leaves a gap"),
    "bytes behind the end": (hostile(lambda h: None, bytes(17)), "the file holds 17"),
    "bytes missing": (hostile(lambda h: None, bytes(15)), "the file holds 15"),
    "unknown type": (hostile(lambda h: h["a"].update(dtype="F33")), "'F33'"),
    "another type": (hostile(lambda h: h["a"].update(dtype="F64")), "which is not F64 of shape (2,)"),
    "negative size": (hostile(lambda h: h["a"].update(shape=[-2, -1])), "no sizes"),
    "overflowing size": (hostile(lambda h: h["a"].update(shape=[1 << 62, 1 << 62])), "which is not F32"),
    "offsets turned": (hostile(lambda h: h["a"].update(data_offsets=[8, 0])), "8 bytes"),
    "unknown field": (hostile(lambda h: h["a"].update(code="x")), "'a' is not declared"),
    "metadata of numbers": (hostile(lambda h: h.update(__metadata__={"a": 1})), "metadata"),
    "NaN": (hostile(lambda h: None, bytes(12) + b"\0\0\xc0\x7f"), "b holds NaN"),
    "Inf": (hostile(lambda h: None, b"\0\0\x80\x7f" + bytes(12)), "a holds NaN or Inf"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_files(folder: Folder, fault: str) -> None:
    data, message = HOSTILE[fault]
    assert_fails_at("structure", folder.write(data, tensors=2), message)


def test_the_unharmed_file_is_sound() -> None:
    assert [tensor.name for tensor in check_structure(hostile(lambda h: None))] == ["a", "b"]


def test_a_card_of_another_number_of_tensors(folder: Folder) -> None:
    wrong = folder.card["tensors"] + 1
    assert_fails_at("structure", folder.write(tensors=wrong), f"the card declares {wrong}")


# --- load


def test_a_missing_key(folder: Folder) -> None:
    name, _ = folder.tensors.popitem()
    assert_fails_at("load", folder.write(tensors=len(folder.tensors)), f"missing keys {name}")


def test_an_extra_key(folder: Folder) -> None:
    folder.tensors["more"] = torch.zeros(1)
    assert_fails_at("load", folder.write(tensors=len(folder.tensors)), "unexpected keys more")


def test_a_wrong_shape_and_a_wrong_type(folder: Folder) -> None:
    weight = folder.tensors["head.fc.weight"]
    folder.tensors["head.fc.weight"] = weight.t().contiguous()
    assert_fails_at("load", folder.write(), "head.fc.weight", str(tuple(weight.shape)))
    folder.tensors["head.fc.weight"] = weight.double()
    assert_fails_at("load", folder.write(), "head.fc.weight", "float64")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": 1}, "the card declares 1"),
        ({"arguments": {"num_classes": 7}}, "head.fc"),
        ({"arguments": {"colour": 1}}, "colour"),
        ({"arguments": {"num_classes": 1 << 50}}, "head.fc"),
        ({"id": "smpconv_tcm.made", "network": "smpconv_tcm"}, "did you mean smpconv_tcn"),
    ],
)
def test_cards_of_another_network(folder: Folder, changes: dict[str, Any], message: str) -> None:
    assert_fails_at("load", folder.write(**changes), message)


# --- golden


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["logits"][0].__setitem__(0, g["logits"][0][0] + 1),
        lambda g: g.update(seed=1),
        lambda g: g.update(seed=-1),
        lambda g: g.update(shape=[1 << 40, *g["shape"][1:]]),
        lambda g: g.update(shape=[*g["shape"][:2], 1 << 40]),
        lambda g: g.update(shape=[*g["shape"][:2], g["shape"][2] // 2]),
        lambda g: g.update(shape=[]),
        lambda g: g.update(logits=[]),
        lambda g: g.update(logits=[[], []]),
        lambda g: g.update(logits=[[0.0] * len(row) for row in g["logits"]]),
        lambda g: g["logits"][0].pop(),
    ],
    ids=["logit", "seed", "negative seed", "huge", "long", "short", "no shape", "none", "empty", "zeros", "ragged"],
)
def test_wrong_golden_logits(folder: Folder, change: Callable[[dict[str, Any]], Any]) -> None:
    change(folder.card["golden"])
    assert_fails_at("golden", folder.write())


def test_other_weights_under_the_same_card(folder: Folder) -> None:
    folder.tensors["head.fc.bias"] = folder.tensors["head.fc.bias"] + 0.1
    assert_fails_at("golden", folder.write(), "logits differ")


# --- what is not there, and the command line


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"did you mean smpconv_tcn_mnist\.smnist5k"):
        verify("smpconv_tcn_mnist.smnst5k")
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="does not ship with this package"):
        verify("smpconv_t.in1k")
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is no \.safetensors file"):
        verify(tmp_path / "x.pth")


def test_the_command_prints_one_line_a_step(call: Any, folder: Folder) -> None:
    path = folder.write()
    code, out, err = call("verify", str(path))
    assert (code, err) == (0, "")
    assert [line.split()[1:3] for line in out.splitlines()] == [
        *([step, "ok"] for step in STEPS[:-1]),
        ["signature", "skipped"],
    ]
    folder.write(parameters=1)
    code, out, err = call("verify", str(path))
    assert (code, len(out.splitlines()), err.count("\n")) == (1, 5, 1)
    assert f"not verified: {path} (load)" in err
    code, out, _ = call("verify", str(path), "--json")
    (answer,) = json.loads(out)
    assert (code, answer["target"], answer["ok"]) == (1, str(path), False)
    assert [step["ok"] for step in answer["steps"]] == [True, True, False, None, None]


def test_all_that_is_embedded_or_imported(call: Any, folder: Folder) -> None:
    path = folder.write()
    card = load_card(path / "card.json")
    add_to_store(card, (path / "model.safetensors").read_bytes()).unlink()
    code, out, err = call("verify", "--all", "--json")
    assert (code, err) == (1, f"smpconv-zoo: not verified: {ID} (hash)\n"), "one that is broken hides no other"
    answers = {answer["target"]: answer["ok"] for answer in json.loads(out)}
    assert answers == {**dict.fromkeys(EMBEDDED, True), ID: False}


def test_the_command_refuses_in_one_sentence(call: Any, folder: Folder) -> None:
    for arguments, message in [
        (("verify", "qqq"), "no checkpoint is called 'qqq'"),
        (("verify", "smpconv_t.in1k"), "does not ship"),
        (("verify", "qqq.safetensors"), "does not exist"),
    ]:
        code, out, err = call(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err
    path = folder.write()
    (path / "card.json").write_text("{")
    code, out, err = call("verify", str(path))
    assert (code, out, err.count("\n")) == (1, "", 1) and "card.json is not a JSON card" in err
    assert call("verify")[0] == call("verify", "--all", "qqq")[0] == 2


@pytest.mark.parametrize("command", ["verify", "sign", "keygen"])
def test_help_shows_an_example(call: Any, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0 and f"Example: smpconv-zoo {command}" in out


def test_a_published_checkpoint_is_verified_where_the_hub_client_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline: the cache has the layout of the client, and holds the bytes of an embedded checkpoint."""
    embedded = checkpoint_card("smpconv_tcn_mnist.smnist5k")
    place = Hub("org/net", "0123456789abcdef0123456789abcdef01234567")
    card = dataclasses.replace(embedded, status="published", hub=place)
    monkeypatch.setattr(verifying, "checkpoint_card", lambda name: card)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="was not downloaded yet"):
        verify(card.id)
    snapshot = tmp_path / "models--org--net" / "snapshots" / place.revision
    snapshot.mkdir(parents=True)
    shutil.copy(weights_dir() / embedded.files[0].name, snapshot / "model.safetensors")
    steps = verify(card.id)
    assert not failed(steps), steps
    assert [step.name for step in steps if step.ok] == ["hash", "structure", "load", "golden"]
