"""What calibrated jobs need to know, recorded from a full-precision model in as many passes as memory asks for.

Trajectories are drawn once; the samples wait on the host and are small. A pass replays them all and records what is
said of the inputs of some blocks, whose layers are then solved, and what was recorded is let go before the next pass.
A pass more costs a replay of the samples, for which the model runs up to the last of its blocks.

Behind few-bit predecessors blocks are recorded one by one (`predecessors`), and the model stays where it is meanwhile.
Sensitivities are those of the full-precision model; they are taken in passes, before the blocks of each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from bittern.architectures import Job
from bittern.errors import UserError, memory_size
from bittern.layers import FewBitLayer
from bittern.quantization.memory import Blocks, Cost, Limits, calibration_bytes, is_felt, needs_gram, passes
from bittern.quantization.predecessors import Finished, Predecessors
from bittern.recipes import Recipe, needs_data
from bittern.trajectories import (
    State,
    Statistics,
    default_prompts,
    device_of,
    most_tokens,
    record,
    sample,
    sensitivities,
    states_bytes,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Progress = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done and how much there is."""


@dataclass(frozen=True)
class Calibration:
    """Of each job that needs data, on the host.

    Attributes:
        statistics: Of its input, under its first path.
        sensitivity: Of each of its outputs, by path; for jobs that ask for it.
    """

    statistics: dict[str, Statistics]
    sensitivity: dict[str, Tensor]


class Source(Protocol):
    """Where a full-precision model comes from, and how it draws."""

    def prepare(self) -> None:
        """What has to be done before the model comes to draw."""
        ...

    def denoiser(self) -> AbstractContextManager[nn.Module]:
        """The model where it computes, for as long as the context lasts."""
        ...

    def draw(self, model: nn.Module) -> list[State]:
        """Samples of the trajectories of that model."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A pipeline in memory, which stays as and where it is.

    Attributes:
        pipe: The pipeline.
        model: Its denoiser.
        prompts: To draw.
        samples: (prompt, step) pairs.
        seed: Of pairs and noise.
        progress: Called as it draws.
    """

    pipe: DiffusionPipeline
    model: nn.Module
    prompts: Sequence[str]
    samples: int
    seed: int
    progress: Progress | None = None

    def prepare(self) -> None:
        """Nothing: all is there."""

    def denoiser(self) -> AbstractContextManager[nn.Module]:
        """The pipeline's own."""
        return nullcontext(self.model)

    def draw(self, model: nn.Module) -> list[State]:
        """Samples by the whole pipeline."""
        said = named(self.progress, "drawing trajectories")
        return sample(self.pipe, model, self.prompts, self.samples, seed=self.seed, progress=said)


def named(progress: Progress | None, what: str) -> Callable[[float, float], None] | None:
    """Progress of one thing."""
    return progress and (lambda done, total: progress(what, done, total))


