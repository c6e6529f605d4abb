"""ChunkManager, a tool of its own that no engine uses: chunks without training, of any tensors, moved between tiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch

from gemini.chunk.core import ChunkCore
from gemini.chunk.layout import PLACE_ALIGNMENT_NUMEL, ChunkSpec, ParamPlace
from gemini.config import GeminiConfig
from gemini.errors import ConfigError, IllegalTransitionError, OutOfTierMemoryError
from gemini.model.params import ParamSpec
from gemini.offload.home import TiledHome
from gemini.offload.io import empty_aligned
from gemini.offload.resources import budgets_of, open_resources
from gemini.offload.slots import GrowingSlots
from gemini.offload.transfer import CpuTransfers
from gemini.profile.listeners import RunListeners
from gemini.ranks.one_rank import ALONE
from gemini.tiers import IO_ALIGNMENT_NBYTES, MemoryTier, round_up

__all__ = ["ChunkManager"]


class ChunkManager:
    """Pack tensors into chunks that live on the device, in host memory or on disk, and are fetched to be used.

    Between `access` and `release` the tensors of a chunk show their values in compute memory; otherwise they show a
    placeholder (NaN). Compute memory is taken and given back as chunks come and go, within the budgets; the
    least recently used chunks make room.

    Args:
        config: device, budgets and disk; everything about training is ignored. None: defaults.

    Raises:
        ConfigError: the configuration contradicts itself or the machine.
        OffloadIOError: the swap file cannot be made, claimed or filled.
    """

    def __init__(self, config: GeminiConfig | None = None) -> None:
        config = config or GeminiConfig()
        disk_nbytes = 0
        if config.nvme_budget_nbytes is not None:  # the file has a block of its own
            disk_nbytes = (config.nvme_budget_nbytes // IO_ALIGNMENT_NBYTES - 1) * IO_ALIGNMENT_NBYTES
        self._resources = open_resources(config, budgets_of(config), disk_nbytes=disk_nbytes)
        self._core = ChunkCore(
            self._resources,
            slots=GrowingSlots(self._resources.transfers, purpose="slots"),
            staging=GrowingSlots(CpuTransfers(self._resources.arena), purpose="fetch slots"),
            group=ALONE.group,
            next_use=self._since_last_use,
            listeners=RunListeners(),
            num_protected=0,  # holds are all the protection there is
        )
        self._clock = 0
        self._last_use: dict[int, int] = {}
        self._modified: set[int] = set()
        self._is_closed = False

    def register(
        self, tensors: Sequence[torch.Tensor] | Mapping[str, torch.Tensor], *, tier: MemoryTier = MemoryTier.HOST
    ) -> int:
        """Pack tensors into a new chunk and move their values to its home.

        Args:
            tensors: of one dtype, on the CPU or the compute device; from here on they show chunk memory or a
                placeholder. Names, if given, appear in messages.
            tier: where the chunk lives between uses.

        Returns:
            The chunk's id.

        Raises:
            ConfigError: there are no tensors, their dtypes differ, one is registered twice, or there is no such tier.
            OutOfTierMemoryError: the tier cannot hold them.
            OffloadIOError: they cannot be written to disk.
        """
        self._check_open()
        named = dict(tensors) if isinstance(tensors, Mapping) else {f"tensor {i}": t for i, t in enumerate(tensors)}
        dtypes = {tensor.dtype for tensor in named.values()}
        if len(dtypes) != 1 or len({id(tensor) for tensor in named.values()}) != len(named):
            raise ConfigError(f"register: expected distinct tensors of one dtype, got {len(named)} of {dtypes}")
        known = {id(tensor) for chunk in self._core.chunks for tensor in chunk.params}
        if any(id(tensor) in known for tensor in named.values()):
            raise ConfigError("register: a tensor belongs to a chunk already")
        spec = _pack(named, chunk_id=len(self._core.chunks), dtype=dtypes.pop())
        content = _aligned_copy(spec, list(named.values()))
        home = self._open_home(tier, content.numel(), spec.name)
        try:
            self._write(home, content)
        except BaseException:
            home.close()
            raise
        chunk = self._core.add(spec, list(named.values()), home, is_resident=self._is_in_place(tier))
        if chunk.is_resident:
            self._core.residents.bring_in(spec.chunk_id)
        return spec.chunk_id

    def access(self, chunk_id: int) -> tuple[torch.Tensor, ...]:
        """Hold a chunk: its tensors show their values, and it cannot move, until as many `release` calls follow.

        Args:
            chunk_id: from `register`.

        Returns:
            The tensors, in the order in which they were registered.

        Raises:
            OutOfTierMemoryError: compute memory cannot hold it beside what is held.
            OffloadIOError: it cannot be read.
        """
        chunk = self._core.access(self._check_id(chunk_id))
        self._clock += 1
        self._last_use[chunk_id] = self._clock
        return tuple(chunk.params)

    def release(self, chunk_id: int, *, is_modified: bool = True) -> None:
        """End one hold.

        Args:
            chunk_id: from `register`.
            is_modified: whether values may have changed under this hold; if they have under any, the last release
                writes them home. Pass False for tensors that were only read.

        Raises:
            IllegalTransitionError: the chunk is not held.
            OffloadIOError: it cannot be written.
        """
        chunk = self._core.chunks[self._check_id(chunk_id)]
        if not chunk.is_held:
            raise IllegalTransitionError(
                f"{chunk.name} is {chunk.state.value!r}: it is not held, so there is nothing to release"
            )
        if is_modified:
            self._modified.add(chunk_id)
        was_last = self._core.release(chunk_id)
        if was_last and chunk_id in self._modified:
            if chunk.slot is not None:
                self._write(chunk.home, self._to_host(chunk.slot.buffer))
            self._modified.remove(chunk_id)

    @contextmanager
    def using(self, chunk_id: int, *, is_modified: bool = True) -> Iterator[tuple[torch.Tensor, ...]]:
        """Hold a chunk for the length of a with-block; arguments as for `access` and `release`."""
        tensors = self.access(chunk_id)
        try:
            yield tensors
        finally:
            self.release(chunk_id, is_modified=is_modified)

    def move(self, chunk_id: int, tier: MemoryTier) -> None:
        """Change the tier a chunk lives in.

        Args:
            chunk_id: from `register`.
            tier: its new home; the old one is given back.

        Raises:
            IllegalTransitionError: the chunk is held.
            ConfigError: there is no such tier.
            OutOfTierMemoryError: the tier cannot hold it; it stays where it was.
            OffloadIOError: it cannot be read or written; it stays where it was.
        """
        chunk = self._core.chunks[self._check_id(chunk_id)]
        if chunk.is_held:
            raise IllegalTransitionError(f"{chunk.name} is held and cannot move; release it first")
        if self.tier_of(chunk_id) is tier:
            return
        with chunk.home.opened(0, self._resources.transfers) as content:
            home = self._open_home(tier, content.numel(), chunk.name)
            try:
                self._write(home, content)
            except BaseException:
                home.close()
                raise
        old_home = self._core.residents.rehome(chunk_id, home, is_resident=self._is_in_place(tier))
        old_home.close()

    def tier_of(self, chunk_id: int) -> MemoryTier:
        """Return where a chunk lives between uses."""
        return self._core.chunks[self._check_id(chunk_id)].home.tiers[0]

    def held_nbytes(self, tier: MemoryTier) -> int:
        """Return the bytes that all chunks, homes and copies in use, take in a tier."""
        if tier is MemoryTier.NVME:
            return sum(chunk.home.nbytes(tier) for chunk in self._core.chunks)
        return self._resources.ledger.held_nbytes(tier)

    def close(self) -> None:
        """Give everything back; the tensors show placeholders from here on. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._core.close()
            self._resources.close()

    def __enter__(self) -> ChunkManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- inside

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this ChunkManager has been closed")

    def _check_id(self, chunk_id: int) -> int:
        self._check_open()
        count = len(self._core.chunks)
        if not 0 <= chunk_id < count:
            known = f"register returned 0 to {count - 1}" if count else "nothing has been registered"
            raise ConfigError(f"there is no chunk {chunk_id!r}; {known}")
        return chunk_id

    def _since_last_use(self, chunk_id: int) -> int:
        return self._clock - self._last_use.get(chunk_id, 0)

    def _is_in_place(self, tier: MemoryTier) -> bool:
        return tier is self._resources.transfers.compute_tier

    def _open_home(self, tier: MemoryTier, nbytes: int, name: str) -> TiledHome:
        resources = self._resources
        if tier is MemoryTier.DEVICE and not self._is_in_place(tier):
            raise ConfigError("there is no device tier: GeminiConfig.device is the CPU")
        if tier is MemoryTier.NVME and resources.store is None:
            raise ConfigError("there is no NVMe tier: give GeminiConfig(nvme=NVMeConfig(path=..., budget=...))")
        try:
            return self._allocate_home(tier, nbytes, name)
        except OutOfTierMemoryError:
            self._core.evict_idle()
            return self._allocate_home(tier, nbytes, name)

    def _allocate_home(self, tier: MemoryTier, nbytes: int, name: str) -> TiledHome:
        resources = self._resources
        return TiledHome(
            (tier,),
            (nbytes,),
            arena=resources.arena,
            store=resources.store,
            transfers=resources.transfers,
            purpose="working",
            record=name,
        )

    def _to_host(self, buffer: torch.Tensor) -> torch.Tensor:
        if self._resources.transfers.compute_tier is MemoryTier.HOST:
            return buffer
        host = torch.empty(buffer.numel(), dtype=torch.uint8)
        self._resources.transfers.download(host, buffer).wait_on_host()
        return host

    def _write(self, home: TiledHome, content: torch.Tensor) -> None:
        """Bring host bytes to a home, whatever it has held: there is nothing to read first."""
        content = content[: home.tile_nbytes[0]]
        if home.is_on_disk:
            home.write_tile(0, content)
            home.finish_writes()
        elif home.device_buffer is not None:
            self._resources.transfers.upload(home.device_buffer, content).wait_on_host()
        else:
            home.tile(0).copy_(content)


