"""The cut of the package: who may import whom, what importing costs, and what its text must not hold."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden_files import ROOT

PACKAGE = ROOT / "smpconv_zoo"
FILES = sorted(PACKAGE.rglob("*.py"))

# From left to right: a file imports only from groups to its left. A name stands for a file or a folder.
ORDER = (
    ("_version",),
    ("files", "environment", "pace"),
    ("downloading", "unpacking"),
    ("points", "operators", "gpu"),
    ("kernels",),
    ("ops",),
    ("merged",),
    ("baselines",),
    ("layers",),
    ("resolution",),
    ("pretrained",),
    ("models",),
    ("streaming",),
    ("checkpoints",),
    ("catalogue",),
    ("data",),
    ("description",),
    ("exported",),
    ("exporting", "predicting"),
    ("evaluation",),
    ("training",),
    ("benchmarks", "reporting"),
    ("importing", "publishing", "reproducing", "verifying"),
    ("rehearsing",),
    ("console",),
    ("cli",),
    ("__main__",),
)
# Inside the folders the same holds; the package's own __init__ stands right of everything it names. That of gpu names
# nothing: it holds what its kernels share.
ORDER_WITHIN = {
    "gpu": (("__init__",), ("fourier", "norm", "render", "short", "streams")),
    "ops": (
        ("kept", "reference", "cuda", "norm"),
        ("fft", "short"),
        ("onednn",),
        ("dispatch",),
        ("pair",),
        ("__init__",),
    ),
    "benchmarks": (("measure",), ("cpu", "model", "operator", "scaling", "sequence", "synthesis"), ("__init__",)),
    "pretrained": (
        ("cards", "errors"),
        ("remap", "signing", "structure"),
        ("store",),
        ("home",),
        ("hub",),
        ("hub_names", "locate"),
        ("__init__",),
    ),
    "models": (("sizes",), ("build",), ("image", "sequence"), ("__init__",)),
    "data": (
        ("cifar_files", "folders", "mfcc", "protocol", "stand_in", "ts_files"),
        ("mnist1d", "mnist5k", "series", "speech_commands", "ucr"),
        ("classes", "pictures", "sources", "stand_in_arrays"),
        ("checking",),
        ("fetching",),
        ("__init__",),
    ),
    "evaluation": (
        ("complexity", "figures", "golden", "paper_tables", "tables", "test_sets"),
        ("accuracy", "classification", "image_sets", "model_card"),
        ("candidates", "resolution"),
        ("image_accuracy", "sequence_accuracy"),
        ("report",),
        ("__init__",),
    ),
    "reporting": (
        ("drawing", "logs", "receptive", "start"),
        ("figure", "panel"),
        ("log_figures", "network_figures", "page"),
        ("report",),
        ("__init__",),
    ),
    "training": (
        ("augment", "batches", "groups", "recipe", "schedules", "step", "sync_norm", "world"),
        ("checkpointing", "arrays", "images", "saving", "synthetic"),
        ("streams",),
        ("run_folder",),
        ("engine",),
        ("running",),
        ("run_weights", "sequence", "finetuning"),
        ("__init__",),
    ),
}


def module_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, wherever in the file: ("pretrained", "cards")."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            # `from a import b` names a module if there is one of that name, else something inside a.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            is_module = [(ROOT / (name.replace(".", "/") + ".py")).is_file() for name in inner]
            is_folder = [(ROOT / name.replace(".", "/")).is_dir() for name in inner]
            names = [
                name if a or b else str(node.module) for name, a, b in zip(inner, is_module, is_folder, strict=True)
            ]
        for name in names:
            if name.split(".")[0] == "smpconv_zoo":
                found.add(tuple(name.split(".")[1:]) or ("__init__",))
    return found


def place(order: tuple[tuple[str, ...], ...], name: str, path: Path) -> int:
    for i, group in enumerate(order):
        if name in group:
            return i
    raise AssertionError(f"{path.relative_to(ROOT)}: {name!r} has no place in the order of imports; give it one")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_import_only_from_their_left(path: Path) -> None:
    own = module_of(path)
    if own == ("__init__",):
        return
    position = place(ORDER, own[0], path)
    if len(own) > 1:
        place(ORDER_WITHIN[own[0]], own[1], path)
    for other in imports(path):
        assert other != ("__init__",), f"{path.name} imports the package's own __init__, which imports everything"
        if other[0] != own[0]:
            assert place(ORDER, other[0], path) < position, f"{'.'.join(own)} imports {'.'.join(other)}, to its right"
            continue
        order = ORDER_WITHIN[own[0]]
        inner = place(order, other[1] if len(other) > 1 else "__init__", path)
        assert inner < place(order, own[1], path), f"{'.'.join(own)} imports {'.'.join(other)}, beside or right of it"


def test_some_files_import_next_to_nothing() -> None:
    by_name = {module_of(path): imports(path) for path in FILES}
    assert by_name["environment",] <= {("_version",)}
    near = {"data", "files", "downloading", "unpacking"}
    assert all(other[0] in near for name, others in by_name.items() if name[0] == "data" for other in others), (
        "data imports from data, and from what moves files"
    )
    assert all(others <= {("gpu",)} for name, others in by_name.items() if name[0] == "gpu"), (
        "gpu imports from gpu alone"
    )
    assert by_name["ops", "fft"] == {("operators",), ("gpu",), ("gpu", "fourier"), ("ops", "kept")}
    nothing = (
        "files",
        "points",
        "operators",
        "_version",
        "ops.kept",
        "ops.reference",
        "pretrained.cards",
        "gpu.__init__",
        "gpu.streams",
    )
    for name in nothing:
        assert by_name[tuple(name.split("."))] == set(), name


def test_triton_is_imported_only_where_a_gpu_needs_it() -> None:
    def at_the_top(path: Path) -> set[str]:
        nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if not isinstance(node, ast.If)]
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}

    tops = {".".join(("smpconv_zoo", *module_of(path))): at_the_top(path) for path in FILES}
    with_triton = {
        name for name, imported in tops.items() if any(other.split(".")[0] == "triton" for other in imported)
    }
    assert with_triton == {f"smpconv_zoo.gpu.{name}" for name in ("fourier", "norm", "render", "short")}
    assert not [name for name, imported in tops.items() if imported & with_triton]


OPTIONAL = (
    "aeon",
    "datasets",
    "matplotlib",
    "mlxtend",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "rich",
    "scipy",
    "sklearn",
    "typer",
    "webdataset",
)


def test_importing_needs_little_and_changes_nothing() -> None:
    script = f"""
