"""A recipe that meets a size: ranks and kept layers where they help most, chosen from errors that were foreseen.

The size is that of the denoiser's weight file on disk, as `predict_size` tells it to the byte: kept layers, biases and
the file's header included, the pipeline's other components not.

What is chosen, among what, and why the result still compiles fast is in `allocation.py`. Here the model is put in
those words. Blocks are of one kind if their layers have the same names, shapes and schemes. A slot is a job of the
plan: layers that are solved together stay together. Its levels are the ranks 0, multiples of 16 and the recipe's own,
and to keep it in 16 bits; for a ternary layer also int4 with each of these ranks. The activations' bits cost no bytes
and stay as they are.

A level's error is what `solvers.foresight` foresees: the squared relative error of each layer's output times the
weights of the layer, so that every weight counts alike. With every *layer* counting alike pictures of tiny-flux were
2 dB worse than with one rank for all. Measured sensitivities, with up to three profiles of blocks, foresaw the
velocity's error very well and brought it down by 30 %; but they took branches from layers that it hardly feels, those
of the text among them, some pictures then showed something else, and the mean PSNR was 1.5 dB worse. So neither is
there.

adaLN linears stay as the recipe says: they see one row per image. What the recipe's own `overrides` match stays as they
say. The result is an ordinary recipe with more of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bittern.architectures import Job, Plan, modulated_magnitudes, plan
from bittern.errors import UserError
from bittern.layers import flat_weight
from bittern.quantization.allocation import Kind, allocate
from bittern.quantization.calibration import Progress
from bittern.quantization.jobs import borrowed, check_seed, checkpoint_config, own_seed
from bittern.quantization.report import predict_size, tensor_bytes, whole_size
from bittern.recipes import Recipe, needs_data
from bittern.solvers import SolverOptions, foresee

RANKS = (0, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
"""What is tried, as far as a branch takes fewer bytes than 16-bit weights."""

OnFit = Callable[[Recipe, int], None]
"""Called with a recipe that meets a size, and the bytes of the file that it gives."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmg]?)(i?)b)?\s*", re.IGNORECASE)


def parse_size(size: str | int) -> int:
    """Bytes of a size such as "6.0GiB", "700 MB" or 5000000.

    Raises:
        UserError: for anything else.
    """
    match = _SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    if match is None or (match[3] and not match[2]):
        raise UserError(f"size {str(size)!r}: expected a number and B, KB, MB, GB, KiB, MiB or GiB, such as 6.0GiB")
    power = " kmg".index((match[2] or " ").lower())
    return int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)


@dataclass(frozen=True)
class Level:
    """One thing that a slot may become.

    Attributes:
        patch: What a recipe has to say for it; None to keep the layers.
        scheme: As in `Job`; of no meaning for layers that are kept.
        bytes: Of its tensors, biases excluded.
    """

    patch: Mapping[str, Any] | None
    job: Job
    bytes: int


