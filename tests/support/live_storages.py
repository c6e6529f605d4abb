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

    Attributes:
        live_nbytes: of those alive now.
        peak_nbytes: the most that were alive at once.
        largest_nbytes: of the largest one.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.live_nbytes = self.peak_nbytes = self.largest_nbytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.live_nbytes)
        self.largest_nbytes = max(self.largest_nbytes, nbytes)
        weakref.finalize(storage, self._forget, key, nbytes)

    def _forget(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live_nbytes -= nbytes
