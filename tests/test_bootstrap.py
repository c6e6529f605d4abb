"""Which torch `make setup` installs; no index is asked here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BOOTSTRAP = Path(__file__).parent.parent / ".ci" / "bootstrap.py"
NONE, CPU, CUDA = None, False, True


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", BOOTSTRAP)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_probe(bootstrap: ModuleType, offers: dict[tuple[str, str], bool | None]):
    """Answer as pip would; offers maps (where, requirement) to whether the build needs CUDA."""

    def probe(requirement: str, index: str | None):
        needs_cuda = offers.get(("default" if index is None else "cpu index", requirement))
        return None if needs_cuda is None else bootstrap.TorchCandidate(requirement[7:], index, needs_cuda)

    return probe


@pytest.mark.parametrize(
    ("has_gpu", "default", "cpu_index", "chosen"),
    [
        pytest.param(False, CPU, NONE, (None, CPU), id="a local CPU build is taken as it is"),
        pytest.param(False, CUDA, CPU, ("https://download.pytorch.org/whl/cpu", CPU), id="the CPU index beats CUDA"),
        pytest.param(False, CUDA, NONE, (None, CUDA), id="CUDA when no CPU build can be had"),
        pytest.param(False, NONE, CPU, ("https://download.pytorch.org/whl/cpu", CPU), id="only the CPU index has one"),
        pytest.param(True, CUDA, CPU, (None, CUDA), id="a GPU gets CUDA"),
        pytest.param(True, CPU, NONE, (None, CPU), id="a GPU without a CUDA build gets a CPU build"),
    ],
)
def test_choose_torch(bootstrap, has_gpu, default, cpu_index, chosen) -> None:
    pinned = "torch==2.13.0"
    probe = make_probe(bootstrap, {("default", pinned): default, ("cpu index", pinned): cpu_index})
    candidate = bootstrap.choose_torch(has_gpu=has_gpu, probe=probe)
    assert (candidate.index, candidate.needs_cuda) == chosen


def test_an_older_build_is_taken_where_the_tested_version_is_missing(bootstrap) -> None:
    probe = make_probe(bootstrap, {("cpu index", "torch>=2.6"): CPU, ("default", "torch>=2.6"): CUDA})
    assert bootstrap.choose_torch(has_gpu=False, probe=probe).index == bootstrap.CPU_INDEX


def test_no_torch_at_all_is_an_error_that_says_what_to_do(bootstrap) -> None:
    with pytest.raises(SystemExit, match="finds no torch 2.6 or newer for this Python; check the network"):
        bootstrap.choose_torch(has_gpu=False, probe=make_probe(bootstrap, {}))


def test_cuda_without_a_cpu_build_is_announced(bootstrap, capsys) -> None:
    bootstrap.choose_torch(has_gpu=False, probe=make_probe(bootstrap, {("default", "torch==2.13.0"): CUDA}))
    assert "WARNING: no CPU build of torch can be had from here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "suitable"),
    [("2.6.0", True), ("2.13.0+cpu", True), ("3.0", True), ("2.5.1+cu121", False), ("1.13.1", False), (None, False)],
)
def test_a_torch_from_2_6_on_is_suitable(bootstrap, version, suitable) -> None:
    interpreter = bootstrap.Interpreter("python3", (3, 11), False, True, [], "gcc", version)
    assert interpreter.has_suitable_torch is suitable
