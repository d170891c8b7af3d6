"""Checkpoints from the package, the local store and the Hub: found, verified, and refused when anything is wrong.

Real clients, each in a process with its own settings, load what real clients published on the Hub of `hub_server`.
"""

import contextlib
import importlib.util
import json
import shutil
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_clients import Clients
from hub_server import HubServer, olah_reader
from hub_store import Repository, lfs_pointer
from small_disk import mounted

import smpconv_zoo
from smpconv_zoo.pretrained import hub
from smpconv_zoo.pretrained.cards import checkpoint_card, weights_dir
from smpconv_zoo.pretrained.locate import load_folder, read_verified
from smpconv_zoo.pretrained.store import CheckpointError, read_safetensors, sha256_of

ROOT = Path(__file__).parents[1]
ID = "smpconv_tcn_mnist.smnist5k"
REPO = "zoo/smnist5k"
TRUE = (weights_dir() / f"{ID}.safetensors").read_bytes()
SHA256 = sha256_of(TRUE)
WARM = f"answer(first=load('{ID}'))"

PUBLISH = """
from huggingface_hub import HfApi
from timm.models._hub import save_config_for_hf
folder, api = Path("folder"), HfApi()
folder.mkdir()
save_config_for_hf(timm.create_model("smpconv_tcn_mnist"), folder / "config.json")
source = Path(os.environ["TEST_WEIGHTS"])
(folder / "model.safetensors").write_bytes(source.read_bytes())
api.create_repo("zoo/plain")
plain = api.upload_folder(repo_id="zoo/plain", folder_path=folder).oid
(folder / "card.json").write_bytes(source.with_suffix(".json").read_bytes())
api.create_repo("zoo/smnist5k")
answer(revision=api.upload_folder(repo_id="zoo/smnist5k", folder_path=folder).oid, plain=plain)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Clients() as running:
        yield running


def true_model(**arguments: Any) -> torch.nn.Module:
    return smpconv_zoo.create_model(ID, pretrained=True, **arguments)


def digest(model: torch.nn.Module) -> str:
    """As the processes compute it."""
    parts = (name.encode() + tensor.contiguous().numpy().tobytes() for name, tensor in model.state_dict().items())
    return sha256_of(b"".join(parts))


@pytest.fixture(scope="module")
def right() -> str:
    """Digest of the network with the checkpoint's weights."""
    return digest(true_model())


def make_checkout(root: Path, **changes: Any) -> Path:
    """The package with one card and no weights, the card changed."""
    package = Path(smpconv_zoo.__file__).parent
    shutil.copytree(package, root / "smpconv_zoo", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    shutil.copy(ROOT / "hubconf.py", root)
    (root / "weights").mkdir()
    card = json.loads((weights_dir() / f"{ID}.json").read_text()) | changes
    (root / "weights" / f"{ID}.json").write_text(json.dumps(card))
    return root


@pytest.fixture(scope="module")
def revisions(server: HubServer, clients: Clients, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Commits of two repositories with the same weights, published by the real client; `plain` has no card."""
    folder = tmp_path_factory.mktemp("publish")
    environment = server.environment(folder / "home") | {"TEST_WEIGHTS": str(weights_dir() / f"{ID}.safetensors")}
    return clients.run(environment, PUBLISH, folder, ROOT)


@pytest.fixture(scope="module")
def checkout(revisions: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is when the checkpoint is published and no longer ships."""
    hub = {"repo": REPO, "revision": revisions["revision"]}
    return make_checkout(tmp_path_factory.mktemp("published"), status="published", hub=hub)


class Place:
    """One user: caches and store in a folder, and processes that load into them."""

    def __init__(self, server: HubServer, clients: Clients, checkout: Path, folder: Path) -> None:
        self.hub, self.clients, self.checkout, self.folder = server, clients, checkout, folder
        self.environment = server.environment(folder / "hf", token=None)
        self.environment |= {"SMPCONV_HOME": str(folder / "store"), "HOME": str(folder)}

    def start(self, code: str, **environment: str) -> int:
        return self.clients.start({**self.environment, **environment}, code, self.folder, self.checkout)

    def run(self, code: str, **environment: str) -> dict[str, Any]:
        return self.clients.wait(self.start(code, **environment))

    @property
    def cached(self) -> Path:
        return next((self.folder / "hf").rglob("snapshots/*/model.safetensors"))

    def quarantined(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.folder / "store" / "quarantine").glob("*"))]

    def leftovers(self) -> list[str]:
        """Files that a download left behind, other than what is in the cache under its name."""
        return [path.name for path in (self.folder / "hf").rglob("*.incomplete")]


@pytest.fixture
def place(server: HubServer, clients: Clients, checkout: Path, tmp_path: Path) -> Place:
    server.clear_faults()
    server.clear_log()
    return Place(server, clients, checkout, tmp_path)


def assert_refused(message: str, bad: bytes) -> None:
    """One sentence with the file and both hashes."""
    assert message.startswith("CheckpointError: ") and "\n" not in message
    assert SHA256 in message and sha256_of(bad) in message and "model.safetensors" in message


# ----------------------------------------------------------------------------------------------------- found and loaded


