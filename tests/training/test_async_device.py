"""Training on an accelerator that is asynchronous: the same bits wherever chunks live and however late things run.

The device is a simulated one of torch's accelerators (tests/support/async_device); all of the engine's path for CUDA
runs on it but for Triton: streams, events, page-locked memory, torch's own calls, autograd's thread for the device.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from pathlib import Path
from typing import Any

import async_device
import pytest
import torch
from async_device.process import on_async_device
from model_zoo import HF_CASES
from small_resources import small_resources
from torch.utils.checkpoint import checkpoint
from training_harness import (
    EPS,
    LR,
    WEIGHT_DECAY,
    Case,
    Run,
    config_for,
    hybrid_adam,
    same_bits,
    step,
    train_gemini,
)

from gemini import GeminiConfig, GeminiDDP, StaticPlacement
from gemini.errors import ConfigError, OutOfTierMemoryError
from gemini.kernels.adam_tile import AdamHyper, AdamSegment
from gemini.kernels.device import device_adam_update
from gemini.kernels.device_tile import DeviceTile
from gemini.offload import transfer
from gemini.offload.resources import device_of
from gemini.offload.transfer import StreamTransfers
from gemini.tiers import MemoryTier, parse_nbytes

PLACES = ("device", "mixed", "refreshed", "resident", "below")
MODES = ("off", "next-forward", "speculative")
DELAYS = {
    "prompt": {},
    "late copies": {"max_copy_delay_us": 3000, "seed": 1},
    "late kernels": {"max_kernel_delay_us": 100, "seed": 2},
    "slow links": {"upload_nbytes_per_second": 50 << 20, "download_nbytes_per_second": 25 << 20},
    "last copies": {"has_lazy_copies": 1},
    "last kernels": {"has_lazy_kernels": 1},
}
NUM_STEPS = 4


def on_device(case: Case) -> Case:
    def batch(generator: torch.Generator) -> dict[str, Any]:
        return {name: value.to(async_device.NAME) for name, value in case.batch(generator).items()}

    return dataclasses.replace(case, batch=batch)


def config_of(place: str, tmp_path: Path | None, **fields: Any) -> GeminiConfig:
    """Return a configuration; in "refreshed" weights stay on the device and are updated on the host."""
    fields = {"device": async_device.NAME, "device_budget": "64MiB", **fields}
    if place == "refreshed":
        fields = {"placement": StaticPlacement(param_device=1), **fields}
    return dataclasses.replace(config_for("device" if place == "refreshed" else place, tmp_path), **fields)


def train(config: GeminiConfig) -> Run:
    """Train with a forward between backward and step; nobody waits for a result before the end."""
    case = on_device(HF_CASES["gpt2"])
    with GeminiDDP(case.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        losses = []
        for batch in case.batches(NUM_STEPS):
            loss = case.loss(engine(**batch))
            loss.backward()
            with torch.no_grad():
                losses += [loss.detach(), case.loss(engine(**batch))]
            optimizer.step()
            optimizer.zero_grad()
        return Run([loss.item() for loss in losses], engine.master_state_dict())


@functools.cache
def plain_run() -> Run:
    """Train the model that is wholly on the device, without an engine, by the same rule of update."""
    case = on_device(HF_CASES["gpt2"])
    with async_device.device_with() as device:
        model = case.model().to(device)
        params = list(model.parameters())
        states = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
        hyper = AdamHyper(lr=LR, beta1=0.9, beta2=0.999, eps=EPS, weight_decay=WEIGHT_DECAY)
        losses = []
        for number, batch in enumerate(case.batches(NUM_STEPS), start=1):
            loss = case.loss(model(**batch))
            loss.backward()
            losses += [loss.item(), loss.item()]
            for param, (momentum, variance) in zip(params, states, strict=True):
                update_plainly(
                    param, momentum, variance, AdamSegment(begin=0, end=param.numel(), hyper=hyper, step=number)
                )
        return Run(losses, {name: value.cpu() for name, value in model.state_dict().items()})


def update_plainly(
    param: torch.nn.Parameter, momentum: torch.Tensor, variance: torch.Tensor, segment: AdamSegment
) -> None:
    assert param.grad is not None
    device_adam_update(
        DeviceTile(
            working=param.detach().view(-1),
            master=None,
            momentum=momentum.view(-1),
            variance=variance.view(-1),
            grad=param.grad.view(-1),
            grad_scale=1.0,
            segments=(segment,),
        )
    )
    param.grad = None


@pytest.mark.quick_cases(9)
@pytest.mark.parametrize("delays", DELAYS)
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
@on_async_device
def test_every_placement_gives_the_bits_of_plain_torch(
    tmp_path: Path, place: str, mode: str, depth: int, delays: str
) -> None:
    expected = plain_run()
    with async_device.device_with(fills_new_blocks=1, **DELAYS[delays]):
        found = train(config_of(place, tmp_path, overlap=mode, prefetch_depth=depth))
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("place", PLACES)
@on_async_device
def test_on_a_stream_of_the_users_it_gives_them_too(tmp_path: Path, place: str, mode: str) -> None:
    """The update's thread has another current stream, which knows nothing of the one that computes."""
    expected = plain_run()
    with async_device.device_with(fills_new_blocks=1, max_kernel_delay_us=100, max_copy_delay_us=1000) as device:
        with torch.Stream(device) as stream:
            found = train(config_of(place, tmp_path, overlap=mode))
        assert stream.query()
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_async_device
def test_half_precision_gives_the_same_bits_everywhere(tmp_path: Path, dtype: torch.dtype) -> None:
    runs = []
    for place in PLACES:
        with async_device.device_with(fills_new_blocks=1, max_copy_delay_us=1000, max_kernel_delay_us=50):
            runs.append(train(config_of(place, tmp_path, dtype=dtype, overlap="next-forward")))
    assert all(run.losses == runs[0].losses for run in runs)
    assert all(same_bits(run.weights, runs[0].weights) for run in runs)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", ["768KiB", "1MiB", "4MiB"])
