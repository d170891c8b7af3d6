"""Signatures: made, checked without a network, and refused, each in one sentence, for every way to be wrong."""

import base64
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smpconv_zoo.pretrained import signing
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, load_card, weights_dir
from smpconv_zoo.pretrained.errors import CheckpointError, SignatureError
from smpconv_zoo.pretrained.signing import (
    check_signature_if_required,
    generate_keys,
    require_signature,
    sign_checkpoint,
    sign_files,
    signed_card,
    signed_files,
    verify_signature,
)
from smpconv_zoo.verifying import verify

pytest.importorskip("model_signing", reason='signing needs the extra: pip install "smpconv-zoo[sign]"')
pytest.importorskip("OpenSSL", reason='signing needs the extra: pip install "smpconv-zoo[sign]"')

NAME = "smpconv_tcn_mnist.smnist5k"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the user's, and no network: any attempt to reach one fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("SMPCONV_PUBLIC_KEY", "SMPCONV_REQUIRE_SIGNATURE", "SMPCONV_KEY_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return generate_keys(tmp_path_factory.mktemp("other_keys"))


class Signed:
    """An embedded checkpoint copied into hub layout and signed."""

    def __init__(self, folder: Path, keys: tuple[Path, Path]) -> None:
        self.private, self.public = keys
        self.weights = folder / "model.safetensors"
        shutil.copy(weights_dir() / f"{NAME}.safetensors", self.weights)
        shutil.copy(weights_dir() / f"{NAME}.json", folder / "card.json")
        # Golden logits take seconds and are the business of tests/test_verify.py.
        self.change_card(golden=None)
        self.bundle = sign_checkpoint(self.weights, self.card, self.private)

    @property
    def card(self) -> CheckpointCard:
        return load_card(self.weights.with_name("card.json"))

    def change_card(self, **changes: Any) -> None:
        path = self.weights.with_name("card.json")
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    def refused(self, *parts: str) -> None:
        with pytest.raises(SignatureError) as caught:
            require_signature(self.weights, self.public)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Signed:
    return Signed(tmp_path, keys)


def test_what_was_signed_is_accepted_without_a_network(signed: Signed) -> None:
    assert signed.bundle.name == "model.safetensors.sig"
    require_signature(signed.weights, signed.public)
    assert sorted(os.listdir(signed.weights.parent)) == ["card.json", "model.safetensors", "model.safetensors.sig"]


def test_the_bundle_is_one_that_model_signing_itself_accepts(signed: Signed, tmp_path: Path) -> None:
    """Its own command line, on a folder with what is signed, as docs/signing.md says."""
    (folder := tmp_path / "plain").mkdir()
    shutil.copy(signed.weights, folder / "model.safetensors")
    (folder / "card.json").write_bytes(signed_card(signed.card))
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(signed.bundle), "--public_key", str(signed.public)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder / "card.json").write_bytes(signed_card(signed.card) + b" ")
    assert subprocess.run(command, capture_output=True, timeout=120).returncode != 0


def test_a_flipped_bit(signed: Signed) -> None:
    data = bytearray(signed.weights.read_bytes())
    data[-1] ^= 1
    signed.weights.write_bytes(data)
    signed.refused("model.safetensors is not the one that was signed")


def test_what_was_read_is_checked_and_not_the_file_of_now(signed: Signed) -> None:
    with pytest.raises(SignatureError, match="is not the one that was signed"):
        require_signature(signed.weights, signed.public, data=b"read before")


def test_a_changed_card(signed: Signed) -> None:
    signed.change_card(license="proprietary")
    signed.refused("card.json is not the one that was signed")


def test_a_card_that_only_says_where_the_copy_lies(signed: Signed) -> None:
    hub = {"repo": "smpconv/x", "revision": "0" * 40}
    files = json.loads(signed.weights.with_name("card.json").read_text(encoding="utf-8"))["files"]
    signed.change_card(status="published", hub=hub, files=[{**files[0], "name": "model.safetensors"}])
    require_signature(signed.weights, signed.public)


