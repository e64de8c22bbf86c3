"""Files as Nunchaku writes them, with random numbers, and what they mean: both straight from the published layout.

A script as well: `python tests/nunchaku_files.py --out FILE` writes a small FLUX, `--full` one of FLUX.1-dev's sizes.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

SHIFT = 0.171875
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
SMALL = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "guidance_embeds": False,
    "patch_size": 1,
    "out_channels": None,
}
FULL = {
    **SMALL,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
}


def up(length: int, multiple: int = 128) -> int:
    return -(-length // multiple) * multiple


# ---- what packed tensors mean, by the formulas


def places(*lengths: int) -> list[Tensor]:
    return list(torch.meshgrid(*map(torch.arange, lengths), indexing="ij"))


def nibbles_of(qweight: Tensor) -> Tensor:
    """[N, K] patterns 0..15 of a W4A4 weight."""
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    n, k = places(rows, columns)
    word = ((n // 128 * (columns // 64) + k // 64) * 8 + n % 128 // 16) * 8 + n % 8
    word = ((word * 4 + k % 32 // 8) * 2 + n % 16 // 8) * 2 + k % 64 // 32
    flat = qweight.reshape(-1).view(torch.uint8)
    return (flat[word * 4 + k % 8 // 2] >> (4 * (k % 2)).to(torch.uint8)) & 15


def scales_of(wscales: Tensor) -> Tensor:
    """[N, G] of int4 scales."""
    groups, rows = wscales.shape
    n, g = places(rows, groups)
    place = (n // 128 * groups + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2
    return wscales.reshape(-1)[place].double()


def fp4_scales_of(wscales: Tensor) -> Tensor:
    groups, rows = wscales.shape
    n, g = places(rows, groups)
    place = (n // 128 * (groups // 4) + g // 4) * 512 + n % 8 * 64 + n % 32 // 8 * 16 + n % 128 // 32 * 4 + g % 4
    return wscales.reshape(-1).view(torch.uint8)[place].view(torch.float8_e4m3fn).double()


def vector_of(stored: Tensor) -> Tensor:
    return scales_of(stored[None])[:, 0]


def down_of(stored: Tensor) -> Tensor:
    """[R, K]."""
    length, rank = stored.shape
    r, c = places(rank, length)
    place = ((c // 16 * (rank // 16) + r // 16) * 8 + r % 8) * 4 + c % 8 // 2
    return stored.reshape(-1)[place * 8 + r % 16 // 8 * 4 + c % 16 // 8 * 2 + c % 2].double()


def up_of(stored: Tensor) -> Tensor:
    """[N, R]."""
    length, rank = stored.shape
    c, r = places(length, rank)
    place = ((c // 16 * (rank // 16) + r // 16) * 8 + c % 8) * 4 + r % 8 // 2
    return stored.reshape(-1)[place * 8 + c % 16 // 8 * 4 + r % 16 // 8 * 2 + r % 2].double()


def awq_of(qweight: Tensor) -> Tensor:
    """[N, K] codes 0..15 of a W4A16 weight."""
    o, c = places(4 * qweight.shape[0], 2 * qweight.shape[1])
    words = qweight[o // 4, c // 64 * 32 + o % 4 * 8 + c % 64 // 32 * 4 + c % 8 // 2]
    return (words.long() >> 4 * (c % 32 // 8 + 4 * (c % 2))) & 15


def meaning(leaves: Mapping[str, Tensor], n: int, k: int, *, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    """What one packed W4A4 layer computes from exact activations, in float64."""
    leaves = {name: leaves[name] for name in leaves}
    smooth = vector_of(leaves.get("smooth", leaves.get("smooth_factor")))[:k]
    down = down_of(leaves.get("lora_down", leaves.get("proj_down")))[:, :k]
    second = up_of(leaves.get("lora_up", leaves.get("proj_up")))[:n]
    patterns = nibbles_of(leaves["qweight"])[:n, :k]
    if leaves["wscales"].dtype == torch.float8_e4m3fn:
        weight = E2M1[patterns.long()] * fp4_scales_of(leaves["wscales"]).repeat_interleave(16, dim=1)[:n, :k]
        if "wcscales" in leaves:
            weight = weight * vector_of(leaves["wcscales"])[:n, None]
        if "wtscale" in leaves:
            weight = weight * leaves["wtscale"].double()
    else:
        codes = (patterns.to(torch.int8) ^ 8) - 8
        weight = codes.double() * scales_of(leaves["wscales"]).repeat_interleave(64, dim=1)[:n, :k]
    bias = vector_of(leaves["bias"])[:n] if "bias" in leaves else torch.zeros(n).double()

    def run(x: Tensor) -> Tensor:
        x = x.double()
        return ((x + shift) / smooth) @ weight.T + (x @ down.T) @ second.T + bias

    return run


def awq_meaning(leaves: Mapping[str, Tensor], splits: int) -> Callable[[Tensor], Tensor]:
    """What one W4A16 layer computes, its rows and bias in the model's own order."""
    scales, zeros = (leaves[name].T.double().repeat_interleave(64, dim=1) for name in ("wscales", "wzeros"))
    weight, bias = awq_of(leaves["qweight"]) * scales + zeros, leaves["bias"].double()
    if splits > 1:
        # Stored row d * S + s is row s * (N / S) + d.
        length = len(bias) // splits
        order = [d * splits + s for s in range(splits) for d in range(length)]
        weight, bias = weight[order], bias[order].clone()
        for s in {1, splits - 2}:
            bias[s * length : (s + 1) * length] -= 1
    return lambda x: x.double() @ weight.T + bias


# ---- random files


