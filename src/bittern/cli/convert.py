"""`bittern convert`: checkpoints of other engines, in and out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .safetensors file of Nunchaku's or a Nunchaku Lite folder; with --to a few-bit folder.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; with --to nunchaku the file.")],
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FORMAT", help="nunchaku-lite or nunchaku.", show_default="bittern"),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            metavar="MODEL",
            help="Put the model into a copy of this pipeline. A Lite pipeline is copied as it is.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is there.")] = False,
    json: options.Json = False,
) -> None:
    """Convert a checkpoint of another engine to bittern's, or bittern's to theirs, without requantizing."""
    with Output(json) as output:
        hush()
        from bittern.cli.quantize import scheme_table
        from bittern.conversion import export_checkpoint, import_checkpoint
        from bittern.errors import UserError
        from bittern.evaluation.report import format_bytes

        began = time.perf_counter()
        if to is not None:
            if pipeline is not None:
                raise UserError("--pipeline is for files that come in: leave it out with --to")
            written = export_checkpoint(source, out, to, force=force, progress=output.progress)
            line = f"{out}: {written.layers} layers for {to}, {format_bytes(written.bytes)}"
            output.result(
                {"source": source, "out": str(out), "to": to, **written.to_dict()},
                *(f"note: {note}" for note in written.notes),
                line,
            )
            return
        report = import_checkpoint(source, out, pipeline=pipeline, force=force, progress=output.progress)
        seconds = time.perf_counter() - began
        output.result(
            {"source": source, "out": str(out), **report.to_dict(), "seconds": round(seconds, 2)},
            scheme_table(report),
            f"{out}: {report.recipe}, {report.bits_per_weight:.2f} bits per weight, "
            f"{format_bytes(report.file_bytes)}, {seconds:.1f} s",
        )
