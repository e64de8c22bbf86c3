"""`bittern compare`: models side by side, as a table and as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bittern.evaluation.compare import Comparison


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="REFERENCE MODEL...", help="The reference first, then the others.", show_default=False),
    ],
    report: Annotated[Path, typer.Option("--report", help="The HTML file to write.")] = Path("report.html"),
    prompts: options.PromptsFile = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    path: options.ArithmeticPath = "auto",
    attention: options.Attention = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Draw the same prompts from the same noise with several models and write a report.

    Without --prompts, 24 held-out prompts of the scenes world, which are judged as well.
    """
    with Output(json) as out:
        hush()
        from bittern.evaluation import report as html
        from bittern.evaluation.compare import compare as run
        from bittern.outputs import check_file_out
        from bittern.trajectories import read_prompts

        report = report.expanduser()
        check_file_out(report, "--report")
        comparison = run(
            models[0],
            models[1:],
            prompts=read_prompts(prompts) if prompts else None,
            limit=limit,
            settings=options.settings(seed, steps, batch_size, path, device, dtype, attention),
            progress=out.progress,
        )
        command = options.command_line(
            "compare", *models, report=report, prompts=prompts, limit=limit, seed=seed, steps=steps,
            batch_size=batch_size, path=path, attention=attention, device=device, dtype=dtype,
        )  # fmt: skip
        html.write(html.render(comparison, command), report)
        out.result({**comparison.to_dict(), "report": str(report)}, *summary(comparison), f"report: {report}")


def summary(comparison: Comparison) -> list[RenderableType]:
    """The headline numbers, a row a model, and what their errors allow to say."""
    from bittern.evaluation.report import format_bytes, unique_names

    names = unique_names([entry.drawing.model for entry in comparison.entries])
    rows = []
    for name, entry in zip(names, comparison.entries, strict=True):
        found = entry.fidelity
        rows.append(
            (
                name,
                format_bytes(entry.drawing.inspection.file_bytes),
                f"{entry.drawing.inspection.bits_per_weight:.2f}",
                f"{found.mean_psnr.mean:.2f} ± {found.mean_psnr.stderr:.2f}" if found else "reference",
                f"{found.mean_ssim.mean:.4f}" if found else "reference",
                str(entry.score.overall) if entry.score else "not judged",
                entry.drawing.path,
            )
        )
    columns = ("model", "transformer on disk", "bits per weight", "PSNR, dB", "SSIM", "scenes score", "path")
    gaps = [(name, entry.difference) for name, entry in zip(names[1:], comparison.others, strict=True)]
    return [table(columns, rows), *(f"{name}: scenes score {gap.claim}" for name, gap in gaps if gap)]
