"""``eval/imagenet.py``: every picture once, in whatever form it lies there, by the classes of the set."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pkgutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from data_on_disk import WORDNET_IDS
from eval_scripts import call_script, torchrun
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from smpconv_zoo.data.folders import open_part
from smpconv_zoo.data.sources import SOURCES
from smpconv_zoo.evaluation import image_accuracy
from smpconv_zoo.evaluation.accuracy import measure
from smpconv_zoo.evaluation.image_sets import IMAGE_SETS, open_image_set
from smpconv_zoo.training.recipe import ImageRecipe
from smpconv_zoo.training.run_weights import network_of_run
from smpconv_zoo.training.running import train
from smpconv_zoo.training.world import World

Script = Callable[..., tuple[int, str, str]]
# Divided neither by 2 nor by 3.
PICTURES = 23
CPU = World(torch.device("cpu"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    monkeypatch.delenv("SMPCONV_DATA", raising=False)
    return lambda *arguments: call_script("imagenet", *arguments, monkeypatch=monkeypatch, capsys=capsys)


def synsets_of(name: str) -> list[str]:
    data = pkgutil.get_data("timm.data", f"_info/imagenet_{name}_synsets.txt")
    assert data is not None
    return data.decode().split()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network of 1,000 classes that tells pictures apart: its norms saw them, its classifier is not near 0."""
    torch.manual_seed(0)
    model: Any = timm.create_model("test_smpconv", num_classes=1000)
    nn.init.normal_(model.get_classifier().weight)
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.stack([prepared(model, picture(i)) for i in range(PICTURES)]))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def network(weights: Path) -> nn.Module:
    model = timm.create_model("test_smpconv", num_classes=1000)
    model.load_state_dict(safetensors.torch.load_file(weights))
    return model.eval()


def picture(number: int) -> Image.Image:
    draw = torch.Generator().manual_seed(number)
    coarse = (torch.rand(6, 8, 3, generator=draw) * 255).to(torch.uint8).numpy()
    return Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC)


def prepared(model: nn.Module, image: Image.Image) -> Tensor:
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    return transform(image)


def orders(weights: Path, columns: Sequence[int] | None = None) -> Tensor:
    """Classes of each picture, most probable first, by timm's way from a picture to logits."""
    model = network(weights)
    with torch.inference_mode():
        # As read back: pictures are stored without loss.
        logits = model(torch.stack([prepared(model, picture(i)) for i in range(PICTURES)]))
    return (logits if columns is None else logits[:, list(columns)]).argsort(dim=1, descending=True)


def write_set(root: Path, order: Tensor, names: Sequence[str], of: Sequence[int] = range(PICTURES)) -> list[int]:
    """Picture i in the folder of the class that the network holds for its (i mod 7)-th most probable; those classes.

    So the first of seven is right, and the first five are right among five.
    """
    chosen = [int(order[i, i % 7]) for i in range(PICTURES)]
    for place, i in enumerate(of):
        folder = root / names[chosen[i]]
        folder.mkdir(parents=True, exist_ok=True)
        # A PNG under ImageNet's name: readers look at the content, and no two JPEG libraries have to agree.
        picture(i).save(folder / f"ILSVRC2012_val_{1 + 100 * place:08d}.JPEG", format="PNG")
    return chosen


RIGHT, AMONG_FIVE = sum(i % 7 == 0 for i in range(PICTURES)), sum(i % 7 < 5 for i in range(PICTURES))


