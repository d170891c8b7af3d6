"""The store of the test Hub: git repositories with LFS objects, in the layout that olah serves too.

A model is an ordinary, non-bare git repository under ``ROOT/models/<org>/<name>``; its large files are committed as LFS
pointers, their content is under ``.git/lfs/objects``, and its work tree stays empty.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".onnx", ".gz", ".zip", ".tar", ".h5")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")


class HubError(Exception):
    """An answer other than success, in the Hub's words: the client chooses its exception by ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {
            "X-Error-Message": ascii(message)[1:-1],
            **({"X-Error-Code": code} if code else {}),
            **(headers or {}),
        }


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git keeps of a file that LFS holds."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


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
        entry = self.xet.files().get(sha256) if self.xet else None
        return entry[1] if entry else None

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