def test_cold_warm_offline_and_every_way_to_build(place: Place, right: str) -> None:
    code = f"""
name = "{ID}"
first = load(name)
again = load(name)
listed = timm.list_pretrained("smpconv_tcn_mnist*")
torch.manual_seed(0)
seven = timm.create_model(name, pretrained=True, num_classes=7).state_dict()
whole = timm.create_model(name, pretrained=True).state_dict()
features = timm.create_model(name, pretrained=True, features_only=True).eval()
taps = [list(x.shape) for x in features(torch.zeros(1, 1, 784))]
differ = [key for key in whole if key not in seven or not torch.equal(whole[key], seven[key])]
kept = features.state_dict()
answer(first=first, again=again, listed=listed, differ=differ, taps=taps, classes=list(seven["head.fc.weight"].shape),
       features=sum(torch.equal(value, whole[key.removeprefix("model.")]) for key, value in kept.items()), n=len(kept),
       cfg=timm.create_model(name).pretrained_cfg["hf_hub_id"])
"""
    answer = place.run(code)
    assert answer["first"] == answer["again"] == right
    assert answer["listed"] == [ID] and answer["cfg"].startswith(f"{REPO}@")
    assert answer["differ"] == ["head.fc.weight", "head.fc.bias"] and answer["classes"] == [7, 30]
    assert answer["features"] == answer["n"] > 100 and len(answer["taps"]) == 6
    counts = place.hub.counts()
    # Our look-up, the client's, the question whether the host of the bytes is there, and the bytes: once.
    assert (counts["resolve"], counts["blob"]) == (2, 2)

    place.hub.clear_log()
    assert place.run(WARM)["first"] == right
    assert place.run(WARM, HF_HUB_OFFLINE="1")["first"] == right
    assert place.hub.requests() == [], "what is in the cache costs no request"


def test_offline_and_cold_says_what_to_do_at_once(place: Place) -> None:
    answer = place.run(f"first = load('{ID}'); answer(first=first, seconds=load.seconds)", HF_HUB_OFFLINE="1")
    assert answer["first"].startswith("CheckpointError: ") and answer["seconds"] < 3
    for part in ("HF_HUB_OFFLINE", REPO, f"`smpconv-zoo import {ID} --file FILE`"):
        assert part in answer["first"]


def test_until_it_is_published_or_imported_the_error_says_two_commands(place: Place, tmp_path: Path) -> None:
    place.checkout = make_checkout(tmp_path / "checkout", status="importable", files=[], origin="https://origin.test/x")
    answer = place.run(WARM + "; answer(first=load('" + ID + "'), listed=timm.list_pretrained('smpconv*'))")
    assert answer["first"] == (
        f"CheckpointError: {ID} does not ship with this package: run `smpconv-zoo import {ID}`, or download it from "
        f"https://origin.test/x and run `smpconv-zoo import {ID} --file FILE`"
    )
    assert answer["listed"] == [] and place.hub.requests() == []


IMPORT = """
import dataclasses
from smpconv_zoo.pretrained import home
from smpconv_zoo.pretrained import hub
from smpconv_zoo.pretrained.cards import WeightFile
import safetensors.torch
def imported(scale):
    model = timm.create_model("smpconv_tcn_mnist", num_classes=10)
    torch.manual_seed(scale)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    file = WeightFile(f"{ID}.safetensors", hashlib.sha256(data).hexdigest(), len(data))
    card = dataclasses.replace(smpconv_zoo.checkpoint_card(ID), status="imported", files=(file,))
    return home.add_to_store(card, data), digest(model)
"""


def test_imported_versions_side_by_side_come_before_the_hub(place: Place, right: str) -> None:
    code = f"""
ID = "{ID}"
{IMPORT}
(one, first), (two, second) = imported(1), imported(2)
current = one.parent.parent / "current"
in_use = load(ID)
current.write_text(one.parent.name)
back = load(ID)
bad = bytearray(one.read_bytes()); bad[-1] ^= 1; one.write_bytes(bad)
refused = load(ID)
gone = load(ID)
current.write_text(two.parent.name)
other = load(ID)
current.write_bytes(b"\\xff")
garbled = load(ID)
answer(expected=[first, second], in_use=in_use, back=back, refused=refused, gone=gone, other=other, garbled=garbled,
       hashes=[one.parent.name, hashlib.sha256(bad).hexdigest()], left=one.exists())
"""
    answer = place.run(code)
    first, second = answer["expected"]
    assert answer["in_use"] == answer["other"] == second and answer["back"] == first and first != second
    assert all(sha256 in answer["refused"] for sha256 in answer["hashes"]) and "import it again" in answer["refused"]
    assert not answer["left"] and sha256_of(place.quarantined()[0]) == answer["hashes"][1]
    assert answer["gone"] == right, "a quarantined file is as if never imported: the Hub is next"
    assert answer["garbled"].startswith("CheckpointError: ") and "smpconv-zoo import" in answer["garbled"]
    # A new process registers the imported file with timm, and a damaged store does not keep it from starting.
    again = f"answer(listed=timm.list_pretrained('smpconv*'), cfg=timm.create_model('{ID}').pretrained_cfg)"
    assert place.run(again)["cfg"]["hf_hub_id"].startswith(REPO)
    current = next((place.folder / "store").rglob("current"))
    current.write_text(next(path.parent.name for path in current.parent.glob("*/*.safetensors")))
    answer = place.run(again)
    assert answer["listed"] == [ID] and answer["cfg"]["file"].startswith(str(place.folder / "store"))


# ------------------------------------------------------------------------------------------------------------ bad bytes


