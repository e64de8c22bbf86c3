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
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", help="Write the tables for a model card, too.", show_default=False),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            help="The folder of a finished `evaluate --suite geneval` of one of the models, to show, too; may be "
            "given several times.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are no reports. Reports are replaced anyway.")
    ] = False,
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
        from bittern.errors import UserError
        from bittern.evaluation import report as html
        from bittern.evaluation.compare import compare as run
        from bittern.evaluation.report import markdown as card
        from bittern.outputs import check_replaces, write_text
        from bittern.trajectories import read_prompts

        report, markdown = report.expanduser(), markdown and markdown.expanduser()
        check_replaces(report, "--report", html.MARK, force=force)
        if markdown and markdown.resolve() == report.resolve():
            raise UserError(f"--markdown {markdown} is the report's own file: expected another")
        if markdown:
            check_replaces(markdown, "--markdown", card.MARK, force=force)
        comparison = run(
            models[0],
            models[1:],
            prompts=read_prompts(prompts) if prompts else None,
            limit=limit,
            settings=options.settings(seed, steps, batch_size, path, device, dtype, attention),
            results=results or (),
            progress=out.progress,
        )
        command = options.command_line(
            "compare", *models, report=report, markdown=markdown, results=results, prompts=prompts, limit=limit,
            seed=seed, steps=steps, batch_size=batch_size, path=path, attention=attention, device=device, dtype=dtype,
        )  # fmt: skip
        html.write(html.render(comparison, command), report)
        if markdown:
            write_text(card.render(comparison, command), markdown, "model card")
        written = [f"report: {report}", *([f"model card: {markdown}"] if markdown else [])]
        payload = {**comparison.to_dict(), "report": str(report), "markdown": markdown and str(markdown)}
        out.result(payload, *summary(comparison), *written)


def summary(comparison: Comparison) -> list[RenderableType]:
    """The headline numbers, a row a model, and what their errors allow to say."""
    from bittern.evaluation.report.names import headline, unique_names

    names = unique_names([entry.drawing.model for entry in comparison.entries])
    claims = [
        f"{name}: {what} {gap.claim}"
        for name, entry in zip(names[1:], comparison.others, strict=True)
        for what, gap in (("scenes score", entry.difference), ("GenEval score", entry.geneval_difference))
        if gap
    ]
    return [table(*headline(comparison)), *claims]
