"""Speech Commands by both protocols: the order of a directory's listing, of an order file, and of the names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_on_disk import write_speech

from smpconv_zoo.data import protocol, speech_commands
from smpconv_zoo.data.speech_commands import (
    ORDER_FILE,
    WORDS,
    SpeechCommandsTest,
    clip_order,
    list_clips,
    speech_commands_parts,
)
from smpconv_zoo.evaluation.test_sets import open_test_set
from smpconv_zoo.pretrained.cards import checkpoint_card


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven clips of a second and a shorter one of each word, in a directory that lists them in its own order."""
    list(write_speech(tmp_path, 7))
    genuine = os.listdir

    def shuffled(path: Any) -> list[str]:
        names = sorted(genuine(path))
        return [names[i] for i in np.random.RandomState(len(str(path))).permutation(len(names))]

    monkeypatch.setattr(speech_commands.os, "listdir", shuffled)
    return tmp_path


def by_hand(folder: Path, names: dict[str, list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The test part as the authors' code makes it: word by word in the order given, shorter clips left out."""
    waveforms, labels = [], []
    for y, word in enumerate(WORDS):
        for name in names[word]:
            waveform = speech_commands.read_clip(folder / word / name)
            if len(waveform) == 16000:
                waveforms.append(waveform)
                labels.append(y)
    x, y = torch.stack(waveforms)[:, None], np.array(labels)
    train, _, test = protocol.split_70_15_15(y)
    return protocol.normalize(x[train], x[test])[1], torch.from_numpy(y[test])


def orders(folder: Path) -> dict[str, dict[str, list[str]]]:
    listed = {word: os.listdir(folder / word) for word in WORDS}
    return {"reference": listed, "sound": {word: sorted(names) for word, names in listed.items()}}


@pytest.mark.parametrize("name", ["sound", "reference"])
def test_each_protocol_splits_by_its_order(folder: Path, name: str) -> None:
    expected, labels = by_hand(folder, orders(folder)[name])
    parts = speech_commands_parts(folder, False, ("test",), protocol=name)
    samples = SpeechCommandsTest(folder, False, name)
    streamed = torch.stack([samples[i][0] for i in range(len(samples))])
    for x in (parts["test"][0], streamed):
        # Sums in double precision against float32 ones.
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(parts["test"][1], labels) and [y for _, y in samples.test] == labels.tolist()


def test_the_protocols_differ(folder: Path) -> None:
    a, b = (
        speech_commands_parts(folder, False, ("test",), protocol=name)["test"][0] for name in ("sound", "reference")
    )
    assert a.shape == b.shape and not torch.equal(a, b)


def test_an_order_file_carries_a_split_to_another_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = list_clips(folder, "reference")
    (folder / ORDER_FILE).write_text("".join(f"./{path.parent.name}/{path.name}\n" for path, _ in here))
    monkeypatch.setattr(
        speech_commands.os, "listdir", lambda path: sorted((entry.name for entry in os.scandir(path)), reverse=True)
    )
    assert list_clips(folder, "reference") == here != list_clips(folder, "sound")
    assert "clip_order.txt" in clip_order(folder, "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "go that are there, each once: 1 differ"),
        (lambda lines: [*lines, "go/absent.wav"], "go that are there, each once: 1 differ, absent.wav first"),
        (lambda lines: [*lines, lines[-1]], "each once: 1 differ, one twice"),
        (lambda lines: [*lines, "bird/a.wav"], "line 81: expected WORD/NAME.wav"),
        (lambda lines: ["yes"], "line 1: expected"),
        (lambda lines: [], "does not name the clips of yes"),
    ],
)
def test_an_order_file_has_to_name_all_clips(folder: Path, change: Any, message: str) -> None:
    lines = [f"{path.parent.name}/{path.name}" for path, _ in list_clips(folder)]
    (folder / ORDER_FILE).write_text("\n".join(change(lines)))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        list_clips(folder, "reference")
    # The sound protocol does not look at it.
    assert len(list_clips(folder)) == 80


def test_what_is_said_of_the_order(folder: Path) -> None:
    sentence = clip_order(folder, "reference")
    assert "this directory's listing" in sentence and sentence == clip_order(folder, "reference")
    path = folder / "yes" / "00000000_nohash_0.wav"
    path.rename(path.with_name("zz.wav"))
    assert clip_order(folder, "reference") != sentence
    assert "sorted names" in clip_order(folder, "sound")
    with pytest.raises(ValueError, match="sound or reference"):
        list_clips(folder, "mine")


@pytest.mark.parametrize("kind", ["raw", "mfcc"])
def test_evaluation_takes_either(folder: Path, kind: str) -> None:
    card = checkpoint_card(f"smpconv_tcn_speech_{kind}.sc10")
    a, b = (open_test_set(card, folder, protocol=name) for name in ("sound", "reference"))
    assert (a.protocol, b.protocol) == ("sound", "reference")
    assert not torch.equal(a.samples[0][0], b.samples[0][0]) or a.samples.test != b.samples.test
    assert all("cannot equal theirs" in " ".join(data.notes) for data in (a, b))
    assert "sorted names" in a.notes[0] and "this directory's listing" in b.notes[0]
