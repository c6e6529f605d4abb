"""Ranks that load and save a checkpoint together; importable in their processes."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers as hf
from model_zoo import HF_CASES
from training_harness import config_for

import zero
from gemini import GeminiError


def load_and_save(
    *, name: str, stored: Path, saved: Path, stage: int, swap: Path | None, frozen: bool
) -> dict[str, Any]:
    """Load a checkpoint on all ranks, compute, save it; return the first output, the masters and the report."""
    case = HF_CASES[name]
    with torch.device("meta"):
        model = case.build().eval()
    model.requires_grad_(not frozen)
    model.get_output_embeddings().requires_grad_(True)
    config = config_for("host" if swap is None else "nvme", swap)
    with zero.shard(model, config, stage=stage, weights=stored) as engine:
        with torch.no_grad():
            output = engine(**case.batches(1)[0]).to_tuple()[0]
        engine.save_pretrained(saved, max_shard_size="30KB")
        return {"output": output, "weights": engine.master_state_dict(), "report": engine.loading_report}


def save_to_a_full_drive(*, stored: Path, saved: Path) -> tuple[str, str]:
    """Save while the first rank's drive is full; return what that raised here, once a second save has worked."""
    with torch.device("meta"):
        model = HF_CASES["gpt2"].build().eval()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with zero.shard(model, config_for("host"), weights=stored) as engine:
        if dist.get_rank() == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            engine.save_pretrained(saved)
            raised = ("", "")
        except GeminiError as error:
            raised = (type(error).__name__, str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        engine.save_pretrained(saved)
        return raised


def load_apart(*, directory: Path) -> tuple[str, str]:
    """Let each rank load a directory of its own; return what that raises."""
    with torch.device("meta"):
        model = HF_CASES["gpt2"].build()
    try:
        zero.shard(model, config_for("host"), weights=directory / str(dist.get_rank())).close()
    except GeminiError as error:
        return type(error).__name__, str(error)
    return "", ""


class WithFile(hf.LlamaForCausalLM):
    """Adds a file to what transformers writes."""

    def save_pretrained(self, directory: str, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(directory, *args, **kwargs)
        (Path(directory) / "modules.json").write_text("{}")


def own_model() -> Any:
    torch.manual_seed(3)
    return WithFile(HF_CASES["llama"].model().config)


def prompted_model() -> Any:
    model = HF_CASES["llama"].model()
    torch.manual_seed(3)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16)
    return peft.get_peft_model(model, config)


def save_by_themselves(*, build: Callable[[], Any], saved: Path, swap: Path) -> None:
    """Save a model that only it, or only peft, knows how to save."""
    with zero.shard(build(), config_for("nvme", swap), stage=3) as engine:
        engine.save_pretrained(saved)
        assert engine.state_dict().keys() == build().state_dict().keys()
