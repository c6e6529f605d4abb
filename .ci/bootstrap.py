#!/usr/bin/env python3
"""Make .venv: a Python, a torch that suits the machine, this package and its tools.

`make setup` runs it; it is safe to run again. What it decides, in this order:

1. The interpreter: one from 3.10 to 3.13 with the C headers, preferring one that already has a suitable torch.
2. The environment: always .venv. A torch found in the base Python or in an active virtual environment stays visible
   from .venv and is never modified.
3. torch, if none is visible: `choose_torch` below. Later installs are held to it.
4. The versions of everything else: those of constraints.txt, with which all tests were green. What a torch of another
   version needs is left to that torch. With --newest everything is the newest there is, in .venv-newest.
5. The package itself, editable, built without isolation (isolation would fetch the build tools a second time).

It uses the standard library only, so that any Python 3.8 or newer can start it; pip keeps its own configuration.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable, Collection, List, NamedTuple, NoReturn, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
CONSTRAINTS = VENV / "constraints.txt"
"""What installs into .venv are held to."""
NEWEST_VENV = ROOT / ".venv-newest"
PINS = ROOT / "constraints.txt"
"""The versions with which all tests were green; see `make constraints`."""

PYTHON_MIN = (3, 10)
PYTHON_MAX = (3, 13)
TORCH_MIN = (2, 6)
ANY_TORCH = "torch>=2.6"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""The PyTorch project's own index of builds without CUDA."""
BUILD_TOOLS = ("pip>=23.2", "setuptools>=77", "wheel", "cffi>=1.17", "packaging")
"""What pip needs to build the package. To read torch's metadata, a pip before 23.2 would download all of torch."""
PROGRAMS = ("ruff", "pydoclint", "clang-format")
"""Tools of `make check` that need a program in .venv/bin, a module alone not being enough."""

DESCRIBE = """
import json, os, site, sys, sysconfig
from importlib.metadata import version
try:
    import torch
    torch_version = version("torch")
except Exception:
    torch_version = None
print(json.dumps({
    "executable": sys.executable,
    "version": list(sys.version_info[:2]),
    "is_virtual": sys.prefix != sys.base_prefix,
    "has_headers": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "site_dirs": [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")],
    "compiler": (sysconfig.get_config_var("CC") or "cc").split()[0],
    "torch": torch_version,
}))
"""
"""A program for the interpreter in question, which prints the fields of `Interpreter` as JSON."""


class Interpreter(NamedTuple):
    """A Python found on this machine."""

    executable: str
    version: tuple
    is_virtual: bool
    has_headers: bool
    site_dirs: List[str]
    compiler: str
    torch: Optional[str]
    """The version pip knows it by, which need not have what `torch.__version__` ends in, such as +cu132."""

    @property
    def has_suitable_torch(self) -> bool:
        return self.torch is not None and tuple(int(part) for part in self.torch.split(".")[:2]) >= TORCH_MIN


class TorchCandidate(NamedTuple):
    """What pip would install for one requirement from one index."""

    version: str
    index: Optional[str]
    """None: the indexes that pip is configured with."""
    needs_cuda: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="interpreter to build .venv from; default: found on PATH")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="make .venv, say which torch would be installed, and stop")
    only.add_argument("--native", action="store_true", help="only rebuild the native module")
    only.add_argument("--tools", action="store_true", help="only install the developers' tools (the extra `dev`)")
    only.add_argument("--newest", action="store_true", help="make .venv-newest, with the newest versions of everything")
    options = parser.parse_args()
    if options.newest:
        use_newest()
    if options.tools:
        install_tools()
        return
    require_compiler()
    if options.native:
        build_native(describe(str(VENV_PYTHON)))
        return
    if options.python or not is_usable_environment():
        make_environment(choose_interpreter(options.python))
    write_constraints([] if options.newest else pins_without_torch())
    pip("install", "--constraint", str(CONSTRAINTS), *BUILD_TOOLS)
    if not describe(str(VENV_PYTHON)).has_suitable_torch:
        candidate = choose_torch(has_gpu=has_nvidia_gpu(), probe=probe_torch, requirements=wanted_torch())
        kind = "CUDA" if candidate.needs_cuda else "CPU"
        say(f"installing torch {candidate.version}, a {kind} build, from {candidate.index or 'where pip looks'}")
        if options.plan:
            return
        install_torch(candidate)
    installed = describe(str(VENV_PYTHON))
    if not installed.has_suitable_torch:
        fail("torch was installed but cannot be imported; run .venv/bin/python -c 'import torch' to see why")
    say(f"torch {installed.torch} on Python {installed.version[0]}.{installed.version[1]}")
    if options.plan:
        return
    write_constraints([f"torch=={installed.torch}", *([] if options.newest else pins_beside(installed.torch))])
    say("building the package and installing what it and its tests need")
    upgrade = ("--upgrade", "--upgrade-strategy", "eager") if options.newest else ()
    pip(
        *("install", "--no-build-isolation", "--constraint", str(CONSTRAINTS), *upgrade),
        *("--editable", f"{ROOT}[test]"),
        env=compiler_environment(installed),
    )


