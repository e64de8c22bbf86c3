"""How the program starts and how errors leave it, without any model."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from bittern.cli import main
from bittern.errors import BitternError, UserError

COMMANDS = ("demo", "quantize", "generate", "compare", "evaluate", "inspect", "recipes", "doctor")
HEAVY = ("torch", "diffusers", "transformers", "numpy", "pydantic", "yaml")


def raising(error: BaseException) -> Callable[[], list[str]]:
    def raise_it() -> list[str]:
        raise error

    return raise_it


def test_help_answers_within_a_second_and_imports_nothing_heavy() -> None:
    script = "import sys; from bittern.cli.main import run; code = run(['--help']); print(*sys.modules); sys.exit(code)"
    # Processor time: on a busy machine the clock on the wall measures the other processes.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    *text, modules = done.stdout.splitlines()
    assert not set(HEAVY) & set(modules.split())
    assert all(command in "\n".join(text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"bittern {command}" in shown and "--json" in shown


def test_version_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    from bittern import __version__

    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"bittern {__version__}\n"
    assert main.run([]) == 0
    assert "Usage: bittern" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], "No such command 'evalute'. Did you mean 'evaluate'?"),
        (["generate"], "no model: expected a MODEL and a PROMPT, or --replay"),
        (["generate", "tiny-flux", "--see", "1"], "No such option: --see"),
        (["generate", "tiny-flux", "x", "--seed", "abc"], "--seed"),
        (["recipes", "svdquant-fats"], "unknown recipe 'svdquant-fats': did you mean 'svdquant-fast'?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("one\nline"), 2, "error: one line\n"),
        (BitternError("ours"), 1, "error: ours\n"),
        (RuntimeError("boom"), 1, "error: RuntimeError: boom; add --debug for the traceback\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            2,
            "error: out/x: no space left on device; free some space or choose another place\n",
        ),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bittern.recipes.names", raising(error))
    assert main.run(["recipes"]) == code
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize("arguments", [["--debug", "recipes"], ["recipes", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bittern.recipes.names", raising(RuntimeError("boom")))
    assert main.run(arguments) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: RuntimeError: boom\n")


def test_recipes_as_table_json_and_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    from bittern import recipes

    assert main.run(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in recipes.names())
    assert main.run(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["recipes"]] == recipes.names()
    assert main.run(["recipes", "ternary-fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == recipes.load("ternary-fast").dump()
    assert main.run(["recipes", "int4"]) == 0
    assert "weight: int4" in capsys.readouterr().out
