"""The hardware profile: measured by the engine's own means, kept in a file."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from fake_clock import FakeClock

from gemini.errors import ConfigError
from gemini.planning import hardware
from gemini.planning.hardware import HardwareProfile, load_profile, measure_hardware, save_profile

PROFILE = HardwareProfile(
    matrix_rates={"float32": 1e12, "bfloat16": 2e12},
    host_memory_rate=3e10,
    device_memory_rate=1e12,
    h2d_rate=2e10,
    d2h_rate=1.5e10,
)


def test_processor_and_disk_are_measured(tmp_path):
    profile = measure_hardware(tmp_path, "cpu", seconds=0.02, disk_seconds=0.02, disk_nbytes=16 << 20)
    assert set(profile.matrix_rates) == {"float32", "bfloat16", "float16"}
    assert (profile.h2d_rate, profile.d2h_rate, profile.device_memory_rate) == (None, None, None)
    fields = dataclasses.asdict(profile)
    disk = [fields[f"nvme_{kind}_rate"] for kind in ("read", "write", "mixed")]
    assert all(rate > 1e6 for rate in (profile.host_memory_rate, *profile.matrix_rates.values(), *disk))
    assert 0 < fields["compute_share_beside_nvme"] <= 1
    assert 0 < fields["nvme_share_beside_compute"] <= 1
    assert list(tmp_path.iterdir()) == []


def test_simulated_device_has_copies_and_no_disk_is_touched_unasked():
    profile = measure_hardware(device="simulated", seconds=0.02)
    assert profile.h2d_rate is not None
    assert profile.d2h_rate is not None
    assert profile.device_memory_rate is not None
    assert (profile.nvme_read_rate, profile.nvme_write_rate, profile.nvme_mixed_rate) == (None, None, None)


def test_matrix_rate_is_operations_per_second(monkeypatch):
    """Of a processor that makes a billion operations a second, two for each multiplication of a product."""
    clock = FakeClock()
    clock.set_in(monkeypatch, hardware)
    monkeypatch.setattr(torch, "mm", lambda a, b, out: clock.sleep(2 * a.shape[0] ** 3 / 1e9))
    resources = SimpleNamespace(transfers=SimpleNamespace(device="cpu", synchronize=lambda: None))
    rates = hardware._measure_products(resources, seconds=0.1)
    assert rates == pytest.approx({"float32": 1e9, "bfloat16": 1e9, "float16": 1e9})


@pytest.mark.gpu
def test_gpu_is_measured_at_plausible_rates():
    profile = measure_hardware(device="cuda")
    assert profile.matrix_rates["bfloat16"] > 1e13
    assert min(profile.h2d_rate, profile.d2h_rate) > 1e9
    assert profile.device_memory_rate > 1e11


def test_profile_survives_the_file(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"matrix_rates": 3, "host_memory_rate": 1}',
        '{"matrix_rates": {}, "host_memory_rate": -1}',
        '{"matrix_rates": {}, "host_memory_rate": "1"}',
        '{"matrix_rates": {}, "host_memory_rate": 1, "speed": 2}',
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="profile.json: expected a hardware profile as save_profile writes it"):
        load_profile(path)
