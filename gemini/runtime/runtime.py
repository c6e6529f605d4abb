"""A run: everything of one engine that moves, and its life.

All decisions are asked of gemini.placement, all bytes moved by gemini.chunk and gemini.offload. What happens in a pass
is in passes.py, what happens in a step in step.py. One runtime serves one engine; it is driven from the thread that
trains and, on CUDA, from autograd's device thread, never from both at once; see gemini.autograd.engine_access.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gemini.autograd.engine_access import EngineAccess
from gemini.autograd.loss_scale import LossScaler
from gemini.chunk.core import ChunkCore
from gemini.chunk.layout import ChunkLayout, ParamPlace
from gemini.commits.recovery import Commits
from gemini.config import GeminiConfig
from gemini.gradients.arrivals import Gradients
from gemini.gradients.grad_attributes import GradAttributes
from gemini.kernels.device import DeviceKernels
from gemini.offload.home import TiledHome
from gemini.offload.resources import Resources
from gemini.placement.overlap import OverlapMode
from gemini.placement.plan import ChunkDemand, MemoryDemand, PlacementPlan, RuntimeShape, memory_demand
from gemini.placement.tracer import UseTrace
from gemini.profile.listeners import RunListeners
from gemini.ranks.sharding import Sharding
from gemini.runtime.adaptation import Adaptation, FixedPlan, PlanInForce
from gemini.runtime.lookahead import Lookahead
from gemini.runtime.memory_probe import MemoryProbe
from gemini.runtime.passes import Passes
from gemini.runtime.pending_save import PendingSave
from gemini.runtime.refuses_copies import RefusesCopies
from gemini.runtime.step import ComingStep, StepControl
from gemini.update.schedule import UpdateSchedule
from gemini.update.worker import UpdateWorker

__all__ = ["Runtime"]


class Runtime(RefusesCopies):
    """Everything of one engine that moves.

    Args:
        config: what the user asked for.
        layout: units and chunks.
        plan: homes of all chunks.
        demands: what placement knows of them, by id.
        shape: sizes of the buffers.
        resources: closed by `close`.
        core: chunks and slots; closed by `close`.
        states: home of each trainable chunk's optimizer state, by chunk id; closed by `close`.
        gradients: closed by `close`.
        worker: runs updates; closed by `close`.
        listeners: told of what happens, by this and by all of the above.
        trace: the order in which chunks are used, of which `core` asks too.
        kernels: the device's.
        sharding: the ranks that share the model; their group is closed by `close`.
        commits: makes steps outlive the process; closed by `close`.
    """

    def __init__(
        self,
        config: GeminiConfig,
        *,
        layout: ChunkLayout,
        plan: PlacementPlan,
        demands: Sequence[ChunkDemand],
        shape: RuntimeShape,
        resources: Resources,
        core: ChunkCore,
        states: Mapping[int, TiledHome],
        gradients: Gradients,
        worker: UpdateWorker,
        listeners: RunListeners,
        trace: UseTrace,
        kernels: DeviceKernels,
        sharding: Sharding,
        commits: Commits,
    ) -> None:
        # - What was decided
        self.config = config
        self.layout = layout
        self.demands = demands
        self.shape = shape
        self.sharding = sharding
        # - What holds bytes
        self.resources = resources
        self.core = core
        self.states = states
        self.gradients = gradients
        self.commits = commits
        # - What happens
        is_sharded = not sharding.is_alone
        self.listeners = listeners
        self.access = EngineAccess()
        self.pending_save = PendingSave()
        self.probe = MemoryProbe(resources.accelerator, resources.ledger)
        self.coming = ComingStep(LossScaler(config.initial_loss_scale) if config.dtype is torch.float16 else None)
        self.lookahead = Lookahead(
            core, trace, depth=config.prefetch_depth, num_slots=plan.num_slots, is_sharded=is_sharded
        )
        self.updates = UpdateSchedule(
            None if config.overlap == "auto" else OverlapMode(config.overlap),
            core=core,
            states=states,
            gradients=gradients,
            worker=worker,
            kernels=kernels,
            listeners=listeners,
            predict=self.coming.expected_update,
            distance=self.lookahead.distance,
        )
        self.placement: PlanInForce = FixedPlan(plan)
        """The plan in force, and what may change it."""
        if shape.has_device and config.placement == "auto" and not is_sharded:
            self.placement = Adaptation(
                plan,
                core,
                gradients,
                demands,
                shape,
                reserve_nbytes=config.activation_reserve_nbytes or 0,
                finish_updates=self.updates.finish_all,
            )
        self.steps = StepControl(
            self.coming,
            self.placement,
            gradients=gradients,
            grad_attributes=GradAttributes(core.chunks, gradients, is_scaled=self.coming.scaler is not None),
            updates=self.updates,
            lookahead=self.lookahead,
            probe=self.probe,
            access=self.access,
            check_usable=self.check_usable,
            has_commits=commits.file is not None,
            is_sharded=is_sharded,
            max_skipped_steps=config.max_skipped_steps,
        )
        self._place_of_param: dict[int, tuple[int, int]] = {
            id(param): (chunk.spec.chunk_id, position)
            for chunk in core.chunks
            for position, param in enumerate(chunk.params)
        }
        self.passes = Passes(
            layout,
            core=core,
            gradients=gradients,
            lookahead=self.lookahead,
            steps=self.steps,
            placement=self.placement,
            probe=self.probe,
            access=self.access,
            check_usable=self.check_usable,
            check_released=self.updates.check_released,
            place_of_param=self._place_of_param,
            is_sharded=is_sharded,
        )

    @property
    def plan(self) -> PlacementPlan:
        """The plan in force."""
        return self.placement.plan

    @property
    def demand(self) -> MemoryDemand:
        """Bytes by tier and purpose that the plan in force takes."""
        return memory_demand(self.demands, self.plan, self.shape)

    def place_of(self, param: torch.Tensor) -> ParamPlace | None:
        """Return a parameter's place in the layout, None if it is not the engine's."""
        place = self._place_of_param.get(id(param))
        return None if place is None else self.layout.chunks[place[0]].places[place[1]]

    def finish_updates(self) -> None:
        """Block until the last step has happened, every byte of it, and nothing has been made of the next.

        Raises:
            OffloadIOError: a read or write failed.
            CheckpointError: a checkpoint that was being saved is lost, which is said once.
            ModelError: the engine is closed or its state was lost.
        """
        self.check_usable()
        self.access.check_thread("reading or loading weights")
        self.updates.check_released()
        self.pending_save.finish()
        self.updates.finish_all()
        self.updates.discard()
        for chunk in self.core.chunks:
            chunk.home.finish_writes()
        for state in self.states.values():
            state.finish_writes()

    # ---------------------------------------------------------------- life

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.access.is_closed

    def check_usable(self) -> None:
        """Raise ModelError if the engine is closed, its state was lost, or it belongs to the parent of this process."""
        self.access.check(self.updates.failure)
        self.sharding.group.check()

    def close(self, *, keep: bool = False) -> None:
        """Wait for what is under way and give everything back, but, with `keep`, what was committed; idempotent."""
        if self.access.is_closed:
            return
        self.access.is_closed = True
        self.pending_save.close()
        self.updates.close()
        self.gradients.close()
        for state in self.states.values():
            state.close()
        self.core.close()
        self.resources.close(keep=keep)
        self.commits.close()
        self.sharding.group.close()
