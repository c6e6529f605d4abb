"""Which torch and which versions `make setup` installs, and which tools `make check`; no index is asked here."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reads pyproject.toml on Python 3.10")

BOOTSTRAP = Path(__file__).parent.parent / ".ci" / "bootstrap.py"
NONE, CPU, CUDA = None, False, True
PINNED = "torch==2.9.9"
WANTED = (PINNED, "torch>=2.6")


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    return load("bootstrap")


def load(name: str) -> ModuleType:
    """Import a program of .ci."""
    spec = importlib.util.spec_from_file_location(name, BOOTSTRAP.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("requires_python", "marker"),
    [
        (None, ""),
        (">=3.8", ""),
        (">=3.11", '; python_version >= "3.11"'),
        (">=3.11.5", '; python_full_version >= "3.11.5"'),  # Debian 12 has 3.11.2
        (">=3.10.1", '; python_full_version >= "3.10.1"'),
        (">=3.10,<3.13", '; python_version <= "3.12"'),
        (">=3.11,!=3.11.4,<3.13", '; python_version >= "3.11" and python_version <= "3.12"'),
        (">=3.20", ""),
    ],
)
def test_a_pin_holds_for_the_pythons_that_its_package_admits(requires_python: str | None, marker: str) -> None:
    assert load("constraints").marker_of(requires_python) == marker


def test_every_pin_can_be_had_by_every_python_that_its_marker_names() -> None:
    """Constraints that one Python cannot meet end `make setup` there, after minutes and with a riddle."""
    marker_of = load("constraints").marker_of
    for line in (BOOTSTRAP.parents[1] / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        try:
            found = distribution(pin.name)
        except PackageNotFoundError:
            continue
        if pin.specifier.contains(found.version, prereleases=True):
            assert line.partition(";")[2].strip() == marker_of(found.metadata.get("Requires-Python")).lstrip("; "), line


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
    probe = make_probe(bootstrap, {("default", PINNED): default, ("cpu index", PINNED): cpu_index})
    candidate = bootstrap.choose_torch(has_gpu=has_gpu, probe=probe, requirements=WANTED)
    assert (candidate.index, candidate.needs_cuda) == chosen


def test_an_older_build_is_taken_where_the_tested_version_is_missing(bootstrap) -> None:
    probe = make_probe(bootstrap, {("cpu index", "torch>=2.6"): CPU, ("default", "torch>=2.6"): CUDA})
    assert bootstrap.choose_torch(has_gpu=False, probe=probe, requirements=WANTED).index == bootstrap.CPU_INDEX


def test_no_torch_at_all_is_an_error_that_says_what_to_do(bootstrap) -> None:
    with pytest.raises(SystemExit, match="finds no torch 2.6 or newer for this Python; check the network"):
        bootstrap.choose_torch(has_gpu=False, probe=make_probe(bootstrap, {}), requirements=WANTED)


def test_cuda_without_a_cpu_build_is_announced(bootstrap, capsys) -> None:
    probe = make_probe(bootstrap, {("default", PINNED): CUDA})
    bootstrap.choose_torch(has_gpu=False, probe=probe, requirements=WANTED)
    assert "WARNING: no CPU build of torch can be had from here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "suitable"),
    [("2.6.0", True), ("2.13.0+cpu", True), ("3.0", True), ("2.5.1+cu121", False), ("1.13.1", False), (None, False)],
)
def test_a_torch_from_2_6_on_is_suitable(bootstrap, version, suitable) -> None:
    interpreter = bootstrap.Interpreter("python3", (3, 11), False, True, [], "gcc", version)
    assert interpreter.has_suitable_torch is suitable


@pytest.mark.parametrize(("imported", "installed"), [("2.15.0+cu132", "2.15.0"), ("2.13.0+cpu", "2.13.0+cpu")])
def test_a_torch_that_is_there_has_the_version_pip_knows(bootstrap, imported, installed, tmp_path, monkeypatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {imported!r}")
    (tmp_path / f"torch-{installed}.dist-info").mkdir()
    (tmp_path / f"torch-{installed}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {installed}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert bootstrap.describe(sys.executable).torch == installed


def test_a_tool_whose_program_is_in_a_parent_environment_is_installed(bootstrap, tmp_path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ruff").touch()
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(bootstrap, "tool_requirements", lambda tools: [f"{tool}>=1" for tool in tools])
    monkeypatch.setattr(bootstrap, "pip", lambda *arguments: calls.append(arguments))
    bootstrap.install_tools()
    held = ("--constraint", str(tmp_path / "constraints.txt"))
    assert calls[-1] == ("install", "--ignore-installed", "--no-deps", *held, "pydoclint>=1", "clang-format>=1")


def test_every_program_that_make_runs_is_installed_as_one(bootstrap) -> None:
    makefile = (BOOTSTRAP.parent.parent / "Makefile").read_text(encoding="ascii")
    programs = set(re.findall(r"\.venv/bin/([\w-]+)", makefile)) - {"python"}
    assert programs == {"pydoclint", "clang-format"}
    assert programs < set(bootstrap.PROGRAMS)  # ruff is a module that looks for its program


# ---------------------------------------------------------------- versions


@pytest.fixture
def few_pins(bootstrap, tmp_path, monkeypatch) -> None:
    """constraints.txt, in small."""
    text = '# of 2026\nJinja2==3.1.6\nnumpy==2.4.6; python_version >= "3.11"\nsympy==1.14.0\ntorch==2.13.0\n'
    (tmp_path / "constraints.txt").write_text(text)
    monkeypatch.setattr(bootstrap, "PINS", tmp_path / "constraints.txt")
    monkeypatch.setattr(bootstrap, "needs_of_torch", lambda: ["jinja2", "sympy", "mpmath"])


def test_the_pinned_torch_is_asked_for_first(bootstrap, few_pins) -> None:
    assert bootstrap.wanted_torch() == ["torch==2.13.0", "torch>=2.6"]


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_all_pins_hold_beside_the_pinned_torch(bootstrap, few_pins, version) -> None:
    names = [line.split("==")[0] for line in bootstrap.pins_beside(version)]
    assert names == ["Jinja2", "numpy", "sympy"]


def test_another_torch_keeps_what_it_needs(bootstrap, few_pins, capsys) -> None:
    assert bootstrap.pins_beside("2.6.0+cu124") == ['numpy==2.4.6; python_version >= "3.11"']
    assert "with torch 2.13.0: torch 2.6.0+cu124 takes what it needs as it likes" in capsys.readouterr().out


def test_the_newest_environment_has_no_pins(bootstrap, few_pins, monkeypatch) -> None:
    for name in ("VENV", "VENV_PYTHON", "CONSTRAINTS"):
        monkeypatch.setattr(bootstrap, name, getattr(bootstrap, name))  # put back after the test
    bootstrap.use_newest()
    assert bootstrap.VENV.name == ".venv-newest"
    assert bootstrap.VENV_PYTHON == bootstrap.VENV / "bin" / "python"
    assert bootstrap.CONSTRAINTS.parent == bootstrap.VENV
    assert bootstrap.wanted_torch() == ["torch>=2.6"]


def test_every_requirement_of_the_project_is_pinned(bootstrap) -> None:
    """But for triton, of which each build of torch brings its own."""
    project = tomllib.loads((BOOTSTRAP.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    lines = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    wanted = {bootstrap.name_of(line) for line in lines} - {"gemini-memory", "triton"}
    assert wanted <= set(map(bootstrap.name_of, bootstrap.pins()))


def test_every_pin_lies_within_the_bounds_of_the_project(bootstrap) -> None:
    project = tomllib.loads((BOOTSTRAP.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    version_of = {bootstrap.name_of(line): Requirement(line).specifier for line in bootstrap.pins()}
    for line in [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        pin = version_of.get(bootstrap.name_of(line))
        if pin is not None:
            assert str(pin).removeprefix("==") in Requirement(line).specifier, line
