"""Download of large files over HTTP: gone on with where it stopped, held against a sha256, whole or not there.

A file grows under the name ``TARGET.part``, beside ``TARGET.part.json``, which says where it comes from and by what
validator (ETag, Last-Modified) the server knows this version of it. A later call, in another process and after whatever
ended the first, asks for the rest alone, and only of that very version (RFC 9110, If-Range); a server that knows no
ranges, or has another version by now, sends all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import errno
import http.client
import io
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smpconv_zoo._version import __version__
from smpconv_zoo.files import sha256_of_file, write_whole
from smpconv_zoo.pace import Pace, Watch

__all__ = ["DownloadError", "Downloaded", "Patience", "check_space", "download", "part_of"]

Progress = Callable[[int, int], None]

BLOCK = 2**20
# What may pass when the same server is asked again; every other status sends us to the next one.
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
# Left free on a disk beside what is asked for, for what file systems need themselves.
SPARE_BYTES = 64 * 2**20


class DownloadError(ValueError):
    """A file could not be fetched from anywhere; what is there of it is kept and gone on with next time."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Args:
        attempts: Tries in a row that bring nothing new, before the next server is asked.
        all_attempts: Tries in all, those included that brought something.
        first_wait: Seconds before the second try; the wait doubles from try to try.
        longest_wait: Seconds; also for servers that ask for a longer one (Retry-After).
        timeout: Seconds without a single byte.
        pace: What has to come in the long run; a try that does not keep it counts as one that brings nothing new.
    """

    attempts: int = 5
    all_attempts: int = 100
    first_wait: float = 1.0
    longest_wait: float = 30.0
    timeout: float = 60.0
    pace: Pace = dataclasses.field(default_factory=Pace.of_environment)


@dataclasses.dataclass(frozen=True)
class Downloaded:
    """A file that is here, whole: where it was fetched from (None if it was here already), its sha256 and size."""

    path: Path
    url: str | None
    sha256: str
    bytes: int


class _ElsewhereError(Exception):
    """This server does not have the file: another one may."""


class _PassingError(Exception):
    """Something that may be gone at the next try; ``wait`` seconds if the server says how long."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _StalledError(_PassingError):
    """Too little came."""


def download(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    most: int = 2**40,
    reserve: int = 0,
    patience: Patience | None = None,
    progress: Progress | None = None,
) -> Downloaded:
    """Fetch a file into ``target`` from the first server that has it.

    What an earlier call left of it is gone on with. Nothing takes the name ``target`` before all of it is on the disk
    and, if ``sha256`` is known, equal to it. One process at a time: the caller sees to that.

    Args:
        urls: Addresses of the same file, http or https, in the order in which they are tried.
        target: Where to put it; its folder exists.
        sha256: Hex digest of the file, None if nobody publishes one: then a redirection from https to http is refused.
        size: Bytes of the file, if known: a server that announces another number has another file.
        most: Bytes that are taken at most.
        reserve: Bytes that must stay free on the disk behind the file, for what is made of it.
        patience: How long servers are waited for.
        progress: Called with the bytes here and in all, 0 as long as nobody says how many.

    Raises:
        DownloadError: No server gave it; the message says why, for each.
        OSError: The disk is full, or the folder cannot be written.
    """
    if target.is_file():
        digest = sha256_of_file(target)
        if sha256 in (None, digest):
            return Downloaded(target, None, digest, target.stat().st_size)
        target.unlink()
    job = _Job(target, sha256, size, most, reserve, patience or Patience(), progress)
    reasons = []
    for url in urls:
        try:
            digest = job.fetch(url)
        except _ElsewhereError as error:
            reasons.append(f"{url}: {error}")
            continue
        return Downloaded(target, url, digest, target.stat().st_size)
    raise DownloadError(f"{target.name} could not be fetched. {'; '.join(reasons) or 'No address is known'}")


def part_of(target: Path) -> Path:
    """The file that ``target`` is while it grows."""
    return target.with_name(f"{target.name}.part")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Whether a disk has room for ``needed`` more bytes and a little.

    Raises:
        OSError: It has not; ENOSPC, with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {needed:,} bytes and {SPARE_BYTES:,} to spare, {free:,} are free: make room, or name "
            "another folder",
            str(folder),
        )


