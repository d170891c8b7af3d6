"""A Hugging Face Hub look-alike on loopback, for tests: real clients push to it and read from it, and it fails on demand.

From a test::

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home"), check=True)
        assert hub.read("org/name", "config.json") == b"{}"
        hub.fault("flip", path="*.safetensors", times=1)

From a shell: ``python tests/hub_server.py --root DIR --port P``, then ``curl -d '{"kind": "hang"}' .../__faults__``.

Models live under ``ROOT/models/<org>/<name>`` as ordinary git repositories with LFS pointers, the layout of olah's
``mirrors-path``; `olah_reader` serves the same store by code that knows nothing of this one.

It answers what huggingface_hub 2.4 asks for, as read off that client: acceptance here is no proof that the real Hub
accepts. Models only; no gated repositories, no paging; bodies are held in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import fnmatch
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import Message, Receive, Scope, Send

TOKEN = "hf_test"
USER = "tester"

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".onnx", ".gz", ".zip", ".tar", ".h5")
LFS_BYTES = 10 * 2**20
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
FRONT_MATTER = re.compile(r"^---\r?\n(.*?)\r?\n---", re.DOTALL)
TRUE = ("1", "true", "True")


class HubError(Exception):
    """An answer other than success, in the Hub's words: the client chooses its exception by ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


# ---------------------------------------------------------------------------------------------------------------- store


class XetStore:
    """The directory that hf_xet uses in place of its content-addressed server.

    The token route names it to the client as ``local://DIR``, which hf_xet 1.8 takes, undocumented. hf_xet locks it
    for as long as a process has it open: one client at a time.
    """

    def __init__(self, root: Path) -> None:
        self.directory = root / "xet"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.url = f"local://{self.directory}"

    def files(self) -> dict[str, tuple[str, int]]:
        """Xet hash and size of every file in the store, by sha256, from hf_xet's metadata shards."""
        found = {}
        for shard in (self.directory / "xet" / "xorbs" / "shards").glob("*.mdb"):
            data = shard.read_bytes()
            position = 48  # behind the shard's header
            while position + 48 <= len(data) and data[position : position + 32] != b"\xff" * 32:
                xet_hash = _xet_hex(data[position : position + 32])
                flags, segments = struct.unpack_from("<II", data, position + 32)
                position += 48
                size = sum(struct.unpack_from("<I", data, position + 48 * i + 36)[0] for i in range(segments))
                position += 48 * segments
                if flags & 1 << 31:  # one verification entry a segment
                    position += 48 * segments
                if flags & 1 << 30:  # the sha256 of the whole file
                    found[_xet_hex(data[position : position + 32])] = (xet_hash, size)
                    position += 48
        return found

    def fetch(self, sha256: str, target: Path) -> None:
        """Write the file ``sha256`` to ``target``, if the store has it."""
        entry = self.files().get(sha256)
        if entry is None:
            return
        aside = target.with_name(f"{target.name}.xet")
        code = (
            "import sys, hf_xet\n"
            "url, xet_hash, size, target = sys.argv[1:]\n"
            "group = hf_xet.XetSession().new_file_download_group(\n"
            "    endpoint=url, token='x', token_expiry_unix_secs=2**40)\n"
            "with group: group.start_download_file(hf_xet.XetFileInfo(xet_hash, int(size)), target)\n"
        )
        # In a process of its own, for the lock goes only when the process that took it ends.
        done = subprocess.run(
            [sys.executable, "-c", code, self.url, entry[0], str(entry[1]), str(aside)], capture_output=True, text=True
        )
        if done.returncode:
            raise HubError(503, f"the Xet store is in use: {done.stderr.strip().splitlines()[-1]}")
        if hashlib.sha256(aside.read_bytes()).hexdigest() != sha256:
            raise HubError(500, f"the Xet store does not give {sha256} back")
        os.replace(aside, target)


