#!/usr/bin/env python3
"""Run the GPU tests and the GPU benchmark in one call of less than nine minutes; `make gpu` does it.

Nothing is fetched: where a package is missing it comes from a folder of wheels that was carried to the machine
(`make gpu-wheels` fills one). The interpreter is that of .venv, or else python3, whose torch must see the GPU.
What is installed lies in build/gpu-site, the native module in its usual place, all that is found in the folder --out.

The tests are ended after four minutes, and whatever they say the benchmark is run, in the time that is left. The exit
status is that of the tests and of the benchmark, not of the targets; the table of these is printed last.

It uses the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from bootstrap import PINS, has_nvidia_gpu, name_of

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu-site"
NATIVE = ROOT / "gemini" / "_native.abi3.so"
LIMIT_S = 530.0
"""Seconds for everything."""
LONGEST_TESTS_S = 240.0
LEAST_BENCHMARK_S = 120.0
"""Seconds that are kept for the benchmark, whatever the tests would take."""
MARGIN_S = 10.0
NEEDED = ("torch", "numpy", "psutil", "cffi", "setuptools", "rich", "transformers", "pytest", "pytest_timeout")
"""Modules without which nothing can be run."""
CARRIED = ("cffi", "pycparser", "psutil", "rich", "markdown-it-py", "mdurl", "pygments", "pytest", "pytest-timeout")
CARRIED += ("iniconfig", "pluggy", "packaging", "setuptools")
"""What a machine whose Python has torch, numpy and transformers may lack."""
PEERS = ("torchao", "hjson", "py-cpuinfo", "einops", "msgpack", "ninja", "nvidia-ml-py", "pydantic", "tqdm")
PEERS += ("pydantic-core", "annotated-types", "typing-extensions", "typing-inspection")
"""What is compared with, and what DeepSpeed needs."""
PLATFORMS = ("2_28", "2_27", "2_17")
"""Versions of glibc that wheels for the machine may be built for."""
NO_GPU = "make gpu needs an NVIDIA GPU, and this machine has none"
LOOK = """
import importlib.metadata as m, importlib.util, json, sys
names = json.loads(sys.argv[1])
print(json.dumps({
    "modules": [name for name in names if importlib.util.find_spec(name)],
    "packages": sorted({d.metadata["Name"] for d in m.distributions() if d.metadata["Name"]}),
}))
"""
"""A program for the interpreter, which prints which modules and packages it has."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for what is found")
    parser.add_argument("--wheels", type=Path, help="folder of carried wheels, for what is missing")
    parser.add_argument("--python", help="interpreter whose torch sees the GPU (that of .venv, or python3)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything (%(default)s)")
    parser.add_argument("--download", type=Path, help="only fill a folder with wheels, on a machine with a network")
    parser.add_argument("--for-python", default="3.12", help="version of the GPU machine's Python (%(default)s)")
    parser.add_argument("--peers", action="store_true", help="download torchao and DeepSpeed too")
    parser.add_argument("--also", nargs="*", default=[], help="further packages to download")
    options = parser.parse_args()
    if options.download is not None:
        commands = download_commands(options.download, options.for_python, options.also, with_peers=options.peers)
        return max(subprocess.run(command).returncode for command in commands)
    begin_s = time.monotonic()
    if not has_nvidia_gpu():
        sys.exit(NO_GPU)
    python = choose_python(options.python)
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(python, options.wheels)
    used_s = time.monotonic() - begin_s
    say(f"set up in {used_s:.0f} s, with {python}")
    tests = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "gpu", *gpu_test_files(ROOT / "tests")]
    tests_status = run_logged(tests, options.out / "gpu-tests.txt", time_for_tests(options.limit, used_s))
    say("the GPU tests passed" if tests_status == 0 else f"GPU TESTS FAILED, or were not done in time: {tests_status}")
    used_s = time.monotonic() - begin_s
    left_s = max(options.limit - used_s - MARGIN_S, MARGIN_S)
    benchmark = [python, "benchmarks/gpu.py", "--out", str(options.out), "--time-limit", f"{left_s:.0f}"]
    benchmark_status = run_logged(benchmark, options.out / "gpu-benchmark.txt", left_s + 2 * MARGIN_S)
    return 0 if tests_status == benchmark_status == 0 else 1


# ---------------------------------------------------------------- what is decided


def time_for_tests(limit_s: float, used_s: float) -> float:
    """Return the seconds after which the tests are ended, so that the benchmark has time left."""
    return max(min(LONGEST_TESTS_S, limit_s - used_s - LEAST_BENCHMARK_S), 0.0)


def gpu_test_files(tests: Path) -> list[str]:
    """Return the files with tests that need a GPU; the others would only ask for more packages."""
    return sorted(str(path) for path in tests.rglob("test_*.py") if re.search(r"\bmark\.gpu\b", path.read_text()))