@on_async_device
def test_a_budget_that_is_all_the_device_has_is_kept(budget: str, mode: str) -> None:
    """After the first step as many chunks stay as there is room for, and several backward passes are summed there."""
    case = on_device(HF_CASES["gpt2"])

    def train_in(**fields: Any) -> Run:
        with GeminiDDP(case.model(), config_of("device", None, overlap=mode, **fields)) as engine:
            optimizer = hybrid_adam(engine.parameters())
            losses = []
            for batch in case.batches(NUM_STEPS):
                for _ in range(2):
                    losses.append(case.loss(engine(**batch)))
                    losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            return Run([loss.item() for loss in losses], engine.master_state_dict())

    with async_device.device_with(fills_new_blocks=1):
        expected = train_in()
        gc.collect()
        torch.accelerator.empty_cache()
        before = torch.accelerator.memory_allocated()
        nbytes = parse_nbytes(budget, name="budget")
    with async_device.device_with(fills_new_blocks=1, max_kernel_delay_us=50, max_copy_delay_us=500):
        torch.accelerator.reset_peak_memory_stats()
        found = train_in(placement="auto", device_budget=budget, activation_reserve="512KiB")
        assert torch.accelerator.max_memory_allocated() - before <= nbytes
    assert found.losses == expected.losses
    assert same_bits(found.weights, expected.weights)


@on_async_device
def test_slices_give_the_same_bits_however_late_things_run() -> None:
    gpt2 = on_device(HF_CASES["gpt2"])
    case = dataclasses.replace(gpt2, batch=lambda generator: {**gpt2.batch(generator), "use_cache": False})
    runs = []
    for delays in ({}, {"max_copy_delay_us": 3000, "max_kernel_delay_us": 50}):
        with async_device.device_with(fills_new_blocks=1, **delays):
            runs.append(train_gemini(case, config_of("device", None, num_batch_slices=2, overlap="next-forward")))
    assert runs[0].losses == runs[1].losses
    assert same_bits(runs[0].weights, runs[1].weights)


@on_async_device
def test_an_engine_takes_the_accelerator_that_is_there() -> None:
    with async_device.device_with() as device:
        assert device_of(GeminiConfig()) == device
        assert device_of(GeminiConfig(device="async_sim")) == device
        assert device_of(GeminiConfig(device="async_sim:1")) == torch.device("async_sim", 1)
        with pytest.raises(ConfigError, match="torch finds no CUDA device"):
            device_of(GeminiConfig(device="cuda"))


