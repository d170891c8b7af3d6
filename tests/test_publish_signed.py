"""Publishing with a signature, and loading what was published only if it is signed; real client, Hub on loopback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from zoo_checkout import Done, ZooHost, copy_package, zoo_host

pytest.importorskip("model_signing", reason="needs the package model-signing, which is not installed")

from smpconv_zoo.pretrained.signing import generate_keys

ID = "smpconv_tcn_mnist.smnist5k"
REPO = f"org/{ID}"
SIGNATURE = "model.safetensors.sig"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def host(hub: HubServer, tmp_path: Path) -> Iterator[ZooHost]:
    environment = {**hub.environment(tmp_path / "home"), "SMPCONV_HOME": str(tmp_path / "store")}
    with zoo_host(copy_package(tmp_path / "checkout"), tmp_path / "scratch", environment) as running:
        yield running


LOAD = f"""
import timm
timm.create_model({("hf-hub:" + REPO)!r}, pretrained=True)
import os, sys
sys.stdout.write("loaded")
sys.stdout.flush()
os._exit(0)
"""


def load(host: ZooHost, public_key: Path | None) -> Done:
    """Load what is published in a process that requires a signature."""
    trusted = {} if public_key is None else {"SMPCONV_PUBLIC_KEY": str(public_key)}
    return host("list", before=LOAD, SMPCONV_REQUIRE_SIGNATURE="1", **trusted)


def test_a_signature_is_pushed_kept_renewed_and_removed_as_what_it_signs_asks_for(
    hub: HubServer, host: ZooHost, tmp_path: Path
) -> None:
    private, public = generate_keys(tmp_path / "keys")
    other, other_public = generate_keys(tmp_path / "other keys")
    card_path = host.checkout / "weights" / f"{ID}.json"

    # Published without a signature, it is refused where one is required, and in one sentence.
    assert host("publish", ID, "--org", "org").code == 0
    assert SIGNATURE not in hub.files(REPO)
    unsigned = load(host, public)
    assert unsigned.code == 70 and f"there is no {SIGNATURE} beside it" in unsigned.err.splitlines()[-1]

    done = host("publish", ID, "--org", "org", "--sign", str(private))
    assert done.code == 0, done
    assert SIGNATURE in done.out
    assert len(hub.commits(REPO)) == 3
    first = hub.read(REPO, SIGNATURE)
    assert load(host, public).out == "loaded", "by timm's own name for it, with card and bundle fetched on the way"
    assert "no trusted key" in load(host, None).err
    wrong = load(host, other_public)
    assert wrong.code == 70 and "SignatureError" in wrong.err.splitlines()[-1]

    # A signature differs each time it is made; one that holds is kept, with the key or without.
    for again in (("--sign", str(private)), ()):
        assert host("publish", ID, "--org", "org", *again).code == 0
        assert len(hub.commits(REPO)) == 3
    assert hub.read(REPO, SIGNATURE) == first

    # Another key's is not: it is replaced.
    assert host("publish", ID, "--org", "org", "--sign", str(other)).code == 0
    assert len(hub.commits(REPO)) == 4
    assert load(host, other_public).out == "loaded"

    # A changed card is signed anew, or goes without: the old signature does not hold for it.
    card_path.write_text(json.dumps({**json.loads(card_path.read_text()), "license": "Apache-2.0"}))
    assert host("publish", ID, "--org", "org").code == 0
    assert SIGNATURE not in hub.files(REPO)
    assert host("publish", ID, "--org", "org", "--sign", str(private)).code == 0
    assert load(host, public).out == "loaded"


def test_a_lost_answer_does_not_sign_twice(hub: HubServer, host: ZooHost, tmp_path: Path) -> None:
    private, public = generate_keys(tmp_path / "keys")
    hub.fault("die", route="commit", times=1)
    assert host("publish", ID, "--org", "org", "--sign", str(private)).code == 0
    assert len(hub.commits(REPO)) == 2
    assert load(host, public).out == "loaded"


# Put together here, so that no file of the repository looks as if it held a key.
NONSENSE = "-----{} PRIVATE KEY-----\nnonsense\n-----{} PRIVATE KEY-----\n".format("BEGIN", "END")


@pytest.mark.parametrize("content", ["", NONSENSE])
def test_a_key_that_cannot_sign_sends_nothing(hub: HubServer, host: ZooHost, tmp_path: Path, content: str) -> None:
    key = tmp_path / "key.pem"
    key.write_text(content)
    before = hashlib.sha256((host.checkout / "weights" / f"{ID}.json").read_bytes()).digest()
    host("publish", ID, "--org", "org", "--sign", str(key)).assert_one_sentence("cannot be used to sign")
    assert hub.requests() == []
    assert hashlib.sha256((host.checkout / "weights" / f"{ID}.json").read_bytes()).digest() == before