@dataclass(frozen=True)
class Slot:
    """A job and what may become of it, in rising order of bytes."""

    job: Job
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class Fit:
    """A model, a recipe and a size that the recipe can be bent to."""

    model: nn.Module
    recipe: Recipe
    size: int
    name: str
    made: Plan
    slots: Mapping[str, Slot]

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe, size: str | int) -> Fit:
        """States the problem; reads shapes only.

        Raises:
            UserError: as `plan` does, for a text that is no size, and for a size out of reach.
        """
        made = plan(model, recipe)
        slots = {
            job.paths[0]: Slot(job, _levels(job, model, made, recipe)) for job in made.jobs if _free(job, made, recipe)
        }
        name = f"{recipe.name}[fit={str(size).replace(' ', '')}]"
        fit = cls(model, recipe, parse_size(size), name, made, slots)
        if fit.size >= (whole := whole_size(model)):
            raise UserError(f"size {size}: the model has {_said(whole)} as it is; expected less")
        if fit.size < fit.smallest:
            raise UserError(
                f"size {size}: recipe {recipe.name} makes this model no smaller than {_said(fit.smallest)}; "
                "expected at least that, or a recipe of fewer bits"
            )
        return fit

    @cached_property
    def smallest(self) -> int:
        """Bytes of the least that can be made."""
        return predict_size(self.model, self.made_of(dict.fromkeys(self.slots, 0)))

    @cached_property
    def kinds(self) -> list[list[list[str]]]:
        """Of each kind its blocks, and of each block its slots, by name."""
        blocks: dict[str, list[Job]] = {}
        for job in self.made.jobs:
            blocks.setdefault(self._site(job.paths[0]).parent, []).append(job)
        kinds: dict[object, list[list[str]]] = {}
        for jobs in blocks.values():
            likeness = tuple(
                (
                    tuple(self._site(path).name for path in job.paths), job.shapes, job.scheme, job.kernel,
                    job.paths[0] in self.slots,
                )
                for job in jobs
            )  # fmt: skip
            kind = self._site(jobs[0].paths[0]).block.prefix, likeness
            kinds.setdefault(kind, []).append([job.paths[0] for job in jobs if job.paths[0] in self.slots])
        return list(kinds.values())

    def choose(self, errors: Mapping[str, Sequence[float]]) -> Recipe:
        """The recipe of least error that meets the size.

        Args:
            errors: Of each slot, by name, the error of each of its levels.
        """
        kinds = [blocks for blocks in self.kinds if blocks[0]]
        given = [
            Kind(
                costs=[np.array([level.bytes for level in self.slots[name].levels]) for name in blocks[0]],
                errors=[np.array([errors[block[slot]] for block in blocks]) for slot in range(len(blocks[0]))],
            )
            for blocks in kinds
        ]
        leanest = sum(slot.levels[0].bytes for slot in self.slots.values())
        room = self.size - self.smallest + leanest
        while True:
            found = allocate(given, room)
            recipe = self.made_of(
                {
                    name: level
                    for blocks, levels in zip(kinds, found, strict=True)
                    for block in blocks
                    for name, level in zip(block, levels, strict=True)
                }
            )
            # The header grows with every tensor, by how much its neighbours decide.
            over = predict_size(self.model, recipe) - self.size
            if over <= 0:
                return recipe
            room = max(leanest, room - over)

    def made_of(self, levels: Mapping[str, int]) -> Recipe:
        """The recipe that gives each slot, by name, one of its levels."""
        wanted: dict[str, Mapping[str, Any] | None] = {}
        own: dict[str, bool] = {}
        for name, slot in self.slots.items():
            level = slot.levels[levels[name]]
            for path in slot.job.paths:
                wanted[path] = level.patch
                own[path] = level.patch is not None and level.job.scheme == slot.job.scheme
        globs: dict[str, list[str]] = {}
        for path in wanted:
            site = self._site(path)
            globs.setdefault(f"{site.block.prefix}.{site.name}", []).append(path)
        targets = [path for job in self.made.jobs for path in job.paths]
        overrides: dict[str, Mapping[str, Any]] = {}
        keep: list[str] = []
        exact: dict[str, Mapping[str, Any]] = {}
        for glob, paths in globs.items():
            if all(own[path] for path in paths):
                continue
            patches = [patch for path in paths if (patch := wanted[path]) is not None]
            kept = [path for path in paths if wanted[path] is None]
            only = [path for path in targets if fnmatchcase(path, glob)] == paths
            keep += [glob] if only and not patches else kept
            if only and patches:
                usual = dict(Counter(tuple(patch.items()) for patch in patches).most_common(1)[0][0])
                overrides[glob] = usual
                exact.update((path, p) for path in paths if (p := wanted[path]) is not None and p != usual)
            else:
                exact.update((path, p) for path in paths if (p := wanted[path]) is not None)
        # Exact paths come last: later rules win, and each patch names all that another may have changed.
        return self.recipe.override(name=self.name, overrides={**overrides, **exact}, keep=[*self.recipe.keep, *keep])

    def _site(self, path: str) -> Any:
        return self.made.architecture.site(path)