def test_a_flipped_byte_in_the_cache_is_refused_and_downloaded_again(place: Place, right: str) -> None:
    place.run(WARM)
    bad = bytearray(TRUE)
    bad[-1] ^= 1
    place.cached.write_bytes(bad)
    place.hub.clear_log()
    code = f"answer(offline=load('{ID}'), again=load('{ID}'))"
    answer = place.run(code, HF_HUB_OFFLINE="1")
    assert_refused(answer["offline"], bad)
    assert "HF_HUB_OFFLINE" in answer["again"] and place.hub.requests() == []
    assert place.quarantined() == [bad] and str(place.folder / "store" / "quarantine") in answer["offline"]
    assert place.run(WARM)["first"] == right
    assert place.cached.read_bytes() == TRUE


DOWNLOADS = """
import http.client
from contextlib import closing
def control(method, path, body=None):
    with closing(http.client.HTTPConnection(os.environ["HF_ENDPOINT"].removeprefix("http://"))) as connection:
        connection.request(method, path, body and json.dumps(body))
        connection.getresponse().read()
def under(name, **fault):
    control("POST", "/__faults__", fault)
    cache = Path(name)
    first, seconds = load(ID, cache_dir=str(cache)), load.seconds
    links = [str(path) for path in cache.rglob("model.safetensors")]
    blobs = [path.name for path in cache.rglob("blobs/*")]
    control("DELETE", "/__faults__")
    return [first, seconds, links, blobs, load(ID, cache_dir=str(cache))]
"""


