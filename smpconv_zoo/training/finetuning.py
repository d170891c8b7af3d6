"""Fine-tuning on the user's own pictures or sequences, from a folder of them to a network that predicts.

What the data say (classes, channels, length) and a few defaults make a recipe; the engine runs it as any other, and
the weights of the best epoch are saved with the names of the classes, ready for ``predict`` and ``export``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import load_model_config_from_hf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from smpconv_zoo.checkpoints import check_network_name, create_model
from smpconv_zoo.data.classes import class_names
from smpconv_zoo.data.folders import Pictures, check_pictures, open_pictures
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.pretrained.cards import CheckpointCard, Data, Training, list_checkpoints
from smpconv_zoo.pretrained.home import card_in_use
from smpconv_zoo.pretrained.store import CheckpointError, how_to_get, read_safetensors
from smpconv_zoo.training.arrays import ArrayData, Parts, load_parts
from smpconv_zoo.training.engine import EpochLog, Outcome
from smpconv_zoo.training.images import ImageData
from smpconv_zoo.training.recipe import ImageRecipe, SequenceRecipe, make_recipe
from smpconv_zoo.training.run_folder import RunFolder, command_line
from smpconv_zoo.training.running import Run, train
from smpconv_zoo.training.saving import check_place, plain_tag, save_network
from smpconv_zoo.training.world import World

__all__ = ["FREEZES", "NETWORK_FOLDER", "Finetuned", "Start", "finetune", "freeze_", "image_values", "sequence_values"]

FREEZES = {
    "none": "everything learns",
    "stem": "the layers in front of the first block stay as they are",
    "backbone": "everything but the classifier stays as it is",
}
# Where in the folder of a run the network goes.
NETWORK_FOLDER = "network"
NEW_HEAD_STD = 0.01


@dataclasses.dataclass(frozen=True)
class Start:
    """What fine-tuning starts from.

    Args:
        network: Entrypoint.
        name: For :func:`smpconv_zoo.create_model`: a checkpoint's id, a place, or the network's name.
        pretrained: Whether there are weights to start from.
        arguments: Arguments of the entrypoint that belong to the weights.
        classes: Names of the classes that the weights tell apart; None where nobody names them.
    """

    network: str
    name: str
    pretrained: bool
    arguments: dict[str, Any]
    classes: tuple[str, ...] | None

    @property
    def takes_sequences(self) -> bool:
        """Whether the network is one of sequences, not of pictures."""
        model = timm.create_model(self.network, device=torch.device("meta"), **self.arguments)
        return getattr(model, "output_fmt", "NCHW") == "NCL"


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """What came of it.

    Args:
        card: Of the network that was saved.
        folder: Where it is.
        outcome: The epochs.
        classes: Names of the classes, in the order of the logits.
    """

    card: CheckpointCard
    folder: Path
    outcome: Outcome
    classes: tuple[str, ...]

    @property
    def predict_command(self) -> str:
        """What to run next."""
        return f"smpconv-zoo predict local-dir:{self.folder} FILES"


def finetune(
    name: str,
    data_dir: str | Path,
    out: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    pretrained: bool | None = None,
    freeze: str = "none",
    keep_head: bool = False,
    device: str = "cpu",
    workers: int = 4,
    resume: bool = False,
    tracker: str | None = None,
    license: str = "not stated",
    dry_run: bool = False,
    on_recipe: Callable[[SequenceRecipe | ImageRecipe], None] | None = None,
    on_plan: Callable[[dict[str, Any], nn.Module], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[EpochLog], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    on_read: Callable[[int, int], None] | None = None,
) -> Finetuned | None:
    """Fine-tune a network on a folder of class folders. Under ``torchrun`` each process calls this.

    The folder of the run holds what that of any run holds, and ``network``, made by
    :func:`~smpconv_zoo.training.saving.save_network` of the weights of the best epoch (of the last one where nothing
    is set aside to choose by).

    Args:
        name: A network, a checkpoint as ``network.tag``, ``local-dir:PATH`` or ``hf-hub:ORG/NAME``. Of a network's name
            alone the default checkpoint is taken, or random weights where there is none.
        data_dir: Pictures, as :func:`~smpconv_zoo.data.folders.open_pictures` takes them, or .csv and .npy files, as
            :func:`~smpconv_zoo.data.series.load_series` does.
        out: Folder of the run.
        overrides: Fields of the recipe in place of the defaults; ``arguments`` adds to those of the network.
        pretrained: Whether to start from weights; None for wherever there are some.
        freeze: One of :data:`FREEZES`.
        keep_head: Whether to go on with the classifier of the weights, whose classes the data must have.
        device: ``"cpu"``, ``"cuda"``, ...
        workers: Processes that read pictures.
        resume: Go on from the last checkpoint in ``out``.
        tracker: Where metrics go besides.
        license: Of the weights to come, for their card.
        dry_run: Stop before the first step, and before anything is written.
        on_recipe: Called with the recipe, before ``on_plan``.
        on_plan: See :func:`smpconv_zoo.training.running.train`.
        on_step: See there.
        on_epoch: See there.
        on_note: See there.
        on_read: See there.

    Returns:
        What came of it; None of a dry run, and in processes that do not lead.

    Raises:
        FileExistsError: ``out`` holds another run, or a finished one.
        FileNotFoundError: There are no such data.
        ValueError: Something does not fit; nothing was written.
        CheckpointError: No weights to start from (the message says how to get them), or not those declared.
        FloatingPointError: The loss is not finite any more.
        smpconv_zoo.training.engine.Stopped: A signal asked for it; ``resume`` goes on.
    """
    if freeze not in FREEZES:
        raise ValueError(f"freeze must be one of {', '.join(FREEZES)}, got {freeze!r}")
    overrides = dict(overrides or {})
    note = on_note or (lambda sentence: None)
    _check_finished(out)
    start = find_start(name, pretrained)
    if keep_head and not start.pretrained:
        raise ValueError(f"{name} starts from random weights, there is no classifier to keep")
    recipe: SequenceRecipe | ImageRecipe
    opened: Pictures | Parts
    if start.takes_sequences:
        recipe, opened = _sequences(start, Path(data_dir).expanduser(), freeze, overrides, on_read)
    else:
        recipe, opened = _pictures(start, data_dir, freeze, overrides, torch.device(device).type, on_read)
    if keep_head:
        _check_classes(start, opened.classes)
    RunFolder(out).check(recipe, resume)

    def planned(plan: dict[str, Any], model: nn.Module) -> None:
        if not start.pretrained:
            note(f"{start.network} starts from random weights")
        if on_recipe is not None:
            on_recipe(recipe)
        if on_plan is not None:
            on_plan(plan, model)

    def open_(
        _: Any, model: nn.Module, world: World, *__: Any, workers: int = workers, **___: Any
    ) -> ArrayData | ImageData:
        if isinstance(opened, Parts):
            assert isinstance(recipe, SequenceRecipe)
            arrays = ArrayData(recipe, opened, world)
            for sentence in arrays.check(model) if world.leads else ():
                note(sentence)
            return arrays
        assert isinstance(recipe, ImageRecipe)
        return ImageData(recipe, opened, model, world, workers=workers)

    run = train(
        recipe,
        out,
        device=device,
        workers=workers,
        resume=resume,
        tracker=tracker,
        dry_run=dry_run,
        network=lambda _: _start_network(start, recipe, freeze, keep_head),
        open_=open_,
        on_plan=planned,
        on_step=on_step,
        on_epoch=on_epoch,
        on_note=on_note,
    )
    if run is None or not run.leads:
        return None
    return _save(run, recipe, start, out, device, license)


# -------------------------------------------------------------------------------------------------- where to start from


def find_start(name: str, pretrained: bool | None = None) -> Start:
    """What a user means by a name; see :func:`finetune`. No weights are read.

    Raises:
        ValueError: No such network or checkpoint, or weights that are wanted where there cannot be any.
        CheckpointError: No weights at hand (the message says how to get them), or a repository that cannot be read.
    """
    source, _, place = name.partition(":")
    if source in ("local-dir", "hf-hub"):
        if pretrained is False:
            raise ValueError(f"{name} names weights, to start without any give the network's name")
        return _from_elsewhere(name, source, place)
    network = check_network_name(name)
    tag = name.partition(".")[2]
    if pretrained is False and tag:
        raise ValueError(f"{name} names weights, to start without any give the network's name")
    if not tag and pretrained is not False:
        default = timm.get_pretrained_cfg(network)
        tag = "" if default is None else default.tag or ""
    if not tag:
        if pretrained:
            raise ValueError(f"{network} has no checkpoint to start from: leave --pretrained out")
        return Start(network, network, False, {}, None)
    card = card_in_use(f"{network}.{tag}")
    if not card.files:
        raise CheckpointError(f"{how_to_get(card)}; or start from random weights with --no-pretrained")
    return Start(network, card.id, True, dict(card.arguments), class_names(card.data.name))


def _from_elsewhere(name: str, source: str, place: str) -> Start:
    if source == "hf-hub":
        # Says in one sentence what is wrong where the Hub is out of reach.
        create_model(name, pretrained=False, device=torch.device("meta"))
        cfg, network, arguments = load_model_config_from_hf(place)
    else:
        config = Path(place) / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{place} is no folder of a network: it has no config.json")
        content = json.loads(config.read_text(encoding="utf-8"))
        network, arguments = content["architecture"], content.get("model_args", {})
        cfg = {**content["pretrained_cfg"], "label_names": content.get("label_names")}
    return Start(check_network_name(network), name, True, dict(arguments), _names(cfg.get("label_names")))


def _names(names: Any) -> tuple[str, ...] | None:
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def _check_classes(start: Start, classes: tuple[str, ...]) -> None:
    """Whether the classes of the data are those of the weights, in their order."""
    if start.classes is None:
        raise ValueError(f"nobody names the classes of {start.name}: leave --keep-head out for a new classifier")
    if classes == start.classes:
        return
    foreign, missing = sorted(set(classes) - set(start.classes)), sorted(set(start.classes) - set(classes))
    found = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((foreign, "that it does not know"), (missing, "too few"))
        if names
    ]
    raise ValueError(
        f"the labels do not match those of {start.name}: {' and '.join(found) or 'their order is another'}; leave "
        "--keep-head out for a new classifier"
    )


# -------------------------------------------------------------------------------------------------------------- recipes


def image_values(pretrained: bool, samples: int, device_type: str = "cpu") -> dict[str, Any]:
    """Fields of an :class:`ImageRecipe` for a user's pictures, but for network and classes.

    Args:
        pretrained: Whether it starts from weights; otherwise it takes more epochs, all layers at one rate, and stronger
            augmentation.
        samples: Pictures to learn from; a batch takes an eighth of them, and at most 64.
        device_type: ``"cuda"`` for bfloat16.
    """
    values: dict[str, Any] = {
        "data": "pictures",
        "protocol": "sound",
        "epochs": 30,
        "batch_size": _batch(samples, 64),
        "optimizer": "adamw",
        "lr": 5e-4,
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "clip_grad": 5.0,
        "early_stop": 10,
        "dtype": "bfloat16" if device_type == "cuda" else "float32",
        "scale": [0.35, 1.0],
        "smoothing": 0.1,
    }
    if not pretrained:
        values |= {
            "epochs": 100,
            "lr": 1e-3,
            "layer_decay": None,
            "early_stop": 30,
            "auto_augment": "rand-m7-mstd0.5-inc1",
            "erasing": 0.25,
        }
    return values


def sequence_values(pretrained: bool, samples: int) -> dict[str, Any]:
    """Fields of a :class:`SequenceRecipe` for a user's sequences; see :func:`image_values`.

    Args:
        pretrained: Whether it starts from weights.
        samples: Sequences to learn from; a batch takes an eighth of them, and at most 64.
    """
    values: dict[str, Any] = {
        "data": "series",
        "protocol": "sound",
        "input": "sequence",
        "epochs": 50,
        "batch_size": _batch(samples, 64),
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.01,
        "layer_decay": 0.75,
        "early_stop": 15,
    }
    if not pretrained:
        values |= {"epochs": 100, "lr": 2e-3, "layer_decay": None, "early_stop": 30}
    return values


def _batch(samples: int, most: int) -> int:
    """A power of two, so that it can be shared: about an eighth of the samples, at least 2."""
    return max(2, min(most, 2 ** int(math.log2(max(2, samples // 8)))))


def _recipe(
    start: Start, data_dir: str | Path, values: dict[str, Any], arguments: dict[str, Any], overrides: dict[str, Any]
) -> SequenceRecipe | ImageRecipe:
    extra = overrides.get("arguments") or {}
    if not isinstance(extra, dict):
        raise ValueError(f"arguments must be a mapping of the network's arguments, got {extra!r}")
    merged = {**start.arguments, **arguments, **extra}
    if merged["num_classes"] != arguments["num_classes"]:
        raise ValueError(f"the data have {arguments['num_classes']} classes, num_classes asks for another number")
    values = {**values, **overrides, "network": start.network, "arguments": merged}
    if "warmup_epochs" not in overrides and isinstance(values["epochs"], int):
        values["warmup_epochs"] = max(0, min(2, values["epochs"] - 1))
    tag = plain_tag(Path(str(data_dir)).name)
    return make_recipe(f"{start.network}.{tag}", values)


def _pictures(
    start: Start,
    data_dir: str | Path,
    freeze: str,
    overrides: dict[str, Any],
    device_type: str,
    on_read: Callable[[int, int], None] | None,
) -> tuple[ImageRecipe, Pictures]:
    pictures = open_pictures(data_dir)
    check_pictures(pictures, progress=on_read)
    held_out = overrides.get("held_out", ImageRecipe.held_out)
    share = 1.0 if pictures.validation is not None or not isinstance(held_out, (int, float)) else 1 - held_out
    values = image_values(start.pretrained, int(share * len(pictures.train.labels)), device_type)
    arguments: dict[str, Any] = {"num_classes": len(pictures.classes)}
    if freeze == "backbone":
        arguments["drop_path_rate"] = 0.0
    elif start.pretrained and "drop_path_rate" not in start.arguments:
        arguments["drop_path_rate"] = 0.1
    recipe = _recipe(start, data_dir, values, arguments, overrides)
    assert isinstance(recipe, ImageRecipe)
    return recipe, pictures


def _sequences(
    start: Start,
    data_dir: Path,
    freeze: str,
    overrides: dict[str, Any],
    on_read: Callable[[int, int], None] | None,
) -> tuple[SequenceRecipe, Parts]:
    # The parts have to be known for the recipe, and the recipe says how they are read.
    asked = overrides.get("arguments") or {}
    channels = {"in_chans": ways["in_chans"]} if "in_chans" in (ways := {**start.arguments, **asked}) else {}
    first = _recipe(start, data_dir, sequence_values(start.pretrained, 16), {"num_classes": 2, **channels}, overrides)
    assert isinstance(first, SequenceRecipe)
    reading = dataclasses.replace(first, arguments=channels)
    parts = load_parts(reading, data_dir, progress=on_read)
    samples, found, length = parts.train[0].shape
    arguments: dict[str, Any] = {"num_classes": len(parts.classes), "in_chans": found}
    if not {"kernel_size", "length", "sample_rate"} & asked.keys():
        arguments |= _length(start, length)
    if freeze == "backbone":
        arguments["drop_path_rate"] = 0.0
    elif not start.pretrained:
        arguments["block_drop_rate"] = 0.1
    values = sequence_values(start.pretrained, samples)
    recipe = _recipe(start, data_dir, values, arguments, overrides)
    assert isinstance(recipe, SequenceRecipe)
    return recipe, parts


def _length(start: Start, length: int) -> dict[str, Any]:
    """Arguments for sequences of so many samples: new kernels as long as they are, or those of the weights read off."""
    if not start.pretrained:
        return {"kernel_size": length}
    saved = {name: start.arguments[name] for name in ("length", "sample_rate") if name in start.arguments}
    if saved.get("sample_rate") is not None:
        # Said as a length from here on: an entrypoint takes one of the two.
        return {"sample_rate": None, "length": length}
    known = start.name if start.name in list_checkpoints() else start.network
    native = sample_shape(timm.create_model(known, device=torch.device("meta"), **start.arguments))[1]
    taps = start.arguments.get("kernel_size", native)
    if native == length and not saved:
        return {}
    # Kernels shorter than their sequences stay so, in proportion: by its length the network would not be built again.
    return {"length": length} if taps >= native else {"kernel_size": max(1, round(taps * length / native))}


# ------------------------------------------------------------------------------------------------------ network, saving


def _start_network(start: Start, recipe: SequenceRecipe | ImageRecipe, freeze: str, keep_head: bool) -> nn.Module:
    arguments = _build_arguments(recipe)
    if not start.pretrained:
        model: Any = create_model(start.network, pretrained=False, **arguments)
    else:
        model = create_model(start.name, pretrained=True, **arguments)
        if not keep_head:
            model.reset_classifier(recipe.arguments["num_classes"])
            fc = model.get_classifier()
            nn.init.trunc_normal_(fc.weight, std=NEW_HEAD_STD)
            nn.init.zeros_(fc.bias)
    freeze_(model, freeze)
    return model


def _build_arguments(recipe: SequenceRecipe | ImageRecipe) -> dict[str, Any]:
    """Arguments that build the network of a recipe, with those for the size of its input."""
    arguments = {name: value for name, value in recipe.arguments.items() if value is not None}
    if isinstance(recipe, ImageRecipe) and recipe.image_size is not None:
        arguments["img_size"] = recipe.image_size
    return arguments


def freeze_(model: nn.Module, freeze: str) -> None:
    """Keep part of a network as it is: no gradients, and batch norms that go on with the statistics they have.

    Args:
        model: A network of this package.
        freeze: One of :data:`FREEZES`.

    Raises:
        ValueError: There is nothing to freeze.
    """
    net: Any = model
    if freeze == "none":
        return
    parts = [net.stem] if freeze == "stem" else [child for name, child in net.named_children() if name != "head"]
    frozen = [parameter for part in parts for parameter in part.parameters()]
    if not frozen:
        raise ValueError(f"{type(model).__name__} has no layers in front of the first block to freeze")
    for parameter in frozen:
        parameter.requires_grad_(False)
    for part in parts:
        for module in part.modules():
            if isinstance(module, _BatchNorm):
                # Training puts the whole network into training mode, epoch after epoch.
                module.register_forward_pre_hook(_to_eval)


def _to_eval(module: nn.Module, _: Any) -> None:
    module.eval()


def _check_finished(out: Path) -> None:
    place = out / NETWORK_FOLDER
    if place.exists():
        raise FileExistsError(f"{out} holds a finished run, {place.name} and all, which was left as it was")


def _save(
    run: Run, recipe: SequenceRecipe | ImageRecipe, start: Start, out: Path, device: str, license: str
) -> Finetuned:
    best, last = run.outcome.best, run.outcome.last
    model = run.model
    weights = out / "best.safetensors"
    if best is not None:
        tensors, metadata = read_safetensors(weights)
        if metadata.get("epoch") != str(best.epoch):
            raise ValueError(f"{weights} is of epoch {metadata.get('epoch')}, the best was {best.epoch}")
        model.load_state_dict(tensors)
    assert isinstance(run.data, ArrayData | ImageData)  # what its data were opened as
    parts = run.data.pictures if isinstance(run.data, ImageData) else run.data.parts
    classes = tuple(parts.classes)
    place = out / NETWORK_FOLDER
    check_place(place)
    where = "?" if best is None or best.top1 is None else f"{best.top1:.2f} %"
    chosen = (
        f"the last of {last.epoch} epochs: nothing was set aside to choose by"
        if best is None
        else f"highest accuracy on what was set aside, {where}: epoch {best.epoch} of {last.epoch}"
    )
    described = run.data.describe()
    card = save_network(
        place,
        recipe.id,
        model,
        arguments=_build_arguments(recipe),
        data=Data(
            name=f"own {'pictures' if isinstance(run.data, ImageData) else 'sequences'}, {recipe.id.partition('.')[2]}",
            input="sequence" if isinstance(recipe, SequenceRecipe) else f"image {' x '.join(_extent(model))}",
            split=f"chosen by {described['chosen by']}" if "chosen by" in described else described["split"],
        ),
        entries=_entries(run.data, model, recipe, classes),
        training=Training(
            command=command_line(),
            seed=recipe.seed,
            chosen_by=chosen,
            log=f"{out.name}/metrics.jsonl",
            hardware=hardware(device),
            versions=versions(),
        ),
        license=license,
        origin=f"fine-tuned by smpconv_zoo from {start.name}"
        if start.pretrained
        else "trained by smpconv_zoo from random initialisation",
    )
    return Finetuned(card, place, run.outcome, classes)


def _extent(model: nn.Module) -> list[str]:
    return [str(size) for size in sample_shape(model)[1:]]


def _entries(
    data: ArrayData | ImageData, model: nn.Module, recipe: SequenceRecipe | ImageRecipe, classes: tuple[str, ...]
) -> dict[str, Any]:
    """Entries of timm's cfg by which predictions read files as this run did."""
    if isinstance(data, ArrayData):
        return data.cfg_entries()
    crop = recipe.crop if isinstance(recipe, ImageRecipe) else None
    config = resolve_data_config({"crop_pct": crop}, model=model)
    channels = sample_shape(model)[0]
    entries = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    for name in ("mean", "std"):
        values = tuple(config[name])
        entries[name] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {**entries, "label_names": list(classes)}
