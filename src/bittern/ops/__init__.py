"""What a few-bit layer computes: the contract, the reference, and the choice of arithmetic and kernel.

A faster implementation registers a `Kernel` for a path; nothing that calls the operations changes.
"""

from __future__ import annotations

from bittern.ops import cpu, reference, triton
from bittern.ops.attention import attention_8bit
from bittern.ops.contract import dequantize, few_bit_linear, quantize_activations
from bittern.ops.dispatch import (
    PATHS,
    Call,
    Choice,
    Kernel,
    Path,
    Verdict,
    backends,
    choose_path,
    explain,
    register,
    use_backend,
)
from bittern.ops.heads import rotary_heads

for _path in PATHS:
    register(Kernel(_path, "torch", reference.few_bit_linear, native=False))
for _kernel in (*cpu.kernels(), *triton.kernels()):
    register(_kernel)

__all__ = [
    "PATHS",
    "Call",
    "Choice",
    "Kernel",
    "Path",
    "Verdict",
    "attention_8bit",
    "backends",
    "choose_path",
    "dequantize",
    "explain",
    "few_bit_linear",
    "quantize_activations",
    "register",
    "rotary_heads",
    "use_backend",
]
