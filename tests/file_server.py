"""A server of files on loopback that does what real ones do: ranges, ETags, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Served:
    """A file, and how it is served.

    Attributes:
        data: Its bytes.
        validator: ``etag``, ``weak``, ``date`` or None: what tells this version from another.
        ranges: Whether a part can be asked for.
        if_range: Whether If-Range is heeded.
        cut: Bytes of the body after which the connection closes, for as many answers as there are numbers.
        statuses: Error codes of the first answers, one each.
        headers: Sent with every answer, and with errors.
        length: Whether Content-Length is sent.
        block, pause: Bytes at a time and seconds between them.
        moved: Address to which every request is sent on.
    """

    data: bytes
    validator: str | None = "etag"
    ranges: bool = True
    if_range: bool = True
    cut: list[int] = dataclasses.field(default_factory=list)
    statuses: list[int] = dataclasses.field(default_factory=list)
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    length: bool = True
    block: int = 2**16
    pause: float = 0.0
    moved: str | None = None

    def tag(self) -> tuple[str, str] | None:
        digest = hashlib.sha256(self.data).hexdigest()
        if self.validator == "date":
            return "Last-Modified", email.utils.formatdate(int(digest[:7], 16), usegmt=True)
        if self.validator is None:
            return None
        return "ETag", f'W/"{digest[:12]}"' if self.validator == "weak" else f'"{digest[:12]}"'


@dataclasses.dataclass
class Request:
    """What was asked for, and how many bytes of a body were sent."""

    path: str
    range: str | None
    if_range: str | None
    status: int = 0
    sent: int = 0


class FileServer:
    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.log: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{name}"

    def put(self, name: str, data: bytes, **how: object) -> str:
        self.files[name] = Served(data, **how)  # type: ignore[arg-type]
        return self.url(name)

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.log if request.path == name]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/")
        asked = Request(name, handler.headers.get("Range"), handler.headers.get("If-Range"))
        self.log.append(asked)
        file = self.files.get(name)
        if file is None or file.statuses or file.moved:
            asked.status = 404 if file is None else file.statuses.pop(0) if file.statuses else 302
            handler.send_response(asked.status)
            for header, value in (file.headers if file else {}).items():
                handler.send_header(header, value)
            if file is not None and file.moved and asked.status == 302:
                handler.send_header("Location", file.moved)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        tag, start, total = file.tag(), 0, len(file.data)
        match = re.fullmatch(r"bytes=(\d+)-", asked.range or "")
        if match and file.ranges:
            same = asked.if_range is None or not file.if_range or (tag is not None and asked.if_range == tag[1])
            if same and int(match[1]) >= total:
                asked.status = 416
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{total}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            start = int(match[1]) if same else 0
        asked.status = 206 if start else 200
        handler.send_response(asked.status)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if tag is not None:
            handler.send_header(*tag)
        for header, value in file.headers.items():
            handler.send_header(header, value)
        if file.length:
            handler.send_header("Content-Length", str(total - start))
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        end = min(total, start + file.cut.pop(0)) if file.cut else total
        for place in range(start, end, file.block):
            block = file.data[place : min(place + file.block, end)]
            handler.wfile.write(block)
            asked.sent += len(block)
            if file.pause:
                time.sleep(file.pause)


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
    server = FileServer()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