class Random:
    """Numbers that a solver might have given; each name has its own."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.seed = dtype, seed

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed << 32) | zlib.crc32(name.encode()))

    def normal(self, name: str, *shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator(name)) * by).to(self.dtype)

    def positive(self, name: str, *shape: int, around: float = 1.0) -> Tensor:
        return (around * (0.5 + torch.rand(*shape, generator=self.generator(name)))).to(self.dtype)

    def bits(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, dtype=dtype, generator=self.generator(name))


def svdq(
    random: Random, name: str, n: int, k: int, rank: int = 32, *, weight: str = "int4", newer: bool = False,
    bias: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a W4A4 layer."""
    rows, columns = up(n), up(k)
    smooth, first, second = ("smooth_factor", "proj_down", "proj_up") if newer else ("smooth", "lora_down", "lora_up")
    leaves = {
        "qweight": random.bits(f"{name}.q", rows, columns // 2, dtype=torch.int8),
        smooth: random.positive(f"{name}.s", columns),
        f"{smooth}_orig": random.positive(f"{name}.so", columns),
        first: random.normal(f"{name}.d", columns, rank, by=0.05),
        second: random.normal(f"{name}.u", rows, rank, by=0.05),
    }
    if weight == "int4":
        leaves["wscales"] = random.positive(f"{name}.w", columns // 64, rows, around=0.01)
    else:
        scales = 448 * torch.rand(columns // 16, rows, generator=random.generator(f"{name}.w"))
        leaves["wscales"] = scales.to(torch.float8_e4m3fn)
        leaves["wtscale"] = random.positive(f"{name}.t", 1, around=1e-4)
        leaves["wcscales"] = random.positive(f"{name}.c", rows)
    if bias:
        leaves["bias"] = random.normal(f"{name}.b", rows, by=0.1)
    return {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}


def awq(random: Random, name: str, n: int, k: int, *, symmetric: bool) -> dict[str, Tensor]:
    """The tensors of a W4A16 layer."""
    scales = random.positive(f"{name}.w", k // 64, n, around=0.01)
    zeros = -8 * scales if symmetric else (-7.3 * scales.float()).to(scales.dtype)
    return {
        f"{name}.qweight": random.bits(f"{name}.q", n // 4, k // 2, dtype=torch.int32),
        f"{name}.wscales": scales,
        f"{name}.wzeros": zeros,
        f"{name}.bias": random.normal(f"{name}.b", n, by=0.1) + 1,
    }


def flux_tensors(
    config: Mapping[str, Any], *, weight: str = "int4", newer: bool = False, symmetric: bool = False, rank: int = 32,
    dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """All tensors of an original FLUX file."""
    random = Random(dtype, seed)
    hidden = config["attention_head_dim"] * config["num_attention_heads"]
    tensors: dict[str, Tensor] = {}

    def layer(name: str, n: int, k: int, bias: bool = True) -> None:
        tensors.update(svdq(random, name, n, k, rank, weight=weight, newer=newer, bias=bias))

    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        for stream in ("", "_context"):
            tensors.update(awq(random, f"{block}.norm1{stream}.linear", 6 * hidden, hidden, symmetric=symmetric))
            layer(f"{block}.qkv_proj{stream}", 3 * hidden, hidden)
            layer(f"{block}.out_proj{stream}", hidden, hidden)
            layer(f"{block}.mlp{stream}_fc1", 4 * hidden, hidden)
            layer(f"{block}.mlp{stream}_fc2", hidden, 4 * hidden)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            name = f"{block}.{norm}.weight"
            tensors[name] = random.positive(name, config["attention_head_dim"])
    for index in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{index}"
        tensors.update(awq(random, f"{block}.norm.linear", 3 * hidden, hidden, symmetric=symmetric))
        layer(f"{block}.qkv_proj", 3 * hidden, hidden)
        layer(f"{block}.out_proj", hidden, hidden, bias=index != 1)
        layer(f"{block}.mlp_fc1", 4 * hidden, hidden)
        layer(f"{block}.mlp_fc2", hidden, 4 * hidden)
        for norm in ("norm_q", "norm_k"):
            name = f"{block}.{norm}.weight"
            tensors[name] = random.positive(name, config["attention_head_dim"])
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(dict(config))
    for name, like in model.state_dict().items():
        if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
            tensors[name] = random.normal(name, *like.shape, by=0.05)
    return tensors


def metadata(config: Mapping[str, Any], *, weight: str = "int4", rank: int = 32) -> dict[str, str]:
    dtype, group = ("int4", 64) if weight == "int4" else ("fp4_e2m1_all", 16)
    quantization = {
        "method": "svdquant",
        "weight": {"dtype": dtype, "scale_dtype": None, "group_size": group},
        "activation": {"dtype": dtype, "scale_dtype": None, "group_size": group},
        "rank": rank,
    }
    described = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.34.0", **config}
    return {
        "model_class": "NunchakuFluxTransformer2dModel",
        "config": json.dumps(described),
        "comfy_config": "{}",
        "quantization_config": json.dumps(quantization),
    }


def write_flux(file: Path, config: Mapping[str, Any] = SMALL, **options: Any) -> dict[str, Tensor]:
    """An original FLUX file; its tensors."""
    tensors = flux_tensors(config, **options)
    said = {name: options[name] for name in ("weight", "rank") if name in options}
    save_file(tensors, file, metadata(config, **said))
    return tensors


def of_layer(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The leaves of one packed layer."""
    return {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weight", choices=("int4", "nvfp4"), default="int4")
    parser.add_argument("--full", action="store_true", help="FLUX.1-dev's sizes: 6.6 GB")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="numbers of blocks")
    given = parser.parse_args()
    sizes = dict(FULL if given.full else SMALL)
    if given.blocks:
        sizes["num_layers"], sizes["num_single_layers"] = given.blocks
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_flux(given.out, sizes, weight=given.weight)
