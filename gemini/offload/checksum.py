"""CRC-32C of bytes in host memory, as the I/O engine computes it for verified files."""

from __future__ import annotations

import enum
import errno

import torch

from gemini._native import ffi, lib
from gemini.errors import ConfigError

__all__ = ["CrcMethod", "crc32c"]


class CrcMethod(enum.Enum):
    """Implementation that computes the checksum; all give the same value."""

    AUTO = lib.GN_CRC_AUTO
    PORTABLE = lib.GN_CRC_PORTABLE
    INSTRUCTION = lib.GN_CRC_INSTRUCTION


def crc32c(tensor: torch.Tensor, crc: int = 0, *, method: CrcMethod = CrcMethod.AUTO) -> int:
    """Compute the CRC-32C of a tensor's bytes, or continue an earlier one.

    Args:
        tensor: contiguous, on the CPU, any dtype; read only.
        crc: CRC-32C of the preceding bytes; 0 if there are none.
        method: implementation to use.

    Returns:
        The checksum, 0 to 2^32 - 1.

    Raises:
        ConfigError: this processor or this build lacks the method.
        ValueError: the tensor is not contiguous on the CPU.

    Source: RFC 3720, section 12.1 and appendix B.4.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"crc32c: expected a contiguous CPU tensor, got stride {tensor.stride()} on {tensor.device}")
    value = ffi.new("uint32_t *", crc)
    status = lib.gn_crc32c(value, ffi.cast("void *", tensor.data_ptr()), tensor.nbytes, method.value)
    if status == -errno.ENOTSUP:
        raise ConfigError(f"crc32c: this processor or this build lacks {method.name}; use CrcMethod.AUTO")
    return int(value[0])
