"""The Hugging Face Hub, through huggingface_hub: cached files first, and an unreachable Hub is known within seconds.

Nothing here vouches for content. The client takes a body of the right length for the right file, so whoever reads a
file hashes it (:mod:`smpconv_zoo.pretrained.locate`); :func:`drop_from_cache` then takes a bad one out of use. A body
that stalls or drips is given up by :class:`smpconv_zoo.pace.Pace`; the client keeps no part of a file for another
process, so the next load starts it over.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import importlib
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, tqdm

from smpconv_zoo.pace import LOOK_EVERY, Pace, Watch
from smpconv_zoo.pretrained.home import quarantine
from smpconv_zoo.pretrained.store import CheckpointError

__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "HubFileMissingError",
    "cached",
    "commit_of",
    "declared_sha256",
    "drop_from_cache",
    "etag_of",
    "fetch",
    "is_offline",
    "known_missing",
    "look_for_config",
]

# What a published checkpoint's files are called in its repository, and in a folder made from one.
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
CONFIG_NAME = "config.json"

# Seconds. The client's own look-up repeats itself for up to 46 s; one answer to one small question needs none of that.
ANSWER_TIMEOUT = 4.0
# Name resolution and several addresses of one host know no timeout of the client's.
REACH_TIMEOUT = 8.0
AGAIN_AFTER = 1.0
GRACE = 1.0

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)

Answer = TypeVar("Answer")


class HubFileMissingError(CheckpointError):
    """The Hub answers, and has no such file, revision or repository for this user."""


def is_offline() -> bool:
    """Whether the user forbids requests (HF_HUB_OFFLINE, read by the client when it was imported)."""
    return bool(constants.HF_HUB_OFFLINE)


def cached(repo: str, revision: str, name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The file in the client's cache, found without a request; None if it is not there."""
    found = huggingface_hub.try_to_load_from_cache(repo, name, cache_dir=_text(cache_dir), revision=revision)
    return Path(found) if isinstance(found, str) else None


def known_missing(repo: str, revision: str, name: str, cache_dir: str | os.PathLike[str] | None = None) -> bool:
    """Whether the cache holds the Hub's word that this commit has no such file."""
    found = huggingface_hub.try_to_load_from_cache(repo, name, cache_dir=_text(cache_dir), revision=revision)
    return found is not None and not isinstance(found, str)


def commit_of(repo: str, revision: str, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """The commit that timm has just read the repository's config.json at, so that the weights are of the same one."""
    config = cached(repo, revision, CONFIG_NAME, cache_dir)
    return config.parent.name if config else revision


def fetch(
    repo: str,
    revision: str,
    name: str,
    remedy: str,
    cache_dir: str | os.PathLike[str] | None = None,
    pace: Pace | None = None,
) -> tuple[Path, bool]:
    """One file of a repository: out of the cache without any request, or else downloaded.

    Args:
        repo: ``organisation/name``.
        revision: A full commit hash; of a branch or tag the cached state would be taken for the present one.
        name: Path of the file in the repository.
        remedy: What the reader can do without the Hub, as the end of a sentence.
        cache_dir: The client's cache, if not the usual one.
        pace: The least that has to come once the file is asked for; that of the environment if None.

    Returns:
        Where the file is, and whether it was downloaded now.

    Raises:
        HubFileMissingError: The Hub has no such file.
        CheckpointError: The Hub is out of reach (known within 10 s), the download broke off or stalled, or it cannot be
            stored.
        ValueError: The environment's pace is none.
    """
    path = cached(repo, revision, name, cache_dir)
    if path is not None:
        return path, False
    file = f"{name} of {repo} at {revision}"
    pace = pace or Pace.of_environment()
    if is_offline():
        raise CheckpointError(
            f"{file} is not in the cache ({_cache(cache_dir)}) and HF_HUB_OFFLINE is set: unset it to download, "
            f"or {remedy}"
        )
    try:
        with contextlib.suppress(EntryNotFoundError):  # the client meets it again, and notes it in its cache
            _within(REACH_TIMEOUT, lambda: _reach(repo, revision, name))
        found = _Transfer(pace).run(repo, name, revision=revision, cache_dir=_text(cache_dir))
    except Exception as error:  # the client lets errors of its HTTP and Xet libraries through, with no common base
        raise _explained(error, file, remedy, cache_dir) from error
    return Path(found), True


def look_for_config(
    repo: str,
    revision: str,
    remedy: str,
    cache_dir: str | os.PathLike[str] | None = None,
    patient: bool = True,
) -> None:
    """Whether somebody answers at the Hub, asked by a HEAD request for a repository's config.json.

    Any answer will do: what it means, the client tells its caller.

    Args:
        repo: ``organisation/name``.
        revision: Branch, tag or commit.
        remedy: What the reader can do without the Hub, as the end of a sentence.
        cache_dir: The client's cache, if not the usual one.
        patient: Repeat a look-up that fails, once, and wait for 8 s in all; for 4 s otherwise.

    Raises:
        CheckpointError: Nobody answers.
    """
    try:
        url = huggingface_hub.hf_hub_url(repo, CONFIG_NAME, revision=revision)
    except ValueError:  # no name of a repository: the client says so
        return

    def ask() -> None:
        for wait in (AGAIN_AFTER, None) if patient else (None,):
            try:
                huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_TIMEOUT)
            except HfHubHTTPError:
                return
            except Exception:  # those of its HTTP library, of which there have been three
                if wait is None:
                    raise
                time.sleep(wait)
            else:
                return

    try:
        _within(REACH_TIMEOUT if patient else ANSWER_TIMEOUT, ask)
    except Exception as error:
        raise _explained(error, f"{CONFIG_NAME} of {repo} at {revision}", remedy, cache_dir) from error