@on_async_device
def test_an_engine_on_the_second_device_takes_nothing_of_the_first() -> None:
    case = HF_CASES["gpt2"]
    with async_device.device_with():
        expected = train_gemini(on_device(case), config_of("device", None))
        before = torch.accelerator.memory_reserved(0)
        torch.accelerator.reset_peak_memory_stats(0)
        there = dataclasses.replace(
            case, batch=lambda generator: {k: v.to("async_sim:1") for k, v in case.batch(generator).items()}
        )
        found = train_gemini(there, config_of("device", None, device="async_sim:1", overlap="next-forward"))
        assert torch.accelerator.max_memory_allocated(1) > 0
        assert torch.accelerator.memory_reserved(0) == before
        assert found.losses == expected.losses


@pytest.mark.parametrize("place", PLACES)
@on_async_device
def test_closing_gives_all_device_memory_back(tmp_path: Path, place: str) -> None:
    case = on_device(HF_CASES["gpt2"])
    with async_device.device_with():
        gc.collect()
        before = torch.accelerator.memory_allocated()
        gc.disable()  # references in circles must not be what holds it
        try:
            with GeminiDDP(case.model(), config_of(place, tmp_path)) as engine:
                optimizer = hybrid_adam(engine.parameters())
                for batch in case.batches(2):
                    step(engine, optimizer, case, batch)
            ledger = engine.runtime.resources.ledger
            assert ledger.by_purpose(MemoryTier.DEVICE) == {}
            del batch
            assert torch.accelerator.memory_allocated() - before <= 8192
        finally:
            gc.enable()


class Recomputed(torch.nn.Module):
    """Two layers whose activations are computed again in backward, by autograd's thread for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@on_async_device
def test_an_engine_can_be_used_after_a_recomputation_that_was_interrupted() -> None:
    case = Case(Recomputed, lambda generator: {"x": torch.randn(2, 32, generator=generator).to("async_sim")})

    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt("on purpose")

    with async_device.device_with(), GeminiDDP(case.model(), config_of("device", None)) as engine:
        (batch,) = case.batches(1)
        loss = engine(**batch).square().sum()
        engine.module.layers[0].forward = refuse
        with pytest.raises(KeyboardInterrupt, match="on purpose"):
            loss.backward()
        del engine.module.layers[0].forward
        engine(**batch).square().sum().backward()


@on_async_device
def test_an_upload_after_a_mark_waits_for_no_later_compute() -> None:
    with (
        async_device.device_with(has_lazy_kernels=1) as device,
        small_resources(device=async_device.NAME, device_budget="1MiB") as resources,
    ):
        transfers = resources.transfers
        there, here = transfers.allocate(4096, "slots"), resources.arena.allocate(4096, "working").fill_(7)
        mark = transfers.mark()
        torch.ones(1, device=device)
        busy = torch.accelerator.current_stream().record_event()
        transfers.upload(there, here, after=mark).wait_on_host()
        assert not busy.query()
        transfers.upload(there, here).wait_on_host()
        assert busy.query()


@on_async_device
def test_a_refresh_does_not_queue_behind_a_prefetch_that_waits_for_compute() -> None:
    with (
        async_device.device_with(keeps_records=1),
        small_resources(device=async_device.NAME, device_budget="1MiB") as resources,
    ):
        transfers, arena = resources.transfers, resources.arena
        there, here = transfers.allocate(8192, "slots"), arena.allocate(8192, "working").fill_(7)
        transfers.upload(there[:4096], here[:4096]).wait_on_host()
        transfers.upload(there[4096:], here[4096:], after=transfers.mark()).wait_on_host()
        streams = [each.stream for each in async_device.take_records() if each.kind == "upload"]
        assert len(set(streams)) == len(streams) == 2


@on_async_device
def test_memory_that_is_freed_serves_others_once_copies_have_ended() -> None:
    with (
        async_device.device_with(has_lazy_copies=1) as device,
        small_resources(device=async_device.NAME, device_budget="1MiB") as resources,
    ):
        transfers = resources.transfers
        there, here = transfers.allocate(1 << 18, "slots"), resources.arena.allocate(1 << 18, "working")
        address = there.data_ptr()
        transfers.upload(there, here)
        transfers.free(there, "slots")
        del there
        assert torch.empty(1 << 18, dtype=torch.uint8, device=device).data_ptr() != address
        transfers.synchronize()
        assert torch.empty(1 << 18, dtype=torch.uint8, device=device).data_ptr() == address


@on_async_device
def test_only_what_is_copied_is_page_locked() -> None:
    with async_device.device_with(), small_resources(device=async_device.NAME, device_budget="1MiB") as resources:
        working = resources.arena.allocate(4096, "working")
        assert working.is_pinned()
        assert not resources.arena.allocate(4096, "state").is_pinned()
        resources.arena.free(working)
        assert not working.is_pinned()


@on_async_device
def test_what_the_device_refuses_is_an_error_of_the_tier() -> None:
    with (
        async_device.device_with(capacity_nbytes=1 << 20),
        small_resources(device=async_device.NAME, device_budget="1GiB") as resources,
        pytest.raises(OutOfTierMemoryError, match="refused .* for slots, which device_budget allows"),
    ):
        resources.transfers.allocate(2 << 20, "slots")


# ---------------------------------------------------------------- would it be noticed?


def copies_wait_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """A slot is refilled while compute still reads it, and a gradient leaves before it is there."""
    copy = StreamTransfers._copy

    def copy_at_once(self: StreamTransfers, stream: Any, dst: torch.Tensor, src: torch.Tensor, **fields: Any) -> Any:
        return copy(self, stream, dst, src, **{**fields, "after": torch.Event(self.device)})

    patch.setattr(StreamTransfers, "_copy", copy_at_once)


def uploads_wait_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """A slot is refilled while compute still reads it."""
    upload = StreamTransfers.upload

    def upload_at_once(self: StreamTransfers, *args: Any, after: Any = None, **fields: Any) -> Any:
        return upload(self, *args, after=torch.Event(self.device), **fields)

    patch.setattr(StreamTransfers, "upload", upload_at_once)


def downloads_wait_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """A gradient leaves before it has been computed."""
    download = StreamTransfers.download

    def download_at_once(self: StreamTransfers, *args: Any, **fields: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "mark", lambda: torch.Event(self.device))
            return download(self, *args, **fields)

    patch.setattr(StreamTransfers, "download", download_at_once)


def compute_waits_for_no_upload(patch: pytest.MonkeyPatch) -> None:
    """A unit runs on what was in its slots before."""
    patch.setattr(transfer._StreamMove, "wait_on_compute", lambda self: None)


def the_host_waits_for_no_copy(patch: pytest.MonkeyPatch) -> None:
    """The host reads a gradient before it has come, and writes to a home that is still being copied from."""
    patch.setattr(transfer._StreamMove, "wait_on_host", lambda self: None)
    patch.setattr(transfer._StreamMove, "is_done", lambda self: True)


def compute_waits_for_no_download(patch: pytest.MonkeyPatch) -> None:
    """A gradient is written to a slot that the one before is still being copied from."""
    download = StreamTransfers.download

    def download_unseen(self: StreamTransfers, *args: Any, **fields: Any) -> Any:
        move = download(self, *args, **fields)
        move.wait_on_compute = lambda: None
        return move

    patch.setattr(StreamTransfers, "download", download_unseen)


def refreshes_follow_their_own_thread(patch: pytest.MonkeyPatch) -> None:
    """A copy that the update refreshes is written while compute, on a stream of the user's, reads it."""
    upload = StreamTransfers.upload

    def upload_after_own(self: StreamTransfers, *args: Any, after: Any = None, **fields: Any) -> Any:
        return upload(self, *args, **fields)

    patch.setattr(StreamTransfers, "upload", upload_after_own)


