"""Engines with memory from the service beside engines alone: the time of a step, and of beginning with 774 M weights.

Called by service.py; as a program it is the process that begins:

    python benchmarks/service_engine.py --begin DIRECTORY [--address ADDRESS]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results_file import spread_of
from step_systems import build_model

from gemini import GeminiConfig, GeminiDDP, HybridAdam

STEP_MODEL, LARGE_MODEL = "gpt2", "gpt2-large"
BATCH, SEQUENCE = 1, 128
NUM_WARM_UPS = 2


def measure_steps(address: str, num_steps: int) -> list[dict[str, Any]]:
    """Let engines take steps in turn, alone and with memory from the service, in one process.

    Args:
        address: of the service.
        num_steps: timed of each engine.

    Returns:
        A row for each engine.
    """
    configs = {
        "engine alone": {},
        "with the service": {"service": address, "job": "steps"},
        "with the service, each step committed": {"service": address, "job": "commits", "snapshots": True},
    }
    engines = {name: _Stepper(options) for name, options in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(NUM_WARM_UPS + num_steps):
        for name, engine in engines.items():
            elapsed_s = engine.step()
            if step >= NUM_WARM_UPS:
                seconds[name].append(elapsed_s)
    alone_s = statistics.median(seconds["engine alone"])
    rows = [
        {
            "system": name,
            "what": f"a step of {STEP_MODEL}, {BATCH} x {SEQUENCE} tokens",
            "median_ms": statistics.median(times) * 1e3,
            "ratio": statistics.median(times) / alone_s,
            "messages_per_step": engines[name].num_messages / num_steps,
            **spread_of([1 / each for each in times], "per_s"),
        }
        for name, times in seconds.items()
    ]
    for engine in engines.values():
        engine.engine.close()
    return rows


class _Stepper:
    """An engine that takes equal steps.

    Args:
        options: of its configuration.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        config = GeminiConfig(device="cpu", dtype=torch.float32, host_budget="5GiB", **options)
        self.engine = GeminiDDP(build_model(STEP_MODEL, SEQUENCE, "cpu"), config)
        self.optimizer = HybridAdam(self.engine.parameters(), lr=1e-5)
        self.batch = torch.randint(50257, (BATCH, SEQUENCE))
        self._num_steps = self.num_messages = 0

    def step(self) -> float:
        """Take a step, until all of it has happened; return its seconds."""
        client: Any = getattr(self.engine.runtime.resources.granted_by, "client", None)
        before = 0 if client is None else client.num_messages
        begin_s = time.perf_counter()
        self.engine(input_ids=self.batch, labels=self.batch).loss.backward()
        self.optimizer.step()
        if self.engine.runtime.config.snapshots:
            self.engine.commit()
        self.engine.runtime.updates.finish_all()
        elapsed_s = time.perf_counter() - begin_s
        self._num_steps += 1
        if client is not None and self._num_steps > NUM_WARM_UPS:
            self.num_messages += client.num_messages - before
        return elapsed_s


def measure_beginnings(address: str, num_passes: int) -> list[dict[str, Any]]:
    """Begin with frozen weights of 774 M parameters: from the drive, from the page cache, from a job before.

    Args:
        address: of the service.
        num_passes: how often each way is timed.

    Returns:
        A row for each way.
    """
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        torch.manual_seed(0)
        model = build_model(LARGE_MODEL, SEQUENCE, "cpu").to(torch.bfloat16)
        nbytes = sum(param.nbytes for param in model.parameters())
        model.save_pretrained(directory)
        del model
        _begin(directory, address)  # leaves its weights with the service
        for _ in range(num_passes):
            for way, service in (("from the drive", None), ("from the page cache", None), ("warm", address)):
                if way == "from the drive":
                    _forget(directory)
                seconds.setdefault(way, []).append(_begin(directory, service))
    drive_s = statistics.median(seconds["from the drive"])
    return [
        {
            "system": "with the service" if way == "warm" else "engine alone",
            "what": f"begin with {nbytes / 1e9:.2f} GB of frozen weights, {way}",
            "median_ms": statistics.median(times) * 1e3,
            "ratio": statistics.median(times) / drive_s,
            **spread_of([1 / each for each in times], "per_s"),
        }
        for way, times in seconds.items()
    ]


def _forget(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _begin(directory: Path, address: str | None) -> float:
    command = [sys.executable, __file__, "--begin", str(directory)]
    command += [] if address is None else ["--address", address]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def begin(directory: Path, address: str | None) -> float:
    """Build an engine of frozen weights and one trained layer; return the seconds, without imports."""
    config = GeminiConfig(
        device="cpu", dtype=torch.bfloat16, host_budget="3GiB", service=address, job=None if address is None else "warm"
    )

    def freeze(model: torch.nn.Module) -> None:
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith("transformer.ln_f"))

    begin_s = time.perf_counter()
    model = _on_meta(directory)
    freeze(model)
    with GeminiDDP(model, config, weights=directory):
        return time.perf_counter() - begin_s


def _on_meta(directory: Path) -> torch.nn.Module:
    import transformers

    with torch.device("meta"):
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(directory)
        )
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--begin", type=Path, required=True)
    parser.add_argument("--address")
    options = parser.parse_args()
    print(json.dumps(begin(options.begin, options.address)))