import sys

# None in place of a module: importing it fails, and who asks whether it is there hears no.
sys.modules.update(dict.fromkeys({OPTIONAL!r}))
import torch, timm

state = torch.random.get_rng_state()
settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import smpconv_zoo

assert torch.equal(state, torch.random.get_rng_state())
assert settings == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
assert not [name for name in sys.modules if name.startswith(("smpconv_zoo.cli", "smpconv_zoo.training"))]
assert timm.create_model("test_smpconv_tcn")(torch.zeros(2, 1, 9)).shape == (2, 10)
assert len(smpconv_zoo.list_checkpoints()) > 5
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("flags", [("-W", "error"), ("-I",)])
def test_importing_in_a_fresh_interpreter(flags: tuple[str, ...]) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import smpconv_zoo"
    done = subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_text_of_a_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 10))
    calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls and "breakpoint" not in calls
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "a path of somebody's machine"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    if text:
        assert ast.get_docstring(tree) or path.name == "_version.py", "a file says at its top what it is for"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_exist_and_are_documented(path: Path) -> None:
    parts = module_of(path)
    if parts == ("__main__",):
        return
    module = importlib.import_module(".".join(("smpconv_zoo", *(part for part in parts if part != "__init__"))))
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    for name in public:
        value = getattr(module, name)
        # The names that timm makes for deprecated networks are its own.
        ours = inspect.ismodule(value) or str(getattr(value, "__module__", "")).startswith("smpconv_zoo")
        if ours and not (inspect.isfunction(value) and value.__name__ != name):
            assert value.__doc__ and value.__doc__.strip(), name


def test_the_front_page_is_small() -> None:
    import smpconv_zoo

    assert sorted(smpconv_zoo.__all__) == smpconv_zoo.__all__ and len(smpconv_zoo.__all__) <= 12
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\w+)?", smpconv_zoo.__version__)
