"""Exported files: every format gives the network's answers at any size, says what it is, and is whole or not there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_files import ROOT
from hub_clients import Clients
from hub_server import HubServer
from tolerances import RELATIVE_ERROR, relative_error
from torch import Tensor, nn

import smpconv_zoo
from smpconv_zoo import exporting
from smpconv_zoo.description import Description, describe, load_described
from smpconv_zoo.exported import EXTRA_FILE, ExportedFileError, format_of, open_exported
from smpconv_zoo.exporting import ExportError, export_model, export_network, plain_network
from smpconv_zoo.files import sha256_of_file, whole_file
from smpconv_zoo.merged import ChannelAffine
from smpconv_zoo.pretrained.cards import CardError, weights_dir
from smpconv_zoo.pretrained.store import read_safetensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript"),
]

DIGITS = "smpconv_tcn_mnist.smnist5k"
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "aot-inductor": ".pt2"}
FORMATS = ["onnx", "torch-export", "torchscript"]
COMPILER = shutil.which("g++") or shutil.which("clang++")

# Name, arguments, and sizes of one input: another than those that the exporter checks, larger than the traced one, and
# the smallest.
NETWORKS: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "test_smpconv": ({}, [(3, 97, 70), (3, 33, 33)]),
    "test_smpconv_tcn": ({}, [(1, 77), (1, 1)]),
    "smpconv_resnet": ({"dims": (4, 6), "kernel_size": 9, "in_chans": 2}, [(2, 40, 33), (2, 1, 1)]),
}


def random_statistics(model: nn.Module) -> nn.Module:
    """Norms as after training: those of a fresh network do next to nothing, and would hide how they are folded."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            for tensor in (module.running_var, module.weight):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def network(name: str) -> tuple[nn.Module, Description]:
    torch.manual_seed(0)
    model, description = load_described(name, untrained=True, arguments=NETWORKS[name][0])
    return random_statistics(model), description


def assert_same_answers(model: nn.Module, run: Callable[[Tensor], Tensor], shapes: list[tuple[int, ...]]) -> None:
    for i, shape in enumerate(shapes):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(100 + i))
        with torch.inference_mode():
            error = relative_error(run(x), model(x))
        assert error <= RELATIVE_ERROR["exported"], f"{shape}: {error:.1e}"


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(name: str, format: str, tmp_path: Path) -> None:
    model, description = network(name)
    out = tmp_path / f"a{SUFFIXES[format]}"
    done = export_model(model, description, out, format)
    assert os.listdir(tmp_path) == [out.name]
    assert (done.bytes, done.format) == (out.stat().st_size, format_of(out)) and format == done.format
    size = description.preprocessing.input_size
    assert done.dynamic == (("batch", "height", "width") if len(size) == 3 else ("batch", "length"))
    (first, second) = done.checks
    assert first.shape[0] != second.shape[0] and first.shape[2:] != second.shape[2:]
    assert max(first.error, second.error) <= exporting.TOLERANCE
    run, read_back = open_exported(out)
    assert read_back == description
    assert_same_answers(model, run, [(b, *size) for size in NETWORKS[name][1] for b in (1, 4)])


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_of_a_checkpoint(format: str, tmp_path: Path) -> None:
    out = tmp_path / f"digits{SUFFIXES[format]}"
    done = export_network(DIGITS, out, format)
    card = smpconv_zoo.checkpoint_card(DIGITS)
    run, description = open_exported(out)
    assert description == done.description
    assert (description.checkpoint, description.network) == (DIGITS, card.network)
    assert description.weights_sha256 == card.files[0].sha256
    assert description.classes == tuple("0123456789") and description.license == "MIT"
    assert description.version == smpconv_zoo.__version__
    preprocessing = description.preprocessing
    assert (preprocessing.kind, preprocessing.input_size, preprocessing.pixels) == ("sequence", (1, 784), (28, 28))
    assert (preprocessing.mean, preprocessing.std) == ((0.1307,), (0.3081,))
    golden = np.random.RandomState(card.golden.seed).standard_normal(card.golden.shape).astype(np.float32)
    error = relative_error(run(torch.from_numpy(golden)), torch.tensor(card.golden.logits))
    assert error <= RELATIVE_ERROR["exported"]


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="AOTInductor compiles C++, and there is no compiler here")
def test_round_trip_through_aot_inductor(tmp_path: Path) -> None:
    model, description = network("test_smpconv_tcn")
    out = tmp_path / "a.pt2"
    done = export_model(model, description, out, "aot-inductor")
    assert done.dynamic == ("batch", "length") and format_of(out) == "aot-inductor"
    run, read_back = open_exported(out)
    assert read_back == description
    assert_same_answers(model, run, [(1, 1, 77), (4, 1, 5)])
    with pytest.raises(ValueError, match=r"device 'cuda:9' cannot be used|compiled for cpu"):
        open_exported(out, "cuda:9")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_files_on_a_gpu(name: str, tmp_path: Path) -> None:
    model, description = network(name)
    shapes = [(b, *size) for size in NETWORKS[name][1] for b in (1, 4)]
    for format in ("torch-export", "torchscript", "aot-inductor"):
        out = tmp_path / f"{format}{SUFFIXES[format]}"
        export_model(model, description, out, format, device="cuda" if format == "aot-inductor" else "cpu")
        run, _ = open_exported(out, "cuda")
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            assert_same_answers(model, run, shapes)
    with pytest.raises(ExportedFileError, match="compiled for cuda and does not run on cpu"):
        open_exported(tmp_path / "aot-inductor.pt2")


