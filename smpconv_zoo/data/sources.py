"""Where the data of the tasks come from: addresses, sizes, sha256, licences, and where each of these is stated.

A digest stands here only where somebody publishes one. The archive of CharacterTrajectories has none: what is fetched
first is trusted and written down, see :mod:`smpconv_zoo.data.fetching`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from smpconv_zoo.data.speech_commands import WORDS
from smpconv_zoo.downloading import DownloadError
from smpconv_zoo.unpacking import Limits

__all__ = ["SOURCES", "DataSource", "RemoteFile", "data_source"]

TFDS = "tensorflow/datasets, {} (Apache-2.0)"


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file that is fetched: addresses of the same bytes; sha256 and size None where nobody publishes them."""

    name: str
    urls: tuple[str, ...]
    sha256: str | None = None
    bytes: int | None = None
    most: int = 2**35


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A data set that can be fetched, or, without ``files``, one that asks for a login.

    Args:
        name: On the command line.
        title: In words.
        folder: Where it goes, below the user's folder.
        files: What is fetched.
        unpacked: Bytes that it takes on the disk, roughly; checked against what is free.
        limits: What an archive of it may hold; None for files that are taken as they are.
        samples: How many there are: digits, pictures, series, or clips of one second.
        counted: What these are.
        licence: As stated, and by whom.
        homepage: Where it is described.
        checksums: Who publishes the sha256.
        how: For data behind a login: the steps, as commands.
        notes: What has to be known.
        rename: From the name of an archive's member to its place in ``folder``, None to leave it out.
    """

    name: str
    title: str
    folder: str
    files: tuple[RemoteFile, ...]
    unpacked: int
    limits: Limits | None
    samples: int
    counted: str
    licence: str
    homepage: str
    checksums: str
    how: str = ""
    notes: str = ""
    rename: Callable[[str], str | None] = lambda name: name

    @property
    def bytes(self) -> int | None:
        """Of all files, None where one of them is of unknown size."""
        sizes = [file.bytes for file in self.files]
        return None if None in sizes or not sizes else sum(size for size in sizes if size is not None)


def data_source(name: str) -> DataSource:
    """A source by its name.

    Raises:
        ValueError: There is none of that name.
        DownloadError: It is behind a login; the message says what to do.
    """
    if name not in SOURCES:
        raise ValueError(f"there is no data set {name!r} to fetch; there are {', '.join(SOURCES)}")
    source = SOURCES[name]
    if not source.files:
        raise DownloadError(f"{source.title} cannot be fetched without a login. {source.how}")
    return source


def _below(top: str) -> Callable[[str], str | None]:
    """Members below a folder of the archive, without that folder."""
    prefix = f"{top}/"
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def _ten_words(name: str) -> str | None:
    """The folders of the ten words, and what describes the whole."""
    folder, slash, _ = name.partition("/")
    return name if folder in WORDS or not slash else None


def _trajectories(name: str) -> str | None:
    path = Path(name)
    wanted = path.parent.name == "CharacterTrajectories" and path.name in (
        "CharacterTrajectories_TRAIN.ts",
        "CharacterTrajectories_TEST.ts",
    )
    return path.name if wanted else None


def _mnist(name: str, size: int, sha256: str) -> RemoteFile:
    places = ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist")
    return RemoteFile(name, tuple(f"{place}/{name}" for place in places), sha256, size)


_PICTURES = "MIT (its repository); rights in the pictures are their makers'"

_ALL = (
    DataSource(
        name="mnist",
        title="MNIST",
        folder="MNIST/raw",
        files=(
            _mnist(
                "train-images-idx3-ubyte.gz",
                9_912_422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            _mnist(
                "train-labels-idx1-ubyte.gz", 28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            _mnist(
                "t10k-images-idx3-ubyte.gz",
                1_648_877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            _mnist(
                "t10k-labels-idx1-ubyte.gz", 4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        ),
        # 70,000 pictures of 784 bytes, 70,000 labels, and four headers.
        unpacked=54_950_048,
        limits=Limits(files=1, bytes=47_040_016),
        samples=70_000,
        counted="digits",
        licence="CC BY-SA 3.0 (as Keras says; its page says nothing)",
        homepage="http://yann.lecun.com/exdb/mnist/",
        checksums=TFDS.format("url_checksums/mnist.txt"),
    ),
    DataSource(
        name="cifar10",
        title="CIFAR-10",
        folder="cifar-10-batches-py",
        files=(
            RemoteFile(
                "cifar-10-python.tar.gz",
                (
                    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/cifar-10-python.tar.gz",
                ),
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                170_498_071,
            ),
        ),
        unpacked=190_000_000,
        limits=Limits(files=20, bytes=400_000_000),
        samples=60_000,
        counted="pictures",
        licence="none stated; its page asks to cite its report",
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        checksums="keras.datasets.cifar10 (Apache-2.0)",
        notes="the files are pickles, of which only numbers and names are read, nothing is executed",
        rename=_below("cifar-10-batches-py"),
    ),
    DataSource(
        name="character-trajectories",
        title="CharacterTrajectories (UEA 2018)",
        folder="CharacterTrajectories",
        files=(
            RemoteFile(
                "Multivariate2018_ts.zip",
                (
                    "https://www.timeseriesclassification.com/aeon-toolkit/Archives/Multivariate2018_ts.zip",
                    "https://www.timeseriesclassification.com/Downloads/Archives/Multivariate2018_ts.zip",
                ),
                most=2**33,
            ),
        ),
        unpacked=60_000_000,
        limits=Limits(files=1_000, bytes=2**35),
        samples=2_858,
        counted="series",
        licence="none stated by the archive; from the UCI repository",
        homepage="https://www.timeseriesclassification.com/description.php?Dataset=CharacterTrajectories",
        checksums="nobody: the first is trusted, and recorded",
        notes="the archive holds 30 sets, of which this one is unpacked; CharacterTrajectories.zip, handed out alone "
        "since November 2023, holds other series",
        rename=_trajectories,
    ),
    DataSource(
        name="speech-commands",
        title="Speech Commands v0.02, 10 words",
        folder="speech_commands_v0.02",
        files=(
            RemoteFile(
                "speech_commands_v0.02.tar.gz",
                (
                    "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
                    "https://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
                ),
                "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
                2_428_923_189,
            ),
        ),
        unpacked=1_300_000_000,
        limits=Limits(files=150_000, bytes=6 * 2**30),
        samples=34_975,
        counted="clips of one second",
        licence="CC BY 4.0 (its own LICENSE file)",
        homepage="https://arxiv.org/abs/1804.03209",
        checksums="torchaudio.datasets.SPEECHCOMMANDS (BSD) and " + TFDS.format("url_checksums/speech_commands.txt"),
        notes="of the 35 words the ten of the task are unpacked",
        rename=_ten_words,
    ),
    DataSource(
        name="imagenet-v2",
        title="ImageNet-V2, matched frequency",
        folder="imagenetv2-matched-frequency-format-val",
        files=(
            RemoteFile(
                "imagenetv2-matched-frequency.tar.gz",
                (
                    "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/"
                    "imagenetv2-matched-frequency.tar.gz",
                    "https://s3-us-west-2.amazonaws.com/imagenetv2public/imagenetv2-matched-frequency.tar.gz",
                ),
                "f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
                1_264_079_360,
            ),
        ),
        unpacked=1_300_000_000,
        limits=Limits(files=20_000, bytes=3 * 2**30),
        samples=10_000,
        counted="pictures",
        licence=_PICTURES,
        homepage="https://github.com/modestyachts/ImageNetV2",
        checksums=TFDS.format("datasets/imagenet_v2/checksums.tsv"),
        notes="folders are named by the numbers of the classes, 0 to 999",
        rename=_below("imagenetv2-matched-frequency-format-val"),
    ),
    DataSource(
        name="imagenet-a",
        title="ImageNet-A",
        folder="imagenet-a",
        files=(
            RemoteFile(
                "imagenet-a.tar",
                ("https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",),
                "3bb3632277e6ba6392ea64c02ddbf4dd2266c9caffd6bc09c9656d28f012589e",
                687_552_512,
            ),
        ),
        unpacked=720_000_000,
        limits=Limits(files=20_000, bytes=2 * 2**30),
        samples=7_500,
        counted="pictures",
        licence=_PICTURES,
        homepage="https://github.com/hendrycks/natural-adv-examples",
        checksums=TFDS.format("datasets/imagenet_a/checksums.tsv"),
        notes="200 of the 1,000 classes",
        rename=_below("imagenet-a"),
    ),
    DataSource(
        name="imagenet-r",
        title="ImageNet-R",
        folder="imagenet-r",
        files=(
            RemoteFile(
                "imagenet-r.tar",
                ("https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",),
                "18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52",
                2_191_079_936,
            ),
        ),
        unpacked=2_250_000_000,
        limits=Limits(files=60_000, bytes=5 * 2**30),
        samples=30_000,
        counted="pictures",
        licence=_PICTURES,
        homepage="https://github.com/hendrycks/imagenet-r",
        checksums=TFDS.format("datasets/imagenet_r/checksums.tsv"),
        notes="200 of the 1,000 classes",
        rename=_below("imagenet-r"),
    ),
    DataSource(
        name="imagenet-sketch",
        title="ImageNet-Sketch",
        folder="imagenet-sketch",
        files=(
            RemoteFile(
                "ImageNet-Sketch.zip",
                (
                    "https://huggingface.co/datasets/songweig/imagenet_sketch/resolve/main/data/ImageNet-Sketch.zip",
                    "https://drive.usercontent.google.com/download?id=1Mj0i5HBthqH1p_yeXzsg22gZduvgoNeA"
                    "&export=download&confirm=t",
                ),
                "4d3ce6b82a7c48aabf14aeac105eb533e75707f152cc858f55bfc022031a72ed",
                7_593_573_012,
            ),
        ),
        unpacked=8_500_000_000,
        limits=Limits(files=120_000, bytes=20 * 2**30),
        samples=50_889,
        counted="pictures",
        licence=_PICTURES,
        homepage="https://github.com/HaohanWang/ImageNet-Sketch",
        checksums=TFDS.format("datasets/imagenet_sketch/checksums.tsv"),
        notes="the digest is that of the file on Google Drive; whether the Hub's is the same, it will tell",
        rename=_below("sketch"),
    ),
    DataSource(
        name="imagenet-real",
        title="ImageNet ReaL labels",
        folder="imagenet-real",
        files=(
            RemoteFile(
                "real.json",
                ("https://raw.githubusercontent.com/google-research/reassessed-imagenet/master/real.json",),
                "d83e9bff374c631aae8439eb064c7019acc56e1b3bc3f56b8380c2a710b0220b",
                388_478,
            ),
        ),
        unpacked=388_478,
        limits=None,
        samples=50_000,
        counted="lists of labels",
        licence="Apache-2.0 (its repository)",
        homepage="https://github.com/google-research/reassessed-imagenet",
        checksums=TFDS.format("url_checksums/imagenet2012_real.txt"),
        notes="timm 1.0.31 has the same bytes inside, so evaluation does not need them",
    ),
    DataSource(
        name="imagenet-1k",
        title="ImageNet-1k",
        folder="",
        files=(),
        unpacked=160_000_000_000,
        limits=None,
        samples=1_331_167,
        counted="pictures",
        licence="its terms of access: research and education alone",
        homepage="https://image-net.org/download-images",
        checksums="torchvision.datasets.ImageNet (md5, checked when it unpacks)",
        how="Either register at https://image-net.org/download-images, put ILSVRC2012_devkit_t12.tar.gz, "
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of the year 2012 into DIR, and let torchvision check and "
        "sort them: `python -c \"from torchvision.datasets import ImageNet; ImageNet('DIR', 'val'); ImageNet('DIR', "
        "'train')\"`. Or accept the terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k, run `hf auth login`, "
        "and name the data hfds/ILSVRC/imagenet-1k to train on them. Then look at them: `smpconv-zoo data check DIR`",
    ),
)

SOURCES = {source.name: source for source in _ALL}