def _xet_hex(data: bytes) -> str:
    """hf_xet prints a hash as four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


class Repository:
    """One model: a git repository with an empty work tree and LFS objects."""

    def __init__(self, root: Path, repo_id: str, xet: XetStore | None = None) -> None:
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo_id):
            raise HubError(404, "Repository not found", "RepoNotFound")
        self.id, self.xet = repo_id, xet
        self.path = root / "models" / repo_id
        self.git_dir = self.path / ".git"

    def git(self, *arguments: str, stdin: bytes | None = None, index: Path | None = None) -> bytes:
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        for role in ("AUTHOR", "COMMITTER"):
            env |= {f"GIT_{role}_NAME": USER, f"GIT_{role}_EMAIL": f"{USER}@localhost"}
        if index:
            env["GIT_INDEX_FILE"] = str(index)
        command = ["git", "-C", str(self.path), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, env=env, check=True).stdout

    @property
    def exists(self) -> bool:
        return self.git_dir.is_dir()

    @property
    def private(self) -> bool:
        return (self.git_dir / "hub-private").exists()

    def create(self, private: bool) -> None:
        self.path.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")
        if private:
            (self.git_dir / "hub-private").touch()
        self.commit("refs/heads/main", None, {".gitattributes": GITATTRIBUTES}, [], "initial commit")

    def revision(self, name: str) -> str | None:
        """The commit of a branch, tag, reference or (short) hash."""
        if name.startswith("-"):
            return None
        try:
            return self.git("rev-parse", "--verify", "-q", f"{name}^{{commit}}").decode().strip()
        except subprocess.CalledProcessError:
            return None

    def need_revision(self, name: str) -> str:
        commit = self.revision(name)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    def tree(self, commit: str, folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
        """The Hub's tree entries of a commit."""
        hashes = self.xet.files() if self.xet else {}
        entries = []
        options = ("-r", "-t") if recursive else ()
        for line in self.git("ls-tree", "-z", "-l", *options, f"{commit}:{folder}").split(b"\0")[:-1]:
            meta, name = line.decode().split("\t", 1)
            _, kind, oid, size = meta.split()
            path = f"{folder}/{name}" if folder else name
            if kind == "tree":
                entries.append({"type": "directory", "oid": oid, "size": 0, "path": path})
                continue
            entry: dict[str, Any] = {"type": "file", "oid": oid, "size": int(size), "path": path}
            pointer = POINTER.fullmatch(self.git("cat-file", "blob", oid)) if int(size) < 200 else None
            if pointer:
                sha256, entry["size"] = pointer[1].decode(), int(pointer[2])
                entry["lfs"] = {"oid": sha256, "size": entry["size"], "pointerSize": int(size)}
                if sha256 in hashes:
                    entry["xetHash"] = hashes[sha256][0]
            entries.append(entry)
        return entries

    def files(self, commit: str) -> dict[str, dict[str, Any]]:
        return {entry["path"]: entry for entry in self.tree(commit) if entry["type"] == "file"}

    def read(self, entry: Mapping[str, Any]) -> bytes:
        """The content of a tree entry, LFS pointers followed."""
        return self.lfs_object(entry["lfs"]["oid"]) if "lfs" in entry else self.git("cat-file", "blob", entry["oid"])

    def lfs_path(self, sha256: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HubError(422, f"not a sha256: {sha256}")
        return self.git_dir / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def lfs_object(self, sha256: str) -> bytes:
        path = self.lfs_path(sha256)
        if not path.exists() and self.xet:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.xet.fetch(sha256, path)
        if not path.exists():
            raise HubError(404, "no such object", "EntryNotFound")
        return path.read_bytes()

    def lfs_size(self, sha256: str) -> int | None:
        path = self.lfs_path(sha256)
        if path.exists():
            return path.stat().st_size
        return self.xet.files().get(sha256, (None, None))[1] if self.xet else None

    def write_lfs_object(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HubError(422, "the content does not have this sha256")
        path = self.lfs_path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)

    def commit(self, ref: str, parent: str | None, added: Mapping[str, bytes], deleted: list[str], message: str) -> str:
        """Commit on top of ``parent``; a deleted path that ends in a slash is a folder."""
        index: dict[str, str] = {}
        if parent:
            for line in self.git("ls-tree", "-r", "-z", parent).decode().split("\0")[:-1]:
                meta, path = line.split("\t", 1)
                index[path] = meta.split()[2]
        for path in deleted:
            gone = [name for name in index if name == path or (path.endswith("/") and name.startswith(path))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del index[name]
        for path, data in added.items():
            index[path] = self.git("hash-object", "-w", "--stdin", stdin=data).decode().strip()
        with tempfile.TemporaryDirectory(dir=self.git_dir) as scratch:
            lines = "".join(f"100644 {oid}\t{path}\0" for path, oid in index.items()).encode()
            self.git("update-index", "-z", "--index-info", stdin=lines, index=Path(scratch) / "index")
            tree = self.git("write-tree", index=Path(scratch) / "index").decode().strip()
        parents = ("-p", parent) if parent else ()
        commit = self.git("commit-tree", tree, *parents, "-m", message).decode().strip()
        self.git("update-ref", ref, commit, *([parent] if parent else []))
        return commit

    def references(self, prefix: str) -> list[dict[str, str]]:
        lines = self.git("for-each-ref", "--format=%(refname:lstrip=2) %(refname) %(objectname)", prefix).decode()
        keys = ("name", "ref", "targetCommit")
        return [dict(zip(keys, line.split(), strict=True)) for line in lines.splitlines()]


# --------------------------------------------------------------------------------------------------------------- faults

# Where a fault of a kind strikes unless it names its route; a kind not listed strikes anywhere.
FILE_ROUTES = ("resolve", "blob")
DEFAULT_ROUTES = {"truncate": FILE_ROUTES, "die": FILE_ROUTES, "flip": FILE_ROUTES, "slow": FILE_ROUTES}
DEFAULT_ROUTES["swap"] = ("resolve",)
INSTEAD = ("status", "refuse", "hang")
BODY = ("truncate", "die", "flip", "slow")


@dataclasses.dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: ``truncate``: a shorter body, consistent with its Content-Length. ``die``: the connection closes inside
            the body. ``flip``: one byte differs. ``slow``: a limited rate. ``swap``: another file under the same name
            and commit, consistent in itself; tree and paths-info still tell of the true one. ``status``: an error
            status. ``refuse``: the token is refused (requests without one pass). ``hang``: no answer.
        route: Name of the route it strikes; empty for the kind's own choice, see `DEFAULT_ROUTES`.
        path: Pattern that the URL's path has to match.
        method: HTTP method, ``*`` for any.
        times: How many requests it strikes, None for all.
        after: Bytes of the body that still arrive (truncate, die), half of them if None.
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
            await self.app(scope, receive, self._spoiled(entry, send))

    def _route(self, scope: Scope) -> str:
        names = (route.name for route in self.app.routes if route.matches(scope)[0] == Match.FULL)
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

    def _spoiled(self, entry: dict[str, Any], send: Send) -> Send:
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
            for kind in ("truncate", "die"):
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
            # An answer that is never completed makes uvicorn close the connection.
            ends = ends and "die" not in faults
            await send({"type": "http.response.body", "body": bytes(data), "more_body": not ends})

        return spoiled


# ------------------------------------------------------------------------------------------------------------------ hub


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


class Hub:
    """The answers."""

    def __init__(self, root: Path, endpoint: str, token: str, control: Control, xet: bool, multipart: int) -> None:
        self.root, self.endpoint, self.token, self.control, self.multipart = root, endpoint, token, control, multipart
        # Blobs have another host than the endpoint, as on the real Hub: the client follows redirects within a host and
        # then misses the commit in the answer's headers.
        self.blobs = endpoint.replace("127.0.0.1", "localhost")
        self.xet = XetStore(root) if xet else None
        self.commit_lock = threading.Lock()

    def app(self) -> Gate:
        model = "/api/models/{org}/{name}"
        lfs = "/lfs/{org}/{name}/{oid}"
        control = self.control
        routes = [
            self._route("GET", "/api/whoami-v2", "whoami", self.whoami, write=True),
            self._route("POST", "/api/repos/create", "create", self.create, write=True),
            self._route("DELETE", "/api/repos/delete", "delete", self.delete, write=True),
            self._route("POST", "/api/validate-yaml", "validate-yaml", self.validate_yaml),
            self._route("POST", model + "/preupload/{rev}", "preupload", self.preupload, write=True),
            self._route("GET", model + "/xet-write-token/{rev}", "xet-write-token", self.xet_token, write=True),
            self._route("GET", model + "/xet-read-token/{rev}", "xet-read-token", self.xet_token),
            self._route("POST", "/{org}/{name}.git/info/lfs/objects/batch", "lfs-batch", self.lfs_batch, write=True),
            # As with presigned URLs, no token arrives on the routes that take the bytes.
            self._route("PUT", lfs, "lfs-put", self.lfs_put),
            self._route("PUT", lfs + "/part/{part:int}", "lfs-part", self.lfs_part),
            self._route("POST", lfs + "/complete", "lfs-complete", self.lfs_complete),
            self._route("POST", lfs + "/verify", "lfs-verify", self.lfs_verify),
            self._route("POST", model + "/commit/{rev}", "commit", self.commit, write=True),
            self._route("GET", model, "info", self.info),
            self._route("GET", model + "/revision/{rev}", "info", self.info),
            self._route("GET", model + "/tree/{rev}", "tree", self.tree),
            self._route("GET", model + "/tree/{rev}/{path:path}", "tree", self.tree),
            self._route("POST", model + "/paths-info/{rev}", "paths-info", self.paths_info),
            self._route("GET", model + "/refs", "refs", self.refs),
            self._route("GET", model + "/commits/{rev}", "commits", self.commits),
            self._route("POST", model + "/branch/{ref}", "branch", self.create_branch, write=True),
            self._route("DELETE", model + "/branch/{ref}", "branch", self.delete_branch, write=True),
            self._route("POST", model + "/tag/{rev}", "tag", self.create_tag, write=True),
            self._route("DELETE", model + "/tag/{ref}", "tag", self.delete_tag, write=True),
            self._route("GET", "/{org}/{name}/resolve/{rev}/{path:path}", "resolve", self.resolve),
            self._route("GET", "/blob/{org}/{name}/{oid}/{path:path}", "blob", self.blob),
            self._route("POST", "/__faults__", "control", control.add_fault),
            self._route("GET", "/__faults__", "control", control.list_faults),
            self._route("DELETE", "/__faults__", "control", control.clear_faults),
            self._route("GET", "/__log__", "control", control.list_log),
            self._route("DELETE", "/__log__", "control", control.clear_log),
        ]
        return Gate(Starlette(routes=routes), control)

    def _route(
        self, method: str, path: str, name: str, handler: Callable[[Call], Response], write: bool = False
    ) -> Route:
        def answer(call: Call) -> Response:
            try:
                if not self._signed_in(call.request) and write:
                    raise HubError(401, "Invalid credentials in Authorization header")
                return handler(call)
            except HubError as error:
                return JSONResponse({"error": str(error)}, error.status, error.headers)

        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(answer, Call(request, await request.body()))

        return Route(path, endpoint, methods=[method], name=name)

    def _signed_in(self, request: Request) -> bool:
        given = request.headers.get("authorization")
        if given and given != f"Bearer {self.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        return given is not None

    def _named(self, call: Call) -> Repository:
        """The repository that the body of a request names."""
        wanted = call.json()
        if wanted.get("type", "model") != "model":
            raise HubError(400, "this server has models only")
        return Repository(self.root, f"{wanted.get('organization') or USER}/{wanted['name']}", self.xet)

    def _repository(self, call: Call, trusted: bool = False) -> Repository:
        """The repository in a request's path, which has to be there and readable."""
        repository = Repository(self.root, f"{call['org']}/{call['name']}", self.xet)
        if not repository.exists:
            raise HubError(404, "Repository not found", "RepoNotFound")
        if repository.private and not trusted and not self._signed_in(call.request):
            raise HubError(401, "Repository not found", "RepoNotFound")
        return repository

    def _located(self, call: Call) -> tuple[Repository, str]:
        repository = self._repository(call)
        return repository, repository.need_revision(call["rev"])

    # Accounts and repositories

    def whoami(self, call: Call) -> Response:
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        user = {"type": "user", "id": "0", "name": USER, "fullname": USER, "isPro": False, "orgs": [], "auth": access}
        return JSONResponse(user)

    def create(self, call: Call) -> Response:
        wanted, repository = call.json(), self._named(call)
        url = f"{self.endpoint}/{repository.id}"
        with self.commit_lock:
            if repository.exists:
                # The client takes the URL from the refusal too, where it is told that the repository may exist.
                return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
            repository.create(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return JSONResponse({"url": url, "name": repository.id, "id": repository.id})

    def delete(self, call: Call) -> Response:
        repository = self._named(call)
        if not repository.exists:
            raise HubError(404, "Repository not found", "RepoNotFound")
        shutil.rmtree(repository.path)
        return Response("OK")

    def validate_yaml(self, call: Call) -> Response:
        found = FRONT_MATTER.match(call.json()["content"])
        try:
            yaml.safe_load(found[1] if found else "")
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": [], "warnings": warnings})

    # Uploads

    def preupload(self, call: Call) -> Response:
        repository, commit = self._located(call)
        present = repository.files(commit)
        answers = []
        for file in call.json()["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES or binary
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:
                # By this the client sees that nothing has changed.
                answer["oid"] = present[path].get("lfs", present[path])["oid"]
            answers.append(answer)
        return JSONResponse({"files": answers, "commitOid": commit})

    def lfs_batch(self, call: Call) -> Response:
        repository, wanted = self._repository(call), call.json()
        if wanted["operation"] != "upload":
            raise HubError(400, "downloads go through resolve")
        multipart = self.multipart and "multipart" in wanted["transfers"]
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            href = f"{self.endpoint}/lfs/{repository.id}/{item['oid']}"
            if repository.lfs_size(item["oid"]) != item["size"]:
                upload: dict[str, Any] = {"href": href}
                if multipart:
                    parts = range(1, -(-item["size"] // self.multipart) + 1)
                    header = {"chunk_size": str(self.multipart), **{str(n): f"{href}/part/{n}" for n in parts}}
                    upload = {"href": f"{href}/complete", "header": header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return JSONResponse({"transfer": "multipart" if multipart else "basic", "objects": objects})

    def lfs_put(self, call: Call) -> Response:
        self._repository(call, trusted=True).write_lfs_object(call["oid"], call.body)
        return Response()

    def _part(self, call: Call, number: int) -> Path:
        path = self._repository(call, trusted=True).lfs_path(call["oid"])
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f"{path.name}.part{number}")

    def lfs_part(self, call: Call) -> Response:
        self._part(call, call.request.path_params["part"]).write_bytes(call.body)
        return Response(headers={"ETag": f'"{hashlib.sha256(call.body).hexdigest()}"'})

    def lfs_complete(self, call: Call) -> Response:
        parts = [self._part(call, part["partNumber"]) for part in call.json()["parts"]]
        data = b"".join(part.read_bytes() for part in parts)
        self._repository(call, trusted=True).write_lfs_object(call["oid"], data)
        for part in parts:
            part.unlink()
        return JSONResponse({})

    def lfs_verify(self, call: Call) -> Response:
        if self._repository(call, trusted=True).lfs_size(call["oid"]) != call.json()["size"]:
            raise HubError(404, "no such object")
        return JSONResponse({})

    def commit(self, call: Call) -> Response:
        repository, ref = self._repository(call), call["rev"]
        ref = ref if ref.startswith("refs/") else f"refs/heads/{ref}"
        header: dict[str, str] = {}
        added: dict[str, bytes] = {}
        deleted: list[str] = []
        for line in call.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                size = repository.lfs_size(value["oid"])
                if size is None:
                    raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n"
                added[value["path"]] = pointer.encode()
            elif item["key"] == "deletedFile":
                deleted.append(value["path"])
            elif item["key"] == "deletedFolder":
                deleted.append(value["path"].rstrip("/") + "/")
            else:
                raise HubError(400, f"unknown operation {item['key']}")
        message = "\n\n".join(filter(None, (header["summary"], header.get("description"))))
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        with self.commit_lock:
            parent = repository.need_revision(ref)
            if not parent.startswith(header.get("parentCommit") or ""):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if call.asks("create_pr"):
                number = len(repository.references("refs/pr")) + 1
                ref = f"refs/pr/{number}"
                repository.git("update-ref", ref, parent)
                answer["pullRequestUrl"] = f"{self.endpoint}/{repository.id}/discussions/{number}"
            commit = repository.commit(ref, parent, added, deleted, message)
        url = f"{self.endpoint}/{repository.id}/commit/{commit}"
        return JSONResponse({**answer, "commitOid": commit, "commitUrl": url})

    def xet_token(self, call: Call) -> Response:
        self._repository(call)
        if self.xet is None:
            raise HubError(404, "this server was started without Xet")
        expiry = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.xet.url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(expiry)}
        return JSONResponse({"casUrl": self.xet.url, "accessToken": "x", "exp": expiry}, headers=headers)

    # Revisions

    def info(self, call: Call) -> Response:
        repository = self._repository(call)
        commit = repository.need_revision(call["rev"] if "rev" in call.request.path_params else "main")
        files = repository.files(commit)
        siblings = []
        for path, entry in files.items():
            sibling: dict[str, Any] = {"rfilename": path}
            if call.asks("blobs"):
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
            siblings.append(sibling)
        card = None
        if "README.md" in files:
            found = FRONT_MATTER.match(repository.read(files["README.md"]).decode())
            card = yaml.safe_load(found[1]) if found else None
        seconds = int(repository.git("show", "-s", "--format=%ct", commit))
        when = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        return JSONResponse(
            {
                "id": repository.id,
                "modelId": repository.id,
                "author": repository.id.split("/")[0],
                "sha": commit,
                "lastModified": when,
                "createdAt": when,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": (card or {}).get("tags", []),
                "library_name": (card or {}).get("library_name"),
                "pipeline_tag": (card or {}).get("pipeline_tag"),
                "cardData": card,
                "siblings": siblings,
            }
        )

    def tree(self, call: Call) -> Response:
        repository, commit = self._located(call)
        try:
            return JSONResponse(repository.tree(commit, call.path, call.asks("recursive")))
        except subprocess.CalledProcessError as error:
            raise HubError(404, f"{call.path} does not exist", "EntryNotFound") from error

    def paths_info(self, call: Call) -> Response:
        repository, commit = self._located(call)
        if "json" in call.request.headers.get("content-type", ""):
            wanted = call.json()["paths"]
        else:
            wanted = urllib.parse.parse_qs(call.body.decode()).get("paths", [])
        return JSONResponse([entry for entry in repository.tree(commit) if entry["path"] in wanted])

    def refs(self, call: Call) -> Response:
        repository = self._repository(call)
        branches, tags = repository.references("refs/heads"), repository.references("refs/tags")
        answer = {"branches": branches, "tags": tags, "converts": []}
        if call.asks("include_prs"):
            answer["pullRequests"] = repository.references("refs/pr")
        return JSONResponse(answer)

    def commits(self, call: Call) -> Response:
        repository, commit = self._located(call)
        lines = repository.git("log", "--format=%H%x00%an%x00%ct%x00%s", commit).decode().splitlines()
        answers = []
        for sha, author, seconds, title in (line.split("\0") for line in lines):
            when = datetime.fromtimestamp(int(seconds), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            answers.append({"id": sha, "title": title, "message": "", "date": when, "authors": [{"user": author}]})
        return JSONResponse(answers)

    def create_branch(self, call: Call) -> Response:
        return self._create_ref(call, f"refs/heads/{call['ref']}", call.json().get("startingPoint", "main"))

    def delete_branch(self, call: Call) -> Response:
        return self._delete_ref(call, f"refs/heads/{call['ref']}")

    def create_tag(self, call: Call) -> Response:
        return self._create_ref(call, f"refs/tags/{call.json()['tag']}", call["rev"])

    def delete_tag(self, call: Call) -> Response:
        return self._delete_ref(call, f"refs/tags/{call['ref']}")

    def _create_ref(self, call: Call, ref: str, start: str) -> Response:
        repository = self._repository(call)
        commit = repository.need_revision(start)
        if repository.revision(ref):
            raise HubError(409, f"Reference already exists: {ref}")
        repository.git("update-ref", ref, commit)
        return JSONResponse({})

    def _delete_ref(self, call: Call, ref: str) -> Response:
        repository = self._repository(call)
        repository.need_revision(ref)
        repository.git("update-ref", "-d", ref)
        return Response()

    # Files

    def resolve(self, call: Call) -> Response:
        repository, commit = self._located(call)
        headers = {"X-Repo-Commit": commit}
        entry = repository.files(commit).get(call.path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        lfs = entry.get("lfs")
        swap = self.control.take(call.request.scope["hub.entry"], ("swap",))
        if swap:
            data = base64.b64decode(swap[0].content or "")
            digest = hashlib.sha256(data) if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data)
            return _content(call.request, data, {**headers, "ETag": f'"{digest.hexdigest()}"'})
        if lfs is None:
            return _content(call.request, repository.read(entry), {**headers, "ETag": f'"{entry["oid"]}"'})
        etag = f'"{lfs["oid"]}"'
        headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(lfs["size"])}
        if "xetHash" in entry:
            headers["X-Xet-Hash"] = entry["xetHash"]
            headers["X-Xet-Refresh-Route"] = f"{self.endpoint}/api/models/{repository.id}/xet-read-token/{commit}"
        headers["Location"] = f"{self.blobs}/blob/{repository.id}/{lfs['oid']}/{urllib.parse.quote(call.path)}"
        return Response(status_code=302, headers=headers)

    def blob(self, call: Call) -> Response:
        data = self._repository(call, trusted=True).lfs_object(call["oid"])
        return _content(call.request, data, {"ETag": f'"{call["oid"]}"'})


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    """A file, or the part of it that a Range header asks for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not part:
        return Response(data, 200, headers, "application/octet-stream")
    first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
    if first > last:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Response(data[first : last + 1], 206, headers, "application/octet-stream")


# ------------------------------------------------------------------------------------------------------------ processes


def serve(root: Path, port: int, token: str, xet: bool, multipart: int) -> None:
    """Serve until killed, after one line with the endpoint on standard output."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        # Listening from here on: who reads the line below can connect.
        listener.listen()
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = Hub(root, endpoint, token, Control(), xet, multipart).app()
        sys.stdout.write(f"{endpoint}\n")
        sys.stdout.flush()
        # h11 by name: with another HTTP implementation the faults would have to be tried again.
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


class HubServer:
    """The server in a process of its own, for the length of a ``with`` block.

    Args:
        root: Folder of the store, made if missing; a temporary one if None.
        token: The only token that is accepted.
        xet: Offer the Xet route, with a directory in the store in place of Xet's servers.
        multipart: Take LFS files in parts of so many bytes; 0 for whole ones.
    """

    def __init__(self, root: Path | None = None, token: str = TOKEN, xet: bool = False, multipart: int = 0) -> None:
        self.token, self.xet, self.multipart = token, xet, multipart
        self._scratch = None if root else tempfile.TemporaryDirectory()
        self.root = Path(root or self._scratch.name).resolve()
        self.endpoint = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> HubServer:
        self.root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--root", str(self.root), "--token", self.token, "--until-eof"]
        command += ["--multipart", str(self.multipart), *(["--xet"] if self.xet else [])]
        with open(self.root / "server.log", "w") as log:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self.endpoint = self._process.stdout.readline().strip()
        if not self.endpoint:
            self.__exit__(None, None, None)
            raise RuntimeError(f"the server did not start: {self.errors()}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        process.kill()
        process.communicate()
        if self._scratch:
            self._scratch.cleanup()

    def environment(self, home: Path, token: str | None = "", xet: bool = False) -> dict[str, str]:
        """Environment for a client process: this server as its Hub, ``home`` as its cache.

        The client reads these variables when it is imported, so they cannot be set for a process that runs already.

        Args:
            home: Folder for ``HF_HOME``.
            token: The server's own if empty, none if None.
            xet: Leave Xet on, the client's default; only a server with ``xet`` takes uploads from such a client.
        """
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env = {name: value for name, value in env.items() if not name.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "0" if xet else "1"}
        if token is not None:
            env["HF_TOKEN"] = token or self.token
        return env

    # What was pushed, read from the store itself and so out of reach of the faults.

    def _repository(self, repo_id: str) -> Repository:
        return Repository(self.root, repo_id, XetStore(self.root) if self.xet else None)

    def exists(self, repo_id: str) -> bool:
        return self._repository(repo_id).exists

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Commit hashes, newest first."""
        return self._repository(repo_id).git("log", "--format=%H", revision).decode().split()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, dict[str, Any]]:
        """Tree entries (``oid``, ``size`` and ``lfs``) by path."""
        repository = self._repository(repo_id)
        return repository.files(repository.need_revision(revision))

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """A file's content."""
        return self._repository(repo_id).read(self.files(repo_id, revision)[path])

    # Faults and log

    def fault(self, kind: str, content: bytes | None = None, **options: Any) -> None:
        """Add a `Fault`; of several of one kind the first that matches strikes."""
        encoded = None if content is None else base64.b64encode(content).decode()
        self._control("POST", "/__faults__", {"kind": kind, "content": encoded, **options})

    def clear_faults(self) -> None:
        self._control("DELETE", "/__faults__")

    def requests(self, route: str | None = None) -> list[dict[str, Any]]:
        """The requests so far, oldest first: route, method, path, query, range, authenticated, status, faults."""
        return [entry for entry in self._control("GET", "/__log__") if route in (None, entry["route"])]

    def counts(self) -> Counter[str]:
        """Number of requests by route."""
        return Counter(entry["route"] for entry in self.requests())

    def clear_log(self) -> None:
        self._control("DELETE", "/__log__")

    def errors(self) -> str:
        """What the server process wrote to its standard error."""
        return (self.root / "server.log").read_text()

    def _control(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection(self.endpoint.removeprefix("http://"), timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            text = response.read().decode()
        if response.status != 200:
            raise ValueError(json.loads(text)["error"])
        return json.loads(text) if text else None


@contextlib.contextmanager
def olah_reader(root: Path) -> Iterator[str]:
    """Endpoint of an olah process that serves the store under ``root``, read-only; olah has to be installed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "olah.toml"
        lines = ["[basic]", f"mirrors-path = [{json.dumps(str(root))}]", f"repos-path = {json.dumps(scratch)}"]
        lines += [f'mirror-netloc = "127.0.0.1:{port}"', "[accessibility]", "offline = true"]
        config.write_text("\n".join(lines))
        command = [sys.executable, "-m", "olah.server", "-c", str(config), "--host", "127.0.0.1", "--port", str(port)]
        with open(Path(scratch) / "olah.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=scratch)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"olah did not start: {(Path(scratch) / 'olah.log').read_text()}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face Hub look-alike on loopback, for tests.")
    parser.add_argument("--root", type=Path, required=True, help="folder of the store")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--token", default=TOKEN, help="the token that is accepted")
    parser.add_argument("--xet", action="store_true", help="offer the Xet route")
    parser.add_argument("--multipart", type=int, default=0, help="take LFS files in parts of so many bytes")
    parser.add_argument("--until-eof", action="store_true", help="end with the process that holds standard input")
    arguments = parser.parse_args()
    if arguments.until_eof:

        def end_with_the_parent() -> None:
            sys.stdin.buffer.read()
            os._exit(0)

        threading.Thread(target=end_with_the_parent, daemon=True).start()
    root = arguments.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    serve(root, arguments.port, arguments.token, arguments.xet, arguments.multipart)


if __name__ == "__main__":
    main()
