"""The plan: every linear and convolution of a model, either part of a job or kept, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bittern.architectures.base import REST, Architecture, Modulated, Site
from bittern.architectures.known import of
from bittern.errors import UserError
from bittern.formats.layout import ROW_MULTIPLE
from bittern.recipes import LayerSpec, Recipe
from bittern.scheme import Scheme


@dataclass(frozen=True)
class Job:
    """Targets that are solved together because they read one tensor; mostly there is just one.

    Attributes:
        paths: The targets.
        shapes: Their (N, K); of a convolution K = kh · kw · C.
        scheme: What each of them becomes.
        solver: Keyword arguments of `SolverOptions`.
        segments: Lengths of the K-segments; of a convolution C for every tap.
        kernel: Of a convolution, its height and width.
        modulated: What modulates their input, if the smoothing is to know it.
    """

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    scheme: Scheme
    solver: Mapping[str, Any]
    segments: tuple[int, ...]
    kernel: tuple[int, int] | None = None
    modulated: Modulated | None = None


@dataclass(frozen=True)
class Plan:
    """What a recipe makes of one model.

    Attributes:
        architecture: The model's family.
        jobs: In the order of the model's modules.
        kept: Path of every linear and convolution that stays as it is, with the reason.
    """

    architecture: Architecture
    jobs: tuple[Job, ...]
    kept: Mapping[str, str]


def plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Which layers of `model` a recipe quantizes, how, and which it keeps.

    Reads shapes only: the model may be on the meta device.

    Raises:
        UserError: for a model without blocks, linears that are not plain ones or wear adapters, a glob that
            matches nothing, a rank that does not fit a layer, a convolution that would have fewer-bit activations.
    """
    layers = _layers(model)
    architecture = of(model)
    sites: dict[str, Site] = {}
    kept: dict[str, str] = {}
    for path, layer in layers.items():
        site = architecture.site(path)
        if site is None:
            kept[path] = architecture.why_kept(path)
        elif reason := _unfit(layer):
            kept[path] = reason
        elif recipe.convolution is None and _is_convolution(layer, site):
            kept[path] = "the recipe keeps convolutions"
        elif recipe.keeps(path):
            kept[path] = "kept by the recipe"
        else:
            sites[path] = site
    _expect_matches(recipe, "keep", recipe.keep, layers)
    _expect_matches(recipe, "overrides", recipe.overrides, sites)
    if not sites:
        raise UserError(f"recipe {recipe.name} keeps every layer: expected at least one target")

    knows_modulation = architecture.conditioning is not None
    singles = {path: _single(path, site, layers, recipe, knows_modulation) for path, site in sites.items()}
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
                kernel=singles[path].kernel,
                modulated=singles[path].modulated,
            )
        )
    return Plan(architecture, tuple(jobs), kept)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise UserError(f"{path} wears a LoRA adapter: fuse or unload it before quantizing")
        if isinstance(module, nn.Linear):
            if type(module) not in (nn.Linear, NonDynamicallyQuantizableLinear):
                raise UserError(f"{path} is a {type(module).__name__}: expected a plain linear; load the original")
            layers[path] = module
        elif isinstance(module, _ConvNd):
            layers[path] = module
    return layers


def _unfit(layer: nn.Module) -> str | None:
    """Why a layer has no few-bit form; None if it has one."""
    if type(layer) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight past the layer"
    if isinstance(layer, _ConvNd) and type(layer) is not nn.Conv2d:
        return f"a {type(layer).__name__} has no few-bit form"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "a grouped convolution has few weights and no few-bit form"
    return None


def _is_convolution(layer: nn.Module, site: Site) -> bool:
    """Whether the recipe's `convolution` counts; a 1 x 1 one after a norm is a linear like any other."""
    return site.reads_stream or (isinstance(layer, nn.Conv2d) and prod(layer.kernel_size) > 1)


