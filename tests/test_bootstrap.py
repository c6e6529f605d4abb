"""Which torch `make setup` installs, and which tools `make check`; no index is asked here."""

from __future__ import annotations

import importlib.util
import re
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


def test_a_tool_whose_program_is_in_a_parent_environment_is_installed(bootstrap, tmp_path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ruff").touch()
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "tool_requirements", lambda tools: [f"{tool}>=1" for tool in tools])
    monkeypatch.setattr(bootstrap, "pip", lambda *arguments: calls.append(arguments))
    bootstrap.install_tools()
    assert calls[-1] == ("install", "--ignore-installed", "--no-deps", "pydoclint>=1", "clang-format>=1")


def test_every_program_that_make_runs_is_installed_as_one(bootstrap) -> None:
    makefile = (BOOTSTRAP.parent.parent / "Makefile").read_text(encoding="ascii")
    programs = set(re.findall(r"\.venv/bin/([\w-]+)", makefile)) - {"python"}
    assert programs == {"pydoclint", "clang-format"}
    assert programs < set(bootstrap.PROGRAMS)  # ruff is a module that looks for its program
