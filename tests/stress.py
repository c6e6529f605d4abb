#!/usr/bin/env python3
"""Run the tests that kill, wait or use several processes again and again: as they are, on one processor, beside a load.

    python tests/stress.py --rounds 20 [--kinds plain pinned loaded] [-- PYTEST ARGUMENTS]

`make stress` runs it. A load is two busy processes for each processor; they end with this program, however it ends.
What fails is shown by name, with the number of rounds it failed in; the output of a failed round stays in a file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("plain", "pinned", "loaded")
SLOWER = {"plain": 2, "pinned": 5, "loaded": 5}
"""How many times as long as usual a test may take before it is given up."""
PR_SET_PDEATHSIG = 1
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?: \S+)*?)(?: - .*)?$", re.MULTILINE)
CLOSING = re.compile(r"^=* ?(.*\b\d+ (?:passed|failed|error|skipped|deselected).* in [\d.]+s.*?) ?=*$", re.MULTILINE)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """Keep each processor busy twice while the context is open."""
    command = [sys.executable, "-c", "while True: pass"]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(2 * (os.cpu_count() or 1)):
            processes.append(subprocess.Popen(command, preexec_fn=end_with_parent))
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def run_round(kind: str, arguments: list[str]) -> tuple[str, list[str], str]:
    """Run the tests once; return pytest's closing line, the names of those that failed, and all of its output."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-q"]
    command += ["-m", "processes and not gpu", "-rfE", *arguments]
    if kind == "pinned":
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    environment = {**os.environ, "GEMINI_TEST_SLOWER": str(SLOWER[kind])}
    with busy_processors() if kind == "loaded" else contextlib.nullcontext():
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    closing = CLOSING.findall(done.stdout)
    failed = FAILED.findall(done.stdout)
    if done.returncode not in (0, 1) or not closing:  # interrupted, killed, or no tests at all
        failed.append(f"pytest itself (exit code {done.returncode})")
    return (closing or ["no closing line"])[-1], failed, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of each kind (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("arguments", nargs="*", help="for pytest, behind --")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background a shell lets SIGINT be ignored
        signal.signal(number, signal.default_int_handler)
    logs = Path(tempfile.mkdtemp(prefix="gemini-stress-"))
    totals: dict[str, list[bool]] = {kind: [] for kind in options.kinds}
    failures: collections.Counter[tuple[str, str]] = collections.Counter()
    try:
        for number in range(1, options.rounds + 1):
            for kind in options.kinds:
                begin_s = time.monotonic()
                closing, failed, output = run_round(kind, options.arguments)
                totals[kind].append(not failed)
                failures.update((kind, name) for name in set(failed))
                log = logs / f"{kind}-{number}.log"
                if failed:
                    log.write_text(output, encoding="utf-8")
                where = f"; see {log}" if failed else ""
                took_s = time.monotonic() - begin_s
                print(f"{kind} {number}/{options.rounds}: {closing} ({took_s:.0f} s){where}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print_summary(totals, failures)
    return 0 if not failures and all(totals.values()) else 1


def print_summary(totals: dict[str, list[bool]], failures: collections.Counter[tuple[str, str]]) -> None:
    print("\nkind      rounds  passed  failed")
    for kind, passed in totals.items():
        print(f"{kind:8}  {len(passed):6}  {sum(passed):6}  {len(passed) - sum(passed):6}")
    for (kind, name), number in sorted(failures.items()):
        print(f"{kind}: {name} failed in {number} of {len(totals[kind])} rounds")


if __name__ == "__main__":
    sys.exit(main())
