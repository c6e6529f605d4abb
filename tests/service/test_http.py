"""What the service shows over HTTP: metrics that Prometheus reads, and a page that works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from patience import PATIENCE_S
from prometheus_client.parser import text_string_to_metric_families
from service_process import MIB, ServiceProcess, running_service, wait_until

from gemini.errors import ConfigError
from gemini.service.http import parse_http_address

pytestmark = pytest.mark.processes


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def shown() -> Iterator[tuple[ServiceProcess, str]]:
    """A service with one job that holds, one that waits, and a shared chunk."""
    port = free_port()
    with (
        running_service("--http", f"127.0.0.1:{port}", "--endurance", "600TB") as service,
        service.client("holds<b>") as holds,
        service.client("waits") as waits,
    ):
        holds.lease(40 * MIB, 8 * MIB, shared={"weights": 4 * MIB})
        holds.shared("weights", 4 * MIB).fill_done("digest")
        waiting = threading.Thread(target=lambda: waits.lease(40 * MIB, 0))
        waiting.start()
        wait_until(lambda: service.rows("waits")[0].state == "waiting")
        yield service, f"http://127.0.0.1:{port}"
        holds.close()
        waiting.join()


def get(address: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def test_prometheus_reads_the_metrics(shown):
    families = {family.name: family for family in text_string_to_metric_families(get(shown[1] + "/metrics"))}
    held = {(s.labels["tier"], s.labels["purpose"]): s.value for s in families["gemini_held_bytes"].samples}
    assert (held["host", "leased"], held["host", "shared"], held["disk", "leased"]) == (40 * MIB, 4 * MIB, 8 * MIB)
    assert {s.labels["job"] for s in families["gemini_job_bytes"].samples} == {"holds<b>", "waits"}
    assert families["gemini_leases_granted"].samples[0].value == 1
    assert families["gemini_budget_bytes"].type == "gauge"


def test_the_state_is_json(shown):
    state = json.loads(get(shown[1] + "/state.json"))
    assert [row["state"] for row in state["members"]] == ["running", "waiting"]
    assert state["host"]["leased"] == 40 * MIB
    assert len(state["samples"]) >= 1


def test_nothing_can_be_changed_and_other_names_are_refused(shown):
    request = urllib.request.Request(shown[1] + "/", data=b"x")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=PATIENCE_S)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(shown[1] + "/", Host="attacker.example")


@pytest.mark.parametrize("text", ["", "9400", "localhost", ":9400", "localhost:-1", "localhost:65536"])
def test_an_address_has_a_host_and_a_port(text):
    with pytest.raises(ConfigError, match="--http: expected HOST:PORT"):
        parse_http_address(text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_in_a_browser_and_asks_nobody_else(shown, scheme, tmp_path):
    if BROWSER is None:
        pytest.skip("needs a browser: chromium or google-chrome")
    playwright: Any = pytest.importorskip("playwright.sync_api", reason="needs playwright to drive the browser")
    complaints: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(shown[1] + "/")
        page.wait_for_selector("#jobs td")
        text = page.inner_text("body")
        while len(asked) < 4:
            page.wait_for_timeout(100)
        drawn = page.locator("svg polygon").count(), page.locator("svg polyline").count()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert complaints == []
    assert {re.sub(r"^http://127.0.0.1:\d+", "", address) for address in asked} == {"/", "/state.json"}
    assert len(asked) >= 3
    assert drawn == (6, 2)
    for expected in ("holds<b>", "running", "40.0 MiB", "weights", "budget 64.0 MiB", "up for", "of its endurance"):
        assert expected in text
