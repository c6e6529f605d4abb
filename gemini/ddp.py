"""GeminiDDP: a model whose parameters are in chunks and whose training loop stays as it was."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gemini.assembly.admission import admit
from gemini.assembly.assemble import assemble
from gemini.assembly.first_values import InitFn
from gemini.autograd.module_hooks import HookSet
from gemini.autograd.tracers import check_untraced, refuse_scripting
from gemini.checkpoint.commit_and_recover import Recovered, commit_step, recover_step
from gemini.checkpoint.loading import LoadedCheckpoint, load_checkpoint
from gemini.checkpoint.participants import CheckpointedOptimizer, Stateful, participants_of
from gemini.checkpoint.saving import CheckpointWriter, save_checkpoint
from gemini.commits.file import CommitFile
from gemini.config import GeminiConfig
from gemini.errors import ConfigError, ModelError
from gemini.model.extra_states import extra_states
from gemini.model.names import named_params
from gemini.observe.report import MemoryReport, check_prediction, make_report
from gemini.observe.run_recorder import RunRecorder, record_run
from gemini.offload.io import IoStats
from gemini.placement.cost_model import HardwareProfile, StepFlops, StepPrediction
from gemini.pretrained import DEFAULT_SHARD_SIZE, open_pretrained, save_pretrained
from gemini.ranks.one_rank import ALONE
from gemini.ranks.sharding import Sharding
from gemini.runtime.out_of_memory_retry import OutOfMemoryRetry
from gemini.runtime.runtime import Runtime
from gemini.slicing.activation_checkpoints import ActivationCheckpoints
from gemini.slicing.slicer import BatchSlicer
from gemini.weights.access import WeightAccess
from gemini.weights.handback import OriginalTensors, read_back
from gemini.weights.ownership import check_unchanged, own
from gemini.weights.state_dict import INSIDE_OF_MODULE, load_model_state, named_values
from gemini.weights.state_dict_hooks import install_state_hooks
from gemini.weights.values import read_master, read_working

__all__ = ["GeminiDDP"]


class GeminiDDP(torch.nn.Module):
    """Wrap a model so that it trains within the memory budgets given.

    The model's parameters are moved, chunk by chunk, to the tiers that the plan has chosen; the present float32 value
    of each becomes its master. Then call the engine (or `engine.module`, or methods such as `engine.module.generate`),
    `loss.backward()` and a HybridAdam's `step()` as usual. A parameter reads as its value in any tier, and may be
    written in place under `torch.no_grad()`; see docs/weights.md. Read whole models with `state_dict()` or
    `master_state_dict()`, and save them with `save_pretrained`.

    Args:
        module: the model; on the CPU, or on the meta device, in which case it is initialised unit by unit directly
            in its homes.
        config: the settings; None: defaults.
        init_fn: for models on the meta device: initialises one module's own parameters and buffers.
            None: transformers' `_init_weights` or the module's `reset_parameters`.
        weights: directory of a Hugging Face checkpoint, whose values replace the model's own; they are read when
            the homes are written. See `gemini.load_pretrained`. None: the model keeps its own.
        sharding: the ranks that share the model; set by `zero.shard`.
        commits: file that keeps committed steps after the end of the process, and may hold one already; see
            `commit`. Closed with the engine. None: no commits.

    Attributes:
        module: the user's model.
        loading_report: differences between `weights` and the model; None without `weights`.

    Raises:
        CheckpointError: `weights` is not a checkpoint or is damaged, or `commits` is damaged.
        CheckpointMismatchError: `weights` or `commits` belong to another model or engine.
        ConfigError: the configuration contradicts itself or the machine.
        ModelError: the model, or a module in it, is already managed, or has parameters that cannot be placed.
        OutOfTierMemoryError: the budgets cannot hold the model; names the tier and the missing bytes.
        OffloadIOError: the swap file cannot be made, claimed or filled.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        module: torch.nn.Module,
        config: GeminiConfig | None = None,
        *,
        init_fn: InitFn | None = None,
        weights: str | os.PathLike[str] | None = None,
        sharding: Sharding = ALONE,
        commits: CommitFile | None = None,
    ) -> None:
        super().__init__()
        if isinstance(module, torch.nn.Module) and any(isinstance(child, GeminiDDP) for child in module.modules()):
            raise ModelError("the model contains a GeminiDDP already; wrap the plain model once")
        admit(module, has_weights=weights is not None)
        self.module = module
        self._originals = OriginalTensors.of(module)
        with nullcontext() if weights is None else open_pretrained(module, Path(weights), sharding) as source:
            self._runtime = assemble(
                module, config or GeminiConfig(), init_fn=init_fn, weights=source, sharding=sharding, commits=commits
            )
        self.loading_report = None if source is None else source.report
        store = self._runtime.resources.store
        self._disk_at_start = store.stats() if store is not None else IoStats(nbytes_read=0, nbytes_written=0)
        self._hooks = HookSet(self._runtime.passes, self._runtime.config.input_dtype)
        unit_names = {unit.unit_id: unit.module_name for unit in self._runtime.layout.units if unit.module_name}
        units = {unit_id: module.get_submodule(name) for unit_id, name in unit_names.items()}
        self._hooks.install(module, units, [param for param in module.parameters() if param.requires_grad])
        self._access = WeightAccess(self._runtime, self._hooks.gradients.uses.call)
        own(module, self._access)
        self._slicer = self._slice_blocks(unit_names)
        self._state_hooks = install_state_hooks(module, self._runtime)
        self._retry = OutOfMemoryRetry(module, self._runtime)
        module.zero_grad = self.zero_grad  # type: ignore[method-assign]

    def _slice_blocks(self, unit_names: dict[int, str]) -> BatchSlicer | None:
        config, resources = self._runtime.config, self._runtime.resources
        num_slices = config.num_batch_slices
        if num_slices == 1:
            return None
        keep = ActivationCheckpoints(resources).keeping if self._runtime.shape.has_device else None
        names = {"batch_arguments": config.batch_arguments, "shared_arguments": config.shared_arguments}
        return BatchSlicer(self.module, unit_names, num_slices=num_slices, scope=self._hooks, keep=keep, **names)

    @property
    def runtime(self) -> Runtime:
        """Internal state of the engine."""
        return self._runtime

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments and result are the model's own."""
        check_untraced()
        self._runtime.check_usable()  # the hooks are gone once it is closed
        try:
            return self._retry.run(args, kwargs)
        except Exception:
            raise  # torch has run the hooks that end a forward
        except BaseException:  # Ctrl-C, SystemExit: torch runs no hooks, and holds must not stay
            self._hooks.abort()
            raise

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward; the same as `loss.backward()`."""
        loss.backward()  # type: ignore[no-untyped-call]

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context that does nothing, for loops written for torch's DistributedDataParallel.

        With one rank, and in stage 1, gradients are not exchanged before the step, inside or outside the context.
        Stages 2 and 3 have no room for whole gradients and exchange in every backward. In both cases the step takes
        the mean over all ranks of everything accumulated, even if every backward was inside the context.
        """
        return nullcontext()

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the current gradients by their global L2 norm, as `torch.nn.utils.clip_grad_norm_` does.

        torch's function would change `.grad` in place, which is refused. The next optimizer step applies the factor.

        Args:
            max_norm: maximum norm.

        Returns:
            The norm before clipping, float32 [] on the CPU; NaN if a gradient is not finite, and then the next
            optimizer step is skipped.
        """
        steps, places = self._runtime.steps, list(self._runtime.layout.place_by_name.values())
        if (norm := steps.gradient_norm(places)) == norm:
            steps.clip(norm, max_norm)
        return torch.tensor(norm, dtype=torch.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the current gradients.

        Args:
            set_to_none: False: as in torch, the next step updates all parameters that have had a gradient, with zeros
                where there is none.
        """
        self._runtime.steps.clear_gradients(set_to_none=set_to_none)

    def memory_report(self, *, profile: HardwareProfile | None = None, flops: StepFlops | None = None) -> MemoryReport:
        """Return planned and measured bytes per tier, and the cost of moves.

        Args:
            profile: rates of this machine, from `gemini.measure_hardware`; with them the report also predicts the time
                of a step and its bottleneck.
            flops: the model's operations in one step, for example from `gemini.transformer_flops`; needs `profile`.

        Returns:
            The report.

        Raises:
            ConfigError: only one of `profile` and `flops` was given, or the profile lacks a rate that is needed.
            ModelError: the engine is closed or its state was lost.
        """
        self._runtime.check_usable()
        check_prediction(self._runtime, profile, flops)
        return make_report(self._runtime, profile, flops, disk_at_start=self._disk_at_start)

    def record(
        self,
        directory: str | os.PathLike[str],
        *,
        steps: Collection[int] | None = range(1, 4),
        predicted: StepPrediction | None = None,
        activation_nbytes: int | None = None,
    ) -> AbstractContextManager[RunRecorder]:
        """Record what happens while the context is open, for `python -m gemini report`; see docs/profiling.md.

        Args:
            directory: directory of the recording; created if it does not exist.
            steps: steps to record in detail, counted from 0 from now on; others in one line. None: all in detail.
            predicted: prediction to show, for example `memory_report(profile=..., flops=...).predicted`.
            activation_nbytes: predicted peak of activations to show, for example from gemini.planning.rehearsal.

        Returns:
            A context that yields the recorder; pass loss and tokens to its `log(loss=..., tokens=...)`.

        Raises:
            ConfigError: the engine is being recorded already.
        """
        expected = (predicted, activation_nbytes)
        return record_run(self._runtime, Path(directory), steps=steps, expected=expected)

    def trace_memory(self) -> AbstractContextManager[None]:
        """Measure activations and temporaries of what runs inside the context; slow on the CPU, free on CUDA."""
        return self._runtime.probe.trace()

    # ---------------------------------------------------------------- weights in and out

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the wrapped model's parameters, as torch does, under the names that they have in `state_dict`."""
        for name, param in named_params(self.module, remove_duplicate=remove_duplicate) if recurse else ():
            yield f"{prefix}.{name}" if prefix else name, param

    def _fqn_modifiers(self) -> Mapping[str, str]:
        """Make torch.distributed.checkpoint.state_dict look up names of `state_dict` in the wrapped model."""
        return INSIDE_OF_MODULE

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the working weights and buffers of the wrapped model, copied to the CPU, and modules' extra state.

        Names are the wrapped model's own, so the result loads into a plain copy of it.

        Args:
            *args: not accepted.
            **kwargs: `prefix`; `keep_vars`, which must be false; no others.

        Returns:
            Parameters and persistent buffers (tied names share memory), and the modules' extra state.

        Raises:
            ConfigError: an argument is not supported.
            ModelError: the engine is closed, its state was lost, or the model's parameters have changed.
        """
        prefix = kwargs.pop("prefix", "")
        if args or kwargs.pop("keep_vars", False) or set(kwargs) - {"destination"}:
            raise ConfigError("GeminiDDP.state_dict: only prefix= can be given; the result is always a copy on the CPU")
        self._check_model()
        state = {**dict(named_values(self._runtime, self.module, read_working)), **extra_states(self.module)}
        return {prefix + name: value for name, value in state.items()}

    def master_state_dict(self) -> dict[str, torch.Tensor]:
        """Return as `state_dict`, without extra state and with trainable parameters as their float32 masters."""
        self._check_model()
        return dict(named_values(self._runtime, self.module, read_master))

    def _check_model(self) -> None:
        self._runtime.check_usable()
        check_unchanged(self.module, self._runtime, self._runtime.layout.place_by_name)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights into their homes; their float32 values become the masters, and the moments stay unchanged.

        Args:
            state_dict: from `state_dict`, or from the plain model.
            strict: whether names must match exactly.
            assign: must be false.

        Returns:
            Missing and unexpected names, as torch returns them.

        Raises:
            CheckpointMismatchError: names or shapes do not match, here or on another rank; nothing has been loaded.
            ConfigError: `assign` is true.
            Exception: any error of a module's `set_extra_state`; weights and buffers have then been loaded.
        """
        if assign:
            raise ConfigError("GeminiDDP.load_state_dict: assign=True would remove the parameters from their chunks")
        self._check_model()
        missing, unexpected = load_model_state(self._runtime, self.module, state_dict, strict=strict)
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    ) -> None:
        """Save the model like its own `save_pretrained`, in bounded memory; all ranks call, the first rank writes.

        `from_pretrained` opens the directory: safetensors files with their index, and configurations. For a model with
        peft's adapters, the adapters are saved, for `PeftModel.from_pretrained`. If the model's class has its own
        `save_pretrained`, that method runs with all weights in memory. Files of an earlier save are replaced when
        the new ones are on the drive; other files stay.

        Args:
            path: the directory; created if it does not exist.
            dtype: "float32" saves the masters, "bfloat16" or "float16" rounds them; None: the working weights.
            max_shard_size: maximum bytes of a file, such as "5GB"; a larger tensor gets its own file. It is passed to
                the model's own `save_pretrained` unless it is the default.

        Raises:
            ConfigError: an argument is not supported, or transformers is missing or too old.
            OffloadIOError: a read or write failed; the directory is unchanged.
            CheckpointError: the same on another rank, or the model's own `save_pretrained` raised an error.
            ModelError: the engine is closed, its state was lost, or the model's parameters have changed.
        """
        self._check_model()
        save_pretrained(self._runtime, self.module, Path(path), dtype=dtype, max_shard_size=max_shard_size)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: CheckpointedOptimizer | None = None,
        scheduler: Stateful | None = None,
        extra: Any = None,
        keep_last: int | None = None,
        frozen: bool = True,
        wait: bool = True,
    ) -> CheckpointWriter:
        """Save everything that training needs to continue with the same bits, in bounded memory; all ranks call.

        The checkpoint is a directory in `path` that appears when it is complete and on the drive. It can be loaded
        with any other placement, chunk layout, number of ranks or stage.

        Args:
            path: directory of this run's checkpoints, on a file system of all ranks; created if it does not exist.
            optimizer: the HybridAdam; None: the one that was built last on this engine.
            scheduler: object with `state_dict()`, such as torch's learning-rate schedulers.
            extra: your data: tensors, numbers, strings, lists, tuples, dictionaries. That of the first rank is saved.
            keep_last: complete checkpoints to keep in `path`; None: all.
            frozen: whether to save frozen parameters too.
            wait: whether to return only when the checkpoint is complete; if not, the next optimizer step waits for it.

        Returns:
            The save: `wait()` returns its directory.

        Raises:
            ConfigError: gradients are waiting for a step, or `extra` cannot be saved.
            OffloadIOError: a write failed, or another process is saving into `path`; there is no new checkpoint, and
                training can continue. With `wait=False`, the next optimizer step raises it once, before it changes
                anything; call the step again.
            CheckpointError: the same on another rank.
            ModelError: the engine is closed, its state was lost, or the model's parameters have changed.
        """
        self._check_model()
        save = save_checkpoint(
            self._runtime,
            Path(path),
            participants_of(self._runtime, self.module, optimizer, scheduler),
            extra=extra,
            keep_last=keep_last,
            with_frozen=frozen,
        )
        if wait:
            save.wait()
        return save

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: CheckpointedOptimizer | None = None,
        scheduler: Stateful | None = None,
        verify: bool = True,
    ) -> LoadedCheckpoint:
        """Load a checkpoint in bounded memory, including random number generators; all ranks call.

        Args:
            path: the path of `save_checkpoint`, for the checkpoint saved last; or the directory of one checkpoint.
            optimizer: the HybridAdam; None: the one that was built last on this engine.
            scheduler: as for `save_checkpoint`; None: a saved state is ignored.
            verify: whether to read and check everything before anything changes.

        Returns:
            The checkpoint's path, the number of steps, and `extra`.

        Raises:
            CheckpointError: there is no complete checkpoint, or it is damaged; with `verify`, nothing has changed.
            CheckpointMismatchError: it belongs to another model or optimizer; nothing has changed.
            OffloadIOError: a read failed. If loading had begun, the engine refuses to continue.
            ConfigError: it has optimizer state, but there is no optimizer.
        """
        self._check_model()
        participants = participants_of(self._runtime, self.module, optimizer, scheduler)
        return load_checkpoint(self._runtime, Path(path), participants, verify=verify)

    # ---------------------------------------------------------------- commits

    def commit(self, *, scheduler: Stateful | None = None, extra: Any = None) -> None:
        """Commit the step that `optimizer.step()` has decided, and start its updates; see docs/commits.md.

        Afterwards, the step is not lost if this process ends. With a commit file, call it after every
        `optimizer.step()` and `scheduler.step()`, also after a skipped step. Without a step, it commits the other data.

        Args:
            scheduler: object with `state_dict()`, such as torch's learning-rate schedulers.
            extra: your data: tensors, numbers, strings, lists, tuples, dictionaries.

        Raises:
            ConfigError: there is no commit file, gradients wait for a step, or `extra` cannot be saved.
            OffloadIOError: state or gradients could not be written.
            ModelError: the engine is closed, its state was lost, or weights that will move are in use.
        """
        commit_step(self._runtime, participants_of(self._runtime, self.module, None, scheduler), extra=extra)

    @property
    def recovered(self) -> int | None:
        """Optimizer steps of the commit whose weights and state the engine began with; None: there was no commit."""
        step = self._runtime.commits.step
        return None if step is None else step.num_steps

    def recover(
        self, *, optimizer: CheckpointedOptimizer | None = None, scheduler: Stateful | None = None
    ) -> Recovered:
        """Restore the committed data that is not in the homes, random number generators last.

        Args:
            optimizer: the HybridAdam; None: the one that was built last on this engine.
            scheduler: as for `commit`; None: a saved state is ignored.

        Returns:
            The number of steps, and `extra`.

        Raises:
            CheckpointMismatchError: the optimizer or scheduler differs; nothing has changed.
            ConfigError: nothing was committed, or there is no optimizer.
        """
        return recover_step(self._runtime, participants_of(self._runtime, self.module, optimizer, scheduler))

    # ---------------------------------------------------------------- life

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_modules", {}).get("module")
        if model is not None and (name in model._modules or name in model._parameters):
            return getattr(model, name)  # parameters and modules have the same names in the engine and in the model
        return super().__getattr__(name)

    def __getstate__(self) -> object:
        return self._runtime.__getstate__()  # raises, saying what to do

    def _apply(self, fn: Any, recurse: bool = True) -> GeminiDDP:
        raise ModelError(
            "a GeminiDDP cannot be moved or cast: its parameters live where the plan put them; "
            "set GeminiConfig(device=..., dtype=...) instead of calling .to(), .cuda(), .half() or the like"
        )

    def close(self, *, keep: bool = False) -> None:
        """Free memory and threads, and remove the swap file. Idempotent.

        Afterwards the model is a plain one: its parameters hold their values again, in the dtype that they had when
        it was wrapped. If memory has no room for them, or several ranks share them, using a parameter is a
        ModelError; in that case save before you close.

        Args:
            keep: whether a memory service keeps the committed state, as it does if an exception leaves the context.
        """
        self._close(keep=keep, hands_back=True)

    def _close(self, *, keep: bool, hands_back: bool) -> None:
        values = None
        if hands_back and not self._runtime.is_closed:
            self._runtime.pending_save.close()
            values = read_back(self._access, self._originals)
        self._hooks.remove()
        if self._slicer is not None:
            self._slicer.remove()
        for handle in self._state_hooks:
            handle.remove()
        self._runtime.close(keep=keep)
        self.module.__dict__.pop("zero_grad", None)
        if values is not None:
            self._originals.hand_back(self.module, self._access, values)

    def __enter__(self) -> GeminiDDP:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        is_interrupted = kind is not None and not issubclass(kind, Exception)
        self._close(keep=kind is not None, hands_back=not is_interrupted)
