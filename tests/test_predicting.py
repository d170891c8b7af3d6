"""Predictions on real files: what is read, what is refused, and that exported files say what checkpoints say."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from smpconv_zoo.data.mnist5k import load_mnist5k, mnist5k_sequences, mnist5k_split
from smpconv_zoo.description import load_described
from smpconv_zoo.exporting import export_model, export_network
from smpconv_zoo.predicting import Reader, find_inputs, predict_files, write_predictions

DIGITS = "smpconv_tcn_mnist.smnist5k"
PERMUTED = "smpconv_tcn_mnist.pmnist5k"

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder of ten PNG digits, and in folders below the same ones as arrays; and their classes."""
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_mnist5k()
    chosen = mnist5k_split()["test"][5::100]
    for i, index in enumerate(chosen):
        Image.fromarray(images[index]).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    arrays = folder / "arrays"
    arrays.mkdir()
    sequences = (images[chosen].reshape(-1, 784) / 255).astype(np.float32)
    np.save(arrays / "all.npy", sequences)
    np.savetxt(arrays / "rows.csv", sequences, delimiter=",", fmt="%.9g")
    np.savetxt(arrays / "titled.csv", sequences[:3], delimiter=",", fmt="%.9g", header=",".join("p" * 784), comments="")
    np.savetxt(arrays / "column.csv", sequences[4], fmt="%.9g")
    return folder, labels[chosen].tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    files = {"onnx": "a.onnx", "torch-export": "a.pt2", "torchscript": "a.pt"}
    for format, name in files.items():
        export_network(DIGITS, folder / name, format)
    return {format: folder / name for format, name in files.items()}


def test_pictures_and_arrays_give_the_same_classes(digits: tuple[Path, list[int]]) -> None:
    folder, labels = digits
    found = predict_files(DIGITS, [folder], batch_size=7)
    assert found.network == DIGITS and found.unreadable == ()
    by_file: dict[str, list[int]] = {}
    for row in found.predictions:
        assert row.rank == 1 and row.name == str(row.label)
        assert row.index == len(by_file.setdefault(Path(row.file).name, []))
        by_file[Path(row.file).name].append(row.label)
    assert [by_file[f"{i}.png"][0] for i in range(10)] == labels, "ten digits that the checkpoint knows"
    assert by_file["all.npy"] == by_file["rows.csv"] == labels
    assert by_file["titled.csv"] == labels[:3] and by_file["column.csv"] == [labels[4]]
    assert sum(map(len, by_file.values())) == 34


