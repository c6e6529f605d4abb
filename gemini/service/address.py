"""The address of a service: `unix:PATH`."""

from __future__ import annotations

import os
from pathlib import Path

from gemini.errors import ConfigError

__all__ = ["default_socket_path", "parse_address"]


def default_socket_path() -> Path:
    """Return the default socket of a user's service.

    Returns:
        `/run/user/UID/gemini.sock`, or for root, and without such a directory, `/run/gemini/service.sock`.
    """
    of_user = Path(f"/run/user/{os.geteuid()}")
    return of_user / "gemini.sock" if of_user.is_dir() else Path("/run/gemini/service.sock")


def parse_address(address: str) -> Path:
    """Return the socket that an address names.

    Args:
        address: `unix:PATH`.

    Returns:
        The path.

    Raises:
        ConfigError: it has another form.
    """
    scheme, _, path = address.partition(":")
    if scheme != "unix" or not path:
        raise ConfigError(f'service: expected an address such as "unix:{default_socket_path()}", got {address!r}')
    return Path(path)