def _single(path: str, site: Site, layers: Mapping[str, nn.Module], recipe: Recipe, knows_modulation: bool) -> Job:
    layer = layers[path]
    spec = recipe.spec(path, modulation=site.is_modulation, convolution=_is_convolution(layer, site))
    modulated = site.modulated if spec.smoothing == "modulation" and knows_modulation else None
    if spec.smoothing == "modulation" and modulated is None:
        spec = spec.model_copy(update={"smoothing": "none"})
    try:
        if isinstance(layer, nn.Conv2d):
            return _convolution(path, layer, spec)
        n, k = layer.out_features, layer.in_features
        segments = _segments(k, site, layers) or (k,)
        _check_group(spec.group_size, segments)
        scheme = spec.scheme(n, k)
        if spec.shift:
            scheme = replace(scheme, shift=site.shifts(spec.shift, len(segments)))
    except UserError as error:
        raise UserError(f"recipe {recipe.name}, {path}: {error}") from None
    return Job((path,), ((n, k),), scheme, spec.solver(), segments, modulated=modulated)


def _check_group(group_size: int | None, segments: tuple[int, ...]) -> None:
    # Small layers may pad up to the usual 64: they would not fit any recipe otherwise.
    if group_size is not None and group_size > max(64, min(segments)):
        raise UserError(
            f"group_size {group_size} for {min(segments)} inputs: expected no more; null is one scale a row"
        )


def _segments(k: int, site: Site, layers: Mapping[str, nn.Module]) -> tuple[int, ...]:
    lengths = [layers[source].out_features for source in site.sources if source != REST]
    if REST in site.sources:
        lengths.append(k - sum(lengths))
    if lengths and (sum(lengths) != k or min(lengths) < 1):
        raise UserError(f"{k} inputs: expected those of {', '.join(site.sources)}, {lengths}")
    return tuple(lengths)


def _convolution(path: str, conv: nn.Conv2d, spec: LayerSpec) -> Job:
    n, c, kernel = conv.out_channels, conv.in_channels, conv.kernel_size
    k = c * prod(kernel)
    scheme = spec.scheme(n, k)
    if prod(kernel) > 1:
        what = f"a {kernel[0]} x {kernel[1]} convolution"
        if scheme.activations != 16:
            raise UserError(f"{what} with {scheme.activations}-bit activations: expected 16, as `convolution` says")
        if scheme.smooth:
            raise UserError(f"{what} with smoothing {spec.smoothing!r}: expected none, as `convolution` says")
        scheme = replace(scheme, group_size=fitting_group(c, scheme.group_size))
    return Job((path,), ((n, k),), scheme, spec.solver(), (c,) * prod(kernel), tuple(kernel))


def fitting_group(channels: int, group_size: int | None) -> int | None:
    """The group that stores a tap's channels in the fewest bits, 4 a code and 16 a scale, padding included.

    It is the wanted one wherever that divides the channels. Groups do not span taps, and so a tap of few channels
    would otherwise be mostly padding.
    """
    if group_size is None:
        return None
    candidates = [group_size]
    while candidates[-1] % 8 == 0 and candidates[-1] > 16:
        candidates.append(candidates[-1] // 2)
    if channels < group_size:
        candidates.append(-(-channels // ROW_MULTIPLE) * ROW_MULTIPLE)
    return min(candidates, key=lambda group: (-(-channels // group) * (4 * group + 16), -group))


def _alike(one: Job, other: Job) -> bool:
    return replace(one, paths=(), shapes=()) == replace(other, paths=(), shapes=())


def _expect_matches(recipe: Recipe, key: str, globs: Iterable[str], paths: Iterable[str]) -> None:
    paths = tuple(paths)
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path in paths):
            example = f"; a target looks like {paths[0]!r}" if paths else ""
            raise UserError(f"recipe {recipe.name}: {key} {glob!r} matches no layer: correct or remove it{example}")