@pytest.mark.parametrize("format", FORMATS)
def test_files_run_where_the_package_is_not(format: str, tmp_path: Path) -> None:
    """In a process that cannot import it, by the runtime alone."""
    model, description = network("test_smpconv_tcn")
    out = tmp_path / f"a{SUFFIXES[format]}"
    export_model(model, description, out, format)
    x = torch.randn(3, 1, 40, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "x.npy", x.numpy())
    run = {
        "onnx": "import onnxruntime as ort; s = ort.InferenceSession(sys.argv[1]); y = s.run(None, {'input': x})[0]\n"
        "info = s.get_modelmeta().custom_metadata_map['smpconv_zoo']",
        "torch-export": "import torch; extra = {'smpconv_zoo.json': ''}\n"
        "p = torch.export.load(sys.argv[1], extra_files=extra); y = p.module()(torch.from_numpy(x)).numpy()\n"
        "info = extra['smpconv_zoo.json']",
        "torchscript": "import torch; extra = {'smpconv_zoo.json': ''}\n"
        "p = torch.jit.load(sys.argv[1], _extra_files=extra); y = p(torch.from_numpy(x)).detach().numpy()\n"
        "info = extra['smpconv_zoo.json']",
    }[format]
    code = (
        "import sys, json; sys.modules.update(smpconv_zoo=None, timm=None); import numpy as np\n"
        f"x = np.load('x.npy')\n{run}\nassert json.loads(info)['network'] == 'test_smpconv_tcn'\nnp.save('y.npy', y)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        error = relative_error(torch.from_numpy(np.load(tmp_path / "y.npy")), model(x))
    assert error <= RELATIVE_ERROR["exported"]


def test_an_onnx_file_holds_no_foreign_operator_and_names_its_axes(tmp_path: Path) -> None:
    import onnx

    model, description = network("test_smpconv")
    out = tmp_path / "a.onnx"
    export_model(model, description, out, "onnx")
    loaded = onnx.load(out)
    onnx.checker.check_model(loaded, full_check=True)
    assert [(entry.domain, entry.version) for entry in loaded.opset_import] == [("", exporting.OPSET)]
    assert not [node.op_type for node in loaded.graph.node if node.domain] and not loaded.functions
    assert "BatchNormalization" not in {node.op_type for node in loaded.graph.node}
    shape = loaded.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in shape] == ["batch", 3, "height", "width"]
    assert [value.name for value in (*loaded.graph.input, *loaded.graph.output)] == ["input", "logits"]
    assert str(ROOT) not in str(loaded)


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    model, description = network("test_smpconv_tcn")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, description, tmp_path / "a.pt", "torchscript")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plain_network_consists_of_pytorchs_modules() -> None:
    for name in NETWORKS:
        model, description = network(name)
        plain = plain_network(model)
        kinds = {type(module) for module in plain.modules() if list(module.parameters(recurse=False))}
        # In front of the pooling an image network keeps a factor and a shift for each channel.
        assert kinds <= {nn.Conv1d, nn.Conv2d, nn.Linear, ChannelAffine}
        assert_same_answers(model, plain, [(2, *description.preprocessing.input_size)])


