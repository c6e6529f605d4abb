"""Build the library's own test program (tests/sanitized.cpp) with sanitizers, and run it.

Once with those for addresses and undefined behaviour, once with the one for threads; a finding ends it with an error.
CXX names another compiler than g++. Takes about a minute of one processor.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from build import COMPILE_ARGS, HEADER, NATIVE_DIR

SANITIZERS = {"address and undefined behaviour": "address,undefined", "threads": "thread"}
TIMEOUT_S = 300
"""Some ten times what the program needs; a race may end in a hang."""
TOO_RANDOM = "unexpected memory mapping"
"""What an older thread sanitizer says where the kernel scatters mappings more widely than it can take."""


def main() -> None:
    """Build and run with each of the sanitizers."""
    with tempfile.TemporaryDirectory() as directory:
        for what, option in SANITIZERS.items():
            program = Path(directory) / option
            build(program, option)
            run(program, directory)
            print(f"[sanitize] {what}: clean", flush=True)


def build(program: Path, option: str) -> None:
    """Compile everything with one set of sanitizers."""
    optimisation = {"-O3"}
    command = [
        *os.environ.get("CXX", "g++").split(),
        *(argument for argument in COMPILE_ARGS if argument not in optimisation),
        *("-O1", "-g", "-Werror", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", f"-fsanitize={option}"),
        f"-I{HEADER.parent}",
        str(NATIVE_DIR / "tests" / "sanitized.cpp"),
        *map(str, sorted((NATIVE_DIR / "src").glob("*.cpp"))),
        *("-o", str(program)),
    ]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"[sanitize] the program could not be built with -fsanitize={option}; the compiler's message says why")


def run(program: Path, directory: str) -> None:
    """Run the program; where mappings are too random for it, once more without."""
    command = [str(program), directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode and TOO_RANDOM in done.stderr:
        command = ["setarch", platform.machine(), "-R", *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode:
        sys.exit(f"[sanitize] {program.name}: exit status {done.returncode}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
