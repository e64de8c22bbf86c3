"""Four-bit weights of other libraries, each in the settings that store about 4.1 to 4.5 bits a weight.

A library quantizes a plain linear through its public interface. The weight that it then computes with is what its own
layer makes of the identity, and its size is that of the tensors that its layer holds. Pictures are drawn with that
weight in a plain product, which is quicker on a CPU and the same thing: `effective` compares the two on random inputs,
for every layer, and refuses a library that computes something else or leaves the weight as it was.

bitsandbytes (MIT), optimum-quanto (Apache-2.0), torchao (BSD-3) and SDNQ (GPL-3.0) are used as they are installed, and
nothing of them is here. `pip install -e ".[peers]"` brings all four.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 16
"""Random inputs on which a layer's own forward is compared with the plain product."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative difference of the two that the order of sums explains; kernels round their sums to the layer's dtype."""

UNTOUCHED = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""A relative weight error below this is no 4-bit rounding: the library has passed the layer by."""

Make = Callable[[nn.Linear, int], tuple[nn.Module, float]]
"""A linear, and a group that divides its inputs -> the layer in its place, and the bytes of its weight."""


@dataclass(frozen=True)
class Setting:
    """One way of one library to store a weight.

    Attributes:
        library: Name of its distribution.
        name: What tables call it.
        group: Inputs under one scale; halved for a layer until it divides the inputs.
        make: Quantizes one linear.
    """

    library: str
    name: str
    group: int
    make: Make = field(repr=False)


@torch.no_grad()
def effective(setting: Setting, weight: Tensor) -> tuple[Tensor, float, float]:
    """What a library makes of a weight.

    Args:
        setting: Library and numbers.
        weight: [n, k], in the dtype and on the device that the model computes in.

    Returns:
        The weight [n, k] that the library's layer computes with, its bytes, and the relative difference between the
        layer's own forward and the plain product.

    Raises:
        RuntimeError: if the two differ by more than rounding, or the weight was left as it was.
        Exception: whatever the library raises.
    """
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, k, generator=generator).to(weight)
    # Some libraries print, start their SVD from torch's global generator, or compile what runs once.
    with contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        layer, stored = setting.make(linear, fitting_group(k, setting.group))
        found = layer(torch.eye(k, dtype=weight.dtype, device=weight.device)).T.contiguous()
        own = layer(x)
    apart = _relative(own, x @ found.T)
    if not apart <= TOLERANCE[weight.dtype]:
        raise RuntimeError(f"its own forward differs from its weight's product by {apart:.1e}")
    if _relative(found, weight) < UNTOUCHED[weight.dtype]:
        raise RuntimeError(f"leaves a {n} x {k} layer in 16 bits")
    return found, stored, apart


def fitting_group(k: int, group: int) -> int:
    """The group halved until it divides k.

    >>> fitting_group(320, 128)
    64
    """
    while k % group:
        group //= 2
    return group


def settings() -> list[Setting]:
    """What is compared. Defaults of the libraries are among them, and their best near 4.25 and 4.5 bits."""
    out = [
        Setting("bitsandbytes", f"bitsandbytes {kind.upper()}, blocks of {block}{', nested' * nested}", block, make)
        for kind, block, nested, make in (
            (kind, block, nested, _bitsandbytes(kind, nested))
            for kind in ("nf4", "fp4")
            for block, nested in ((64, False), (64, True), (32, True))
        )
    ]
    small = {"scale_dtype": "uint8"}
    out += [
        Setting("sdnq", "SDNQ int4 g64, the default", 64, _sdnq("int4")),
        Setting("sdnq", "SDNQ int4 g32, 8-bit scales", 32, _sdnq("int4", **small)),
        Setting("sdnq", "SDNQ uint4 g64, 8-bit scales", 64, _sdnq("uint4", **small)),
        Setting("sdnq", "SDNQ uint4 g32, 8-bit scales", 32, _sdnq("uint4", **small)),
        Setting("sdnq", "SDNQ uint4 codebook per row, 8-bit", -1, _sdnq("uint4", use_codebook=True, **small)),
        Setting("sdnq", "SDNQ uint4 g64, 8-bit scales, SVD rank 1/96", 64, _sdnq("uint4", "1/96", **small)),
        Setting("sdnq", "SDNQ int4 g64, SVD rank 32", 64, _sdnq("int4", 32)),
    ]
    out += [
        Setting("optimum-quanto", f"quanto int4 g{group}{', HQQ' * hqq}", group, _quanto(hqq))
        for hqq in (False, True)
        for group in (128, 64)
    ]
    out += [
        Setting("torchao", f"torchao int4 weight-only g{group}{', HQQ' * hqq}", group, _torchao_tinygemm(hqq))
        for group, hqq in ((128, True), (64, False), (64, True))
    ]
    out += [
        Setting("torchao", "torchao IntX int4 g64, symmetric, HQQ", 64, _torchao_intx(symmetric=True)),
        Setting("torchao", "torchao IntX int4 g64, asymmetric", 64, _torchao_intx(symmetric=False)),
    ]
    return out


