"""The comparison as one HTML file that needs nothing else: no network, no fonts, pictures inside.

Every picture is embedded once, as a CSS variable; the slider clips one over the other and the difference map is the
browser's own blend of the two. The page forbids itself any connection (Content-Security-Policy).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bittern.evaluation.compare import Comparison, Entry
from bittern.evaluation.report import plot
from bittern.evaluation.report.names import TASK_NAMES, format_bytes, short_name, unique_names
from bittern.evaluation.report.pictures import MOST_CARDS, Shown, show
from bittern.evaluation.report.plot import Chart, Value
from bittern.evaluation.stats import Estimate
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
    environment.filters |= {"size": format_bytes, "short": short_name}
    template = environment.from_string((folder / "template.html").read_text(encoding="utf-8"))
    entries = comparison.entries
    drawing = comparison.reference.drawing
    shown = show([entry.drawing for entry in entries], min(len(drawing.prompts), MOST_CARDS))
    return template.render(
        style=(folder / "style.css").read_text(encoding="utf-8"),
        script=(folder / "script.js").read_text(encoding="utf-8"),
        entries=entries,
        names=unique_names([entry.drawing.model for entry in entries]),
        cards=_cards(comparison, shown),
        shown=shown,
        bars=_bars(entries),
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


def _bars(entries: list[Entry]) -> list[dict[str, Any]]:
    scores = [entry.score for entry in entries if entry.score]
    if len(scores) < len(entries):
        return []
    rows: list[tuple[str, list[Estimate]]] = [("overall", [s.overall for s in scores])]
    rows += [(TASK_NAMES[task], [s.tasks[task] for s in scores]) for task in scores[0].tasks]
    return [{"name": name, "estimates": estimates} for name, estimates in rows]


def _charts(entries: list[Entry]) -> list[Chart]:
    """Size against PSNR, and against the score where pictures were judged."""
    names = unique_names([entry.drawing.model for entry in entries])
    sizes = [entry.drawing.inspection.file_bytes for entry in entries]
    near = [
        Value(names[index], index % 6, sizes[index], entry.fidelity.mean_psnr.mean, entry.fidelity.mean_psnr.stderr)
        for index, entry in enumerate(entries)
        if entry.fidelity
    ]
    right = [
        Value(names[index], index % 6, sizes[index], entry.score.overall.mean, entry.score.overall.stderr)
        for index, entry in enumerate(entries)
        if entry.score
    ]
    charts = [plot.chart("PSNR to the reference, dB", near)] if near else []
    return charts + ([plot.chart("Scenes score", right, floor=0.0, ceiling=1.0)] if right else [])


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
