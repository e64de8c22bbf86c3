"""The cost of a step, few-bit beside 16 bits, in one process: time, weights, memory, and seconds until it is ready.

One model is in memory at a time. Each is timed as it is called (eager), on demand with its repeated blocks compiled,
and on demand as the replay of a CUDA graph of either, which leaves out what launching costs. Ratios are between rows
of one way of running.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bittern import graphs, layers, pipelines, recipes
from bittern.architectures import plan
from bittern.checkpoints import is_few_bit
from bittern.errors import UserError
from bittern.evaluation.cost.inputs import Inputs, check_request, inputs
from bittern.evaluation.cost.models import Subject, subject
from bittern.evaluation.cost.random_weights import dense, few_bit, skeleton
from bittern.evaluation.cost.timing import Ratio, timed
from bittern.evaluation.drawing import device_name, dtype_name, versions
from bittern.integrations import attention
from bittern.integrations.watch import parts

WARM_UP = 3
MOST_KERNELS = 20

Row = dict[str, Any]
OnRow = Callable[[Row], None]


@dataclass(frozen=True)
class How:
    """How models are run and timed, the same for all.

    Attributes:
        size: Pixels of a side; None for the model's own.
        batch: Pictures.
        steps: Timed calls a run.
        runs: How many runs.
        compile: Whether repeated blocks are compiled as well.
        graph: Whether CUDA graphs are replayed as well.
        profile: Whether to tell what a step's time goes to, once everything is timed.
        attention: One of diffusers' attention backends, on both sides.
        path: Arithmetic forced on few-bit layers; None for the best here.
        device: Where everything runs.
        dtype: What both sides compute in, few-bit layers aside, whatever a folder's files hold.
        compiler: torch.compile's backend.
        fullgraph: Whether a block that does not compile as a whole is an error.
    """

    size: int | None = None
    batch: int = 1
    steps: int = 10
    runs: int = 3
    compile: bool = False
    graph: bool = False
    profile: bool = False
    attention: str | None = None
    path: str | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    compiler: str = "inductor"
    fullgraph: bool = True

    def check(self) -> None:
        """Refuses what cannot be run, before a model is built.

        Raises:
            UserError: naming the value.
        """
        for name, value in (("steps", self.steps), ("runs", self.runs)):
            if value < 1:
                raise UserError(f"{name} is {value}: expected a whole number from 1 up")
        if self.graph and torch.device(self.device).type != "cuda":
            raise UserError(f"--graph is for CUDA graphs, and the device is {self.device}: leave it out")
        if self.attention is not None:
            attention.check_name(self.attention)


@dataclass(frozen=True)
class Benchmark:
    """What was measured.

    Attributes:
        model: What was asked for.
        recipe: The few-bit side; None if the model's files say it, or there is none.
        size: Pixels of a side.
        how: How it was run.
        rows: One for each model and way of running it.
    """

    model: str
    recipe: str | None
    size: int
    how: How
    rows: list[Row] = field(default_factory=list[Row])

    @property
    def ratios(self) -> dict[str, dict[str, Ratio]]:
        """How many times faster, way by way: each model against the first, which is the one in 16 bits."""
        return ratios(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Keys may be added, never renamed."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "size": self.size,
            "batch": self.how.batch,
            "steps": self.how.steps,
            "runs": self.how.runs,
            **place(self.how.device),
            "rows": self.rows,
            "ratios": {
                model: {mode: ratio.to_dict() for mode, ratio in by_mode.items()}
                for model, by_mode in self.ratios.items()
            },
        }


def ratios(rows: list[Row]) -> dict[str, dict[str, Ratio]]:
    """The first model's time over each other model's, mode by mode."""
    base = {row["mode"]: row["ms_runs"] for row in rows if row["model"] == rows[0]["model"]}
    found: dict[str, dict[str, Ratio]] = {}
    for row in rows:
        if row["model"] != rows[0]["model"] and row["mode"] in base:
            found.setdefault(row["model"], {})[row["mode"]] = Ratio.of(base[row["mode"]], row["ms_runs"])
    return found


def place(device: str) -> dict[str, Any]:
    """Where and with what a measurement was made, for its JSON."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"device": device_name(device), "versions": {**versions(), "triton": triton}}


