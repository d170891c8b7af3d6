"""Publishing a checkpoint on the Hugging Face Hub: pushed in one commit, read back, and pinned in its card.

What is pushed follows from the card and the weights alone, so publishing again finds nothing to do. A commit is only
ever made on top of a state that was looked at, and the card names a revision only once every byte of it was read back:
a run that ends at any moment leaves what was pinned before, and the next run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from timm.models._hub import save_config_for_hf

from smpconv_zoo._version import __version__
from smpconv_zoo.checkpoints import check_network_name
from smpconv_zoo.evaluation.model_card import model_card
from smpconv_zoo.files import write_whole
from smpconv_zoo.models.build import create_on_meta, match_state_dict
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, Hub, card_bytes, weights_dir
from smpconv_zoo.pretrained.errors import SignatureError
from smpconv_zoo.pretrained.home import card_in_use, imported_file
from smpconv_zoo.pretrained.hub import CARD_NAME, WEIGHTS_NAME
from smpconv_zoo.pretrained.signing import public_key_of, sign_files, signature_beside, signed_files, verify_signature
from smpconv_zoo.pretrained.store import CheckpointError, read_safetensors, sha256_of

__all__ = ["ORGANISATION", "PublishError", "Published", "PublishedFile", "publish_checkpoint"]

ORGANISATION = "smpconv"

WEIGHTS, CARD, CONFIG, README = WEIGHTS_NAME, CARD_NAME, "config.json", "README.md"
SIGNATURE = signature_beside(Path(WEIGHTS)).name
# The Hub itself puts this into every new repository.
ATTRIBUTES = ".gitattributes"
ATTEMPTS = 3
PAUSE_SECONDS = 1.0

# What the client raises: its HTTP library's errors and its own, and for Xet those of Python.
CLIENT_ERRORS = (hub_errors.HTTPError, OSError, RuntimeError)


class PublishError(CheckpointError):
    """A checkpoint was not published; the message says why, and how things were left."""


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """A file of the repository: its name, size in bytes and sha256 (hex)."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Published:
    """What :func:`publish_checkpoint` did.

    ``revision`` is the commit that the card pins, None in a dry run. ``committed`` says whether this run made it,
    ``pinned`` whether the card was rewritten; both are False where all was published already. ``readme`` is the
    generated model card.
    """

    id: str
    repo: str
    revision: str | None
    committed: bool
    pinned: bool
    files: tuple[PublishedFile, ...]
    readme: str


def publish_checkpoint(
    checkpoint_id: str,
    org: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
    sign: Path | None = None,
    password: str | None = None,
) -> Published:
    """Publish a checkpoint as ``org/checkpoint_id`` and pin the revision in its card; nothing is done twice.

    Args:
        checkpoint_id: ``network.tag``; its weights have to be on this machine, embedded or imported.
        org: Organisation or user; the one where it is published already, or else :data:`ORGANISATION`, if None.
        token: Access token; the one that the Hub's client finds if None.
        dry_run: Only say what would be pushed: nothing is sent, nothing is kept.
        endpoint: Address of the Hub; the client's if None.
        sign: Private key (PEM) to sign weights and card with; a bundle is pushed beside them. One by this key that
            still holds is kept, and one that no longer fits what is pushed is removed.
        password: Of the private key, if it is encrypted.

    Raises:
        CardError: No such checkpoint, or a malformed card.
        SignatureError: A key that cannot be used to sign.
        CheckpointError: The weights are not here, or are not those of the card.
        PublishError: No token, no right, a repository with other content, a Hub that does not answer or does not give
            back what was pushed, or a card that cannot be written.
        ValueError: An organisation that the Hub could not have.
    """
    card = card_in_use(checkpoint_id)
    repo = f"{org or _organisation(card)}/{card.id}"
    files = _folder(card, repo)
    readme = files[README].decode()
    # Looked at before anything is sent: a key that cannot sign is no reason to leave half of the work done.
    signer = None if sign is None else _Signer(sign, password, public_key_of(sign, password), _as_published(card))
    if dry_run:
        return Published(card.id, repo, None, False, False, _listed(files), readme)
    target = weights_dir() / f"{card.id}.json"
    if not os.access(target.parent, os.W_OK) or not os.access(target, os.W_OK):
        raise PublishError(f"{target} cannot be written, and it has to name the revision; nothing was published")
    before = target.read_bytes()
    token = token or get_token()
    if not token:
        raise PublishError("publishing needs a token: run `hf auth login` or set HF_TOKEN; nothing was published")
    hub = _Repository(HfApi(endpoint=endpoint, token=token), repo, card.id)
    # In a folder that goes in any case. What was verified is what is sent: the weights are not read a second time.
    with tempfile.TemporaryDirectory(prefix="smpconv-publish-") as scratch:
        commit, committed, files = hub.push(files, Path(scratch), signer)
        hub.check(files, commit, Path(scratch) / "read back")
    pinned = _pin(card, Hub(repo, commit), target, before)
    return Published(card.id, repo, commit, committed, pinned, _listed(files), readme)