def test_an_input_too_small_for_tracing_leaves_only_the_batch_free(tmp_path: Path) -> None:
    """At 32 x 32 the last map is a single pixel, and tracing takes a size of 1 for a fixed one."""
    torch.manual_seed(0)
    model, description = load_described("test_smpconv", untrained=True)
    size = dataclasses.replace(description.preprocessing, input_size=(3, 32, 32))
    description = dataclasses.replace(description, preprocessing=size)
    done = export_model(model, description, tmp_path / "a.pt2", "torch-export")
    assert done.dynamic == ("batch",)
    assert [check.shape for check in done.checks] == [(1, 3, 32, 32), (3, 3, 32, 32)]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_compiling_a_network_whole(name: str, merged: bool) -> None:
    torch.compiler.reset()
    model, description = network(name)
    x = torch.randn(2, *description.preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x)
        if merged:
            model.reparameterize()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x), expected) <= RELATIVE_ERROR["exported"]


# ---------------------------------------------------------------------------------------------- what must not be left


class Wrong(nn.Module):
    """A network whose answers are a little off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * 1.001


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_differs_is_not_left(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, description = network("test_smpconv_tcn")
    plain = exporting.plain_network
    monkeypatch.setattr(exporting, "plain_network", lambda model: Wrong(plain(model)))
    out = tmp_path / f"a{SUFFIXES[format]}"
    with pytest.raises(ExportError, match=r"was not written: on an input of shape .* differ .* 1.0e-03 of the largest"):
        export_model(model, description, out, format)
    assert os.listdir(tmp_path) == []
    out.write_bytes(b"old")
    with pytest.raises(ExportError):
        export_model(model, description, out, format, overwrite=True)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == [out.name]


def test_answers_that_are_no_numbers_are_no_equal_answers(tmp_path: Path) -> None:
    model, description = network("test_smpconv_tcn")
    with torch.no_grad():
        model.head.fc.bias.fill_(torch.nan)
    with pytest.raises(ExportError, match="was not written"):
        export_model(model, description, tmp_path / "a.pt", "torchscript")
    assert os.listdir(tmp_path) == []


def test_an_error_at_one_size_only_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kernels had been cut to the map of the traced input."""

    class Cut(Wrong):
        def forward(self, x: Tensor) -> Tensor:
            y = self.model(x)
            if x.size(2) != 32:
                y = y * 1.01
            return y

    model, description = network("test_smpconv_tcn")
    plain = exporting.plain_network
    monkeypatch.setattr(exporting, "plain_network", lambda model: Cut(plain(model)))
    with pytest.raises(ExportError, match=r"on an input of shape \(3, 1, 24\)"):
        export_model(model, description, tmp_path / "a.pt", "torchscript")


def test_a_killed_export_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    code = """
import signal, sys, time
from smpconv_zoo import exporting
# Shells start what runs in the background deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(*args):
    sys.stdout.write("written\\n"); sys.stdout.flush(); time.sleep(300)
exporting._check = wait
exporting.export_network("test_smpconv_tcn", sys.argv[1], "torch-export", untrained=True)
"""
    out = tmp_path / "a.pt2"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    process.stdout.close()
    assert os.listdir(tmp_path) == [], "an interrupt cleans up behind itself"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), whole_file(path) as aside:
        aside.write_text("new")
        raise OSError(28, "disk")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with whole_file(path) as aside:
        assert aside.name == "a" and aside.parent.parent == tmp_path
        aside.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


