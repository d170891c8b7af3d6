"""From an entrypoint's arguments to a network, with verified weights if asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import timm
import torch
from timm.layers import ClassifierHead
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    register_notrace_function,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from smpconv_zoo.models.sizes import input_at, maker, per_stage, size_arguments
from smpconv_zoo.pretrained.cards import CheckpointCard, checkpoint_card, list_checkpoints, weights_dir
from smpconv_zoo.pretrained.home import imported_card, imported_file
from smpconv_zoo.pretrained.hub import WEIGHTS_NAME
from smpconv_zoo.pretrained.locate import load_folder, load_repository, load_weights
from smpconv_zoo.pretrained.remap import remap_reference_state_dict
from smpconv_zoo.pretrained.store import CheckpointError, read_checkpoint
from smpconv_zoo.resolution import resample_state_dict

__all__ = [
    "IMAGE_POOLS",
    "PAPER",
    "ImageHead",
    "build_smpconv",
    "check_arguments",
    "check_head",
    "check_input",
    "checkpoint_arguments",
    "checkpoint_cfgs",
    "create_on_meta",
    "match_state_dict",
    "per_stage",
    "recompute",
]

# What timm's ClassifierHead pools by.
IMAGE_POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")

ModelT = TypeVar("ModelT", bound=nn.Module)

PAPER = {
    "license": "mit",
    "paper_ids": "arXiv:2304.02330",
    "paper_name": "SMPConv: Self-moving Point Representations for Continuous Convolution",
    "origin_url": "https://github.com/sangnekim/SMPConv",
}


class ImageHead(ClassifierHead):
    """timm's classifier head; merging a network for inference turns its dropout off."""

    def reparameterize(self) -> None:
        """Nothing to fold; into eval mode."""
        self.eval()


def checkpoint_cfgs(network: str, cfg: dict[str, Any], default_tag: str | None = "") -> dict[str, dict[str, Any]]:
    """timm's default cfgs of a network, one for each checkpoint that has a card.

    The default comes first, then those whose weights are at hand or on the Hub; ``timm.list_pretrained`` lists these.
    With a ``default_tag`` of None the network's bare name stands for no checkpoint: it is built for data of one's own.
    """
    cards = [checkpoint_card(name) for name in list_checkpoints() if name.startswith(f"{network}.")]
    sources = {card.id: _weight_source(card) for card in cards}
    cards.sort(key=lambda card: (card.tag != default_tag, card.status != "embedded", not sources[card.id]))
    if not cards:
        return {network: cfg}
    cfgs = {card.id: {**cfg, **_card_cfg(card, cfg), **sources[card.id]} for card in cards}
    # By the star timm knows a default, even one without weights.
    return cfgs if default_tag is not None else {**cfgs, f"{network}.*": cfg}


