"""The test Hub against the real clients, which read their settings at import and so run in processes of their own."""

import contextlib
import hashlib
import http.client
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, olah_reader
from hub_store import Repository, lfs_pointer

ROOT = Path(__file__).parents[1]
WEIGHTS = bytes(range(256)) * 400
CONFIG = b'{"architecture": "none"}'

CLIENT = """
import json, os, sys
from pathlib import Path
from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
api = HfApi()
def answer(**values): sys.stdout.write(json.dumps(values))
def error_of(call, *arguments, **options):
    try: call(*arguments, **options)
    except Exception as error: return f"{type(error).__name__}: {error}"
    return "none"
"""


def run(environment: dict[str, str], code: str, folder: Path) -> dict[str, Any]:
    """What a client process answers."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.clear_faults()
    server.clear_log()
    return server


@pytest.fixture(scope="module")
def published(server: HubServer) -> str:
    """A repository with a regular file and an LFS file, put into the store without any client."""
    repository = Repository(server.root, "org/published")
    repository.create(private=False)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    repository.write_lfs_object(sha256, WEIGHTS)
    added = {"config.json": CONFIG, "model.safetensors": lfs_pointer(sha256, len(WEIGHTS))}
    repository.commit("refs/heads/main", repository.revision("main"), added, [], "publish")
    return repository.id


# ---------------------------------------------------------------------------------------------------------- round trips

ROUND_TRIP = (
    CLIENT
    + """
