"""Reader of ``.ts`` files, the text in which the UEA and UCR archives keep their time series.

# comment
@problemName CharacterTrajectories         header: lines that begin with @, up to @data
@data
0.1,0.2,0.3:1.5,1.4,1.3:label              one series a line: its channels, and last the name of its class
"""

from pathlib import Path

import numpy as np

__all__ = ["read_ts", "read_ts_parts"]


def read_ts(path: Path) -> tuple[list[list[np.ndarray]], list[str]]:
    """Read a ``.ts`` file of labelled series without time stamps.

    Args:
        path: The file, UTF-8.

    Returns:
        N series, each a list of its channels, (L,) float64, whose lengths may differ, with NaN for a missing value
        (``?``); and N class names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a file; the message names the line.
    """
    series: list[list[np.ndarray]] = []
    labels: list[str] = []
    in_data = False
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        text = line.strip().lower()
        if not text or text.startswith(("#", "%")):
            continue
        if in_data:
            *channels, label = text.split(":")
            try:
                values = [np.array([float(v) if v.strip() != "?" else np.nan for v in c.split(",")]) for c in channels]
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not values or not label.strip():
                raise ValueError(f"{path}, line {number}: expected channels and a class, apart by colons")
            series.append(values)
            labels.append(label.strip())
        elif text == "@data":
            in_data = True
        elif text.split() in (["@timestamps", "true"], ["@classlabel", "false"]):
            raise ValueError(f"{path}, line {number}: only labelled series without time stamps are read, got {text}")
        elif not text.startswith("@"):
            raise ValueError(f"{path}, line {number}: expected a header line, which begins with @")
    if not series:
        raise ValueError(f"{path} holds no series: it is not a .ts file, or its end is missing")
    return series, labels


def read_ts_parts(folder: Path, name: str) -> tuple[list[list[np.ndarray]], list[str]]:
    """The series of ``<name>_TRAIN.ts`` and behind them those of ``<name>_TEST.ts``, as :func:`read_ts`."""
    (train, train_labels), (test, test_labels) = (read_ts(folder / f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    return train + test, train_labels + test_labels
