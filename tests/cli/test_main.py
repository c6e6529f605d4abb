"""The dispatcher: finds a command, imports no other, and says in one line what went wrong."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import types
from importlib.metadata import distribution
from pathlib import Path

import pytest

from gemini.__main__ import COMMANDS, EXTRAS, main
from gemini.errors import ConfigError


def a_command(run):
    module = types.ModuleType("a_command")
    module.add_arguments = lambda parser: parser.add_argument("--times", type=int, default=1)
    module.run = run
    return module


@pytest.fixture
def command(monkeypatch):
    """Let "play" be the only command, and do what the test says."""

    def install(run):
        monkeypatch.setitem(sys.modules, "a_command", a_command(run))
        monkeypatch.setitem(COMMANDS, "play", ("a_command", "play a game"))

    return install


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_form_that_the_dispatcher_expects(name):
    module = importlib.import_module(COMMANDS[name][0])
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)


def test_the_commands_own_exit_code_is_the_programs(command):
    command(lambda arguments: arguments.times)
    assert main(["play", "--times", "7"]) == 7


def test_modules_of_other_commands_are_not_imported(monkeypatch, command):
    command(lambda arguments: 0)
    monkeypatch.setitem(COMMANDS, "other", ("a_module_that_does_not_exist", "fail"))
    assert main(["play"]) == 0


@pytest.mark.parametrize("argv", [[], ["fly"], ["play", "--times", "often"], ["play", "--tim", "2"]])
def test_wrong_arguments_end_with_two(command, argv, capsys):
    command(lambda arguments: 0)
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "extra"), EXTRAS.items())
def test_a_missing_package_is_named_with_the_extra_that_installs_it(name, extra, monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, name, ("a_module_that_does_not_exist", "fail"))
    assert main([name]) == 2
    assert capsys.readouterr().err.endswith(f"is not installed; pip install 'gemini-memory[{extra}]'\n")


def test_every_extra_of_a_command_exists():
    extras = distribution("gemini-memory").metadata.get_all("Provides-Extra")
    assert set(EXTRAS.values()) <= set(extras or ())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("dtype: expected one of\n these"), "gemini: error: dtype: expected one of these\n"),
        (FileNotFoundError(2, "No such file", "x"), "gemini: error: [Errno 2] No such file: 'x'\n"),
        (ModuleNotFoundError("No module named 'rich'", name="rich.table"), "needs the package rich, which is not"),
    ],
)
def test_an_error_is_one_line(command, error, line, capsys):
    def fail(arguments):
        raise error

    command(fail)
    assert main(["play"]) == 2
    written = capsys.readouterr().err
    assert line in written
    assert written.count("\n") == 1


def test_a_missing_module_of_our_own_is_not_blamed_on_the_user(command):
    def fail(arguments):
        raise ModuleNotFoundError("No module named 'gemini.lost'", name="gemini.lost")

    command(fail)
    with pytest.raises(ModuleNotFoundError):
        main(["play"])


def test_ctrl_c_is_a_line_and_the_code_that_shells_use(command, capsys):
    def wait(arguments):
        raise KeyboardInterrupt

    command(wait)
    assert main(["play"]) == 130
    assert capsys.readouterr().err == "gemini: interrupted\n"


def test_what_is_not_built_says_how_it_is():
    program = "import sys; sys.modules['gemini._native'] = None; from gemini import GeminiDDP"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stderr.splitlines()[-1].endswith("pip install . in its directory, or python native/build.py")
