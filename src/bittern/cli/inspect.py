"""`bittern inspect`: what a model is made of, read from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bittern.cli import options
from bittern.cli.output import Output, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bittern.quantization import Report


def inspect(model: options.Model, json: options.Json = False) -> None:
    """Show sizes, bits and errors of a model, layer by layer."""
    with Output(json) as out:
        from bittern import pipelines, quantization

        folder = Path(model) if Path(model).is_dir() else pipelines.resolve(model)
        report = quantization.inspect(folder)
        out.result({"model": model, **report.to_dict()}, *report_tables(report))


def report_tables(report: Report) -> list[RenderableType]:
    """A report as a table of targets and a line of totals."""
    from bittern.evaluation.report import format_bytes

    rows = [
        (
            row.path,
            f"{row.shape[0]} x {row.shape[1]}",
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
    ternary = f", {report.ternary_share:.1%} of all parameters ternary" if report.ternary_weights else ""
    totals = (
        f"{report.recipe or '16 bits'}: {len(rows)} few-bit layers, {report.bits_per_weight:.2f} bits per weight, "
        f"{report.parameters / 1e6:.2f} M parameters in {format_bytes(report.bytes)}{ternary}"
    )
    return [table(columns, rows), totals] if rows else [totals]
