"""Evaluation and report, on a copy of the package whose weights folder the tests fill themselves."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import smpconv_zoo
from smpconv_zoo.checkpoints import write_safetensors
from smpconv_zoo.data.mnist5k import mnist5k_sequences
from smpconv_zoo.evaluation import evaluate_checkpoint, top1
from smpconv_zoo.evaluation.classification import predict
from smpconv_zoo.evaluation.figures import confusion_figure, kernel_figure
from smpconv_zoo.evaluation.report import write_report
from smpconv_zoo.pretrained.store import sha256_of

NETWORK = "smpconv_tcn_mnist"
ARGUMENTS = {"dims": [4], "n_points": 5}
PNG = b"\x89PNG\r\n\x1a\n"


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`smpconv-zoo` from another checkout, as a user starts it."""
    command = [sys.executable, "-m", "smpconv_zoo.cli", *arguments]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)


def add_checkpoint(weights: Path, tag: str, permutation: list[int] | None, correct_by: int = 0) -> None:
    """Weights at random and a card with what they truly score on the test digits, plus `correct_by`."""
    torch.manual_seed(7)
    model = smpconv_zoo.create_model(NETWORK, **ARGUMENTS).eval()
    x, y = mnist5k_sequences("test", permutation)
    with torch.inference_mode():
        # Untrained logits differ by too little for a fair test of equality: spread them, centred, far apart.
        model.head.fc.weight.normal_(std=50)
        logits = torch.cat([model(part) for part in x.split(250)])
        model.head.fc.bias.copy_(-logits.mean(dim=0))
        correct = int(((logits - logits.mean(dim=0)).argmax(dim=1) == y).sum()) + correct_by
    path = weights / f"{NETWORK}.{tag}.safetensors"
    metadata = None if permutation is None else {"permutation": json.dumps(permutation)}
    sha256 = write_safetensors(path, model.state_dict(), metadata)
    where = {"command": "none", "log": "none", "hardware": "CPU", "versions": {"torch": torch.__version__}}
    card = {
        "id": f"{NETWORK}.{tag}",
        "network": NETWORK,
        "arguments": ARGUMENTS,
        "status": "embedded",
        "files": [{"name": path.name, "sha256": sha256, "bytes": path.stat().st_size}],
        "tensors": len(model.state_dict()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": 0,
        "data": {
            "name": "mnist5k",
            "input": "sequence" if permutation is None else "permuted sequence",
            "split": "test",
        },
        "scaling": None,
        "paper": None,
        "measured": {"top1": correct / 10, "correct": correct, "total": 1000, **where},
        "training": None,
        "golden": None,
        "hub": None,
        "source": None,
        "license": "MIT",
        "origin": "random weights of a test",
    }
    (weights / f"{NETWORK}.{tag}.json").write_text(json.dumps(card), encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with two checkpoints of random weights, both truly declared."""
    return make_checkout(tmp_path_factory.mktemp("true"))


def make_checkout(root: Path, rows_correct_by: int = 0) -> Path:
    package = Path(smpconv_zoo.__file__).parent
    shutil.copytree(package, root / "smpconv_zoo", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "weights").mkdir()
    add_checkpoint(root / "weights", "rows", None, rows_correct_by)
    add_checkpoint(root / "weights", "shuffled", torch.randperm(784, generator=torch.manual_seed(3)).tolist())
    return root


def test_the_figures_of_true_cards_are_reproduced(checkout: Path) -> None:
    done = run(checkout, "eval", f"{NETWORK}.*", "--json", "--batch-size", "300", "--threads", "1")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    assert [result["id"] for result in results] == [f"{NETWORK}.rows", f"{NETWORK}.shuffled"]
    for result in results:
        card = json.loads((checkout / "weights" / f"{result['id']}.json").read_text())
        assert result["agrees"] is True
        assert (result["correct"], result["total"]) == (card["measured"]["correct"], 1000)
        assert result["top1"] == result["correct"] / 10
        assert sum(result["confusion"][i][i] for i in range(10)) == result["correct"]
        assert [sum(row) for row in result["confusion"]] == [100] * 10
        assert result["versions"]["torch"] == torch.__version__


def test_demo_writes_a_report_that_needs_no_other_file(checkout: Path, tmp_path: Path) -> None:
    out = tmp_path / "some" / "report"
    done = run(checkout, "demo", "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert str(out / "index.html") in done.stdout
    names = {f"{NETWORK}.{tag}.{kind}.png" for tag in ("rows", "shuffled") for kind in ("kernels", "confusion")}
    assert {path.name for path in out.iterdir()} == names | {"index.html", "report.md"}
    page = (out / "index.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert sorted(pictures) == sorted((out / name).read_bytes() for name in names)
    assert all(picture.startswith(PNG) for picture in pictures)
    assert page.count("src=") == 4 and "http" not in page
    for line in (out / "report.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| {NETWORK}"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[2] == "-" and cells[4] == "-" and cells[5] == cells[6] and cells[5].endswith("of 1000)")


def test_another_figure_is_status_1_and_a_flipped_byte_is_refused_with_both_hashes(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path, rows_correct_by=1)
    done = run(checkout, "eval", f"{NETWORK}.rows")
    assert done.returncode == 1
    assert done.stderr == f"smpconv-zoo: not equal to the card's figure: {NETWORK}.rows\n"
    assert f"{NETWORK}.rows  mnist5k, sequence" in done.stdout

    path = checkout / "weights" / f"{NETWORK}.shuffled.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = run(checkout, "eval", f"{NETWORK}.shuffled")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    card = json.loads((checkout / "weights" / f"{NETWORK}.shuffled.json").read_text())
    for sha256 in (card["files"][0]["sha256"], sha256_of(bytes(data))):
        assert sha256 in done.stderr


def test_top1_counts_and_reports_every_batch() -> None:
    x = torch.eye(5)[[0, 1, 2, 3, 4, 0, 1]]
    y = torch.tensor([0, 1, 2, 3, 0, 1, 1])
    seen: list[tuple[int, int]] = []
    assert top1(torch.nn.Identity(), x, y, batch_size=3, progress=lambda *at: seen.append(at)) == 5
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_predict_does_not_train_the_model_and_refuses_empty_batches() -> None:
    model = torch.nn.BatchNorm1d(3)
    predict(model, torch.randn(4, 3), 2, "cpu")
    assert not model.training and int(model.num_batches_tracked) == 0
    assert predict(model, torch.empty(0, 3), 2, "cpu").shape == (0,)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predict(model, torch.randn(4, 3), 0, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"limit": 0}, "limit must be at least 1"),
        ({}, "no checkpoint is called 'nonsense'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint("nonsense", **arguments)


@pytest.mark.parametrize("name", ["test_smpconv_tcn", "test_smpconv", "smpconv_resnet"])
def test_kernels_of_every_family_are_drawn(name: str) -> None:
    picture = kernel_figure(smpconv_zoo.create_model(name, **({} if "test" in name else {"dims": (3, 4)})), name)
    assert picture is not None and picture.startswith(PNG)


def test_points_that_left_the_kernel_and_dead_kernels_are_drawn() -> None:
    model = smpconv_zoo.create_model("test_smpconv_tcn")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".coords"):
                parameter.fill_(3.0)
    picture = kernel_figure(model, "all points in the future")
    assert picture is not None and picture.startswith(PNG)


def test_networks_without_points_have_no_picture_and_perfect_confusions_have_one() -> None:
    assert kernel_figure(torch.nn.Linear(2, 2), "nothing") is None
    assert confusion_figure([[5, 0], [0, 5]], "perfect").startswith(PNG)


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match="file"):
        write_report([], tmp_path / "file")
    (tmp_path / "report" / "report.md").mkdir(parents=True)
    with pytest.raises(OSError, match=r"report\.md"):
        write_report([], tmp_path / "report")
    assert (tmp_path / "file").read_text() == "precious"
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.md"]
