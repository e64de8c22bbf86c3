"""bittern: few-bit diffusion models.

Importing it costs nothing and registers it with diffusers: at once if diffusers is loaded, otherwise when it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bittern.errors import BitternError, UserError
from bittern.integrations.import_hook import install as _install

if TYPE_CHECKING:
    from bittern.distillation import Distilled, distill
    from bittern.integrations.cuda_graphs import CudaGraphs, disable_cuda_graphs, enable_cuda_graphs
    from bittern.integrations.diffusers import QuantizationConfig
    from bittern.integrations.fused_folders import save_fused
    from bittern.integrations.loras import fuse_loras, set_lora_strengths, unfuse_loras
    from bittern.ops import use_backend
    from bittern.pipelines import load_loras
    from bittern.quantization import Report, inspect, predict, predict_size, quantize
    from bittern.recipes import Recipe

__version__ = "0.1.0"

__all__ = [
    "BitternError",
    "CudaGraphs",
    "Distilled",
    "QuantizationConfig",
    "Recipe",
    "Report",
    "UserError",
    "__version__",
    "disable_cuda_graphs",
    "distill",
    "enable_cuda_graphs",
    "fuse_loras",
    "inspect",
    "load_loras",
    "predict",
    "predict_size",
    "quantize",
    "save_fused",
    "set_lora_strengths",
    "unfuse_loras",
    "use_backend",
]

_HOMES = {
    "CudaGraphs": "bittern.integrations.cuda_graphs",
    "Distilled": "bittern.distillation",
    "QuantizationConfig": "bittern.integrations.diffusers",
    "Recipe": "bittern.recipes",
    "Report": "bittern.quantization",
    "disable_cuda_graphs": "bittern.integrations.cuda_graphs",
    "distill": "bittern.distillation",
    "enable_cuda_graphs": "bittern.integrations.cuda_graphs",
    "fuse_loras": "bittern.integrations.loras",
    "inspect": "bittern.quantization",
    "load_loras": "bittern.pipelines",
    "predict": "bittern.quantization",
    "predict_size": "bittern.quantization",
    "quantize": "bittern.quantization",
    "save_fused": "bittern.integrations.fused_folders",
    "set_lora_strengths": "bittern.integrations.loras",
    "unfuse_loras": "bittern.integrations.loras",
    "use_backend": "bittern.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bittern' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


_install()
