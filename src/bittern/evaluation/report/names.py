"""Words and numbers that every form of the report shares."""

from __future__ import annotations

from itertools import count

from bittern.evaluation.compare import Comparison

TASK_NAMES = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}


def headline(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The headline table's columns, and a row a model."""
    names = unique_names([entry.drawing.model for entry in comparison.entries])
    geneval = any(entry.geneval for entry in comparison.entries)
    rows: list[tuple[str, ...]] = []
    for name, entry in zip(names, comparison.entries, strict=True):
        found, size, run = entry.fidelity, entry.drawing.inspection, entry.geneval
        rows.append(
            (
                name,
                format_bytes(size.file_bytes),
                f"{size.bits_per_weight:.2f}",
                found.mean_psnr.text(2) if found else "reference",
                f"{found.mean_ssim.mean:.4f}" if found else "reference",
                str(entry.score.overall) if entry.score else "not judged",
                *([str(run.judged.score.overall) if run else "no run"] if geneval else []),
                entry.drawing.path,
            )
        )
    columns = ("model", "transformer on disk", "bits per weight", "PSNR, dB", "SSIM", "scenes score")
    return (*columns, *(["GenEval"] if geneval else []), "path"), rows


def format_bytes(count: float) -> str:
    """Bytes for a human, in decimal units: 23.8 GB, 9.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def short_name(model: str) -> str:
    """The last part of a model's path or hub id."""
    return model.rstrip("/").rpartition("/")[2] or model


def unique_names(models: list[str]) -> list[str]:
    """Short names, unless two models share one; a model that is there twice is numbered: tiny-flux, tiny-flux (2)."""
    apart = set(models)
    names: list[str] = []
    for model in map(short_name, models) if len(set(map(short_name, apart))) == len(apart) else models:
        numbered = (f"{model} ({number})" for number in count(2))
        names.append(model if model not in names else next(name for name in numbered if name not in names))
    return names


def heading(comparison: Comparison) -> str:
    """What the report is about: fewer bits only where every other model has fewer than the reference."""
    first, *others = unique_names([entry.drawing.model for entry in comparison.entries])
    bits, *theirs = (entry.drawing.inspection.bits_per_weight for entry in comparison.entries)
    if all(each < bits for each in theirs):
        return f"{first}, in fewer bits"
    return f"{first} beside {others[0] if len(others) == 1 else f'{len(others)} others'}"