def use_newest() -> None:
    """Let everything happen in .venv-newest, without constraints.txt."""
    global VENV, VENV_PYTHON, CONSTRAINTS
    VENV = NEWEST_VENV
    VENV_PYTHON = VENV / "bin" / "python"
    CONSTRAINTS = VENV / "constraints.txt"


def install_tools() -> None:
    """Install what `make check` needs beyond the tests."""
    # The package is installed, so pip only adds what its extra asks for and does not build it again.
    pip("install", "--constraint", str(CONSTRAINTS), "gemini-memory[dev]")
    # pip is content with tools that .venv sees in a parent environment, but their programs are in that one's bin.
    missing = [tool for tool in PROGRAMS if not (VENV / "bin" / tool).exists()]
    if missing:
        options = ("--ignore-installed", "--no-deps", "--constraint", str(CONSTRAINTS))
        pip("install", *options, *tool_requirements(missing))


def tool_requirements(tools: List[str]) -> List[str]:
    """Return what the extra `dev` asks of some tools, such as "ruff>=0.14,<0.18"."""
    code = (
        "import json, sys; from importlib.metadata import requires; from packaging.requirements import Requirement;"
        "rs = map(Requirement, requires('gemini-memory')); tools = json.load(sys.stdin);"
        "print(json.dumps([f'{r.name}{r.specifier}' for r in rs if r.name in tools]))"
    )
    return ask_environment(code, tools)


# ---------------------------------------------------------------- interpreter and environment


def choose_interpreter(requested: Optional[str]) -> Interpreter:
    """Take the requested interpreter, or the first with a suitable torch, or the first that can build."""
    names = [requested] if requested else ["python3", *(f"python3.{minor}" for minor in (13, 12, 11, 10))]
    if not requested and os.environ.get("VIRTUAL_ENV"):
        names.insert(0, os.path.join(os.environ["VIRTUAL_ENV"], "bin", "python"))
    paths = dict.fromkeys(filter(None, map(shutil.which, names)))
    others = (path for path in paths if Path(os.path.abspath(path)) != VENV_PYTHON)
    found = [interpreter for interpreter in map(describe_or_none, others) if interpreter is not None]
    in_range = [each for each in found if PYTHON_MIN <= each.version <= PYTHON_MAX]
    usable = [each for each in in_range if each.has_headers]
    if not in_range:
        versions = ", ".join(f"{each.executable} ({each.version[0]}.{each.version[1]})" for each in found) or "none"
        fail(f"need Python 3.10 to 3.13, found {versions}; install one, or name it: make setup PYTHON=/path/to/python3")
    if not usable:
        fail(
            f"{in_range[0].executable} has no C headers, which building the native module needs; "
            "install them (Debian/Ubuntu: apt-get install python3-dev)"
        )
    with_torch = [each for each in usable if each.has_suitable_torch]
    return (with_torch or usable)[0]


def describe_or_none(executable: str) -> Optional[Interpreter]:
    try:
        return describe(executable)
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None  # for example a pyenv shim whose version is not selected


