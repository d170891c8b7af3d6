"""Whether a checkpoint is what its card says, step by step: hash, structure, strict load, golden logits, signature."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from smpconv_zoo.checkpoints import check_network_name
from smpconv_zoo.evaluation.golden import golden_error
from smpconv_zoo.models.build import create_on_meta, sample_shape
from smpconv_zoo.pretrained import hub
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.errors import CheckpointError
from smpconv_zoo.pretrained.home import imported_card, imported_file, list_imported
from smpconv_zoo.pretrained.signing import card_beside, require_signature, signature_beside, trusted_key
from smpconv_zoo.pretrained.store import embedded_file, sha256_of
from smpconv_zoo.pretrained.structure import check_structure

__all__ = ["GOLDEN_TOLERANCE", "STEPS", "Step", "failed", "find", "verify", "verify_all"]

STEPS = ("hash", "structure", "load", "golden", "signature")

# Largest difference from the golden logits, over the largest golden logit: another processor or version of PyTorch
# rounds otherwise, other weights are far off.
GOLDEN_TOLERANCE = 1e-4

# Golden inputs are a few samples. A card that asks for more asks for the reader's memory.
MAX_GOLDEN_SAMPLES = 64
# Of kernels, a golden sequence.
LONGEST_GOLDEN = 16


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: ``ok`` is True, False, or None where it was skipped; ``message`` says what was found, or why not."""

    name: str
    ok: bool | None
    message: str


class _SkippedError(Exception):
    """A step that cannot be taken, and why."""


class _Checkpoint:
    """A weight file on its way through the steps; each needs what those before it found."""

    def __init__(self, weights: Path, card: CheckpointCard | None) -> None:
        self.weights = weights
        self.maybe_card = card
        self.data = weights.read_bytes()
        self.tensors: dict[str, Tensor] = {}
        self.model: nn.Module

    @property
    def card(self) -> CheckpointCard:
        if self.maybe_card is None:
            raise _SkippedError("there is no card beside the file to compare with")
        return self.maybe_card

    def hash(self) -> str:
        declared, actual = self.card.files[0], sha256_of(self.data)
        if len(self.data) != declared.bytes:
            raise CheckpointError(f"the file has {len(self.data):,} bytes, the card declares {declared.bytes:,}")
        if actual != declared.sha256:
            raise CheckpointError(f"sha256 is {actual}, the card declares {declared.sha256}")
        return f"{len(self.data):,} bytes, sha256 {actual}"

    def structure(self) -> str:
        count = len(check_structure(self.data))
        # The header is sound, so all that can still differ is that PyTorch lacks one of the types.
        self.tensors = safetensors.torch.load(self.data)
        for name, tensor in self.tensors.items():
            # PyTorch cannot look for NaN in all of its 8-bit types.
            if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
                raise CheckpointError(f"{name} holds NaN or Inf")
        if self.maybe_card is not None and count != self.card.tensors:
            raise CheckpointError(f"the file holds {count} tensors, the card declares {self.card.tensors}")
        return f"{count} tensors, finite, without gap or overlap"

    def load(self) -> str:
        card = self.card
        check_network_name(card.network)
        try:
            # Without memory first: what a card asks for may be of any size, what fits the file may not.
            planned = create_on_meta(card.network, **card.arguments)
        except Exception as error:
            raise CheckpointError(f"{card.network} cannot be built from {card.arguments}: {error}") from error
        _fits(self.tensors, planned.state_dict())
        parameters = sum(p.numel() for p in planned.parameters())
        if parameters != card.parameters:
            raise CheckpointError(f"the network has {parameters:,} parameters, the card declares {card.parameters:,}")
        self.model = timm.create_model(card.network, pretrained=False, **card.arguments)
        self.model.load_state_dict(self.tensors, strict=True)
        return f"{parameters:,} parameters of {card.network}, every key and shape"

    def golden(self) -> str:
        golden = self.card.golden
        if golden is None:
            raise _SkippedError("the card has no golden logits")
        expected = sample_shape(self.model)
        rows = {len(row) for row in golden.logits}
        samples = golden.shape[0] if golden.shape else 0
        drawable = 0 <= golden.seed < 1 << 32 and 1 <= samples <= MAX_GOLDEN_SAMPLES
        # Sequences may be longer than the kernels, by which the network is built.
        fits = golden.shape[1:] == expected
        if not fits and len(expected) == 2 and golden.shape[1:2] == expected[:1] and len(golden.shape) == 3:
            fits = expected[1] < golden.shape[2] <= LONGEST_GOLDEN * expected[1]
        if not drawable or not fits or len(golden.logits) != samples or len(rows) != 1:
            raise CheckpointError(f"the card's golden input, seed {golden.seed} and shape {golden.shape}, is no input")
        error = golden_error(self.model, golden)
        # Written so that NaN fails.
        if not error <= GOLDEN_TOLERANCE:
            raise CheckpointError(f"logits differ from the card's by {error:.1e}, over {GOLDEN_TOLERANCE:.0e}")
        return f"{samples} samples, relative difference {error:.1e}"

    def signature(self, required: bool, public_key: Path | None) -> str:
        key = public_key or trusted_key()
        if not required and not signature_beside(self.weights).is_file():
            raise _SkippedError("it is not signed")
        if not required and key is None:
            raise _SkippedError("no trusted key: give --public-key or set SMPCONV_PUBLIC_KEY")
        require_signature(self.weights, key, self.data)
        return f"signed by the owner of {key}"