def test_the_input_is_that_of_the_evaluation(digits: tuple[Path, list[int]]) -> None:
    """Bit for bit: digits from pictures, and for the permuted checkpoint in the order that travels with its weights."""
    folder, _ = digits
    chosen = torch.arange(1000)[5::100]
    for name in (DIGITS, PERMUTED):
        _, description = load_described(name)
        x, _ = mnist5k_sequences("test", description.preprocessing.order)
        reader = Reader(description.preprocessing)
        for i in range(10):
            torch.testing.assert_close(reader.read(folder / f"{i}.png")[0], x[chosen[i]], rtol=0, atol=1e-6)
        torch.testing.assert_close(reader.read(folder / "arrays" / "all.npy"), x[chosen], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
@pytest.mark.parametrize("format", ["onnx", "torch-export", "torchscript"])
def test_exported_files_say_what_the_checkpoint_says(
    format: str, exported: dict[str, Path], digits: tuple[Path, list[int]]
) -> None:
    folder, _ = digits
    ours = predict_files(DIGITS, [folder], batch_size=7, top_k=3)
    theirs = predict_files(str(exported[format]), [folder], batch_size=16, top_k=3)
    assert theirs.network == DIGITS and len(ours.predictions) == 3 * 34 == len(theirs.predictions)
    for a, b in zip(ours.predictions, theirs.predictions, strict=True):
        assert (a.file, a.index, a.rank, a.label, a.name) == (b.file, b.index, b.rank, b.label, b.name)
        assert b.probability == pytest.approx(a.probability, abs=1e-5)
    first, second, third = ours.predictions[:3]
    assert (first.rank, second.rank, third.rank) == (1, 2, 3)
    assert 1 >= first.probability >= second.probability >= third.probability > 0


@pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
def test_images_are_prepared_as_by_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, description = load_described("test_smpconv", untrained=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (90, 140, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (70, 60), dtype=np.uint8)).save(tmp_path / "grey.jpg")
    transform = create_transform(**resolve_data_config(model=model), is_training=False)
    reader = Reader(description.preprocessing)
    for name in ("a.png", "grey.jpg"):
        expected = transform(Image.open(tmp_path / name).convert("RGB"))
        assert torch.equal(reader.read(tmp_path / name)[0], expected)
    out = tmp_path / "net.pt"
    export_model(model, description, out, "torchscript")
    found = predict_files(str(out), [tmp_path / "grey.jpg", tmp_path / "a.png"], top_k=99)
    assert [row.rank for row in found.predictions] == [*range(1, 11)] * 2
    with torch.inference_mode():
        expected = model(reader.read(tmp_path / "grey.jpg")).softmax(dim=1)[0]
    assert found.predictions[0].file.endswith("grey.jpg") and found.predictions[0].name is None
    for row in found.predictions[:10]:
        assert row.probability == pytest.approx(expected[row.label].item(), abs=1e-5)


def test_pictures_are_read_as_they_are_learned_from(tmp_path: Path) -> None:
    """Turned as their EXIF says, 16-bit greys scaled and not clipped: as in training on a folder of one's own."""
    rng = np.random.default_rng(0)
    greys = rng.integers(0, 65536, (70, 60)).astype(np.uint16)
    Image.fromarray(greys).save(tmp_path / "deep.png")
    Image.fromarray(np.rint(greys / 257).astype(np.uint8)).save(tmp_path / "grey.png")
    turned = Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    turned.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    read = Reader(load_described("test_smpconv", untrained=True)[1].preprocessing).read
    assert torch.equal(read(tmp_path / "deep.png"), read(tmp_path / "grey.png"))
    assert torch.equal(read(tmp_path / "turned.png"), read(tmp_path / "upright.png"))
    assert not torch.equal(read(tmp_path / "turned.png"), read(tmp_path / "grey.png"))


def test_sequences_of_several_channels(tmp_path: Path) -> None:
    _, description = load_described("smpconv_tcn", untrained=True, arguments={"in_chans": 3, "dims": [4]})
    reader = Reader(description.preprocessing)
    x = np.random.default_rng(0).standard_normal((2, 3, 256)).astype(np.float32)
    np.save(tmp_path / "two.npy", x)
    np.save(tmp_path / "one.npy", x[0])
    np.savetxt(tmp_path / "one.csv", x[1], delimiter=",", fmt="%.9g")
    assert torch.equal(reader.read(tmp_path / "two.npy"), torch.from_numpy(x))
    assert torch.equal(reader.read(tmp_path / "one.npy"), torch.from_numpy(x[:1]))
    assert torch.equal(reader.read(tmp_path / "one.csv"), torch.from_numpy(x[1:]))
    for shape in ((256, 3), (256,), (2, 2, 256), (1, 2, 3, 256), (0, 3, 256)):
        np.save(tmp_path / "bad.npy", np.zeros(shape))
        with pytest.raises(ValueError, match=r"is no sequence of 3 channels|steps"):
            reader.read(tmp_path / "bad.npy")
    np.save(tmp_path / "short.npy", x[:, :, :100])
    with pytest.raises(ValueError, match=r"sequences of 100 steps .* made for 256; --any-length"):
        reader.read(tmp_path / "short.npy")
    assert Reader(description.preprocessing, any_length=True).read(tmp_path / "short.npy").shape == (2, 3, 100)
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"takes files that end in \.csv, \.npy"):
        reader.read(tmp_path / "a.png")


def test_other_lengths_are_taken_when_asked(digits: tuple[Path, list[int]], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 784), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((3, 100), np.float32))
    found = predict_files(DIGITS, [tmp_path], any_length=True)
    assert [(Path(row.file).name, row.index) for row in found.predictions] == [
        ("a.npy", 0),
        ("a.npy", 1),
        ("b.npy", 0),
        ("b.npy", 1),
        ("b.npy", 2),
    ]
    (one,) = predict_files(DIGITS, [tmp_path]).unreadable
    assert one.file.endswith("b.npy") and "sequences of 100 steps" in one.reason
    found = predict_files(PERMUTED, [tmp_path], any_length=True)
    assert "cannot be put in the order of 784" in found.unreadable[0].reason


