"""The plan: every linear of a model, either part of a job or kept, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bittern.architectures.base import Architecture, Modulated, Site
from bittern.architectures.known import of
from bittern.errors import UserError
from bittern.recipes import Recipe
from bittern.scheme import Scheme


@dataclass(frozen=True)
class Job:
    """Targets that are solved together because they read one tensor; mostly there is just one.

    Attributes:
        paths: The targets.
        shapes: Their (N, K).
        scheme: What each of them becomes.
        solver: Keyword arguments of `SolverOptions`.
        segments: Lengths of the K-segments.
        modulated: What modulates their input, if the smoothing is to know it.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    scheme: Scheme
    solver: Mapping[str, Any]
    segments: tuple[int, ...]
    modulated: Modulated | None = None


@dataclass(frozen=True)
class Plan:
    """What a recipe makes of one model.

    Attributes:
        architecture: The model's family.
        jobs: In the order of the model's modules.
        kept: Path of every linear that stays as it is, with the reason.
    """

    architecture: Architecture
    jobs: tuple[Job, ...]
    kept: Mapping[str, str]


def plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Which layers of `model` a recipe quantizes, how, and which it keeps.

    Reads shapes only: the model may be on the meta device.

    Raises:
        UserError: for an unknown model class, linears that are not plain ones or wear adapters, a glob that
            matches nothing, a rank that does not fit a layer.
    """
    architecture = of(model)
    linears = _linears(model)
    sites: dict[str, Site] = {}
    kept: dict[str, str] = {}
    for path in linears:
        site = architecture.site(path)
        if site is None:
            kept[path] = f"outside the blocks of {architecture.name}"
        elif recipe.keeps(path):
            kept[path] = "kept by the recipe"
        else:
            sites[path] = site
    _expect_matches(recipe, "keep", recipe.keep, linears)
    _expect_matches(recipe, "overrides", recipe.overrides, sites)
    if not sites:
        raise UserError(f"recipe {recipe.name} keeps every layer: expected at least one target")

    knows_modulation = architecture.conditioning is not None
    singles = {path: _single(path, site, linears, recipe, knows_modulation) for path, site in sites.items()}
    jobs: list[Job] = []
    placed: set[str] = set()
    for path, site in sites.items():
        if path in placed:
            continue
        # Members whose scheme or solver differs could not share smoothing, branch and buffer.
        mates = [singles[mate] for mate in site.group if mate in singles and _alike(singles[mate], singles[path])]
        placed.update(mate.paths[0] for mate in mates)
        jobs.append(
            Job(
                paths=tuple(mate.paths[0] for mate in mates),
                shapes=tuple(mate.shapes[0] for mate in mates),
                scheme=singles[path].scheme,
                solver=singles[path].solver,
                segments=singles[path].segments,
                modulated=singles[path].modulated,
            )
        )
    return Plan(architecture, tuple(jobs), kept)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    linears: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise UserError(f"{path} wears a LoRA adapter: fuse or unload it before quantizing")
        if isinstance(module, nn.Linear):
            if type(module) is not nn.Linear:
                raise UserError(f"{path} is a {type(module).__name__}: expected a plain linear; load the original")
            linears[path] = module
    return linears


def _single(path: str, site: Site, linears: Mapping[str, nn.Linear], recipe: Recipe, knows_modulation: bool) -> Job:
    n, k = linears[path].out_features, linears[path].in_features
    segments = tuple(linears[source].out_features for source in site.sources) or (k,)
    if sum(segments) != k:
        raise UserError(f"{path} has {k} inputs: expected {sum(segments)}, the outputs of {site.sources}")
    spec = recipe.spec(path, modulation=site.is_modulation)
    modulated = site.modulated if spec.smoothing == "modulation" and knows_modulation else None
    if spec.smoothing == "modulation" and modulated is None:
        spec = spec.model_copy(update={"smoothing": "none"})
    try:
        scheme = spec.scheme(n, k)
        if spec.shift:
            scheme = replace(scheme, shift=site.shifts(spec.shift, len(segments)))
    except UserError as error:
        raise UserError(f"recipe {recipe.name}, {path}: {error}") from None
    return Job((path,), ((n, k),), scheme, spec.solver(), segments, modulated)


def _alike(one: Job, other: Job) -> bool:
    return replace(one, paths=(), shapes=()) == replace(other, paths=(), shapes=())


def _expect_matches(recipe: Recipe, key: str, globs: Iterable[str], paths: Iterable[str]) -> None:
    paths = tuple(paths)
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in paths):
            example = f"; a target looks like {paths[0]!r}" if paths else ""
            raise UserError(f"recipe {recipe.name}: {key} {glob!r} matches no layer: correct or remove it{example}")
