"""Detached signatures of checkpoints: OpenSSF Model Signing bundles made with an elliptic-curve key, always offline.

A signature covers two things, under names that do not depend on where the files lie:

    model.safetensors    the bytes of the weight file
    card.json            what the card says: see :func:`signed_card`

The weights alone would leave the figures, the licence and the network of the card free to be changed; the card alone
would bind the weights by their sha256, but no other tool would see that. Its bundle lies beside the weight file, as
``<weight file>.sig``. What a signature promises, and how keys are kept, is in ``docs/signing.md``.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smpconv_zoo.files import sha256_of_file, write_new, write_whole
from smpconv_zoo.pretrained.cards import CheckpointCard, load_card
from smpconv_zoo.pretrained.errors import SignatureError

__all__ = [
    "PRIVATE_KEY",
    "PUBLIC_KEY",
    "card_beside",
    "check_signature_if_required",
    "generate_keys",
    "public_key_of",
    "require_signature",
    "sign_checkpoint",
    "sign_files",
    "signature_beside",
    "signature_required",
    "signed_card",
    "signed_files",
    "trusted_key",
    "verify_signature",
]

# What `generate_keys` writes.
PRIVATE_KEY, PUBLIC_KEY = "private.pem", "public.pem"

Files = Mapping[str, "Path | bytes"]


def signed_card(card: CheckpointCard) -> bytes:
    """What a signature says of a card: its JSON with sorted keys and no white space.

    ``status``, ``hub`` and the names of the files are left out. They say where a copy lies, change when it is published
    or imported, and the commit of a publication cannot be known to the files inside it.
    """
    content = dataclasses.asdict(card)
    del content["status"], content["hub"]
    for file in content["files"]:
        del file["name"]
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def signed_files(weights: Path | bytes, card: CheckpointCard) -> dict[str, Path | bytes]:
    """The content that a signature of a checkpoint covers, for :func:`sign_files` and :func:`verify_signature`."""
    return {"model.safetensors": weights, "card.json": signed_card(card)}


def sign_files(
    files: Files, private_key: Path, bundle: Path, password: str | None = None, *, overwrite: bool = False
) -> None:
    """Sign files into a detached bundle.

    Args:
        files: Plain names, and for each the file or its content.
        private_key: PEM file of an elliptic-curve key (P-256, P-384 or P-521).
        bundle: The file to write; it appears whole or not at all.
        password: Of the private key, if it is encrypted.
        overwrite: Whether ``bundle`` may exist.

    Raises:
        SignatureError: A key that cannot be used, or a wrong password.
        FileExistsError: ``bundle`` exists.
        OSError: A file cannot be read or written.
        ImportError: The packages that sign are not installed.
    """
    signing = _model_signing().signing
    if os.path.lexists(bundle) and not overwrite:
        raise FileExistsError(f"{bundle} exists and was left as it is; pass --force (overwrite=True) to replace it")
    _check_private_key(private_key, password)
    # model-signing 1.1 hands the password on to a function that takes bytes, whatever its annotation says.
    secret: Any = None if password is None else password.encode()
    with _staged(files) as folder:
        made = folder.with_suffix(".sig")
        signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret).sign(folder, made)
        write_whole(bundle, made.read_bytes())


def sign_checkpoint(
    weights: Path,
    card: CheckpointCard,
    private_key: Path,
    bundle: Path | None = None,
    password: str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Sign a weight file together with its card, and return the bundle's path (beside the weights if not given).

    Raises:
        SignatureError: The file is not the one that the card declares, or a key that cannot be used.
        FileExistsError: ``bundle`` exists.
        OSError: A file cannot be read or written.
        ImportError: The packages that sign are not installed.
    """
    if not card.files or sha256_of_file(weights) != card.files[0].sha256:
        raise SignatureError(f"{weights} is not the file that the card of {card.id} declares; it was not signed")
    bundle = signature_beside(weights) if bundle is None else bundle
    sign_files(signed_files(weights, card), private_key, bundle, password, overwrite=overwrite)
    return bundle


