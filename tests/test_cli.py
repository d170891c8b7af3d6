"""The command line, as processes and, where the answer is the same, in this one."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from golden_files import golden

import smpconv_zoo
from smpconv_zoo import cli
from smpconv_zoo.pretrained.store import sha256_of

TINY = {"kernel_sizes": [13, 11, 9, 7], "depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "num_classes": 10}


class Call:
    """`main` in this process: saves the seconds that importing PyTorch takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["smpconv-zoo", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = self.capsys.readouterr()
        return stop.value.code or 0, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return Call(monkeypatch, capsys)


def assert_one_sentence(answer: tuple[int, str, str], *parts: str) -> None:
    code, out, err = answer
    assert (code, out) == (1, "")
    assert err.startswith("smpconv-zoo: ") and err.count("\n") == 1 and "Traceback" not in err
    for part in parts:
        assert part in err


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"smpconv-zoo {smpconv_zoo.__version__}\n", "")


def test_the_package_imports_neither_the_command_line_nor_the_extras() -> None:
    code = (
        "import sys, smpconv_zoo, smpconv_zoo.evaluation.report; "
        "sys.stdout.write(' '.join({'matplotlib', 'mlxtend', 'rich', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("list",),
        ("info",),
        ("convert",),
        ("import",),
        ("publish",),
        ("eval",),
        ("demo",),
        ("export",),
        ("predict",),
    ],
)
def test_every_help_shows_an_example(call: Call, command: tuple[str, ...]) -> None:
    code, out, err = call(*command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: smpconv-zoo" in out and "Example: smpconv-zoo" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lst",), "No such command 'lst'"),
        (("convert", "a.pth", "--model", "smpconv_t"), "Missing option '--out'"),
        (("convert", "a.pth", "--model", "smpconv_t", "--out", "b", "--model-args", "[1]"), "must be a JSON object"),
        (("convert", "a.pth", "--model", "smpconv_t", "--out", "b", "--model-args", "{"), "is not JSON"),
        (("eval", "*", "--batch-size", "0"), "--batch-size"),
    ],
)
def test_wrong_usage_is_status_2(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_list_names_every_network_and_checkpoint(call: Call) -> None:
    code, out, err = call("list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any(line.split() == ["smpconv_tcn_mnist", "370,960", "SMPConvTCN", "1", "x", "784", "10"] for line in lines)
    for name in smpconv_zoo.list_checkpoints():
        assert any(line.startswith(f"{name} ") for line in lines)


def test_list_json(call: Call) -> None:
    code, out, _ = call("list", "--json")
    answer = json.loads(out)
    assert code == 0
    assert [card["id"] for card in answer["checkpoints"]] == smpconv_zoo.list_checkpoints()
    facts = {network["name"]: network for network in answer["networks"]}
    assert facts["smpconv_tcn_mnist"]["parameters"] == 370960
    assert facts["smpconv_tcn_mnist"]["input_shape"] == [1, 784]
    assert not any(name.startswith("test_") for name in facts)


def test_info_about_a_network(call: Call) -> None:
    code, out, _ = call("info", "smpconv_t")
    assert code == 0 and "26,705,248" in out
    assert json.loads(call("info", "smpconv_t", "--json")[1])["num_classes"] == 1000


def test_info_about_every_checkpoint(call: Call) -> None:
    for name in smpconv_zoo.list_checkpoints():
        code, out, _ = call("info", name)
        assert code == 0 and name in out
        assert json.loads(call("info", name, "--json")[1])["id"] == name


def test_wrong_names_meet_near_ones(call: Call) -> None:
    assert_one_sentence(call("info", "smpconv_tcn_mnst"), "'smpconv_tcn_mnst'", "did you mean smpconv_tcn_mnist")
    assert_one_sentence(call("info", "qqq"), "'qqq'", "smpconv-zoo list")
    assert_one_sentence(call("eval", "qqq"), "no checkpoint is called 'qqq'")
    assert_one_sentence(call("eval", "qqq*"), "no embedded checkpoint matches 'qqq*'")


def test_convert_a_sequence_checkpoint(call: Call, tmp_path: Path) -> None:
    source, out = golden("seq_smnist.pth"), tmp_path / "a.safetensors"
    code, text, err = call("convert", str(source), "--model", "smpconv_tcn_mnist", "--out", str(out))
    assert (code, err) == (0, "")
    assert "(pickle): weights as trained, not averaged, from 'model'" in text
    assert "184 tensors, 370,960 parameters" in text
    assert sha256_of(out.read_bytes()) in text
    model = smpconv_zoo.create_model("smpconv_tcn_mnist")
    model.load_state_dict(safetensors.torch.load_file(out))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_convert_an_image_checkpoint_prefers_averaged_weights(tmp_path: Path) -> None:
    source, out = golden("tiny_checkpoint.pth"), tmp_path / "b.safetensors"
    wanted = ["convert", str(source), "--model", "smpconv_t", "--out", str(out), "--model-args", json.dumps(TINY)]
    command = [sys.executable, "-m", "smpconv_zoo", *wanted, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["averaged"] is True and answer["entry"] == "state_dict_ema" and answer["parameters"] == 35478
    assert answer["sha256"] == sha256_of(out.read_bytes())
    expected = smpconv_zoo.convert_checkpoint(source, "smpconv_t", **TINY)
    written = safetensors.torch.load_file(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_convert_overwrites_only_when_told(call: Call, tmp_path: Path) -> None:
    source, out = str(golden("seq_smnist.pth")), tmp_path / "a.safetensors"
    out.write_text("precious")
    wanted = ("convert", source, "--model", "smpconv_tcn_mnist", "--out", str(out))
    assert_one_sentence(call(*wanted), str(out), "--force")
    assert out.read_text() == "precious"
    assert call(*wanted, "--force")[0] == 0
    assert safetensors.torch.load_file(out)


class Foreign:
    """A pickle that would create a file if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_files_that_cannot_be_converted(call: Call, tmp_path: Path) -> None:
    whole = golden("seq_smnist.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "foreign.pth").write_bytes(pickle.dumps({"model": Foreign(tmp_path / "executed")}, protocol=2))
    (tmp_path / "newer.pth").write_bytes(pickle.dumps({"model": Foreign(tmp_path / "executed")}, protocol=4))
    (tmp_path / "text.safetensors").write_text("not weights")
    before = sorted(os.listdir(tmp_path))

    def convert(source: Path, model: str = "smpconv_tcn_mnist", *more: str) -> tuple[int, str, str]:
        return call("convert", str(source), "--model", model, "--out", str(tmp_path / "out.safetensors"), *more)

    assert_one_sentence(convert(tmp_path / "foreign.pth"), "foreign.pth", "it asks for posix.mkdir")
    assert_one_sentence(convert(tmp_path / "truncated.pth"), "truncated.pth", "it is truncated or damaged")
    for name in ("newer.pth", "empty.pth", "text.safetensors"):
        assert_one_sentence(convert(tmp_path / name), name)
    assert_one_sentence(convert(tmp_path), "is a directory")
    assert_one_sentence(convert(tmp_path / "absent.pth"), "does not exist")
    source = golden("seq_smnist.pth")
    assert_one_sentence(convert(source, "smpconv_tcn_mnst"), "did you mean smpconv_tcn_mnist")
    assert_one_sentence(convert(source, "smpconv_tcn_cifar"), "missing keys")
    assert_one_sentence(convert(source, "smpconv_tcn_mnist", "--model-args", '{"colour": 1}'), "colour")
    assert sorted(os.listdir(tmp_path)) == before


def test_outputs_that_cannot_be_written(call: Call, tmp_path: Path) -> None:
    def convert(out: Path, *more: str) -> tuple[int, str, str]:
        return call("convert", str(golden("seq_smnist.pth")), "--model", "smpconv_tcn_mnist", "--out", str(out), *more)

    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    before = sorted(os.listdir(tmp_path))
    assert_one_sentence(convert(tmp_path / "weights.pth"), "has to end in .safetensors", "weights.pth")
    assert_one_sentence(convert(tmp_path / "absent" / "a.safetensors"), "No such file or directory")
    assert_one_sentence(convert(tmp_path / "file" / "a.safetensors"), "Not a directory")
    assert_one_sentence(convert(tmp_path / "folder.safetensors", "--force"), "folder.safetensors cannot be written")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission(call: Call, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    out = str(tmp_path / "a.safetensors")
    answer = call("convert", str(golden("seq_smnist.pth")), "--model", "smpconv_tcn_mnist", "--out", out)
    assert_one_sentence(answer, f"{out} cannot be written: Permission denied")


def test_missing_matplotlib_is_said_before_anything_is_computed(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_sentence(call("demo"), 'pip install "smpconv-zoo[report]"')
