"""`bittern inspect`: what a model is made of, or what a recipe would make of it; from configs and headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table
from bittern.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bittern.quantization import Preview, Report, Row


def inspect(
    model: options.Model,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="With --dry-run: a recipe's name or a .yaml file.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what the recipe would do; writes nothing.")] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="SIZE", help="With --dry-run: as for quantize; reads weights.", show_default=False
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Show sizes, bits and errors of a model, layer by layer, or what a recipe would do to it."""
    with Output(json) as out:
        from bittern import pipelines, quantization

        if dry_run != (recipe is not None):
            raise UserError("--recipe and --dry-run belong together: give both, or neither to see the model as it is")
        if fit is not None and recipe is None:
            raise UserError("--fit needs --recipe and --dry-run: give them, too")
        given = Path(model).expanduser()
        # A model without a pipeline around it will do; a built-in name means the same as everywhere.
        folder = given if given.is_dir() and model not in pipelines.BUILT_IN else pipelines.resolve(model)
        if recipe is not None:
            hush()
            foreseen = quantization.preview(folder, recipe, fit=fit, progress=out.progress, name=model)
            out.result({"model": model, **foreseen.to_dict()}, *preview_tables(foreseen))
            return
        report = quantization.inspect(folder)
        out.result({"model": model, **report.to_dict()}, *report_tables(report))


def report_tables(report: Report) -> list[RenderableType]:
    """A report as a table of targets and a line of totals."""
    from bittern.evaluation.report import format_bytes

    rows = [
        (
            row.path,
            _shape(row),
            row.format,
            row.group_size or "row",
            row.rank or "",
            f"{row.activations} bit",
            format_bytes(row.bytes),
            f"{row.bits_per_weight:.2f}",
            "" if row.error is None else f"{row.error:.4f}",
        )
        for row in report.rows
    ]
    columns = ("target", "shape", "format", "group", "rank", "activations", "bytes", "bits per weight", "error")
    ternary = ""
    if report.ternary_weights:
        inside = f", {report.ternary_share_blocks:.2%} of the blocks' weights" if report.block_weights else ""
        ternary = (
            f"; {report.ternary_weights:,} of {report.parameters:,} parameters ternary, "
            f"{report.ternary_share:.2%}{inside}"
        )
    totals = (
        f"{report.recipe or '16 bits'}: {len(rows)} few-bit layers, {report.bits_per_weight:.2f} bits per weight, "
        f"{report.parameters / 1e6:.2f} M parameters in {format_bytes(report.bytes)}{ternary}"
    )
    return [table(columns, rows), totals] if rows else [totals]


def preview_tables(preview: Preview) -> list[RenderableType]:
    """What a recipe would do: targets and kept layers, those of repeated blocks in one row, and the sizes."""
    from bittern.evaluation.report import format_bytes

    shared = {path: group for group in preview.groups for path in group}
    targets = _merged(
        (
            row.path,
            (
                _shape(row),
                f"{row.format} {f'g{row.group_size}' if row.group_size else 'per row'}",
                row.rank or "",
                f"{row.activations} bit",
                _mates(row.path, shared),
            ),
            row.bytes,
        )
        for row in preview.report.rows
    )
    kept = _merged((kept.path, (" x ".join(map(str, kept.shape)), kept.reason), kept.bytes) for kept in preview.kept)
    report = preview.report
    before, after = format_bytes(preview.original_bytes), format_bytes(report.file_bytes)
    totals = (
        f"{report.recipe} on {preview.architecture}: {len(report.rows)} few-bit layers with "
        f"{preview.few_bit_share:.1%} of {report.parameters / 1e6:.2f} M parameters, "
        f"{report.bits_per_weight:.2f} bits per weight; {before} -> {after}, {len(preview.kept)} layers kept"
    )
    lines = [(name, count, *cells, format_bytes(size)) for name, count, cells, size in targets]
    stay = [(name, count, shape, format_bytes(size), reason) for name, count, (shape, reason), size in kept]
    return [
        table(("target", "layers", "shape", "weights", "rank", "activations", "shares its input with", "bytes"), lines),
        table(("kept", "layers", "shape", "bytes", "why"), stay),
        *(f"note: {note}" for note in preview.notes),
        totals,
    ]


def _merged(
    rows: Iterable[tuple[str, tuple[Any, ...], int]],
) -> list[tuple[str, int, tuple[Any, ...], int]]:
    """Rows that are alike but for the numbers in their paths, as one: path with `*`, count, cells, sum of bytes."""
    found: dict[tuple[str, tuple[Any, ...]], list[int]] = {}
    for path, cells, size in rows:
        found.setdefault((_starred(path), cells), []).append(size)
    return [(name, len(sizes), cells, sum(sizes)) for (name, cells), sizes in found.items()]


def _starred(path: str) -> str:
    """A path with `*` for every index but one at its end, which is part of a layer's name."""
    head, dot, tail = path.rpartition(".")
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", f"{head}.").removesuffix(".") + dot + tail if dot else path


def _shape(row: Row) -> str:
    n, k = row.shape
    if row.kernel is None:
        return f"{n} x {k}"
    high, wide = row.kernel
    return f"{n} x {k // (high * wide)} x {high} x {wide}"


def _mates(path: str, shared: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(mate.rpartition(".")[2] for mate in shared.get(path, ()) if mate != path)