def verify(
    id_or_path: str | Path, signature: Literal["auto", "require"] = "auto", public_key: Path | None = None
) -> list[Step]:
    """Check a checkpoint against its card, all offline.

    After a step that fails the rest are skipped: what they would say of a wrong file means nothing.

    Args:
        id_or_path: Id of an embedded or imported checkpoint, a ``.safetensors`` file with its card beside it
            (``<stem>.json`` or ``card.json``), or a folder with ``model.safetensors`` and ``card.json``. Of a file
            without a card only the structure is checked.
        signature: ``"require"`` takes a checkpoint without a valid signature for a failure, ``"auto"`` checks one that
            is there, if a key is trusted.
        public_key: PEM file of the trusted key; ``SMPCONV_PUBLIC_KEY`` if not given.

    Returns:
        The steps, in the order of STEPS.

    Raises:
        CardError: No such checkpoint, or a malformed card.
        CheckpointError: The checkpoint has no weights at hand, or there is no such file.
        OSError: The file cannot be read.
    """
    checkpoint = _Checkpoint(*find(id_or_path))
    steps: list[Step] = []
    checks: dict[str, Callable[[], str]] = {
        "hash": checkpoint.hash,
        "structure": checkpoint.structure,
        "load": checkpoint.load,
        "golden": checkpoint.golden,
        "signature": functools.partial(checkpoint.signature, signature == "require", public_key),
    }
    for name in STEPS:
        wrong = next((step.name for step in steps if step.ok is False), None)
        steps.append(Step(name, None, f"{wrong} failed") if wrong else _take(name, checks[name]))
    return steps


def verify_all(signature: Literal["auto", "require"] = "auto", public_key: Path | None = None) -> dict[str, list[Step]]:
    """:func:`verify` for every embedded and every imported checkpoint, by id."""
    embedded = [name for name in list_checkpoints() if checkpoint_card(name).status == "embedded"]
    return {name: _verify_or_say(name, signature, public_key) for name in sorted({*embedded, *list_imported()})}


def _verify_or_say(name: str, signature: Literal["auto", "require"], public_key: Path | None) -> list[Step]:
    """:func:`verify`, with a malformed card or an absent file as the first step that fails: it hides no other's."""
    try:
        return verify(name, signature, public_key)
    except (CardError, CheckpointError, OSError) as error:
        first = Step(STEPS[0], False, " ".join(str(error).split()))
        return [first, *(Step(step, None, f"{STEPS[0]} failed") for step in STEPS[1:])]


def failed(steps: list[Step]) -> str | None:
    """Name of the step that failed; None if none did."""
    return next((step.name for step in steps if step.ok is False), None)


def find(id_or_path: str | Path) -> tuple[Path, CheckpointCard | None]:
    """Weight file and card of an id, a weight file or a folder; the card is None where a file has none beside it.

    Raises:
        CardError: No such checkpoint, or a malformed card.
        CheckpointError: The checkpoint has no weights at hand, or there is no such file.
    """
    name, path = str(id_or_path), Path(id_or_path)
    listed, imported = name in list_checkpoints(), name in list_imported()
    if not listed and not imported and (path.exists() or path.name != name or path.suffix == ".safetensors"):
        return _find_file(path)
    if imported and not (listed and checkpoint_card(name).status == "embedded"):
        card = imported_card(name)
        assert card is not None
        return imported_file(card), card
    card = checkpoint_card(name)
    if card.status == "published" and card.hub is not None:
        cached = hub.cached(card.hub.repo, card.hub.revision, hub.WEIGHTS_NAME)
        if cached is None:
            raise CheckpointError(f"{card.id} is on the Hub and was not downloaded yet: load it once, then verify it")
        return cached, card
    return embedded_file(card), card


def _find_file(path: Path) -> tuple[Path, CheckpointCard | None]:
    weights = path / hub.WEIGHTS_NAME if path.is_dir() else path
    if not weights.is_file():
        raise CheckpointError(f"{weights} does not exist")
    if weights.suffix != ".safetensors":
        raise CheckpointError(f"{weights} is no .safetensors file; `smpconv-zoo convert` makes one of a checkpoint")
    card = card_beside(weights)
    if card is not None and not card.files:
        raise CardError(f"the card beside {weights} declares no weight file")
    return weights, card


def _take(name: str, check: Callable[[], str]) -> Step:
    try:
        return Step(name, True, check())
    except _SkippedError as reason:
        return Step(name, None, str(reason))
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        return Step(name, False, " ".join(str(error).split()))


def _fits(tensors: dict[str, Tensor], own: dict[str, Any]) -> None:
    """Refuse a state dict that is not, name by name, shape by shape and type by type, that of the network."""
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"missing keys {', '.join(missing[:5]) or 'none'}, unexpected keys {', '.join(unexpected[:5]) or 'none'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"the network expects {own[name].dtype} of shape {tuple(own[name].shape)}"
            )