def foreseen(
    fit: Fit,
    model: nn.Module,
    read: Callable[[str], Tensor],
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """The error of every level of every slot, by the slot's name.

    Args:
        fit: The problem.
        model: Has the layers; it may be on meta.
        read: Gives a parameter's values by its name.
        seed: As for `quantize`.
        device: Where to work; None for where the weights are.
        progress: Called as slots are done.

    Raises:
        UserError: as the solvers do.
    """
    check_seed(seed)
    magnitudes = modulated_magnitudes(fit.made, model, lambda name: read(name).to(device))
    found: dict[str, list[float]] = {}
    for name, slot in fit.slots.items():
        if progress:
            progress("foreseeing errors", len(found), len(fit.slots))
        with borrowed(model, slot.job.paths, read, device) as modules:
            found[name] = _errors(slot, [flat_weight(module) for module in modules], seed, magnitudes.get(name))
    if progress:
        progress("foreseeing errors", len(found), len(fit.slots))
    return found


def _errors(slot: Slot, weights: Sequence[Tensor], seed: int, magnitudes: Tensor | None) -> list[float]:
    """The error of each level; of layers that are kept there is none."""
    known = None if magnitudes is None else magnitudes.to(weights[0].device)
    errors = [0.0] * len(slot.levels)
    for format in {level.job.scheme.weight for level in slot.levels}:
        own = {
            i: level.job
            for i, level in enumerate(slot.levels)
            if level.patch is not None and level.job.scheme.weight == format
        }
        if not own:
            continue
        job, ranks = next(iter(own.values())), [job.scheme.rank for job in own.values()]
        options = SolverOptions(**job.solver)
        found = foresee(weights, job.scheme, options, job.segments, ranks, own_seed(job, seed), job.paths, known)
        for i, error in zip(own, found, strict=True):
            errors[i] = error
    return errors


def _free(job: Job, made: Plan, recipe: Recipe) -> bool:
    """Whether a job's level is to be chosen."""
    if any(fnmatchcase(path, glob) for path in job.paths for glob in recipe.overrides):
        return False
    site: Any = made.architecture.site(job.paths[0])
    return not site.is_modulation and (needs_data(job.solver) or not recipe.calibrated)


def _levels(job: Job, model: nn.Module, made: Plan, recipe: Recipe) -> tuple[Level, ...]:
    solved = [(job.scheme, job.solver)]
    if job.scheme.weight == "ternary":
        # Columns are fitted to ternary codes; other smoothing does for int4 as well.
        smoothing = "none" if job.solver["smoothing"] == "columns" else job.solver["smoothing"]
        int4 = replace(job.scheme, weight="int4", group_size=64, packing=None, smooth=smoothing != "none")
        solved.append((int4, {**job.solver, "smoothing": smoothing}))
    whole = sum(model.get_submodule(path).weight.nbytes for path in job.paths)
    most = min(min(shape) for shape in job.shapes)
    found = [Level(None, job, whole)]
    for scheme, solver in solved:
        for rank in sorted({job.scheme.rank, *(rank for rank in RANKS if rank <= most)}):
            patch: dict[str, Any] = {"rank": rank}
            if len(solved) > 1:
                patch |= {
                    "weight": scheme.weight, "group_size": scheme.group_size, "packing": scheme.packing,
                    "smoothing": solver["smoothing"],
                }  # fmt: skip
            one = replace(job, scheme=replace(scheme, rank=rank), solver=solver)
            nbytes = tensor_bytes(checkpoint_config(replace(made, jobs=(one,)), recipe, seed=0))
            if nbytes < whole:
                found.append(Level(patch, one, nbytes))
    found.sort(key=lambda level: level.bytes)
    # Of levels with the same bytes any will do, and costs must rise.
    return tuple({level.bytes: level for level in found}.values())


def _said(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / 1e6:.2f} MB)"
