"""What a packed model says of itself: the metadata of an original file, the `quantization_config` of a Lite folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittern.checkpoints.files import MEND
from bittern.checkpoints.nunchaku.units import MODEL_CLASSES
from bittern.errors import UserError, did_you_mean

LITE_METHOD = "nunchaku_lite"
_METHOD = "svdquant"
_DTYPES = ("bfloat16", "float16", "float32")
_WEIGHTS = {"int4": ("int4", 64), "fp4_e2m1_all": ("nvfp4", 16)}


@dataclass(frozen=True)
class Original:
    """The description in an original file.

    Attributes:
        class_name: The diffusers class; None if the file does not say.
        config: Its config; None if the file has none.
        weight: "int4" or "nvfp4"; None if the file does not say.
        rank: Of the branches; None if the file does not say.
    """

    class_name: str | None
    config: dict[str, Any] | None
    weight: str | None
    rank: int | None


def original(file: Path) -> Original:
    """The description in an original file's metadata.

    Raises:
        UserError: if the file describes a model that is not FLUX, or another quantization.
    """
    metadata = _metadata(file)
    kind = metadata.get("model_class")
    if kind is not None and kind not in MODEL_CLASSES:
        raise UserError(f"{file} holds a {kind}, whose layers are not known here: {did_you_mean(kind, MODEL_CLASSES)}")
    config = _mapping(metadata, "config", file)
    named = None if config is None else config.get("_class_name")
    class_name = MODEL_CLASSES[kind] if kind is not None else named if isinstance(named, str) else None
    quantization = _mapping(metadata, "quantization_config", file)
    if quantization is None:
        return Original(class_name, config, None, None)
    weight = _quantization(quantization, file)
    rank = quantization.get("rank")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UserError(f"{file}: quantization_config has rank {rank!r}: expected a positive whole number; {MEND}")
    return Original(class_name, config, weight, rank)


def describe(
    class_name: str, config: Mapping[str, Any], weight: str, rank: int, defaults: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of an original file.

    Args:
        class_name: The diffusers class.
        config: Its config, as it is stored.
        weight: "int4" or "nvfp4".
        rank: Of the branches.
        defaults: What the class takes for keys that the config does not have.
    """
    name = next(name for name, diffusers_name in MODEL_CLASSES.items() if diffusers_name == class_name)
    dtype, group = next((dtype, group) for dtype, (known, group) in _WEIGHTS.items() if known == weight)
    quantization = {
        "method": _METHOD,
        "weight": {
            "dtype": dtype,
            "scale_dtype": None if weight == "int4" else [None, "fp8_e4m3_nan"],
            "group_size": group,
        },
        "activation": {
            "dtype": dtype,
            "scale_dtype": None if weight == "int4" else "fp8_e4m3_nan",
            "group_size": group,
        },
        "rank": rank,
    }
    return {
        "model_class": name,
        "config": json.dumps(dict(config), sort_keys=True),
        "comfy_config": json.dumps(_comfy({**defaults, **config}), sort_keys=True),
        "quantization_config": json.dumps(quantization),
    }


