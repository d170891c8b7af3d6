"""Hostile and damaged input to everything that reads a card or a checkpoint: refused in one way, never executed.

Each reader has one exception of its own for whatever is wrong. Anything else that comes out of it, a file that appears,
or memory taken beyond what the file could hold is a fault of ours.
"""

import dataclasses
import io
import json
import os
import pickle
import resource
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from golden_files import golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import smpconv_zoo
from smpconv_zoo.pretrained.cards import CardError, load_card, weights_dir
from smpconv_zoo.pretrained.remap import remap_reference_state_dict
from smpconv_zoo.pretrained.store import CheckpointError, read_safetensors, read_weights
from smpconv_zoo.pretrained.structure import check_structure

# Files in one folder for all examples of a test: that none appears is checked at its end.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
MANY = settings(SHARED, max_examples=200)

# Reading 2 MB of checkpoint takes a few times that; a bomb takes gigabytes.
MOST_MEMORY = 1 << 30


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder to read from, which is also where a payload would leave its files; checked when the test ends."""
    monkeypatch.chdir(tmp_path)
    peak = _peak_memory()
    yield tmp_path
    assert set(os.listdir(tmp_path)) <= {"x.pth", "x.safetensors", "card.json"}
    assert _peak_memory() - peak < MOST_MEMORY


def _peak_memory() -> int:
    """Most memory that this process has ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- cards

CARDS = sorted(weights_dir().glob("*.json"))

ODD_NUMBERS = st.sampled_from(
    [0, -1, 10**400, -(10**400), 2**63, 1e308, float("nan"), float("inf"), float("-inf"), True]
)
ODD_TEXTS = st.sampled_from(["", ".", "..", "../x", "a/b", "a\\b", "/etc/x", "\0", "a\nb", "\ud800", "x" * 5000, "é"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | ODD_NUMBERS | ODD_TEXTS
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=10
)


def assert_refused_or_whole(path: Path) -> None:
    try:
        card = load_card(path)
    except CardError as error:
        str(error).encode()
        return
    written = json.dumps(dataclasses.asdict(card), allow_nan=False)
    path.write_text(written, encoding="utf-8")
    assert load_card(path) == card
    for file in card.files:
        assert (path.parent / file.name).parent == path.parent and file.name not in ("", ".", "..")
    assert (path.parent / card.id).parent == path.parent


@SHARED
@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_card(guarded: Path, data: bytes) -> None:
    (guarded / "card.json").write_bytes(data)
    assert_refused_or_whole(guarded / "card.json")


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [place for key, item in inner for place in _places(item, (*at, key))]


@st.composite
def mutated_cards(draw: st.DrawFn) -> Any:
    card = json.loads(draw(st.sampled_from(CARDS)).read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from(_places(card)))
        parent = card
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent[draw(st.text())] = draw(JSON)
        else:
            parent[last] = draw(LEAVES | JSON)
        if not _places(card):
            break
    return card


@MANY
@given(card=mutated_cards())
def test_real_cards_with_something_changed(guarded: Path, card: Any) -> None:
    (guarded / "card.json").write_text(json.dumps(card), encoding="utf-8")
    assert_refused_or_whole(guarded / "card.json")


@SHARED
@given(source=st.sampled_from(CARDS), edits=st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=3)), min_size=1))
def test_real_cards_with_bytes_changed(guarded: Path, source: Path, edits: list[tuple[float, bytes]]) -> None:
    data = bytearray(source.read_bytes())
    for where, replacement in edits:
        start = int(where * len(data))
        data[start : start + len(replacement)] = replacement
    (guarded / "card.json").write_bytes(data)
    assert_refused_or_whole(guarded / "card.json")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"id":' * 100_000, "1" * 5000, '{"id": NaN}', "\ufeff{}", '{"id": "a", "id": "b"}'],
    ids=["nested lists", "nested objects", "long number", "NaN", "byte order mark", "duplicate"],
)
def test_json_that_is_hard_on_parsers(guarded: Path, text: str) -> None:
    (guarded / "card.json").write_text(text, encoding="utf-8")
    with pytest.raises(CardError):
        load_card(guarded / "card.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "smpconv_tcn_mnist.../../../evil"),
        ("id", "smpconv_tcn_mnist.a/b"),
        ("id", "smpconv_tcn_mnist.a\nb"),
        ("macs", -1),
        ("arguments", {"checkpoint_path": "evil.pth"}),
        ("arguments", {"pretrained_cfg_overlay": {"file": "evil.pth"}}),
        ("files", [{"name": "..", "sha256": "0" * 64, "bytes": 1}]),
        ("files", [{"name": "", "sha256": "0" * 64, "bytes": 1}]),
        ("files", [{"name": "a\\b", "sha256": "0" * 64, "bytes": 1}]),
        ("files", [{"name": "a", "sha256": "0" * 64, "bytes": -1}]),
        ("golden", {"seed": 0, "shape": [1], "logits": [[float("nan")]]}),
        ("golden", {"seed": 0, "shape": [1], "logits": [[10**400]]}),
    ],
)
def test_cards_that_reach_for_more_than_their_own(guarded: Path, field: str, value: Any) -> None:
    card = json.loads((weights_dir() / "smpconv_tcn_mnist.smnist5k.json").read_text(encoding="utf-8"))
    (guarded / "card.json").write_text(json.dumps({**card, field: value}), encoding="utf-8")
    with pytest.raises(CardError):
        load_card(guarded / "card.json")


