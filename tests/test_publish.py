"""Publishing, by the real client, to a Hub on loopback; every command is a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden_files import golden
from hub_server import HubServer
from hub_store import Repository, lfs_pointer
from huggingface_hub import ModelCard
from zoo_checkout import Done, ZooHost, copy_package, wait_until, zoo_host

from smpconv_zoo.evaluation.model_card import model_card
from smpconv_zoo.pretrained.cards import checkpoint_card, list_checkpoints, load_card

ID = "smpconv_tcn_mnist.smnist5k"
OTHER = "smpconv_tcn_mnist.pmnist5k"
FILES = [".gitattributes", "README.md", "card.json", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def host(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooHost]:
    root = tmp_path_factory.mktemp("publish")
    environment = {**server.environment(root / "home"), "SMPCONV_HOME": str(root / "store")}
    with zoo_host(copy_package(root / "checkout"), root / "scratch", environment) as running:
        yield running


class Zoo:
    """One test's organisation on the Hub, and its own state of the checkout's cards."""

    def __init__(self, host: ZooHost, hub: HubServer, org: str) -> None:
        self.host, self.hub, self.org, self.repo = host, hub, org, f"{org}/{ID}"
        self.card_path = host.checkout / "weights" / f"{ID}.json"
        self.weights_path = self.card_path.with_suffix(".safetensors")

    def publish(self, *more: str, **environment: str) -> Done:
        return self.host("publish", ID, "--org", self.org, *more, **environment)

    def card(self) -> dict[str, Any]:
        return json.loads(self.card_path.read_text())

    def change_card(self, **entries: Any) -> None:
        self.card_path.write_text(json.dumps({**self.card(), **entries}, indent=1) + "\n")

    def repository(self) -> Repository:
        return Repository(self.hub.root, self.repo)

    def assert_published(self, done: Done, commits: int) -> None:
        """Everything is on the Hub, as it is here, and the card names it."""
        # The client says on stderr what it tries again.
        assert done.code == 0 and "Traceback" not in done.err, done
        assert len(self.hub.commits(self.repo)) == commits
        assert sorted(self.hub.files(self.repo)) == FILES
        assert self.hub.read(self.repo, "model.safetensors") == self.weights_path.read_bytes()
        card = self.card()
        assert card["hub"] == {"repo": self.repo, "revision": self.hub.commits(self.repo)[0]}
        assert json.loads(self.hub.read(self.repo, "card.json")) == {**card, "hub": None}
        assert card["hub"]["revision"] in done.out


@pytest.fixture
def zoo(host: ZooHost, server: HubServer, request: pytest.FixtureRequest) -> Iterator[Zoo]:
    server.clear_faults()
    server.clear_log()
    zoo = Zoo(host, server, "org-" + hashlib.sha1(request.node.name.encode()).hexdigest()[:8])
    before = {path: path.read_bytes() for path in zoo.card_path.parent.iterdir()}
    yield zoo
    server.clear_faults()
    left = set(zoo.card_path.parent.iterdir()) - set(before)
    for path, data in before.items():
        path.write_bytes(data)
    assert not left, "publishing leaves no file beside the cards"


def writes(hub: HubServer) -> list[str]:
    """Routes of the requests that change something, but for validating a text."""
    return [r["route"] for r in hub.requests() if r["method"] != "GET" and r["route"] not in ("resolve", "paths-info")]


# ------------------------------------------------------------------------------------------------------- what is pushed


def test_a_checkpoint_is_pushed_read_back_and_pinned(zoo: Zoo) -> None:
    done = zoo.publish()
    zoo.assert_published(done, commits=2)
    assert zoo.card()["status"] == "embedded"
    assert "Pushed to" in done.out and "commit the change" in done.out
    # One commit took all four files, and each was read back.
    assert zoo.hub.counts()["commit"] == 1
    assert {r["path"].rpartition("/")[2] for r in zoo.hub.requests("resolve")} == set(FILES[1:])
    assert zoo.hub.counts()["blob"] == 1

    zoo.hub.clear_log()
    pinned = zoo.card_path.read_bytes()
    again = zoo.publish()
    zoo.assert_published(again, commits=2)
    assert "Already at" in again.out and "nothing was changed" in again.out
    assert writes(zoo.hub) == [] and zoo.card_path.read_bytes() == pinned


def test_without_org_it_goes_where_it_is_published(zoo: Zoo) -> None:
    assert zoo.publish().code == 0
    done = zoo.host("publish", ID, "--json")
    answer = json.loads(done.out)
    assert (answer["repo"], answer["committed"], answer["pinned"]) == (zoo.repo, False, False)
    assert {file["name"]: file["sha256"] for file in answer["files"]} == {
        name: hashlib.sha256(zoo.hub.read(zoo.repo, name)).hexdigest() for name in FILES[1:]
    }


def test_a_change_is_one_more_commit(zoo: Zoo) -> None:
    assert zoo.publish().code == 0
    zoo.change_card(license="Apache-2.0")
    zoo.assert_published(zoo.publish(), commits=3)
    assert zoo.hub.counts()["lfs-put"] == 1, "the weights went once"
    assert "license: apache-2.0" in zoo.hub.read(zoo.repo, "README.md").decode()


def test_timm_reads_what_was_published(zoo: Zoo) -> None:
    assert zoo.publish().code == 0
    # In the process of a command, with the cache that is the user's: publishing has put nothing there.
    code = f"""