def benchmark(
    model: str, recipe: str | None = None, how: How | None = None, *, mini: bool = False, on_row: OnRow | None = None
) -> Benchmark:
    """Times a step of a model, in few bits and in 16.

    A folder's weights are its own, on the side that they are for; all others are random, and with a recipe its codes.

    Args:
        model: A folder, a hub id, a built-in name, or the name of an architecture such as "flux.1-dev".
        recipe: The few-bit side: a name or a YAML file. None for a folder that is few-bit, or to time 16 bits alone.
        how: How it is run and timed.
        mini: The architecture at a toy's width, to try the command.
        on_row: Called with each row as it is measured.

    Raises:
        UserError: for an unknown model, recipe or attention, a size that does not fit, a recipe for a model that is
            few-bit already, a path where nothing is few-bit, and a device that is not there.
    """
    how = how or How()
    how.check()
    pipelines.check_device(how.device)
    what = subject(model, mini=mini)
    size = how.size or what.size
    check_request(what, size, how.batch)
    is_few = is_few_bit(what.config)
    if is_few and recipe is not None:
        raise UserError(f"{model} is few-bit already: leave out --recipe, or give the original")
    if how.path is not None and not is_few and recipe is None:
        raise UserError(
            f"--path {how.path} is for few-bit layers, and {model} has none: give a --recipe, or leave it out"
        )
    if recipe is not None:
        # Refused before 16 bits are timed for it.
        plan(skeleton(what, how.dtype), recipes.load(recipe))
    sides: dict[str, Callable[[], nn.Module]] = {"16 bit": lambda: _sixteen(what, is_few, how)}
    if is_few:
        sides[model] = lambda: loaded(what, how.device, how.dtype)
    elif recipe is not None:
        sides[recipe] = lambda: few_bit(what, recipe, how.device, how.dtype)
    found = Benchmark(model, recipe, size, how)

    def make(built: nn.Module) -> Inputs:
        return _inputs(built, what, size, how)

    for name, build in sides.items():
        for row in measure(name, build, make, how):
            found.rows.append(row)
            if on_row:
                on_row(row)
    if how.profile:
        add_kernels(found.rows, sides, make, how)
    return found


def _sixteen(what: Subject, is_few: bool, how: How) -> nn.Module:
    return dense(what, how.device, how.dtype) if is_few or what.folder is None else loaded(what, how.device, how.dtype)


def loaded(what: Subject, device: str, dtype: torch.dtype) -> nn.Module:
    """A folder's model."""
    assert what.folder is not None
    return pipelines.load_denoiser(what.name, what.folder, dtype).eval().requires_grad_(False).to(device)


def _inputs(model: nn.Module, what: Subject, size: int, how: How) -> Inputs:
    return inputs(model, what, size, how.batch, how.device, getattr(model, "dtype", how.dtype))


@torch.no_grad()
def measure(name: str, build: Callable[[], nn.Module], make: Callable[[nn.Module], Inputs], how: How) -> Generator[Row]:
    """A model's rows, one for each way of running it, as they are measured; it is gone after the last.

    Args:
        name: What the rows call it.
        build: Makes it, on the device.
        make: Makes what it is called with.
        how: How it is run and timed.
    """
    clean(how.device)
    before = _allocated(how.device)
    began = time.perf_counter()
    model = build()
    _wait(how.device)
    resident = weight_bytes(model) if how.device == "cpu" else _allocated(how.device) - before
    if how.path is not None and layers.quant_layers(model):
        layers.set_path(model, how.path)
    x = make(model)
    try:
        with attention.using(model, how.attention):
            shared = {
                "model": name,
                "dtype": dtype_name(getattr(model, "dtype", how.dtype)),
                "paths": layers.paths(model),
                "attention": attention.chosen(model),
                "resident_gib": round(resident / 2**30, 4),
            }
            yield from _ways("eager", model, x, how, shared, before + resident, time.perf_counter() - began)
            if how.compile:
                compile_blocks(model, how.compiler, fullgraph=how.fullgraph)
                yield from _ways("compiled", model, x, how, shared, before + resident, 0.0)
    finally:
        del model, x
        clean(how.device)


