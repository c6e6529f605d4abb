"""Gradients on their way to where they wait: same bits and same norms whatever the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from builders import make_chunk_spec
from small_resources import break_writes, small_resources

from gemini.chunk.layout import ChunkSpec
from gemini.errors import ModelError, OffloadIOError
from gemini.gradients.store import GradientStore
from gemini.kernels.cpu import GradMode, store_gradient
from gemini.kernels.device import select_device_kernels
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.tiers import MemoryTier, round_up

DEVICE, HOST, NVME = MemoryTier.DEVICE, MemoryTier.HOST, MemoryTier.NVME
LENGTHS = (1000, 7, 1, 2048)
NUMEL = 1024 + 64 + 64 + 2048  # each starts at a multiple of 64

# How a gradient travels: compute device, and the tier where it waits.
PATHS = {
    "host": ("cpu", HOST),
    "disk": ("cpu", NVME),
    "device": ("simulated", DEVICE),
    "device to host": ("simulated", HOST),
    "device to disk": ("simulated", NVME),
}
BELOW = {name: path for name, path in PATHS.items() if path[1] is not DEVICE}


def make_spec(chunk_id: int, dtype: torch.dtype) -> ChunkSpec:
    return make_chunk_spec(LENGTHS, dtype, chunk_id=chunk_id, name=f"chunk{chunk_id}.weight{{}}")


class Store:
    """A gradient store of a few chunks, fed by autograd."""

    def __init__(self, resources: Resources, tier: MemoryTier, num_chunks: int, dtype: torch.dtype, keep: torch.dtype):
        has_device = resources.transfers.compute_tier is DEVICE
        self.resources = resources
        self.keep = keep
        home_nbytes = round_up(NUMEL * keep.itemsize, 4096)
        self.store = GradientStore(
            resources,
            device_kernels=select_device_kernels(resources.transfers.device),
            grad_dtype_of=lambda spec: keep,
            num_slots=2,
            device_slot_nbytes=round_up(NUMEL * dtype.itemsize, 4096) if has_device and tier is not DEVICE else 0,
            disk_slot_nbytes=home_nbytes if tier is NVME else 0,
        )
        self.params: dict[tuple[int, int], torch.nn.Parameter] = {}
        for chunk_id in range(num_chunks):
            spec = make_spec(chunk_id, dtype)
            home = TiledHome(
                (tier,),
                (home_nbytes,),
                arena=resources.arena,
                store=resources.store,
                transfers=resources.transfers,
                purpose="gradients",
            )
            self.store.add_chunk(spec, home, tier)
            for position, length in enumerate(LENGTHS):
                self._add_param(chunk_id, position, torch.nn.Parameter(torch.zeros(length, dtype=dtype)))

    def _add_param(self, chunk_id: int, position: int, param: torch.nn.Parameter) -> None:
        def take(param: torch.nn.Parameter) -> None:
            grad, param.grad = param.grad, None
            assert grad is not None
            self.store.put(chunk_id, position, grad)

        param.register_post_accumulate_grad_hook(take)
        self.params[chunk_id, position] = param

    def backward(self, grads: dict[tuple[int, int], torch.Tensor]) -> None:
        """Let autograd hand over these gradients."""
        torch.stack([(self.params[key] * grad).sum() for key, grad in grads.items()]).sum().backward()

    def waiting(self, chunk_id: int) -> list[torch.Tensor]:
        """Return a chunk's gradients as they wait."""
        self.store.finish()
        home = self.store.home_of(chunk_id)
        content = torch.zeros(home.tile_nbytes[0], dtype=torch.uint8)
        if home.is_on_disk:
            home.read_tile(0, content).wait()
        else:
            content.copy_(home.tile(0))
        flat = content[: NUMEL * self.keep.itemsize].view(self.keep)
        return [flat[place.begin : place.end] for place in make_spec(0, self.keep).places]


@contextmanager
def opened(
    path: str,
    tmp_path: Path,
    *,
    num_chunks: int = 1,
    dtype: torch.dtype = torch.float32,
    keep: torch.dtype = torch.float32,
) -> Iterator[Store]:
    device, tier = PATHS[path]
    with small_resources(tmp_path if tier is NVME else None, device=device) as resources:
        made = Store(resources, tier, num_chunks, dtype, keep)
        yield made
        made.store.close()