def _pack(named: Mapping[str, torch.Tensor], *, chunk_id: int, dtype: torch.dtype) -> ChunkSpec:
    """Lay tensors out one after the other, aligned."""
    places = []
    begin = 0
    for index, (name, tensor) in enumerate(named.items()):
        spec = ParamSpec(name=name, index=index, shape=tuple(tensor.shape), dtype=dtype, is_trainable=False)
        places.append(ParamPlace(spec=spec, chunk_id=chunk_id, begin=begin))
        begin = round_up(begin + spec.numel, PLACE_ALIGNMENT_NUMEL)
    return ChunkSpec(chunk_id=chunk_id, unit_id=0, dtype=dtype, is_trainable=False, places=tuple(places), numel=begin)


def _aligned_copy(spec: ChunkSpec, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a chunk's bytes, uint8 on the CPU, padded to whole pages."""
    content = empty_aligned(
        max(round_up(spec.working_nbytes, IO_ALIGNMENT_NBYTES), IO_ALIGNMENT_NBYTES), torch.uint8
    ).zero_()
    typed = content[: spec.working_nbytes].view(spec.dtype)
    for place, tensor in zip(spec.places, tensors, strict=True):
        typed[place.begin : place.end].copy_(tensor.detach().reshape(-1))
    return content