Path("folder/deep").mkdir(parents=True)
Path("folder/README.md").write_text("---\\nlicense: mit\\n---\\nA card")
Path("folder/config.json").write_text("{}")
Path("folder/deep/model.safetensors").write_bytes(bytes(range(256)) * 1000)
api.create_repo("org/trip")
first = api.upload_folder(repo_id="org/trip", folder_path="folder").oid
again = api.upload_folder(repo_id="org/trip", folder_path="folder").oid
last = api.upload_file(repo_id="org/trip", path_or_fileobj="folder/deep/model.safetensors", path_in_repo="b.bin").oid
one = Path(hf_hub_download("org/trip", "deep/model.safetensors", revision=first))
same = one.read_bytes() == Path("folder/deep/model.safetensors").read_bytes()
folder = Path(snapshot_download("org/trip"))
answer(first=first, again=again, last=last, same=same, blob=one.resolve().name, files=sorted(
    str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
"""
)


def check_round_trip(hub: HubServer, answer: dict[str, Any]) -> None:
    assert answer["first"] == answer["again"], "an upload of the same files makes no commit"
    assert hub.commits("org/trip")[:2] == [answer["last"], answer["first"]] and len(hub.commits("org/trip")) == 3
    assert answer["same"]
    assert answer["files"] == [".gitattributes", "README.md", "b.bin", "config.json", "deep/model.safetensors"]
    assert sorted(hub.files("org/trip")) == answer["files"]
    content = bytes(range(256)) * 1000
    assert hub.read("org/trip", "b.bin") == content
    assert hub.files("org/trip")["b.bin"]["lfs"]["oid"] == hashlib.sha256(content).hexdigest()
    assert "lfs" not in hub.files("org/trip")["config.json"]
    assert hub.errors() == ""


def test_uploads_come_back_without_xet(hub: HubServer, tmp_path: Path) -> None:
    answer = run(hub.environment(tmp_path / "home"), ROUND_TRIP, tmp_path)
    check_round_trip(hub, answer)
    assert answer["blob"] == hashlib.sha256(bytes(range(256)) * 1000).hexdigest()
    counts = hub.counts()
    assert (counts["lfs-batch"], counts["lfs-put"], counts["lfs-verify"], counts["commit"]) == (3, 1, 1, 2)
    assert counts["xet-write-token"] == counts["xet-read-token"] == 0


def test_uploads_come_back_through_xet(tmp_path: Path) -> None:
    pytest.importorskip("hf_xet", reason="huggingface_hub was installed without hf_xet")
    with HubServer(xet=True) as hub:
        answer = run(hub.environment(tmp_path / "home", xet=True), ROUND_TRIP, tmp_path)
        counts = hub.counts()
        assert counts["xet-write-token"] and counts["xet-read-token"]
        assert counts["lfs-batch"] == counts["lfs-put"] == counts["blob"] == 0
        assert answer["blob"] == hub.files("org/trip")["b.bin"]["xetHash"]
        # A client without Xet reads the same files over plain HTTP.
        code = CLIENT + "answer(size=Path(hf_hub_download('org/trip', 'b.bin')).stat().st_size)"
        assert run(hub.environment(tmp_path / "other"), code, tmp_path) == {"size": 256_000}
        assert hub.counts()["blob"] == 1
        check_round_trip(hub, answer)


def test_a_server_without_xet_says_so_to_a_client_with_it(hub: HubServer, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet", reason="huggingface_hub was installed without hf_xet")
    code = CLIENT + (
        "api.create_repo('org/noxet'); Path('w.bin').write_bytes(bytes(9))\n"
        "answer(error=error_of(api.upload_file, repo_id='org/noxet', path_or_fileobj='w.bin', path_in_repo='w.bin'))"
    )
    assert "xet-write-token" in run(hub.environment(tmp_path / "home", xet=True), code, tmp_path)["error"]
    assert list(hub.files("org/noxet")) == [".gitattributes"]


def test_large_files_in_parts(tmp_path: Path) -> None:
    code = CLIENT + (
        "Path('w.bin').write_bytes(bytes(range(250)) * 1000); api.create_repo('org/parts')\n"
        "api.upload_file(repo_id='org/parts', path_or_fileobj='w.bin', path_in_repo='w.bin'); answer()"
    )
    with HubServer(multipart=100_000) as hub:
        run(hub.environment(tmp_path / "home"), code, tmp_path)
        assert hub.read("org/parts", "w.bin") == bytes(range(250)) * 1000
        assert (hub.counts()["lfs-part"], hub.counts()["lfs-complete"], hub.counts()["lfs-put"]) == (3, 1, 0)


def test_timm_pushes_and_reads_a_network(hub: HubServer, tmp_path: Path) -> None:
    # One process for both saves the import of PyTorch; the log shows that the weights came from the server.
    code = """
import json, sys, timm, torch, smpconv_zoo
torch.manual_seed(0)
model = timm.create_model("test_smpconv_tcn")
timm.models.push_to_hf_hub(model, "org/tcn", safe_serialization=True, model_card={"license": "mit"})
pushed, read = model.state_dict(), timm.create_model("hf-hub:org/tcn", pretrained=True).state_dict()
same = read.keys() == pushed.keys() and all(torch.equal(read[name], pushed[name]) for name in pushed)
sys.stdout.write(json.dumps({"same": same}))
"""
    answer = run({**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)}, code, tmp_path)
    assert answer == {"same": True}
    # Of the two requests for the weights' content, the first asks whether its host is there at all.
    assert (hub.counts()["lfs-put"], hub.counts()["commit"], hub.counts()["blob"]) == (1, 1, 2)
    assert sorted(hub.files("org/tcn")) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert json.loads(hub.read("org/tcn", "config.json"))["architecture"] == "test_smpconv_tcn"


def test_olah_reads_the_same_store(hub: HubServer, published: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("olah") is None:
        pytest.skip("olah, the independent reader of the store, is not installed")
    code = CLIENT + (
        f"folder = Path(snapshot_download('{published}'))\n"
        f"info = api.get_paths_info('{published}', 'model.safetensors')\n"
        "names = [path.name for path in folder.iterdir()]\n"
        "path = folder / 'model.safetensors'; path.resolve().rename('read.bin')\n"
        "answer(names=sorted(names), sha256=info[0].lfs.sha256, commit=folder.name, blob=path.resolve().name)"
    )
    with olah_reader(hub.root) as endpoint:
        answer = run({**hub.environment(tmp_path / "home"), "HF_ENDPOINT": endpoint}, code, tmp_path)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert answer["names"] == sorted(hub.files(published)) and answer["commit"] == hub.commits(published)[0]
    assert answer["sha256"] == answer["blob"] == sha256
    assert (tmp_path / "read.bin").read_bytes() == WEIGHTS
    assert hub.requests() == [], "olah reads the store, not this server"


# ---------------------------------------------------------------------------------------------- revisions and refusals


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    code = (
        CLIENT
        + """
repo = "org/revisions"
api.create_repo(repo)
def put(text, **options): return api.upload_file(
    repo_id=repo, path_or_fileobj=text.encode(), path_in_repo="sub/a.txt", **options)
one = put("one")
api.create_tag(repo, tag="v1")
two = put("two", parent_commit=one.oid)
stale = error_of(put, "three", parent_commit=one.oid)
api.create_branch(repo, branch="next", revision="v1")
put("next", revision="next")
request = put("request", create_pr=True)
def read(revision): return Path(hf_hub_download(repo, "sub/a.txt", revision=revision)).read_text()
texts = {revision: read(revision) for revision in ("main", "v1", "next", "refs/pr/1", one.oid[:10])}
refs = api.list_repo_refs(repo, include_pull_requests=True)
names = [[ref.ref for ref in kind] for kind in (refs.branches, refs.tags, refs.pull_requests)]
tree = sorted(entry.path for entry in api.list_repo_tree(repo, recursive=True))
infos = [[entry.path, entry.size] for entry in api.get_paths_info(repo, ["sub/a.txt", "none"])]
titles = [commit.title for commit in api.list_repo_commits(repo)]
info = api.model_info(repo, files_metadata=True)
api.delete_branch(repo, branch="next"); api.delete_tag(repo, tag="v1")
api.delete_folder("sub", repo_id=repo)
gone = error_of(hf_hub_download, repo, "sub/a.txt")
left = [ref.ref for ref in (lambda refs: refs.branches + refs.tags)(api.list_repo_refs(repo))]
api.delete_repo(repo)
answer(stale=stale, texts=texts, short=one.oid[:10], two=two.oid, names=names, tree=tree, infos=infos, titles=titles,
       sha=info.sha, sizes=[sibling.size for sibling in info.siblings], pr=request.pr_num, gone=gone, left=left,
       deleted=error_of(api.model_info, repo))
"""
    )
    answer = run(hub.environment(tmp_path / "home"), code, tmp_path)
    assert "412" in answer["stale"] and "A commit has happened since" in answer["stale"]
    short = answer["short"]
    assert answer["texts"] == {"main": "two", "v1": "one", "next": "next", "refs/pr/1": "request", short: "one"}
    assert answer["names"] == [["refs/heads/main", "refs/heads/next"], ["refs/tags/v1"], ["refs/pr/1"]]
    assert answer["tree"] == [".gitattributes", "sub", "sub/a.txt"]
    assert answer["infos"] == [["sub/a.txt", 3]]
    assert answer["titles"] == ["Upload sub/a.txt with huggingface_hub"] * 2 + ["initial commit"]
    assert answer["sha"] == answer["two"] and answer["sizes"][1] == 3 and answer["pr"] == 1
    assert answer["gone"].startswith("RemoteEntryNotFoundError") and answer["left"] == ["refs/heads/main"]
    assert answer["deleted"].startswith("RepositoryNotFoundError") and not hub.exists("org/revisions")


def test_refusals(hub: HubServer, published: str, tmp_path: Path) -> None:
    code = (
        CLIENT
        + f"repo = '{published}'"
        + """
def put(path, data, **options): return error_of(
    api.upload_file, repo_id=repo, path_or_fileobj=data, path_in_repo=path, **options)
api.create_repo("org/private", private=True)
answer(
    exists=error_of(api.create_repo, repo), exist_ok=error_of(api.create_repo, repo, exist_ok=True),
    card=put("README.md", b"---\\na: [\\n---\\n"), token=put("a.txt", b"a", token="hf_wrong"),
    wrong_read=error_of(api.model_info, repo, token="hf_wrong"),
    anonymous=error_of(api.create_repo, "org/anonymous", token=False),
    revision=error_of(hf_hub_download, repo, "config.json", revision="none"),
    repository=error_of(hf_hub_download, "org/none", "config.json"),
    delete=error_of(api.delete_file, "none", repo_id=repo),
    private=error_of(api.model_info, "org/private", token=False), own=error_of(api.model_info, "org/private"))
"""
    )
    answer = run(hub.environment(tmp_path / "home"), code, tmp_path)
    assert answer["exists"].startswith("HfHubHTTPError") and "409" in answer["exists"]
    assert answer["exist_ok"] == answer["own"] == "none"
    assert "Invalid metadata in README.md" in answer["card"]
    for name in ("token", "wrong_read", "anonymous"):
        assert "401" in answer[name], name
    assert "Invalid credentials" in answer["token"]
    assert answer["revision"].startswith("RevisionNotFoundError")
    assert answer["repository"].startswith("RepositoryNotFoundError")
    assert "A file with this name doesn't exist" in answer["delete"]
    assert answer["private"].startswith("RepositoryNotFoundError")
    assert len(hub.commits(published)) == 2
    assert hub.errors() == ""


# --------------------------------------------------------------------------------------------------------------- faults


def fetch(
    hub: HubServer, path: str, method: str = "GET", token: str = "", timeout: float = 10, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes, bool]:
    """Status, headers, the body as far as it came, and whether it was complete."""
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        try:
            return response.status, response.headers, response.read(), True
        except http.client.IncompleteRead as error:
            return response.status, response.headers, error.partial, False


@pytest.fixture
def blob(hub: HubServer, published: str) -> str:
    """Path of the URL that the weights' content has."""
    status, headers, _, _ = fetch(hub, f"/{published}/resolve/main/model.safetensors")
    host, _, path = headers["Location"].removeprefix("http://").partition("/")
    assert status == 302 and host != hub.endpoint.removeprefix("http://")
    hub.clear_log()
    return f"/{path}"


def test_ranges(hub: HubServer, blob: str) -> None:
    status, headers, body, _ = fetch(hub, blob, Range="bytes=1000-1099")
    assert (status, body) == (206, WEIGHTS[1000:1100])
    assert headers["Content-Range"] == f"bytes 1000-1099/{len(WEIGHTS)}"
    assert fetch(hub, blob, Range="bytes=102000-")[2] == WEIGHTS[102000:]
    assert fetch(hub, blob, Range=f"bytes={len(WEIGHTS)}-")[0] == 416
    assert hub.requests("blob")[0]["range"] == "bytes=1000-1099"


def test_truncate(hub: HubServer, blob: str) -> None:
    hub.fault("truncate", after=1000, times=1)
    status, headers, body, complete = fetch(hub, blob)
    assert (status, headers["Content-Length"], body, complete) == (200, "1000", WEIGHTS[:1000], True)
    assert fetch(hub, blob)[2] == WEIGHTS


def test_die(hub: HubServer, blob: str) -> None:
    hub.fault("die", times=1)
    status, headers, body, complete = fetch(hub, blob)
    assert (status, headers["Content-Length"], complete) == (200, str(len(WEIGHTS)), False)
    assert body == WEIGHTS[: len(WEIGHTS) // 2]
    assert fetch(hub, blob)[2] == WEIGHTS


def test_flip(hub: HubServer, blob: str) -> None:
    hub.fault("flip", offset=50_000)
    for part, start in (("bytes=0-", 0), ("bytes=49990-50010", 49_990)):
        body = fetch(hub, blob, Range=part)[2]
        differ = [start + i for i, byte in enumerate(body) if byte != WEIGHTS[start + i]]
        assert differ == [50_000]
    assert fetch(hub, blob, Range="bytes=0-999")[2] == WEIGHTS[:1000]
    assert [entry["faults"] for entry in hub.requests()] == [["flip"], ["flip"], []]


def test_swap(hub: HubServer, published: str) -> None:
    other = b"another network"
    hub.fault("swap", content=other, path="*/model.safetensors")
    path = f"/{published}/resolve/main/model.safetensors"
    for method in ("HEAD", "GET"):
        status, headers, body, _ = fetch(hub, path, method)
        assert (status, headers["X-Repo-Commit"]) == (200, hub.commits(published)[0])
        assert headers["ETag"] == f'"{hashlib.sha256(other).hexdigest()}"'
        assert body == (other if method == "GET" else b"")
    assert fetch(hub, f"/{published}/resolve/main/config.json")[2] == CONFIG
    hub.clear_faults()
    assert fetch(hub, path)[0] == 302


def test_status(hub: HubServer, published: str) -> None:
    hub.fault("status", code=503, times=2, route="info")
    codes = [fetch(hub, f"/api/models/{published}")[0] for _ in range(3)]
    assert codes == [503, 503, 200]
    assert fetch(hub, f"/api/models/{published}/refs")[0] == 200


def test_slow(hub: HubServer, blob: str) -> None:
    hub.fault("slow", rate=4 * len(WEIGHTS))
    start = time.monotonic()
    assert fetch(hub, blob)[2] == WEIGHTS
    assert 0.2 < time.monotonic() - start < 2


def test_stall(hub: HubServer, blob: str) -> None:
    hub.fault("stall", after=100, times=1)
    address = hub.endpoint.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(address, timeout=0.3)) as connection:
        connection.request("GET", blob)
        response = connection.getresponse()
        assert response.read(100) == WEIGHTS[:100] and response.headers["Content-Length"] == str(len(WEIGHTS))
        with pytest.raises(TimeoutError):
            response.read(1)
    assert fetch(hub, blob)[2] == WEIGHTS


def test_hang(hub: HubServer, published: str) -> None:
    hub.fault("hang", method="HEAD", times=1)
    path = f"/{published}/resolve/main/config.json"
    with pytest.raises(TimeoutError):
        fetch(hub, path, "HEAD", timeout=0.3)
    assert hub.requests()[0]["status"] is None
    assert fetch(hub, path, "HEAD")[0] == fetch(hub, path)[0] == 200


@pytest.mark.parametrize("code", [401, 403])
def test_refuse(hub: HubServer, published: str, code: int) -> None:
    hub.fault("refuse", code=code)
    assert fetch(hub, f"/api/models/{published}", token=hub.token)[0] == code
    assert fetch(hub, f"/api/models/{published}")[0] == 200


def test_several_faults_at_once(hub: HubServer, blob: str) -> None:
    hub.fault("flip", offset=10)
    hub.fault("truncate", after=20)
    hub.fault("slow", rate=1000)
    body = fetch(hub, blob)[2]
    assert len(body) == 20 and body[:10] + body[11:] == WEIGHTS[:10] + WEIGHTS[11:20] and body[10] != WEIGHTS[10]
    assert sorted(hub.requests()[0]["faults"]) == ["flip", "slow", "truncate"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [("melt", {}, "no fault of kind 'melt'"), ("slow", {}, "needs rate"), ("swap", {}, "needs content"),
     ("die", {"afer": 1}, "afer")],
)  # fmt: skip
def test_a_fault_that_does_not_exist(hub: HubServer, kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hub.fault(kind, **options)


def test_what_the_client_makes_of_the_faults(hub: HubServer, published: str, tmp_path: Path) -> None:
    """The client's own behaviour: content it does not check, requests it repeats."""
    code = (
        CLIENT
        + f"repo = '{published}'"
        + """
import http.client
from contextlib import closing
def control(method, path, body=None):
    with closing(http.client.HTTPConnection(os.environ["HF_ENDPOINT"].removeprefix("http://"))) as connection:
        connection.request(method, path, body and json.dumps(body))
        return connection.getresponse().read()
def under(**fault):
    control("DELETE", "/__faults__"); control("POST", "/__faults__", fault); control("DELETE", "/__log__")
    home = fault["kind"] + str(fault.get("code", ""))
    error = error_of(hf_hub_download, repo, "model.safetensors", cache_dir=home)
    files = [path for path in Path(home).rglob("model.safetensors")]
    routes = [entry["route"] for entry in json.loads(control("GET", "/__log__"))]
    return error, [path.read_bytes().hex() for path in files], routes.count("resolve"), routes.count("blob")
answer(truncate=under(kind="truncate"), flip=under(kind="flip"), die=under(kind="die", times=1),
       status=under(kind="status", code=500, times=1, method="HEAD"), hang=under(kind="hang", method="HEAD", times=1),
       refuse=under(kind="refuse", code=401), forbid=under(kind="refuse", code=403))
"""
    )
    environment = {**hub.environment(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "1"}
    answer = run(environment, code, tmp_path)
    error, files, _, blobs = answer["truncate"]
    assert "Consistency check failed" in error and (files, blobs) == ([], 1)
    error, files, _, blobs = answer["flip"]
    assert (error, blobs, len(files)) == ("none", 1, 1)
    assert bytes.fromhex(files[0]) != WEIGHTS and len(files[0]) == 2 * len(WEIGHTS)
    assert answer["die"] == ["none", [WEIGHTS.hex()], 1, 2]
    assert answer["status"] == answer["hang"] == ["none", [WEIGHTS.hex()], 2, 1]
    # The client takes a 403 on the first request for a hub out of reach, and does not pass it on.
    assert "401" in answer["refuse"][0] and answer["forbid"][0].startswith("LocalEntryNotFoundError")
    assert answer["refuse"][1] == answer["forbid"][1] == []


UPLOAD = (
    CLIENT
    + """
Path("w.bin").write_bytes(os.urandom(1000))
answer(error=error_of(api.upload_file, repo_id=os.environ["REPO"], path_or_fileobj="w.bin", path_in_repo="w.bin"))
"""
)


@pytest.mark.parametrize(
    ("fault", "error", "commits", "puts"),
    [
        ({"kind": "status", "route": "lfs-put", "times": 1}, "none", 2, 2),
        ({"kind": "refuse", "route": "commit", "code": 403}, "403", 1, 1),
        ({"kind": "refuse", "route": "lfs-batch"}, "401", 1, 0),
        # The commit is made, only the answer is lost.
        ({"kind": "die", "route": "commit"}, "RemoteProtocolError", 2, 1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_faults_on_uploads(
    hub: HubServer, tmp_path: Path, fault: dict[str, Any], error: str, commits: int, puts: int
) -> None:
    repository = Repository(hub.root, f"org/{fault['kind']}-{fault['route']}")
    repository.create(private=False)
    hub.fault(**fault)
    answer = run({**hub.environment(tmp_path / "home"), "REPO": repository.id}, UPLOAD, tmp_path)
    assert error in answer["error"]
    assert (len(hub.commits(repository.id)), hub.counts()["lfs-put"]) == (commits, puts)


# ------------------------------------------------------------------------------------------------------------- process


def test_the_server_ends_with_its_block_and_starts_again_on_its_store(tmp_path: Path) -> None:
    with HubServer(tmp_path / "store") as hub:
        Repository(hub.root, "org/kept").create(private=False)
        port = int(hub.endpoint.rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        fetch(hub, "/api/models/org/kept")
    with HubServer(tmp_path / "store", port=port) as hub:
        assert fetch(hub, "/api/models/org/kept")[0] == 200


def test_the_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from hub_server import HubServer\n"
        f"hub = HubServer(__import__('pathlib').Path({str(tmp_path)!r})).__enter__()\n"
        "sys.stdout.write(hub.endpoint); sys.stdout.flush(); os._exit(0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True, timeout=30)
    hub = HubServer(tmp_path)
    hub.endpoint = done.stdout
    deadline = time.monotonic() + 10
    with pytest.raises(ConnectionError):
        while time.monotonic() < deadline:
            fetch(hub, "/api/whoami-v2")
            time.sleep(0.05)


def test_a_server_that_cannot_start_says_why(hub: HubServer, tmp_path: Path) -> None:
    taken = int(hub.endpoint.rpartition(":")[2])
    with pytest.raises(RuntimeError, match="Address already in use"), HubServer(tmp_path, port=taken):
        pass
