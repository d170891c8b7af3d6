"""What has to travel with a network that leaves the zoo: where its weights come from, its input, its classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from smpconv_zoo._version import __version__
from smpconv_zoo.checkpoints import check_network_name, create_model
from smpconv_zoo.data.classes import class_names
from smpconv_zoo.data.protocol import pixel_permutation
from smpconv_zoo.files import sha256_of_file
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained import hub
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, list_checkpoints, load_card, parse
from smpconv_zoo.pretrained.home import card_in_use
from smpconv_zoo.pretrained.locate import load_weights

__all__ = ["Description", "Preprocessing", "describe", "load_described"]

# Data sets of pictures that sequence networks take pixel by pixel, row by row: their height and width.
_PIXELS = {"mnist5k": (28, 28), "MNIST": (28, 28), "CIFAR-10": (32, 32)}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a file to the input of a network.

    ``input_size`` is that of one sample: ``(C, H, W)`` for ``kind`` ``"image"``, ``(C, L)`` for ``"sequence"``. Of
    every channel ``mean`` is subtracted, then it is divided by ``std``; pictures are in [0, 1] before that, sequences
    in their own unit. ``interpolation``, ``crop_pct`` and ``crop_mode`` are timm's, None for sequences. Where the
    sequence is the pixels of a picture, ``pixels`` is (height, width) of that picture, read row by row; with ``order``
    position j of the sequence is value ``order[j]`` of what was read.
    """

    kind: str
    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str | None
    crop_pct: float | None
    crop_mode: str | None
    pixels: tuple[int, ...] | None
    order: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class Description:
    """A network, where its weights come from, and what its input and output mean.

    ``network`` and ``arguments`` build it. ``checkpoint`` is the card's id, or the repository on the Hub of weights
    without a card; None for a folder without one and for random weights. ``weights_sha256`` is that of the weight file,
    None for random weights. ``classes`` are names in the order of the logits, None where nobody names them.
    ``version`` is that of this package.
    """

    network: str
    arguments: dict[str, Any]
    checkpoint: str | None
    weights_sha256: str | None
    license: str | None
    num_classes: int
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    version: str

    def to_json(self) -> str:
        """As JSON, for :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Description:
        """The description that :meth:`to_json` wrote.

        Raises:
            ValueError: It is none, or it contradicts itself.
        """
        description: Description = parse(cls, json.loads(text), "description")
        description.check()
        return description

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ValueError: By name, what does not fit.
        """
        preprocessing = self.preprocessing
        axes = {"image": 3, "sequence": 2}.get(preprocessing.kind)
        size, statistics = preprocessing.input_size, (preprocessing.mean, preprocessing.std)
        if axes is None or len(size) != axes or min(size) < 1:
            raise ValueError(f"an input of kind {preprocessing.kind!r} has no size {size}")
        if any(len(values) != size[0] for values in statistics) or not all(preprocessing.std):
            raise ValueError(f"mean and std are one number a channel, std is not 0: {size[0]} channels, {statistics}")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names for {self.num_classes} classes")
        pixels, order = preprocessing.pixels, preprocessing.order
        if pixels is not None and (len(pixels) != 2 or pixels[0] * pixels[1] != size[-1]):
            raise ValueError(f"a picture of {pixels} pixels is no sequence of {size[-1]}")
        if order is not None and sorted(order) != list(range(size[-1])):
            raise ValueError(f"the order is no permutation of {size[-1]} positions")


def load_described(
    name: str, untrained: bool = False, arguments: dict[str, Any] | None = None
) -> tuple[nn.Module, Description]:
    """A network, in float32 and eval mode on the CPU, and its description.

    Args:
        name: A checkpoint as ``network.tag``, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``; with ``untrained`` a network.
        untrained: Take random weights. Without it a bare network's name is refused: they must not pass for trained.
        arguments: Arguments of the network, where they differ from the entrypoint's or the card's.

    Raises:
        ValueError: No such checkpoint or network, or arguments that it does not take.
        CheckpointError: The weights are not at hand, or not those declared.
    """
    arguments = arguments or {}
    from_elsewhere = name.partition(":")[0] in ("hf-hub", "local-dir")
    card: CheckpointCard | None = None
    if not from_elsewhere and not untrained:
        network, _, tag = name.partition(".")
        if not tag:
            check_network_name(network)
            near = [checkpoint for checkpoint in list_checkpoints() if checkpoint.startswith(f"{network}.")]
            raise CardError(
                f"{name} is a network without weights: name a checkpoint ({', '.join(near) or 'it has none'}), or ask "
                "for random weights with --untrained (untrained=True)"
            )
        card = card_in_use(name)
        arguments = {**card.arguments, **arguments}
    elif untrained and (from_elsewhere or "." in name):
        raise ValueError(f"{name} names weights: untrained goes with a network's name alone")
    try:
        model = create_model(name, pretrained=not untrained, **arguments).float().eval()
    except TypeError as error:
        raise ValueError(f"{name} cannot be built from the arguments {arguments}: {error}") from error
    if card is not None:
        return model, describe(model, card, arguments, card.id, card.files[0].sha256)
    if not from_elsewhere:
        return model, describe(model, None, arguments)
    card, sha256, repository = _provenance(name)
    checkpoint = repository if card is None else card.id
    return model, describe(
        model, card, arguments if card is None else {**card.arguments, **arguments}, checkpoint, sha256
    )


