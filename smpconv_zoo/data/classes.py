"""Names of the classes of the data sets, in the order of their numbers."""

from timm.data import ImageNetInfo

from smpconv_zoo.data.speech_commands import WORDS
from smpconv_zoo.data.ucr import UCR_SETS

__all__ = ["class_names"]

# Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; batches.meta of the archive.
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")


def class_names(data_set: str) -> tuple[str, ...] | None:
    """Names of the classes of a data set as cards call it; None where the order of its classes has no names.

    The classes of CharacterTrajectories are numbered as they appear in the files: which letter is which, only those
    say.
    """
    if data_set in ("MNIST", "mnist1d", "mnist5k"):
        return DIGITS
    if data_set == "CIFAR-10":
        return CIFAR10
    if data_set == "Speech Commands, 10 words":
        return WORDS
    if data_set in UCR_SETS:
        return UCR_SETS[data_set].classes
    if data_set == "ImageNet-1k":
        imagenet = ImageNetInfo()
        return tuple(imagenet.index_to_description(i) for i in range(imagenet.num_classes()))
    return None
