"""What a chunk's parameters show, and whether somebody has written to them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import torch

from gemini.chunk.layout import ChunkSpec, ParamPlace
from gemini.errors import ModelError
from gemini.model.tensor_parallel import local_part, show_values

__all__ = ["ShownParams", "param_view", "placeholders"]


class ShownParams:
    """The parameters of one chunk; each shows its weights, or a placeholder while they are away.

    Args:
        spec: which parameters lie where.
        tensors: the parameters (or plain tensors), in the order of `spec.places`.
        missing: what absent parameters show, [number of parameters] of the chunk's dtype; see `placeholders`.
    """

    def __init__(self, spec: ChunkSpec, tensors: Sequence[torch.Tensor], missing: torch.Tensor) -> None:
        self.keep_write: Callable[[int], None] | None = None
        """Brings home a weight, given by its position, that was written in place unseen; None: nobody looks."""
        self._spec = spec
        self._tensors = list(tensors)
        self._missing = missing
        self._weights: torch.Tensor | None = None
        """The chunk's weights that are shown, [spec.numel] of spec.dtype; None: placeholders are."""
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._begins = [place.begin for place in spec.places]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._tensors)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self._tensors[position]

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def placeholder_address(self) -> int:
        """Address of the placeholders; identifies their storage."""
        return self._missing.untyped_storage().data_ptr()

    def show_all(self, weights: torch.Tensor | None) -> None:
        """Let the parameters show the chunk's weights, [spec.numel] in compute memory; None: placeholders."""
        self._weights = weights
        for position in range(len(self._tensors)):
            self.show(position)
        with torch._C.DisableTorchFunctionSubclass():
            self._addresses = [local_part(param).data_ptr() for param in self._tensors]
        self.remember_versions()

    def show(self, position: int, values: torch.Tensor | None = None) -> None:
        """Let one parameter show other values than its own.

        Args:
            position: the parameter's, in the layout.
            values: of its shape, in compute memory; None: its own, which is a placeholder while they are away.
        """
        place = self._spec.places[position]
        with torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
            if values is None and self._weights is not None:
                values = param_view(self._weights, place)
            elif values is None:
                values = self._missing[position].expand(place.spec.shape)
            show_values(self._tensors[position], values)

    def check(self) -> None:
        """Refuse parameters that were given other data behind the engine's back, or, with gradients, re-flagged.

        Raises:
            ModelError: one was.
        """
        self.check_written()
        is_trainable = self._spec.is_trainable
        checks_flags = torch.is_grad_enabled()
        with torch._C.DisableTorchFunctionSubclass():
            for place, param, address in zip(self._spec.places, self._tensors, self._addresses, strict=True):
                if checks_flags and param.requires_grad is not is_trainable:
                    raise ModelError(
                        f"parameter {place.spec.name} had requires_grad={is_trainable} when it was wrapped and has "
                        f"{not is_trainable} now, in a forward with gradients; set requires_grad before GeminiDDP(...)"
                    )
                if local_part(param).data_ptr() != address:
                    raise ModelError(
                        f"parameter {place.spec.name} no longer shows its chunk: its memory was exchanged after "
                        "GeminiDDP(...); write values with param.copy_(...) or engine.load_state_dict instead"
                    )

    def check_written(self) -> None:
        """Bring home what was written in place without a function of torch's that said so.

        Raises:
            ModelError: that cannot be honoured.
        """
        if self.keep_write is None or self._weights is None:
            return
        with torch._C.DisableTorchFunctionSubclass():
            versions = [param._version for param in self._tensors]
        if versions == self._versions:
            return
        changed = [i for i, version in enumerate(versions) if version != self._versions[i]]
        self._versions = versions
        for position in changed:
            self.keep_write(position)

    def remember_versions(self) -> None:
        """Take what was written in place until now as seen."""
        with torch._C.DisableTorchFunctionSubclass():
            self._versions = [param._version for param in self._tensors]

    def version_of(self, position: int) -> int:
        """Return how often a parameter was written in place, as torch counts it."""
        with torch._C.DisableTorchFunctionSubclass():
            return int(self._tensors[position]._version)

    def position_at(self, element: int) -> int:
        """Return the position of the parameter that an element of the chunk belongs to."""
        return bisect_right(self._begins, element) - 1


def param_view(flat: torch.Tensor, place: ParamPlace) -> torch.Tensor:
    """Return a parameter's part of a chunk-sized tensor, in the parameter's shape."""
    return flat[place.begin : place.end].view(place.spec.shape)


def placeholders(dtype: torch.dtype, device: torch.device, count: int) -> torch.Tensor:
    """Return the scalars that absent weights show: NaN, a sign to code that goes past torch's functions.

    Args:
        dtype: of the weights.
        device: of compute memory.
        count: how many weights there are.

    Returns:
        [count], one storage.
    """
    value = float("nan") if dtype.is_floating_point else 0
    return torch.full((max(count, 1),), value, dtype=torch.float32).to(dtype).to(device)