@pytest.fixture(scope="module")
def folder(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in1k")
    write_set(root / "val", orders(weights), WORDNET_IDS)
    return root


def options(weights: Path) -> list[object]:
    return ["test_smpconv", "--checkpoint", weights, "--model-args", '{"num_classes": 1000}', "--workers", 0]


def figures(out: str) -> list[tuple[int, int, int]]:
    return [(entry["correct"], entry["correct5"], entry["total"]) for entry in json.loads(out)]


def files_of(root: Path) -> list[tuple[str, bytes]]:
    return [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.JPEG"))]


def write_tar(path: Path, files: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_tar(source: Path, root: Path) -> Path:
    write_tar(root / "val.tar", files_of(source / "val"))
    return root / "val.tar"


def as_shards(source: Path, root: Path) -> Path:
    files = files_of(source / "val")
    for shard in range(2):
        content = []
        for name, data in files[shard::2]:
            synset, base = name.split("/")
            key = base.removesuffix(".JPEG")
            content += [(f"{key}.jpg", data), (f"{key}.cls", str(WORDNET_IDS.index(synset)).encode())]
        write_tar(root / f"imagenet1k-validation-{shard:02d}.tar", content)
    return root


def as_dataset(source: Path, root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    files = files_of(source / "val")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=WORDNET_IDS)})
    columns = {
        "image": [{"path": Path(name).name, "bytes": data} for name, data in files],
        "label": [WORDNET_IDS.index(name.split("/")[0]) for name, _ in files],
    }
    datasets.DatasetDict({"validation": datasets.Dataset.from_dict(columns, features=features)}).save_to_disk(str(root))
    return root


@pytest.mark.parametrize("form", [None, as_tar, as_shards, as_dataset])
def test_equal_numbers_from_folder_tar_shards_and_dataset(
    script: Script, weights: Path, folder: Path, tmp_path: Path, form: Callable[[Path, Path], Path] | None
) -> None:
    where = folder if form is None else form(folder, tmp_path)
    code, out, err = script(*options(weights), "--data-dir", where, "--partial", "--batch-size", 5, "--json")
    assert code == 0, err
    assert figures(out) == [(RIGHT, AMONG_FIVE, PICTURES)]
    (entry,) = json.loads(out)
    assert entry["kind"] == {None: "folder", as_tar: "tar", as_shards: "wds", as_dataset: "hfds"}[form]
    cfg = timm.get_pretrained_cfg("test_smpconv")
    assert (entry["img_size"], entry["crop_pct"], entry["interpolation"]) == (64, cfg.crop_pct, cfg.interpolation)
    assert entry["top1"] == pytest.approx(100 * RIGHT / PICTURES) and entry["param_count"] > 0
    assert any("name no synsets" in note for note in entry["notes"]) == (form is as_shards)
    # And by ReaL, which knows a picture by its name in all of these forms.
    code, out, err = script(*options(weights), "--data-dir", where, "--partial", "--data-set", "real", "--json")
    assert code == 0, err
    assert figures(out) == [real_figures(weights, folder)]


def real_figures(weights: Path, folder: Path) -> tuple[int, int, int]:
    """By timm's list of labels, picture by picture."""
    data = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert data is not None
    labels = json.loads(data)
    model, counted = network(weights), []
    for path in sorted(folder.rglob("*.JPEG")):
        known = labels[int(path.stem.removeprefix("ILSVRC2012_val_")) - 1]
        with torch.inference_mode():
            first = model(prepared(model, Image.open(path))[None])[0].argsort(descending=True)[:5].tolist()
        if known:
            counted.append((first[0] in known, bool(set(first) & set(known))))
    return sum(a for a, _ in counted), sum(b for _, b in counted), len(counted)


def test_real_labels_may_be_several_or_none(weights: Path, tmp_path: Path) -> None:
    data = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
    assert data is not None
    labels = json.loads(data)
    for number in (1, 2, 3):
        (tmp_path / WORDNET_IDS[0]).mkdir(exist_ok=True)
        picture(number).save(tmp_path / WORDNET_IDS[0] / f"ILSVRC2012_val_{number:08d}.JPEG")
    pictures = open_image_set("real", tmp_path, partial=True)
    assert labels[:3] == [[], [970, 795], [230, 231]]
    predictions = torch.tensor([[970, 1, 2, 3, 4], [795, 1, 2, 3, 4], [9, 1, 2, 3, 231]])
    assert image_accuracy.real_accuracy(pictures, predictions, [0, 1, 2]) == (1, 2, 2)
    assert image_accuracy.real_accuracy(pictures, predictions[[2]], [2]) == (0, 1, 1)
    (tmp_path / WORDNET_IDS[0] / "other.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ReaL knows pictures by their names.*other\.JPEG has another"):
        open_image_set("real", tmp_path, partial=True)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_count_every_picture_once(weights: Path, folder: Path, processes: int) -> None:
    found = torchrun(
        "imagenet",
        *(*options(weights), "--data-dir", folder, "--partial", "--batch-size", 4, "--json"),
        processes=processes,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert figures(found.stdout) == [(RIGHT, AMONG_FIVE, PICTURES)]
    assert json.loads(found.stdout)[0]["processes"] == processes


class Doubled(World):
    """A world in which a second process takes the same samples."""

    def total(self, values: Tensor) -> Tensor:
        return 2 * values


def test_what_is_counted_twice_is_no_result() -> None:
    samples: Any = torch.utils.data.TensorDataset(torch.rand(6, 10), torch.arange(6))
    with pytest.raises(RuntimeError, match="6 of 6 samples were not counted once"):
        measure(nn.Identity(), samples, Doubled(torch.device("cpu")), batch_size=2)
    with pytest.raises(ValueError, match="7 processes for 6 samples"):
        measure(nn.Identity(), samples, World(torch.device("cpu"), 0, 7))
    found = measure(nn.Identity(), samples, CPU, batch_size=4)
    assert found.labels.tolist() == list(range(6)) and found.predictions.shape == (6, 5)


# --------------------------------------------------------------------------------------------------- classes and counts


@pytest.mark.parametrize("name", ["a", "r"])
def test_sets_of_some_classes_choose_among_those(script: Script, weights: Path, tmp_path: Path, name: str) -> None:
    synsets = synsets_of(name)
    columns = [WORDNET_IDS.index(synset) for synset in synsets]
    assert len(columns) == 200
    write_set(tmp_path, orders(weights, columns), synsets)
    code, out, err = script(*options(weights), "--data-dir", tmp_path, "--data-set", name, "--partial", "--json")
    assert code == 0, err
    assert figures(out) == [(RIGHT, AMONG_FIVE, PICTURES)]
    # Shards may number them among all classes, or among their own.
    for numbers in (columns, list(range(200))):
        content = []
        for file, data in files_of(tmp_path):
            synset, base = file.split("/")
            key = base.removesuffix(".JPEG")
            content += [(f"{key}.jpg", data), (f"{key}.cls", str(numbers[synsets.index(synset)]).encode())]
        (tmp_path / "shards").mkdir(exist_ok=True)
        write_tar(tmp_path / "shards" / "0.tar", content)
        opened = open_image_set(name, tmp_path / "shards", partial=True)
        assert sorted(opened.labels.tolist()) == sorted(int(order) for order in labels_of(tmp_path, synsets))
        (tmp_path / "shards" / "0.tar").unlink()
        (tmp_path / "shards").rmdir()


def labels_of(root: Path, synsets: list[str]) -> list[int]:
    return [synsets.index(name.split("/")[0]) for name, _ in files_of(root)]


def test_the_folders_of_v2_are_numbers(script: Script, weights: Path, tmp_path: Path) -> None:
    write_set(tmp_path, orders(weights), [str(number) for number in range(1000)])
    code, out, err = script(*options(weights), "--data-dir", tmp_path, "--data-set", "v2", "--partial", "--json")
    assert code == 0, err
    assert figures(out) == [(RIGHT, AMONG_FIVE, PICTURES)]


def test_the_whole_set_is_taken_without_a_word(
    script: Script, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(IMAGE_SETS["in1k"], pictures=1000, per_class=1)
    monkeypatch.setitem(IMAGE_SETS, "in1k", small)
    data = io.BytesIO()
    picture(0).save(data, format="PNG")
    for name in WORDNET_IDS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.JPEG").write_bytes(data.getvalue())
    assert open_image_set("in1k", tmp_path).notes == ()
    code, out, err = script(*options(weights), "--data-dir", tmp_path, "--limit", 10)
    assert code == 0 and "only 10 of 1,000 pictures were taken" in out, err

    # A picture too many, and one too few.
    (tmp_path / WORDNET_IDS[3] / "2.JPEG").write_bytes(data.getvalue())
    code, out, err = script(*options(weights), "--data-dir", tmp_path)
    assert (code, out) == (1, "")
    assert (
        "it has 1,001 pictures, not 1,000" in err and f"have not 1 pictures, most of them 2 ({WORDNET_IDS[3]})" in err
    )
    (tmp_path / WORDNET_IDS[3] / "2.JPEG").rename(tmp_path / WORDNET_IDS[4] / "2.JPEG")
    (tmp_path / WORDNET_IDS[3] / "1.JPEG").unlink()
    (tmp_path / WORDNET_IDS[3]).rmdir()
    code, out, err = script(*options(weights), "--data-dir", tmp_path)
    assert code == 1 and f"1 of 1,000 classes are missing ({WORDNET_IDS[3]})" in err and "--partial" in err


def flat(root: Path) -> str:
    """All pictures in one folder, as the archive of the validation part has them."""
    (root / "val").mkdir()
    picture(0).save(root / "val" / "ILSVRC2012_val_00000001.JPEG")
    return r"has pictures in val itself"


def words(root: Path) -> str:
    (root / "tench").mkdir()
    picture(0).save(root / "tench" / "1.JPEG")
    return r"named by its WordNet id \(n01440764, \.\.\.\), it has 1, such as tench"


def another_set(root: Path) -> str:
    foreign = next(name for name in synsets_of("r") if name not in synsets_of("a"))
    (root / foreign).mkdir()
    picture(0).save(root / foreign / "1.JPEG")
    return rf"1 of its 1 folders for classes that ImageNet-A has not \({foreign}\).* looks like another set"


def no_class_at_all(root: Path) -> str:
    (root / "n99999999").mkdir()
    picture(0).save(root / "n99999999" / "1.JPEG")
    return r"1 of its 1 folders for classes that ImageNet-1k, validation part has not \(n99999999\)$"


@pytest.mark.parametrize(
    "write, name", [(flat, "in1k"), (words, "in1k"), (another_set, "a"), (no_class_at_all, "in1k")]
)
def test_folders_that_are_not_the_set(tmp_path: Path, write: Callable[[Path], str], name: str) -> None:
    expected = write(tmp_path)
    with pytest.raises(ValueError, match=expected):
        open_image_set(name, tmp_path, partial=True)


def test_where_there_is_nothing_to_measure_on(tmp_path: Path) -> None:
    assert {about.fetched for about in IMAGE_SETS.values()} - {None} <= set(SOURCES)
    with pytest.raises(
        FileNotFoundError, match=r"no such file or folder.*data fetch imagenet-r .*ImageNet-R is at https://"
    ):
        open_image_set("r", tmp_path / "nowhere")
    (tmp_path / "train" / "cats").mkdir(parents=True)
    picture(0).save(tmp_path / "train" / "cats" / "1.JPEG")
    with pytest.raises(ValueError, match="holds train but no val to measure on"):
        open_part(tmp_path)
    with pytest.raises(ValueError, match="is no test set; there are in1k"):
        open_image_set("imagenet", tmp_path)


# ------------------------------------------------------------------------------------------------------- how it is done


@pytest.mark.parametrize("way", [["--reparam"], ["--channels-last"], ["--dtype", "bfloat16"]])
def test_other_ways_to_compute_give_the_same_figures(
    script: Script, weights: Path, folder: Path, way: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = image_accuracy.measure

    def look(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        found = real(model, *arguments, **named)
        seen.update(model=model, found=found)
        return found

    monkeypatch.setattr(image_accuracy, "measure", look)
    code, out, err = script(*options(weights), "--data-dir", folder, "--partial", "--json", *way)
    assert code == 0, err
    (entry,) = json.loads(out)
    assert (entry["reparameterized"], entry["channels_last"]) == (way == ["--reparam"], way == ["--channels-last"])
    agreed = (seen["found"].predictions[:, 0] == expected_first(weights, folder)).sum()
    # In 8 bits two classes may change places, here and there.
    assert agreed >= (PICTURES - 3 if "bfloat16" in way else PICTURES)
    if way == ["--reparam"]:
        assert not any("BatchNorm" in type(module).__name__ for module in seen["model"].stages.modules())


def expected_first(weights: Path, folder: Path) -> Tensor:
    model = network(weights)
    with torch.inference_mode():
        x = torch.stack([prepared(model, Image.open(path)) for path in sorted(folder.rglob("*.JPEG"))])
        return model(x).argmax(dim=1)


class Small(nn.Module):
    """Takes three samples at a time, no more."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return x


def test_half_the_batch_when_memory_runs_out() -> None:
    samples: Any = torch.utils.data.TensorDataset(torch.eye(29), torch.arange(29))
    small = Small()
    found = measure(small, samples, CPU, batch_size=16, retry=True)
    assert found.correct() == 29 and found.batch_size == 2
    # Tried once; what was found out holds for the batches to come.
    assert small.sizes[:3] == [16, 8, 4] and max(small.sizes[3:]) == 2
    with pytest.raises(ValueError, match=r"out of memory with 16 at a time.*--retry"):
        measure(Small(), samples, CPU, batch_size=16)


def test_other_errors_are_not_taken_for_memory() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    samples: Any = torch.utils.data.TensorDataset(torch.eye(4), torch.arange(4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        measure(Broken(), samples, CPU, batch_size=4, retry=True)


def test_the_average_of_a_run_is_measured(script: Script, tmp_path: Path) -> None:
    """A run of one's own: what it says of its last epoch is measured again, with the average and without."""
    for part, count in (("train", 8), ("val", 5)):
        for label, name in enumerate(("left", "right")):
            (tmp_path / "mine" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (70, 70), (20 * i, 200 * label, 90)).save(tmp_path / "mine" / part / name / f"{i}.png")
    values: dict[str, Any] = {"epochs": 3, "batch_size": 4, "lr": 1e-2, "ema_decay": 0.999, "image_size": 48}
    recipe = ImageRecipe(
        id="test_smpconv.mine", network="test_smpconv", data="pictures", arguments={"num_classes": 2}, **values
    )
    run = train(recipe, tmp_path / "run", data_dir=tmp_path / "mine", workers=0)
    assert run is not None and run.outcome.best is not None
    common = (tmp_path / "run", "--data-dir", tmp_path / "mine", "--data-set", "pictures", "--workers", 0, "--json")
    code, out, err = script(*common)
    assert code == 0, err
    (entry,) = json.loads(out)
    assert entry["top1"] == pytest.approx(run.outcome.best.top1) and entry["img_size"] == 48
    assert entry["weights"].startswith("averaged weights of the best epoch")
    code, out, _ = script(*common, "--no-best")
    (entry,) = json.loads(out)
    assert entry["top1"] == pytest.approx(run.outcome.last.top1)
    assert "averaged weights after step 12" in entry["weights"]
    code, out, _ = script(*common, "--no-ema")
    assert "weights as trained after step 12" in json.loads(out)[0]["weights"]
    averaged, trained = (
        network_of_run(tmp_path / "run", averaged=averaged, best=False).model.state_dict() for averaged in (True, False)
    )
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(averaged[name], tensor)
    assert any(not torch.equal(averaged[name], trained[name]) for name in averaged)


def test_results_as_files(script: Script, weights: Path, folder: Path, tmp_path: Path) -> None:
    common = [*options(weights), "--data-dir", folder, "--partial"]
    for suffix in ("csv", "json", "md"):
        code, out, err = script(*common, "--out", tmp_path / f"results.{suffix}")
        assert code == 0 and f"{RIGHT} of {PICTURES}" in out, err
    (row,) = csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text()))
    (entry,) = json.loads((tmp_path / "results.json").read_text())
    assert int(row["correct"]) == entry["correct"] == RIGHT and float(row["top5"]) == pytest.approx(entry["top5"])
    assert "only a part of ImageNet-1k" in row["notes"]
    assert (tmp_path / "results.md").read_text().startswith("| model | weights |")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json", "results.md"]
    for wrong, said in ((tmp_path / "results.txt", ".csv, .json or .md"), (tmp_path / "no" / "r.csv", "is no folder")):
        code, out, err = script(*common, "--out", wrong)
        assert (code, out) == (1, "") and said in err


def test_names_and_wildcards(script: Script, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    where = ("--data-dir", folder, "--partial")
    code, out, err = script("smpconv_t.in1k", *where)
    assert (code, out) == (1, "") and "smpconv-zoo import smpconv_t.in1k" in err
    assert "smpconv-zoo import smpconv_t.in1k" in script("smpconv_t", *where)[2]
    code, out, err = script("smpconv_*", *where)
    assert code == 1 and "nothing to measure" in err and "left out: smpconv_b.in1k does not ship" in err
    # A checkpoint of other classes cannot be measured on these.
    code, out, err = script("smpconv_resnet_mnist.mnist5k", *where)
    assert code == 1 and "tells 10 classes apart" in err
    assert "did you mean smpconv_t.in1k" in script("smpconv_tt.in1k", *where)[2]
    assert "timm has no weights for 'no_such_network'" in script("no_such_network", *where)[2]
    assert "no checkpoint for these data matches 'nothing*'" in script("nothing*", *where)[2]


def test_help_shows_an_example(script: Script) -> None:
    code, out, _ = script("--help")
    assert code == 0 and "Example: python eval/imagenet.py smpconv_t.in1k" in " ".join(out.split())