# ------------------------------------------------------------------------------------------------- refused beforehand


@pytest.mark.parametrize(
    ("name", "out", "format", "options", "error", "message"),
    [
        ("test_smpconv", "a.pt", "onnx", {"untrained": True}, ValueError, "has to end in .onnx, got a.pt"),
        ("test_smpconv", "a.pt", "jit", {"untrained": True}, ValueError, "format must be one of onnx, torch-export"),
        ("test_smpconv", "no/a.pt", "torchscript", {"untrained": True}, FileNotFoundError, "no is no folder"),
        ("test_smpconv", "old.pt", "torchscript", {"untrained": True}, FileExistsError, "--force"),
        (
            "test_smpconv",
            "a.pt",
            "torchscript",
            {"untrained": True, "device": "cuda"},
            ValueError,
            "runs on any device",
        ),
        ("test_smpconv", "a.pt2", "aot-inductor", {"device": "cuda:77"}, ValueError, "'cuda:77' cannot be used"),
        ("test_smpconv", "a.pt", "torchscript", {}, CardError, r"network without weights.*it has none.*--untrained"),
        ("smpconv_t", "a.pt", "torchscript", {}, CardError, r"name a checkpoint \(smpconv_t.in1k\)"),
        ("smpconv_q", "a.pt", "torchscript", {}, ValueError, "did you mean smpconv_t"),
        ("smpconv_t.no", "a.pt", "torchscript", {}, CardError, "no checkpoint is called 'smpconv_t.no'"),
        (DIGITS, "a.pt", "torchscript", {"untrained": True}, ValueError, "names weights"),
        (
            "test_smpconv",
            "a.pt",
            "torchscript",
            {"untrained": True, "arguments": {"no": 1}},
            ValueError,
            "cannot be built from the arguments",
        ),
    ],
)
def test_refused_before_any_work(
    name: str,
    out: str,
    format: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.pt").write_bytes(b"old")
    with pytest.raises(error, match=message):
        export_network(name, out, format, **options)
    assert os.listdir(tmp_path) == ["old.pt"] and Path("old.pt").read_bytes() == b"old"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_said_first(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is needed .* pip install "smpconv-zoo\[export\]"'):
        export_network("nobody asks for this name", tmp_path / "a.onnx", "onnx")


def test_a_missing_compiler_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match=r"needs a C\+\+ compiler, and .* is not there: set CXX"):
        export_network("nobody asks for this name", tmp_path / "a.pt2", "aot-inductor")


def test_a_compiler_that_fails_is_one_sentence(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import exc

    def fail(*args: object, **options: object) -> None:
        raise exc.CppCompileError(["g++", "a.cpp"], "a.cpp:1: no such header\nTraceback")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    out = str(tmp_path / "a.pt2")
    code, text, err = call("export", "test_smpconv_tcn", "--untrained", "--format", "aot-inductor", "--out", out)
    assert (code, text) == (1, "") and err.count("\n") == 1 and "no such header" in err
    assert err.startswith("smpconv-zoo: aot-inductor could not compile the network: ")
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------- files of others


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    for suffix in (".onnx", ".pt2", ".pt"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(b"nothing")
        with pytest.raises(ExportedFileError, match=r"cannot be run by onnxruntime|no exported network"):
            open_exported(path)
        with pytest.raises(OSError):
            open_exported(tmp_path / f"absent{suffix}")
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ExportedFileError, match="no exported network: it is an archive of something else"):
        open_exported(tmp_path / "weights.pt")
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "b.pt")
    with pytest.raises(ExportedFileError, match="holds no description"):
        open_exported(tmp_path / "b.pt")
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "c.pt", _extra_files={EXTRA_FILE: '{"network": 1}'})
    with pytest.raises(ExportedFileError, match="its description cannot be used: description: unknown fields"):
        open_exported(tmp_path / "c.pt")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    model, description = network("test_smpconv_tcn")
    for format in FORMATS:
        out = tmp_path / f"a{SUFFIXES[format]}"
        export_model(model, description, out, format)
        out.write_bytes(out.read_bytes()[:-1000])
        with pytest.raises(ExportedFileError):
            open_exported(out)


