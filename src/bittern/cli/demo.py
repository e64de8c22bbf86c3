"""`bittern demo`: the whole way on the built-in model, in minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bittern import tiny_flux
from bittern.cli import options, quantize
from bittern.cli.compare import summary
from bittern.cli.output import Output, hush

RECIPES = ("svdquant-fast", "ternary-fast")


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for the models and the report.")] = Path("out/demo"),
    limit: Annotated[int, typer.Option("--limit", help="How many prompts to draw.")] = 12,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    path: options.ArithmeticPath = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Quantize tiny-flux to 4 bits and to ternary, reload it with stock diffusers, draw, measure, report."""
    with Output(json) as output:
        hush()
        from bittern.evaluation import report as html
        from bittern.evaluation.compare import compare
        from bittern.evaluation.suites import choose_prompts
        from bittern.outputs import check_file_out

        chosen = options.settings(seed, steps, batch_size, path, device, dtype)
        out = out.expanduser()
        file = out / "report.html"
        check_file_out(file, "--out")
        choose_prompts(None, limit, limit)
        made = []
        for recipe in RECIPES:
            made.append(
                quantize.run(tiny_flux.NAME, recipe, out / recipe, force=True, seed=0, device=device, output=output)
            )
            output.step(made[-1].summary)
        folders = [str(done.out) for done in made]
        comparison = compare(tiny_flux.NAME, folders, limit=limit, settings=chosen, progress=output.progress)
        command = options.command_line(
            "demo", out=out, limit=limit, seed=seed, steps=steps,
            batch_size=batch_size, path=path, device=device, dtype=dtype,
        )  # fmt: skip
        html.write(html.render(comparison, command), file)
        payload = {**comparison.to_dict(), "quantized": [done.to_dict() for done in made], "report": str(file)}
        output.result(payload, *summary(comparison), f"report: {file}")
