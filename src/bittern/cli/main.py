"""Entry point: the commands, and how an error leaves the program.

Exit codes: 0, 1 for a fault of ours or the machine's, 2 for a mistake in what the user gave, 130 for an interrupt.
Every error is one line on stderr; `--debug`, anywhere on the line, shows the traceback as well.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from bittern.cli import benchmark, compare, convert, demo, doctor, evaluate, generate, inspect, quantize, recipes
from bittern.errors import BitternError, UserError

app = typer.Typer(
    name="bittern",
    help="Few-bit diffusion models: quantize, draw, measure. MODEL is a folder, a hub id, or an embedded one.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

for module in (demo, quantize, generate, compare, evaluate, benchmark, inspect, convert, recipes, doctor):
    name = module.__name__.rpartition(".")[2]
    app.command(name)(getattr(module, name))

_INTERRUPTED = 130

# What the machine refuses although bittern did no wrong, with the mend.
_MENDS = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EACCES: "choose a place you may use",
    errno.EPERM: "choose a place you may use",
    errno.EROFS: "choose a writable place",
    errno.ENOTDIR: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _version(wanted: bool) -> None:
    if wanted:
        from bittern import __version__

        typer.echo(f"bittern {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None: ...


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are told on stderr."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"] or ["--help"]
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="bittern", standalone_mode=False) or 0
        # Newer typers turn an interrupt into this code, older ones into an exception.
        return _fail("interrupted", _INTERRUPTED) if code == _INTERRUPTED else code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _fail(*_explain(error, debug))


def _explain(error: Exception, debug: bool) -> tuple[str, int]:
    if isinstance(error, UserError):
        return str(error), 2
    # typer's own errors: the class is public in no version, its method is.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "bittern")
        return f"{usage().rstrip('.')}; see {command} --help", 2
    if isinstance(error, OSError) and error.errno in _MENDS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{(error.strerror or '').lower()}; {_MENDS[error.errno]}", 2
    if isinstance(error, BitternError):
        return str(error), 1
    hint = "" if debug else "; add --debug for the traceback"
    return f"{type(error).__name__}: {error}{hint}", 1


def _fail(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
