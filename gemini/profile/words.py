"""A plan in words."""

from __future__ import annotations

from gemini.profile.description import RunDescription
from gemini.tiers import format_nbytes

__all__ = ["plan_in_words"]


def plan_in_words(run: RunDescription) -> str:
    """Describe where everything is stored and what that means for a step.

    Args:
        run: description of the run.

    Returns:
        Sentences.
    """
    sentences = []
    num_resident = sum(chunk.is_resident for chunk in run.chunks)
    turns = f"the other {len(run.chunks) - num_resident} take turns in {run.num_slots} slots of "
    stay = "stays" if num_resident == 1 else "stay"
    sentences.append(
        f"{run.num_params:,} parameters in {run.dtype} lie in {len(run.chunks)} chunks. {num_resident} of them {stay} "
        f"in {run.compute_tier} memory, where forward and backward run"
        + ("." if num_resident == len(run.chunks) else f"; {turns}{format_nbytes(run.slot_nbytes)}.")
    )
    for what in ("weights", "state", "gradients"):
        total: dict[str, int] = {}
        for chunk in run.chunks:
            for tier, nbytes in chunk.homes.get(what, {}).items():
                total[tier] = total.get(tier, 0) + nbytes
        if total:
            places = " and ".join(f"{format_nbytes(nbytes)} in {tier} memory" for tier, nbytes in total.items())
            subject = {"weights": "Between uses, weights", "state": "Optimizer state", "gradients": "Gradients"}[what]
            verb = {"weights": "live with", "state": "lives with", "gradients": "wait for the update with"}[what]
            sentences.append(f"{subject} {verb} {places}.".replace("nvme memory", "the swap file on NVMe"))
    when = {
        "off": "inside the optimizer's step",
        "next-forward": "during the next forward, which waits for the update of each unit",
        "speculative": "during backward, ahead of the step, which accepts or drops them",
    }[run.overlap]
    sentences.append(f"When the recording began, updates ran {when}.")
    if run.predicted is not None:
        sentences.append(
            f"The cost model expects {run.predicted.step_s:.3f} s per step, limited by {run.predicted.bottleneck}."
        )
    return " ".join(sentences)