def bad_files(folder: Path) -> dict[str, str]:
    """Files that cannot be taken, and a part of the reason."""
    Image.new("L", (28, 28)).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(whole[:-30])
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.zeros((28, 28), np.float32)).save(folder / "deep.tiff")
    (folder / "text.npy").write_text("no array")
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "complex.npy", np.zeros(784, np.complex64))
    np.save(folder / "nan.npy", np.full(784, np.nan))
    np.save(folder / "four.npy", np.zeros((1, 1, 1, 784)))
    (folder / "empty.csv").write_text("")
    (folder / "words.csv").write_text("a,b\n1,c\n")
    (folder / "ragged.csv").write_text("1,2\n3\n")
    (folder / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    return {
        "bytes.csv": "no .csv file",
        "complex.npy": "complex64, not numbers",
        "cut.png": "cannot be read as an image",
        "deep.tiff": "floating-point numbers",
        "empty.csv": "no numbers",
        "empty.jpg": "cannot be read as an image",
        "four.npy": "is no sequence of 1 channels",
        "nan.npy": "NaN or Inf",
        "objects.npy": "no .npy file",
        "ragged.csv": "different lengths, from 1 to 2",
        "text.npy": "no .npy file",
        "text.png": "cannot be read as an image",
        "words.csv": "something else than numbers",
    }


def test_bad_files_are_named_and_the_others_go_on(call: Call, digits: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, labels = digits
    bad = tmp_path / "bad"
    bad.mkdir()
    reasons = bad_files(bad)
    out = tmp_path / "answers.json"
    code, text, err = call("predict", DIGITS, str(folder / "3.png"), str(bad), str(folder / "4.png"), "--out", str(out))
    assert code == 1 and text == f"wrote {out}: 2 samples of 2 files\n"
    lines = err.splitlines()
    assert len(lines) == len(reasons) == len(os.listdir(bad))
    answer = json.loads(out.read_text())
    assert [row["label"] for row in answer["predictions"]] == labels[3:5]
    for line, entry, (name, reason) in zip(lines, answer["unreadable"], sorted(reasons.items()), strict=True):
        assert line == f"smpconv-zoo: {bad / name}: {entry['reason']}" and reason in line


def test_where_nothing_can_be_read_nothing_is_written(call: Call, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    code, text, err = call("predict", DIGITS, str(tmp_path), "--out", str(tmp_path / "b.csv"))
    assert (code, text) == (1, "") and "none of 1 files can be taken, the first is" in err
    assert os.listdir(tmp_path) == ["a.png"]


def test_the_command(call: Call, exported: dict[str, Path], digits: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, labels = digits
    out = tmp_path / "answers.csv"
    for network in (DIGITS, str(exported["onnx"])):
        assert call("predict", network, str(folder), "--out", str(out), "--top-k", "2", "--workers", "0")[0] == 0
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert list(rows[0]) == ["file", "index", "rank", "label", "name", "probability"]
        best = [row for row in rows if row["rank"] == "1" and row["file"].endswith(".png")]
        assert [int(row["label"]) for row in best] == labels and len(rows) == 2 * 34
        assert best[0]["file"] == str(folder / "0.png") and 0.5 < float(best[0]["probability"]) <= 1
    code, text, err = call("predict", DIGITS, str(folder / "2.png"))
    assert (code, err) == (0, "") and text.split()[:6] == ["file", "index", "rank", "label", "class", "probability"]
    code, text, err = call("predict", DIGITS, str(folder / "2.png"), "--json")
    assert (code, err) == (0, "") and json.loads(text)["predictions"][0]["label"] == labels[2]


def test_answers_in_the_folder_of_the_inputs_are_not_taken_for_inputs(call: Call, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(784, np.float32))
    out = str(tmp_path / "answers.csv")
    for _ in range(2):
        assert call("predict", DIGITS, str(tmp_path), "--out", out) == (0, f"wrote {out}: 1 samples of 1 files\n", "")


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    for i in range(64):
        np.save(tmp_path / f"{i:02}.npy", np.full((1, 784), i / 64, np.float32))
    (tmp_path / "40.npy").write_text("no array")
    alone, helped = (predict_files(DIGITS, [tmp_path], workers=workers) for workers in (0, 2))
    assert alone == helped and len(alone.predictions) == 63 and len(alone.unreadable) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((DIGITS, "absent.png"), 1, "absent.png: no such file or folder"),
        ((DIGITS, "empty"), 1, "empty holds no file that ends in .csv, .npy"),
        ((DIGITS, "a.npy", "--out", "b.txt"), 1, "written as .csv or .json, got b.txt"),
        ((DIGITS, "a.npy", "--out", "no/b.csv"), 1, "no is no folder"),
        ((DIGITS, "a.npy", "--top-k", "0"), 2, "--top-k"),
        ((DIGITS, "a.npy", "--device", "cuda:77"), 1, "device 'cuda:77' cannot be used"),
        ((DIGITS,), 2, "Missing argument"),
        (("absent.onnx", "a.npy"), 1, "absent.onnx: no such file"),
        (("smpconv_t", "a.npy"), 1, "smpconv_t is a network without weights"),
        (("smpconv_tcn_mnist.no", "a.npy"), 1, "no checkpoint is called"),
    ],
)
def test_wrong_use(
    arguments: tuple[str, ...], status: int, message: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.zeros(784, np.float32))
    os.mkdir("empty")
    code, text, err = call("predict", *arguments)
    assert (code, text) == (status, "") and message in err
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "empty"]


def test_missing_onnxruntime_is_said(
    exported: dict[str, Path], digits: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'onnxruntime is needed .* pip install "smpconv-zoo\[export\]"'):
        predict_files(str(exported["onnx"]), [digits[0]])


def test_inputs_are_found_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.txt", "d/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([tmp_path / "c.txt", tmp_path, tmp_path / "a.jpg"], (".png", ".jpg"))
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "c.txt",
        "a.jpg",
        "b.PNG",
        os.path.join("d", "e.png"),
    ]


def test_failed_writing_leaves_what_was_there(digits: tuple[Path, list[int]], tmp_path: Path) -> None:
    found = predict_files(DIGITS, [digits[0] / "0.png"])
    with pytest.raises(ValueError, match="written as"):
        write_predictions(tmp_path / "a.xlsx", found)
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(OSError):
        write_predictions(tmp_path / "b.csv", found)
    assert os.listdir(tmp_path) == ["b.csv"]
