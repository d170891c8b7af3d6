"""The folder of a run: its recipe, where it ran, its metrics, its checkpoints.

``args.yaml`` is the resolved recipe, ``environment.json`` versions and hardware of every process that worked on it,
``metrics.csv`` a row for each epoch, ``metrics.jsonl`` the same and a line every few steps, ``tensorboard/`` the same
for TensorBoard where it is installed, ``checkpoints/`` what ``--resume`` goes on from.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.files import write_whole
from smpconv_zoo.training import checkpointing
from smpconv_zoo.training.recipe import Recipe

__all__ = ["TRACKERS", "RunFolder", "command_line"]

TRACKERS = ("trackio", "wandb")
# May differ between the parts of a run: they change speed and memory, not what is learned.
_FREE = ("compile", "grad_checkpointing", "channels_last", "graph", "micro_batches")


class RunFolder:
    """Where a run writes.

    Args:
        path: The folder.
        tracker: ``"trackio"`` or ``"wandb"``: metrics go there as well. None for nowhere.
    """

    def __init__(self, path: Path, tracker: str | None = None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._tracker = _tracker(tracker)
        self._board: Any = None
        self._run: Any = None

    def check(self, recipe: Recipe, resume: bool) -> None:
        """Whether a run of this recipe may write here; changes nothing.

        Raises:
            FileExistsError: There is another run here, or this one and ``resume`` is not set.
            ValueError: The run to go on with has another recipe.
        """
        written = self.path / "args.yaml"
        if not written.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise FileExistsError(f"{self.path} is a file; choose a folder for the run")
            if self.path.is_dir() and any(entry for entry in self.path.iterdir() if not _is_leftover(entry)):
                raise FileExistsError(f"{self.path} holds other files, left as they were; choose another folder")
            return
        if not resume:
            raise FileExistsError(
                f"{self.path} holds a run, left as it was: go on with it by --resume, or choose another folder"
            )
        values = yaml.safe_load(written.read_text(encoding="utf-8"))["recipe"]
        ours = dataclasses.asdict(recipe)
        other = [
            f"{name} was {values.get(name)!r}, now {value!r}"
            for name, value in ours.items()
            if values.get(name) != value and name not in _FREE
        ]
        if other:
            raise ValueError(f"{self.path} is a run of another recipe: {'; '.join(other)}")

    def start(self, recipe: Recipe, device: str, processes: int, plan: dict[str, Any]) -> None:
        """Make the folder, and write down what runs.

        Args:
            recipe: The run.
            device: What it computes on.
            processes: How many of them.
            plan: What else there is to say: the data, the network.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in [*self.path.iterdir(), *(self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())]:
            # What a killed process had not finished.
            if _is_leftover(entry):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        args = self.path / "args.yaml"
        if not args.is_file():
            text = yaml.safe_dump({"recipe": dataclasses.asdict(recipe), "plan": plan}, sort_keys=False)
            write_whole(args, text.encode())
        place = self.path / "environment.json"
        earlier = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else []
        now = {
            "command": command_line(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": versions(),
            "git": _git_revision(),
            "hardware": hardware(device),
            "processes": processes,
        }
        write_whole(place, (json.dumps([*earlier, now], indent=1) + "\n").encode())

    def rewind(self, update: int) -> None:
        """Take back what was logged after ``update`` optimizer steps, and open the logs."""
        path = self.path / "metrics.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # A process that was killed may have written half of its last line.
                continue
            if entry["update"] <= update:
                entries.append(entry)
        write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        self._write_csv(entries)
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=update + 1)
        if self._tracker is not None:
            config = yaml.safe_load((self.path / "args.yaml").read_text(encoding="utf-8"))["recipe"]
            options: dict[str, Any] = {"project": "smpconv_zoo", "name": self.path.name, "config": config}
            if self._tracker.__name__ == "wandb":
                # Its files beside the others, and one run there for one here, however many times it goes on.
                first = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))[0]
                number = hashlib.sha256(json.dumps([self.path.name, first]).encode()).hexdigest()[:16]
                options |= {"dir": str(self.path), "id": number}
            self._run = self._tracker.init(**options, resume="allow")

    def log(self, entry: dict[str, Any]) -> None:
        """Add a line to the metrics; one of ``"kind": "epoch"`` is a row of the table as well."""
        path = self.path / "metrics.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if entry["kind"] == "epoch":
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self._write_csv(entries)
        figures = {name: value for name, value in entry.items() if isinstance(value, (int, float)) and name != "update"}
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{entry['kind']}/{name}", value, entry["update"])
            self._board.flush()
        if self._run is not None:
            named = {f"{entry['kind']}/{name}": value for name, value in figures.items()}
            self._tracker.log(named, step=entry["update"])

    def close(self) -> None:
        """Close what :meth:`rewind` opened."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._tracker.finish()
        self._board = self._run = None

    def save(self, update: int, state: dict[str, Any]) -> Path:
        """See :func:`smpconv_zoo.training.checkpointing.save`."""
        return checkpointing.save(self.checkpoints, update, state)

    def newest(self) -> checkpointing.Found | None:
        """See :func:`smpconv_zoo.training.checkpointing.load_newest`."""
        return checkpointing.load_newest(self.checkpoints) if self.checkpoints.is_dir() else None

    def _write_csv(self, entries: Iterable[dict[str, Any]]) -> None:
        rows = [{k: v for k, v in entry.items() if k != "kind"} for entry in entries if entry["kind"] == "epoch"]
        if not rows:
            (self.path / "metrics.csv").unlink(missing_ok=True)
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.path / "metrics.csv", text.getvalue().encode())


def command_line() -> str:
    """The command line that runs, with the program's name in place of its path."""
    script = Path(sys.argv[0]).name
    program = "smpconv-zoo" if script in ("smpconv-zoo", "__main__.py", "cli.py") else script
    return " ".join([program, *sys.argv[1:]])


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _tracker(name: str | None) -> Any:
    if name is None:
        return None
    if name not in TRACKERS:
        raise ValueError(f"metrics go to one of {', '.join(TRACKERS)}, got {name!r}")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"to track runs with {name}, install it: pip install {name}") from error


def _git_revision() -> str | None:
    """Revision of the checkout that the package is in, if it is in one, with a mark if files were changed."""
    package = Path(__file__).resolve().parents[2]
    if not (package / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