@dataclasses.dataclass
class _Job:
    target: Path
    sha256: str | None
    size: int | None
    most: int
    reserve: int
    patience: Patience
    progress: Progress | None

    def __post_init__(self) -> None:
        self.part = part_of(self.target)
        self.notes = self.part.with_name(f"{self.part.name}.json")

    def fetch(self, url: str) -> str:
        """All of the file from one server, checked and under its name; its sha256."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise _ElsewhereError("only http and https are fetched")
        for _ in range(2):
            pieced = self._here() > 0
            self._complete(url)
            digest = sha256_of_file(self.part)
            if self.sha256 in (None, digest):
                with open(self.part, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self.part, self.target)
                self.notes.unlink(missing_ok=True)
                return digest
            found = f"{self._here():,} bytes of sha256 {digest}"
            self._drop()
            # Pieces of two versions, or a piece that the disk did not keep: all of it at once may be right.
            if not pieced:
                break
        raise _ElsewhereError(f"it sends {found}, which is not the published file of sha256 {self.sha256}")

    def _complete(self, url: str) -> None:
        """Ask again and again until all is here."""
        in_vain = 0
        for attempt in range(1, self.patience.all_attempts + 1):
            before = self._here()
            try:
                self._transfer(url)
                return
            except _PassingError as error:
                brought = self._here() > before and not isinstance(error, _StalledError)
                in_vain = 1 if brought else in_vain + 1
                if in_vain >= self.patience.attempts or attempt == self.patience.all_attempts:
                    raise _ElsewhereError(f"{error}, after {attempt} attempts") from error
                wait = error.wait if error.wait is not None else self.patience.first_wait * 2 ** (in_vain - 1)
                time.sleep(min(max(wait, 0.0), self.patience.longest_wait))

    def _transfer(self, url: str) -> None:
        """Ask once, for what is missing. Returns when all is here."""
        have, known = self._here(), self._known()
        headers = {"User-Agent": f"smpconv-zoo/{__version__}", "Accept-Encoding": "identity"}
        validator = known.get("validator") if known.get("url") == url else None
        # Without a validator the sha256 tells whether the pieces belong together; without either nothing would.
        if have and (validator or self.sha256):
            headers["Range"] = f"bytes={have}-"
            if validator:
                headers["If-Range"] = validator
        else:
            have = 0
        with self._opened(url, headers, have) as response:
            if response is None:
                return
            total = self._accept(response, url, have, known)
            if response.status != 206:
                have = 0
            watch = Watch(self.patience.pace)
            watch.start()
            with open(self.part, "ab" if have else "wb", buffering=0) as file:
                while block := _read(response):
                    have += len(block)
                    watch.add(len(block))
                    if have > min(self.most, self.size or self.most):
                        raise _ElsewhereError(f"it sends more than {min(self.most, self.size or self.most):,} bytes")
                    self._write(file, block)
                    if self.progress is not None:
                        self.progress(have, total or 0)
                    if watch.stalled() and have != total:
                        raise _StalledError(f"it is too slow, {watch.pace}")
                os.fsync(file.fileno())
        if total is not None and have < total:
            raise _PassingError(f"the connection ends after {have:,} of {total:,} bytes")

    @contextlib.contextmanager
    def _opened(self, url: str, headers: dict[str, str], have: int) -> Iterator[Any]:
        """The answer of a server; None if it says that all is here already."""
        opener = urllib.request.build_opener(_Redirections(self.sha256 is not None))
        try:
            response = opener.open(urllib.request.Request(url, headers=headers), timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:
                    if have and _total(error.headers) == have:
                        yield None
                        return
                    # Nothing of what is here fits what is there.
                    self._drop()
                    raise _PassingError("the server refuses the rest of the file") from error
                reason = f"HTTP {error.code} {error.reason}".strip()
                if error.code in PASSING_STATUSES:
                    raise _PassingError(reason, _seconds(error.headers.get("Retry-After"))) from error
                raise _ElsewhereError(reason) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise _ElsewhereError(f"its certificate is not valid: {error.reason.verify_message}") from error
            raise _PassingError(f"it cannot be reached ({error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(f"it does not answer ({_line(error)})") from error
        except ValueError as error:
            raise _ElsewhereError(f"it is no address ({_line(error)})") from error
        with response:
            yield response

    def _accept(self, response: Any, url: str, have: int, known: dict[str, Any]) -> int | None:
        """Whether an answer is the file, or its missing part; how many bytes there are in all, if that is said."""
        validator = _validator(response.headers)
        if response.status == 206:
            total, start = _total(response.headers), _start(response.headers)
            others = known.get("url") == url and known.get("validator") not in (None, validator)
            if start != have or others or (known.get("total") or total) != total:
                self._drop()
                raise _PassingError("the file changed between two requests")
        elif response.status == 200:
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
        else:
            raise _ElsewhereError(f"HTTP {response.status} where a file was asked for")
        if total is not None:
            if self.size not in (None, total):
                raise _ElsewhereError(f"it has a file of {total:,} bytes, the published one has {self.size:,}")
            if total > self.most:
                raise _ElsewhereError(f"it has a file of {total:,} bytes, {self.most:,} at most are taken")
        start = have if response.status == 206 else 0
        check_space(self.target.parent, (total or self.size or 0) - start + self.reserve, self.target.name)
        notes = {"url": url, "validator": validator, "total": total}
        if response.status == 200:
            self._drop()
        write_whole(self.notes, json.dumps(notes).encode())
        return total

    def _write(self, file: io.FileIO, block: bytes) -> None:
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.part)) from error

    def _here(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _known(self) -> dict[str, Any]:
        try:
            known = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _drop(self) -> None:
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, and from https to http only where a sha256 tells what arrives."""

    def __init__(self, checked: bool) -> None:
        self.checked = checked

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = (urllib.parse.urlsplit(url).scheme for url in (req.full_url, newurl))
        if new not in ("http", "https") or (old == "https" and new == "http" and not self.checked):
            raise urllib.error.HTTPError(req.full_url, code, f"it leads to {newurl}, which is not trusted", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read(response: Any) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(f"the connection breaks ({_line(error)})") from error


def _validator(headers: Any) -> str | None:
    """What tells one version of a file from another, for If-Range: a strong ETag or else the date."""
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _total(headers: Any) -> int | None:
    match = re.fullmatch(r"bytes\s+(?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", "").strip())
    return int(match[1]) if match else None


def _start(headers: Any) -> int | None:
    match = re.match(r"bytes\s+(\d+)-", headers.get("Content-Range", "").strip())
    return int(match[1]) if match else None


def _seconds(after: str | None) -> float | None:
    """Retry-After, which is a number of seconds or a date."""
    if after is None:
        return None
    if after.strip().isdigit():
        return float(after)
    try:
        return email.utils.parsedate_to_datetime(after).timestamp() - time.time()
    except ValueError:
        return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
