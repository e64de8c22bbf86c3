"""`bittern demo`: the whole way on the built-in model, in minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bittern.cli import options, quantize
from bittern.cli.compare import summary_table
from bittern.cli.output import Output, hush

RECIPES = ("svdquant-fast", "ternary-fast")


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for the models and the report.")] = Path("out/demo"),
    limit: Annotated[int, typer.Option("--limit", help="How many prompts to draw.")] = 12,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    path: options.ArithmeticPath = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Quantize tiny-flux to 4 bits and to ternary, reload it with stock diffusers, draw, measure, report."""
    with Output(json) as output:
        hush()
        from bittern.evaluation import report as html
        from bittern.evaluation.compare import compare
        from bittern.pipelines import BUILT_IN

        chosen = options.settings(seed, steps, batch_size, path, device, dtype)
        made = []
        for recipe in RECIPES:
            made.append(quantize.run(BUILT_IN, recipe, out / recipe, force=True, seed=0, device=device, output=output))
            output.step(made[-1].summary)
        folders = [str(done.out) for done in made]
        comparison = compare(BUILT_IN, folders, limit=limit, settings=chosen, progress=output.progress)
        file = out / "report.html"
        command = ["bittern", "demo", "--out", str(out), "--limit", str(limit), "--seed", str(seed)]
        html.write(html.render(comparison, " ".join(command)), file)
        payload = {**comparison.to_dict(), "quantized": [done.to_dict() for done in made], "report": str(file)}
        claims = [
            f"{entry.drawing.model}: scenes score {entry.difference.claim}"
            for entry in comparison.others
            if entry.difference
        ]
        output.result(payload, summary_table(comparison), *claims, f"report: {file}")
