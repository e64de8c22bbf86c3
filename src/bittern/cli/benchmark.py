"""`bittern benchmark`: what a step costs, few bits beside 16, in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bittern.evaluation.cost.benchmark import Benchmark, Row


def benchmark(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a hub id, or an architecture such as flux.1-dev.", show_default=False
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="The few-bit side, filled with random codes.", show_default=False),
    ] = None,
    size: Annotated[int | None, typer.Option("--size", help="Pixels of a side.", show_default="the model's")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures in a step.")] = 1,
    steps: Annotated[int, typer.Option("--steps", help="Timed steps in a run.")] = 10,
    runs: Annotated[int, typer.Option("--runs", help="Runs, whose spread decides what may be said.")] = 3,
    compile_blocks: Annotated[bool, typer.Option("--compile", help="Time it with compiled blocks as well.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Time the replay of a CUDA graph as well.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Say which kernels a step's time goes to.")] = False,
    path: Annotated[
        str,
        typer.Option(
            "--path",
            help="Force an arithmetic on the few-bit side: a16, a8-int8, a8-fp8, a8-fp8-folded or a4; auto takes the "
            "best here. Refused where nothing is few-bit: a model in 16 bits without --recipe.",
        ),
    ] = "auto",
    attention: options.Attention = None,
    mini: Annotated[bool, typer.Option("--mini", help="The architecture at a toy's width, to try a command.")] = False,
    device: options.Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="What both sides compute in: bf16, fp16 or fp32; auto is bf16, if the device has arithmetic for it.",
        ),
    ] = "auto",
    json: options.Json = False,
) -> None:
    """Time one denoising step, in few bits and in 16: milliseconds, weights, memory, seconds until ready.

    Weights are a folder's own or random: speed and memory do not depend on them. No solver runs.
    """
    with Output(json) as out:
        hush()
        import torch

        from bittern.evaluation.cost.benchmark import How
        from bittern.evaluation.cost.benchmark import benchmark as run
        from bittern.precision import multiplies

        where = options.resolve_device(device)
        quick = torch.bfloat16 if multiplies(where, torch.bfloat16) else torch.float32
        how = How(
            size=size, batch=batch, steps=steps, runs=runs, compile=compile_blocks, graph=graph, profile=profile,
            attention=attention, path=options.forced_path(path), device=where,
            dtype=options.resolve_dtype(dtype) or quick,
        )  # fmt: skip
        result = run(model, recipe, how, mini=mini, on_row=lambda row: out.step(_said(row)))
        command = options.command_line(
            "benchmark", model, recipe=recipe, size=size, batch=batch, steps=steps, runs=runs, path=path,
            attention=attention, device=device, dtype=dtype, compile=compile_blocks, graph=graph, profile=profile,
            mini=mini,
        )  # fmt: skip
        out.result({"command": command, **result.to_dict()}, *_tables(result))


def _said(row: Row) -> str:
    return f"{row['model']}, {row['mode']}: {row['ms']:.1f} ms, ready after {row['seconds_to_ready']:.1f} s"


def _tables(result: Benchmark) -> list[RenderableType]:
    from bittern.evaluation.drawing import path_name

    rows = []
    for row in result.rows:
        peak = row["peak_above_resident_gib"]
        ratio = result.ratios.get(row["model"], {}).get(row["mode"])
        rows.append(
            (
                row["model"],
                row["mode"],
                path_name(row["paths"], row["dtype"]),
                f"{row['ms']:.2f}",
                f"{100 * row['spread']:.1f} %",
                ratio or "",
                f"{row['resident_gib']:.3f}",
                "not counted" if peak is None else f"{peak:.3f}",
                f"{row['seconds_to_ready']:.1f}",
                "yes" if row["finite"] else "no",
            )
        )
    columns = (
        *("model", "mode", "path", "ms a step", "spread", "times faster", "weights GiB", "above them GiB"),
        *("ready after s", "finite"),
    )
    parts: list[RenderableType] = [table(columns, rows, left=3)]
    for row in result.rows:
        if "kernels" in row:
            kernels = [(kernel["name"], kernel["calls"], f"{kernel['ms']:.3f}") for kernel in row["kernels"]]
            parts.append(table(("kernel", "calls", "ms"), kernels, title=f"{row['model']}, {row['mode']}"))
    place = result.to_dict()
    parts.append(
        f"{result.model}, {result.size}x{result.size}, batch {result.how.batch}, "
        f"attention {result.rows[0]['attention']}, {result.how.runs} runs of {result.how.steps} steps, "
        f"{place['device']}, torch {place['versions']['torch']}"
    )
    return parts