def test_what_goes_wrong_while_downloading(place: Place, right: str) -> None:
    other = safetensors.torch.save({"a": torch.zeros(3)})
    code = f"""
import base64
ID = "{ID}"
{DOWNLOADS}
faults = dict(
    flip=dict(kind="flip"), swap=dict(kind="swap", content="{other.hex()}"), truncate=dict(kind="truncate"),
    die=dict(kind="die"), status=dict(kind="status", route="blob", method="GET"), down=dict(kind="status", code=503),
    refuse=dict(kind="status", code=403), hang=dict(kind="hang", route="resolve"), blob=dict(kind="hang", route="blob"),
    slow=dict(kind="slow", rate=2_000_000))
faults["swap"]["content"] = base64.b64encode(bytes.fromhex(faults["swap"]["content"])).decode()
answer(**{{name: under(name, **fault) for name, fault in faults.items()}})
"""
    answer = place.run(code)
    for name, (first, _, links, blobs, again) in answer.items():
        assert again == right, f"{name}: it has to work when tried again"
        if name != "slow":
            assert first.startswith("CheckpointError: ") and "\n" not in first, (name, first)
            assert (links, blobs) == ([], []), f"{name}: nothing bad stays in use"
    flipped = bytearray(TRUE)
    flipped[len(TRUE) // 2] ^= 1
    assert_refused(answer["flip"][0], flipped)
    assert_refused(answer["swap"][0], other)
    assert sorted(place.quarantined(), key=len) == [other, flipped]
    assert answer["slow"][0] == right
    parts = {"truncate": "Consistency check failed", "status": "status 500", "down": "status 503", "refuse": "403"}
    for name, part in {**parts, "hang": "timed out", "blob": "timed out", "die": "try again"}.items():
        assert part in answer[name][0], answer[name][0]
        assert "smpconv-zoo import" in answer[name][0]
        assert answer[name][1] < 10, (name, answer[name][1])


# The pace that is asked for, and how soon a thread of the client's that was given up hears of it.
STALL = {"SMPCONV_STALL_BYTES": "200000", "SMPCONV_STALL_SECONDS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}


def test_bodies_that_stall_or_drip(place: Place, right: str) -> None:
    """No timeout from byte to byte ends a drip, and the client asks six times for what has stalled."""
    code = f"""
import threading
from huggingface_hub.utils import get_session
{DOWNLOADS}
faults = dict(stall=dict(kind="stall", after=100_000), drip=dict(kind="slow", rate=20_000),
              slow=dict(kind="slow", rate=1_000_000))
answers = {{}}
for ID in ("{ID}", "hf-hub:{REPO}"):
    answers |= {{f"{{name}} {{ID[:2]}}": under(f"{{name}} {{ID[:2]}}", **fault) for name, fault in faults.items()}}
left = [str(path) for path in Path().rglob("*.incomplete")]
left += [thread.name for thread in threading.enumerate() if "_download" in thread.name]
hooks = {{name: len(hooks) for name, hooks in get_session().event_hooks.items()}}
answer(answers=answers, left=left, hooks=hooks)
"""
    answer = place.run(code, **STALL)
    for name, (first, seconds, links, blobs, again) in answer["answers"].items():
        assert again == right, name
        if name.startswith("slow"):
            assert first == right, (name, first)
            continue
        assert first.startswith("CheckpointError: ") and "\n" not in first and seconds < 4, (name, first, seconds)
        for part in ("less than 200,000 bytes came within 1 s", "try again", "on another machine"):
            assert part in first, (name, first)
        assert links == [] and SHA256 not in blobs
    assert (answer["left"], answer["hooks"]) == ([], {"request": 1, "response": 0})
    nonsense = place.run(WARM, SMPCONV_STALL_SECONDS="soon")["first"]
    assert nonsense == "ValueError: SMPCONV_STALL_SECONDS=soon is no number of seconds"


def test_an_interrupted_download_leaves_nothing_behind(place: Place, right: str) -> None:
    place.hub.fault("slow", rate=20_000)
    code = f"""
import _thread, threading
threading.Timer(1.0, _thread.interrupt_main).start()
try:
    timm.create_model("{ID}", pretrained=True)
except KeyboardInterrupt:
    answer(left=[str(path) for path in Path().rglob("*.incomplete")],
           threads=[thread.name for thread in threading.enumerate() if "_download" in thread.name])
"""
    assert place.run(code) == {"left": [], "threads": []}
    place.hub.clear_faults()
    assert place.run(WARM)["first"] == right


@contextlib.contextmanager
def silent_endpoints() -> Iterator[dict[str, str]]:
    """Refused, unresolvable, one that takes connections and never answers, and one that swallows the first packet."""
    with contextlib.ExitStack() as stack:
        refused, silent, full = (stack.enter_context(socket.socket()) for _ in range(3))
        for listening in (refused, silent, full):
            listening.bind(("127.0.0.1", 0))
        silent.listen()
        full.listen(0)
        for _ in range(4):
            # What the queue does not hold is not refused but dropped.
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        sockets = {"refused": refused, "silent": silent, "swallowed": full}
        yield {
            **{name: f"http://127.0.0.1:{one.getsockname()[1]}" for name, one in sockets.items()},
            "unresolvable": "http://hub.invalid",
        }


def test_hubs_out_of_reach_cost_seconds(place: Place) -> None:
    """timm's own way takes 23 s to 46 s."""
    code = f"""
loads = dict(id=dict(name="{ID}"), ours=dict(name="hf-hub:{REPO}", create=smpconv_zoo.create_model),
             timms=dict(name="hf-hub:{REPO}"))
answer(**{{key: [load(**arguments), load.seconds] for key, arguments in loads.items()}})
"""
    with silent_endpoints() as endpoints:
        started = {name: place.start(code, HF_ENDPOINT=endpoint) for name, endpoint in endpoints.items()}
        for name, pid in started.items():
            answer = place.clients.wait(pid)
            for way, (message, seconds) in answer.items():
                assert seconds < 10, (name, way, seconds)
                for part in (endpoints[name], "HF_ENDPOINT", f"`smpconv-zoo import {ID} --file FILE`"):
                    assert part in message, (name, way)
                assert "\n" not in message
            assert answer["id"][0].startswith("CheckpointError: ")
            assert all("local-dir:PATH" in answer[way][0] for way in ("ours", "timms"))
            assert answer["timms"][0].startswith("HubUnreachableError: ")


def test_silent_hubs_with_a_cached_configuration_cost_seconds(place: Place, right: str) -> None:
    """The weights cached or not; timm's own way takes 13 s to look, and then the weights are asked for."""
    homes = [str(place.folder / "config"), str(place.folder / "whole")]
    place.run('timm.create_model("hf-hub:zoo/plain"); answer()', HF_HOME=homes[0])
    place.run('timm.create_model("hf-hub:zoo/plain", pretrained=True); answer()', HF_HOME=homes[1])
    code = 'answer(first=load("hf-hub:zoo/plain"), seconds=load.seconds)'
    with silent_endpoints() as endpoints:
        started = [
            place.start(code, HF_ENDPOINT=endpoints[name], HF_HOME=home)
            for name in ("silent", "swallowed")
            for home in homes
        ]
        answers = [place.clients.wait(pid) for pid in started]
    assert all(answer["seconds"] < 10 for answer in answers), answers
    assert all("local-dir:PATH" in answer["first"] for answer in answers[::2])
    assert [answer["first"] for answer in answers[1::2]] == [right, right]


def test_names_of_other_networks_load_as_before(place: Place) -> None:
    """One question more where nothing is cached, none after, and the client's own errors."""
    repository = Repository(place.hub.root, "zoo/other")
    repository.create(private=False)
    config = {"architecture": "test_convnext", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    added = {"config.json": json.dumps(config).encode()}
    repository.commit("refs/heads/main", repository.revision("main"), added, [], "publish")
    code = """
import importlib, smpconv_zoo.models
importlib.reload(smpconv_zoo.models)
def create(name):
    try:
        return timm.create_model(name).num_classes
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__]
answer(**{name: create("hf-hub:" + place) for name, place in PLACES.items()})
"""
    places = {"first": "zoo/other", "again": "zoo/other", "absent": "zoo/none", "nonsense": "no name/at/all"}
    answer = place.run(f"PLACES = {places}\n{code}")
    assert (answer["first"], answer["again"]) == (3, 3)
    assert answer["absent"][0] == "RepositoryNotFoundError" and answer["nonsense"][0] == "HFValidationError"
    methods = [entry["method"] for entry in place.hub.requests("resolve") if "/other/" in entry["path"]]
    # Ours, the client's and the file; then the client's alone: it looks whether the branch has moved.
    assert methods == ["HEAD", "HEAD", "GET", "HEAD"]
    cold = {"cold": "zoo/cold"}
    unreachable = place.run(f"PLACES = {cold}\n{code}", HF_ENDPOINT="http://hub.invalid")["cold"]
    offline = place.run(f"PLACES = {cold}\n{code}", HF_HUB_OFFLINE="1")["cold"]
    assert offline[0] == "LocalEntryNotFoundError" and {"CheckpointError", *offline} < set(unreachable)


def test_a_name_server_that_never_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No timeout of the client's covers it, nor the many addresses of one name."""
    monkeypatch.setattr(hub, "REACH_TIMEOUT", 0.2)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "_reach", lambda *where: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"no answer within 0\.2 s; check the network"):
        hub.fetch(REPO, "0" * 40, "model.safetensors", "give up", cache_dir=tmp_path)
    assert time.monotonic() - start < 2


def test_what_is_cached_needs_no_hub(place: Place, right: str) -> None:
    place.run(f"answer(name=load('{ID}'), card=load('hf-hub:{REPO}'), plain=load('hf-hub:zoo/plain'))")
    code = f"answer(name=load('{ID}'), card=load('hf-hub:{REPO}'), plain=load('hf-hub:zoo/plain'))"
    assert set(place.run(code, HF_ENDPOINT="http://hub.invalid").values()) == {right}


# ------------------------------------------------------------------------------------- killed, crowded, full, read-only


def test_killed_while_downloading(place: Place, right: str) -> None:
    place.hub.fault("slow", rate=100_000)
    pid = place.start(WARM)
    deadline = time.monotonic() + 60
    while not place.leftovers():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    place.clients.kill(pid)
    assert place.leftovers() and not list((place.folder / "hf").rglob("model.safetensors"))
    place.hub.clear_faults()
    assert place.run(WARM)["first"] == right
    assert place.cached.read_bytes() == TRUE


def test_eight_processes_at_once(place: Place, right: str) -> None:
    started = [place.start(WARM) for _ in range(8)]
    assert [place.clients.wait(pid)["first"] for pid in started] == [right] * 8
    assert place.leftovers() == [] and place.quarantined() == [] and place.cached.read_bytes() == TRUE


def test_several_processes_on_a_flipped_byte(place: Place, right: str) -> None:
    """Each is refused or right, whatever the others move and download meanwhile; then all are right."""
    place.run(WARM)
    bad = bytearray(TRUE)
    bad[-1] ^= 1
    place.cached.write_bytes(bad)
    started = [place.start(f"answer(loads=[load('{ID}') for _ in range(3)])") for _ in range(4)]
    loads = [load for pid in started for load in place.clients.wait(pid)["loads"]]
    assert all(load == right or load.startswith("CheckpointError: ") for load in loads)
    assert right in loads and any(SHA256 in load for load in loads)
    assert place.run(WARM)["first"] == right and bad in place.quarantined()


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount on this machine")
def test_full_disk(place: Place, right: str) -> None:
    with mounted(place.folder / "hf", "-t", "tmpfs", "-o", "size=800k", "tmpfs"):
        answer = place.run(WARM)
        assert "No space left on device" in answer["first"] and "HF_HOME" in answer["first"]
        assert place.leftovers() == [] and not list((place.folder / "hf").rglob("model.safetensors"))
    assert place.run(WARM)["first"] == right


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount on this machine")
def test_read_only_homes(place: Place, right: str) -> None:
    empty = place.folder / "empty"
    with mounted(empty, "-t", "tmpfs", "-o", "ro", "tmpfs"):
        answer = place.run(WARM, HF_HOME=str(empty))
        assert answer["first"].startswith("CheckpointError: ") and "Read-only file system" in answer["first"]
    place.run(WARM)
    (place.folder / "store").mkdir()
    bad = bytearray(TRUE)
    bad[1000] ^= 1
    home, store = place.folder / "hf", place.folder / "store"
    with mounted(home, "--bind", "-o", "ro", str(home)), mounted(store, "--bind", "-o", "ro", str(store)):
        assert place.run(WARM)["first"] == right
    place.cached.write_bytes(bad)
    with mounted(home, "--bind", "-o", "ro", str(home)):
        answer = place.run(f"answer(first=load('{ID}'), again=load('{ID}'))")
        for message in answer.values():
            assert_refused(message, bad)
            assert "could not be moved out of use, so every load refuses it" in message
    with mounted(store, "--bind", "-o", "ro", str(store)):
        answer = place.run(f"answer(first=load('{ID}'), again=load('{ID}'))")
    assert_refused(answer["first"], bad)
    assert ".quarantined" in answer["first"] and answer["again"] == right


# -------------------------------------------------------------------------------------------------------- hostile files


def file_of(header: bytes | dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
REPEATED = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (file_of(b"{}", length=2**63), "header too large"),
        (file_of(b"{}", length=2**40), "header too large"),
        (file_of(b"{}", length=100), "not a valid safetensors file"),
        (file_of({"a": F32, "b": F32}, bytes(4)), "invalid offset"),
        (file_of({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, bytes(12)), "invalid offset"),
        (file_of({"a": F32}, bytes(9)), "not fully covered"),
        (file_of({"a": {**F32, "dtype": "F33"}}, bytes(4)), "unknown variant"),
        (file_of({"a": {**F32, "dtype": "F4", "shape": [8]}}, bytes(4)), "type 'F4'"),
        (file_of({"a": {**F32, "shape": [2**40, 2**40]}}, bytes(4)), "overflow"),
        (file_of({"a": {**F32, "shape": [-1]}}, bytes(4)), "not a valid safetensors file"),
        (file_of(REPEATED, bytes(4)), "given twice"),
        (file_of(b'{"a":' + b"[" * 10**5), "recursion limit"),
        (file_of(b"[]"), "not a valid safetensors file"),
        (b"", "header too small"),
        (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.", "header too large"),
        (file_of({"a": F32}, struct.pack("<f", float("nan"))), "a holds NaN or Inf"),
        (file_of({"a": F32}, struct.pack("<f", float("-inf"))), "a holds NaN or Inf"),
        (file_of({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"\x7f"), "a holds NaN or Inf"),
        (file_of({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, struct.pack("<ff", 0, float("nan"))),
         "a holds NaN or Inf"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    """Declared truly or not at all: the right sha256 makes no file good."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    for load in (lambda: read_safetensors(path), lambda: read_verified(path, sha256_of(data), "give up")):
        with pytest.raises(CheckpointError, match=message) as refused:
            load()
        assert str(path) in str(refused.value)
    assert path.exists(), "only a file that is not what was declared goes to quarantine"


@pytest.mark.parametrize(
    "name", ["weights.pth", "weights-.pth", "weights-abcdef0.pth", f"model-{SHA256[:8]}.safetensors"]
)
def test_a_file_name_plays_no_role(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.hub leaves the first three unchecked and trusts 8 digits of the last; here the card alone counts."""
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    bad = bytearray(TRUE)
    bad[-1] ^= 1
    path = tmp_path / name
    path.write_bytes(TRUE)
    assert len(read_verified(path, SHA256, "")[0]) == checkpoint_card(ID).tensors
    path.write_bytes(bad)
    with pytest.raises(CheckpointError, match=SHA256):
        read_verified(path, SHA256, "")
    assert not path.exists()


def test_nothing_is_loaded_from_a_url(tmp_path: Path) -> None:
    url = (weights_dir() / f"{ID}.safetensors").as_uri()
    with pytest.raises(CheckpointError, match="nothing vouches for"):
        smpconv_zoo.create_model("smpconv_tcn", pretrained=True, pretrained_cfg_overlay={"url": url})


# --------------------------------------------------------------------------------------- folders and other repositories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a published repository looks like when fetched."""
    out = tmp_path / "folder"
    out.mkdir()
    model = smpconv_zoo.create_model("smpconv_tcn_mnist")
    config = {"architecture": "smpconv_tcn_mnist", "num_classes": 10, "num_features": 30}
    cfg = {name: value for name, value in model.pretrained_cfg.items() if name not in ("file", "architecture", "tag")}
    (out / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    (out / "card.json").write_bytes((weights_dir() / f"{ID}.json").read_bytes())
    (out / "model.safetensors").write_bytes(TRUE)
    return out


def test_local_dir(folder: Path, right: str) -> None:
    def load(**arguments: Any) -> torch.nn.Module:
        return smpconv_zoo.create_model(f"local-dir:{folder}", pretrained=True, **arguments)

    assert digest(load()) == right
    assert load(num_classes=7).head.fc.out_features == 7
    assert load().pretrained_cfg["source"] == "local-dir"
    weights, card = folder / "model.safetensors", folder / "card.json"
    bad = bytearray(TRUE)
    bad[-1] ^= 1
    weights.write_bytes(bad)
    with pytest.raises(CheckpointError, match=f"{sha256_of(bytes(bad))}, expected {SHA256}.*was moved to") as refused:
        load()
    (aside,) = folder.glob("*.quarantined")
    assert not weights.exists() and aside.read_bytes() == bad and str(aside) in str(refused.value)
    for part in ("put the declared file there", "if you changed the weights yourself", "remove card.json"):
        assert part in str(refused.value)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"has no model\.safetensors, for {aside.name}.*remove card\.json"):
            load()
    weights.write_bytes(TRUE)
    assert digest(load()) == right and aside.read_bytes() == bad, "the declared file is taken, the other one kept"
    # As the message says to the owner of changed weights.
    aside.rename(weights)
    card.unlink()
    assert digest(load()) != right and sorted(folder.iterdir()) == [folder / "config.json", weights]
    tensors = safetensors.torch.load(TRUE)
    for change, message in (
        ({"head.fc.weight": torch.full((10, 30), torch.nan)}, "head.fc.weight holds NaN or Inf"),
        ({"head.fc.weight": torch.zeros(10, 31)}, "head.fc.weight has shape"),
        ({"head.fc.weight": torch.zeros(10, 30, dtype=torch.int64)}, "holds torch.int64"),
        ({"more": torch.zeros(1)}, "unexpected keys more"),
    ):
        weights.write_bytes(safetensors.torch.save({**tensors, **change}))
        with pytest.raises(CheckpointError, match=message):
            load()
    weights.write_bytes(safetensors.torch.save({name: t for name, t in tensors.items() if name != "head.fc.bias"}))
    with pytest.raises(CheckpointError, match=r"missing keys head\.fc\.bias"):
        load()
    weights.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load()


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount on this machine")
def test_local_dir_that_cannot_be_written(folder: Path, right: str) -> None:
    weights = folder / "model.safetensors"
    bad = bytearray(TRUE)
    bad[-1] ^= 1
    weights.write_bytes(bad)
    with mounted(folder, "--bind", "-o", "ro", str(folder)):
        for _ in range(2):
            with pytest.raises(
                CheckpointError, match=r"could not be moved.*every load refuses it: replace it"
            ) as refused:
                load_folder(folder, "smpconv_tcn_mnist")
            assert SHA256 in str(refused.value) and sha256_of(bytes(bad)) in str(refused.value)
    assert weights.read_bytes() == bad


def test_of_a_link_in_a_folder_only_the_link_is_moved(folder: Path, tmp_path: Path) -> None:
    weights, elsewhere = folder / "model.safetensors", tmp_path / "elsewhere.safetensors"
    weights.rename(elsewhere)
    elsewhere.write_bytes(TRUE[:-1] + bytes([TRUE[-1] ^ 1]))
    weights.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="was moved to"):
        load_folder(folder, "smpconv_tcn_mnist")
    assert elsewhere.is_file() and not weights.is_symlink()


def test_a_card_of_another_network_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is of {ID}, not of weights for smpconv_t"):
        load_folder(folder, "smpconv_t")
    (folder / "card.json").write_text("{}")
    with pytest.raises(CheckpointError, match="missing fields"):
        load_folder(folder, "smpconv_tcn_mnist")


def test_hf_hub_names(place: Place, revisions: dict[str, str], right: str) -> None:
    code = f"""
names = dict(main="zoo/smnist5k", pinned="zoo/smnist5k@{revisions["revision"]}", plain="zoo/plain")
first = {{key: load("hf-hub:" + name) for key, name in names.items()}}
again = {{key: load("hf-hub:" + name, create=smpconv_zoo.create_model) for key, name in names.items()}}
model = timm.create_model("hf-hub:zoo/plain", pretrained=True, num_classes=7)
overlay = load("{ID}", pretrained_cfg_overlay=dict(hf_hub_id="zoo/plain"))
pickled = load("{ID}", pretrained_cfg_overlay=dict(hf_hub_id="zoo/plain", hf_hub_filename="pytorch_model.bin"))
answer(first=first, again=again, classes=model.num_classes, cfg=model.pretrained_cfg["source"], overlay=overlay,
       pickled=pickled)
"""
    answer = place.run(code)
    assert answer["first"] == answer["again"] == dict.fromkeys(("main", "pinned", "plain"), right)
    assert (answer["classes"], answer["cfg"], answer["overlay"]) == (7, "hf-hub", right)
    assert "only model.safetensors is loaded" in answer["pickled"]
    assert place.hub.counts()["blob"] == 4, "two repositories, each asked and downloaded once"
    place.hub.clear_log()
    warm = 'answer(card=load("hf-hub:zoo/smnist5k"), plain=load("hf-hub:zoo/plain"))'
    assert set(place.run(warm, HF_HUB_OFFLINE="1").values()) == {right}
    assert place.hub.requests() == []

    bad = bytearray(TRUE)
    bad[5000] ^= 1
    for cached in (place.folder / "hf").rglob("snapshots/*/model.safetensors"):
        cached.write_bytes(bad)
    answer = place.run(warm)
    for message in answer.values():
        assert_refused(message, bad)
    assert place.quarantined() == [bad, bad]
    assert set(place.run(warm).values()) == {right}


def test_hf_hub_repositories_that_are_not_what_they_say(place: Place, right: str) -> None:
    """Swapped behind the Hub's back, declared wrongly by their own card, or holding a pickle only."""
    other = safetensors.torch.save({"a": torch.zeros(3)})
    place.hub.fault("swap", content=other, path="*/plain/*/model.safetensors")
    for name, files in {
        "wrong": {"card.json": place.hub.read(REPO, "card.json"), "model.safetensors": other},
        "pickle": {"pytorch_model.bin": b"\x80\x04N."},
    }.items():
        repository = Repository(place.hub.root, f"zoo/{name}")
        repository.create(private=False)
        added = {"config.json": place.hub.read(REPO, "config.json")}
        for file, data in files.items():
            lfs = not file.endswith(".json")
            if lfs:
                repository.write_lfs_object(sha256_of(data), data)
            added[file] = lfs_pointer(sha256_of(data), len(data)) if lfs else data
        repository.commit("refs/heads/main", repository.revision("main"), added, [], "publish")
    code = 'answer(**{name: load("hf-hub:zoo/" + name) for name in ("plain", "wrong", "pickle", "none")})'
    answer = place.run(code)
    assert_refused(answer["plain"], other)
    assert_refused(answer["wrong"], other)
    assert answer["pickle"].startswith("HubFileMissingError: ") and "no model.safetensors" in answer["pickle"]
    assert place.quarantined() == [other, other]
    assert place.hub.counts()["blob"] == 2, "the pickle was not even downloaded"
    place.hub.clear_faults()
    assert place.run('answer(plain=load("hf-hub:zoo/plain"))')["plain"] == right


def test_through_an_independent_hub(place: Place, right: str) -> None:
    if importlib.util.find_spec("olah") is None:
        pytest.skip("olah, a Hub that knows nothing of ours, is not installed")
    code = f'answer(name=load("{ID}"), repository=load("hf-hub:{REPO}"), plain=load("hf-hub:zoo/plain"))'
    with olah_reader(place.hub.root) as endpoint:
        assert set(place.run(code, HF_ENDPOINT=endpoint).values()) == {right}
    assert place.hub.requests() == []


def test_through_xet(clients: Clients, tmp_path: Path, right: str) -> None:
    pytest.importorskip("hf_xet", reason="huggingface_hub was installed without hf_xet")
    with HubServer(xet=True) as server:
        environment = server.environment(tmp_path / "publisher", xet=True)
        environment["TEST_WEIGHTS"] = str(weights_dir() / f"{ID}.safetensors")
        revision = clients.run(environment, PUBLISH, tmp_path, ROOT)["revision"]
        checkout = make_checkout(tmp_path / "c", status="published", hub={"repo": REPO, "revision": revision})
        place = Place(server, clients, checkout, tmp_path)
        place.environment["HF_HUB_DISABLE_XET"] = "0"
        answer = place.run(f'answer(name=load("{ID}"), plain=load("hf-hub:zoo/plain"))')
        assert set(answer.values()) == {right}
        assert server.counts()["blob"] == 0 and server.counts()["xet-read-token"]
        # The content lies in a store that repositories share; links lead there.
        content = place.cached.resolve()
        content.chmod(0o600)
        bad = bytearray(TRUE)
        bad[-1] ^= 1
        content.write_bytes(bad)
        answer = place.run(f'answer(bad=load("{ID}"), name=load("{ID}"), plain=load("hf-hub:zoo/plain"))')
        assert_refused(answer["bad"], bad)
        assert (answer["name"], answer["plain"]) == (right, right) and place.quarantined() == [bad]


def test_a_xet_store_that_never_answers(clients: Clients, tmp_path: Path, right: str) -> None:
    """Its library would ask again for minutes."""
    pytest.importorskip("hf_xet", reason="huggingface_hub was installed without hf_xet")
    with HubServer(xet=True) as server, socket.socket() as silent:
        environment = server.environment(tmp_path / "publisher", xet=True)
        environment["TEST_WEIGHTS"] = str(weights_dir() / f"{ID}.safetensors")
        revision = clients.run(environment, PUBLISH, tmp_path, ROOT)["revision"]
        checkout = make_checkout(tmp_path / "c", status="published", hub={"repo": REPO, "revision": revision})
        place = Place(server, clients, checkout, tmp_path)
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        server.fault("swap", route="xet-read-token", content=address.encode())
        code = f'answer(first=load("{ID}"), seconds=load.seconds)'
        answer = place.run(code, HF_HUB_DISABLE_XET="0", **STALL)
        assert "less than 200,000 bytes came within 1 s" in answer["first"] and answer["seconds"] < 4
        server.clear_faults()
        assert place.run(WARM, HF_HUB_DISABLE_XET="0")["first"] == right and place.leftovers() == []


# ------------------------------------------------------------------------------------------------- wheel, checkout, zip


EVERYWHERE = f"""
embedded, pretrained = load("{ID}"), timm.list_pretrained("smpconv*")
answer(embedded=embedded, pretrained=pretrained, where=smpconv_zoo.__file__)
"""


def test_from_a_wheel(place: Place, right: str) -> None:
    source = place.folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "tests", "docs", "eval")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", ".", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip(f"no wheel can be built without the network: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    wheel = next(source.glob("*.whl"))
    place.checkout = place.folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert "hubconf.py" not in archive.namelist()
        archive.extractall(place.checkout)
    answer = place.run(EVERYWHERE, HF_HUB_OFFLINE="1")
    assert answer["embedded"] == right and ID in answer["pretrained"]
    assert answer["where"] == str(place.checkout / "smpconv_zoo" / "__init__.py")


def test_from_a_zip_of_the_repository_and_torch_hub(place: Place, clients: Clients, right: str) -> None:
    command = [
        "git",
        "archive",
        "--format=zip",
        "--prefix=org_smpconv_main/",
        "-o",
        str(place.folder / "a.zip"),
        "HEAD",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this is no git checkout: {done.stderr.strip()}")
    with zipfile.ZipFile(place.folder / "a.zip") as archive:
        archive.extractall(place.folder / "hub")
    place.checkout = place.folder / "hub" / "org_smpconv_main"
    assert place.run(EVERYWHERE)["embedded"] == right
    # torch.hub brings the package along: the process has it on no path of its own.
    code = f"""
here = "{place.checkout}"
torch.hub.set_dir(os.path.dirname(here))
names = torch.hub.list("org/smpconv:main", trust_repo=True, skip_validation=True)
helps = [torch.hub.help("org/smpconv:main", name, trust_repo=True, skip_validation=True) for name in names]
def hub(name, **options): return torch.hub.load(here, name, source="local", **options)
models = {{name: type(hub(name)).__name__ for name in names if not name.endswith("_b")}}
seven = hub("smpconv_tcn_mnist", pretrained=True, num_classes=7)
tagged = load("smpconv_tcn_mnist", create=lambda name, **options: hub(name, tag="smnist5k", **options))
default = load("smpconv_tcn_mnist", create=hub)
nothing = load("smpconv_resnet_cifar", create=hub)
wrong = load("smpconv_tcn_mnist", create=lambda name, **options: hub(name, tag="mnist", **options))
path = Path(here) / "weights" / "{ID}.safetensors"
bad = bytearray(path.read_bytes()); bad[-1] ^= 1; path.write_bytes(bad)
flipped = load("smpconv_tcn_mnist", create=hub)
networks = [name for name in timm.list_models("smpconv*")]
answer(names=names, helps=helps, models=models, seven=seven.num_classes, tagged=tagged, default=default, wrong=wrong,
       nothing=nothing, flipped=flipped, there=path.exists(), after=load("smpconv_tcn_mnist", create=hub),
       networks=networks, where=sys.modules["smpconv_zoo"].__file__)
"""
    answer = clients.run(place.environment, code, place.folder, None)
    assert sorted(answer["names"]) == sorted(answer["networks"]) and len(answer["models"]) == len(answer["names"]) - 1
    assert all("pretrained" in text and "tag" in text for text in answer["helps"])
    assert answer["where"].startswith(str(place.checkout))
    assert (answer["tagged"], answer["default"], answer["seven"]) == (right, right, 7)
    assert "`smpconv-zoo import smpconv_resnet_cifar.cifar10`" in answer["nothing"] and "tag" in answer["wrong"]
    assert SHA256 in answer["flipped"] and "quarantine" in answer["flipped"] and not answer["there"]
    assert "install the package again" in answer["after"] and place.hub.requests() == []