import timm, torch, safetensors.torch
read = timm.create_model("hf-hub:{zoo.repo}", pretrained=True)
pinned = timm.create_model("hf-hub:{zoo.repo}@{zoo.card()["hub"]["revision"]}", pretrained=True)
here = safetensors.torch.load_file({str(zoo.weights_path)!r})
assert type(read).__name__ == "SMPConvTCN"
for net in (read, pinned):
    state = net.state_dict()
    assert state.keys() == here.keys() and all(torch.equal(state[name], here[name]) for name in here)
assert timm.create_model("hf-hub:{zoo.repo}", pretrained=True, num_classes=3)(torch.zeros(1, 1, 784)).shape == (1, 3)
"""
    zoo.hub.clear_log()
    done = zoo.host("--version", before=code, HF_TOKEN="")
    assert (done.code, done.err) == (0, "")
    # The weights came over once; the other request looks whether their host answers.
    assert sorted(r["method"] for r in zoo.hub.requests("blob")) == ["GET", "HEAD"]


def test_the_hub_understands_the_model_card(zoo: Zoo) -> None:
    assert zoo.publish().code == 0
    read = ModelCard(zoo.hub.read(zoo.repo, "README.md").decode())
    assert (read.data.license, read.data.library_name, read.data.datasets) == ("mit", "timm", ["ylecun/mnist"])
    (result,) = read.data.eval_results
    measured = zoo.card()["measured"]
    assert (result.metric_type, result.metric_value) == ("accuracy", measured["top1"])
    assert "paper" not in result.metric_name
    for part in (measured["command"], measured["log"], f"{measured['correct']} of {measured['total']}"):
        assert part in read.text
    assert f'create_model("hf-hub:{zoo.repo}"' in read.text


def test_an_imported_checkpoint_becomes_a_published_one(zoo: Zoo) -> None:
    name = "smpconv_tcn_mnist.smnist"
    assert zoo.host("import", name, "--file", str(golden("seq_smnist.pth"))).code == 0
    done = zoo.host("publish", name, "--org", zoo.org)
    assert done.code == 0, done
    card = load_card(zoo.card_path.with_name(f"{name}.json"))
    repo = f"{zoo.org}/{name}"
    assert card.status == "published" and card.source is not None and card.source.name == "seq_smnist.pth"
    assert card.hub is not None and (card.hub.repo, card.hub.revision) == (repo, zoo.hub.commits(repo)[0])
    assert hashlib.sha256(zoo.hub.read(repo, "model.safetensors")).hexdigest() == card.files[0].sha256
    text = zoo.hub.read(repo, "README.md").decode()
    assert card.source.sha256 in text and "trusted on first use" in text and "We did not measure" in text
    assert json.loads(zoo.host("info", name, "--json").out)["status"] == "published"
    again = zoo.host("publish", name)
    assert again.code == 0 and "nothing was changed" in again.out and len(zoo.hub.commits(repo)) == 2


@pytest.mark.parametrize("checkpoint_id", [n for n in list_checkpoints() if checkpoint_card(n).files])
def test_model_cards_are_the_same_every_time(checkpoint_id: str) -> None:
    card = checkpoint_card(checkpoint_id)
    text = model_card(card, "org/x", {})
    assert text == model_card(card, "org/x", {})
    front = yaml.safe_load(text.split("---")[1])
    assert list(front)[:2] == ["license", "library_name"]


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="huggingface_hub was installed without hf_xet")
def test_through_xet(host: ZooHost, tmp_path: Path) -> None:
    with HubServer(xet=True) as hub:
        environment = {**hub.environment(tmp_path / "home", xet=True), "SMPCONV_HOME": str(tmp_path / "store")}
        with zoo_host(copy_package(tmp_path / "checkout"), tmp_path / "scratch", environment) as xet:
            zoo = Zoo(xet, hub, "org")
            zoo.assert_published(zoo.publish(), commits=2)
            counts = hub.counts()
            assert counts["xet-write-token"] and counts["xet-read-token"] and not counts["lfs-put"]
            assert "Already at" in zoo.publish().out and len(hub.commits(zoo.repo)) == 2


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_commit_by_somebody_else_meanwhile_is_not_undone(zoo: Zoo) -> None:
    assert zoo.publish().code == 0
    zoo.change_card(license="Apache-2.0")
    # Their commit comes after ours was built on the state before it: once, and then every time.
    before = """