def declared_sha256(repo: str, revision: str, name: str, remedy: str) -> str | None:
    """The sha256 that the Hub declares for a file; None if it declares none, as for small text files.

    Raises:
        HubFileMissingError: The Hub has no such file.
        CheckpointError: The Hub is out of reach.
    """
    file = f"the sha256 of {name} of {repo} at {revision}"
    if is_offline():
        raise CheckpointError(f"{file} is known to the Hub only and HF_HUB_OFFLINE is set: unset it, or {remedy}")
    try:
        infos = _within(REACH_TIMEOUT, lambda: huggingface_hub.HfApi().get_paths_info(repo, [name], revision=revision))
    except Exception as error:
        raise _explained(error, file, remedy, None) from error
    for info in infos:
        if info.path == name:
            lfs = getattr(info, "lfs", None)
            return lfs.sha256 if lfs else None
    raise HubFileMissingError(f"the Hub at {constants.ENDPOINT} has no {name} of {repo} at {revision}")


def etag_of(path: Path) -> str | None:
    """The ETag under which the client stored a cached file; of weights it is the sha256 that the Hub declared.

    None where the cache is without links, as on some Windows machines.
    """
    return Path(os.readlink(path)).name if path.is_symlink() else None


def drop_from_cache(path: Path) -> Path | None:
    """Take a bad file out of the client's cache, so that the next load downloads it again.

    Args:
        path: The file as :func:`cached` names it: a link to its content, by way of a store that repositories share.

    Returns:
        Where the content is now, or None if it could not be moved.
    """
    links = []
    content = path
    while content.is_symlink():
        links.append(content)
        content = content.parent / os.readlink(content)
    moved = quarantine(content)
    if moved is not None:
        for link in links:
            link.unlink(missing_ok=True)
    return moved


def _reach(repo: str, revision: str, name: str) -> None:
    """One look-up, not repeated, and one answer of any kind from the host that has the bytes."""
    url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
    metadata = huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_TIMEOUT)
    if metadata.location != url and getattr(metadata, "xet_file_data", None) is None:
        get_session().head(metadata.location, timeout=ANSWER_TIMEOUT)


class _StalledError(Exception):
    """What came was too little."""