def compile_blocks(model: Any, compiler: str = "inductor", *, fullgraph: bool = True) -> None:
    """Compiles the blocks that repeat, each kind once; the whole model where diffusers names no such blocks."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=fullgraph, backend=compiler)
    else:
        model.compile(fullgraph=fullgraph, backend=compiler)


def _ways(
    mode: str, model: nn.Module, x: Inputs, how: How, shared: Mapping[str, Any], occupied: int, seconds: float
) -> Generator[Row]:
    """The row of a way of running a model, and that of its replay.

    Args:
        mode: What the row calls it.
        model: On the device.
        x: What it is called with.
        how: How it is timed.
        shared: What all rows of the model say.
        occupied: Bytes of the device's memory that were taken when the weights were there.
        seconds: Until the model was there.
    """

    def step() -> Any:
        return model(**x, return_dict=False)[0]

    known, began = _graphs(), time.perf_counter()
    y = step()
    _wait(how.device)
    first = time.perf_counter() - began
    for _ in range(WARM_UP - 1):
        y = step()
    _wait(how.device)
    compiled = _graphs()
    _reset_peak(how.device)
    timing = timed(step, how.device, steps=how.steps, runs=how.runs)
    row = {
        **shared,
        "mode": mode,
        **timing.to_dict(),
        "peak_above_resident_gib": _peak_above(occupied, how.device),
        "finite": all(bool(part.isfinite().all()) for part in (y if isinstance(y, list) else [y])),
        "seconds_to_ready": round(seconds + first, 2),
    }
    if mode == "compiled":
        row |= {"graphs": compiled - known, "graphs_after_warm_up": _graphs() - compiled}
    yield row
    if how.graph:
        began = time.perf_counter()
        graph, _ = graphs.record(step)
        graph.replay()
        _wait(how.device)
        replayed = timed(graph.replay, how.device, steps=how.steps, runs=how.runs)
        seconds_to_ready = round(seconds + first + time.perf_counter() - began, 2)
        yield {**row, "mode": f"{mode} graph", **replayed.to_dict(), "seconds_to_ready": seconds_to_ready}


def add_kernels(
    rows: Collection[Row],
    sides: Mapping[str, Callable[[], nn.Module]],
    make: Callable[[nn.Module], Inputs],
    how: How,
) -> None:
    """Tells in each row what a step's time goes to.

    Everything must have been timed: torch's profiler stays attached to a process, which slows what is launched later
    (https://github.com/pytorch/pytorch/issues/144455).

    Args:
        rows: Of `measure`.
        sides: What makes the models, by the names in the rows.
        make: As for `measure`.
        how: As for `measure`.
    """
    for name, build in sides.items():
        mine = {row["mode"]: row for row in rows if row["model"] == name}
        for mode, kernels in _kernels(build, make, how) if mine else ():
            mine[mode]["kernels"] = kernels


@torch.no_grad()
def _kernels(
    build: Callable[[], nn.Module], make: Callable[[nn.Module], Inputs], how: How
) -> Generator[tuple[str, list[Row]]]:
    """What a step's time goes to in each way of running a model."""
    clean(how.device)
    model = build()
    if how.path is not None and layers.quant_layers(model):
        layers.set_path(model, how.path)
    x = make(model)

    def step() -> Any:
        return model(**x, return_dict=False)[0]

    try:
        with attention.using(model, how.attention):
            for mode in ("eager", "compiled") if how.compile else ("eager",):
                if mode == "compiled":
                    compile_blocks(model, how.compiler, fullgraph=how.fullgraph)
                for _ in range(WARM_UP):
                    step()
                yield mode, profiled(step, how.device)
                if how.graph:
                    graph, _ = graphs.record(step)
                    graph.replay()
                    yield f"{mode} graph", profiled(graph.replay, how.device)
    finally:
        del model, x
        clean(how.device)


def profiled(step: Callable[[], object], device: str) -> list[Row]:
    """What one step's time goes to: kernels on a GPU, operations on a CPU, most first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        step()
        _wait(device)
    field_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, field_of))
    return [
        {"name": event.key[:70], "calls": event.count, "ms": round(getattr(event, field_of) / 1e3, 3)}
        for event in events[:MOST_KERNELS]
    ]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what several share counts once, and wrappers for what they wrap."""
    storages = [part.untyped_storage() for t in (*model.parameters(), *model.buffers()) for part in parts(t)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def clean(device: str) -> None:
    """Lets go of what earlier models left behind, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_above(occupied: int, device: str) -> float | None:
    """GiB; None on a CPU, where nobody counts."""
    if torch.device(device).type != "cuda":
        return None
    return round((torch.cuda.max_memory_allocated(device) - occupied) / 2**30, 4)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
