"""The least progress of a download, by a clock that the test turns."""

from __future__ import annotations

import time

import pytest

from smpconv_zoo.pace import Pace, Watch, watched


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_steady_downloads_of_the_least_pace_are_left_alone(clock: list[float]) -> None:
    watch = Watch(Pace(100, 10))
    watch.start()
    for _ in range(50):
        clock[0] += 9.9
        assert not watch.stalled()
        watch.add(100)
    assert watch.came == 5000


@pytest.mark.parametrize("each", [0, 1, 9])
def test_drips_and_silence_are_not(clock: list[float], each: int) -> None:
    watch = Watch(Pace(100, 10))
    watch.start()
    watch.add(1000)
    for _ in range(10):
        clock[0] += 1
        watch.add(each)
        assert not watch.stalled()
    clock[0] += 0.1
    assert watch.stalled()


def test_the_time_counts_from_the_start_and_not_from_a_second_one(clock: list[float]) -> None:
    watch = Watch(Pace(100, 10))
    clock[0] += 100
    assert not watch.stalled()
    watch.start()
    clock[0] += 6
    watch.start()
    clock[0] += 6
    assert watch.stalled()


def test_no_bytes_are_no_limit(clock: list[float]) -> None:
    watch = Watch(Pace(0, 10))
    watch.start()
    clock[0] += 1e9
    assert not watch.stalled()


def test_another_thread_says_it_once() -> None:
    said: list[str] = []
    with watched(Pace(100, 0.1), lambda: said.append("stalled")):
        time.sleep(0.8)
    with watched(Pace(100, 0.5), lambda: said.append("again")) as watch:
        for _ in range(16):
            time.sleep(0.05)
            watch.add(100)
    assert said == ["stalled"]


def test_the_environment_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SMPCONV_STALL_BYTES", "SMPCONV_STALL_SECONDS"):
        monkeypatch.delenv(name, raising=False)
    assert Pace.of_environment() == Pace() == Pace(524288, 60)
    monkeypatch.setenv("SMPCONV_STALL_BYTES", "1e5")
    monkeypatch.setenv("SMPCONV_STALL_SECONDS", "2.5")
    assert Pace.of_environment() == Pace(100000, 2.5)
    monkeypatch.setenv("SMPCONV_STALL_BYTES", "0")
    assert Pace.of_environment().bytes == 0
    for text in ("-1", "nan", "inf", "many"):
        monkeypatch.setenv("SMPCONV_STALL_BYTES", text)
        with pytest.raises(ValueError, match=f"SMPCONV_STALL_BYTES={text} is no number of bytes"):
            Pace.of_environment()
    monkeypatch.setenv("SMPCONV_STALL_BYTES", "")
    monkeypatch.setenv("SMPCONV_STALL_SECONDS", "0")
    with pytest.raises(ValueError, match="SMPCONV_STALL_SECONDS=0 is no number of seconds"):
        Pace.of_environment()
