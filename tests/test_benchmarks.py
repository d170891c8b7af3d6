"""The benchmarks: what they compare computes the same, they count right, and what they write. Never a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from typer.testing import CliRunner

from smpconv_zoo import cli
from smpconv_zoo.benchmarks import cpu, measure, operator, sequence, synthesis
from smpconv_zoo.cli import app
from smpconv_zoo.layers import LargeSmallConv
from smpconv_zoo.ops import dispatch

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["smpconv_tcn_chartraj", "smpconv_tcn_speech_mfcc", "smpconv_resnet_cifar"])
def test_the_peer_computes_the_same_network(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, *model.default_cfg["input_size"]) if "resnet" in name else torch.randn(2, model.in_chans, 90)
    with torch.no_grad():
        expected, y = model(x), sequence._peer(model)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_peer_renders_every_tap_and_takes_no_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    dense = sequence.render_kernel_reference

    def counted(*arguments: object) -> torch.Tensor:
        kernel = dense(*arguments)  # type: ignore[arg-type]
        sizes.append(kernel.shape[2])
        return kernel

    monkeypatch.setattr(sequence, "render_kernel_reference", counted)
    model = timm.create_model("smpconv_tcn_chartraj").eval()
    with torch.no_grad():
        sequence._peer(model)(torch.randn(1, 3, 182))
    assert sizes == [182] * 12


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(3):
            torch.zeros(1000) + 1

    def all_at_once() -> None:
        kept = [torch.zeros(1000) for _ in range(3)]
        kept[0].view(10, 100).add_(1)

    assert measure.peak_bytes(one_after_another, CPU) == 8000
    assert measure.peak_bytes(all_at_once, CPU) == 12000


def test_records_name_no_folders() -> None:
    command = measure._command(["bench", "cpu", "--out", "/home/somebody/cpu.json", "--repeats", "3"])
    assert command == "smpconv-zoo bench cpu --out cpu.json --repeats 3"


def test_touched_pairs_are_counted() -> None:
    layer = synthesis.SMPConv1d(2, 2, 5, n_points=1, init_radius=0.6)
    with torch.no_grad():
        layer.coords.zero_()
    # Taps at -1, -0.5, 0, 0.5, 1: three of five within 0.6 of the middle.
    assert synthesis._touched(layer) == pytest.approx(3 / 5)


def test_sequence_command(tmp_path: Path) -> None:
    out = tmp_path / "sequence.json"
    arguments = ["bench", "sequence", "smpconv_tcn_chartraj", "--batch-size", "2", "--repeats", "1", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    entry = json.loads(out.read_text())
    (result,) = entry["results"]
    assert result["network"] == "smpconv_tcn_chartraj" and result["shape"] == [2, 3, 182]
    assert result["train_ms"] > 0 and result["peer_train_ms"] > 0 and result["train_graph_ms"] is None
    assert entry["versions"]["torch"] == torch.__version__ and entry["hardware"]
    assert "smpconv_tcn_chartraj" in done.stdout and " x" in done.stdout


def test_synthesis_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "_LENGTHS", ((161, 0.012),))
    monkeypatch.setattr(synthesis, "_MAPS", ((8, 13),))
    monkeypatch.setattr(synthesis, "_RADII", (1.0,))
    done = CliRunner().invoke(app, ["bench", "synthesis", "--repeats", "1", "--json"])
    assert done.exit_code == 0, done.output
    entry = json.loads(done.stdout)
    assert [result["kernel"] for result in entry["results"]][:2] == ["30 x 30 x 161", "8 x 1 x 13 x 13"]
    assert all(result["scatter_forward_ms"] > 0 and result["dense_bytes"] > 0 for result in entry["results"])


def test_the_direct_peer_computes_the_same_network() -> None:
    model = timm.create_model("test_smpconv").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(cpu._directly(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_direct_peer_trains_by_pytorchs_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_smpconv").train()
    taken = []
    chosen = dispatch._choose
    monkeypatch.setattr(
        dispatch, "_choose", lambda *arguments, **kind: taken.append(chosen(*arguments, **kind)) or taken[-1]
    )
    x = torch.randn(2, 3, 64, 64)
    cpu._directly(model)(x).sum().backward()
    assert taken == []
    model(x).sum().backward()
    assert len(taken) == 2 * sum(isinstance(module, LargeSmallConv) for module in model.modules())


def test_peers_are_of_the_same_size() -> None:
    for name, peer in cpu.PEERS.items():
        ours, theirs = (
            sum(parameter.numel() for parameter in timm.create_model(each).parameters()) for each in (name, peer)
        )
        assert abs(ours / theirs - 1) < 0.11


def test_cpu_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.PEERS, "test_smpconv", "test_convnext")
    out = tmp_path / "cpu.json"
    arguments = ["bench", "cpu", "test_smpconv", "--batch-size", "1", "--batch-size", "3", "--train", "--repeats", "1"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    entry = json.loads(out.read_text())
    assert [(result["work"], result["batch_size"]) for result in entry["results"]] == [
        ("inference", 1),
        ("inference", 3),
        ("inference, merged", 1),
        ("inference, merged", 3),
        ("training", 8),
        ("training, channels last", 8),
    ]
    for result in entry["results"]:
        assert result["ratio"] == pytest.approx(result["ours_ms"] / result["peer_ms"])
    assert entry["threads"] == torch.get_num_threads() and "test_convnext" in done.stdout
    half = CliRunner().invoke(app, ["bench", "cpu", "test_smpconv", "--dtype", "bfloat16", "--repeats", "1", "--json"])
    assert half.exit_code == 0 and {each["dtype"] for each in json.loads(half.stdout)["results"]} == {"bfloat16"}


def test_model_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.json"
    arguments = ["bench", "model", "test_smpconv", "test_convnext", "--batch-size", "2", "--repeats", "1"]
    for dtype in ("bfloat16", "float32"):
        done = CliRunner().invoke(app, [*arguments, "--dtype", dtype, "--out", str(out)])
        assert done.exit_code == 0, done.output
        entry = json.loads(out.read_text())
        works = [(result["network"], result["work"], result["layout"]) for result in entry["results"]]
        assert works == [
            (network, work, layout)
            for network in ("test_smpconv", "test_convnext")
            for work in ("training", "inference")
            for layout in ("NCHW", "channels last")
        ]
        assert all(result["images_per_second"] > 0 and result["dtype"] == dtype for result in entry["results"])
    kept: list[int] = []
    real = cli.write_record

    def write(path: Path, entry: dict[str, Any]) -> None:
        real(path, entry)
        kept.append(len(json.loads(path.read_text())["results"]))

    # Compiling takes minutes: what was measured before is on the disk when it begins.
    monkeypatch.setattr(cli, "write_record", write)
    assert CliRunner().invoke(app, [*arguments[:3], *arguments[4:], "--out", str(out)]).exit_code == 0
    assert kept == [1, 2, 3, 4, 4]
    done = CliRunner().invoke(app, ["bench", "model", "smpconv_huge"])
    assert done.exit_code == 1 and "smpconv_huge: timm knows no such network" in str(done.exception)


def test_unknown_networks_are_named() -> None:
    done = CliRunner().invoke(app, ["bench", "cpu", "smpconv_tcn_mnist"])
    assert done.exit_code == 1
    assert "smpconv_tcn_mnist: there is no peer for it; choose of smpconv_t, smpconv_b" in str(done.exception)
    done = CliRunner().invoke(app, ["bench", "sequence", "smpconv_t"])
    assert done.exit_code == 1
    assert "smpconv_t: no network of a sequence task" in str(done.exception)


@pytest.mark.parametrize("command", ["cpu", "op", "sequence", "synthesis"])
def test_a_record_without_a_place_is_refused_before_anything_is_timed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_compare", pytest.fail)
    monkeypatch.setattr(measure, "median_ms", pytest.fail)
    monkeypatch.setattr(sequence, "median_ms", pytest.fail)
    monkeypatch.setattr(synthesis, "median_ms", pytest.fail)
    done = CliRunner().invoke(app, ["bench", command, "--out", str(tmp_path / "none" / "record.json")])
    assert done.exit_code == 1 and f"{tmp_path / 'none'} is no folder" in str(done.exception)


def test_bench_op_times_every_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_STAGES", ((2, 9, 7, 5),))
    monkeypatch.setattr(operator, "_LARGER", ((2, 12, 12, 5),))
    monkeypatch.setattr(operator, "_DETECTION", (2, 10, 14, 5))
    out = tmp_path / "operator.json"
    arguments = ["bench", "op", "--batch-size", "1", "--batch-size", "3", "--dtype", "float32", "--repeats", "2"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    entry = json.loads(out.read_text())
    results = entry["results"]
    assert {(r["batch"], r["height"]) for r in results} == {(1, 9), (3, 9), (3, 12), (2, 10)}
    assert len(results) == 4 * 4 and entry["versions"]["torch"] == torch.__version__
    for result in results:
        ran = result["backend"] != "cuda"
        assert ran == (result["note"] == "")
        assert all((result[f"{name}_ms"] is not None) == ran for name in ("forward", "input", "weight"))
    assert CliRunner().invoke(app, ["bench", "op", "--dtype", "int8"]).exit_code != 0


def test_what_bench_op_times_is_the_convolution_and_its_gradients() -> None:
    x, grad = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 5)
    weight = torch.randn(3, 1, 5, 5)
    expected = None
    for backend in ("fft", "native"):
        forward, to_x, to_weight = operator._work(backend, [x], [grad], weight)
        got = (forward(0), *to_x(0), *to_weight(0))
        assert [tensor.shape for tensor in got] == [x.shape, x.shape, weight.shape]
        expected = expected or got
        for ours, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    assert operator.floor_ms(128, 96, 56, 56, torch.bfloat16, 3e12) == pytest.approx(0.0514, rel=1e-3)