class _Transfer:
    """One ``hf_hub_download`` that is given up if it stalls.

    The client hands on a body in pieces of 10 MiB and has no limit but from byte to byte; its Xet library has its own.
    So the client runs in a thread, what comes is counted where it comes in (HTTP) or where it is reported (Xet), and
    the time counts from the request for the body on: another process that downloads the same file is waited for, and
    keeps a pace of its own.
    """

    def __init__(self, pace: Pace) -> None:
        self.watch = Watch(pace)
        self.given_up = threading.Event()
        self.answer: concurrent.futures.Future[str] = concurrent.futures.Future()
        self.thread = threading.Thread(target=self._download, daemon=True)
        self.hooks: Any = None

    def run(self, *arguments: Any, **options: Any) -> str:
        """The file's path, or what the client raises, or :class:`_StalledError`."""
        self.hooks = getattr(get_session(), "event_hooks", None)
        takes_bar = "tqdm_class" in inspect.signature(huggingface_hub.hf_hub_download).parameters
        if self.hooks is None or not takes_bar:
            # A client that is too old to be watched; its timeouts are all there is.
            return huggingface_hub.hf_hub_download(*arguments, **options)
        self.call = functools.partial(huggingface_hub.hf_hub_download, *arguments, **options, tqdm_class=self._bar())
        self.thread.start()
        try:
            while not concurrent.futures.wait([self.answer], LOOK_EVERY).done:
                if self.watch.stalled():
                    raise _StalledError(str(self.watch.pace))
        finally:
            if not self.answer.done():
                self._give_up()
        return self.answer.result()

    def _download(self) -> None:
        self.hooks["request"].append(self._on_request)
        self.hooks["response"].append(self._on_response)
        try:
            path = self.call()
        except BaseException as error:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(path)
        finally:
            self.hooks["request"].remove(self._on_request)
            self.hooks["response"].remove(self._on_response)

    def _give_up(self) -> None:
        """Let the thread end at its next byte or request."""
        self.given_up.set()
        # As the client does at Ctrl-C; it has no public name for it, and Xet's library would try on for minutes.
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module("huggingface_hub.utils._xet").abort_xet_session()
        # Time to remove what it has of the file, if it hears of it at once.
        self.thread.join(GRACE)

    def _go_on(self) -> None:
        if self.given_up.is_set():
            raise _StalledError(str(self.watch.pace))

    # All requests of the process come by here, whatever thread they are of.

    def _on_request(self, request: Any) -> None:
        if threading.current_thread() is not self.thread:
            return
        self._go_on()
        if request.method == "GET":
            self.watch.start()

    def _on_response(self, response: Any) -> None:
        if threading.current_thread() is not self.thread:
            return
        blocks = response.iter_raw

        def counted(*arguments: Any, **options: Any) -> Iterator[bytes]:
            for block in blocks(*arguments, **options):
                self._go_on()
                self.watch.add(len(block))
                yield block

        response.iter_raw = counted

    def _bar(self) -> type[tqdm]:
        watch = self.watch

        class Bar(tqdm):
            """The client's own, which also says that Xet's library is at work and what it has received."""

            monitor_interval = 0  # tqdm would start a thread for every class

            def __init__(self, *arguments: Any, **options: Any) -> None:
                self.of_xet = ".xet_" in str(options.get("name"))
                if self.of_xet:
                    watch.start()
                super().__init__(*arguments, **options)

            def update(self, n: float | None = 1) -> bool | None:
                if self.of_xet:
                    watch.add(int(n or 0))
                return super().update(n)

        return Bar


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """The call's answer, or TimeoutError: a daemon thread is left behind with what no timeout reaches."""
    answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:g} s") from error


def _explained(error: Exception, file: str, remedy: str, cache_dir: str | os.PathLike[str] | None) -> CheckpointError:
    """The client's error as one sentence that says what to do."""
    where = f"the Hub at {constants.ENDPOINT}"
    missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
    if missing or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return HubFileMissingError(
            f"{where} has no {file}, or not for you: check the name, sign in if it is private (HF_TOKEN), or {remedy}"
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return CheckpointError(f"{where} refuses {file} ({status}): check your token (HF_TOKEN), or {remedy}")
        return CheckpointError(f"{where} failed on {file} (status {status}): try again later, or {remedy}")
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        return CheckpointError(
            f"{file} cannot be stored in {_cache(cache_dir)}: {error.strerror}; "
            "free space or make it writable, or set HF_HOME to another folder"
        )
    return CheckpointError(
        f"{file} could not be downloaded from {where}: {_reason(error)}; "
        f"check the network and HF_ENDPOINT and try again, or {remedy}"
    )


def _reason(error: BaseException) -> str:
    """The innermost cause's text, on one line; the client's own text is often only advice."""
    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _cache(cache_dir: str | os.PathLike[str] | None) -> str:
    return _text(cache_dir) or constants.HF_HUB_CACHE


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)
