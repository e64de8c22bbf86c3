"""`bittern evaluate`: a suite's numbers with their errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table
from bittern.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bittern.evaluation.compbench.suite import CompBench
    from bittern.evaluation.drawing import Settings
    from bittern.evaluation.geneval.suite import GenEval
    from bittern.evaluation.published.measure import Published
    from bittern.evaluation.runs.course import Found
    from bittern.evaluation.suites import Evaluation, Score


def evaluate(
    model: options.OptionalModel = None,
    suite: Annotated[str, typer.Option("--suite", help="scenes, fidelity, geneval, compbench or cost.")] = "scenes",
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="The model to compare with, drawing from the same noise; geneval, compbench: also a finished run.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A .txt file, one prompt a line, or .jsonl with a prompt key; compbench: its files' folder, or one.",
            show_default=False,
        ),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option("--metadata", help="geneval: its evaluation_metadata.jsonl.", show_default=False),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="geneval, compbench: judge this folder of pictures.", show_default=False),
    ] = None,
    images_per_prompt: Annotated[
        int | None,
        typer.Option("--images-per-prompt", help="geneval, compbench: pictures of each prompt.", show_default="4, 10"),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            "--detector",
            help="A folder or hub id; geneval: of a Mask2Former, compbench: of an OWLv2.",
            show_default="COCO, Swin-S; base, ensemble",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            "--clip",
            help="geneval, compbench, fidelity: a CLIP's folder or hub id.",
            show_default="ViT-L/14; ViT-B/32; none",
        ),
    ] = None,
    blip: Annotated[
        str | None,
        typer.Option("--blip", help="compbench: a BLIP-VQA's folder or hub id.", show_default="CapFilt-L"),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            "--depth", help="compbench: a depth model's folder or hub id.", show_default="Depth Anything V2, small"
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            help="fidelity: a folder with the published weights of LPIPS, FID and ImageReward.",
            show_default="torch's downloads",
        ),
    ] = None,
    training_prompts: Annotated[
        bool,
        typer.Option(
            "--training-prompts",
            help="scenes: score as many prompts of the training side, too; higher there, a model has learned by heart.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="geneval, compbench: the folder of pictures and results.", show_default="out/SUITE"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="geneval, compbench: replace another run in --out.")] = False,
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
    """Measure a model: scores by task, and the fidelity to a reference.

    Without --limit, scenes and fidelity take 120 prompts on a CPU and 2,048 on a GPU, geneval and compbench all. These
    two run on several processes with `torchrun --nproc-per-node N --no-python bittern evaluate ...`, and go on where
    they were killed.
    """
    with Output(json) as output:
        hush()
        settings = options.settings(seed, steps, batch_size, path, device, dtype, attention)
        own = {
            "metadata": metadata, "images": images, "images_per_prompt": images_per_prompt, "detector": detector,
            "clip": clip, "blip": blip, "depth": depth, "out": out, "force": force or None,
        }  # fmt: skip
        if suite in ("geneval", "compbench"):
            foreign = (
                {"prompts": prompts, "blip": blip, "depth": depth} if suite == "geneval" else {"metadata": metadata}
            )
            _refuse(suite, {**foreign, "weights": weights, "training_prompts": training_prompts or None})
            if images is not None:
                drawing = {"seed": seed or None, "steps": steps, "batch_size": batch_size, "attention": attention}
                plain = {name: None if value == "auto" else value for name, value in (("path", path), ("dtype", dtype))}
                _refuse_drawing({**drawing, **plain})
            own |= {"prompts": prompts, "force": force}
            own = {name: value for name, value in own.items() if name not in foreign}
            _judged(output, model, suite, reference, limit, settings, own)
        elif suite == "cost":
            drawn = {"training_prompts": training_prompts or None, "limit": limit, "batch_size": batch_size}
            _refuse(suite, {**own, "prompts": prompts, "weights": weights, **drawn})
            _cost(output, model, reference, settings)
        else:
            own.pop("clip")
            _refuse(suite, own)
            _drawn_suite(output, model, suite, reference, prompts, limit, clip, weights, training_prompts, settings)


def _refuse(suite: str, given: dict[str, Any]) -> None:
    """Refuses options that another suite takes."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        takers = {
            "prompts": "it is for --suite fidelity and compbench, and geneval takes --metadata",
            "metadata": "it is for --suite geneval, and compbench takes --prompts",
            "blip": "it is for --suite compbench",
            "depth": "it is for --suite compbench",
            "weights": "it is for --suite fidelity",
            "training_prompts": "it is for --suite scenes",
            "limit": "it draws one prompt",
            "batch_size": "it draws one picture at a time",
        }.get(name, "it is for --suite geneval and compbench")
        raise UserError(f"suite {suite} takes no --{name.replace('_', '-')}: {takers}; leave it out")


