"""Entrypoints for ``torch.hub``; a checkout is enough, nothing is built or installed.

``torch.hub.load(CHECKOUT, "smpconv_tcn_mnist", source="local", pretrained=True)``. Weights are verified as everywhere
in this package: the full sha256 on every load.
"""

from __future__ import annotations

import typing  # a module: whatever can be called and has a plain name would be an entrypoint

from torch.nn import Module as _Module

from smpconv_zoo.checkpoints import create_model as _create_model

dependencies = ["huggingface_hub", "numpy", "safetensors", "timm", "torch", "torchvision", "yaml"]


def _create(network: str, pretrained: bool, tag: str, arguments: dict[str, typing.Any]) -> _Module:
    return _create_model(f"{network}.{tag}" if tag else network, pretrained=pretrained, **arguments)


def smpconv_t(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvNet-T, images of 224 x 224 pixels, 26.7 M parameters. Checkpoint: in1k.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_t", pretrained, tag, kwargs)


def smpconv_b(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvNet-B, images of 224 x 224 pixels, 79.5 M parameters. Checkpoint: in1k.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_b", pretrained, tag, kwargs)


def smpconv_tcn(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvTCN for your own sequences: pass in_chans, num_classes and kernel_size (their length). No checkpoint.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_tcn", pretrained, tag, kwargs)


def smpconv_tcn_mnist(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvTCN for digits as sequences of 784 pixels. Checkpoints: smnist5k (default), pmnist5k, smnist, pmnist.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_tcn_mnist", pretrained, tag, kwargs)


def smpconv_tcn_cifar(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvTCN for images as sequences of 1024 RGB pixels. Checkpoint: scifar10.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_tcn_cifar", pretrained, tag, kwargs)


def smpconv_tcn_chartraj(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvTCN for pen trajectories of 182 steps. Checkpoint: ct.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_tcn_chartraj", pretrained, tag, kwargs)


def smpconv_tcn_speech_mfcc(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvTCN for 161 frames of 20 MFCCs, Speech Commands. Checkpoint: sc10.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_tcn_speech_mfcc", pretrained, tag, kwargs)


def smpconv_tcn_speech_raw(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvTCN for one second of raw speech at 16 kHz, Speech Commands. Checkpoint: sc10.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_tcn_speech_raw", pretrained, tag, kwargs)


def smpconv_resnet(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvResNet for your own small images: pass in_chans, num_classes and an odd kernel_size. No checkpoint.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_resnet", pretrained, tag, kwargs)


def smpconv_resnet_cifar(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvResNet for 32 x 32 images. Checkpoint: cifar10.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_resnet_cifar", pretrained, tag, kwargs)


def smpconv_resnet_mnist(pretrained: bool = False, tag: str = "", **kwargs: typing.Any) -> _Module:
    """SMPConvResNet for digits of 28 x 28 pixels. Checkpoint: mnist5k.

    Args:
        pretrained: Load the checkpoint's weights, verified.
        tag: Which checkpoint, the default one if empty.
        **kwargs: As for ``timm.create_model``, such as ``num_classes``.
    """
    return _create("smpconv_resnet_mnist", pretrained, tag, kwargs)
