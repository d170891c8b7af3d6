"""Library operators that cost little to call.

An operator registered with PyTorch's library is opaque to ``torch.compile``, ``torch.export`` and ``torch.jit.trace``,
but calling it from Python takes about 0.1 ms: more than most kernels of a sequence network run. :func:`operator` makes
one of each kind from the same functions, a library operator and a ``torch.autograd.Function``, and calls the second one
wherever nobody records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["gradient_operator", "operator", "recorded", "transformed"]


def operator(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    """Make ``smpconv_zoo::name``.

    Args:
        name: Name within the library ``smpconv_zoo``.
        implementation: The computation, annotated as :func:`torch.library.custom_op` wants it; it mutates nothing and
            returns no view of an argument.
        fake: Shapes and dtypes of its results.
        save: ``(ctx, inputs, output)``: keep what the gradient needs.
        gradients: ``(ctx, *grads)``: gradients to every argument.

    Returns:
        A function of the implementation's arguments, all positional.
    """
    registered = torch.library.custom_op(f"smpconv_zoo::{name}", implementation, mutates_args=())
    registered.register_fake(fake)
    registered.register_autograd(gradients, setup_context=save)

    class Eager(torch.autograd.Function):
        # In one piece: with a separate `setup_context` PyTorch inspects the signature at every call, for 0.1 ms.
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = implementation(*arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    def call(*arguments: Any) -> Any:
        if recorded(arguments):
            return registered(*arguments)
        if not torch.is_grad_enabled():
            return implementation(*arguments)
        return Eager.apply(*arguments)

    return call


def gradient_operator(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``smpconv_zoo::name``, which has no derivative: what the ``gradients`` of an operator call.

    Args:
        name: Name within the library ``smpconv_zoo``.
        implementation: As of :func:`operator`.
        fake: As of :func:`operator`.
    """
    registered = torch.library.custom_op(f"smpconv_zoo::{name}", implementation, mutates_args=())
    registered.register_fake(fake)

    def call(*arguments: Any) -> Any:
        return (registered if recorded(arguments) else implementation)(*arguments)

    return call


def recorded(arguments: tuple[Any, ...]) -> bool:
    """Whether somebody records what is called, or the tensors hold no numbers."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return True
    return any(
        isinstance(value, Tensor) and (type(value) not in (Tensor, nn.Parameter) or value.device.type == "meta")
        for value in arguments
    )


def transformed() -> bool:
    """Whether a transform of :mod:`torch.func` is at work: it sees through PyTorch's own operators only."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
