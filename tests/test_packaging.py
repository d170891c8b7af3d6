"""What a user gets: the wheel, the repository as an archive, and an editable install, each in a place of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from golden_files import ROOT

import smpconv_zoo

USE = (
    "import pathlib, timm, smpconv_zoo;"
    "timm.create_model('smpconv_tcn_mnist', pretrained=True);"
    "timm.create_model('smpconv_tcn_mnist.pmnist5k', pretrained=True);"
    "print(pathlib.Path(smpconv_zoo.__file__).resolve().parent.parent, smpconv_zoo.__version__)"
)


def use(folder: Path) -> str:
    """Where the package is found, and its version, when only ``folder`` is on the path."""
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def tracked_files() -> list[str]:
    """Files of the repository as git has them, changes in the working tree included."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: the files of the repository are those that git tracks")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as someone unpacks it: tracked files only, nothing built, no .git."""
    folder = tmp_path_factory.mktemp("source")
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def new_setuptools() -> None:
    version = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools >= 77 for the licence fields of pyproject.toml, found {version}")


@pytest.fixture(scope="module")
def wheel(source: Path, new_setuptools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="needs build to make a wheel")
    tree = tmp_path_factory.mktemp("tree") / "smpconv-zoo"
    shutil.copytree(source, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "dist").iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"smpconv_zoo-{smpconv_zoo.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    expected = {
        name.replace("weights/", "smpconv_zoo/weights/", 1) if name.startswith("weights/") else name
        for name in tracked_files()
        if name.startswith("smpconv_zoo/") or (name.startswith("weights/") and not name.endswith(".md"))
    }
    assert inside == expected
    for suffix in (".safetensors", ".json", ".yaml", "py.typed"):
        assert any(name.endswith(suffix) for name in inside)
    assert any(name.endswith("LICENSE") for name in names - inside)
    (metadata,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
    assert "smpconv-zoo = smpconv_zoo.cli:main" in zipfile.ZipFile(wheel).read(metadata).decode()


@pytest.mark.slow
def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert use(tmp_path) == f"{tmp_path.resolve()} {smpconv_zoo.__version__}"


@pytest.mark.slow
def test_the_unpacked_repository_works_alone(source: Path) -> None:
    assert use(source) == f"{source.resolve()} {smpconv_zoo.__version__}"


@pytest.mark.slow
def test_an_editable_install_works_from_another_folder(source: Path, new_setuptools: None, tmp_path: Path) -> None:
    """In an environment of its own that finds the packages of this one behind its own, as with system packages."""
    tree = tmp_path / "clone"
    shutil.copytree(source, tree)
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # An editable install of this repository that the outer environment may have is none of the new one's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-m", "pip", "install", "--editable", tree, "--no-deps", "--no-build-isolation", "--no-index"]
    options = ["--quiet", "--disable-pip-version-check", "--ignore-installed"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    script = (
        "import pathlib, timm, smpconv_zoo;"
        "timm.create_model('smpconv_tcn_mnist.smnist5k', pretrained=True);"
        "print(pathlib.Path(smpconv_zoo.__file__).resolve().parent.parent)"
    )
    done = subprocess.run(
        [python, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tree.resolve()}\n", "")
    program = subprocess.run(
        [python.with_name("smpconv-zoo"), "--version"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (program.returncode, program.stdout) == (0, f"smpconv-zoo {smpconv_zoo.__version__}\n")
