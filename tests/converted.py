"""What the tests of conversion ask of models, in both directions."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from bittern.layers import QuantLinear

TOLERANCE = 1e-5
"""Of the output's size. Sums over K in float32 are what is left."""


def load(folder: Path) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)


def layer(model: torch.nn.Module, path: str) -> QuantLinear:
    found: Any = model.get_submodule(path)
    assert isinstance(found, QuantLinear)
    found.path = "a16"
    return found


def inputs(k: int) -> Tensor:
    return torch.randn(5, k, generator=torch.Generator().manual_seed(k)) * 3


def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Diffusers' own module of Nunchaku Lite layers; the kernels, which it would download, stay away."""
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(ops=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    for name in ("is_kernels_available", "is_kernels_version"):
        monkeypatch.setattr(diffusers.utils, name, lambda *args: True)
    monkeypatch.setattr(diffusers.utils.constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = __import__(name, fromlist=["utils"])
    monkeypatch.delitem(sys.modules, name)
    return module


def their_model(monkeypatch: pytest.MonkeyPatch, lite: Path, kind: Any) -> tuple[Any, torch.nn.Module, int]:
    """A Lite folder's model as diffusers builds it, without weights, which passes diffusers' own check of its file.

    Returns:
        Diffusers' module, the model, and how many of its layers are packed.
    """
    reader = theirs(monkeypatch)
    config = json.loads((lite / "config.json").read_text())
    described = diffusers.NunchakuLiteQuantizationConfig(
        **{key: value for key, value in config.pop("quantization_config").items() if key != "quant_method"}
    )
    with torch.device("meta"):
        model = kind.from_config(config).to(torch.bfloat16)
    count = reader.replace_with_nunchaku_linear(model, described.to_dict(), described.compute_dtype)
    stored = load_file(lite / "diffusion_pytorch_model.safetensors")
    reader.check_strict_state_dict_match(model, stored)
    for name, like in model.state_dict().items():
        assert (stored[name].shape, stored[name].dtype) == (like.shape, like.dtype), name
    return reader, model, count


def agree(y: Tensor, expected: Tensor) -> None:
    assert float((y.detach().double() - expected).norm() / expected.norm()) < TOLERANCE