def describe(
    model: nn.Module,
    card: CheckpointCard | None = None,
    arguments: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    weights_sha256: str | None = None,
) -> Description:
    """The description of a network made by its entrypoint.

    Args:
        model: The network; its ``pretrained_cfg`` says what its input is.
        card: Of its checkpoint, if it has one: says what data it knows, and its licence.
        arguments: Those that it was built with.
        checkpoint: See :class:`Description`.
        weights_sha256: See :class:`Description`.

    Raises:
        ValueError: The parts do not fit each other.
        CheckpointError: The order of the pixels is in the card's weights, which are not at hand.
    """
    net: Any = model
    cfg: dict[str, Any] = net.pretrained_cfg
    names = cfg.get("label_names") or (None if card is None else class_names(card.data.name))
    description = Description(
        network=cfg["architecture"],
        arguments=json.loads(json.dumps(arguments or {})),
        checkpoint=checkpoint,
        weights_sha256=weights_sha256,
        license=cfg.get("license") if card is None else card.license,
        num_classes=net.num_classes,
        classes=tuple(names) if names and len(names) == net.num_classes else None,
        preprocessing=_preprocessing(net, cfg, card),
        version=__version__,
    )
    description.check()
    return description


def _preprocessing(net: Any, cfg: dict[str, Any], card: CheckpointCard | None) -> Preprocessing:
    _, *extent = sample_shape(net)
    config = resolve_data_config(pretrained_cfg=cfg)
    is_image = len(extent) == 2
    pixels, order = (None, None) if card is None or is_image else _order_of_pixels(card)
    return Preprocessing(
        kind="image" if is_image else "sequence",
        input_size=(net.in_chans, *extent),
        mean=_per_channel(config["mean"], net.in_chans),
        std=_per_channel(config["std"], net.in_chans),
        interpolation=config["interpolation"] if is_image else None,
        crop_pct=float(config["crop_pct"]) if is_image else None,
        crop_mode=config["crop_mode"] if is_image else None,
        pixels=pixels,
        order=order,
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number a channel; a network with other input channels than its cfg gets their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _order_of_pixels(card: CheckpointCard) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Height and width of the picture whose pixels are the sequence, and their order if it is not row by row."""
    if card.data.input not in ("sequence", "permuted sequence"):
        return None, None
    pixels = _PIXELS.get(card.data.name)
    if card.data.input == "sequence":
        return pixels, None
    stored = load_weights(card).metadata.get("permutation")
    # The authors publish no order: theirs is drawn as by their code.
    return pixels, tuple(map(int, pixel_permutation() if stored is None else json.loads(stored)))


def _provenance(name: str) -> tuple[CheckpointCard | None, str, str | None]:
    """Of weights in a repository or folder that have just been loaded: card or None, sha256, name of the repository.

    The card is the one beside them, or else the package's of the very same file.
    """
    source, _, place = name.partition(":")
    beside: Path | None
    if source == "local-dir":
        repository, weights, beside = None, Path(place, hub.WEIGHTS_NAME), Path(place, hub.CARD_NAME)
    else:
        repo, _, revision = place.partition("@")
        commit = hub.commit_of(repo, revision or "main")
        repository, beside = f"hf-hub:{repo}@{commit}", hub.cached(repo, commit, hub.CARD_NAME)
        # In the client's cache: the load has put them there.
        weights, _ = hub.fetch(repo, commit, hub.WEIGHTS_NAME, "load it again")
    sha256 = sha256_of_file(weights)
    if beside is not None and beside.is_file():
        return load_card(beside), sha256, repository
    cards = (card_in_use(checkpoint) for checkpoint in list_checkpoints())
    return next((card for card in cards if card.files and card.files[0].sha256 == sha256), None), sha256, repository
