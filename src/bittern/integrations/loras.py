"""Adapters of peft, moved into the low-rank branches of a few-bit model and back.

`pipe.load_lora_weights` and everything else that diffusers and peft do with adapters works on few-bit layers as on
others, but each adapter costs two small products a layer and takes the layers of a group apart. Fused, it is more rank
in a branch that is computed anyway (`layers.branch`); the peft layers wait aside until `unfuse_loras` puts them back.

Layers that were kept in 16 bits have no branch: their weights take the adapters in, and a copy of the original waits.
Adapters of text encoders stay where peft has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.errors import UserError, did_you_mean
from bittern.layers import FewBitLayer, flat_weight, quant_layers, swap
from bittern.layers.branch import Product, WidenedBranch
from bittern.outputs import new_folder
from bittern.quantization import component
from bittern.solvers import recompress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from bittern.checkpoints import CheckpointConfig

    Target = DiffusionPipeline | nn.Module

_PEFT = ("peft_config", "_hf_peft_config_loaded")
"""What diffusers and peft note on a model that wears adapters."""


@dataclass(frozen=True)
class FusedLoras:
    """What `fuse_loras` did.

    Attributes:
        strengths: Of each adapter; None where its layers differ.
        layers: Few-bit layers that have an adapter in their branch.
        dense: 16-bit layers of the denoiser that have one in their weight.
        rank: The largest rank of a branch, with what it had before.
        error: |what was fused - what the adapters add| / |what the adapters add| over all branches; 0 unless
            `max_rank` cut something.
        worst: The same of the branch and adapter that lost most.
    """

    strengths: Mapping[str, float | None]
    layers: int
    dense: int
    rank: int
    error: float = 0.0
    worst: float = 0.0

    def __repr__(self) -> str:
        names = ", ".join(f"{name}:{'mixed' if s is None else f'{s:g}'}" for name, s in self.strengths.items())
        cut = f", cut with a relative error of {self.error:.2e}, {self.worst:.2e} at worst" if self.worst else ""
        return (
            f"<FusedLoras {names}: {self.layers} few-bit layers and {self.dense} others, rank up to {self.rank}{cut}>"
        )


@dataclass
class _Merged:
    """A 16-bit layer with adapters in its weight."""

    wrapper: Any
    names: list[str]
    original: Tensor

    def write(self) -> None:
        weight = self.wrapper.get_base_layer().weight
        with torch.no_grad():
            delta = sum(self.wrapper.get_delta_weight(name).to(weight.device, torch.float32) for name in self.names)
            weight.copy_(self.original.to(weight.device).float() + delta)

    def restore(self) -> None:
        with torch.no_grad():
            self.wrapper.get_base_layer().weight.copy_(self.original)


@dataclass
class Fused:
    """What a model remembers of its fused adapters."""

    strengths: dict[str, float | None]
    branches: list[WidenedBranch] = field(default_factory=list)
    merged: list[_Merged] = field(default_factory=list)
    wrappers: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)


def fused(model: nn.Module) -> Fused | None:
    """What a model remembers of its fused adapters; None if it has none."""
    return vars(model).get("_bittern_fused")


def fuse_loras(
    pipe: Target, strengths: Mapping[str, float] | None = None, *, max_rank: int | None = None
) -> FusedLoras:
    """Moves the adapters that peft has loaded into the few-bit layers' low-rank branches. Nothing is requantized.

    The adapters' rank is added to the branch's, and the sum filled up to a multiple of 16; layers without a branch
    gain one. The peft layers and the adapters that are not fused wait until `unfuse_loras`.

    Args:
        pipe: A pipeline, or its transformer or U-Net.
        strengths: Which adapters to fuse and how strongly, of either sign; by default those that are active, as they
            are.
        max_rank: The most that one adapter may add to one branch; what has more is cut by SVD, all layers of a group
            together, and the result says what that cost. Adapters on q, k and v add up in a group, unless they share
            their down-projection.

    Raises:
        UserError: if the model has no few-bit layers, wears no active adapter, has fused ones already, or an adapter is
            no plain LoRA (DoRA, LoKr, LoHa, biases): such stay loaded. Nothing has changed then.
    """
    model = _denoiser(pipe)
    if before := fused(model):
        raise UserError(
            f"adapters {', '.join(before.strengths)} are fused already: bittern.unfuse_loras(pipe) gives them back; "
            "bittern.set_lora_strengths(pipe, {...}) changes how strong they are"
        )
    if not quant_layers(model):
        raise UserError(
            f"{type(model).__name__} has no few-bit layers: expected a quantized model; use pipe.fuse_lora()"
        )
    if max_rank is not None and max_rank < 1:
        raise UserError(f"max_rank {max_rank}: expected 1 or more")
    if strengths is not None:
        _activate(pipe, model, strengths)
    wrappers = dict(_peft_layers(model))
    active = {path: names for path, wrapper in wrappers.items() if (names := _active(wrapper))}
    if not active:
        raise UserError("no adapter is active: expected pipe.load_lora_weights(...) before, or pipe.enable_lora()")
    for path, names in active.items():
        for name in names:
            _check(path, wrappers[path], name)

    products: dict[FewBitLayer, list[Product]] = {}
    record = Fused({}, wrappers=wrappers, peft={key: getattr(model, key) for key in _PEFT if hasattr(model, key)})
    for path, names in active.items():
        base = wrappers[path].get_base_layer()
        if isinstance(base, FewBitLayer):
            products.setdefault(base.holder, []).extend(_product(wrappers[path], base, name) for name in names)
        else:
            record.merged.append(_Merged(wrappers[path], list(names), base.weight.detach().clone()))
    cuts = [_cut(of_holder, max_rank) for of_holder in products.values()] if max_rank else []
    if cuts:
        products = dict(zip(products, (cut.products for cut in cuts), strict=True))
    try:
        for holder, of_holder in products.items():
            record.branches.append(WidenedBranch(holder, of_holder))
    except UserError:
        for branch in record.branches:
            branch.narrow()
        raise
    for merged in record.merged:
        merged.write()
    record.strengths = _strengths(wrappers, active)
    for path, wrapper in wrappers.items():
        swap(model, path, wrapper.get_base_layer())
    for key in record.peft:
        delattr(model, key)
    model._bittern_fused = record
    _reapply_offloading(model)
    lost, whole = sum(cut.lost for cut in cuts), sum(cut.whole for cut in cuts)
    return FusedLoras(
        strengths=dict(record.strengths),
        layers=len(active) - len(record.merged),
        dense=len(record.merged),
        rank=max((branch.rank for branch in record.branches), default=0),
        error=math.sqrt(lost / whole) if whole else 0.0,
        worst=math.sqrt(max((cut.worst for cut in cuts), default=0.0)),
    )


def set_lora_strengths(pipe: Target, strengths: Mapping[str, float]) -> None:
    """Changes how strongly fused adapters count, in place: nothing is loaded, fused or compiled again.

    Adapters of the same names in text encoders, which are not fused, follow.

    Args:
        pipe: What was given to `fuse_loras`.
        strengths: By the adapters' names; 0 turns one off. Those that are not named stay as they are.

    Raises:
        UserError: if nothing is fused, for an unknown name, or a strength that is not finite.
    """
    model = _denoiser(pipe)
    record = _fused(model, "pipe.set_adapters(names, weights) sets those that are loaded")
    for name, strength in strengths.items():
        if name not in record.strengths:
            raise UserError(f"no adapter {name!r} is fused: {did_you_mean(name, record.strengths)}")
        _check_strength(name, strength)
    encoders = [layer for other in _components(pipe, model) for _, layer in _peft_layers(other)]
    for name, strength in strengths.items():
        for layer in [*record.wrappers.values(), *encoders]:
            layer.set_scale(name, strength)
        for branch in record.branches:
            branch.scale(name, strength)
        record.strengths[name] = float(strength)
    for merged in record.merged:
        if not strengths.keys().isdisjoint(merged.names):
            merged.write()


def unfuse_loras(pipe: Target) -> None:
    """Undoes `fuse_loras`: the layers have their own tensors again, to the bit, and peft its adapters.

    The adapters are active with the strengths that they had last.

    Raises:
        UserError: if nothing is fused, or adapters were loaded since.
    """
    model = _denoiser(pipe)
    record = _fused(model, "pipe.unload_lora_weights() takes off those that are loaded")
    since = list(getattr(model, "peft_config", {}))
    if since or any(True for _ in _peft_layers(model)):
        raise UserError(
            f"adapters {', '.join(since) or 'of peft'} were loaded after others were fused: take them off first, with "
            "pipe.unload_lora_weights() or pipe.delete_adapters(names)"
        )
    for branch in record.branches:
        branch.narrow()
    for merged in record.merged:
        merged.restore()
    for path, wrapper in record.wrappers.items():
        base = wrapper.get_base_layer()
        for name in wrapper.adapter_layer_names:
            getattr(wrapper, name).to(base.weight.device)
        swap(model, path, wrapper)
    for key, value in record.peft.items():
        setattr(model, key, value)
    del model._bittern_fused
    _reapply_offloading(model)


def save_fused(pipe: Target, folder: str | Path, *, force: bool = False) -> None:
    """Writes a model with its fused adapters in it, as an ordinary few-bit folder: all of it, or nothing.

    What is written has wider branches and no memory of the adapters; the model itself stays as it is, and can be
    unfused.

    Args:
        pipe: What was given to `fuse_loras`.
        folder: Where to write.
        force: Whether to replace a model that is there.

    Raises:
        UserError: if nothing is fused, another component wears adapters, or as `new_folder` does.
    """
    model = _denoiser(pipe)
    record = _fused(model, "pipe.save_pretrained(folder) writes it")
    for name, other in _named_components(pipe, model):
        if worn := sorted({adapter for _, layer in _peft_layers(other) for adapter in _adapters(layer)}):
            raise UserError(
                f"{name} wears adapter {worn[0]!r}, which is not fused and would be lost: fuse what its LoRA does to "
                f"{name} with pipe.fuse_lora(components=[{name!r}]) and unload it, or save the LoRA by itself"
            )
    with new_folder(folder, force=force) as fresh, _as_few_bit(model, record):
        pipe.save_pretrained(fresh)


@contextmanager
def _as_few_bit(model: Any, record: Fused) -> Iterator[None]:
    """Within the block a model with fused adapters is a few-bit model that happens to have such branches."""
    quantizer = model.hf_quantizer
    before = quantizer.quantization_config
    config = type(before).of_checkpoint(_widened(before.checkpoint, model, record))
    del model._bittern_fused
    try:
        quantizer.quantization_config = config
        model.register_to_config(quantization_config=config)
        yield
    finally:
        quantizer.quantization_config = before
        model.register_to_config(quantization_config=before)
        model._bittern_fused = record


def _widened(config: CheckpointConfig, model: nn.Module, record: Fused) -> CheckpointConfig:
    """A checkpoint's config with the ranks that the layers have now."""
    from bittern.checkpoints import CheckpointConfig

    dumped = config.dump()
    schemes = {path: layer.scheme.to_dict() for path, layer in quant_layers(model).items()}
    unique = list({repr(scheme): scheme for scheme in schemes.values()}.values())
    targets = {path: {**target, "scheme": unique.index(schemes[path])} for path, target in dumped["targets"].items()}
    recipe = {**dumped["recipe"], "fused_loras": record.strengths}
    return CheckpointConfig.parse({**dumped, "schemes": unique, "targets": targets, "recipe": recipe})