def _listed(files: dict[str, bytes]) -> tuple[PublishedFile, ...]:
    return tuple(PublishedFile(name, len(data), sha256_of(data)) for name, data in files.items())


def _as_published(card: CheckpointCard) -> CheckpointCard:
    """The card as it is wherever it is read: where the weights lie on this machine, and the revision, are no part."""
    return dataclasses.replace(card, status="embedded" if card.status == "embedded" else "imported", hub=None)


@dataclasses.dataclass(frozen=True)
class _Signer:
    """A private key, and the card that is signed together with its weights."""

    key: Path
    password: str | None
    public_key: bytes
    card: CheckpointCard

    def sign(self, weights: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            bundle = Path(scratch) / SIGNATURE
            sign_files(signed_files(weights, self.card), self.key, bundle, self.password)
            return bundle.read_bytes()

    def made(self, bundle: bytes, weights: bytes) -> bool:
        """Whether a bundle is by this key and holds for these weights and this card."""
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / SIGNATURE).write_bytes(bundle)
            (Path(scratch) / "public.pem").write_bytes(self.public_key)
            try:
                verify_signature(
                    signed_files(weights, self.card), Path(scratch) / SIGNATURE, Path(scratch) / "public.pem"
                )
            except SignatureError:
                return False
            return True


def _organisation(card: CheckpointCard) -> str:
    return ORGANISATION if card.hub is None else card.hub.repo.partition("/")[0]


def _folder(card: CheckpointCard, repo: str) -> dict[str, bytes]:
    """The repository's files, from the card and the verified weights."""
    path = _local_weights(card)
    tensors, metadata = read_safetensors(path, card.files[0].sha256)
    weights = path.read_bytes()
    if sha256_of(weights) != card.files[0].sha256:
        raise CheckpointError(f"{path} changed while it was read; nothing was published")
    if len(weights) != card.files[0].bytes:
        raise CheckpointError(f"{path} has {len(weights):,} bytes, its card says {card.files[0].bytes:,}")
    model = create_on_meta(check_network_name(card.network), **card.arguments)
    match_state_dict(tensors, model)
    parameters = sum(p.numel() for p in model.parameters())
    if (len(tensors), parameters) != (card.tensors, card.parameters):
        raise CardError(
            f"the card of {card.id} says {card.tensors} tensors and {card.parameters:,} parameters, its weights are "
            f"{len(tensors)} and {parameters:,}"
        )
    return {
        WEIGHTS: weights,
        CONFIG: _config(card),
        CARD: card_bytes(_as_published(card)),
        README: model_card(card, repo, metadata).encode(),
    }


def _local_weights(card: CheckpointCard) -> Path:
    if not card.files:
        raise CheckpointError(f"the weights of {card.id} are not here: run `smpconv-zoo import {card.id}` first")
    places = (weights_dir() / card.files[0].name, imported_file(card))
    for path in places:
        if path.is_file():
            return path
    raise CheckpointError(f"the weights of {card.id} are not here: {' and '.join(map(str, places))} do not exist")


def _config(card: CheckpointCard) -> bytes:
    """The file by which timm builds the network for ``hf-hub:``."""
    model = timm.create_model(card.id, device=torch.device("meta"), **card.arguments)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG
        save_config_for_hf(model, str(path), model_args=card.arguments)
        return path.read_bytes() + b"\n"


def _pin(card: CheckpointCard, hub: Hub, target: Path, before: bytes) -> bool:
    """Name the revision in the package's card; whether that changed it."""
    status = "embedded" if card.status == "embedded" else "published"
    after = card_bytes(dataclasses.replace(card, status=status, hub=hub))
    if after == before:
        return False
    done = f"{hub.repo} is published at {hub.revision}"
    if target.read_bytes() != before:
        raise PublishError(f"{done}, but {target} changed meanwhile and was left as it is; run the command again")
    try:
        write_whole(target, after)
    except OSError as error:
        raise PublishError(
            f"{done}, but {target} cannot be written ({error.strerror}); run the command again"
        ) from error
    return True