LATE = {"has_lazy_copies": 1}
SLOW = {"has_lazy_kernels": 1}
MUTATIONS = {
    copies_wait_for_nothing: ("device", SLOW),
    uploads_wait_for_nothing: ("device", SLOW),
    downloads_wait_for_nothing: ("device", SLOW),
    compute_waits_for_no_upload: ("device", LATE),
    compute_waits_for_no_download: ("device", LATE),
    the_host_waits_for_no_copy: ("device", LATE),
    refreshes_follow_their_own_thread: ("refreshed", SLOW),
}
"""For each where chunks live and what runs late, so that it shows."""


@pytest.mark.parametrize("mutation", [mutation.__name__ for mutation in MUTATIONS])
@on_async_device
def test_a_wait_that_is_left_out_shows(mutation: str) -> None:
    expected = plain_run()
    (mutate,) = (each for each in MUTATIONS if each.__name__ == mutation)
    place, delays = MUTATIONS[mutate]
    config = config_of(place, None, overlap="next-forward", prefetch_depth=1)
    with async_device.device_with(fills_new_blocks=1, **delays), torch.Stream(async_device.NAME):
        assert train(config).losses == expected.losses
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            found = train(config)
    assert found.losses != expected.losses or not same_bits(found.weights, expected.weights)