def _refuse_drawing(given: dict[str, Any]) -> None:
    """Refuses options of drawing where pictures are given."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        raise UserError(
            f"--images draws nothing, so --{name.replace('_', '-')} would be ignored: leave one of them out"
        )


def _drawn_suite(
    output: Output,
    model: str | None,
    suite: str,
    reference: str | None,
    prompts: Path | None,
    limit: int | None,
    clip: str | None,
    weights: Path | None,
    training_prompts: bool,
    settings: Settings,
) -> None:
    from bittern.evaluation.suites import evaluate as run
    from bittern.trajectories import read_prompts

    if model is None:
        raise UserError(f"suite {suite} draws: expected a MODEL, such as tiny-flux")
    result = run(
        model,
        suite,
        reference=reference,
        prompts=read_prompts(prompts) if prompts else None,
        limit=limit,
        settings=settings,
        clip_model=clip,
        weights=weights,
        training_prompts=training_prompts,
        progress=output.progress,
    )
    output.result(result.to_dict(), *_tables(result))


def _judged(
    output: Output,
    model: str | None,
    suite: str,
    reference: str | None,
    limit: int | None,
    settings: Settings,
    own: dict[str, Any],
) -> None:
    from bittern.evaluation.shards import joined

    names = [name for name in ("detector", "clip", "blip", "depth") if name in own]
    models = {name: value for name in names if (value := own.pop(name)) is not None}
    own["out"] = own["out"] or Path("out") / suite
    with joined() as shard:
        own |= {"reference": reference, "limit": limit, "settings": settings, "shard": shard}
        own["progress"] = output.progress
        if suite == "geneval":
            from bittern.evaluation.geneval.suite import evaluate as run

            found = run(model, **own, **{f"{name}_model": value for name, value in models.items()})
            parts = _geneval_tables(found)
        else:
            from bittern.evaluation.compbench.judge import Models
            from bittern.evaluation.compbench.suite import evaluate as run

            found = run(model, models=Models(**models), **own)
            parts = _compbench_tables(found)
        if shard.first:
            output.result(found.to_dict(), *parts)


def _cost(output: Output, model: str | None, reference: str | None, settings: Settings) -> None:
    from bittern.evaluation.cost.alone import evaluate as run
    from bittern.evaluation.report.names import format_bytes

    if model is None:
        raise UserError("suite cost measures a model: expected a MODEL, such as tiny-flux")
    found = run(model, reference=reference, settings=settings)
    costs = [found.model, *([found.reference] if found.reference else [])]
    rows = [
        (
            cost.model,
            *(format_bytes(size) for size in (cost.disk_bytes, cost.pipeline_bytes, cost.weight_bytes)),
            *("not counted" if size is None else format_bytes(size) for size in (cost.resident_bytes, cost.peak_bytes)),
            f"{cost.ms_per_step:.1f}",
            cost.path,
        )
        for cost in costs
    ]
    columns = ("model", "denoiser on disk", "pipeline", "weights in memory", "resident", "peak", "ms a step", "path")
    spread = "; ".join(f"{cost.model} {min(cost.ms_runs):.1f} to {max(cost.ms_runs):.1f} ms" for cost in costs)
    output.result(
        found.to_dict(),
        table(columns, rows),
        f"{costs[0].size}, batch 1, {costs[0].steps} steps, medians of {len(costs[0].ms_runs)} pictures ({spread}), "
        f"attention {costs[0].attention}, {costs[0].device}",
        "resident and peak are of a process of its own, above what it took before the model came",
    )


def _score_table(names: list[str], scores: list[Score]) -> RenderableType:
    rows = [(task, *(str(s.tasks[task]) for s in scores)) for task in scores[0].tasks]
    return table(("task", *names), [*rows, ("overall", *(str(s.overall) for s in scores))])


def _judged_tables(found: Found, title: str, notes: list[str], right: str = "") -> list[RenderableType]:
    judged, told = [found.judged] + ([found.reference] if found.reference else []), found.to_dict()
    parts = [_score_table([each.model or "pictures" for each in judged], [each.score for each in judged])]
    if found.difference:
        parts.append(f"{title} score {found.difference.claim}")
    made = f", seed {told['seed']}, {told['steps']} steps, path {told['path']}" if told["seed"] is not None else ""
    counted = f"{told['images']} pictures of {told['prompts']} prompts{made} (± is one standard error over prompts)"
    return [*parts, *notes, counted + right, f"results: {told['results']}"]


def _geneval_tables(found: GenEval) -> list[RenderableType]:
    told, notes = found.to_dict(), []
    if found.unknown:
        notes.append(
            f"note: the detector does not know {len(found.unknown)} of the 80 classes, such as {found.unknown[0]!r}: "
            "no picture of them can be right"
        )
    right = f"; {told['correct_images']} pictures and {told['correct_prompts']} prompts right"
    return _judged_tables(found, "GenEval", notes, right)


def _compbench_tables(found: CompBench) -> list[RenderableType]:
    notes = [f"{task} {one.claim}" for task, one in found.differences.items()]
    if found.not_comparable:
        notes.append(
            f"note: {', '.join(found.not_comparable)} rest on another detector than published scores: compare them "
            "with one another only"
        )
    if found.kinds is False:
        notes.append(
            "note: complex is the mean of three for every prompt; lay complex_val_spatial.txt and "
            "complex_val_action.txt beside complex_val.txt, and prompts of one kind are scored as such"
        )
    return _judged_tables(found, "T2I-CompBench", notes)


def _published(found: Published, pictures: int) -> list[str]:
    told = found.estimates
    parts: list[str] = []
    if "lpips" in told:
        parts.append(f"LPIPS {told['lpips']}")
    if found.fid is not None:
        parts.append(f"FID {found.fid:.2f} to the reference's {pictures} pictures: compare only with as many")
    if "image_reward" in told:
        parts.append(f"ImageReward {told['image_reward']}, the reference's {told['reference_image_reward']}")
    return parts + [f"{name} not measured: {lack}" for name, lack in found.absent.items()]


def _tables(result: Evaluation) -> list[RenderableType]:
    drawing, reference = result.drawing, result.reference
    parts: list[RenderableType] = []
    if result.score:
        names = [drawing.model] + ([reference.model] if reference else [])
        scores = [result.score] + ([result.reference_score] if result.reference_score else [])
        parts.append(_score_table(names, scores))
    if result.difference:
        parts.append(f"scenes score {result.difference.claim}")
    if result.training:
        other = f", the reference's {result.reference_training.overall}" if result.reference_training else ""
        parts.append(f"on prompts of the training side {result.training.overall}{other}: a gauge, and no result")
    if result.fidelity:
        psnr, ssim = result.fidelity.mean_psnr, result.fidelity.mean_ssim
        same = f", {result.fidelity.identical} identical" if result.fidelity.identical else ""
        multi = result.fidelity.mean_ms_ssim
        scales = f", MS-SSIM {multi.text(4)}" if multi else ""
        parts.append(f"PSNR {psnr.text(2, ' dB')}, SSIM {ssim.text(4)}{scales}{same}")
    if result.departure:
        left = result.departure
        parts.append(
            f"relative error of the velocity along the reference's path {left.velocity:.4f}, of the latents after the "
            f"first step {left.latents[0]:.4f}, half-way {left.latents[len(left.latents) // 2]:.4f}, at the end "
            f"{left.latents[-1]:.4f} ({left.prompts} prompts)"
        )
    elif result.suite == "fidelity":
        parts.append("velocity and latents not compared: the two denoisers are of different kinds")
    if result.clip:
        parts.append("CLIP score {}, the reference's {}".format(*(each.text(2) for each in result.clip)))
    elif result.suite == "fidelity":
        parts.append("CLIP score not measured: add --clip with a CLIP's folder or hub id")
    if result.published:
        parts += _published(result.published, len(drawing.prompts))
    parts.append(
        f"{len(drawing.prompts)} pictures, seed {drawing.seed}, {drawing.steps} steps, path {drawing.path}, "
        f"{drawing.device}, {drawing.seconds:.1f} s (± is one standard error)"
    )
    return parts
