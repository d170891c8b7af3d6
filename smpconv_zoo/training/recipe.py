"""Recipes: everything that decides a training run, in one YAML file per checkpoint.

Two kinds: :class:`SequenceRecipe` for data that fits in memory (sequences, small images), :class:`ImageRecipe` for
pictures read from files. ``protocol: reference`` repeats the authors' code (sangnekim/SMPConv, commit de4e59a) in every
order and quirk; ``protocol: sound`` is for new work. :data:`PROTOCOLS` says how they differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["PROTOCOLS", "ImageRecipe", "Recipe", "SequenceRecipe", "list_recipes", "load_recipe", "parse_overrides"]

PROTOCOLS = {
    "reference": "as the authors' code: the first step has rate 0; a step is followed by the average of the weights, "
    "then by the clip of the radii; the best epoch is chosen on the test data",
    "sound": "the first step learns; radii are clipped before weights are averaged; epochs are chosen on a validation "
    "part, the test data are looked at once",
}
INPUTS = ("sequence", "permuted sequence", "image 28 x 28", "image 32 x 32")
DTYPES = ("float32", "bfloat16", "float16")
PICTURES = ("imagenet", "pictures", "synthetic")
# Of an image recipe, what is said of data that are streamed.
STREAM_FIELDS = ("train_split", "val_split", "num_samples", "input_key", "target_key", "shuffle_size")
# Series that come with the aeon package, or are drawn from a seed.
SERIES = (
    "acsf1",
    "arrowhead",
    "basic-motions",
    "gunpoint",
    "italy-power-demand",
    "japanese-vowels",
    "mnist1d",
    "osuleaf",
)
ARRAYS = ("mnist5k", "mnist", "cifar10", "character-trajectories", "speech-commands", "series", *SERIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both kinds of recipes hold.

    Args:
        id: Checkpoint that the run makes, ``network.tag``.
        network: Entrypoint.
        arguments: Arguments of the entrypoint.
        data: What is learned from; see :data:`ARRAYS` and :data:`PICTURES`.
        protocol: ``"reference"`` or ``"sound"``; see :data:`PROTOCOLS`.
        epochs: Passes over the training part.
        batch_size: Samples of an optimizer step, over all processes and micro-batches.
        micro_batches: Parts in which a process takes its share of a step, one after the other.
        optimizer: ``"adam"`` (L2), ``"adamw"``, or any other name of :func:`timm.optim.create_optimizer_v2`.
        lr: Highest rate; radii get a tenth.
        final_lr: Where the cosine ends.
        warmup_epochs: Epochs in which the rate grows linearly.
        weight_decay: Of everything but norms, biases, positions and radii.
        layer_decay: Factor by which each layer, from the head down, learns slower; None for none.
        clip_grad: Largest norm of the gradient; None for any.
        ema_decay: Of the average of the weights over steps, which is then what is measured and kept; None for none.
        early_stop: Epochs without improvement after which to stop; None for never.
        dtype: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` under autocast.
        channels_last: Whether images are laid out with channels last.
        compile: Whether to run the network through :func:`torch.compile`.
        graph: Whether a step is one CUDA graph; None for wherever that can be done and pays.
        grad_checkpointing: Whether to compute activations again in the backward pass instead of keeping them.
        sync_batch_norm: Whether batch norms share their statistics over processes.
        seed: Of initialisation, order, augmentation and dropout.
    """

    id: str
    network: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: str
    protocol: str = "sound"
    epochs: int
    batch_size: int
    micro_batches: int = 1
    optimizer: str = "adamw"
    lr: float
    final_lr: float = 0.0
    warmup_epochs: int = 0
    weight_decay: float = 0.0
    layer_decay: float | None = None
    clip_grad: float | None = None
    ema_decay: float | None = None
    early_stop: int | None = None
    dtype: str = "float32"
    channels_last: bool = False
    compile: bool = False
    graph: bool | None = None
    grad_checkpointing: bool = False
    sync_batch_norm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.epochs < 1 or self.batch_size < 2 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"need epochs >= 1, batch_size >= 2 and 0 <= warmup_epochs < epochs; got {self.epochs}, "
                f"{self.batch_size}, {self.warmup_epochs}"
            )
        if self.micro_batches < 1 or self.batch_size % self.micro_batches:
            raise ValueError(f"batch_size {self.batch_size} cannot be taken in {self.micro_batches} micro_batches")
        if not self.lr > 0 or not 0 <= self.final_lr <= self.lr or self.weight_decay < 0:
            raise ValueError(
                f"need lr > 0, 0 <= final_lr <= lr and weight_decay >= 0; got {self.lr}, {self.final_lr}, "
                f"{self.weight_decay}"
            )
        for field in ("layer_decay", "ema_decay"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{field} must be null or in (0, 1], got {value}")
        for field in ("clip_grad", "early_stop"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field} must be null or positive, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceRecipe(Recipe):
    """A run on data that fits in memory.

    Args:
        input: ``"sequence"``, ``"permuted sequence"``, ``"image 28 x 28"`` or ``"image 32 x 32"``.
        permutation_seed: Seed of the pixel permutation; None for none.
        dropped: Percent of the samples of a sequence that are left out; the mask of the others is one more channel.
        features: Of speech: ``"mfcc"`` or ``"raw"``; None for other data.
        input_drop_rate: Dropout on the input while training (the authors' ``dropout_in``).
        augment: Whether to change digits by :func:`~smpconv_zoo.training.augment.augment_digits`, and CIFAR-10 by
            :func:`~smpconv_zoo.training.augment.augment_pictures`.
        jitter: Deviation of the noise that is added to every value of a series, which itself has deviation 1.
        scaling: Deviation of the factor around 1 by which every channel of a series is multiplied.
        time_shift: Largest share of its length by which a series is moved, to either side.
        time_mask: Largest share of its length that is set to 0, the training mean, in one piece.
        held_out: Share of the training samples that ``protocol: sound`` chooses by, where there is no validation part;
            0 learns from all of them and takes the last epoch, as is sound where so few samples would choose by noise.
        held_out_draw: Which share of them: seed of the draw.
    """

    input: str = "sequence"
    permutation_seed: int | None = None
    dropped: int = 0
    features: str | None = None
    input_drop_rate: float = 0.0
    augment: bool = False
    jitter: float = 0.0
    scaling: float = 0.0
    time_shift: float = 0.0
    time_mask: float = 0.0
    held_out: float = 0.1
    held_out_draw: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in ARRAYS:
            raise ValueError(f"data in memory are one of {', '.join(ARRAYS)}, got {self.data!r}")
        if self.input not in INPUTS:
            raise ValueError(f"input must be one of {', '.join(INPUTS)}, got {self.input!r}")
        if (self.input == "permuted sequence") != (self.permutation_seed is not None):
            raise ValueError("a permuted sequence needs a permutation_seed, an image or a sequence has none")
        if self.features not in (None, "mfcc", "raw"):
            raise ValueError(f"features must be null, mfcc or raw, got {self.features!r}")
        if not 0 <= self.input_drop_rate < 1 or not 0 <= self.held_out < 1 or not 0 <= self.dropped < 100:
            raise ValueError(
                f"need input_drop_rate and held_out in [0, 1) and dropped in [0, 100); got {self.input_drop_rate}, "
                f"{self.held_out}, {self.dropped}"
            )
        for field in ("jitter", "scaling"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is a deviation in [0, 1), got {getattr(self, field)}")
        for field in ("time_shift", "time_mask"):
            if not 0 <= getattr(self, field) <= 0.5:
                raise ValueError(f"{field} is a share in [0, 0.5], got {getattr(self, field)}")
        if self.held_out_draw < 0:
            raise ValueError(f"held_out_draw must not be negative, got {self.held_out_draw}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A run on pictures; augmentation is timm's, by its names.

    Args:
        image_size: Pixels of a side; kernels are read off at the matching size. None for the network's own.
        scale: Share of a picture's area that a crop takes, lowest and highest.
        ratio: Its aspect, lowest and highest.
        hflip: Probability of a horizontal flip.
        vflip: Of a vertical one.
        color_jitter: Strength, for lack of an ``auto_augment``.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5-inc1``; None for none.
        interpolation: Of the training's resizing: ``"random"``, ``"bilinear"`` or ``"bicubic"``.
        erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_probability: That a batch is mixed at all.
        mixup_switch_probability: That it is CutMix where both are on.
        smoothing: Of the labels.
        crop: Share of the resized picture's side that validation takes from its centre; None for the network's own.
        held_out: Share of the training pictures that ``protocol: sound`` chooses by, where there is no validation part.
        train_split: Of a stream: the split to learn from, or a pattern of shards; None for what its name says.
        val_split: Of a stream: the split to choose by, or a pattern of shards; None for its validation part.
        num_samples: Of a stream or of synthetic pictures: how many an epoch has; None for what the stream says.
        input_key: Of a stream: column of the pictures; None for the column that is of pictures.
        target_key: Of a stream: column, or field of ``KEY.json``, of the labels; None for the usual ones.
        shuffle_size: Of a stream: pictures among which each process that reads draws the next; None for timm's number.
    """

    image_size: int | None = None
    scale: list[float] = dataclasses.field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = dataclasses.field(default_factory=lambda: [3 / 4, 4 / 3])
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    auto_augment: str | None = None
    interpolation: str = "random"
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_probability: float = 1.0
    mixup_switch_probability: float = 0.5
    smoothing: float = 0.1
    crop: float | None = None
    held_out: float = 0.1
    train_split: str | None = None
    val_split: str | None = None
    num_samples: int | None = None
    input_key: str | None = None
    target_key: str | None = None
    shuffle_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("num_samples", "shuffle_size"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be null or positive, got {value}")
        if self.data not in PICTURES:
            raise ValueError(f"pictures are one of {', '.join(PICTURES)}, got {self.data!r}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        for field in ("hflip", "vflip", "erasing", "mixup_probability", "mixup_switch_probability"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is a probability, got {getattr(self, field)}")
        for field in ("smoothing", "held_out"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        for field in ("scale", "ratio"):
            pair = getattr(self, field)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{field} is a pair, lowest and highest, got {pair}")
        if min(self.mixup, self.cutmix, self.color_jitter) < 0 or (self.crop is not None and not 0 < self.crop <= 1):
            raise ValueError(
                f"need mixup, cutmix, color_jitter >= 0 and crop in (0, 1]; got {self.mixup}, {self.cutmix}, "
                f"{self.color_jitter}, {self.crop}"
            )
        if self.interpolation not in ("random", "bilinear", "bicubic"):
            raise ValueError(f"interpolation must be random, bilinear or bicubic, got {self.interpolation!r}")
        if (self.mixup > 0 or self.cutmix > 0) and (self.batch_size // self.micro_batches) % 2:
            raise ValueError(f"mixup pairs the pictures of a batch: {self.batch_size // self.micro_batches} is odd")


def list_recipes() -> list[str]:
    """Ids of the checkpoints that have a recipe, sorted."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().glob("*.yaml"))


def load_recipe(checkpoint_id: str, **overrides: Any) -> SequenceRecipe | ImageRecipe:
    """The recipe of a checkpoint, with single values replaced.

    Raises:
        ValueError: No such recipe, or an override that is not a field; near names are listed.
    """
    recipes = list_recipes()
    if checkpoint_id not in recipes:
        raise ValueError(f"there is no recipe for {checkpoint_id!r}; {_near(checkpoint_id, recipes)}")
    values = yaml.safe_load((_folder() / f"{checkpoint_id}.yaml").read_text(encoding="utf-8"))
    return make_recipe(checkpoint_id, {**values, **overrides})


def make_recipe(checkpoint_id: str, values: Mapping[str, Any]) -> SequenceRecipe | ImageRecipe:
    """A recipe from its fields but ``id``; ``data`` says of which kind.

    Raises:
        ValueError: A field that there is not, one that is missing, or a value out of range.
    """
    kind: type[SequenceRecipe] | type[ImageRecipe] = ImageRecipe if values.get("data") in PICTURES else SequenceRecipe
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name != "id"}
    for name in values:
        if name not in fields:
            raise ValueError(f"a recipe has no field {name!r}; {_near(name, sorted(fields))}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"the recipe {checkpoint_id!r} lacks {', '.join(missing)}")
    return kind(id=checkpoint_id, **values)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``["lr=2e-3", "arguments={block_drop_rate: 0.1}"]`` as a dict; values are YAML.

    Raises:
        ValueError: A pair without "=", or a value that is not YAML.
    """
    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        try:
            overrides[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {name!r} is not YAML: {value!r}") from error
        if isinstance(overrides[name], str):
            # YAML takes 2e-3 for a string, since it wants a dot in a number.
            with contextlib.suppress(ValueError):
                overrides[name] = float(value)
    return overrides


def _check_types(recipe: Recipe) -> None:
    """Values that a user writes by hand have the types of their fields, before anything is computed from them."""
    for name, hint in typing.get_type_hints(type(recipe)).items():
        value = getattr(recipe, name)
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
        takes = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, takes) or (isinstance(value, bool) and bool not in kinds):
            names = ("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} must be {' or '.join(names)}, got {value!r}")
        if isinstance(value, list) and not all(isinstance(item, (int, float)) for item in value):
            raise ValueError(f"{name} must be a list of numbers, got {value!r}")


def _folder() -> Path:
    return Path(__file__).resolve().parent / "recipes"


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