# --- checkpoints

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "cut", "copy"]), st.floats(0, 0.9999), st.binary(min_size=1, max_size=8)
    ),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    out = bytearray(data)
    for action, where, new in edits:
        start = int(where * len(out))
        if action == "set":
            out[start : start + len(new)] = new
        elif action == "insert":
            out[start:start] = new
        elif action == "cut":
            del out[start : start + int.from_bytes(new[:3], "little")]
        else:
            out[start : start + 64] = out[: len(new) * 8]
    return bytes(out)


def assert_refused_or_read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        tensors = read_weights(path).tensors
    except CheckpointError:
        return
    assert all(type(name) is str and tensor.device.type == "cpu" for name, tensor in tensors.items())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["tiny_checkpoint.pth", "seq_smnist.pth"])
@SHARED
@given(edits=EDITS)
def test_checkpoints_with_bytes_changed(guarded: Path, name: str, edits: list[tuple[str, float, bytes]]) -> None:
    assert_refused_or_read(guarded / "x.pth", edited(golden(name).read_bytes(), edits))


PAYLOADS = (
    b"cposix\nmkdir\n(Vexecuted\ntR",
    b"cos\nsystem\n(Vtouch executed\ntR",
    b"cbuiltins\nopen\n(Vexecuted\nVw\ntR",
    b"c__builtin__\neval\n(V__import__('os').mkdir('executed')\ntR",
    b"ctorch.serialization\nload\n(Vx.pth\ntR",
    b"cargparse\nNamespace\n)\x81}Va\ncposix\nmkdir\nsb",
    b"\x8c\x05posix\x8c\x05mkdir\x93\x8c\x08executed\x85R",
)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["tiny_checkpoint.pth", "seq_smnist.pth"])
@SHARED
@given(
    payload=st.sampled_from(PAYLOADS) | st.binary(min_size=1, max_size=12),
    where=st.floats(0, 1) | st.just(0.0),
    edits=EDITS | st.just([]),
)
def test_pickles_with_opcodes_put_in(
    guarded: Path, name: str, payload: bytes, where: float, edits: list[tuple[str, float, bytes]]
) -> None:
    def inject(program: bytes) -> bytes:
        # Behind the two bytes of the protocol.
        start = 2 + int(where * (len(program) - 2))
        return edited(program[:start] + payload + program[start:], edits)

    assert_refused_or_read(guarded / "x.pth", with_program(golden(name), inject))


