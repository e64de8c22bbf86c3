"""The comparison as one HTML file that needs nothing else: no network, no fonts, pictures inside.

Every picture is embedded once, as a CSS variable; the slider clips one over the other and the difference map is the
browser's own blend of the two. The page forbids itself any connection (Content-Security-Policy).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bittern.evaluation.compare import Comparison, Entry
from bittern.evaluation.report import plot
from bittern.evaluation.report.names import TASK_NAMES, format_bytes, heading, short_name, unique_names
from bittern.evaluation.report.pictures import MOST_CARDS, Shown, show
from bittern.evaluation.report.plot import Chart, Value
from bittern.evaluation.stats import Difference, Estimate
from bittern.evaluation.suites import Score
from bittern.outputs import write_text

MARK = '<meta name="generator" content="bittern compare">'
"""What tells a report from other files."""


def render(comparison: Comparison, command: str) -> str:
    """The report's HTML.

    Args:
        comparison: what `compare` found.
        command: the command line that makes this report again.
    """
    import jinja2

    folder = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"size": format_bytes, "short": short_name, "minus": _minus}
    template = environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
    entries = comparison.entries
    drawing = comparison.reference.drawing
    shown = show([entry.drawing for entry in entries], min(len(drawing.prompts), MOST_CARDS))
    return template.render(
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=(folder / "script.js").read_text(encoding="utf-8"),
        entries=entries,
        heading=heading(comparison),
        names=unique_names([entry.drawing.model for entry in entries]),
        cards=_cards(comparison, shown),
        shown=shown,
        bars=_bars([entry.score for entry in entries]),
        gaps=_gaps([entry.difference for entry in comparison.others]),
        runs=_bars([entry.geneval and entry.geneval.judged.score for entry in entries]),
        run_gaps=_gaps([entry.geneval_difference for entry in comparison.others]),
        charts=_charts(entries),
        frame=plot,
        heats=[_heat(entry) for entry in comparison.others],
        drawing=drawing,
        command=command,
        result=comparison.to_dict(),
    )


def write(html: str, path: Path) -> None:
    """Write the report, as a whole or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    write_text(html, path, "report")


def _cards(comparison: Comparison, shown: Shown) -> list[dict[str, Any]]:
    verdicts = [_verdicts(comparison, entry) for entry in comparison.entries]
    drawing = comparison.reference.drawing
    cards: list[dict[str, Any]] = []
    for index, uris in enumerate(shown.uris):
        found = [entry.fidelity for entry in comparison.others if entry.fidelity]
        cards.append(
            {
                "prompt": drawing.prompts[index],
                "task": TASK_NAMES[comparison.world[index].tag] if comparison.world else None,
                "seed": drawing.seed + index,
                "pictures": uris,
                "verdicts": [v[index] for v in verdicts],
                "psnr": [f.psnr[index] for f in found],
                "ssim": [f.ssim[index] for f in found],
            }
        )
    return cards


def _verdicts(comparison: Comparison, entry: Entry) -> list[bool | None]:
    if not comparison.world or not entry.score:
        return [None] * len(entry.drawing.prompts)
    outcomes = {task: iter(verdicts) for task, verdicts in entry.score.outcomes.items()}
    return [next(outcomes[prompt.tag]) for prompt in comparison.world]


def _bars(scores: Sequence[Score | None]) -> list[dict[str, Any]]:
    """A row a task: its name, and the models that have a score, by number, with theirs."""
    found = [(model, score) for model, score in enumerate(scores) if score]
    if not found:
        return []
    rows: list[tuple[str, list[Estimate]]] = [("overall", [score.overall for _, score in found])]
    rows += [(TASK_NAMES[task], [score.tasks[task] for _, score in found]) for task in found[0][1].tasks]
    models = [model for model, _ in found]
    return [{"name": name, "estimates": list(zip(models, estimates, strict=True))} for name, estimates in rows]


