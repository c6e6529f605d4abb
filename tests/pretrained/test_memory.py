"""Loading and saving take a few tiles of memory more than training, however large the model or a tensor of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import transformers as hf
from faults import run_program

from gemini.safetensors_file import SafetensorsReader, SafetensorsWriter

LOADING_NBYTES = 128 << 20
SAVING_NBYTES = 32 << 20
"""What docs/checkpoints.md allows, beside what lives in host memory; the embedding alone is 123 MiB, in float32 245."""

PROGRAM = f"""
import json, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from large_model import main
print(json.dumps(main(*map(pathlib.Path, sys.argv[1:]))))
"""


def large_config() -> hf.GPT2Config:
    return hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 774 million parameters in bfloat16, in one file of 1.5 GB."""
    path = tmp_path_factory.mktemp("large")
    config = large_config()
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {name: tuple(param.shape) for name, param in hf.GPT2LMHeadModel(config).named_parameters()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    writer = SafetensorsWriter(path / "model.safetensors", {n: (torch.bfloat16, s) for n, s in shapes.items()})
    for number, (name, shape) in enumerate(shapes.items()):
        numel = torch.Size(shape).numel()
        for begin in range(0, numel, len(noise)):
            writer.append(name, noise.roll(number + begin // len(noise))[: min(len(noise), numel - begin)])
    writer.close()
    yield path
    for file in path.iterdir():
        file.unlink()


@pytest.mark.slow
def test_a_model_of_774_million_parameters_passes_through_a_gibibyte(stored: Path, tmp_path: Path) -> None:
    result = json.loads(run_program(PROGRAM, stored, tmp_path / "saved", tmp_path).splitlines()[-1])

    print(result)
    assert result["planned"] <= 1 << 30
    assert result["loading_peak"] <= LOADING_NBYTES
    assert result["saving_peak"] <= SAVING_NBYTES
    assert_same_tensors(stored, tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        file.unlink()


def assert_same_tensors(stored: Path, saved: Path) -> None:
    names = set()
    with closing(SafetensorsReader(stored / "model.safetensors")) as expected:
        for file in sorted(saved.glob("model-*.safetensors")):
            with closing(SafetensorsReader(file)) as found:
                for name in found.entries:
                    assert torch.equal(found.read(name), expected.read(name))
                names |= found.entries.keys()
        assert names == expected.entries.keys()
