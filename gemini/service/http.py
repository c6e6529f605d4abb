"""The service's page and metrics over HTTP; read only."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from gemini.errors import ConfigError, ServiceError
from gemini.service.history import SAMPLE_S, History
from gemini.service.metrics import ServiceCollector

if TYPE_CHECKING:
    from gemini.service.node_service import NodeService

__all__ = ["HttpServer", "parse_http_address"]

PAGE_PATH = Path(__file__).with_name("page.html")
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""Headers that restrict the page to requests to this server."""


def parse_http_address(text: str) -> tuple[str, int]:
    """Return the address to listen on.

    Args:
        text: HOST:PORT, or [HOST]:PORT for IPv6.

    Returns:
        Host and port; port 0 selects any free port.

    Raises:
        ConfigError: it has another form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f'--http: expected HOST:PORT such as "127.0.0.1:9400", got {text!r}')
    return host.strip("[]"), int(port)


class HttpServer:
    """Serves `/`, `/state.json` and `/metrics` while its context lasts.

    Args:
        service: the service to show.
        address: HOST:PORT.
        endurance_nbytes: total bytes the drive is rated for; None: not known.

    Raises:
        ConfigError: the address has another form.
    """

    def __init__(self, service: NodeService, address: str, *, endurance_nbytes: int | None = None) -> None:
        self._service = service
        self._host, self._port = parse_http_address(address)
        self._history = History(service, endurance_nbytes=endurance_nbytes)
        self._registry = CollectorRegistry()
        self._page = PAGE_PATH.read_text(encoding="utf-8")
        self._runner: web.AppRunner | None = None
        self._sampling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> HttpServer:
        self._registry.register(ServiceCollector(self._service, self._history))
        application = web.Application(middlewares=[self._only_for_this_host])
        application.router.add_get("/", self._get_page)
        application.router.add_get("/state.json", self._get_state)
        application.router.add_get("/metrics", self._get_metrics)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise ServiceError(f"--http: cannot listen at {self._host}:{self._port}: {error.strerror}") from error
        self._sampling = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._sampling is not None
        assert self._runner is not None
        self._sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._sampling
        await self._runner.cleanup()

    async def _sample(self) -> None:
        while True:
            self._history.sample()
            await asyncio.sleep(SAMPLE_S)

    @web.middleware
    async def _only_for_this_host(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer only requests for an address or this host's name; other domain names may lead here (DNS rebinding)."""
        name = request.url.host or ""
        if name not in ("localhost", self._host) and not _is_address(name):
            raise web.HTTPForbidden(text="ask by address, or as localhost")
        return await handler(request)

    async def _get_page(self, request: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", headers=HEADERS)

    async def _get_state(self, request: web.Request) -> web.Response:
        return web.json_response(self._history.state(), headers=HEADERS)

    async def _get_metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={**HEADERS, "Content-Type": CONTENT_TYPE_LATEST}
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
