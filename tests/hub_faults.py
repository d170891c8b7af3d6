"""What goes wrong at the test Hub, when, and a log of every request.

``POST /__faults__`` with the fields of a `Fault` as JSON adds one, ``DELETE`` clears them, ``GET`` lists them;
``GET /__log__`` lists the requests so far, ``DELETE`` clears them. `HubServer` has methods for all five.
"""

from __future__ import annotations

import asyncio
import dataclasses
import fnmatch
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

from hub_store import HubError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

TRUE = ("1", "true", "True")


@dataclasses.dataclass
class Call:
    """A request with its body, for handlers that run in a thread."""

    request: Request
    body: bytes

    def __getitem__(self, name: str) -> str:
        return urllib.parse.unquote(self.request.path_params[name])

    @property
    def path(self) -> str:
        """The file's path; decoded once already, unlike a revision."""
        return self.request.path_params.get("path", "").strip("/")

    def json(self) -> Any:
        return json.loads(self.body) if self.body else {}

    def asks(self, option: str) -> bool:
        return self.request.query_params.get(option) in TRUE


# Where a fault of a kind strikes unless it names its route; a kind not listed strikes anywhere.
FILE_ROUTES = ("resolve", "blob")
INSTEAD = ("status", "refuse", "hang")
BODY = ("truncate", "die", "flip", "slow", "stall")
DEFAULT_ROUTES: dict[str, tuple[str, ...]] = {**dict.fromkeys(BODY, FILE_ROUTES), "swap": ("resolve",)}


@dataclasses.dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: ``truncate``: a shorter body, consistent with its Content-Length. ``die``: the connection closes inside
            the body. ``flip``: one byte differs. ``slow``: a limited rate. ``stall``: a part of the body, then nothing,
            on an open connection. ``swap``: another file under the same name and commit, consistent in itself; tree and
            paths-info still tell of the true one (of the route that tells of Xet's servers: another address of them).
            ``status``: an error status. ``refuse``: the token is refused (requests without one pass). ``hang``: no
            answer.
        route: Name of the route it strikes; empty for the kind's own choice, see `DEFAULT_ROUTES`.
        path: Pattern that the URL's path has to match.
        method: HTTP method, ``*`` for any.
        times: How many requests it strikes, None for all.
        after: Bytes of the body that still arrive (truncate, die, stall), half of them if None.
        offset: Byte of the file that is flipped, the middle of the body if None.
        code: HTTP status (status: 500 if None; refuse: 401 or 403, 401 if None).
        rate: Bytes a second (slow).
        content: The other file (swap), in base64.
    """

    kind: str
    route: str = ""
    path: str = "*"
    method: str = "*"
    times: int | None = None
    after: int | None = None
    offset: int | None = None
    code: int | None = None
    rate: int | None = None
    content: str | None = None

    def __post_init__(self) -> None:
        needs = {"slow": self.rate, "swap": self.content}
        if self.kind not in (*INSTEAD, *BODY, "swap"):
            raise ValueError(f"no fault of kind {self.kind!r}")
        if needs.get(self.kind, "nothing") is None:
            raise ValueError(f"a fault of kind {self.kind!r} needs {'rate' if self.kind == 'slow' else 'content'}")

    def strikes(self, entry: Mapping[str, Any]) -> bool:
        routes = (self.route,) if self.route else DEFAULT_ROUTES.get(self.kind, (entry["route"],))
        return (
            self.times != 0
            and entry["route"] in routes
            and self.method in ("*", entry["method"])
            and fnmatch.fnmatchcase(entry["path"], self.path)
            and (self.kind != "refuse" or entry["authenticated"])
        )


class Control:
    """The faults to come and the requests so far."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def take(
        self, entry: dict[str, Any], kinds: tuple[str, ...], fits: Callable[[Fault], bool] = lambda fault: True
    ) -> list[Fault]:
        """The faults that strike a request, the first of each kind; they are counted and noted in its log entry."""
        taken: dict[str, Fault] = {}
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.kind not in taken and fault.strikes(entry) and fits(fault):
                    taken[fault.kind] = fault
                    if fault.times is not None:
                        fault.times -= 1
            entry["faults"] += list(taken)
        return list(taken.values())

    def add_fault(self, call: Call) -> Response:
        try:
            fault = Fault(**call.json())
        except (TypeError, ValueError) as error:
            raise HubError(400, str(error)) from error
        with self.lock:
            self.faults.append(fault)
        return self.list_faults(call)

    def list_faults(self, call: Call) -> Response:
        with self.lock:
            return JSONResponse([dataclasses.asdict(fault) for fault in self.faults])

    def clear_faults(self, call: Call) -> Response:
        with self.lock:
            self.faults.clear()
        return Response()

    def list_log(self, call: Call) -> Response:
        with self.lock:
            return JSONResponse(self.log)

    def clear_log(self, call: Call) -> Response:
        with self.lock:
            self.log.clear()
        return Response()