def test_another_key(signed: Signed, other_keys: tuple[Path, Path]) -> None:
    signed.public = other_keys[1]
    signed.refused("was not made with the key", str(other_keys[1]))


def test_another_key_that_bears_the_name_of_the_trusted_one(signed: Signed, other_keys: tuple[Path, Path]) -> None:
    trusted = json.loads(signed.bundle.read_bytes())["verificationMaterial"]
    sign_checkpoint(signed.weights, signed.card, other_keys[0], signed.bundle, overwrite=True)
    forged = {**json.loads(signed.bundle.read_bytes()), "verificationMaterial": trusted}
    signed.bundle.write_text(json.dumps(forged), encoding="utf-8")
    signed.refused("not made by the owner of this key")


def test_the_bundle_of_another_checkpoint(signed: Signed, tmp_path: Path) -> None:
    other = "smpconv_tcn_mnist.pmnist5k"
    weights = weights_dir() / f"{other}.safetensors"
    sign_checkpoint(weights, checkpoint_card(other), signed.private, signed.bundle, overwrite=True)
    signed.refused("is not the one that was signed")


def test_a_bundle_whose_digests_were_edited(signed: Signed) -> None:
    data = signed.weights.read_bytes() + b"more"
    signed.weights.write_bytes(data)
    bundle = json.loads(signed.bundle.read_bytes())
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    for resource in payload["predicate"]["resources"]:
        if resource["name"] == "model.safetensors":
            resource["digest"] = signing.sha256_of_file(signed.weights)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    signed.bundle.write_text(json.dumps(bundle), encoding="utf-8")
    signed.refused("changed since")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b"{}",
        lambda b: b"[1]",
        lambda b: b"\xff\xfe",
        lambda b: b"[" * 100_000,
        lambda b: b[: len(b) // 2],
        lambda b: b.replace(b'"payload":"', b'"payload":"%'),
        lambda b: b.replace(b'"hint":"', b'"hint":null,"x":"'),
        lambda b: b.replace(b'"sig":"', b'"sig":"AAAA'),
        lambda b: b.replace(b'"signatures":[', b'"signatures":[],"x":['),
        lambda b: b.replace(b"bundle.v0.3", b"bundle.v9.9"),
    ],
    ids=["empty", "no fields", "list", "bytes", "nested", "cut", "payload", "hint", "signature", "unsigned", "type"],
)
def test_malformed_bundles(signed: Signed, damage: Callable[[bytes], bytes], capfd: Any) -> None:
    signed.bundle.write_bytes(damage(signed.bundle.read_bytes()))
    signed.refused("model.safetensors.sig")
    assert capfd.readouterr() == ("", "")


def test_missing_and_additional_files(signed: Signed) -> None:
    files = signed_files(signed.weights, signed.card)
    verify_signature(files, signed.bundle, signed.public)
    for wrong, message in [
        ({"card.json": files["card.json"]}, r"model\.safetensors is signed and missing"),
        ({**files, "more.py": b"x"}, r"more\.py is not signed"),
    ]:
        with pytest.raises(SignatureError, match=message):
            verify_signature(wrong, signed.bundle, signed.public)


def test_a_valid_bundle_that_leaves_files_out(signed: Signed, tmp_path: Path) -> None:
    """What a bundle tells model-signing to ignore is not covered, so it is refused all the same."""
    from model_signing import hashing
    from model_signing import signing as package

    with signing._staged(signed_files(signed.weights, signed.card)) as folder:
        config = hashing.Config().set_ignored_paths(paths=["model.safetensors"])
        maker = package.Config().use_elliptic_key_signer(private_key=signed.private).set_hashing_config(config)
        maker.sign(folder, signed.bundle)
    signed.refused("model.safetensors is not signed")