def verify_signature(files: Files, bundle: Path, public_key: Path) -> None:
    """Check that ``bundle`` is a signature, by the owner of ``public_key``, of exactly these files.

    Raises:
        SignatureError: No such bundle or key, a malformed one, another key, a signature that was not made by it, or
            files that are changed, missing or not signed.
        OSError: A file cannot be read.
        ImportError: The packages that check signatures are not installed.
    """
    verifying = _model_signing().verifying
    key_digest = _public_key_digest(public_key)
    hint, signed = _read_bundle(bundle)
    if hint != key_digest:
        raise SignatureError(f"{bundle} was not made with the key {public_key}, but with one of sha256 {hint[:16]}...")
    with _staged(files) as folder:
        digests = {path.name: sha256_of_file(path) for path in folder.iterdir()}
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, bundle)
        except Exception as error:
            # The package lets exceptions of several libraries through. Whatever it was, the signature does not hold;
            # only the reason given depends on what the bundle claims.
            reason = _difference(signed, digests) or "it was not made by the owner of this key, or changed since"
            raise SignatureError(f"{bundle} does not hold: {reason}") from error
    # A bundle may tell the package to leave paths out, so a valid one need not cover every file.
    if difference := _difference(signed, digests):
        raise SignatureError(f"{bundle} does not hold: {difference}")


def signature_required() -> bool:
    """Whether the user asks for a signature on every load: ``SMPCONV_REQUIRE_SIGNATURE=1``.

    Raises:
        SignatureError: Another value than 0 or 1, which is not to be taken for either.
    """
    value = os.environ.get("SMPCONV_REQUIRE_SIGNATURE", "")
    if value not in ("", "0", "1"):
        raise SignatureError(f"SMPCONV_REQUIRE_SIGNATURE must be 0 or 1, got {value!r}")
    return value == "1"


def check_signature_if_required(weights: Path, data: bytes | None = None) -> None:
    """:func:`require_signature` if the user asks for it, nothing otherwise.

    Raises:
        SignatureError: It is required and missing or wrong.
        ImportError: It is required and the packages that check it are not installed.
    """
    if signature_required():
        require_signature(weights, data=data)


def require_signature(weights: Path, public_key: Path | None = None, data: bytes | None = None) -> None:
    """Check the signature beside a weight file, against the card beside it and the key that the user trusts.

    Args:
        weights: The weight file; its bundle is ``<weights>.sig``, its card ``<stem>.json`` or ``card.json``.
        public_key: The trusted key; :func:`trusted_key` if not given.
        data: What was read from ``weights``, if it was: what is checked is then what is used.

    Raises:
        SignatureError: Card, bundle or key missing, or a signature that does not hold.
        CardError: The card is malformed.
        ImportError: The packages that check signatures are not installed.
    """
    key = public_key or trusted_key()
    if key is None:
        raise SignatureError(f"a signature of {weights} is required, and SMPCONV_PUBLIC_KEY names no trusted key")
    bundle = signature_beside(weights)
    if not bundle.is_file():
        raise SignatureError(f"a signature of {weights} is required, and there is no {bundle.name} beside it")
    card = card_beside(weights)
    if card is None:
        raise SignatureError(f"a signature of {weights} is required, and there is no card beside it to check it with")
    verify_signature(signed_files(weights if data is None else data, card), bundle, key)


def trusted_key() -> Path | None:
    """The public key that the user trusts, ``SMPCONV_PUBLIC_KEY``; None if it is not set."""
    named = os.environ.get("SMPCONV_PUBLIC_KEY")
    return Path(named).expanduser() if named else None


def signature_beside(weights: Path) -> Path:
    """Where the bundle of a weight file lies."""
    return weights.with_name(weights.name + ".sig")


def card_beside(weights: Path) -> CheckpointCard | None:
    """The card beside a weight file, ``<stem>.json`` or ``card.json``; None if there is neither.

    Raises:
        CardError: It is malformed.
    """
    for path in (weights.with_suffix(".json"), weights.with_name("card.json")):
        if path.is_file():
            return load_card(path)
    return None