class Recorder:
    """Draws when it is first asked, and records in passes.

    Args:
        source: Gives the model.
        recipe: Gives the number of rows.
        itemsize: Bytes of a number of the model's activations.
        limits: Of memory.
        seed: Of tokens and noise.
        states: Samples of an earlier run.
        keep: Called with samples that were drawn.
        progress: Called as the work goes on.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        itemsize: int,
        limits: Limits,
        seed: int,
        *,
        states: list[State] | None = None,
        keep: Callable[[list[State]], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.recipe, self.itemsize, self.limits, self.seed = source, recipe, itemsize, limits, seed
        self.states, self.keep, self.progress = states, keep, progress
        self.predecessors: Predecessors | None = None

    def passes(self, blocks: Blocks, finished: Finished = ()) -> Iterator[tuple[list[int], Calibration]]:
        """Indices of blocks, and what is known of their jobs, pass after pass.

        Whoever takes a calibration must let it go before asking for the next one, and tell what is `solved`. Blocks
        without a job that needs data wait for the pass of their neighbours.

        Args:
            blocks: To be solved.
            finished: Blocks that are solved already.

        Raises:
            UserError: for limits that are too narrow, before anything is recorded; as `sample`, `record` and
                `sensitivities` do.
        """
        planned = self._planned(blocks)
        if self.recipe.predecessors == "few-bit" and any(needs_data(job.solver) for _, jobs in blocks for job in jobs):
            yield from self._behind(blocks, finished)
            return
        if self.progress:
            most = Cost(max(cost.host for _, cost in planned), max(cost.device for _, cost in planned))
            device = "" if not most.device else f" and {memory_size(most.device)} of sums on the device"
            self.progress(
                f"calibrating in {len(planned)} {'pass' if len(planned) == 1 else 'passes'}, "
                f"each with at most {memory_size(most.host)} of records{device}",
                0,
                len(planned),
            )
        for turn, (members, _) in enumerate(planned):
            what = f" (pass {turn + 1} of {len(planned)})" if len(planned) > 1 else ""
            yield members, self.record([job for index in members for job in blocks[index][1]], what)

    def _planned(self, blocks: Blocks) -> list[tuple[list[int], Cost]]:
        """The passes. Where the rows that the recipe asks for are too many, samples are drawn to see how many come."""
        if self.states is None:
            with suppress(UserError):
                return passes(blocks, self.recipe.rows, self.itemsize, self.limits)
            # A sample has a token at least.
            least = min(self.recipe.rows, self.recipe.samples)
            passes(blocks, least, self.itemsize, self.limits, at_least=True)
            with self._drawn():
                pass
        return passes(blocks, self._rows(), self.itemsize, self.limits)

    def _rows(self) -> int:
        """Rows that are kept of an input, at most."""
        with suppress(TypeError):  # arguments of an unknown kind
            return min(self.recipe.rows, most_tokens(self.states)) if self.states else self.recipe.rows
        return self.recipe.rows

    def solved(self, layers: Mapping[str, FewBitLayer]) -> None:
        """Tells of layers that are solved, by path: what is recorded next may be behind them."""
        if self.predecessors is not None:
            self.predecessors.put(layers)

    def record(self, jobs: Sequence[Job], what: str = "") -> Calibration:
        """What is known of some jobs in the full-precision model."""
        wanted = [job for job in jobs if needs_data(job.solver)]
        if not wanted:
            return Calibration({}, {})
        with self._drawn() as (model, states):
            return Calibration(self._inputs(model, wanted, states, what), self._felt(model, wanted, states, what))

    @contextmanager
    def _drawn(self) -> Generator[tuple[nn.Module, list[State]]]:
        """The full-precision model where it computes, and its samples."""
        if self.states is None:
            self.source.prepare()
        with self.source.denoiser() as model:
            if self.states is None:
                self.states = self.source.draw(model)
                if self.keep:
                    self.keep(self.states)
            yield model, self.states

    def _inputs(
        self, model: nn.Module, jobs: Sequence[Job], states: Sequence[State], what: str
    ) -> dict[str, Statistics]:
        """Statistics of what jobs meet in a model."""
        size = f"{len(states)} samples of {states_bytes(states) / 1e6:.1f} MB"
        return record(
            model,
            [job.paths[0] for job in jobs],
            states,
            rows=self.recipe.rows,
            seed=self.seed,
            grams={job.paths[0] for job in jobs if needs_gram(job)},
            progress=named(self.progress, f"recording inputs of {size}{what}"),
        )

    def _felt(self, model: nn.Module, jobs: Sequence[Job], states: Sequence[State], what: str) -> dict[str, Tensor]:
        """Sensitivities of the outputs of jobs that ask for them."""
        felt = [path for job in jobs if is_felt(job) for path in job.paths]
        said = named(self.progress, f"recording sensitivities{what}")
        return sensitivities(model, felt, states, seed=self.seed, progress=said) if felt else {}

    def _behind(self, blocks: Blocks, finished: Finished) -> Iterator[tuple[list[int], Calibration]]:
        """Blocks one by one in the order of their calls, each behind those that are solved.

        Sensitivities are those of the full-precision model, of as many blocks at a time as there is room for.
        """
        most = max(calibration_bytes(jobs, self._rows(), self.itemsize).host for _, jobs in blocks)
        room, chain, left = self.limits.records - most, None, [list(range(len(blocks)))]
        while left:
            with self._drawn() as (model, states):
                if chain is None:
                    chain = Predecessors(model, blocks, finished, states, room)
                    turns = self._felt_together([blocks[index] for index in chain.order], chain.kept_bytes)
                    left = [[chain.order[turn] for turn in members] for members in turns]
                    if self.progress:
                        self.progress(chain.said, 0, len(blocks))
                members = left.pop(0)
                wanted = {index: [job for job in blocks[index][1] if needs_data(job.solver)] for index in members}
                sensitivity = self._felt(model, [job for jobs in wanted.values() for job in jobs], states, "")
                with chain.within(model), self._telling(chain):
                    for index, jobs in wanted.items():
                        found: dict[str, Statistics] = {}
                        if jobs:
                            with chain.turn(index):
                                found = self._inputs(model, jobs, states, "")
                        felt = [path for job in jobs for path in job.paths if path in sensitivity]
                        yield [index], Calibration(found, {path: sensitivity.pop(path) for path in felt})

    @contextmanager
    def _telling(self, predecessors: Predecessors) -> Generator[None]:
        """What is told to be solved goes there."""
        self.predecessors = predecessors
        try:
            yield
        finally:
            self.predecessors = None

    def _felt_together(self, blocks: Blocks, outputs: int) -> list[list[int]]:
        """Which blocks' sensitivities are recorded at once, beside so many bytes of outputs."""
        if not any(is_felt(job) for _, jobs in blocks for job in jobs):
            return [list(range(len(blocks)))]
        limits = replace(self.limits, records=self.limits.records - outputs)
        return [members for members, _ in passes(blocks, self._rows(), self.itemsize, limits)]


@contextmanager
def passes_of(
    recorder: Recorder | None, blocks: Blocks, finished: Finished = ()
) -> Generator[Iterable[tuple[Sequence[int], Calibration | None]]]:
    """The passes of a recorder; without one, all blocks at once and nothing known.

    When the context ends, however it does, the recorder has let go of its model.
    """
    if recorder is None:
        yield [(range(len(blocks)), None)]
        return
    with closing(recorder.passes(blocks, finished)) as found:
        yield found


def recorder_of(
    target: DiffusionPipeline | nn.Module,
    model: nn.Module,
    recipe: Recipe,
    prompts: Sequence[str] | None,
    seed: int,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Recorder:
    """What records from a pipeline in memory.

    Raises:
        UserError: for a model without its pipeline, and a pipeline that lacks a component.
    """
    if isinstance(target, nn.Module):
        raise UserError(
            f"recipe {recipe.name} is calibrated on trajectories: give the whole pipeline, not its "
            f"{type(target).__name__}; or take a data-free recipe"
        )
    optional = getattr(target, "_optional_components", [])
    missing = [name for name, part in target.components.items() if part is None and name not in optional]
    if missing:
        raise UserError(
            f"recipe {recipe.name} is calibrated on what the pipeline draws, and it has no {' and no '.join(missing)}: "
            "load it whole, or take a data-free recipe"
        )
    if prompts is None:
        prompts = default_prompts(target.config.get("_name_or_path"))
    source = Loaded(target, model, prompts, recipe.samples, seed, progress)
    itemsize = next(model.parameters()).element_size()
    return Recorder(source, recipe, itemsize, limits or Limits.of(device_of(model)), seed, progress=progress)