def test_missing_pieces(signed: Signed, tmp_path: Path) -> None:
    public, signed.public = signed.public, tmp_path / "absent.pem"
    signed.refused("absent.pem does not exist")
    signed.public = signed.weights
    signed.refused("is not a PEM public key")
    signed.public = public
    signed.weights.with_name("card.json").unlink()
    signed.refused("no card beside it")
    signed.bundle.unlink()
    signed.refused("there is no model.safetensors.sig beside it")
    with pytest.raises(SignatureError, match="SMPCONV_PUBLIC_KEY names no trusted key"):
        require_signature(signed.weights)


def test_keys_are_private_and_never_overwritten(tmp_path: Path, call: Any) -> None:
    private, public = generate_keys(tmp_path / "made" / "here")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"BEGIN PRIVATE KEY" in private.read_bytes() and b"BEGIN PUBLIC KEY" in public.read_bytes()
    before = private.read_bytes(), public.read_bytes()
    code, out, err = call("keygen", "--out", str(private.parent))
    assert (code, out, err.count("\n")) == (1, "", 1) and "exists and was left as it is" in err
    private.unlink()
    with pytest.raises(FileExistsError):
        generate_keys(private.parent)
    assert os.listdir(private.parent) == ["public.pem"] and public.read_bytes() == before[1]
    code, out, _ = call("keygen", "--out", str(tmp_path / "again"))
    assert code == 0 and sorted(os.listdir(tmp_path / "again")) == ["private.pem", "public.pem"]


def test_a_password(signed: Signed, tmp_path: Path) -> None:
    private, public = generate_keys(tmp_path / "locked", "open sesame")
    assert b"ENCRYPTED" in private.read_bytes()
    for password in (None, "wrong"):
        with pytest.raises(SignatureError, match="password"):
            sign_checkpoint(signed.weights, signed.card, private, tmp_path / "a.sig", password)
    assert not (tmp_path / "a.sig").exists()
    with pytest.raises(SignatureError, match="is not encrypted, but a password is set"):
        sign_checkpoint(signed.weights, signed.card, signed.private, tmp_path / "a.sig", "x")
    sign_checkpoint(signed.weights, signed.card, private, tmp_path / "a.sig", "open sesame")
    verify_signature(signed_files(signed.weights, signed.card), tmp_path / "a.sig", public)


def test_keys_that_cannot_sign(signed: Signed, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())):
        (tmp_path / "key.pem").write_bytes(key.private_bytes(*plain))
        with pytest.raises(SignatureError, match="no elliptic-curve key on P-256"):
            sign_files({"a": b"x"}, tmp_path / "key.pem", tmp_path / "a.sig")
    with pytest.raises(SignatureError, match="not a PEM private key"):
        sign_files({"a": b"x"}, signed.public, tmp_path / "a.sig")
    assert not (tmp_path / "a.sig").exists()


def test_only_what_the_card_declares_is_signed(signed: Signed, tmp_path: Path) -> None:
    signed.weights.write_bytes(b"something else")
    with pytest.raises(SignatureError, match="not the file that the card of"):
        sign_checkpoint(signed.weights, signed.card, signed.private, tmp_path / "a.sig")
    assert not (tmp_path / "a.sig").exists()


def test_the_commands(signed: Signed, call: Any, tmp_path: Path, other_keys: tuple[Path, Path]) -> None:
    folder, before = str(tmp_path), signed.bundle.read_bytes()
    arguments = ("sign", folder, "--key", str(signed.private), "--out", str(signed.bundle))
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1) and "--force" in err
    assert signed.bundle.read_bytes() == before
    assert call(*arguments, "--force")[0] == 0 and signed.bundle.read_bytes() != before
    code, out, _ = call("verify", folder, "--public-key", str(signed.public))
    assert code == 0 and [line.split()[1:3] for line in out.splitlines()][-1] == ["signature", "ok"]
    code, out, err = call("verify", folder, "--public-key", str(other_keys[1]))
    assert (code, err.count("\n")) == (1, 1) and "(signature)" in err and "was not made with the key" in out
    code, out, err = call("sign", NAME, "--key", str(tmp_path / "absent.pem"), "--out", str(tmp_path / "a.sig"))
    assert (code, out, err.count("\n")) == (1, "", 1) and "absent.pem" in err
    assert not (tmp_path / "a.sig").exists()


