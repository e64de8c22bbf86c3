"""Adapters of peft, moved into the low-rank branches of a few-bit model and back.

`pipe.load_lora_weights` and everything else that diffusers and peft do with adapters works on few-bit layers as on
others, but each adapter costs two small products a layer and takes the layers of a group apart. Fused, it is more rank
in a branch that is computed anyway (`layers.branch`); the peft layers wait aside until `unfuse_loras` puts them back.

Layers that were kept in 16 bits have no branch: their weights take the adapters in, and a copy of the original waits.
Adapters of text encoders stay where peft has them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from bittern.errors import UserError, did_you_mean
from bittern.integrations.peft_layers import (
    active_adapters,
    check_plain,
    common_strengths,
    peft_layers,
    product_of,
    rolled_back,
)
from bittern.layers import FewBitLayer, quant_layers, swap
from bittern.layers.branch import Product, WidenedBranch, placed
from bittern.quantization import component
from bittern.solvers import recompress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Target: TypeAlias = "DiffusionPipeline | nn.Module"

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


def remember(model: Any, record: Fused) -> None:
    """Notes what is fused, and has `save_pretrained` refuse."""
    model._bittern_fused = record
    _guard_pipelines()
    # On the model and not in its quantizer, which in a copy of the model knows the model no more.
    model.save_pretrained = functools.partial(_refuse_saving, tuple(record.strengths))


def forget(model: Any) -> None:
    """The opposite."""
    del model._bittern_fused, model.save_pretrained


def _refuse_saving(names: Sequence[str], *args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        f"adapters {', '.join(names)} are fused into the model: bittern.save_fused(pipe, folder) writes it with them, "
        "bittern.unfuse_loras(pipe) takes them off"
    )


@functools.cache
def _guard_pipelines() -> None:
    """Has pipelines around such a model refuse, too, before they write their other components."""
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.save_pretrained

    @functools.wraps(plain)
    def save_pretrained(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        for part in self.components.values():
            if isinstance(part, nn.Module) and (record := fused(getattr(part, "_orig_mod", part))):
                _refuse_saving(tuple(record.strengths))
        return plain(self, *args, **kwargs)

    DiffusionPipeline.save_pretrained = save_pretrained


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
    model = denoiser(pipe)
    if before := fused(model):
        raise UserError(
            f"adapters {', '.join(before.strengths)} are fused already: bittern.unfuse_loras(pipe) gives them back; "
            "bittern.set_lora_strengths(pipe, {...}) changes how strong they are"
        )
    if not quant_layers(model):
        raise UserError(
            f"{type(model).__name__} has no few-bit layers: expected a quantized model; use pipe.fuse_lora()"
        )
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise UserError(f"max_rank {max_rank!r}: expected a whole number, 1 or more")
    others = [other for _, other in other_components(pipe, model)]
    with rolled_back([model, *others]) as undo:
        if strengths is not None:
            _activate(pipe, model, strengths)
        wrappers = dict(peft_layers(model))
        active = {path: names for path, wrapper in wrappers.items() if (names := active_adapters(wrapper))}
        if not active:
            raise UserError("no adapter is active: expected pipe.load_lora_weights(...) before, or pipe.enable_lora()")
        for path, names in active.items():
            for name in names:
                check_plain(path, wrappers[path], name)

        products: dict[FewBitLayer, list[Product]] = {}
        peft = {key: getattr(model, key) for key in _PEFT if hasattr(model, key)}
        record = Fused(common_strengths(wrappers, active), wrappers=wrappers, peft=peft)
        for path, names in active.items():
            base = wrappers[path].get_base_layer()
            if isinstance(base, FewBitLayer):
                products.setdefault(base.holder, []).extend(product_of(wrappers[path], base, name) for name in names)
            else:
                record.merged.append(_Merged(wrappers[path], list(names), base.weight.detach().clone()))
        cuts = [_cut(of_holder, max_rank) for of_holder in products.values()] if max_rank else []
        if cuts:
            products = dict(zip(products, (cut.products for cut in cuts), strict=True))
        for holder, of_holder in products.items():
            record.branches.append(WidenedBranch(holder, of_holder))
            undo.callback(record.branches[-1].narrow)
        for merged in record.merged:
            undo.callback(merged.restore)
            merged.write()
        for path, wrapper in wrappers.items():
            undo.callback(swap, model, path, wrapper)
            swap(model, path, wrapper.get_base_layer())
    for key in record.peft:
        delattr(model, key)
    remember(model, record)
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
    model = denoiser(pipe)
    record = fused_record(model, "pipe.set_adapters(names, weights) sets those that are loaded")
    for name in strengths:
        if name not in record.strengths:
            raise UserError(f"no adapter {name!r} is fused: {did_you_mean(name, record.strengths)}")
    strengths = {name: _finite(name, strength) for name, strength in strengths.items()}
    encoders = [layer for _, other in other_components(pipe, model) for _, layer in peft_layers(other)]
    for name, strength in strengths.items():
        for layer in [*record.wrappers.values(), *encoders]:
            layer.set_scale(name, strength)
        for branch in record.branches:
            branch.scale(name, strength)
        record.strengths[name] = strength
    for merged in record.merged:
        if not strengths.keys().isdisjoint(merged.names):
            merged.write()


def unfuse_loras(pipe: Target) -> None:
    """Undoes `fuse_loras`: the layers have their own tensors again, to the bit, and peft its adapters.

    The adapters are active with the strengths that they had last.

    Raises:
        UserError: if nothing is fused, or adapters were loaded since.
    """
    model = denoiser(pipe)
    record = fused_record(model, "pipe.unload_lora_weights() takes off those that are loaded")
    since = list(getattr(model, "peft_config", {}))
    if since or any(True for _ in peft_layers(model)):
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
    forget(model)
    _reapply_offloading(model)


def denoiser(pipe: Target) -> Any:
    """The model that denoises, as it is below `torch.compile`."""
    model = component(pipe)
    return getattr(model, "_orig_mod", model)


def fused_record(model: nn.Module, otherwise: str) -> Fused:
    """What a model remembers of its fused adapters.

    Raises:
        UserError: if it has none, with what to do otherwise.
    """
    record = fused(model)
    if record is None:
        raise UserError(f"no adapter is fused: expected bittern.fuse_loras(pipe) before; {otherwise}")
    return record


def other_components(pipe: Target, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The other modules of a pipeline."""
    parts: Mapping[str, Any] = {} if isinstance(pipe, nn.Module) else pipe.components
    for name, part in parts.items():
        if isinstance(part, nn.Module) and getattr(part, "_orig_mod", part) is not model:
            yield name, part