def wheels_to_install(wheels: list[Path], packages: list[str]) -> list[Path]:
    """Return the wheels of packages that are not installed."""
    present = {name_of(package) for package in packages}
    return [wheel for wheel in sorted(wheels) if name_of(wheel.name.partition("-")[0]) not in present]


def is_stale(built: Path, sources: list[Path]) -> bool:
    """Tell whether something is missing or older than what it is built from."""
    return not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources)


def download_commands(folder: Path, version: str, also: list[str], *, with_peers: bool) -> list[list[str]]:
    """Return pip's commands that fill a folder with wheels for x86-64 Linux, at the tested versions."""
    pins = {name_of(line): line.partition(";")[0] for line in PINS.read_text().splitlines() if line[:1].isalnum()}
    names = [*CARRIED, *(PEERS if with_peers else ()), *also]
    wanted = [pins.get(name_of(name), name) if re.fullmatch(r"[\w.-]+", name) else name for name in names]
    target = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", version]
    for glibc in PLATFORMS:
        target += ["--platform", f"manylinux_{glibc}_x86_64"]
    target += ["--platform", "manylinux2014_x86_64"]
    commands = [[sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *target, *wanted]]
    if with_peers:  # comes as sources; its operators are compiled where they run
        commands.append([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), "deepspeed"])
    return commands


# ---------------------------------------------------------------- what is done


def choose_python(wanted: str | None) -> str:
    """Return an interpreter whose torch sees the GPU."""
    candidates = [wanted] if wanted else [str(ROOT / ".venv" / "bin" / "python"), shutil.which("python3")]
    found = [candidate for candidate in candidates if candidate and shutil.which(candidate)]
    for candidate in found:
        look = [candidate, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
        if subprocess.run(look, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            return candidate
    sys.exit(
        f"make gpu needs a torch that sees the GPU, and that of {' or '.join(found) or 'no Python'} does not; name "
        "another interpreter: make gpu PYTHON=/path/to/python3"
    )


def prepare(python: str, wheels: Path | None) -> None:
    """Install what is missing from the wheels, and build the native module."""
    shutil.rmtree(SITE, ignore_errors=True)
    carried = list(wheels.glob("*.whl")) if wheels is not None else []
    missing = wheels_to_install(carried, look(python)["packages"])
    if missing:
        say(f"installing {len(missing)} of {len(carried)} carried wheels into {SITE.relative_to(ROOT)}")
        install = ["install", "-q", "--no-index", "--no-deps", "--target", str(SITE), *map(str, missing)]
        run([python, "-m", "pip", *install])
    lacking = sorted(set(NEEDED) - set(look(python)["modules"]))
    if lacking:
        sys.exit(
            f"make gpu lacks {', '.join(lacking)} in {python}: carry wheels (make gpu-wheels) and name their folder: "
            "make gpu WHEELS=DIR"
        )
    native = ROOT / "native"
    loads = [python, "-c", "import gemini._native"]  # not if it was built on a machine with other libraries
    is_usable = subprocess.run(loads, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL).returncode == 0
    if not is_usable or is_stale(NATIVE, [*native.glob("src/*"), *native.glob("include/*"), native / "build.py"]):
        say("building the native module")
        run([python, "native/build.py"])


def look(python: str) -> dict[str, list[str]]:
    """Return the modules of NEEDED and the packages that an interpreter has, beside what was installed for it."""
    command = [python, "-c", LOOK, json.dumps(NEEDED)]
    shown = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=True)
    found: dict[str, list[str]] = json.loads(shown.stdout.decode().splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """Return the environment of everything that is started: the project and what was installed can be imported."""
    paths = [str(ROOT), *([str(SITE)] if SITE.exists() else []), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def run(command: list[str]) -> None:
    """Run a command without which nothing else can be done."""
    status = subprocess.run(command, cwd=ROOT, env=environment()).returncode
    if status != 0:
        sys.exit(f"{' '.join(command)} failed with exit code {status}; its message above says why")


def run_logged(command: list[str], log: Path, longest_s: float) -> int | str:
    """Run a command, show what it prints and keep it in a file; end it, and all it has started, after a while.

    Returns:
        Its exit status, or words that say it was ended.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, **pipes) as child,
    ):
        ended = threading.Event()

        def end() -> None:
            ended.set()
            kill_group(child)

        timer = threading.Timer(longest_s, end)
        timer.start()
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            status = child.wait()
        finally:
            timer.cancel()
            kill_group(child)
    return f"ended after {longest_s:.0f} s" if ended.is_set() else status


def kill_group(child: subprocess.Popen) -> None:
    """End a child and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def say(text: str) -> None:
    sys.stdout.write(f"[gpu] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