def describe(executable: str) -> Interpreter:
    command = [executable, "-c", DESCRIBE]
    # From a folder of its own: the current one is on sys.path, and may be anything.
    with tempfile.TemporaryDirectory() as folder:
        shown = subprocess.run(
            command, cwd=folder, check=True, timeout=180, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    facts = json.loads(shown.stdout.decode().splitlines()[-1])
    facts["version"] = tuple(facts["version"])
    return Interpreter(**facts)


def is_usable_environment() -> bool:
    """Tell whether .venv is there, of a supported version and has pip."""
    if not VENV_PYTHON.exists():
        return False
    interpreter = describe_or_none(str(VENV_PYTHON))
    if interpreter is None or not PYTHON_MIN <= interpreter.version <= PYTHON_MAX:
        return False
    look = [str(VENV_PYTHON), "-m", "pip", "--version"]
    return subprocess.run(look, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def make_environment(interpreter: Interpreter) -> None:
    """Make .venv anew; let it see the interpreter's packages if they include a suitable torch."""
    if is_usable_environment() and describe(str(VENV_PYTHON)).version == interpreter.version:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    say(f"making .venv with {interpreter.executable}")
    create = [interpreter.executable, "-m", "venv", str(VENV)]
    if interpreter.has_suitable_torch:
        say(f"keeping the torch {interpreter.torch} that is installed there")
    if interpreter.has_suitable_torch and not interpreter.is_virtual:
        create.append("--system-site-packages")
    if subprocess.run(create, stdout=subprocess.DEVNULL).returncode != 0:
        # Debian's python3 comes without ensurepip, but its pip can install into another environment.
        shutil.rmtree(VENV, ignore_errors=True)
        run([*create, "--without-pip"], hint="install python3-venv (Debian/Ubuntu: apt-get install python3-venv)")
        run(
            [interpreter.executable, "-m", "pip", "--python", str(VENV_PYTHON), "install", "pip"],
            hint="install python3-venv (Debian/Ubuntu: apt-get install python3-venv)",
        )
    if interpreter.has_suitable_torch and interpreter.is_virtual:
        # A venv made from a venv sees the base's packages, not its parent's: a .pth file adds those, last on sys.path.
        for target in (VENV / "lib").glob("python*/site-packages"):
            (target / "_parent_environment.pth").write_text("\n".join(interpreter.site_dirs) + "\n")


# ---------------------------------------------------------------- versions


def pins() -> List[str]:
    """Return the lines of constraints.txt that are no comments."""
    lines = PINS.read_text(encoding="ascii").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def name_of(requirement: str) -> str:
    """Return the package of a line such as "numpy==2.4.6; python_version >= '3.11'", in pip's form."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


def pins_without_torch(besides: Collection[str] = ()) -> List[str]:
    """Return the pins of all packages but torch and some others."""
    return [line for line in pins() if name_of(line) not in {"torch", *besides}]


def pins_beside(torch_version: str) -> List[str]:
    """Return the pins that hold beside a torch: of another version than the pinned one, not of what it needs."""
    if torch_version.partition("+")[0] == pinned_torch():
        return pins_without_torch()
    say(f"the tests were green with torch {pinned_torch()}: torch {torch_version} takes what it needs as it likes")
    return pins_without_torch(besides=needs_of_torch())


def pinned_torch() -> str:
    """Return the version of torch that the tests were green with."""
    (line,) = (line for line in pins() if name_of(line) == "torch")
    return line.partition(";")[0].partition("==")[2].strip()


def wanted_torch() -> List[str]:
    """Return what to ask an index for, the first first: the tested version, if that is wanted, or any that works."""
    return [ANY_TORCH] if VENV == NEWEST_VENV else [f"torch=={pinned_torch()}", ANY_TORCH]


def write_constraints(lines: List[str]) -> None:
    CONSTRAINTS.write_text("".join(f"{line}\n" for line in lines))


def needs_of_torch() -> List[str]:
    """Return the packages that the torch in .venv needs, and what these need."""
    code = """
import json, sys
from importlib.metadata import PackageNotFoundError, requires
from packaging.requirements import Requirement
found, waiting = set(), json.load(sys.stdin)
while waiting:
    try:
        lines = requires(waiting.pop()) or []
    except PackageNotFoundError:
        continue
    for each in map(Requirement, lines):
        if (each.marker is None or each.marker.evaluate({"extra": ""})) and each.name not in found:
            found.add(each.name)
            waiting.append(each.name)
print(json.dumps(sorted(found)))
"""
    return [name_of(name) for name in ask_environment(code, ["torch"])]


# ---------------------------------------------------------------- torch


def choose_torch(
    *,
    has_gpu: bool,
    probe: Callable[[str, Optional[str]], Optional[TorchCandidate]],
    requirements: Sequence[str],
) -> TorchCandidate:
    """Choose which torch to install; only metadata has been downloaded by then.

    With an NVIDIA GPU the first CUDA build that pip's own indexes offer. Without one the first CPU build, of pip's own
    indexes or else of PyTorch's CPU index; a CUDA build only if neither has any.
    """
    offered = []
    for index in (None,) if has_gpu else (None, CPU_INDEX):
        for requirement in requirements:
            candidate = probe(requirement, index)
            if candidate is None:
                continue
            if candidate.needs_cuda == has_gpu:
                return candidate
            offered.append(candidate)
    if not offered:
        fail("pip finds no torch 2.6 or newer for this Python; check the network, or install torch by hand first")
    if has_gpu:
        say(f"WARNING: only a CPU build of torch can be had ({offered[0].version}); the GPU will not be used")
    else:
        say("WARNING: no CPU build of torch can be had from here, so the CUDA build is installed: several GB")
    return offered[0]


def probe_torch(requirement: str, index: Optional[str]) -> Optional[TorchCandidate]:
    """Ask pip what it would install, without installing it; None if it finds nothing."""
    # --no-deps: the wheel's own metadata already tells, and resolving would read that of every CUDA package too.
    command = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--only-binary", "torch"]
    command += ["--report", "-", requirement]
    if index is not None:
        command += ["--index-url", index, "--timeout", "15", "--retries", "1"]
    report = subprocess.run(
        [str(VENV_PYTHON), "-m", "pip", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    if report.returncode != 0:
        return None
    metadata = json.loads(report.stdout.decode())["install"][0]["metadata"]
    names = required_names(metadata.get("requires_dist", []))
    needs_cuda = any(name.startswith(("nvidia-", "cuda-")) for name in names)
    return TorchCandidate(metadata["version"], index, needs_cuda)


def required_names(requires_dist: List[str]) -> List[str]:
    """Return the names of the requirements that apply to .venv on this machine."""
    code = (
        "import json, sys; from packaging.requirements import Requirement; rs = map(Requirement, json.load(sys.stdin));"
        "print(json.dumps([r.name for r in rs if r.marker is None or r.marker.evaluate({'extra': ''})]))"
    )
    return ask_environment(code, requires_dist)


def ask_environment(code: str, question: List[str]) -> List[str]:
    """Run code in .venv that reads a list as JSON and prints another."""
    shown = subprocess.run(
        [str(VENV_PYTHON), "-c", code], input=json.dumps(question).encode(), stdout=subprocess.PIPE, check=True
    )
    return json.loads(shown.stdout.decode())


def install_torch(candidate: TorchCandidate) -> None:
    if candidate.index is None:
        is_pinned = candidate.version.partition("+")[0] == pinned_torch()  # and so is what it needs
        held = ("--constraint", str(CONSTRAINTS)) if is_pinned else ()
        pip("install", *held, f"torch=={candidate.version}")
    else:
        # The rest of what torch needs comes from pip's own indexes, with this package's requirements.
        pip("install", "--no-deps", "--index-url", candidate.index, f"torch=={candidate.version}")


def has_nvidia_gpu() -> bool:
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    tool = shutil.which("nvidia-smi")  # the only sign under WSL
    if tool is None:
        return False
    listing = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return listing.returncode == 0 and b"GPU" in listing.stdout


# ---------------------------------------------------------------- native module


def require_compiler() -> None:
    if shutil.which("g++") is None and shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        fail("no C++ compiler: install g++ (Debian/Ubuntu: apt-get install g++), or set CXX")


def compiler_environment(interpreter: Interpreter) -> dict:
    """Return the environment for building; a Python made with a compiler that is not here gets g++ instead."""
    environment = dict(os.environ)
    if shutil.which(interpreter.compiler) is None:
        environment.setdefault("CXX", "g++")
        environment.setdefault("CC", "gcc" if shutil.which("gcc") else "g++")
    return environment


def build_native(interpreter: Interpreter) -> None:
    run(
        [str(VENV_PYTHON), "native/build.py"],
        hint="the compiler's message above says why",
        env=compiler_environment(interpreter),
    )


# ---------------------------------------------------------------- running things


def pip(*arguments: str, env: Optional[dict] = None) -> None:
    # Twice quiet: errors only. Without it a mirror that lacks one package fills the screen with warnings.
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "-qq", *arguments]
    run(
        command,
        hint="the message above says why; often it is the network or pip's configuration (pip config list), and if a "
        "version of constraints.txt can no longer be had, `make test-newest` does without",
        env=env,
    )


def run(command: List[str], *, hint: str, env: Optional[dict] = None) -> None:
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    if code != 0:
        fail(f"{' '.join(command)} failed with exit code {code}; {hint}")


def say(text: str) -> None:
    sys.stdout.write(f"[setup] {text}\n")
    sys.stdout.flush()


def fail(text: str) -> NoReturn:
    sys.exit(f"[setup] {text}")


if __name__ == "__main__":
    main()
