"""How much memory calibration takes and may take.

    host memory of a pass    sum over jobs with K inputs of  rows K itemsize + 4 K,  and of what lies on the device;
                             rows are those of the recipe, or all tokens that samples have, where they are fewer
    device memory of a pass  4 K^2 for a job whose Gram matrix counts, 4 N^2 for a target whose sensitivity does

The host also holds the samples; and, of a model that is read from files, its weights while they are loaded, and then
those that do not fit the device (`Limits`). The device also holds weights and activations. Behind few-bit predecessors
the model stays there while layers are solved (`solving_bytes`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bittern.architectures import Job
from bittern.errors import UserError, memory_size
from bittern.recipes import needs_data, solves_with_data

Blocks = Sequence[tuple[str, Sequence[Job]]]
"""As `jobs.blocks_of` gives them."""

MOST_RECORDS = 16 * 2**30
"""Bytes that records take where nothing else is said; more saves few passes."""


@dataclass(frozen=True)
class Limits:
    """How much memory calibration may take.

    Attributes:
        device: Bytes of the device for weights, activations and sums. Of them an eighth is for activations, or a
            quarter where sensitivities are taken, and a quarter at most for sums; weights have the rest. None sets no
            limit.
        records: Bytes of the host for what a pass records.
    """

    device: int | None
    records: int

    @classmethod
    def of(cls, device: str | torch.device, device_bytes: int | None = None, records: int | None = None) -> Limits:
        """What a user allows, and where nothing is said: the free memory of a GPU, and of the host half of what is
        free, 16 GiB at most.

        Raises:
            UserError: for a limit that is not positive.
        """
        import psutil

        for name, value in (("device", device_bytes), ("record", records)):
            if value is not None and value <= 0:
                raise UserError(f"{name} memory {value}: expected more than 0 bytes")
        if device_bytes is None and torch.device(device).type == "cuda":
            device_bytes = torch.cuda.mem_get_info(torch.device(device))[0]
        return cls(device_bytes, records or min(MOST_RECORDS, psutil.virtual_memory().available // 2))

    def sums(self, jobs: Sequence[Job]) -> int | None:
        """Bytes of the device for sums; None for no limit."""
        return None if self.device is None else min(self.device // 4, calibration_bytes(jobs, 0, 0).device)

    def weights(self, jobs: Sequence[Job], beside: int = 0) -> int | None:
        """Bytes of the device for weights, which stay while something takes bytes `beside` them; None for no limit."""
        sums = self.sums(jobs)
        if self.device is None or sums is None:
            return None
        activations = self.device // (4 if any(is_felt(job) for job in jobs) else 8)
        return self.device - max(sums + activations, beside)


@dataclass(frozen=True)
class Cost:
    """Bytes that recording takes: of the host, and of the device."""

    host: int
    device: int


def calibration_bytes(jobs: Sequence[Job], rows: int, itemsize: int) -> Cost:
    """What a `Calibration` of these jobs takes at most, by the formulas of this module."""
    wanted = [job for job in jobs if needs_data(job.solver)]
    sums = sum(4 * job.shapes[0][1] ** 2 for job in wanted if needs_gram(job))
    sums += sum(4 * n * n for job in wanted if is_felt(job) for n, _ in job.shapes)
    return Cost(sum((rows * itemsize + 4) * job.shapes[0][1] for job in wanted) + sums, sums)


def solving_bytes(jobs: Sequence[Job], rows: int) -> int:
    """Bytes of the device that the solvers take for one job at a time, as `solve_calibrated` and its like say."""
    return max((_solving_bytes(job, rows) for job in jobs), default=0)


def _solving_bytes(job: Job, rows: int) -> int:
    n, k = sum(n for n, _ in job.shapes), job.shapes[0][1]
    if job.scheme.weight == "ternary" and solves_with_data(job.solver):
        return (44 * n + 40 * k) * k
    felt = 8 * sum(n * n for n, _ in job.shapes) * is_felt(job)
    return 20 * n * k + (16 * rows + 24 * k) * k * needs_data(job.solver) + felt


def needs_gram(job: Job) -> bool:
    """Whether a job's solver asks for the Gram matrix of all tokens; int4's rounded inputs are known by rows."""
    if job.scheme.weight == "ternary":
        return solves_with_data(job.solver)
    return job.solver["rounding"] == "gptq" and job.scheme.activations == 16


def is_felt(job: Job) -> bool:
    """Whether a job's solver asks how much its outputs are felt: GPTQ by itself rounds every output for itself."""
    return needs_data(job.solver) and job.solver["sensitivity"] and (job.scheme.rank > 0 or job.scheme.smooth)


def passes(
    blocks: Blocks, rows: int, itemsize: int, limits: Limits, *, at_least: bool = False
) -> list[tuple[list[int], Cost]]:
    """Which blocks are recorded together, in order, and what each pass takes.

    Args:
        blocks: To be recorded.
        rows: Tokens that are kept of each input, at most.
        itemsize: Bytes of a number of the model's activations.
        limits: Of memory.
        at_least: Whether there may be more rows than these, as a refusal then says.

    Raises:
        UserError: for a block that goes beyond the limits by itself.
    """
    share = limits.sums([job for _, jobs in blocks for job in jobs])
    made: list[tuple[list[int], Cost]] = []
    for index, (name, jobs) in enumerate(blocks):
        cost = calibration_bytes(jobs, rows, itemsize)
        if cost.host > limits.records:
            taken = f"{'at least ' * at_least}{memory_size(cost.host)}"
            raise UserError(
                f"records of {name} take {taken} of the host, and {memory_size(limits.records)} are "
                "allowed: allow more record memory, or lower `rows` in the recipe"
            )
        if share is not None and cost.device > share:
            raise UserError(
                f"sums over the inputs and outputs of {name} take {memory_size(cost.device)} of the device, and "
                f"{memory_size(share)} of what is allowed are for them: allow more device memory, or leave out "
                "`sensitivity` and GPTQ with 16-bit activations"
            )
        if made:
            together = Cost(made[-1][1].host + cost.host, made[-1][1].device + cost.device)
            if together.host <= limits.records and (share is None or together.device <= share):
                made[-1] = [*made[-1][0], index], together
                continue
        made.append(([index], cost))
    return made


@contextmanager
def memory_told() -> Generator[None]:
    """Says what to lower where a device runs out of memory.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device ran out of memory ({str(error).partition('.')[0]}): allow less of it for calibration, lower "
            "`rows` in the recipe, or take another device"
        ) from error
