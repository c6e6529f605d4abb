"""Follow every tensor that torch makes: how large it is and how many bytes are alive at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveStorages"]


class LiveStorages(TorchDispatchMode):
    """Counts storages made inside the context while they live.

    Args:
        tensors: made before, and not counted.
        large_nbytes: what counts as a large storage.

    Attributes:
        live_nbytes: of those alive now.
        peak_nbytes: the most that were alive at once.
        largest_nbytes: of the largest one.
        peak_num_large: the most large ones that were alive at once.
    """

    def __init__(self, *tensors: torch.Tensor, large_nbytes: int = 0) -> None:
        super().__init__()
        self.live_nbytes = self.peak_nbytes = self.largest_nbytes = self.peak_num_large = 0
        self._large_nbytes = large_nbytes
        self._num_large = 0
        self._known = set(_storages(tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _storages((args, kwargs))
        output = func(*args, **(kwargs or {}))
        for key, storage in _storages(output).items():
            if key not in inputs and key not in self._known:
                self._count(key, storage)
        return output

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        nbytes = storage.nbytes()
        self._known.add(key)
        self._change(nbytes, 1)
        self.largest_nbytes = max(self.largest_nbytes, nbytes)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _change(self, nbytes: int, sign: int) -> None:
        self.live_nbytes += sign * nbytes
        self._num_large += sign * (nbytes >= self._large_nbytes)
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)
        self.peak_num_large = max(self.peak_num_large, self._num_large)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._change(nbytes, -1)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages}