class Gate:
    """Around the application: logs each request and lets the faults strike."""

    def __init__(self, app: Starlette, control: Control) -> None:
        self.app, self.control = app, control

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A revision arrives as refs%2Fpr%2F1 and must stay one segment; the server has decoded it already.
        segments = scope["raw_path"].decode().split("/")
        scope["path"] = "/".join(urllib.parse.unquote(part).replace("/", "%2F") for part in segments)
        if scope["path"].startswith("/__"):
            await self.app(scope, receive, send)
            return
        headers = Request(scope).headers
        entry = {
            "route": self._route(scope),
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode(),
            "range": headers.get("range"),
            "authenticated": "authorization" in headers,
            "status": None,
            "faults": [],
        }
        with self.control.lock:
            self.control.log.append(entry)
        scope["hub.entry"] = entry
        instead = self.control.take(entry, INSTEAD)
        if instead:
            await self._answer_instead(instead[0], scope, receive, self._noting(entry, send))
        else:
            await self.app(scope, receive, self._spoiled(entry, receive, send))

    def _route(self, scope: Scope) -> str:
        names = (
            route.name
            for route in self.app.routes
            if isinstance(route, Route) and route.matches(scope)[0] == Match.FULL
        )
        return next(names, "unknown")

    @staticmethod
    def _noting(entry: dict[str, Any], send: Send) -> Send:
        async def noting(message: Message) -> None:
            entry["status"] = message.get("status", entry["status"])
            await send(message)

        return noting

    @staticmethod
    async def _answer_instead(fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        # The request is read to its end: a client that is still sending would see a broken pipe, not the answer.
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass
        if fault.kind == "hang":
            while message["type"] != "http.disconnect":
                message = await receive()
            return
        if fault.kind == "refuse":
            code = fault.code or 401
            text = "Invalid credentials in Authorization header" if code == 401 else "this token may not do that"
        else:
            code, text = fault.code or 500, "injected fault"
        await JSONResponse({"error": text}, code, {"X-Error-Message": text})(scope, receive, send)

    def _spoiled(self, entry: dict[str, Any], receive: Receive, send: Send) -> Send:
        """``send`` with the body faults in between."""
        faults: dict[str, Fault] = {}
        limit = flip = -1  # counted from the start of this body
        position = 0

        def begin(message: Message) -> None:
            nonlocal limit, flip
            entry["status"] = message["status"]
            headers = MutableHeaders(raw=message["headers"])
            length = int(headers.get("content-length", 0))
            if entry["method"] == "HEAD" or message["status"] not in (200, 206) or not length:
                return
            part = re.match(r"bytes (\d+)-", headers.get("content-range", ""))
            first = int(part[1]) if part else 0

            def fits(fault: Fault) -> bool:
                if fault.kind == "flip" and fault.offset is not None:
                    return first <= fault.offset < first + length
                return fault.kind == "slow" or fault.after is None or fault.after < length

            faults.update({fault.kind: fault for fault in self.control.take(entry, BODY, fits)})
            for kind in ("truncate", "die", "stall"):
                if kind in faults:
                    after = faults[kind].after
                    limit = length // 2 if after is None else after
            if "flip" in faults:
                offset = faults["flip"].offset
                flip = length // 2 if offset is None else offset - first
            if "truncate" in faults:
                headers["content-length"] = str(limit)

        async def spoiled(message: Message) -> None:
            nonlocal position
            if message["type"] == "http.response.start":
                begin(message)
                await send(message)
                return
            data = bytearray(message.get("body", b""))
            start, position = position, position + len(data)
            if start <= flip < position:
                data[flip - start] ^= 0x01
            ends = not message.get("more_body", False)
            if limit >= 0:
                del data[max(limit - start, 0) :]
            if "slow" in faults:
                rate = faults["slow"].rate or 1
                step = max(rate // 20, 1)
                for piece in range(0, len(data), step):
                    body = bytes(data[piece : piece + step])
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    await asyncio.sleep(step / rate)
                data.clear()
            if "stall" in faults and position >= limit:
                await send({"type": "http.response.body", "body": bytes(data), "more_body": True})
                while (await receive())["type"] != "http.disconnect":
                    pass
                return
            # An answer that is never completed makes uvicorn close the connection.
            ends = ends and "die" not in faults
            await send({"type": "http.response.body", "body": bytes(data), "more_body": not ends})

        return spoiled
