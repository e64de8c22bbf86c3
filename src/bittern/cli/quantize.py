"""`bittern quantize`: a pipeline in, a few-bit pipeline out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table
from bittern.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from bittern.quantization import Report, Row
    from bittern.recipes import Recipe


def quantize(
    model: options.Model,
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe's name or a .yaml file; see bittern recipes.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the model that is in the folder.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an unfinished run has left.")] = False,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Calibration prompts, .txt or .jsonl.", show_default="the model's own or ours"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="(prompt, step) pairs to calibrate with.", show_default="the recipe's"),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", help="GiB of the GPU to calibrate with.", show_default="what is free"),
    ] = None,
    record_memory: Annotated[
        float | None,
        typer.Option(
            "--record-memory", help="GiB of the host for what is recorded.", show_default="half of what is free, to 16"
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE",
            help="Choose ranks, and layers to keep, so that the denoiser's file has at most SIZE, such as 6.0GiB.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same model, recipe and seed: same bytes.")] = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Quantize a model and write it as a diffusers folder, whole or not at all."""
    with Output(json) as output:
        hush()
        texts = None
        if prompts is not None:
            from bittern.trajectories import read_prompts

            texts = read_prompts(prompts)
        done = run(
            model,
            recipe,
            out,
            prompts=texts,
            samples=samples,
            fit=fit,
            force=force,
            restart=restart,
            gpu_memory=gpu_memory,
            record_memory=record_memory,
            seed=seed,
            device=device,
            output=output,
        )
        stages = [stage_table(done.report)] if any(row.stages for row in done.report.rows) else []
        output.result(done.to_dict(), scheme_table(done.report), *stages, done.summary)


@dataclass(frozen=True)
class Quantized:
    """A folder that was written, and what it holds.

    Attributes:
        model: what it was made from.
        out: the folder.
        report: every target.
        original_bytes: size of the denoiser's weight files before.
        real_bytes: and after.
        seconds: loading, solving and writing.
        fitted: the recipe that was found to meet a size, if one was asked for.
    """

    model: str
    out: Path
    report: Report
    original_bytes: int
    real_bytes: int
    seconds: float
    fitted: Recipe | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "model": self.model,
            "out": str(self.out),
            **self.report.to_dict(),
            "original_bytes": self.original_bytes,
            "predicted_bytes": self.report.file_bytes,
            "real_bytes": self.real_bytes,
            "seconds": round(self.seconds, 2),
            **({"fitted": self.fitted.dump()} if self.fitted else {}),
        }

    @property
    def summary(self) -> str:
        """One line: sizes, and where it is."""
        from bittern.evaluation.report import format_bytes

        before, after, foretold = map(format_bytes, (self.original_bytes, self.real_bytes, self.report.file_bytes))
        return (
            f"{self.out}: {self.report.recipe}, denoiser {before} -> {after} (predicted {foretold}), "
            f"{self.report.bits_per_weight:.2f} bits per weight, {self.seconds:.1f} s"
        )


def _bytes(option: str, gib: float | None) -> int | None:
    if gib is None:
        return None
    if not 0 < gib < 1e6:
        raise UserError(f"{option} {gib:g}: expected GiB, more than 0 and less than a million")
    return int(gib * 2**30)


def run(
    model: str,
    recipe: str,
    out: Path,
    *,
    force: bool,
    output: Output,
    prompts: list[str] | None = None,
    samples: int | None = None,
    fit: str | None = None,
    restart: bool = False,
    gpu_memory: float | None = None,
    record_memory: float | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Quantized:
    """Quantize `model` into `out`, with progress."""
    from bittern import folders, pipelines, recipes
    from bittern.checkpoints import weight_files
    from bittern.quantization import Limits

    began = time.perf_counter()
    out = out.expanduser()
    source = pipelines.resolve(model)
    device = options.resolve_device(device)
    limits = Limits.of(device, _bytes("--gpu-memory", gpu_memory), _bytes("--record-memory", record_memory))
    if (gpu_memory or record_memory) and not recipes.load(recipe).calibrated:
        raise UserError(f"recipe {recipe} records nothing: leave out --gpu-memory and --record-memory")
    fitted: list[Recipe] = []

    def on_fit(chosen: Recipe, nbytes: int) -> None:
        fitted.append(chosen)
        for line in said_of(chosen, nbytes):
            output.step(line)

    try:
        report = folders.quantize_folder(
            model,
            recipe,
            out,
            prompts=prompts,
            samples=samples,
            fit=fit,
            seed=seed,
            device=device,
            force=force,
            restart=restart,
            limits=limits,
            progress=lambda what, done, total: output.progress(_said(what, recipe), done, total),
            on_fit=on_fit,
            say=output.step,
        )
    except KeyboardInterrupt:
        if folders.workspace_of(out).exists():
            output.step("what is finished is kept: the same command goes on from there")
        raise
    name = pipelines.denoiser_name(source)
    original, real = (sum(file.stat().st_size for file in weight_files(folder / name)) for folder in (source, out))
    return Quantized(model, out, report, original, real, time.perf_counter() - began, *fitted)


def said_of(chosen: Recipe, nbytes: int) -> list[str]:
    """A recipe that meets a size: the size, and the rules that it has."""
    import yaml

    rules = {key: value for key, value in chosen.dump().items() if key in ("overrides", "keep") and value}
    return [f"{chosen.name}: {nbytes} bytes ({nbytes / 1e6:.2f} MB) predicted", yaml.safe_dump(rules, sort_keys=False)]


def _said(what: str, recipe: str) -> str:
    """One bar for all layers; trajectories and what is recorded of them have their own."""
    return f"solving {recipe}" if what.startswith(("solving", "solved")) else what


def scheme_table(report: Report) -> Table:
    """What was done, one row for each kind of few-bit layer."""
    from bittern.evaluation.report import format_bytes

    kinds: dict[tuple[object, ...], list[Row]] = {}
    for row in report.rows:
        kinds.setdefault((row.format, row.group_size or "row", row.rank, f"{row.activations} bit"), []).append(row)
    lines = []
    for kind, rows in kinds.items():
        weights, nbytes = sum(r.shape[0] * r.shape[1] for r in rows), sum(r.bytes for r in rows)
        errors = [r.error for r in rows if r.error is not None]
        spread = f"{min(errors):.3f} to {max(errors):.3f}" if errors else ""
        numbers = (f"{weights / 1e6:.2f} M", format_bytes(nbytes), f"{8 * nbytes / weights:.2f}", spread)
        lines.append((*kind, len(rows), *numbers))
    columns = ("format", "group", "rank", "activations", "layers", "weights", "bytes", "bits per weight", "error")
    return table(columns, lines)


def stage_table(report: Report) -> Table:
    """What each stage of calibration left of the output errors: a row for each kind of layer, its blocks' mean."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for row in report.rows:
        if row.stages:
            kind = ".".join("*" if part.isdigit() else part for part in row.path.split("."))
            kinds.setdefault(kind, []).append(row.stages)
    stages = list(dict.fromkeys(stage for tables in kinds.values() for found in tables for stage in found))
    lines = []
    for kind, tables in kinds.items():
        found = [[each[stage] for each in tables if stage in each] for stage in stages]
        lines.append((kind, len(tables), *(f"{sum(x) / len(x):.4f}" if x else "" for x in found)))
    return table(("output error after", "layers", *stages), lines)
