"""HybridAdam: Adam and AdamW over chunks, as a torch.optim.Optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch

from gemini.autograd.guards import GradScalerAttribute
from gemini.chunk.layout import ParamPlace
from gemini.config_deepspeed import adam_arguments
from gemini.errors import CheckpointMismatchError, ConfigError
from gemini.kernels.adam_tile import AdamHyper, AdamSegment
from gemini.ranks.agreement import agree_on_loading, fingerprint_of
from gemini.runtime.runtime import Runtime
from gemini.weights.ownership import runtime_of
from gemini.weights.values import drop_commit, load_moments, read_moments, reset_moments

__all__ = ["HybridAdam"]


class HybridAdam(torch.optim.Optimizer):
    """Adam with decoupled (default) or classic weight decay, run in the tier of the state.

    Parameter groups, learning-rate schedulers and `state_dict` work as with torch.optim.AdamW, and so does the
    arithmetic, in float32. Hyper-parameters are read when `step` is called. A step consumes the gradients; a step
    whose gradients are not finite changes nothing and is counted as skipped.

    Args:
        params: `engine.parameters()` or parameter groups made of them; frozen parameters are ignored.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: per unit of learning rate if decoupled (AdamW), else added to the gradient (Adam).
        adamw_mode: whether weight decay is decoupled.
        max_grad_norm: clip the global L2 norm of the gradients of all groups to this; None: do not clip.

    Raises:
        ConfigError: a value is out of range, or the parameters do not belong to one GeminiDDP.

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019, algorithm 2; the order of operations is that of gn_adam_update.
    """

    knows_engines = True
    """Other optimizers are refused; see gemini.autograd.guards."""
    _step_supports_amp_scaling = GradScalerAttribute()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adamw_mode: bool = True,
        max_grad_norm: float | None = None,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"HybridAdam.max_grad_norm: expected a positive number or None, got {max_grad_norm!r}")
        self.max_grad_norm = max_grad_norm
        self.last_grad_norm: float | None = None
        """Global norm of the last step's gradients before clipping; NaN if it was skipped; None before the first."""
        self._runtime: Runtime | None = None
        self._places: dict[int, ParamPlace] = {}
        self._members: dict[int, list[tuple[dict[str, Any], Any]]] = {}  # of each chunk; empty: not yet known
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adamw_mode": adamw_mode}
        super().__init__(params, defaults)

    @classmethod
    def from_deepspeed(cls, params: Iterable[Any], deepspeed: Mapping[str, Any]) -> HybridAdam:
        """Return an optimizer with the settings `optimizer` and `gradient_clipping` of a DeepSpeed configuration.

        Args:
            params: `engine.parameters()` or parameter groups made of them.
            deepspeed: the content of its JSON file; GeminiConfig.from_deepspeed reads the rest.

        Returns:
            The optimizer; missing hyper-parameters get DeepSpeed's defaults.

        Raises:
            ConfigError: it is not Adam, or has unsupported arguments.
        """
        return cls(params, **adam_arguments(deepspeed))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the engine's parameters; frozen ones are ignored.

        Args:
            param_group: `{"params": ..., "lr": ..., ...}` as for any torch optimizer.

        Raises:
            ConfigError: a parameter belongs to another engine or to none, or a value is out of range.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        names = [entry[0] for entry in params if isinstance(entry, tuple)]
        for entry in params:
            self._adopt(entry[1] if isinstance(entry, tuple) else entry)
        kept = [e for e in params if (e[1] if isinstance(e, tuple) else e).requires_grad]
        assert not names or len(names) == len(params)
        _check_group({**self.defaults, **param_group})
        super().add_param_group({**param_group, "params": kept})
        self._members = {}

    def _adopt(self, param: torch.Tensor) -> None:
        runtime = runtime_of(param)
        if runtime is None:
            raise ConfigError(
                f"HybridAdam: a parameter of shape {tuple(param.shape)} does not belong to a GeminiDDP; wrap the "
                "model first and pass engine.parameters()"
            )
        if self._runtime is not None and runtime is not self._runtime:
            raise ConfigError("HybridAdam: the parameters belong to different GeminiDDPs; use one optimizer for each")
        if self._runtime is None:
            self._runtime = runtime
            if runtime.coming.had_optimizer:
                runtime.finish_updates()
                reset_moments(runtime)  # another optimizer's
            runtime.coming.follow(self)
        place = runtime.place_of(param)
        if place is not None:
            self._places[id(param)] = place

    @property
    def runtime(self) -> Runtime:
        """The machinery of the engine whose parameters these are."""
        if self._runtime is None:
            raise ConfigError("HybridAdam: there are no parameters; pass engine.parameters()")
        return self._runtime

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient, also one assigned to `.grad`, and consume the gradients.

        Args:
            closure: evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            OffloadIOError: state could not be read or written; or the checkpoint that was being saved could not be
                written, in which case nothing has changed, and another call continues.
            CheckpointError: such a checkpoint was lost on another rank.
            ModelError: the engine was closed, or is in use by another thread.
            SkippedStepsError: too many steps in a row had gradients that are not finite.
            ConfigError: a group's hyper-parameters are out of range or differ on another rank, or a newer optimizer
                trains the engine.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        runtime = self.runtime
        if runtime.coming.optimizer is not self:
            raise ConfigError(
                "HybridAdam: a newer HybridAdam trains this GeminiDDP; use one optimizer with several parameter groups"
            )
        for group in self.param_groups:
            _check_group(group)
        runtime.check_usable()
        with runtime.access.using("optimizer.step()"):
            self._take_step(runtime)
        return loss

    def _take_step(self, runtime: Runtime) -> None:
        runtime.pending_save.finish()  # before gradients are scaled, which happens once
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        if runtime.sharding is not None:
            runtime.gradients.hyper_fingerprint = self._fingerprint()
        norm = runtime.steps.gradient_norm([self._places[id(p)] for _, p in params])
        self.last_grad_norm = norm
        if not math.isfinite(norm):
            runtime.steps.skip_update()
            return
        if self.max_grad_norm is not None:
            runtime.steps.clip(norm, self.max_grad_norm)
        with_gradient = runtime.gradients.names()
        updated = [(group, p) for group, p in params if self._places[id(p)].spec.name in with_gradient]
        runtime.steps.update(self._segments(updated))
        for _, param in updated:
            self._note_steps(param, self._next_step_of(param))

    def expected_segments(self, chunk_id: int) -> tuple[AdamSegment, ...]:
        """Return what the next step will do to a chunk, if all its parameters get a gradient; see StepPlanner."""
        if not self._members:
            for group in self.param_groups:
                for param in group["params"]:
                    self._members.setdefault(self._places[id(param)].chunk_id, []).append((group, param))
        return self._segments(self._members.get(chunk_id, [])).get(chunk_id, ())

    def _segments(self, params: Iterable[tuple[dict[str, Any], Any]]) -> dict[int, tuple[AdamSegment, ...]]:
        """Return the arithmetic of the next step for some parameters, by chunk and in the order of their places."""
        segments: dict[int, list[AdamSegment]] = {}
        for group, param in params:
            place = self._places[id(param)]
            if place.spec.numel:
                segment = AdamSegment(
                    begin=place.begin, end=place.end, hyper=_hyper_of(group), step=self._next_step_of(param)
                )
                segments.setdefault(place.chunk_id, []).append(segment)
        return {chunk_id: tuple(sorted(parts, key=lambda part: part.begin)) for chunk_id, parts in segments.items()}

    def _fingerprint(self) -> int:
        """Return a number that differs, almost surely, where the next step's arithmetic does."""
        hypers = (repr((_hyper_of(group), len(group["params"]))) for group in self.param_groups)
        steps = (str(self._next_step_of(p)) for group in self.param_groups for p in group["params"])
        return fingerprint_of((repr(self.max_grad_norm), *hypers, *steps))

    def _note_steps(self, param: torch.Tensor, num_steps: int) -> None:
        """Record in a parameter's state how often it was updated, and that its moments exist elsewhere."""
        if param not in self.state:
            away = torch.empty(self._places[id(param)].spec.full_shape, dtype=torch.float32, device="meta")
            self.state[param].update({"exp_avg": away, "exp_avg_sq": away})
        self.state[param]["step"] = num_steps

    def _next_step_of(self, param: torch.Tensor) -> int:
        return int(self.state.get(param, {}).get("step", 0)) + 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the current gradients.

        Args:
            set_to_none: False: as in torch, the next step updates all parameters that have had a gradient since they
                were last set to None, with zeros where there is none.
        """
        self.runtime.steps.clear_gradients(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch.optim.AdamW's form: `step`, `exp_avg` and `exp_avg_sq` per parameter.

        The moments are read from their tiers into new CPU tensors, 8 bytes per parameter.
        """
        self.runtime.finish_updates()
        packed = super().state_dict()
        index_of = self._index_of_params()
        packed["state"] = {}
        for param, state in self.state.items():
            momentum, variance = read_moments(self.runtime, self._places[id(param)])
            packed["state"][index_of[id(param)]] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": momentum,
                "exp_avg_sq": variance,
            }
        return packed

    def hyper_state_dict(self) -> dict[str, Any]:
        """Return parameter groups and step counts, by parameter name; the moments are the engine's to save."""
        groups = [
            {**group, "params": [self._places[id(param)].spec.name for param in group["params"]]}
            for group in self.param_groups
        ]
        steps = {self._places[id(param)].spec.name: int(state["step"]) for param, state in self.state.items()}
        return {"param_groups": groups, "steps": steps}

    def check_hyper_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointMismatchError unless the groups have the same parameters, in the same order."""
        own = [group["params"] for group in self.hyper_state_dict()["param_groups"]]
        saved = [list(group["params"]) for group in state["param_groups"]]
        if own != saved:
            raise CheckpointMismatchError(
                f"HybridAdam: the checkpoint's parameter groups have {[len(names) for names in saved]} "
                f"parameters, this optimizer's groups have {[len(names) for names in own]}, or they have other "
                "parameters or another order; build the groups as before"
            )

    def load_hyper_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `hyper_state_dict` returned; see `check_hyper_state_dict`."""
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})  # a scheduler's too
        self.state.clear()
        for group in self.param_groups:
            for param in group["params"]:
                num_steps = state["steps"].get(self._places[id(param)].spec.name)
                if num_steps is not None:
                    self._note_steps(param, num_steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict`, or torch.optim.AdamW's, returned.

        Args:
            state_dict: groups and state; the parameters must come in the same order.

        Raises:
            CheckpointMismatchError: groups or shapes do not match, here or on another rank; nothing has been loaded.
        """
        self.runtime.check_usable()
        groups = state_dict["param_groups"]
        mismatch = self._mismatch_of(state_dict)
        agree_on_loading(self.runtime.sharding, mismatch, map(str, sorted(state_dict["state"])))
        params = [param for group in self.param_groups for param in group["params"]]
        ids = [index for group in groups for index in group["params"]]
        self.runtime.finish_updates()
        drop_commit(self.runtime)
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})  # a scheduler's too
        self.state.clear()
        for index, param in zip(ids, params, strict=True):
            place = self._places[id(param)]
            entry = state_dict["state"].get(index)
            if entry is None:  # never updated
                zeros = torch.zeros(()).expand(place.spec.full_shape)
                load_moments(self.runtime, place, zeros, zeros)
                continue
            load_moments(self.runtime, place, entry["exp_avg"], entry["exp_avg_sq"])
            self._note_steps(param, int(entry["step"]))

    def _mismatch_of(self, state_dict: dict[str, Any]) -> CheckpointMismatchError | None:
        """Return why a state cannot be loaded, None if it can."""
        groups = state_dict["param_groups"]
        expected, found = ([len(g["params"]) for g in gs] for gs in (self.param_groups, groups))
        if expected != found:
            return CheckpointMismatchError(
                f"HybridAdam: expected parameter groups of {expected} parameters, got {found}"
            )
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip((index for group in groups for index in group["params"]), params, strict=True):
            entry, spec = state_dict["state"].get(index), self._places[id(param)].spec
            if entry is not None and tuple(entry["exp_avg"].shape) != spec.full_shape:
                return CheckpointMismatchError(
                    f"HybridAdam: the state of {spec.name} has shape {tuple(entry['exp_avg'].shape)}, expected "
                    f"{spec.full_shape}"
                )
        return None

    def _index_of_params(self) -> dict[int, int]:
        params = (param for group in self.param_groups for param in group["params"])
        return {id(param): index for index, param in enumerate(params)}


def _hyper_of(group: dict[str, Any]) -> AdamHyper:
    beta1, beta2 = group["betas"]
    return AdamHyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        is_decoupled=bool(group["adamw_mode"]),
    )


def _check_group(group: dict[str, Any]) -> None:
    """Raise ConfigError if a group's hyper-parameters are out of range."""
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ConfigError(f"HybridAdam.{name}: expected a finite number of at least 0, got {group[name]!r}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"HybridAdam.betas: expected two numbers from 0 to below 1, got {group['betas']!r}")
