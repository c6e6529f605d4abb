"""A damaged, foreign or hostile checkpoint is refused by name, and the engine is as it was."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import HIDDEN, Tower
from runs import Scenario, Training, training
from torch import nn
from training_harness import config_for, hybrid_adam, same_bits

from gemini import CheckpointMismatchError, ConfigError, GeminiDDP, GeminiError, ModelError
from gemini.errors import CheckpointError

SCENARIO = Scenario(model="conv_net")
FILES = ("manifest.json", "rank-00000.pt", "rank-00000.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a convolutional net, which has buffers; nobody changes it."""
    directory = tmp_path_factory.mktemp("saved")
    with training(SCENARIO, "host", directory) as run:
        run.train(0, 2)
        run.save(directory / "run")
    return next((directory / "run").iterdir())


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A run of other weights, in its second step."""
    with training(SCENARIO, "host", tmp_path_factory.mktemp("swap"), seed=3) as run:
        run.train(1, 2)
        yield run


def state_of(run: Training) -> dict[str, torch.Tensor]:
    numbers = [run.engine.runtime.steps.num_steps, run.scheduler.last_epoch, run.optimizer.param_groups[0]["lr"]]
    return run.run.weights | {"rng": torch.get_rng_state(), "numbers": torch.tensor(numbers)}


@contextmanager
def refused(run: Training, error: type[GeminiError], message: str) -> Iterator[None]:
    """Make sure that what is inside raises an error and changes nothing."""
    before = state_of(run)
    with pytest.raises(error, match=message):
        yield
    assert same_bits(state_of(run), before)


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and give it the right checksum."""
    document = json.loads((path / "manifest.json").read_text())
    change(document["body"])
    document["checksum"] = zlib.crc32(json.dumps(document["body"], separators=(",", ":")).encode())
    (path / "manifest.json").write_text(json.dumps(document))


def test_an_undamaged_copy_loads(copy: Path, tmp_path: Path) -> None:
    with training(SCENARIO, "host", tmp_path) as run:
        assert run.engine.load_checkpoint(copy, scheduler=run.scheduler).step == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_file_cut_short_is_named(name: str, part: float, copy: Path, run: Training) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: int(part * (len(data) - 2))])
    with refused(run, CheckpointError, f"{name} is damaged"):
        run.engine.load_checkpoint(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.003, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_found(name: str, part: float, copy: Path, run: Training) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(part * (len(data) - 2))] ^= 16
    (copy / name).write_bytes(data)
    with refused(run, CheckpointError, f"{name} is damaged"):
        run.engine.load_checkpoint(copy)


def test_a_flipped_bit_of_a_weight_names_the_parameter(copy: Path, run: Training) -> None:
    data = bytearray((copy / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "rank-00000.safetensors").write_bytes(data)
    with refused(run, CheckpointError, r"rank-00000.safetensors is damaged: the checksum of exp_avg_sq of fc.bias is"):
        run.engine.load_checkpoint(copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(name: str, copy: Path, run: Training) -> None:
    (copy / name).unlink()
    with refused(run, CheckpointError, f"{name} is missing from the checkpoint; take another"):
        run.engine.load_checkpoint(copy)


@pytest.mark.parametrize("name", ["copy", "nothing", "copy/rank-00000.pt"])
def test_a_directory_without_a_complete_checkpoint_is_refused(name: str, copy: Path, run: Training) -> None:
    (copy / "manifest.json").unlink()
    with refused(run, CheckpointError, "no complete checkpoint here; expected a directory that engine.save_checkpoint"):
        run.engine.load_checkpoint(copy.parent / name)


def test_a_later_version_is_refused(copy: Path, run: Training) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"version":1', '"version":2'))
    with refused(run, CheckpointError, "version 2 of the format; this version of gemini reads up to 1: upgrade"):
        run.engine.load_checkpoint(copy)


def test_other_elements_than_the_manifest_says_are_refused(copy: Path, run: Training) -> None:
    """As if a file of the same length had been put in the place of the right one."""
    path = copy / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"master.fc.bias", b"master.fc.bits"))
    with refused(run, CheckpointError, "rank-00000.safetensors is damaged: expected 4 elements of master of fc.bias"):
        run.engine.load_checkpoint(copy)


