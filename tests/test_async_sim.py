"""The simulated accelerator is asynchronous where a real one is, and gives the CPU's bits."""

from __future__ import annotations

import copy

import async_device
import pytest
import torch
from async_device.process import on_async_device
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LATE = {"max_kernel_delay_us": 2000, "seed": 3}
KIB, MIB = 1 << 10, 1 << 20


def on_device(*shape: int, fill: float = 1.0) -> torch.Tensor:
    return torch.full(shape, fill, device="async_sim")


def locked(numel: int, fill: float = 0.0) -> torch.Tensor:
    return torch.full((numel,), fill).pin_memory()


@on_async_device
def test_kernels_are_queued_and_run_in_order() -> None:
    with async_device.device_with(has_lazy_kernels=1, keeps_records=1) as device:
        x = on_device(4)
        y = (x + 1) * 3
        event = torch.accelerator.current_stream().record_event()
        assert not event.query()
        event.synchronize()
        assert [each.name for each in async_device.take_records() if each.kind == "kernel"] == ["fill_", "add", "mul"]
        assert y.device == device
        assert y.tolist() == [6.0] * 4


@on_async_device
def test_a_stream_that_does_not_wait_reads_too_early() -> None:
    with async_device.device_with(fills_new_blocks=1, has_lazy_kernels=1) as device:
        for waits in (True, False):
            y = on_device(16, fill=3.0)
            other = torch.Stream(device)
            if waits:
                other.wait_event(torch.accelerator.current_stream().record_event())
            with other:
                z = y.clone()  # a copy, which is not lazy
            other.synchronize()
            assert z.eq(3.0).all().item() is waits


@on_async_device
def test_events_measure_time_and_hold_streams_up() -> None:
    with async_device.device_with(kernel_cost_us=4000) as device:
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        begin.record()
        on_device(4).add_(1)
        end.record()
        end.synchronize()
        assert begin.elapsed_time(end) >= 8.0


@on_async_device
def test_copies_of_locked_memory_do_not_wait_and_others_do() -> None:
    with async_device.device_with(has_lazy_copies=1):
        there = torch.empty(32 * KIB, device="async_sim")
        stream = torch.accelerator.current_stream()
        there.copy_(locked(32 * KIB), non_blocking=True)
        assert not stream.query()
        there.copy_(torch.ones(32 * KIB), non_blocking=True)
        assert stream.query()
        there.copy_(locked(32 * KIB))
        assert stream.query()


