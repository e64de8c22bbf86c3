"""Bittern's own checkpoint: canonical tensors, independent of any kernel.

Per target T: `T.codes`, `T.scales`, and as the scheme says `T.smooth`, `T.down`, `T.up`; `T.bias` is an ordinary
parameter, which a target may have where the model's class gives it none (`Target.bias`). A group's `smooth` and `down`
are stored once, under its first member. Everything else in the files belongs to the layers that were kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern import formats
from bittern.checkpoints.config import QUANT_METHOD, CheckpointConfig
from bittern.checkpoints.files import MEND, TensorSpec
from bittern.errors import UserError

Headers = Mapping[str, tuple[Path, TensorSpec]]


def is_few_bit(config: Mapping[str, Any]) -> bool:
    """Whether a model's `config.json` says that bittern quantized it."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def on_disk(state: Mapping[str, TensorSpec], config: CheckpointConfig) -> dict[str, TensorSpec]:
    """What a checkpoint holds, from the state dict of the model (quantized or not) that it is made of."""
    specs = {
        f"{path}.{leaf}": TensorSpec(*spec) for path in config.targets for leaf, spec in config.leaves(path).items()
    }
    kept = {name: spec for name, spec in state.items() if not is_leaf(name, config)}
    gained = {
        f"{path}.bias": TensorSpec(target.shape[:1], state[f"{path}.weight"].dtype)
        for path, target in config.targets.items()
        if target.bias and f"{path}.bias" not in kept
    }
    return {**kept, **gained, **specs}


def to_disk(state: Mapping[str, Tensor], config: CheckpointConfig) -> dict[str, Tensor]:
    """The tensors to write for a quantized model's state dict.

    Drops the logical weights and what only memory needs, packs codes for the disk, and gives every tensor memory
    of its own, because sharding counts tensors that share a buffer only once.

    Raises:
        UserError: if a quantized layer wears an adapter, which moves its tensors to other names.
    """
    kept = {name: tensor for name, tensor in state.items() if not is_leaf(name, config)}
    for path in config.targets:
        if f"{path}.codes" not in state:
            raise UserError(f"{path} wears an adapter: unload it before saving, and save the adapter by itself")
        for leaf in config.leaves(path):
            tensor = state[f"{path}.{leaf}"]
            if leaf == "codes":
                tensor = _repack(tensor, config, path, to_disk=True)
            shares = tensor.untyped_storage().nbytes() != tensor.nbytes
            kept[f"{path}.{leaf}"] = tensor.clone() if shares else tensor
    return kept


def from_disk(tensor: Tensor, leaf: str, path: str, config: CheckpointConfig) -> Tensor:
    """A target's tensor as its layer holds it."""
    return _repack(tensor, config, path, to_disk=False) if leaf == "codes" else tensor


def surplus(name: str, file: Path, known: Iterable[str]) -> UserError:
    """What is wrong with a tensor of no layer."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "remove it"
    return UserError(f"tensor {name!r} in {file.name} belongs to no layer: {hint}")


def check_headers(headers: Headers, config: CheckpointConfig, others: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a checkpoint whose tensors are not exactly the expected ones; reads no values.

    Args:
        headers: What the files hold.
        config: What the targets need.
        others: Shapes of the model's other parameters and buffers, whose dtype is free.

    Raises:
        UserError: for the first tensor that is missing, surplus, or of a wrong shape or dtype.
    """
    expected = {
        f"{path}.{leaf}": TensorSpec(*spec) for path in config.targets for leaf, spec in config.leaves(path).items()
    }
    names = {**others, **expected}
    for name in names:
        if name not in headers:
            raise UserError(f"tensor {name!r} is missing from the checkpoint: {MEND}")
    for name, (file, spec) in headers.items():
        if name not in names:
            raise surplus(name, file, names)
        shape = expected[name].shape if name in expected else others[name]
        if spec.shape != shape:
            raise UserError(
                f"tensor {name!r} in {file.name} has shape {list(spec.shape)}: expected {list(shape)}; "
                "the file does not belong to its config.json"
            )
        if name in expected and spec.dtype != expected[name].dtype:
            raise UserError(
                f"tensor {name!r} in {file.name} has dtype {spec.dtype}: expected {expected[name].dtype}; "
                "the file does not belong to its config.json"
            )
        if name not in expected and not spec.dtype.is_floating_point:
            raise UserError(f"tensor {name!r} in {file.name} has dtype {spec.dtype}: expected a float type; {MEND}")


def check_values(headers: Headers, config: CheckpointConfig) -> None:
    """Refuses codes out of range and numbers that are not finite, file by file, on the CPU.

    Raises:
        UserError: for the first tensor that holds such a value.
    """
    from safetensors import safe_open

    names: dict[Path, list[tuple[str, str]]] = {}
    for path in config.targets:
        for leaf in config.leaves(path):
            names.setdefault(headers[f"{path}.{leaf}"][0], []).append((path, leaf))
    for file, leaves in names.items():
        with safe_open(file, framework="pt") as handle:
            for path, leaf in leaves:
                name = f"{path}.{leaf}"
                found = _problem(handle.get_tensor(name), leaf, path, config)
                if found:
                    raise UserError(f"tensor {name!r} in {file.name}: {found}")


def check_value(name: str, tensor: Tensor, config: CheckpointConfig) -> None:
    """Refuses values that a tensor made of another file cannot have, of a target or not.

    Raises:
        UserError: naming the tensor.
    """
    path, _, leaf = name.rpartition(".")
    wrong = _problem(tensor, leaf, path, config) if path in config.targets else _not_finite(tensor)
    if wrong:
        raise UserError(f"tensor {name!r}, as converted: {wrong}")


def _problem(tensor: Tensor, leaf: str, path: str, config: CheckpointConfig) -> str | None:
    if leaf == "codes":
        try:
            packing = formats.get_packing(str(config.scheme(path).packing))
            packing.check(tensor, _padded_k(config, path))
        except UserError as error:
            return str(error)
        return None
    if wrong := _not_finite(tensor):
        return wrong
    if leaf == "smooth" and not bool((tensor > 0).all()):
        return f"smoothing divides by it, so expected values above 0: {MEND}"
    return None


def _not_finite(tensor: Tensor) -> str | None:
    bad = int((~torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)).sum())
    return f"{bad} of {tensor.numel()} values are NaN or infinite: {MEND}" if bad else None


def is_leaf(name: str, config: CheckpointConfig) -> bool:
    """Whether a tensor is a target's, its bias aside."""
    path, _, leaf = name.rpartition(".")
    return path in config.targets and leaf != "bias"


def _padded_k(config: CheckpointConfig, path: str) -> int:
    return config.scheme(path).layout(config.k_segments(path)).padded_k


def _repack(codes: Tensor, config: CheckpointConfig, path: str, *, to_disk: bool) -> Tensor:
    scheme = config.scheme(path)
    memory, disk = scheme.format.packing, formats.get_packing(str(scheme.packing))
    if memory is disk:
        return codes
    source, sink = (memory, disk) if to_disk else (disk, memory)
    return sink.pack(source.unpack(codes, _padded_k(config, path)))