def generate_keys(folder: Path, password: str | None = None) -> tuple[Path, Path]:
    """Write a new P-256 key pair, ``private.pem`` (mode 0600) and ``public.pem``, and return their paths.

    Args:
        folder: Made if it does not exist.
        password: Encrypts the private key.

    Raises:
        FileExistsError: One of the files exists; nothing is written then.
        OSError: The folder cannot be written.
        ImportError: The packages that sign are not installed.
    """
    _model_signing()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = folder / PRIVATE_KEY, folder / PUBLIC_KEY
    for path in (private, public):
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists and was left as it is; a lost key cannot be made again")
    encryption: Any = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pem, key = serialization.Encoding.PEM, ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True)
    write_new(private, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, encryption), mode=0o600)
    write_new(public, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def _model_signing() -> Any:
    """The package model-signing, which needs pyOpenSSL without saying so; absent, one sentence."""
    try:
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise ImportError(
            f'signatures need the packages model-signing and pyOpenSSL: pip install "smpconv-zoo[sign]" ({error})'
        ) from error
    return model_signing


@contextlib.contextmanager
def _staged(files: Files) -> Iterator[Path]:
    """A folder of real files with these names.

    model-signing signs and checks folders and refuses symbolic links, and the hub's cache is made of them.
    """
    with tempfile.TemporaryDirectory(prefix="smpconv_sign_") as parent:
        folder = Path(parent) / "checkpoint"
        folder.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
        yield folder


def public_key_of(private_key: Path, password: str | None = None) -> bytes:
    """The public half of a private key, as PEM.

    Raises:
        SignatureError: A key that cannot be used to sign, or a wrong password.
        OSError: The file cannot be read.
        ImportError: The packages that sign are not installed.
    """
    _model_signing()
    from cryptography.hazmat.primitives import serialization

    key = _check_private_key(private_key, password)
    pem: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return pem


def _check_private_key(path: Path, password: str | None) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password.encode() if password else None)
    except TypeError as error:
        needs = "is encrypted, and no password was given" if not password else "is not encrypted, but a password is set"
        raise SignatureError(f"the private key {path} {needs}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = "not a PEM private key, or the password is wrong" if password else "not a PEM private key"
        raise SignatureError(f"{path} cannot be used to sign: {wrong}") from error
    _check_curve(path, isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name)
    return key


def _public_key_digest(path: Path) -> str:
    """Hex sha256 of the key's canonical PEM, which a bundle names as the key that made it."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not path.is_file():
        raise SignatureError(f"the public key {path} does not exist")
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} is not a PEM public key") from error
    _check_curve(path, isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name)
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _check_curve(path: Path, curve: str | bool) -> None:
    if curve not in ("secp256r1", "secp384r1", "secp521r1"):
        raise SignatureError(f"{path} is no elliptic-curve key on P-256, P-384 or P-521")


def _read_bundle(path: Path) -> tuple[str, dict[str, str]]:
    """The key that a bundle says it was made with, and the sha256 of each file that it lists: claims, until verified.

    Bundles without either, of before model-signing 1.0, are refused.
    """
    if not path.is_file():
        raise SignatureError(f"the signature {path} does not exist")
    try:
        bundle = json.loads(path.read_bytes())
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        resources = payload["predicate"]["resources"]
        if {resource["algorithm"] for resource in resources} != {"sha256"} or not isinstance(hint, str):
            raise ValueError("digests other than sha256, or no key")
        return hint, {str(resource["name"]): str(resource["digest"]) for resource in resources}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise SignatureError(f"{path} is not a model-signing bundle made with a key") from error


def _difference(signed: Mapping[str, str], there: Mapping[str, str]) -> str:
    """In words, where files differ from the signed ones; empty if nowhere."""
    for name in sorted({*signed, *there}):
        if name not in there:
            return f"{name} is signed and missing"
        if name not in signed:
            return f"{name} is not signed"
        if signed[name] != there[name]:
            return f"{name} is not the one that was signed"
    return ""