@on_async_device
def test_bandwidth_is_kept_in_each_direction() -> None:
    with async_device.device_with(keeps_records=1) as device:
        here, there = locked(MIB // 4), torch.zeros(MIB // 4, device=device)
        torch.accelerator.synchronize()
        async_device.take_records()
        async_device.set_options(
            upload_nbytes_per_second=50 * MIB, download_nbytes_per_second=100 * MIB, keeps_records=1
        )
        there.copy_(here, non_blocking=True)
        with torch.Stream(device) as stream:
            there.copy_(here, non_blocking=True)
        stream.synchronize()
        here.copy_(there)
        records = [each for each in async_device.take_records() if each.name == "copy_"]
        ups, downs = ([each for each in records if each.kind == kind] for kind in ("upload", "download"))
        assert max(each.end_ns for each in ups) - min(each.begin_ns for each in ups) >= 2 * 20e6
        assert downs[0].end_ns - downs[0].begin_ns >= 10e6


@on_async_device
def test_memory_is_reused_on_its_stream_at_once_and_elsewhere_when_it_may_be() -> None:
    with async_device.device_with(has_lazy_kernels=1) as device:
        side = torch.Stream(device)
        x = torch.empty(MIB, device=device)
        address = x.data_ptr()
        del x
        x = torch.empty(MIB, device=device)
        assert x.data_ptr() == address
        with side:
            x.add_(1)
        x.record_stream(side)
        del x
        other = torch.empty(MIB, device=device)
        assert other.data_ptr() != address
        side.synchronize()
        assert torch.empty(MIB, device=device).data_ptr() == address


@on_async_device
def test_memory_is_counted_and_bounded() -> None:
    torch.accelerator.empty_cache()
    with async_device.device_with(capacity_nbytes=8 * MIB) as device:
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        x = torch.empty(4 * MIB, dtype=torch.uint8, device=device)
        assert torch.accelerator.memory_allocated() - before == 4 * MIB
        del x
        assert torch.accelerator.memory_allocated() == before
        assert torch.accelerator.max_memory_allocated() - before == 4 * MIB
        x = torch.empty(6 * MIB, dtype=torch.uint8, device=device)  # what is kept for reuse is given up for it
        with pytest.raises(torch.OutOfMemoryError, match="has no 8912896 bytes left of 8388608"):
            torch.empty(8 * MIB + 512 * KIB, dtype=torch.uint8, device=device)
        free, total = torch.get_device_module(device).mem_get_info(device)
        assert total == 8 * MIB
        assert free <= 2 * MIB
        assert x.numel() == 6 * MIB


@on_async_device
def test_what_fails_in_a_kernel_is_told_by_the_next_wait_and_names_it() -> None:
    async_device.load()
    with async_device.device_with() as device:
        torch.arange(4, device=device)[torch.tensor([7], device=device)]
        with pytest.raises(RuntimeError, match="index failed on the device: index 7 is out of bounds"):
            torch.accelerator.synchronize()
        torch.accelerator.synchronize()


@on_async_device
def test_what_is_not_there_is_named() -> None:
    with async_device.device_with() as device:
        with pytest.raises(NotImplementedError, match="aten::_histogramdd_bin_edges is not there"):
            torch.histogramdd(torch.rand(5, 2, device=device), bins=[3, 3])
        with pytest.raises(NotImplementedError, match="_lstm_cell is not there .* the CPU has no kernel"):
            nn.LSTM(2, 2).to(device)(torch.ones(1, 1, 2, device=device))
        with pytest.raises(RuntimeError, match="found at least two devices, async_sim:0 and cpu"):
            torch.ones(3, device=device) + torch.ones(3)


@on_async_device
def test_what_depends_on_values_waits_for_them() -> None:
    with async_device.device_with(**LATE) as device:
        x = torch.arange(6, device=device) % 3
        assert x.sum().item() == 6
        assert x.nonzero().flatten().tolist() == [1, 2, 4, 5]
        assert x[x > 1].tolist() == [2, 2]
        assert torch.unique(x).tolist() == [0, 1, 2]
        assert torch.equal(x, x.clone())


@on_async_device
def test_views_and_operations_in_place_share_memory() -> None:
    with async_device.device_with(**LATE) as device:
        x = torch.zeros(4, 6, device=device)
        x[1:3, ::2] += 1
        x.t()[5].fill_(7)
        x.view(2, 2, 6)[0].mul_(2)
        torch.add(x[:, 1], 1, out=x[:, 3])
        expected = torch.zeros(4, 6)
        expected[1:3, ::2] += 1
        expected.t()[5].fill_(7)
        expected.view(2, 2, 6)[0].mul_(2)
        torch.add(expected[:, 1], 1, out=expected[:, 3])
        assert torch.equal(x.cpu(), expected)
        assert torch.equal(x.view(torch.int32).cpu(), expected.view(torch.int32))


@on_async_device
def test_random_numbers_follow_the_seed() -> None:
    with async_device.device_with() as device:
        torch.manual_seed(5)
        first = torch.rand(8, device=device)
        state = torch.get_device_module(device).get_rng_state(device)
        second = nn.functional.dropout(torch.ones(64, device=device), 0.5)
        torch.get_device_module(device).set_rng_state(state, device)
        assert torch.equal(nn.functional.dropout(torch.ones(64, device=device), 0.5), second)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(8, device=device), first)
        assert set(second.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_async_device
def test_a_model_trains_to_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(dtype)
    model = nn.Sequential(nn.Embedding(11, 16, dtype=dtype), layer, nn.Linear(16, 11, dtype=dtype))
    ids = torch.randint(11, (4, 7))

    def train(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        for _ in range(3):
            with sdpa_kernel(SDPBackend.MATH):  # the only one of the device
                nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [param.detach().cpu() for param in model.parameters()]

    twin = copy.deepcopy(model)
    with async_device.device_with(max_kernel_delay_us=300, fills_new_blocks=1) as device:
        found = train(twin.to(device), ids.to(device))
    assert all(torch.equal(a, b) for a, b in zip(found, train(model, ids), strict=True))


@on_async_device
def test_batch_norm_in_evaluation_is_there() -> None:
    layer = nn.BatchNorm1d(3).eval()
    x = torch.randn(5, 3)
    expected = layer(x)
    with async_device.device_with() as device:
        assert torch.equal(layer.to(device)(x.to(device)).cpu(), expected)


@on_async_device
def test_convolutions_are_there() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    image = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(layer)
    with async_device.device_with(**LATE) as device:
        twin.to(device)(image.to(device)).square().sum().backward()
    layer(image).square().sum().backward()
    assert twin.weight.grad is not None
    torch.testing.assert_close(twin.weight.grad.cpu(), layer.weight.grad)


def test_the_host_cannot_touch_the_devices_memory() -> None:
    with pytest.raises(AssertionError, match="the process ended with -11"):
        reading_on_the_host()


@on_async_device
def reading_on_the_host() -> None:
    import ctypes

    with async_device.device_with() as device:
        x = torch.zeros(4, device=device)
        torch.accelerator.synchronize()
        ctypes.string_at(x.data_ptr(), 4)