def make_grads(
    num_chunks: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[tuple[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = [(chunk_id, position) for chunk_id in range(num_chunks) for position in range(len(LENGTHS))]
    return {key: torch.randn(LENGTHS[key[1]], generator=generator).to(dtype) for key in keys}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_waits_as_it_came(path: str, dtype: torch.dtype, tmp_path: Path) -> None:
    grads = make_grads(1, dtype)
    with opened(path, tmp_path, dtype=dtype) as made:
        made.backward(grads)
        assert all(torch.equal(f, g.float()) for f, g in zip(made.waiting(0), grads.values(), strict=True))
        assert made.store.arrived(0) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_sums_of_squares_are_the_kernel_s_whatever_the_way(path: str, dtype: torch.dtype, tmp_path: Path) -> None:
    grads = make_grads(3, dtype)
    with opened(path, tmp_path, num_chunks=3, dtype=dtype) as made:
        made.backward(grads)
        found = made.store.sums_of_squares()
    assert found == {
        f"chunk{chunk_id}.weight{position}": store_gradient(torch.empty(grad.numel()), grad)
        for (chunk_id, position), grad in grads.items()
    }


@pytest.mark.parametrize("path", PATHS)
def test_several_backward_passes_add_up_in_float32(path: str, tmp_path: Path) -> None:
    passes = [make_grads(1, torch.bfloat16, seed) for seed in range(3)]
    with opened(path, tmp_path, dtype=torch.bfloat16) as made:
        for grads in passes:
            made.backward(grads)
        found, sums = made.waiting(0), made.store.sums_of_squares()
    for position, (_, *rest) in enumerate(zip(*(grads.values() for grads in passes), strict=True)):
        expected = passes[0][0, position].float()
        for grad in rest:
            sumsq = store_gradient(expected, grad, mode=GradMode.ADD)
        assert torch.equal(found[position], expected)
        assert sums[f"chunk0.weight{position}"] == sumsq


@pytest.mark.parametrize("path", PATHS)
def test_more_chunks_than_slots_are_written_out_and_read_back(path: str, tmp_path: Path) -> None:
    first, second = make_grads(7, seed=1), make_grads(7, seed=2)
    with opened(path, tmp_path, num_chunks=7) as made:
        made.backward(first)
        made.backward(second)
        for chunk_id in range(7):
            for position, found in enumerate(made.waiting(chunk_id)):
                assert torch.equal(found, first[chunk_id, position] + second[chunk_id, position])
        made.store.clear()
        made.backward(first)
        for chunk_id in range(7):  # nothing of the passes before is left
            assert torch.equal(made.waiting(chunk_id)[3], first[chunk_id, 3])


@pytest.mark.parametrize("path", PATHS)
def test_interleaved_chunks_keep_their_gradients_apart(path: str, tmp_path: Path) -> None:
    grads = make_grads(5)
    order = sorted(grads, key=lambda key: (key[1], key[0]))  # chunk after chunk takes one gradient
    with opened(path, tmp_path, num_chunks=5) as made:
        for key in order:
            made.backward({key: grads[key]})
        for chunk_id in range(5):
            for position, found in enumerate(made.waiting(chunk_id)):
                assert torch.equal(found, grads[chunk_id, position])


@pytest.mark.parametrize("path", PATHS)
def test_a_parameter_without_a_gradient_has_none(path: str, tmp_path: Path) -> None:
    grads = make_grads(2)
    with opened(path, tmp_path, num_chunks=2) as made:
        made.backward({(1, 2): grads[1, 2]})
        assert set(made.store.sums_of_squares()) == {"chunk1.weight2"}
        assert made.store.arrived(0) == []
        assert made.store.arrived(1) == [2]
        made.store.clear()
        assert made.store.sums_of_squares() == {}


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
@pytest.mark.parametrize("path", PATHS)
def test_a_second_backward_is_refused_where_gradients_cannot_add_up(path: str, num_chunks: int, tmp_path: Path) -> None:
    bfloat16 = torch.bfloat16
    with opened(path, tmp_path, num_chunks=num_chunks, dtype=bfloat16, keep=bfloat16) as made:
        made.backward(make_grads(num_chunks, bfloat16, 1))
        message = (
            r"^a second gradient for chunk0.weight1 arrived before optimizer.step\(\): .* kept as torch.bfloat16; "
            r"set GeminiConfig\(gradient_accumulation=True\), or call optimizer.zero_grad\(\) to drop the first"
        )
        with pytest.raises(ModelError, match=message):
            made.backward({(0, 1): make_grads(1, bfloat16, 2)[0, 1]})
        made.store.clear()
        again = make_grads(num_chunks, bfloat16, 3)
        made.backward(again)
        assert torch.equal(made.waiting(0)[1], again[0, 1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_sum(path: str, value: float, tmp_path: Path) -> None:
    grads = make_grads(1)
    grads[0, 0][13] = value
    with opened(path, tmp_path) as made:
        made.backward(grads)
        sums = made.store.sums_of_squares()
    assert not torch.isfinite(torch.tensor(sums["chunk0.weight0"]))
    assert all(torch.isfinite(torch.tensor(sums[f"chunk0.weight{i}"])) for i in (1, 2, 3))


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_that_is_not_contiguous_is_taken(path: str, tmp_path: Path) -> None:
    with opened(path, tmp_path) as made:
        (made.params[0, 0] * 1.0).sum().backward()  # autograd hands over an expanded scalar
        assert torch.equal(made.waiting(0)[0], torch.ones(1000))


def test_a_failed_write_is_reported_and_close_still_works(tmp_path: Path) -> None:
    with opened("disk", tmp_path, num_chunks=5) as made:
        break_writes(made.resources)
        with pytest.raises(OffloadIOError, match="No space left on device"):
            made.backward(make_grads(5))
        made.store.close()
        assert made.resources.ledger.held_nbytes(HOST) == 0
        assert made.resources.store is not None
        assert made.resources.store.held_nbytes == 0


@pytest.mark.parametrize("path", PATHS)
def test_close_gives_everything_back_with_gradients_under_way(path: str, tmp_path: Path) -> None:
    with opened(path, tmp_path, num_chunks=5) as made:
        made.backward(make_grads(5))
        made.store.close()
        assert made.resources.ledger.held_nbytes(HOST) == 0
        assert "gradient slots" not in made.resources.ledger.by_purpose(DEVICE)


def test_a_chunk_takes_only_what_has_arrived_along(tmp_path: Path) -> None:
    """A parameter that is not used, or not yet, does not travel."""
    with opened("device to host", tmp_path) as made:
        made.backward({(0, 1): torch.ones(7), (0, 2): torch.ones(1)})
        made.store.finish()
        assert made.resources.transfers.traffic.downloaded_nbytes == (64 + 1) * 4  # the first is padded to 64
