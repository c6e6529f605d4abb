"""Loading and saving take a few tiles of memory more than training, however large the model or a tensor of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
import transformers as hf
from faults import run_program

from gemini.files.safetensors import SafetensorsReader

LOADING_NBYTES = 128 << 20
SAVING_NBYTES = 32 << 20
"""What docs/weights.md allows, beside what lives in host memory; the embedding alone is 123 MiB, in float32 245."""

CHECKPOINT_NBYTES = 64 << 20
"""A tile's master and moments, twice, and the buffers of the file."""

MARK_NUMEL = 500
"""Elements at both ends of each tensor that are not zero."""

PROGRAM = f"""
import json, pathlib
sys.path.insert(0, {str(Path(__file__).parent)!r})
from large_model import main
print(json.dumps(main(*map(pathlib.Path, sys.argv[1:]))))
"""


def mark_of(number: int) -> torch.Tensor:
    """Return what is at both ends of the tensor of a number."""
    return torch.randn(MARK_NUMEL, generator=torch.Generator().manual_seed(number)).bfloat16()


@pytest.fixture(scope="module")
def shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20))
    return {name: param.shape for name, param in model.named_parameters()}


@pytest.fixture
def stored(shapes: dict[str, torch.Size], tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of 774 million parameters in bfloat16, in one file of 1.5 GB that is mostly a hole."""
    path = tmp_path / "stored"
    hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20, architectures=["GPT2LMHeadModel"]).save_pretrained(path)
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [end, end + 2 * shape.numel()]}
        end += 2 * shape.numel()
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + end)
        for number, fields in enumerate(header.values()):
            for offset in (fields["data_offsets"][0], fields["data_offsets"][1] - 2 * MARK_NUMEL):
                file.seek(8 + len(text) + offset)
                file.write(mark_of(number).view(torch.uint8).numpy().tobytes())
    yield path
    for place in (path, tmp_path / "saved"):
        for file_path in place.rglob("*.safetensors"):
            file_path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_774_million_parameters_pass_through_a_gibibyte(
    stored: Path, shapes: dict[str, torch.Size], tmp_path: Path
) -> None:
    result = json.loads(run_program(PROGRAM, stored, tmp_path / "saved", tmp_path, timeout_s=250).splitlines()[-1])

    assert result["planned"] <= 1 << 30
    assert result["loading_peak"] <= LOADING_NBYTES, result
    assert result["saving_peak"] <= SAVING_NBYTES, result
    assert result["checkpoint_peak"] <= CHECKPOINT_NBYTES, result
    assert result["resuming_peak"] <= CHECKPOINT_NBYTES, result
    assert {name for name, _ in marks_in(tmp_path / "saved")} == shapes.keys()
    numbers = {name: number for number, name in enumerate(shapes)}
    for name, marks in marks_in(tmp_path / "saved"):
        assert torch.equal(marks, mark_of(numbers[name]).repeat(2))


def marks_in(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name of each tensor in a directory, and its ends."""
    for file in sorted(path.glob("model-*.safetensors")):
        with closing(SafetensorsReader(file)) as reader:
            for name, entry in reader.entries.items():
                ends = (reader.read(name, 0, MARK_NUMEL), reader.read(name, entry.numel - MARK_NUMEL))
                yield name, torch.cat(ends)