@dataclass(frozen=True)
class Gap:
    """A paired difference on the axis that all of them share, in percent of its length.

    Attributes:
        model: the model's number.
        difference: what is shown.
        low: where the interval begins.
        at: where the difference lies.
        high: where the interval ends.
        zero: where "no difference" lies.
        p: the sign test's value as text.
    """

    model: int
    difference: Difference
    low: float
    at: float
    high: float
    zero: float
    p: str


def _gaps(differences: Sequence[Difference | None]) -> list[Gap]:
    found = [
        (model, each, each.low, each.high)
        for model, each in enumerate(differences, start=1)
        if each and each.low is not None and each.high is not None
    ]
    if not found:
        return []
    low = min(0.0, *(each for _, _, each, _ in found))
    high = max(0.0, *(each for _, _, _, each in found))
    pad = 0.06 * (high - low)

    def place(value: float) -> float:
        return 100 * (value - low + pad) / (high - low + 2 * pad)

    return [
        Gap(
            model, each, place(its_low), place(each.mean), place(its_high), place(0),
            "< 0.001" if each.p_value < 0.001 else f"= {each.p_value:.2g}",
        )
        for model, each, its_low, its_high in found
    ]  # fmt: skip


def _minus(number: str) -> str:
    """A number with a minus sign where it has a hyphen."""
    return number.replace("-", "\N{MINUS SIGN}")


def _charts(entries: list[Entry]) -> list[Chart]:
    """Size against PSNR, and against the scores where pictures were judged."""
    names = unique_names([entry.drawing.model for entry in entries])
    sizes = [entry.drawing.inspection.file_bytes for entry in entries]

    def values(found: Sequence[Estimate | None]) -> list[Value]:
        # An error that is not known has no whisker.
        return [
            Value(names[index], index % 6, sizes[index], each.mean, each.stderr or 0.0)
            for index, each in enumerate(found)
            if each
        ]

    near = values([entry.fidelity and entry.fidelity.mean_psnr for entry in entries])
    charts = [plot.chart("PSNR to the reference, dB", near)] if near else []
    scored = (
        ("Scenes score", [e.score for e in entries]),
        ("GenEval score", [e.geneval and e.geneval.judged.score for e in entries]),
    )
    for title, scores in scored:
        right = values([score and score.overall for score in scores])
        charts += [plot.chart(title, right, floor=0.0, ceiling=1.0)] if right else []
    return charts


@dataclass(frozen=True)
class HeatRow:
    """One kind of layer: its cells, one a block, None where the block has no such few-bit layer."""

    name: str
    cells: list[Any]


@dataclass(frozen=True)
class HeatMap:
    """A model's layer errors, arranged by stack of blocks, kind of layer and block."""

    stacks: list[tuple[str, int, list[HeatRow]]]
    low: float
    high: float
    rows: list[Any]

    def share(self, error: float) -> int:
        """Where an error lies between the least and the greatest, in percent."""
        return round(100 * (error - self.low) / (self.high - self.low)) if self.high > self.low else 0


def split_path(path: str) -> tuple[str, int, str]:
    """A target's stack of blocks, block number and place in the block: ("blocks", 3, "attn.to_q")."""
    match = re.match(r"(.+?)\.(\d+)\.(.+)", path)
    return (match[1], int(match[2]), match[3]) if match else ("", 0, path)


def _heat(entry: Entry) -> HeatMap:
    rows = [row for row in entry.drawing.inspection.rows if row.error is not None]
    errors = [row.error for row in rows] or [0.0]
    located = [(*split_path(row.path), row) for row in rows]
    stacks: list[tuple[str, int, list[HeatRow]]] = []
    for stack in _ordered(s for s, _, _, _ in located):
        blocks = 1 + max(block for s, block, _, _ in located if s == stack)
        kinds = _ordered(kind for s, _, kind, _ in located if s == stack)
        cells = {(kind, block): row for s, block, kind, row in located if s == stack}
        heat = [HeatRow(kind, [cells.get((kind, block)) for block in range(blocks)]) for kind in kinds]
        stacks.append((stack, blocks, heat))
    return HeatMap(stacks, min(errors), max(errors), rows)


def _ordered(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