def _comfy(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Nunchaku's loader for ComfyUI asks for: ComfyUI's own class of model, and its sizes there.

    ComfyUI counts channels before 2 x 2 latents are joined, and knows FLUX without a guidance embedding as Schnell,
    which is sampled in another way.
    """
    heads = config["num_attention_heads"]
    return {
        "model_class": "Flux" if config["guidance_embeds"] else "FluxSchnell",
        "model_config": {
            "image_model": "flux",
            "in_channels": config["in_channels"] // _JOINED,
            "out_channels": (config["out_channels"] or config["in_channels"]) // _JOINED,
            "patch_size": 2,
            "vec_in_dim": config["pooled_projection_dim"],
            "context_in_dim": config["joint_attention_dim"],
            "hidden_size": heads * config["attention_head_dim"],
            "mlp_ratio": 4.0,
            "num_heads": heads,
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "axes_dim": list(config["axes_dims_rope"]),
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": config["guidance_embeds"],
            "disable_unet_model_creation": True,
        },
    }


_JOINED = 4
"""Latents that make one token."""


def _metadata(file: Path) -> Mapping[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): {MEND}") from None


def _mapping(metadata: Mapping[str, str], key: str, file: Path) -> dict[str, Any] | None:
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key} in its metadata is no JSON mapping: {MEND}")
    return value


def _quantization(quantization: Mapping[str, Any], file: Path) -> str:
    method = quantization.get("method")
    if method != _METHOD:
        raise UserError(f"{file} was quantized by the method {method!r}: expected {_METHOD!r}")
    weight = quantization.get("weight")
    dtype = weight.get("dtype") if isinstance(weight, Mapping) else None
    if not isinstance(weight, Mapping) or dtype not in _WEIGHTS:
        raise UserError(f"{file} has weights of dtype {dtype!r}: {did_you_mean(str(dtype), _WEIGHTS)}")
    name, group = _WEIGHTS[str(dtype)]
    if weight.get("group_size", group) != group:
        raise UserError(f"{file} has {dtype} weights in groups of {weight['group_size']}: expected {group}")
    activation = quantization.get("activation", {})
    theirs = activation.get("dtype", dtype) if isinstance(activation, Mapping) else activation
    if theirs != dtype:
        raise UserError(f"{file} has {dtype} weights and activations of dtype {theirs!r}: expected {dtype!r}")
    return name


@dataclass(frozen=True)
class Lite:
    """The `quantization_config` of a Lite model; it says which layers are which.

    Attributes:
        weight: "int4" or "nvfp4".
        rank: Of the branches; None without W4A4 layers.
        targets: W4A4 layers.
        awq: W4A16 layers.
        dtype: Torch's name of the floats.
    """

    weight: str
    rank: int | None
    targets: tuple[str, ...]
    awq: tuple[str, ...]
    dtype: str

    @property
    def expected(self) -> dict[str, Any]:
        """What `incoming` holds the file against."""
        return {"weight": self.weight if self.targets else None, "rank": self.rank}

    def dump(self) -> dict[str, Any]:
        """The mapping for `config.json`."""
        out: dict[str, Any] = {"quant_method": LITE_METHOD, "compute_dtype": self.dtype}
        if self.targets:
            group = 64 if self.weight == "int4" else 16
            out["svdq_w4a4"] = {
                "precision": self.weight,
                "group_size": group,
                "rank": self.rank,
                "targets": list(self.targets),
            }
        if self.awq:
            out["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": list(self.awq)}
        return out


def is_lite(config: Mapping[str, Any]) -> bool:
    """Whether a model's `config.json` says that it is packed for Nunchaku Lite."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == LITE_METHOD


def lite(quantization: Mapping[str, Any], where: str) -> Lite:
    """A Lite model's description.

    Raises:
        UserError: for an unknown key, a precision or a group that Lite does not have, or no targets.
    """
    known = ("quant_method", "compute_dtype", "svdq_w4a4", "awq_w4a16", "pre_quantized")
    for key in quantization:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r} in quantization_config: {did_you_mean(key, known)}")
    dtype = str(quantization.get("compute_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise UserError(f"{where}: quantization_config has compute_dtype {dtype!r}: {did_you_mean(dtype, _DTYPES)}")
    svdq, awq = (_section(quantization, name, where) for name in ("svdq_w4a4", "awq_w4a16"))
    if not svdq and not awq:
        raise UserError(f"{where}: quantization_config names no targets: expected svdq_w4a4 or awq_w4a16")
    weight, rank = "int4", None
    if svdq:
        groups = {"int4": 64, "nvfp4": 16}
        weight, rank = str(svdq.get("precision")), svdq.get("rank")
        if weight not in groups:
            raise UserError(f"{where}: svdq_w4a4 has precision {weight!r}: {did_you_mean(weight, groups)}")
        if svdq.get("group_size") != groups[weight]:
            raise UserError(f"{where}: svdq_w4a4 has group_size {svdq.get('group_size')!r}: expected {groups[weight]}")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UserError(f"{where}: svdq_w4a4 has rank {rank!r}: expected a positive whole number")
    if awq and (awq.get("precision"), awq.get("group_size")) != ("int4", 64):
        raise UserError(
            f"{where}: awq_w4a16 is {awq.get('precision')!r} in groups of {awq.get('group_size')!r}: "
            "expected 'int4' in groups of 64"
        )
    return Lite(weight, rank, tuple(svdq.get("targets", ())), tuple(awq.get("targets", ())), dtype)


def _section(quantization: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = quantization.get(name) or {}
    targets = section.get("targets", []) if isinstance(section, Mapping) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{where}: {name} has no list of targets: expected paths of layers")
    if section and not targets:
        raise UserError(f"{where}: {name} has an empty list of targets: leave the section out")
    return section