from huggingface_hub import HfApi
from hub_store import Repository
from pathlib import Path
create_commit, left = HfApi.create_commit, [LEFT]
def late(self, repo_id, operations, **options):
    if left[0]:
        left[0] -= 1
        repository = Repository(Path(ROOT), repo_id)
        repository.commit("refs/heads/main", repository.revision("main"), ADDED, [], "theirs")
    return create_commit(self, repo_id, operations, **options)
HfApi.create_commit = late
import sys; sys.path.insert(0, TESTS)
"""
    before = before.replace("from hub_store", "import sys; sys.path.insert(0, TESTS)\nfrom hub_store", 1)
    before = before.replace("TESTS", repr(str(Path(__file__).parent))).replace("ROOT", repr(str(zoo.hub.root)))

    harmless = before.replace("LEFT", "1").replace("ADDED", "{'.gitattributes': b'# theirs'}")
    done = zoo.host("publish", ID, "--org", zoo.org, before=harmless)
    zoo.assert_published(done, commits=4)
    assert zoo.hub.read(zoo.repo, ".gitattributes") == b"# theirs"
    assert [r["status"] for r in zoo.hub.requests("commit")] == [200, 412, 200]

    pinned = zoo.card_path.read_bytes()
    zoo.change_card(license="MIT")
    changed = zoo.card_path.read_bytes()
    assert changed != pinned
    forever = before.replace("LEFT", "9").replace("ADDED", "{'.gitattributes': __import__('os').urandom(9)}")
    done = zoo.host("publish", ID, "--org", zoo.org, before=forever)
    done.assert_one_sentence("others keep committing", zoo.repo)
    assert zoo.card_path.read_bytes() == changed

    foreign = before.replace("LEFT", "1").replace("ADDED", "{'notes.txt': b'theirs'}")
    done = zoo.host("publish", ID, "--org", zoo.org, before=foreign)
    done.assert_one_sentence("holds other content (notes.txt)")
    assert zoo.hub.read(zoo.repo, "notes.txt") == b"theirs"
    assert zoo.card_path.read_bytes() == changed


def test_a_commit_whose_answer_was_lost_is_not_repeated(zoo: Zoo) -> None:
    zoo.hub.fault("die", route="commit", times=1)
    zoo.assert_published(zoo.publish(), commits=2)
    assert zoo.hub.counts()["commit"] == 1


@pytest.mark.parametrize(
    "routes", [("info", "preupload", "lfs-batch", "lfs-put", "tree"), ("create", "commit", "resolve")]
)
def test_a_server_that_fails_now_and_then(zoo: Zoo, routes: tuple[str, ...]) -> None:
    for route in routes:
        zoo.hub.fault("status", code=500, route=route, times=1)
    zoo.assert_published(zoo.publish(), commits=2)
    assert {r["route"] for r in zoo.hub.requests() if r["status"] == 500} == set(routes)


def test_a_server_that_keeps_failing(zoo: Zoo) -> None:
    before = zoo.card_path.read_bytes()
    zoo.hub.fault("status", code=500, route="commit")
    zoo.publish().assert_one_sentence(zoo.repo, "500", "run the command again")
    assert zoo.hub.counts()["commit"] == 3
    assert sorted(zoo.hub.files(zoo.repo)) == [".gitattributes"] and zoo.card_path.read_bytes() == before
    zoo.hub.clear_faults()
    zoo.assert_published(zoo.publish(), commits=2)


@pytest.mark.parametrize("route", ["lfs-put", "commit", "resolve"])
def test_killed_on_the_way_and_run_again(zoo: Zoo, route: str) -> None:
    before = zoo.card_path.read_bytes()
    zoo.hub.fault("hang", route=route)
    running = zoo.host.start("publish", ID, "--org", zoo.org)
    wait_until(lambda: zoo.hub.counts()[route] > 0)
    running.kill()
    assert running.wait().code == -9
    assert zoo.card_path.read_bytes() == before
    assert sorted(zoo.hub.files(zoo.repo)) == (FILES if route == "resolve" else [".gitattributes"])
    zoo.hub.clear_faults()
    zoo.assert_published(zoo.publish(), commits=2)


def test_what_comes_back_otherwise_is_not_pinned(zoo: Zoo) -> None:
    before = zoo.card_path.read_bytes()
    zoo.hub.fault("flip", path="*/model.safetensors")
    sha256 = zoo.card()["files"][0]["sha256"]
    zoo.publish().assert_one_sentence("gives back another model.safetensors", sha256, "the card was left")
    assert zoo.card_path.read_bytes() == before
    zoo.hub.clear_faults()
    zoo.hub.fault("truncate", path="*/model.safetensors")
    zoo.publish().assert_one_sentence("could not be read back")
    assert zoo.card_path.read_bytes() == before
    zoo.hub.clear_faults()
    zoo.assert_published(zoo.publish(), commits=2)


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"HF_TOKEN": ""}, "needs a token"), ({"HF_TOKEN": "hf_wrong"}, "does not accept the token")],
)
def test_no_token_or_a_wrong_one(zoo: Zoo, environment: dict[str, str], message: str) -> None:
    before = zoo.card_path.read_bytes()
    zoo.publish(**environment).assert_one_sentence(message, "hf auth login", "nothing was published")
    assert not zoo.hub.exists(zoo.repo) and zoo.card_path.read_bytes() == before


@pytest.mark.parametrize("route", ["create", "commit"])
def test_no_right_to_the_organisation(zoo: Zoo, route: str) -> None:
    before = zoo.card_path.read_bytes()
    zoo.hub.fault("refuse", code=403, route=route)
    zoo.publish().assert_one_sentence("no right to write to", zoo.repo, "--org")
    assert zoo.card_path.read_bytes() == before
    assert not zoo.hub.exists(zoo.repo) or sorted(zoo.hub.files(zoo.repo)) == [".gitattributes"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": b"precious"}, "other content (notes.txt)"),
        ({"README.md": b"precious", "model.safetensors": b"w"}, "other content (README.md, model.safetensors)"),
        ({"card.json": b"no card"}, "other content (card.json)"),
        ({"card.json": b'{"id": "smpconv_t.in1k"}'}, "the checkpoint smpconv_t.in1k"),
    ],
)
def test_a_repository_with_other_content_is_left_alone(zoo: Zoo, content: dict[str, bytes], message: str) -> None:
    repository = zoo.repository()
    repository.create(private=False)
    repository.commit("refs/heads/main", repository.revision("main"), content, [], "theirs")
    before, commits = zoo.card_path.read_bytes(), zoo.hub.commits(zoo.repo)
    zoo.publish().assert_one_sentence(zoo.repo, message, "nothing was changed")
    assert zoo.hub.commits(zoo.repo) == commits and zoo.card_path.read_bytes() == before
    assert writes(zoo.hub) == []


def test_a_repository_that_only_its_upload_reached_is_taken(zoo: Zoo) -> None:
    repository, data = zoo.repository(), zoo.weights_path.read_bytes()
    repository.create(private=False)
    repository.write_lfs_object(hashlib.sha256(data).hexdigest(), data)
    zoo.assert_published(zoo.publish(), commits=2)


def test_half_a_publication_is_completed(zoo: Zoo) -> None:
    """As the web page or another client may leave it: some of our files, one of them another."""
    assert zoo.publish().code == 0
    repository = zoo.repository()
    pointer = lfs_pointer("0" * 64, 9)
    repository.commit(
        "refs/heads/main", repository.revision("main"), {"model.safetensors": pointer}, ["README.md"], "-"
    )
    zoo.assert_published(zoo.publish(), commits=4)


def test_card_and_file_disagree(zoo: Zoo) -> None:
    weights, card = zoo.weights_path.read_bytes(), zoo.card_path.read_bytes()
    zoo.weights_path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    declared = zoo.card()["files"][0]["sha256"]
    zoo.publish().assert_one_sentence(declared, "is not the file its card declares")
    zoo.weights_path.write_bytes(weights)
    for change, message in (
        ({"tensors": 7}, "says 7 tensors"),
        ({"parameters": 7}, "and 7 parameters"),
        ({"files": [{**zoo.card()["files"][0], "bytes": 7}]}, "says 7"),
        ({"arguments": {"dims": [4]}}, "not of this network"),
    ):
        zoo.change_card(**change)
        changed = zoo.card_path.read_bytes()
        zoo.publish().assert_one_sentence(message)
        assert zoo.card_path.read_bytes() == changed
        zoo.card_path.write_bytes(card)
    zoo.weights_path.unlink()
    zoo.publish().assert_one_sentence("are not here", "do not exist")
    zoo.weights_path.write_bytes(weights)
    assert zoo.hub.requests() == []


def test_unknown_and_absent_checkpoints(zoo: Zoo) -> None:
    zoo.host("publish", "smpconv_tcn_mnist.smnist6k").assert_one_sentence("did you mean", ID)
    zoo.host("publish", "smpconv_t.in1k").assert_one_sentence("smpconv-zoo import smpconv_t.in1k")
    zoo.host("publish", ID, "--org", "no org/at all").assert_one_sentence("Repo id")
    assert zoo.hub.requests() == []


def test_a_dry_run_sends_and_keeps_nothing(zoo: Zoo, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in zoo.card_path.parent.iterdir()}
    done = zoo.publish("--dry-run", HF_TOKEN="", TMPDIR=str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert f"Would be pushed to {zoo.repo}" in done.out and "# smpconv_tcn_mnist.smnist5k" in done.out
    for name in FILES[1:]:
        assert name in done.out
    assert zoo.hub.requests() == [] and not zoo.hub.exists(zoo.repo) and list(tmp_path.iterdir()) == []
    assert {path: path.read_bytes() for path in zoo.card_path.parent.iterdir()} == before
    pushed = json.loads(zoo.publish("--json").out)
    assert json.loads(zoo.publish("--dry-run", "--json").out)["files"] == pushed["files"]


def test_a_card_that_cannot_be_written_is_said_before_anything_is_sent(zoo: Zoo) -> None:
    # By a stand-in, for root may write everywhere.
    before = "import os; os.access = lambda path, mode: False"
    zoo.host("publish", ID, "--org", zoo.org, before=before).assert_one_sentence(
        str(zoo.card_path), "cannot be written"
    )
    assert zoo.hub.requests() == []


def test_a_full_disk_leaves_the_card_and_the_next_run_pins(zoo: Zoo) -> None:
    before = zoo.card_path.read_bytes()
    full = (
        "from smpconv_zoo import publishing\n"
        "def write_whole(path, data): raise OSError(28, 'No space left on device', str(path))\n"
        "publishing.write_whole = write_whole"
    )
    done = zoo.host("publish", ID, "--org", zoo.org, before=full)
    done.assert_one_sentence("is published at", "No space left on device", "run the command again")
    assert zoo.card_path.read_bytes() == before
    zoo.assert_published(zoo.publish(), commits=2)


def test_a_card_changed_meanwhile_is_not_overwritten(zoo: Zoo) -> None:
    before = (
        "from smpconv_zoo import publishing\n"
        "check = publishing._Repository.check\n"
        "def late(self, *arguments):\n"
        f"    open({str(zoo.card_path)!r}, 'a').write('\\n')\n"
        "    return check(self, *arguments)\n"
        "publishing._Repository.check = late"
    )
    done = zoo.host("publish", ID, "--org", zoo.org, before=before)
    done.assert_one_sentence("changed meanwhile")
    assert zoo.card()["hub"] is None
    zoo.assert_published(zoo.publish(), commits=2)


def test_the_other_embedded_checkpoint_carries_its_pixel_order(zoo: Zoo) -> None:
    assert zoo.host("publish", OTHER, "--org", zoo.org).code == 0
    assert "under `permutation`" in zoo.hub.read(f"{zoo.org}/{OTHER}", "README.md").decode()
    assert load_card(zoo.card_path.with_name(f"{OTHER}.json")).hub is not None