def with_program(source: Path, change: Any) -> bytes:
    """A checkpoint in PyTorch's zip format with the pickle in it changed, and all sums right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, change(data) if entry.filename.endswith("/data.pkl") else data)
    return out.getvalue()


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 40),
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["expanded to 4 TiB", "expanded to 4 TiB in two axes", "sparse", "without memory"],
)
def test_tensors_that_are_not_plain_are_refused(guarded: Path, tensor: torch.Tensor) -> None:
    (guarded / "x.pth").write_bytes(saved({"model": {"a": tensor}}))
    with pytest.raises(CheckpointError):
        read_weights(guarded / "x.pth")


@pytest.mark.parametrize(
    "data",
    [
        saved({"model": {("a", 1): torch.zeros(1)}}),
        saved({"model": {1: torch.zeros(1), "1": torch.ones(1)}}),
        saved({1: {2: 3}, "b": None}),
        saved([torch.zeros(1)]),
        saved(torch.zeros(1)),
        pickle.dumps({"model": [1]}, protocol=2),
        pickle.dumps(2**100_000, protocol=2),
    ],
    ids=["tuple as name", "names that meet", "no weights", "list", "tensor", "plain pickle", "long number"],
)
def test_contents_that_are_no_state_dict(guarded: Path, data: bytes) -> None:
    (guarded / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_weights(guarded / "x.pth")


def small_safetensors() -> bytes:
    tensors, metadata = read_safetensors(weights_dir() / "smpconv_tcn_mnist.smnist5k.safetensors")
    small = {name: tensor.flatten()[:3].clone() for name, tensor in list(tensors.items())[:8]}
    return safetensors.torch.save(small, {"recipe": metadata.get("recipe", "none")[:20]})


@MANY
@given(edits=EDITS)
def test_safetensors_with_bytes_changed(guarded: Path, edits: list[tuple[str, float, bytes]]) -> None:
    assert_safetensors_are_judged_alike(guarded / "x.safetensors", edited(small_safetensors(), edits))


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "F8_E8M0", "C64", "", "f32"])
        | JSON,
        "shape": st.lists(st.integers(0, 4) | ODD_NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 32) | ODD_NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@pytest.mark.parametrize(
    "dtype", ["BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "U32", "U64", "C64", "F4"]
)
def test_every_type_is_read_or_refused(guarded: Path, dtype: str) -> None:
    text = json.dumps({"a": {"dtype": dtype, "shape": [16], "data_offsets": [0, 16]}}).encode()
    for data in (bytes(16), b"\xff" * 16, bytes(8), bytes(32), bytes(64), bytes(128)):
        declared = text.replace(b"16]}}", str(len(data)).encode() + b"]}}")
        file = len(declared).to_bytes(8, "little") + declared + data
        assert_safetensors_are_judged_alike(guarded / "x.safetensors", file)


@MANY
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON, max_size=3),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=32),
)
def test_safetensors_with_any_header(guarded: Path, header: Any, length: int | None, data: bytes) -> None:
    text = json.dumps(header).encode()
    length = len(text) if length is None else length
    assert_safetensors_are_judged_alike(guarded / "x.safetensors", length.to_bytes(8, "little") + text + data)


def assert_safetensors_are_judged_alike(path: Path, data: bytes) -> None:
    """Neither reader lets another exception through, and what the strict one takes the library takes too."""
    assert_refused_or_read(path, data)
    try:
        declared = check_structure(data)
    except CheckpointError:
        return
    try:
        tensors = read_safetensors(path)[0]
    except CheckpointError as error:
        assert "NaN or Inf" in str(error)
        return
    assert {t.name: t.shape for t in declared} == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# --- the authors' names

PARTS = (
    "stages",
    "transitions",
    "backbone",
    "0",
    "1",
    "99",
    "blocks",
    "large_kernel",
    "smp",
    "small_conv",
    "bn",
    "head",
)
LEAF = ("weight_coord", "radius", "weights", "kernel_coord", "train_length", "coords", "weight", "Kernel", "finallyr")
NAMES = st.lists(st.sampled_from(PARTS + LEAF) | st.text(max_size=4), max_size=7).map(".".join)
NAMES |= st.sampled_from(
    ["backbone.0.cconv1.Kernel.train_length", "backbone.0.cconv1.Kernel.Kernel.weight_coord", "out_layer.weight"]
)
TENSORS = st.builds(
    lambda shape, fill, dtype: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 3), max_size=5),
    st.sampled_from([0.0, 1.0, 2.0, 784.0, -5.0, 1e6, 1e18, 3e38, float("nan"), float("inf")]),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)


@MANY
@given(state_dict=st.dictionaries(NAMES, TENSORS, max_size=6))
def test_any_names_and_shapes_as_the_authors(guarded: Path, state_dict: dict[str, torch.Tensor]) -> None:
    try:
        out = remap_reference_state_dict(state_dict)
    except (CheckpointError, ValueError):
        return
    # One to one: no tensor may vanish behind another that takes its name.
    assert len(out) == len(state_dict)


@SHARED
@given(changes=st.dictionaries(st.integers(0, 183), TENSORS, min_size=1, max_size=3))
def test_a_real_state_dict_with_tensors_replaced(guarded: Path, changes: dict[int, torch.Tensor]) -> None:
    state_dict = dict(read_weights(golden("seq_smnist.pth")).tensors)
    names = sorted(state_dict)
    state_dict.update({names[i]: tensor for i, tensor in changes.items()})
    (guarded / "x.pth").write_bytes(saved({"model": state_dict}))
    try:
        out = smpconv_zoo.convert_checkpoint(guarded / "x.pth", "smpconv_tcn_mnist")
    except CheckpointError:
        return
    assert all(torch.isfinite(tensor).all() for tensor in out.values())