# ---- peft's side


def _denoiser(pipe: Target) -> Any:
    model = component(pipe)
    return getattr(model, "_orig_mod", model)


def _fused(model: nn.Module, otherwise: str) -> Fused:
    record = fused(model)
    if record is None:
        raise UserError(f"no adapter is fused: expected bittern.fuse_loras(pipe) before; {otherwise}")
    return record


def _named_components(pipe: Target, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The other modules of a pipeline."""
    parts: Mapping[str, Any] = {} if isinstance(pipe, nn.Module) else pipe.components
    for name, part in parts.items():
        if isinstance(part, nn.Module) and getattr(part, "_orig_mod", part) is not model:
            yield name, part


def _components(pipe: Target, model: nn.Module) -> list[nn.Module]:
    return [part for _, part in _named_components(pipe, model)]


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft has put in the place of others, by path."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def _adapters(wrapper: Any) -> set[str]:
    return {name for layers in wrapper.adapter_layer_names for name in getattr(wrapper, layers)}


def _active(wrapper: Any) -> list[str]:
    if wrapper.disable_adapters:
        return []
    return [name for name in wrapper.active_adapters if name in _adapters(wrapper)]


def _activate(pipe: Target, model: Any, strengths: Mapping[str, float]) -> None:
    known = set(getattr(model, "peft_config", {}))
    for name, strength in strengths.items():
        if name not in known:
            loaded = did_you_mean(name, known) if known else "pipe.load_lora_weights(...) loads one"
            raise UserError(f"no adapter {name!r} is loaded: {loaded}")
        _check_strength(name, strength)
    if not strengths:
        raise UserError("strengths is empty: expected at least one adapter, or None for those that are active")
    target: Any = model if isinstance(pipe, nn.Module) else pipe
    target.set_adapters(list(strengths), list(strengths.values()))
    target.enable_lora()


def _check_strength(name: str, strength: float) -> None:
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise UserError(f"strength of {name!r} is {strength}: expected a finite number")


def _check(path: str, wrapper: Any, name: str) -> None:
    """Refuses an adapter that is no product of two matrices, added to a weight."""
    from peft.tuners.lora import Conv2d, Linear

    if wrapper.merged:
        raise UserError(f"{path} has adapters in its weight: expected pipe.unfuse_lora() before")
    kind = None
    if not isinstance(wrapper, Linear | Conv2d):
        kind = f"a {type(wrapper).__module__.split('.')[-2]} layer"
    elif wrapper.use_dora.get(name) or getattr(wrapper, "lora_variant", {}).get(name) is not None:
        kind = "a DoRA"
    elif wrapper.lora_bias.get(name):
        kind = "a LoRA with biases"
    if kind:
        raise UserError(
            f"adapter {name!r} is {kind} at {path}, which is no low-rank product: leave it loaded, not fused"
        )


def _unit(wrapper: Any, name: str) -> float:
    """What peft multiplies an adapter of strength 1 by."""
    rank = wrapper.r[name]
    return wrapper.lora_alpha[name] / (math.sqrt(rank) if wrapper.use_rslora.get(name) else rank)


def _strength(wrapper: Any, name: str) -> float:
    unit = _unit(wrapper, name)
    return wrapper.scaling[name] / unit if unit else 1.0


def _product(wrapper: Any, base: Any, name: str) -> Product:
    return Product(
        name=name,
        rows=getattr(base, "rows", (0, base.weight.shape[0])),
        down=flat_weight(wrapper.lora_A[name]).detach(),
        up=flat_weight(wrapper.lora_B[name]).detach(),
        unit=_unit(wrapper, name),
        strength=_strength(wrapper, name),
    )


def _strengths(wrappers: Mapping[str, Any], active: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Each adapter's strength, or None if it is not one."""
    found: dict[str, set[float]] = {}
    for path, names in active.items():
        for name in names:
            # Scaling by alpha / r and back leaves rounding errors.
            found.setdefault(name, set()).add(round(_strength(wrappers[path], name), 9))
    return {name: values.pop() if len(values) == 1 else None for name, values in found.items()}


@dataclass(frozen=True)
class _Cut:
    """A branch's products, and squares of what is lost of them and of the whole."""

    products: list[Product]
    lost: float
    whole: float
    worst: float


def _cut(products: Sequence[Product], max_rank: int) -> _Cut:
    """The products with no more rank than that for each adapter; one with more becomes one product of all rows."""
    kept: list[Product] = []
    lost = whole = worst = 0.0
    for name in dict.fromkeys(product.name for product in products):
        mine = [product for product in products if product.name == name]
        up, down = _stacked(mine)
        whole_here = float(((up.T @ up) * (down @ down.T)).sum())
        whole += whole_here
        if down.shape[0] <= max_rank:
            kept += mine
            continue
        if len({product.strength for product in mine}) > 1:
            raise UserError(f"adapter {name!r} has several strengths in one group: max_rank needs a single one")
        up, down, share = recompress(up, down, max_rank)
        lost, worst = lost + share * whole_here, max(worst, share)
        rows = (min(product.rows[0] for product in mine), max(product.rows[1] for product in mine))
        kept.append(Product(name, rows, down, up, strength=mine[0].strength))
    return _Cut(kept, lost, whole, worst)


def _stacked(products: Sequence[Product]) -> tuple[Tensor, Tensor]:
    """Products of several rows as one, up [rows, q] and down [q, K], with equal downs once; units are in up."""
    first = min(product.rows[0] for product in products)
    last = max(product.rows[1] for product in products)
    downs: list[Tensor] = []
    blocks: list[tuple[Product, int]] = []
    for product in products:
        at = next((i for i, down in enumerate(downs) if torch.equal(down, product.down)), len(downs))
        downs += [product.down] * (at == len(downs))
        blocks.append((product, at))
    starts = [sum(down.shape[0] for down in downs[:i]) for i in range(len(downs))]
    up = products[0].up.new_zeros(last - first, sum(down.shape[0] for down in downs), dtype=torch.float32)
    for product, at in blocks:
        begin, end = product.rows
        columns = slice(starts[at], starts[at] + downs[at].shape[0])
        up[begin - first : end - first, columns] = product.up.float() * product.unit
    return up, torch.cat(downs).float()


def _reapply_offloading(model: nn.Module) -> None:
    """Group offloading knows the tensors that there were when it began."""
    from diffusers.hooks import group_offloading

    group_offloading._maybe_remove_and_reapply_group_offloading(model)
