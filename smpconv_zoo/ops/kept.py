"""What a convolution computes from its kernel alone, kept from call to call.

At small batches the transform of the kernel takes as long as those of the input, or much longer where every input
channel meets every output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KernelCache"]

# A network has a dozen of these. Spectra of up to 16 MiB are kept for some sizes of the input, of larger ones (raw
# speech: 70 MiB, which take ten times as long as those of a single input) the last alone, and none beyond 128 MiB.
_SMALL_BYTES = 16 * 2**20
_KEPT_BYTES = 128 * 2**20
_KEPT_SIZES = 4


class _Kept(NamedTuple):
    # Alive, so that no other kernel comes to lie at its address.
    kernel: Tensor
    mark: tuple[Hashable, ...]
    spectra: tuple[tuple[Hashable, Tensor], ...]


class KernelCache:
    """Keeps what was computed from one kernel, until that kernel changes.

    A change is seen by the tensor's version counter and address: in-place edits, optimizer steps, loading and moves.
    What is written through ``.data`` is not seen. Threads may share a cache; copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def get(self, kernel: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What was computed from ``kernel`` for ``key``, computed now if need be.

        Args:
            kernel: The kernel; one made in inference mode counts no versions, and nothing of it is kept.
            key: Whatever else the result depends on.
            compute: Computes it; nothing is kept that needs a gradient.
        """
        if kernel.is_inference():
            return compute()
        stream: int | None = None
        if kernel.is_cuda:
            # A graph may be replayed when what is kept now has long been dropped.
            if torch.cuda.is_current_stream_capturing():
                return compute()
            # What one stream has computed another one would have to wait for.
            stream = torch.cuda.current_stream(kernel.device).cuda_stream
        address = (kernel.data_ptr(), kernel.shape, kernel.stride(), kernel.dtype, kernel.device)
        mark = (*address, kernel._version, stream)
        kept = self._kept
        spectra = kept.spectra if kept is not None and kept.mark == mark else ()
        for known, result in spectra:
            if known == key:
                return result
        # A tensor made in inference mode could not be used outside it later.
        with torch.inference_mode(False), torch.no_grad():
            result = compute()
        size = _bytes(result)
        if size > _KEPT_BYTES:
            return result
        if size > _SMALL_BYTES:
            spectra = tuple(entry for entry in spectra if _bytes(entry[1]) <= _SMALL_BYTES)
        self._kept = _Kept(kernel.detach(), mark, (*spectra[1 - _KEPT_SIZES :], (key, result)))
        return result

    def clear(self) -> None:
        """Forget everything."""
        self._kept = None

    def __deepcopy__(self, memo: object) -> KernelCache:
        return KernelCache()

    def __reduce__(self) -> tuple[type[KernelCache], tuple[()]]:
        return KernelCache, ()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
