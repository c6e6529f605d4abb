"""`engine.commit` and `engine.recover`: the state of a run beside the weights that a commit file keeps.

The file, and what makes a step in it count, are gemini.commits'. Checkpoints on a drive become visible elsewhere, in
`CheckpointDirectory.publish`. See docs/commits.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemini.checkpoint.participants import Participants
from gemini.checkpoint.run_state import (
    check_run_state,
    collect_run_state,
    decode_run_state,
    encode_run_state,
    load_scheduler,
    restore_rng,
    restore_run_state,
)
from gemini.commits.record import CommittedStep, encode_record
from gemini.errors import CollectiveError, ConfigError
from gemini.ranks.agreement import on_all_ranks
from gemini.runtime.runtime import Runtime

__all__ = ["Recovered", "commit_step", "recover_step"]

SOURCE = "the commit file"


@dataclass(frozen=True, slots=True)
class Recovered:
    """The result of `recover_step`."""

    step: int
    """Optimizer steps that had been taken when it was committed, skipped ones not counted."""
    extra: Any
    """Data that the user saved as `extra`."""


def commit_step(runtime: Runtime, participants: Participants, *, extra: Any) -> None:
    """Commit the last step; see GeminiDDP.commit."""
    runtime.check_usable()
    file = runtime.commits.file
    if file is None:
        raise ConfigError(
            "engine.commit: this engine has no commit file: set GeminiConfig(service=..., job=..., snapshots=True), or "
            "pass GeminiDDP(..., commits=CommitFile)"
        )
    if runtime.steps.has_gradients():
        raise ConfigError(
            "engine.commit: gradients wait for a step and would be lost: call it after optimizer.step(), or drop them "
            "with optimizer.zero_grad()"
        )
    committed = file.sequence
    try:
        with on_all_ranks(runtime.sharding, what="engine.commit"):
            runtime.pending_save.finish()
            held = runtime.updates.prepare_release()
            own = collect_run_state(runtime, participants, extra, is_for_all=False)
            run_state = encode_run_state(own, what="engine.commit")
            step = CommittedStep(num_steps=runtime.steps.num_steps, planned=held.planned, run_state=run_state)
            file.publish(encode_record(step))
    except CollectiveError:
        raise  # others may have seen this rank's record and gone on; they are asked when the file is opened again
    except Exception:
        file.withdraw(committed)
        raise
    except BaseException:
        if not runtime.sharding.is_alone:
            file.is_disputed = True
        raise
    runtime.updates.release(file.sequence)
    runtime.lookahead.fetch_ahead()


def recover_step(runtime: Runtime, participants: Participants) -> Recovered:
    """Restore the state that is not in the engine's homes; see GeminiDDP.recover."""
    runtime.check_usable()
    found = runtime.commits.step
    if found is None:
        raise ConfigError("engine.recover: the commit file held no committed step: look at engine.recovered first")
    with on_all_ranks(runtime.sharding, what="engine.recover"):
        state = decode_run_state(found.run_state, source=SOURCE)
        check_run_state(state, participants, source=f"engine.recover: {SOURCE}")
        if participants.scheduler is not None:
            load_scheduler(participants.scheduler, state["scheduler"], source=f"engine.recover: {SOURCE}")
    runtime.steps.clear_gradients()
    restore_run_state(runtime, participants, state, state)
    runtime.steps.resume_at(found.num_steps)
    restore_rng(state)
    return Recovered(found.num_steps, state["extra"])
