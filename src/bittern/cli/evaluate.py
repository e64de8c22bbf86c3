"""`bittern evaluate`: a suite's numbers with their errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bittern.evaluation.suites import Evaluation


def evaluate(
    model: options.Model,
    suite: Annotated[str, typer.Option("--suite", help="scenes or fidelity.")] = "scenes",
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="The model to compare with, drawing from the same noise.", show_default=False),
    ] = None,
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
    """Measure a model: the scenes score by task, and the fidelity to a reference.

    Without --limit, 120 prompts on a CPU and 2,048 on a GPU.
    """
    with Output(json) as out:
        hush()
        from bittern.evaluation.suites import evaluate as run
        from bittern.trajectories import read_prompts

        result = run(
            model,
            suite,
            reference=reference,
            prompts=read_prompts(prompts) if prompts else None,
            limit=limit,
            settings=options.settings(seed, steps, batch_size, path, device, dtype, attention),
            progress=out.progress,
        )
        out.result(result.to_dict(), *_tables(result))


def _tables(result: Evaluation) -> list[RenderableType]:
    drawing, reference = result.drawing, result.reference
    parts: list[RenderableType] = []
    if result.score:
        names = [drawing.model] + ([reference.model] if reference else [])
        scores = [result.score] + ([result.reference_score] if result.reference_score else [])
        rows = [(task, *(str(s.tasks[task]) for s in scores)) for task in result.score.tasks]
        rows.append(("overall", *(str(s.overall) for s in scores)))
        parts.append(table(("task", *names), rows))
    if result.difference:
        parts.append(f"scenes score {result.difference.claim}")
    if result.fidelity:
        psnr, ssim = result.fidelity.mean_psnr, result.fidelity.mean_ssim
        same = f", {result.fidelity.identical} identical" if result.fidelity.identical else ""
        parts.append(f"PSNR {psnr.mean:.2f} ± {psnr.stderr:.2f} dB, SSIM {ssim.mean:.4f} ± {ssim.stderr:.4f}{same}")
    parts.append(
        f"{len(drawing.prompts)} pictures, seed {drawing.seed}, {drawing.steps} steps, path {drawing.path}, "
        f"{drawing.device}, {drawing.seconds:.1f} s (± is one standard error)"
    )
    return parts