def test_a_description_has_to_agree_with_itself() -> None:
    _, description = load_described("test_smpconv", untrained=True)
    assert Description.from_json(description.to_json()) == description
    plain = json.loads(description.to_json())
    for change, message in (
        ({"num_classes": 3, "classes": ["a"]}, "1 names for 3 classes"),
        ({"preprocessing": plain["preprocessing"] | {"kind": "sound"}}, "no size"),
        ({"preprocessing": plain["preprocessing"] | {"mean": [0.0]}}, "one number a channel"),
        ({"preprocessing": plain["preprocessing"] | {"std": [1.0, 0.0, 1.0]}}, "std is not 0"),
        ({"preprocessing": plain["preprocessing"] | {"pixels": [3, 3]}}, "is no sequence of 64"),
        ({"preprocessing": plain["preprocessing"] | {"order": [0, 0]}}, "no permutation"),
        ({"more": 1}, "unknown fields"),
    ):
        with pytest.raises(ValueError, match=message):
            Description.from_json(json.dumps(plain | change))


def test_descriptions_of_checkpoints() -> None:
    _, permuted = load_described("smpconv_tcn_mnist.pmnist5k")
    order = permuted.preprocessing.order
    assert order is not None and order != tuple(range(784)) and sorted(order) == list(range(784))
    card = smpconv_zoo.checkpoint_card
    images = describe(smpconv_zoo.create_model("smpconv_t.in1k", device="meta"), card("smpconv_t.in1k"))
    assert images.classes is not None and images.classes[0].startswith("tench") and len(images.classes) == 1000
    assert (images.preprocessing.crop_pct, images.preprocessing.interpolation) == (0.875, "bicubic")
    cifar = describe(smpconv_zoo.create_model("smpconv_tcn_cifar.scifar10"), card("smpconv_tcn_cifar.scifar10"))
    assert cifar.preprocessing.pixels == (32, 32) and cifar.preprocessing.mean == (0.485, 0.456, 0.406)
    assert cifar.classes is not None and cifar.classes[3] == "cat"
    words = smpconv_zoo.create_model("smpconv_tcn_speech_raw.sc10", device="meta")
    assert describe(words, card("smpconv_tcn_speech_raw.sc10")).classes[:2] == ("yes", "no")
    letters = smpconv_zoo.create_model("smpconv_tcn_chartraj.ct")
    assert describe(letters, card("smpconv_tcn_chartraj.ct")).classes is None
    other = smpconv_zoo.create_model("smpconv_tcn_mnist", num_classes=3)
    assert describe(other, card(DIGITS)).classes is None


# ------------------------------------------------------------------------------------------------ on the command line


