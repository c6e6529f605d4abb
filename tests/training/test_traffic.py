"""What crosses between host and device in a step, counted exactly on the simulated device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from training_harness import Case, hybrid_adam, step

from gemini import GeminiConfig, GeminiDDP, StaticPlacement
from gemini.offload.home import TiledHome
from gemini.tiers import MemoryTier

NUM_BLOCKS = 8
WIDTH = 64
DTYPE = torch.bfloat16


class Stack(nn.Module):
    """Equal blocks in a row, so that every chunk is a block's: 4096 elements, two pages of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(NUM_BLOCKS)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


CASE = Case(
    build=Stack,
    batch=lambda generator: {"x": torch.randn(4, WIDTH, generator=generator).to(DTYPE)},
    loss=lambda output: output,
)


def config_with(**fields: Any) -> GeminiConfig:
    defaults: dict[str, Any] = {"placement": StaticPlacement(), "gradient_accumulation": True, "prefetch_depth": 1}
    return GeminiConfig(
        device="simulated",
        dtype=DTYPE,
        device_budget="64MiB",
        host_budget="64MiB",
        min_unit_nbytes=0,
        tile_numel=4096,
        num_threads=2,
        **{**defaults, **fields},
    )


def count_copies(engine: GeminiDDP, run: Callable[[], object]) -> tuple[Counter[int], Counter[int]]:
    """Return how often each chunk's weights went up, and how many bytes of each chunk's gradients came down."""
    runtime = engine.runtime
    transfers = runtime.resources.transfers
    upload, download = transfers.upload, transfers.download
    ids = {chunk.name: chunk_id for chunk_id, chunk in enumerate(runtime.core.chunks)}
    uploaded: Counter[int] = Counter()
    downloaded: Counter[int] = Counter()

    def tiles_in_host_memory(home: TiledHome) -> Iterator[torch.Tensor]:
        for tile in (tile for tile, tier in enumerate(home.tiers) if tier is MemoryTier.HOST):
            yield home.tile(tile)
            if home.has_spare(tile):
                yield home.tile(tile, ahead=True)

    def chunk_at(src: torch.Tensor) -> int:
        return next(
            i
            for i, chunk in enumerate(runtime.core.chunks)
            for tile in tiles_in_host_memory(chunk.home)
            if 0 <= src.data_ptr() - tile.data_ptr() < tile.nbytes
        )

    def count_upload(dst: torch.Tensor, src: torch.Tensor, **fields: Any) -> Any:
        uploaded[chunk_at(src)] += src.nbytes
        return upload(dst, src, **fields)

    def count_download(dst: torch.Tensor, src: torch.Tensor, **fields: Any) -> Any:
        if fields["record"] in ids:  # a chunk's gradients, under the chunk's name
            downloaded[ids[fields["record"]]] += src.nbytes
        return download(dst, src, **fields)

    transfers.upload, transfers.download = count_upload, count_download  # type: ignore[method-assign]
    run()
    transfers.upload, transfers.download = upload, download  # type: ignore[method-assign]
    return uploaded, downloaded


def one_warm_step(config: GeminiConfig) -> tuple[GeminiDDP, Counter[int], Counter[int]]:
    """Train three steps, then count the fourth; the engine is closed."""
    with GeminiDDP(CASE.model(), config) as engine:
        optimizer = hybrid_adam(engine.parameters())
        batches = CASE.batches(4)
        for batch in batches[:3]:
            step(engine, optimizer, CASE, batch)
        engine.runtime.finish_updates()
        uploaded, downloaded = count_copies(engine, lambda: _step_and_finish(engine, optimizer, batches[3]))
        return engine, uploaded, downloaded


def _step_and_finish(engine: GeminiDDP, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    step(engine, optimizer, CASE, batch)
    engine.runtime.finish_updates()


UPLOADS = {  # of each block by prefetch depth: in forward, or from its update, and in backward if it has left meanwhile
    0: [2, 2, 2, 2, 2, 2, 1, 1],
    1: [2, 2, 2, 2, 2, 1, 1, 1],
    2: [2, 2, 2, 2, 1, 1, 1, 1],
    3: [2, 2, 2, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("overlap", ["off", "next-forward", "speculative"])
@pytest.mark.parametrize("depth", UPLOADS)
def test_weights_go_up_at_most_twice_a_step(depth: int, overlap: str) -> None:
    engine, uploaded, _ = one_warm_step(config_with(prefetch_depth=depth, overlap=overlap))
    assert engine.runtime.plan.num_slots == depth + 2
    nbytes = [uploaded[chunk.spec.chunk_id] for chunk in engine.runtime.core.chunks]
    assert nbytes == [count * 8192 for count in UPLOADS[depth]]


def test_weights_that_live_on_the_device_never_go_up() -> None:
    _, uploaded, downloaded = one_warm_step(config_with(placement=StaticPlacement(param_device=1, state_device=1)))
    assert uploaded.total() == 0
    assert downloaded.total() == 0


def test_a_resident_copy_goes_up_once_when_its_update_comes() -> None:
    """Its state is in host memory: new weights come from there, and nothing else does."""
    engine, uploaded, _ = one_warm_step(config_with(placement=StaticPlacement(param_device=1)))
    chunks = engine.runtime.core.chunks
    assert len(chunks) == NUM_BLOCKS
    assert all(chunk.is_resident for chunk in chunks)
    for chunk in chunks:
        assert uploaded[chunk.spec.chunk_id] == chunk.spec.working_nbytes
    assert engine.runtime.core.stats.num_fetches == len(chunks)  # at construction


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_leave_once_in_the_working_dtype(accumulates: bool) -> None:
    engine, _, downloaded = one_warm_step(config_with(gradient_accumulation=accumulates))
    for chunk in engine.runtime.core.chunks:
        assert chunk.spec.dtype is DTYPE
        assert downloaded[chunk.spec.chunk_id] == sum(place.spec.numel for place in chunk.spec.places) * DTYPE.itemsize