def fastest() -> list[Setting]:
    """What is timed: the defaults, and what libraries offer for speed or beside a low-rank branch."""
    names = (
        "bitsandbytes NF4, blocks of 64",
        "bitsandbytes NF4, blocks of 64, nested",
        "SDNQ int4 g64, the default",
        "SDNQ int4 g64, SVD rank 32",
        "quanto int4 g128",
        "torchao int4 weight-only g128, HQQ",
    )
    by_name = {setting.name: setting for setting in settings()}
    int8 = {"use_quantized_matmul": True}
    return [by_name[name] for name in names] + [
        Setting("sdnq", "SDNQ int4 g64, int8 products", 64, _sdnq("int4", **int8)),
        Setting("sdnq", "SDNQ int4 g64, SVD rank 32, int8 products", 64, _sdnq("int4", 32, **int8)),
    ]


def installed(library: str) -> str | None:
    """Its version; None if it is not there."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _bitsandbytes(kind: str, nested: bool) -> Make:
    def make(linear: nn.Linear, group: int) -> tuple[nn.Module, float]:
        from bitsandbytes.nn import Linear4bit, Params4bit

        weight = linear.weight
        # A bias is given below: made here it would be one more.
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type=kind
        )
        layer.weight = Params4bit(
            weight.data, requires_grad=False, blocksize=group, compress_statistics=nested, quant_type=kind, module=layer
        )
        layer = layer.to(weight.device)
        layer.bias = linear.bias
        state = layer.weight.quant_state
        # The tables of 16 and of 256 numbers are the same for every layer.
        held = [layer.weight.data, state.absmax]
        held += [state.state2.absmax, state.offset] if state.nested else []
        return layer, _bytes(held)

    return make


def _sdnq(dtype: str, rank: int | str = 0, **options: Any) -> Make:
    def make(linear: nn.Linear, group: int) -> tuple[nn.Module, float]:
        from sdnq import SDNQConfig, sdnq_post_load_quant

        least = min(linear.weight.shape)
        config = SDNQConfig(
            weights_dtype=dtype, group_size=group, use_svd=bool(rank), add_skip_keys=False,
            svd_rank=rank if isinstance(rank, int) else max(1, round(Fraction(rank) * least)),
            minimum_allowed_numel=0, minimum_allowed_channel_size=0, **options,
        )  # fmt: skip
        model = nn.Sequential(linear)
        model = sdnq_post_load_quant(model, quantization_config=config, torch_dtype=linear.weight.dtype)
        held = {key: value for key, value in model[0].state_dict().items() if key != "bias"}
        return model[0], _bytes(held.values())

    return make


def _quanto(hqq: bool) -> Make:
    def make(linear: nn.Linear, group: int) -> tuple[nn.Module, float]:
        from optimum.quanto import HqqOptimizer, MaxOptimizer, freeze, qint4, quantize

        model = nn.Sequential(linear)
        quantize(model, weights=qint4, optimizer=HqqOptimizer() if hqq else MaxOptimizer())
        model[0].weight_group_size = group
        freeze(model)
        held = {key: value for key, value in model[0].state_dict().items() if key.startswith("weight")}
        return model[0], _bytes(held.values())

    return make


def _torchao_tinygemm(hqq: bool) -> Make:
    def make(linear: nn.Linear, group: int) -> tuple[nn.Module, float]:
        algorithm = "hqq" if hqq else "tinygemm"
        if linear.weight.is_cuda:
            from torchao.quantization import Int4WeightOnlyConfig

            config = Int4WeightOnlyConfig(
                group_size=group, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm=algorithm
            )
        else:
            # Int4WeightOnlyConfig is for GPUs.
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group_size=group, int4_choose_qparams_algorithm=algorithm)
        # A scale and a zero point a group, in bfloat16.
        return _torchao(linear, config, group, 4)

    return make


def _torchao_intx(symmetric: bool) -> Make:
    def make(linear: nn.Linear, group: int) -> tuple[nn.Module, float]:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup

        config = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=PerGroup(group),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm="hqq_scale_only" if symmetric else "affine",
        )
        # A scale in bfloat16; an asymmetric group has a zero point of 8 bits.
        return _torchao(linear, config, group, 2 if symmetric else 3)

    return make


def _torchao(linear: nn.Linear, config: Any, group: int, bytes_a_group: int) -> tuple[nn.Module, float]:
    """Counts 4 bits a code: these tensors pad to tiles or keep a code a byte, which no format would store."""
    from torchao.quantization import quantize_

    model = nn.Sequential(linear)
    quantize_(model, config)
    weights = linear.in_features * linear.out_features
    return model[0], weights / 2 + bytes_a_group * weights / group


def _bytes(tensors: Any) -> float:
    return float(sum(tensor.nbytes for tensor in tensors))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())