def test_another_model_is_refused(copy: Path, run: Training) -> None:
    def rename(body: dict[str, Any]) -> None:
        body["params"]["other"] = body["params"].pop("fc.bias")
        pieces = body["files"]["rank-00000.safetensors"]["pieces"]
        pieces["other"] = pieces.pop("fc.bias")

    reseal(copy, rename)
    with refused(run, CheckpointMismatchError, "is of another model: it lacks fc.bias and has other besides"):
        run.engine.load_checkpoint(copy)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: Tower(num_blocks=3),
            "is of another model: it lacks nothing and has blocks.3.down.bias, .* more besides",
        ),
        (lambda: Tower(num_blocks=5), "it lacks blocks.4.down.bias, .* 3 more and has nothing besides"),
        (lambda: Tower(width=2 * HIDDEN), r"blocks.0.norm.weight has shape \(32,\) in .*, the model's has \(64,\)"),
        (lambda: frozen(Tower()), "blocks.0.norm.weight was trainable when .* was saved and is frozen now"),
    ],
)
def test_other_shapes_are_refused(model: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with training(Scenario(model="tower"), "host", tmp_path) as run:
        run.save(tmp_path / "run")
    with GeminiDDP(model(), config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        before = engine.master_state_dict()
        with pytest.raises(CheckpointMismatchError, match=message):
            engine.load_checkpoint(tmp_path / "run", optimizer=optimizer)
        assert same_bits(engine.master_state_dict(), before)


def frozen(model: Tower) -> Tower:
    for param in model.blocks[0].parameters():
        param.requires_grad_(False)
    return model


def test_other_buffers_are_refused(saved: Path) -> None:
    model = SCENARIO.case.model()
    model.register_buffer("extra", torch.zeros(3))
    with GeminiDDP(model, config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        with pytest.raises(CheckpointMismatchError, match=r"buffer extra: expected shape \(3,\), .* has none"):
            engine.load_checkpoint(saved, optimizer=optimizer)


def test_a_buffer_that_would_be_cut_off_is_refused(saved: Path) -> None:
    model = SCENARIO.case.model()
    model.stages[0][1].running_mean = torch.zeros(8, dtype=torch.int64)
    with GeminiDDP(model, config_for("host")) as engine:
        optimizer = hybrid_adam(engine.parameters())
        with pytest.raises(
            CheckpointMismatchError, match=r"running_mean: expected torch\.int64, .* has torch\.float32"
        ):
            engine.load_checkpoint(saved, optimizer=optimizer)


def test_a_frozen_parameter_that_is_missing_where_others_are_not_is_refused(tmp_path: Path) -> None:
    with GeminiDDP(frozen(Tower()), config_for("host")) as engine:
        engine.save_checkpoint(tmp_path)
    deeper = Tower(num_blocks=5)
    deeper.blocks[4].requires_grad_(False)
    message = r"it lacks blocks\.4\.down\.bias, .* has nothing besides"
    with (
        GeminiDDP(frozen(deeper), config_for("host")) as engine,
        pytest.raises(CheckpointMismatchError, match=message),
    ):
        engine.load_checkpoint(tmp_path)


def test_other_parameter_groups_are_refused(saved: Path) -> None:
    with GeminiDDP(SCENARIO.case.model(), config_for("host")) as engine:
        params = list(engine.parameters())
        optimizer = hybrid_adam([{"params": params[:2]}, {"params": params[2:]}])
        message = r"groups have \[11\] parameters, this optimizer's groups have \[2, 9\]"
        with pytest.raises(CheckpointMismatchError, match=message):
            engine.load_checkpoint(saved, optimizer=optimizer)


def test_a_missing_scheduler_is_said(run: Training, tmp_path: Path) -> None:
    run.engine.save_checkpoint(tmp_path / "run")
    with refused(run, CheckpointMismatchError, "scheduler: .* was saved without one; pass scheduler=None"):
        run.engine.load_checkpoint(tmp_path / "run", scheduler=run.scheduler)


def other_kinds(optimizer: torch.optim.Optimizer) -> list[Any]:
    kinds = torch.optim.lr_scheduler
    return [
        kinds.CosineAnnealingLR(optimizer, 10),
        kinds.SequentialLR(optimizer, [kinds.ConstantLR(optimizer), kinds.LinearLR(optimizer)], [3]),
    ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "has one with lr_lambdas, a CosineAnnealingLR has T_max, eta_min instead; give the kind"),
        (1, r"a SequentialLR cannot load what .* has \(KeyError: '_schedulers'\); give the kind"),
    ],
)
def test_another_kind_of_scheduler_is_refused(kind: int, message: str, saved: Path, run: Training) -> None:
    plain = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = other_kinds(plain)[kind]
    before = scheduler.state_dict()
    with refused(run, CheckpointMismatchError, message):
        run.engine.load_checkpoint(saved, scheduler=scheduler)
    assert scheduler.state_dict() == before


def test_a_missing_optimizer_is_said(saved: Path, tmp_path: Path) -> None:
    with GeminiDDP(SCENARIO.case.model(), config_for("host")) as engine:
        with pytest.raises(
            ConfigError, match=r"has an optimizer's state: construct HybridAdam\(engine\.parameters\(\)\)"
        ):
            engine.load_checkpoint(saved)
        engine.save_checkpoint(tmp_path / "run")
        optimizer = hybrid_adam(engine.parameters())
        with pytest.raises(CheckpointMismatchError, match="was saved without an optimizer"):
            engine.load_checkpoint(tmp_path / "run", optimizer=optimizer)


def test_another_engines_optimizer_is_refused(saved: Path, run: Training) -> None:
    with GeminiDDP(SCENARIO.case.model(), config_for("host")) as engine:
        other = hybrid_adam(engine.parameters())
        with refused(run, ConfigError, "expected the HybridAdam that was built last on this engine"):
            run.engine.load_checkpoint(saved, optimizer=other)


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_a_pickle_that_names_code_runs_nothing(copy: Path, run: Training, tmp_path: Path) -> None:
    state = torch.load(copy / "rank-00000.pt")
    torch.save(state | {"extra": Evil(tmp_path / "touched")}, copy / "rank-00000.pt")
    data = (copy / "rank-00000.pt").read_bytes()
    reseal(copy, lambda body: body["files"]["rank-00000.pt"].update(nbytes=len(data), checksum=zlib.crc32(data)))

    with refused(run, CheckpointError, "rank-00000.pt is damaged .UnpicklingError"):
        run.engine.load_checkpoint(copy)

    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()  # so it would have


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x80\2}q\0."])
def test_a_run_state_that_is_none_is_refused(data: bytes, copy: Path, run: Training) -> None:
    (copy / "rank-00000.pt").write_bytes(data)
    reseal(copy, lambda body: body["files"]["rank-00000.pt"].update(nbytes=len(data), checksum=zlib.crc32(data)))
    with refused(run, CheckpointError, "rank-00000.pt is damaged"):
        run.engine.load_checkpoint(copy)


def test_without_verifying_flipped_values_are_loaded(copy: Path, tmp_path: Path) -> None:
    data = bytearray((copy / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "rank-00000.safetensors").write_bytes(data)
    with training(SCENARIO, "host", tmp_path) as run:
        run.engine.load_checkpoint(copy, verify=False)


def test_an_engine_that_was_loaded_half_way_refuses_to_go_on(copy: Path, tmp_path: Path) -> None:
    class Cutter:
        """A scheduler that cuts a file short, once everything has been checked."""

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            os.truncate(copy / "rank-00000.safetensors", 5000)

    with training(SCENARIO, "host", tmp_path) as run:
        with pytest.raises(CheckpointError, match="safetensors is damaged: it was truncated while it was read"):
            run.engine.load_checkpoint(copy, scheduler=Cutter())
        with pytest.raises(
            ModelError, match=r"loading .*/copy failed before it was complete \(.*truncated.*load a checkpoint"
        ):
            run.train(0, 1)
