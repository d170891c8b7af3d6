"""A Hugging Face Hub look-alike on loopback, for tests: real clients push to it and read from it, and it can fail.

From a test::

    with HubServer() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path / "home"), check=True)
        assert hub.read("org/name", "config.json") == b"{}"
        hub.fault("flip", path="*.safetensors", times=1)

From a shell: ``python tests/hub_server.py --root DIR --port P``, then ``curl -d '{"kind": "hang"}' .../__faults__``.

The store is in `hub_store`, what can fail in `hub_faults`. `olah_reader` serves the same store by code that knows
nothing of this one.

It answers what huggingface_hub 2.4 asks for, as read off that client: acceptance here is no proof that the real Hub
accepts. Models only; no gated repositories, no paging; bodies are held in memory.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
import yaml
from hub_faults import Call, Control, Gate
from hub_store import LFS_SUFFIXES, USER, HubError, Repository, XetStore, lfs_pointer
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "hf_test"
LFS_BYTES = 10 * 2**20
FRONT_MATTER = re.compile(r"^---\r?\n(.*?)\r?\n---", re.DOTALL)


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
                added[value["path"]] = lfs_pointer(value["oid"], size)
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
        swap = self.control.take(call.request.scope["hub.entry"], ("swap",))
        url = base64.b64decode(swap[0].content or "").decode() if swap else self.xet.url
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(expiry)}
        return JSONResponse({"casUrl": url, "accessToken": "x", "exp": expiry}, headers=headers)

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
        port: Port on loopback, 0 for a free one.
        token: The only token that is accepted.
        xet: Offer the Xet route, with a directory in the store in place of Xet's servers.
        multipart: Take LFS files in parts of so many bytes; 0 for whole ones.
    """

    def __init__(
        self, root: Path | None = None, port: int = 0, token: str = TOKEN, xet: bool = False, multipart: int = 0
    ) -> None:
        self.port, self.token, self.xet, self.multipart = port, token, xet, multipart
        self._given_root = root
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> HubServer:
        root = self._given_root or Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--root", str(self.root), "--port", str(self.port), "--token", self.token]
        command += ["--multipart", str(self.multipart), "--until-eof", *(["--xet"] if self.xet else [])]
        with open(self.root / "server.log", "w") as log:
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self._cleanup.callback(process.communicate)
        self._cleanup.callback(process.kill)
        self.endpoint = process.stdout.readline().strip() if process.stdout else ""
        if not self.endpoint:
            message = self.errors()
            self._cleanup.close()
            raise RuntimeError(f"the server did not start: {message}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

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
