"""What it takes to draw with a pipeline: sizes, memory and milliseconds, of a process that does nothing else.

Memory that a process has once had stays with its allocator, and what others loaded before would count as well; so
each model is measured in a process of its own, `python -m bittern.evaluation.cost.alone`, which prints JSON. On a CPU
memory is the process's resident set, above what it was before the model came; on a GPU it is what torch allocated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bittern import pipelines, quantization
from bittern.errors import BitternError, UserError
from bittern.evaluation.cost.benchmark import weight_bytes
from bittern.evaluation.cost.timing import Timing
from bittern.evaluation.drawing import DTYPE_NAMES, Settings, artist, versions
from bittern.outputs import INDEX, bytes_of
from bittern.quantization import component

PROMPT = "a photo of a red circle"
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What one model costs.

    Attributes:
        model: what was asked for.
        disk_bytes: the denoiser's weight files.
        pipeline_bytes: every file of the pipeline.
        weight_bytes: the denoiser's parameters and buffers in memory.
        resident_bytes: what loading the whole pipeline took.
        peak_bytes: the most that was taken while drawing, weights included; None where nobody counts.
        ms_per_step: the median over steps, each run's first left out.
        ms_runs: the median of each run.
        seconds_to_load: until the pipeline was there.
        steps: denoising steps of a run.
        size: of the picture.
        path: the arithmetic that ran.
        dtype: what other layers compute in.
        attention: the attention backend.
        device: the processor's name.
    """

    model: str
    disk_bytes: int
    pipeline_bytes: int
    weight_bytes: int
    resident_bytes: int | None
    peak_bytes: int | None
    ms_per_step: float
    ms_runs: list[float]
    seconds_to_load: float
    steps: int
    size: str
    path: str
    dtype: str
    attention: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """What a model costs, and a reference beside it."""

    model: Cost
    reference: Cost | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, in the form of the other suites: keys are never renamed."""
        return {
            "suite": "cost",
            **self.model.to_dict(),
            "reference": self.reference and self.reference.model,
            "reference_cost": self.reference and self.reference.to_dict(),
            "versions": versions(),
        }


def evaluate(model: str, *, reference: str | None = None, settings: Settings | None = None, runs: int = 3) -> Costs:
    """Measure what a model costs, and a reference, one after the other, each in a process of its own.

    Args:
        model: a folder, a hub id, or "tiny-flux".
        reference: another.
        settings: steps, device and the rest, the same for both; pictures are drawn one by one.
        runs: pictures that are timed.

    Raises:
        UserError: for a model that is not there or cannot be loaded.
    """
    settings = settings or Settings()
    for name in (model, reference):
        if name is not None:
            pipelines.resolve(name)
    return Costs(_apart(model, settings, runs), None if reference is None else _apart(reference, settings, runs))


def _apart(model: str, settings: Settings, runs: int) -> Cost:
    """`measure` in a process of its own."""
    dtype = settings.dtype and DTYPE_NAMES[settings.dtype]
    asked = json.dumps({"model": model, "runs": runs, "settings": asdict(settings) | {"dtype": dtype}})
    # What libraries say while they load is of interest only where something fails.
    done = subprocess.run([sys.executable, "-m", __name__], input=asked, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise BitternError(f"measuring {model} ended with code {done.returncode}: {reason[:300]}")
    told = json.loads(lines[-1])
    if "mistake" in told:
        raise UserError(told["mistake"])
    return Cost(**told)


def measure(model: str, settings: Settings, runs: int) -> Cost:
    """What a model costs in this process; see `evaluate`, which starts one for it.

    Args:
        model: a folder, a hub id, or an embedded model's name.
        settings: as for `evaluate`.
        runs: pictures that are timed, after one that is not.
    """
    folder = pipelines.resolve(model)
    on_gpu = torch.device(settings.device).type == "cuda"
    _import_components(folder)
    before = _taken(settings.device)
    began = time.perf_counter()
    with artist(model, replace(settings, batch_size=1)) as one:
        loaded = time.perf_counter() - began
        resident = _taken(settings.device)
        _reset_peak(on_gpu, settings.device)
        timed: list[tuple[float, ...]] = []
        for _ in range(1 + runs):
            marks: list[float] = []
            # A picture of one step has no time between two: its own is taken.
            drawing = one.draw([PROMPT], progress=lambda *_, marks=marks: marks.append(time.perf_counter()))
            gaps = [1e3 * (b - a) for a, b in pairwise(marks)]
            timed.append(tuple(gaps) or (1e3 * drawing.seconds,))
        timing = Timing(tuple(timed[1:]))
        peak = _peak(on_gpu, settings.device)
        denoiser = component(one.pipe)
        return Cost(
            model=model,
            disk_bytes=quantization.inspect(folder).file_bytes,
            pipeline_bytes=bytes_of(folder),
            weight_bytes=weight_bytes(denoiser),
            resident_bytes=None if before is None or resident is None else resident - before,
            peak_bytes=None if before is None or peak is None else peak - before,
            ms_per_step=round(timing.ms, 3),
            ms_runs=[round(median, 3) for median in timing.medians],
            seconds_to_load=round(loaded, 2),
            steps=drawing.steps,
            size=str(drawing.metadata(0)["size"]),
            path=drawing.path,
            dtype=drawing.dtype,
            attention=drawing.attention,
            device=drawing.device,
        )


def _import_components(folder: Path) -> None:
    """Have the code of a pipeline's parts in memory, which is no part of what its weights take."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for value in index.values():
        if isinstance(value, list) and len(value) == 2 and value[0] in ("diffusers", "transformers"):
            getattr(import_module(value[0]), str(value[1]), None)


def _taken(device: str) -> int | None:
    """Bytes of memory that are taken now."""
    return torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else _status("VmRSS")


def _peak(on_gpu: bool, device: str) -> int | None:
    """The most bytes that were taken since `_reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if on_gpu else _status("VmHWM")


def _reset_peak(on_gpu: bool, device: str) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        _RESET.write_text("5")  # Linux sets the high-water mark to what is taken now


def _status(key: str) -> int | None:
    """A line of what Linux says of this process, in bytes; None on other systems."""
    if not _STATUS.exists():
        return None
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":")), None)
    return None if line is None else 1024 * int(line.split()[1])


def main() -> None:
    """Measure what standard input asks for, and print it."""
    asked = json.load(sys.stdin)
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    settings = Settings(**asked["settings"] | {"dtype": dtypes.get(asked["settings"]["dtype"])})
    try:
        told = measure(asked["model"], settings, asked["runs"]).to_dict()
    except UserError as error:
        told = {"mistake": str(error)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