def checkpoint_arguments(network: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an entrypoint, behind those by which the card of the checkpoint that they name builds the network.

    For networks whose checkpoints differ in size; the user's arguments stand.
    """
    tag = arguments.get("pretrained_cfg")
    if not isinstance(tag, str) or f"{network}.{tag}" not in list_checkpoints():
        return arguments
    return {**checkpoint_card(f"{network}.{tag}").arguments, **arguments}


def _card_cfg(card: CheckpointCard, cfg: dict[str, Any]) -> dict[str, Any]:
    """What a card says of the input, the classes and the data, where the network's own cfg says otherwise."""
    entries: dict[str, Any] = {"license": card.license.lower(), "description": f"{card.data.name}, {card.data.input}"}
    if "num_classes" in card.arguments:
        entries["num_classes"] = card.arguments["num_classes"]
    channels, height, width = cfg["input_size"]
    if height == 1:
        # A sequence is as long as the kernels, if the card has no longer one.
        width = card.arguments.get("kernel_size", width) if card.golden is None else card.golden.shape[-1]
    entries["input_size"] = (card.arguments.get("in_chans", channels), height, width)
    if card.scaling is not None:
        entries |= {"mean": card.scaling.mean, "std": card.scaling.std}
    return entries


def _weight_source(card: CheckpointCard) -> dict[str, Any]:
    """By these entries timm knows that there are weights; what is loaded is decided anew at every load."""
    if card.status == "embedded":
        return {"file": str(weights_dir() / card.files[0].name)}
    try:
        imported = imported_card(card.id)
        if imported is not None:
            return {"file": str(imported_file(imported))}
    except (OSError, ValueError, RuntimeError):
        # A damaged store, or a user without a home: the package has to import; a load from the store will complain.
        pass
    return {"hf_hub_id": f"{card.hub.repo}@{card.hub.revision}"} if card.hub is not None else {}


def build_smpconv(model_cls: type[ModelT], variant: str, pretrained: bool, **kwargs: Any) -> ModelT:
    """Build ``variant`` through timm.

    All weights (a checkpoint's, a repository's, a folder's, the user's file) are read and checked here, converted if
    they bear the authors' names, and compared with the network key by key; timm then adapts classifier and input
    channels as for any of its networks.

    ``img_size`` (an integer, or height and width), or for sequences ``length`` or ``sample_rate`` (new samples for one
    old one), reads the kernels off at another grid than that of the network's own input size, with or without weights;
    see :mod:`smpconv_zoo.resolution`. With weights, ``kernel_size`` or ``kernel_sizes`` other than theirs do so too:
    the same kernels, -1 to +1, by so many taps.

    Raises:
        CheckpointError: ``pretrained`` and no weights at hand, or weights that do not fit.
        ValueError: A size or rate that is none, or two that say the same.
        RuntimeError: A tag that the network does not have; the message lists those it has.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    pretrained_cfg = kwargs.pop("pretrained_cfg", None)
    if isinstance(pretrained_cfg, str):
        tags = [name.partition(".")[2] for name in timm.list_models(f"{variant}.*", include_tags=True)]
        if pretrained_cfg and pretrained_cfg not in tags:
            there = ", ".join(tags) or "none"
            raise RuntimeError(f"{variant} has no checkpoint tag {pretrained_cfg!r}; its tags are: {there}")
    source = None
    asked = {name: size for name in size_arguments(model_cls) if (size := kwargs.pop(name, None)) is not None}
    make: Callable[..., ModelT] = maker(model_cls)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    if "input_size" not in overlay and "length" in size_arguments(model_cls) and "kernel_size" in kwargs:
        overlay["input_size"] = (*cfg.input_size[:2], _sequence_length(variant, cfg, kwargs))
        cfg = dataclasses.replace(cfg, input_size=overlay["input_size"])
    ratio = None
    if asked:
        ratio, input_entries = input_at(cfg.to_dict(), **asked)
        make = maker(model_cls, ratio)
        overlay |= input_entries
    if pretrained and not cfg.state_dict:
        # timm would read a cfg's own repository or folder itself, before it looks at the weights given to it.
        source = cfg.source
        weights = _load_weights(variant, cfg, overlay, kwargs.get("cache_dir"))
        overlay |= {"state_dict": weights, "source": None, **_classes_of_file(weights, cfg, overlay, kwargs)}
        # Of a saved network timm says what it was built with. Where that was another size, so are the kernels' sizes.
        saved = kwargs.get("pretrained_model_args") or {}
        resized = any(name in saved for name in size_arguments(model_cls))
        make = maker(model_cls, ratio, None if resized else remap_reference_state_dict(weights))
    model: ModelT = build_model_with_cfg(
        make,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=match_state_dict,
        feature_cfg={"out_indices": tuple(range(_depth(model_cls, kwargs))), "feature_cls": "getter"},
        **kwargs,
    )
    # timm keeps the cfg with the network; the weights that came with it are in the network already.
    own: Any = model.pretrained_cfg
    own.pop("state_dict", None)
    if source:
        own["source"] = source
    return model


def _sequence_length(variant: str, cfg: Any, arguments: dict[str, Any]) -> int:
    """Of the sequences of a network whose kernels have the ``kernel_size`` asked for: no other argument says how long.

    As long as the kernels, unless those of the weights are shorter than their sequences: then in their proportion.
    """
    taps: int = arguments["kernel_size"]
    known = arguments.get("pretrained_model_args") or {}
    if any(known.get(name) is not None for name in ("length", "sample_rate")):
        return taps
    if not known and cfg.tag and f"{variant}.{cfg.tag}" in list_checkpoints():
        known = checkpoint_card(f"{variant}.{cfg.tag}").arguments
    return max(1, round(cfg.input_size[-1] * taps / known["kernel_size"])) if "kernel_size" in known else taps


def _depth(model_cls: type[nn.Module], arguments: dict[str, Any]) -> int:
    """Stages or blocks of a network, one for each entry of ``dims``."""
    return len(arguments.get("dims", inspect.signature(model_cls).parameters["dims"].default))


def _classes_of_file(
    weights: dict[str, Tensor], cfg: Any, overlay: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    """The cfg's number of classes, put right for a file of the user's.

    timm drops a classifier unless the cfg has as many classes as the network, and the cfg is of other weights.
    """
    if not overlay.get("file") or "num_classes" in overlay:
        return {}
    classifier = remap_reference_state_dict(weights).get(f"{cfg.classifier}.weight")
    asked = arguments.get("num_classes")
    return {"num_classes": asked} if classifier is not None and classifier.size(0) == asked else {}


def _load_weights(variant: str, cfg: Any, overlay: dict[str, Any], cache_dir: Any) -> dict[str, Tensor]:
    """Verified weights from where a resolved cfg says that they are."""
    if cfg.source == "local-dir":
        return load_folder(cfg.file, variant).tensors
    if cfg.source == "hf-hub" or overlay.get("hf_hub_id"):
        return _load_repository(variant, cfg, cache_dir)
    if overlay.get("file"):
        return read_checkpoint(overlay["file"])
    checkpoint = f"{variant}.{cfg.tag}" if cfg.tag else variant
    if checkpoint in list_checkpoints():
        registered: Any = timm.get_pretrained_cfg(checkpoint)
        if (cfg.file, cfg.hf_hub_id, cfg.url) == (registered.file, registered.hf_hub_id, registered.url):
            return load_weights(checkpoint_card(checkpoint), cache_dir).tensors
    if cfg.file:
        return read_checkpoint(cfg.file)
    if cfg.hf_hub_id:
        return _load_repository(variant, cfg, cache_dir)
    if cfg.url:
        raise CheckpointError(
            f"nothing vouches for {cfg.url}: download it and pass pretrained_cfg_overlay=dict(file=...)"
        )
    tagged = [name for name in list_checkpoints() if name.startswith(f"{variant}.")]
    raise CheckpointError(
        f"there are no pretrained weights for {variant}; create it with pretrained=False and train it"
        + (f", or name one of {', '.join(tagged)}" if tagged else "")
    )


def _load_repository(variant: str, cfg: Any, cache_dir: Any) -> dict[str, Tensor]:
    if cfg.hf_hub_filename not in (None, WEIGHTS_NAME):
        raise CheckpointError(f"only {WEIGHTS_NAME} is loaded from a repository, not {cfg.hf_hub_filename}")
    repo, _, revision = cfg.hf_hub_id.partition("@")
    return load_repository(repo, revision or None, variant, cache_dir).tensors


def match_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names and in the shapes of ``model``.

    The classifier may be missing or of another size where the model has other classes than the weights, and the input
    layers are adapted where it has other input channels. Kernels of the same points at another spacing of taps are
    read off at the model's, see :func:`smpconv_zoo.resolution.resample_state_dict`. Everything else has to fit exactly.

    Raises:
        CheckpointError: Missing, unexpected or mis-shaped keys, by name.
    """
    state_dict = resample_state_dict(remap_reference_state_dict(state_dict), model)
    cfg = getattr(model, "pretrained_cfg", {})
    classifier = cfg.get("classifier") or "head.fc"
    first_conv = cfg.get("first_conv") or ()
    inputs = (first_conv,) if isinstance(first_conv, str) else tuple(first_conv)
    own = model.state_dict()
    in_chans = getattr(model, "in_chans", None)
    other_classes = getattr(model, "num_classes", None) != cfg.get("num_classes")

    def free(name: str) -> bool:
        return other_classes and name.startswith(f"{classifier}.")

    missing = [name for name in own if name not in state_dict and not free(name)]
    unexpected = sorted(name for name in state_dict if name not in own and not free(name))
    if missing or unexpected:
        raise CheckpointError(
            f"these weights are not of this network: missing keys {_some(missing)}, unexpected keys {_some(unexpected)}"
        )
    out = {}
    for name, tensor in state_dict.items():
        expected = own[name].shape if name in own else tensor.shape
        if name in own and tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(f"{name} holds {tensor.dtype}, the network expects {own[name].dtype}")
        if tensor.shape != expected and not free(name):
            adaptable = name.removesuffix(".weight") in inputs and name.endswith(".weight")
            if not (adaptable and tensor.dim() == len(expected) and in_chans is not None):
                raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, the network expects {tuple(expected)}")
            if tensor.dim() != 4:
                # timm adapts 4-dimensional stems; kernels of points and 1-D kernels are adapted in the same way here.
                flat = tensor.flatten(2).unsqueeze(-1)
                adapted = adapt_input_conv(in_chans, flat, base_chans=tensor.size(1))
                tensor = adapted.squeeze(-1).reshape(expected)
        out[name] = tensor
    return out


def _some(names: Sequence[str], limit: int = 5) -> str:
    if not names:
        return "none"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_arguments(
    in_chans: int,
    num_classes: int,
    global_pool: str,
    drop_rate: float,
    drop_path_rate: float,
    pools: Sequence[str],
    **sizes: int | Sequence[int],
) -> None:
    """Refuse arguments that no network can be built from, by name and value.

    Raises:
        ValueError: One of them.
    """
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    check_head(num_classes, global_pool, pools)
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")
    for name, size in sizes.items():
        entries = (size,) if isinstance(size, int) else tuple(size)
        if not entries or min(entries) < 1:
            raise ValueError(f"{name} must be at least 1 throughout, got {size}")


def check_head(num_classes: int, global_pool: str, pools: Sequence[str]) -> None:
    """Refuse a head that cannot be built, as :func:`check_arguments` does."""
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
    if global_pool not in pools:
        raise ValueError(f"global_pool must be one of {tuple(pools)}, got {global_pool!r}")
    if global_pool == "" and num_classes > 0:
        raise ValueError("a classifier needs pooling: global_pool='' goes with num_classes=0")


def check_input(x: Tensor, layout: str, channels: int) -> Tensor:
    """``x`` as it is, if it has one axis for each letter of ``layout`` ("NCHW", "NCL") and that many channels.

    Said here in the network's terms: PyTorch would take a missing batch axis for an unbatched image, and complain of
    a weight that the caller has never seen.
    """
    if torch.jit.is_scripting():
        return x
    else:
        if x.dim() != len(layout) or x.size(1) != channels or 0 in x.shape[2:]:
            raise ValueError(
                f"expected an input ({', '.join(layout)}) with C = {channels} channels, got shape {tuple(x.shape)}"
            )
        return x


# torch.fx cannot follow the comparison; it keeps the call as one node.
register_notrace_function(check_input)


def sample_shape(model: nn.Module) -> tuple[int, ...]:
    """Shape of one input of a network made by its entrypoint: ``(C, H, W)``, or ``(C, L)`` for a sequence network."""
    net: Any = model
    _, height, width = net.pretrained_cfg["input_size"]
    return (net.in_chans, width) if getattr(model, "output_fmt", "NCHW") == "NCL" else (net.in_chans, height, width)


def recompute(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)`` whose activations are computed again in the backward pass instead of being kept.

    Batch norms take note of a batch once, not once more when it comes by again.
    """
    if torch.compiler.is_compiling():
        # A compiled graph computes again what it needs, without the notes.
        return checkpoint(block, x, use_reentrant=False)

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), _unnoted(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _unnoted(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def create_on_meta(network: str, **arguments: Any) -> nn.Module:
    """A network without memory for its weights: names, shapes and structure only."""
    return timm.create_model(network, device=torch.device("meta"), **arguments)