def test_verify_takes_no_key_for_an_unsigned_checkpoint(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(signed.weights)[-1].ok is None, "signed, but no key is trusted"
    monkeypatch.setenv("SMPCONV_PUBLIC_KEY", str(signed.public))
    assert verify(signed.weights)[-1].ok is True
    signed.bundle.unlink()
    assert verify(signed.weights)[-1].ok is None
    step = verify(signed.weights, signature="require")[-1]
    assert step.ok is False and "there is no model.safetensors.sig" in step.message


def test_the_switch_is_0_or_1(signed: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setenv("SMPCONV_REQUIRE_SIGNATURE", value)
        check_signature_if_required(signed.weights.with_name("absent"))
    monkeypatch.setenv("SMPCONV_REQUIRE_SIGNATURE", "true")
    with pytest.raises(CheckpointError, match="must be 0 or 1, got 'true'"):
        check_signature_if_required(signed.weights)


LOAD = f"""
import json, os, socket, sys
from pathlib import Path
def refuse(*_): raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
folder, *cases = sys.argv[1:]
import smpconv_zoo.pretrained.cards as cards
cards.weights_dir = lambda: Path(folder)
import smpconv_zoo.pretrained.store as store
store.weights_dir = cards.weights_dir
import timm, smpconv_zoo
for case in cases:
    os.environ.update(json.loads(case))
    try:
        timm.create_model("{NAME}", pretrained=True)
        print("loaded")
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""


def test_required_on_load(signed: Signed, tmp_path: Path, other_keys: tuple[Path, Path]) -> None:
    """Through timm, in a process of its own, from a folder of embedded weights that the test may sign."""
    (folder := tmp_path / "weights").mkdir()
    for path in weights_dir().glob("*.json"):
        shutil.copy(path, folder)
    weights = folder / f"{NAME}.safetensors"
    shutil.copy(signed.weights, weights)
    shutil.copy(signed.weights.with_name("card.json"), weights.with_suffix(".json"))

    def load(*cases: dict[str, str]) -> list[str]:
        command = [sys.executable, "-c", LOAD, str(folder), *map(json.dumps, cases)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    required = {"SMPCONV_REQUIRE_SIGNATURE": "1"}
    key, other = {"SMPCONV_PUBLIC_KEY": str(signed.public)}, {"SMPCONV_PUBLIC_KEY": str(other_keys[1])}
    free, no_key, unsigned = load({}, required, key)
    assert free == "loaded"
    assert no_key.startswith("SignatureError: ") and "names no trusted key" in no_key
    assert unsigned.startswith("SignatureError: ") and f"there is no {weights.name}.sig beside it" in unsigned
    shutil.copy(signed.bundle, weights.with_name(weights.name + ".sig"))
    right, wrong = load({**required, **key}, other)
    assert right == "loaded"
    assert wrong.startswith("SignatureError: ") and "was not made with the key" in wrong


def test_without_the_packages_one_sentence(monkeypatch: pytest.MonkeyPatch, call: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "model_signing.signing", None)
    code, out, err = call("keygen", "--out", str(tmp_path / "keys"))
    assert (code, out, err.count("\n")) == (1, "", 1) and 'pip install "smpconv-zoo[sign]"' in err
    assert not (tmp_path / "keys").exists()


def test_the_repository_holds_no_private_key() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        ["git", "grep", "-lE", "BEGIN [A-Z ]*PRIVATE KEY-----"], cwd=root, capture_output=True, text=True
    )
    if done.returncode > 1:
        pytest.skip("needs a git checkout")
    assert done.stdout == ""