@dataclasses.dataclass(frozen=True)
class _State:
    """A repository as it was seen: the commit of its main branch and that commit's files by path."""

    commit: str
    files: dict[str, RepoFile]

    def holds(self, path: str, data: bytes) -> bool:
        """Whether a file has this content, by the hash that the Hub keeps of it."""
        entry = self.files.get(path)
        if entry is None or entry.size != len(data):
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == sha256_of(data)
        return entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Repository:
    """A repository on the Hub, seen by someone with a token."""

    api: HfApi
    name: str
    checkpoint_id: str

    def push(
        self, files: dict[str, bytes], scratch: Path, signer: _Signer | None
    ) -> tuple[str, bool, dict[str, bytes]]:
        """Bring the main branch to hold ``files``, in one commit.

        Returns:
            That commit, whether it was made here, and the files that it holds, with the signature if there is one.
        """
        folder = scratch / "push"
        folder.mkdir()
        made: bytes | None = None
        sent = False
        trouble: BaseException | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_SECONDS)
            # Every attempt looks first. A commit whose answer was lost is found; one by somebody else is not undone.
            try:
                state = self._state() or self._create()
                self._refuse_foreign(state, scratch / f"card {attempt}")
                old = self._signature(state, files, scratch / f"signature {attempt}")
                wanted = dict(files)
                if signer is None:
                    # Who publishes without a key leaves a signature that still fits, and no other.
                    wanted |= {} if old is None else {SIGNATURE: old}
                elif old is not None and signer.made(old, files[WEIGHTS]):
                    wanted[SIGNATURE] = old
                else:
                    # Made once: every signature differs, and a commit whose answer was lost has to be found again.
                    made = made or signer.sign(files[WEIGHTS])
                    wanted[SIGNATURE] = made
                changed = [name for name, data in wanted.items() if not state.holds(name, data)]
                stale = SIGNATURE in state.files and SIGNATURE not in wanted
                if not changed and not stale:
                    return state.commit, sent, wanted
                sent = True
                for name in changed:
                    (folder / name).write_bytes(wanted[name])
                done = self.api.create_commit(
                    self.name,
                    [
                        *(CommitOperationAdd(name, folder / name) for name in changed),
                        *([CommitOperationDelete(SIGNATURE)] if stale else []),
                    ],
                    commit_message=f"Publish {self.checkpoint_id} with smpconv_zoo {__version__}",
                    parent_commit=state.commit,
                )
                return done.oid, True, wanted
            except CheckpointError:
                raise
            except CLIENT_ERRORS as error:
                trouble = error
                if not _may_pass(error):
                    break
        assert trouble is not None
        raise PublishError(self._sentence(trouble)) from trouble

    def _signature(self, state: _State, files: dict[str, bytes], cache: Path) -> bytes | None:
        """The signature that is there, if what it signs is what is pushed."""
        if SIGNATURE not in state.files or not all(state.holds(name, files[name]) for name in (WEIGHTS, CARD)):
            return None
        return self._download(SIGNATURE, state.commit, cache)

    def check(self, files: dict[str, bytes], commit: str, cache: Path) -> None:
        """Read every file of a commit into an empty cache and compare it bit for bit."""
        for name, data in files.items():
            try:
                read = self._download(name, commit, cache)
            except CLIENT_ERRORS as error:
                raise PublishError(
                    f"{self.name} is at {commit}, but {name} could not be read back ({_first_line(error)}); the card "
                    "was left as it was; run the command again"
                ) from error
            if read != data:
                raise PublishError(
                    f"{self.name} at {commit} gives back another {name}: its sha256 is {sha256_of(read)}, that of what "
                    f"was pushed {sha256_of(data)}; the card was left as it was"
                )

    def _download(self, name: str, commit: str, cache: Path) -> bytes:
        path = hf_hub_download(
            self.name, name, revision=commit, cache_dir=cache, endpoint=self.api.endpoint, token=self.api.token
        )
        return Path(path).read_bytes()

    def _state(self) -> _State | None:
        """What is there now; None if there is no such repository, or none that this token may see."""
        try:
            commit = self.api.model_info(self.name).sha
        except hub_errors.RepositoryNotFoundError:
            return None
        if commit is None:
            raise PublishError(f"the Hub names no commit of {self.name}; nothing was changed")
        entries = self.api.list_repo_tree(self.name, recursive=True, revision=commit)
        return _State(commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)})

    def _create(self) -> _State:
        self.api.create_repo(self.name, exist_ok=True)
        state = self._state()
        if state is None:
            raise PublishError(f"{self.name} was created, but this token may not read it; nothing was published")
        return state

    def _refuse_foreign(self, state: _State, cache: Path) -> None:
        """Stop unless the repository is empty or holds this checkpoint, published earlier."""
        there = set(state.files) - {ATTRIBUTES}
        if not there:
            return
        foreign = sorted(there - {WEIGHTS, CONFIG, CARD, README, SIGNATURE})
        owner = None
        if CARD in there:
            try:
                owner = json.loads(self._download(CARD, state.commit, cache)).get("id")
            except (ValueError, AttributeError):
                foreign.append(CARD)
        if not foreign and owner == self.checkpoint_id:
            return
        found = ", ".join(foreign or sorted(there))
        whose = f"the checkpoint {owner}" if owner not in (None, self.checkpoint_id) else f"other content ({found})"
        raise PublishError(f"{self.name} exists and holds {whose}; nothing was changed there")

    def _sentence(self, error: BaseException) -> str:
        status = _status(error)
        if status == 401:
            return (
                "the Hub does not accept the token: run `hf auth login`, or set HF_TOKEN to one that may write; "
                "nothing was published"
            )
        if status == 403:
            return f"the token has no right to write to {self.name}; nothing was published (--org names another place)"
        if status == 412:
            return f"others keep committing to {self.name}; nothing of theirs was replaced, nothing was published"
        return (
            f"{self.name} could not be published ({_first_line(error)}); nothing there was half replaced: run the "
            "command again"
        )


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: BaseException) -> bool:
    """Whether looking again can help: no answer, a fault of the server, or a commit of somebody else (412)."""
    status = _status(error)
    return status is None or status == 412 or status >= 500


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
