"""The comparison as Markdown, for a model card."""

from __future__ import annotations

from bittern.evaluation.compare import Comparison
from bittern.evaluation.report.names import TASK_NAMES, headline, unique_names

MARK = "<!-- made by bittern compare -->"


def render(comparison: Comparison, command: str) -> str:
    """Tables of the headline numbers and of the tasks, what may be said of them, and how they were made."""
    entries = comparison.entries
    names = unique_names([entry.drawing.model for entry in entries])
    columns, rows = headline(comparison)
    parts = [MARK, *_table(columns, rows), ""]
    scores = [(name, entry.score) for name, entry in zip(names, entries, strict=True) if entry.score]
    runs = [(name, entry.geneval.judged.score) for name, entry in zip(names, entries, strict=True) if entry.geneval]
    for title, found in (("task", scores), ("GenEval task", runs)):
        if found:
            tasks = [(TASK_NAMES[task], *(str(score.tasks[task]) for _, score in found)) for task in found[0][1].tasks]
            parts += [*_table((title, *(name for name, _ in found)), tasks), ""]
    for name, entry in zip(names[1:], comparison.others, strict=True):
        gaps = (("scenes score", entry.difference), ("GenEval score", entry.geneval_difference))
        parts += [f"- {_escape(name)}: {what} {gap.claim}." for what, gap in gaps if gap]
    drawing = comparison.reference.drawing
    versions = ", ".join(f"{package} {version}" for package, version in comparison.to_dict()["versions"].items())
    last = drawing.seed + len(drawing.prompts) - 1
    parts += [
        "",
        f"{len(drawing.prompts)} prompts, each drawn by every model from the same noise, seeds {drawing.seed} to "
        f"{last}, {drawing.steps} steps, {drawing.device}; ± is one standard error. {versions}.",
        "",
        "```bash",
        command,
        "```",
        "",
    ]
    return "\n".join(parts)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return ["| " + " | ".join(map(_escape, row)) + " |" for row in (columns, rule, *rows)]


def _escape(text: str) -> str:
    """Text that stays in its cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