def _activate(pipe: Target, model: Any, strengths: Mapping[str, float]) -> None:
    known = set(getattr(model, "peft_config", {}))
    for name in strengths:
        if name not in known:
            loaded = did_you_mean(name, known) if known else "pipe.load_lora_weights(...) loads one"
            raise UserError(f"no adapter {name!r} is loaded: {loaded}")
    strengths = {name: _finite(name, strength) for name, strength in strengths.items()}
    if not strengths:
        raise UserError("strengths is empty: expected at least one adapter, or None for those that are active")
    target: Any = model if isinstance(pipe, nn.Module) else pipe
    target.set_adapters(list(strengths), list(strengths.values()))
    target.enable_lora()


def _finite(name: str, strength: Any) -> float:
    """A strength as a number: those of numpy, and tensors of one, are meant as such."""
    try:
        value = math.nan if isinstance(strength, str) else float(strength)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"strength of {name!r} is {strength!r}: expected a finite number")
    return value


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
    places, rank = placed(products)
    down = products[0].down.new_zeros(rank, products[0].down.shape[1], dtype=torch.float32)
    up = down.new_zeros(last - first, rank)
    for product, columns in zip(products, places, strict=True):
        down[columns] = product.down.float()
        up[product.rows[0] - first : product.rows[1] - first, columns] = product.up.float() * product.unit
    return up, down


def _reapply_offloading(model: nn.Module) -> None:
    """Group offloading knows the tensors that there were when it began."""
    from diffusers.hooks import group_offloading

    group_offloading._maybe_remove_and_reapply_group_offloading(model)
