"""Where a command writes: its result on stdout, everything else on stderr.

With `--json` stdout carries one JSON object and nothing else, whatever the libraries underneath may print.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress
    from rich.table import Table

_WIDTH_OF_A_PIPE = 140
_SECONDS_BETWEEN_LINES = 10.0


class Output:
    """One command's output; use as a context, so that a progress bar is taken down and stdout given back."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._stack = contextlib.ExitStack()
        self._bar: Progress | None = None
        self._bars: dict[str, Any] = {}
        self._last = 0.0

    def __enter__(self) -> Output:
        from rich.console import Console

        self._stdout = sys.stdout
        self._console = Console(
            file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE, highlight=False
        )
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def progress(self, what: str, done: float, total: float) -> None:
        """A bar on a terminal; elsewhere a plain line now and then."""
        if sys.stderr.isatty():
            self._draw_bar(what, done, total)
            return
        finished, now = done >= total, time.monotonic()
        first = what not in self._bars
        self._bars[what] = None
        if first or finished or now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            print(f"{what}: {int(done)}/{total:.0f}", file=sys.stderr, flush=True)

    def _draw_bar(self, what: str, done: float, total: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._stack.enter_context(self._bar)
        if what not in self._bars:
            self._bars[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._bars[what], completed=done, total=total)

    def step(self, text: str) -> None:
        """Say on stderr what comes next."""
        print(text, file=sys.stderr, flush=True)

    def result(self, payload: dict[str, Any] | list[Any], *parts: RenderableType) -> None:
        """Print the result: the payload with `--json`, else the tables and lines."""
        self._stack.close()
        if self.as_json:
            print(json.dumps(payload, indent=2, allow_nan=False), file=self._stdout)
        for part in () if self.as_json else parts:
            self._console.print(part, soft_wrap=isinstance(part, str), markup=False)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None, left: int = 1
) -> Table:
    """A plain table; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def hush() -> None:
    """Keep the model libraries' advice and bars off the terminal; their errors stay."""
    import warnings

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub|torch|peft)")