def test_the_command(call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = str(tmp_path / "a.onnx")
    code, text, err = call("export", DIGITS, "--format", "onnx", "--out", out)
    assert (code, err) == (0, "")
    assert f"network {DIGITS}, weights of sha256 36bb31ed" in text and "free    batch, length" in text
    assert text.count("of the largest logit") == 2 and f"wrote   {out}" in text
    code, text, err = call("export", DIGITS, "--format", "onnx", "--out", out)
    assert (code, text) == (1, "") and "--force" in err
    arguments = ("export", "smpconv_resnet", "--untrained", "--format", "torchscript", "--out", str(tmp_path / "b.pt"))
    code, text, err = call(*arguments, "--model-args", '{"dims": [4, 4], "kernel_size": 9}', "--json")
    answer = json.loads(text)
    assert code == 0 and answer["description"]["arguments"] == {"dims": [4, 4], "kernel_size": 9}
    assert answer["description"]["weights_sha256"] is None and answer["format"] == "torchscript"
    assert call("export", "smpconv_t", "--format", "onnx", "--out", str(tmp_path / "c.onnx"))[0] == 1
    assert call("export", "smpconv_t", "--format", "jpg", "--out", str(tmp_path / "c.onnx"))[0] == 2


def test_a_folder_with_a_card_is_exported_with_it(tmp_path: Path) -> None:
    """As it is laid out for the Hub."""
    folder = tmp_path / "digits"
    folder.mkdir()
    shutil.copy(weights_dir() / f"{DIGITS}.safetensors", folder / "model.safetensors")
    own = {
        "input_size": [1, 1, 784],
        "mean": [0.1307],
        "std": [0.3081],
        "label_names": [f"digit {i}" for i in range(10)],
    }
    config = {"architecture": "smpconv_tcn_mnist", "num_classes": 10, "pretrained_cfg": own}
    (folder / "config.json").write_text(json.dumps(config))
    _, known = load_described(f"local-dir:{folder}")
    assert known.checkpoint == DIGITS, "the very file of a checkpoint"
    assert known.classes is not None and known.classes[3] == "digit 3"
    card = json.loads((weights_dir() / f"{DIGITS}.json").read_text()) | {"id": "smpconv_tcn_mnist.mine"}
    (folder / "card.json").write_text(json.dumps(card))
    _, described = load_described(f"local-dir:{folder}")
    assert (described.checkpoint, described.preprocessing.pixels) == ("smpconv_tcn_mnist.mine", (28, 28))
    assert described.weights_sha256 == known.weights_sha256 == smpconv_zoo.checkpoint_card(DIGITS).files[0].sha256
    (folder / "card.json").unlink()
    tensors, _ = read_safetensors(folder / "model.safetensors")
    tensors["head.fc.bias"] = tensors["head.fc.bias"] + 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    _, unknown = load_described(f"local-dir:{folder}")
    assert unknown.checkpoint is None and unknown.preprocessing.pixels is None
    assert unknown.weights_sha256 == sha256_of_file(folder / "model.safetensors") != known.weights_sha256
    assert str(tmp_path) not in described.to_json()


PUBLISH = """
from huggingface_hub import HfApi
from timm.models._hub import save_config_for_hf
folder, api = Path("folder"), HfApi()
folder.mkdir()
save_config_for_hf(timm.create_model("smpconv_tcn_mnist"), folder / "config.json")
source = Path(os.environ["TEST_WEIGHTS"])
(folder / "model.safetensors").write_bytes(source.read_bytes())
(folder / "card.json").write_bytes(source.with_suffix(".json").read_bytes())
api.create_repo("zoo/digits")
answer(revision=api.upload_folder(repo_id="zoo/digits", folder_path=folder).oid)
"""


def test_a_repository_on_the_hub(tmp_path: Path) -> None:
    with HubServer() as server, Clients() as clients:
        environment = server.environment(tmp_path / "hf") | {"HOME": str(tmp_path), "SMPCONV_HOME": str(tmp_path)}
        weights = str(weights_dir() / f"{DIGITS}.safetensors")
        revision = clients.run(environment | {"TEST_WEIGHTS": weights}, PUBLISH, tmp_path, ROOT)["revision"]
        code = (
            "from smpconv_zoo.exporting import export_network\nfrom dataclasses import asdict\n"
            "done = export_network('hf-hub:zoo/digits', 'a.pt', 'torchscript')\nanswer(**asdict(done.description))"
        )
        answer = clients.run(environment, code, tmp_path, ROOT)
    assert answer["checkpoint"] == DIGITS and answer["preprocessing"]["pixels"] == [28, 28]
    assert answer["weights_sha256"] == smpconv_zoo.checkpoint_card(DIGITS).files[0].sha256
    assert len(revision) == 40 and (tmp_path / "a.pt").is_file()
