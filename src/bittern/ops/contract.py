"""The operations as torch sees them: schemas, shapes, gradients; implementations come from the registry.

They are opaque to the compiler: `torch.compile(fullgraph=True)`, CUDA graphs and `torch.export` carry them
whole. A schema is a promise to every exported graph, so it changes only with a new name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from bittern import formats
from bittern.errors import UserError
from bittern.ops import dispatch, reference
from bittern.scheme import ACTIVATION_GROUP

# What torch knows of who watches has no public names.
_torch: Any = torch
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_TENSORS = "Tensor codes, Tensor scales, Tensor? smooth, Tensor? down, Tensor? up"

library = torch.library.Library("bittern", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
library.define(
    f"few_bit_linear(Tensor[] inputs, {_TENSORS}, Tensor? bias, "
    "str weight, int? group_size, str path, float[] shift, int? gelu_from) -> Tensor",
    tags=_TAGS,
)
library.define(
    f"few_bit_linear_backward(Tensor grad, {_TENSORS}, str weight, int? group_size, int[] segments) -> Tensor",
    tags=_TAGS,
)
library.define(
    f"dequantize({_TENSORS}, str weight, int? group_size, int[] segments, ScalarType dtype) -> Tensor",
    tags=_TAGS,
)
library.define(
    "quantize_activations(Tensor x, Tensor? smooth, Tensor? down, str format, float shift) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def few_bit_linear(
    inputs: Sequence[Float[Tensor, "*batch _"]],
    codes: UInt8[Tensor, "n _"],
    scales: Float[Tensor, "n groups"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    up: Float[Tensor, "n r"] | None,
    bias: Float[Tensor, " n"] | None,
    weight: str,
    group_size: int | None,
    path: str,
    shift: Sequence[float] = (),
    gelu_from: int | None = None,
) -> Float[Tensor, "*batch n"]:
    """A few-bit linear layer, or several that share an input, with their rows stacked.

    Differentiable in `inputs` (straight through the rounding) and in `bias`, and in nothing else.

    Args:
        inputs: One tensor per K-segment, alike but for their last axis; bf16, fp16 or fp32.
        codes: Packed codes of the residual weight, in the format's memory packing.
        scales: One per row and group of K; of nvfp4 the combined ones (`formats.nvfp4.combine`).
        smooth: Divides the inputs; all K inputs in one vector.
        down: First factor of the low-rank branch, which reads the inputs as they are.
        up: Second factor.
        bias: Added to the output.
        weight: Weight format, "int4", "nvfp4" or "ternary".
        group_size: Inputs under one scale; None for one scale per row and segment.
        path: The arithmetic: "a16", "a8-int8", "a8-fp8", "a8-fp8-folded" or "a4".
        shift: What the a4 path adds to each segment before unsigned rounding; empty for none.
        gelu_from: The first of the outputs that pass through a GELU (its tanh form) before they are rounded; None
            for none.

    Returns:
        The outputs, in the dtype of the inputs. `bittern.ops.reference` defines the numbers.

    Raises:
        UserError: if shapes or dtypes do not fit together, or no backend computes the path here.
    """
    if isinstance(inputs, Tensor) or not inputs:
        raise UserError("inputs: expected a list with a tensor for each K-segment")
    tensors = (*inputs, codes, scales, smooth, down, up, bias)
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not graded and _is_unwatched(tensors):
        return _run_linear(inputs, codes, scales, smooth, down, up, bias, weight, group_size, path, shift, gelu_from)
    trained = graded and any(t is not None and t.requires_grad for t in (*inputs, bias))
    # The backward pass wants what goes into the GELU.
    y = torch.ops.bittern.few_bit_linear.default(
        inputs, codes, scales, smooth, down, up, bias, weight, group_size, path, shift, None if trained else gelu_from
    )
    if gelu_from is None or not trained:
        return y
    return torch.cat([y[..., :gelu_from], functional.gelu(y[..., gelu_from:], approximate="tanh")], dim=-1)


def _is_unwatched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call may go straight to its implementation, which saves the host a third of its time.

    The dispatcher is there for compilers, modes, transforms, subclasses of tensors, the profiler and other devices.
    """
    first = tensors[0]
    return (first is not None and (first.is_cpu or first.is_cuda)) and not (
        torch.compiler.is_compiling()
        or _torch.jit.is_tracing()
        or _torch._C._len_torch_dispatch_stack()
        or _torch._C._len_torch_function_stack()
        or _torch._C._functorch.maybe_current_level() is not None
        or _torch.autograd.forward_ad._current_level >= 0
        or _torch.autograd._profiler_enabled()
        or not _PLAIN.issuperset(map(type, tensors))
    )


def quantize_activations(
    x: Float[Tensor, "*batch k"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    format: str,
    shift: float = 0.0,
) -> tuple[Shaped[Tensor, "*batch _"], Float[Tensor, "*batch groups"], Float[Tensor, "*batch r"]]:
    """A layer's prologue on one K-segment, in one read of x.

    Args:
        x: Inputs of the segment.
        smooth: Divides them.
        down: First factor of the low-rank branch, which reads x as it is.
        format: "int8" or "fp8": one scale per token. "int4" or "uint4": one per token and 64 inputs, K
            filled up with zeros.
        shift: Added before the division, with "uint4" only.

    Returns:
        Codes: int8 or float8_e4m3fn of x's shape, or uint8 with two codes a byte, low nibble = even k.
        Scales: float32, one per token, or per token and group.
        Low: x · down^T in float32; without `down` it has no columns.
    """
    return torch.ops.bittern.quantize_activations.default(x, smooth, down, format, shift)


def dequantize(
    codes: UInt8[Tensor, "n _"],
    scales: Float[Tensor, "n groups"],
    smooth: Float[Tensor, " k"] | None,
    down: Float[Tensor, "r k"] | None,
    up: Float[Tensor, "n r"] | None,
    weight: str,
    group_size: int | None,
    segments: Sequence[int],
    dtype: torch.dtype,
) -> Float[Tensor, "n k"]:
    """The weight that a layer applies to exact activations: What / s + U · D, rounded once to `dtype`.

    Args:
        codes: As for `few_bit_linear`, like all that follow.
        scales: One per row and group of K.
        smooth: Divides the inputs.
        down: First factor of the low-rank branch.
        up: Second factor.
        weight: Weight format.
        group_size: Inputs under one scale.
        segments: Lengths of the K-segments.
        dtype: Of the result.
    """
    return torch.ops.bittern.dequantize.default(codes, scales, smooth, down, up, weight, group_size, segments, dtype)


def check(
    inputs: Sequence[Tensor],
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    shift: Sequence[float],
    gelu_from: int | None,
) -> None:
    """Refuses what does not fit together: kernels read memory by these shapes without looking again."""
    numbers: list[tuple[str, Any]] = [("group_size", group_size), ("gelu_from", gelu_from)]
    for name, value in numbers:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            raise UserError(f"{name} is {value!r}: expected a whole number, or None")
    if not all(math.isfinite(value) for value in shift):
        raise UserError(f"shift is {list(shift)}: expected finite numbers")
    if codes.ndim != 2:
        raise UserError(f"codes has shape {list(codes.shape)}: expected a matrix")
    n = codes.shape[0]
    check_axis(inputs)
    layout = reference.layout_of(tuple(int(x.shape[-1]) for x in inputs), group_size)
    expected = {
        "codes": (codes, (n, formats.get(weight).packing.bytes_per_row(layout.padded_k))),
        "scales": (scales, (n, layout.num_groups)),
        "smooth": (smooth, (layout.k,)),
        "down": (down, (up.shape[-1] if up is not None else 0, layout.k)),
        "up": (up, (n, down.shape[0] if down is not None else 0)),
        "bias": (bias, (n,)),
    }
    first = inputs[0]
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise UserError(f"{name} is on {tensor.device}: expected {first.device}, where the input is")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}: expected {list(shape)} for inputs of "
                f"{' + '.join(str(length) for length in layout.segments)} columns and {n} rows of codes"
            )
        if (tensor.dtype != torch.uint8) if name == "codes" else not tensor.is_floating_point():
            wanted = "torch.uint8" if name == "codes" else "a float type"
            raise UserError(f"{name} has dtype {tensor.dtype}: expected {wanted}")
    if not first.is_floating_point():
        raise UserError(f"the input has dtype {first.dtype}: expected a float type")
    if any(x.dtype != first.dtype or x.shape[:-1] != first.shape[:-1] for x in inputs[1:]):
        raise UserError("the inputs of the K-segments differ in dtype or batch shape: expected equal ones")
    if shift and len(shift) != len(inputs):
        raise UserError(f"shift has {len(shift)} values: expected {len(inputs)}, one per input, or none")
    if gelu_from is not None and not 0 <= gelu_from <= n:
        raise UserError(f"gelu_from {gelu_from}: expected one of the {n} outputs, or none")


def check_axis(inputs: Sequence[Tensor]) -> None:
    """Refuses inputs of no dimension."""
    if any(x.ndim == 0 for x in inputs):
        raise UserError("the input is a single number without an axis: expected a vector of inputs, or rows of them")


def _linear(
    inputs: Sequence[Tensor],
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    path: str,
    shift: Sequence[float],
    gelu_from: int | None,
) -> Tensor:
    tensors = [*inputs, codes, scales, smooth, down, up, bias]
    # All that a check or a choice may look at. What follows from it is worked out once.
    signature = (
        path,
        weight,
        group_size,
        len(inputs),
        tuple(shift),
        gelu_from,
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.is_meta) for t in tensors],
    )
    run = dispatch.planned(signature)
    if run is None:
        check(inputs, codes, scales, smooth, down, up, bias, weight, group_size, shift, gelu_from)
        x = inputs[0]
        call = dispatch.Call(
            weight,
            x.device.type,
            dispatch.device_capability(x.device),
            x.dtype,
            x.shape[:-1].numel(),
            group_size or 0,
            len(inputs),
            codes.shape[0],
        )
        run = dispatch.plan(signature, path, call)
    return run(inputs, codes, scales, smooth, down, up, bias, weight, group_size, path, shift, gelu_from)


def _linear_shape(
    inputs: Sequence[Tensor],
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    path: str,
    shift: Sequence[float],
    gelu_from: int | None,
) -> Tensor:
    check(inputs, codes, scales, smooth, down, up, bias, weight, group_size, shift, gelu_from)
    return inputs[0].new_empty(*inputs[0].shape[:-1], codes.shape[0])


def _backward_shape(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], sum(args[-1]))


def _dequantize_shape(codes: Tensor, *args: Any) -> Tensor:
    segments, dtype = args[-2:]
    return codes.new_empty(codes.shape[0], sum(segments), dtype=dtype)


def _dequantize(*args: Any) -> Tensor:
    dispatch.want_reference("dequantize")
    return reference.dequantize(*args)


def _quantize(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, format: str, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_axis([x])
    if format in ("int8", "fp8"):
        # The weights do not matter here: any format stands for all.
        call = dispatch.Call("int4", x.device.type, dispatch.device_capability(x.device), x.dtype, x.shape[:-1].numel())
        prologue = dispatch.select(f"a8-{format}", call).prologue
        if prologue is not None:
            return prologue(x, smooth, down, format, shift)
    else:
        dispatch.want_reference(f"quantize_activations to {format}")
    return reference.quantize_activations(x, smooth, down, format, shift)


def _quantize_shape(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, format: str, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_axis([x])
    *batch, k = x.shape
    low = x.new_empty(*batch, 0 if down is None else down.shape[0], dtype=torch.float32)
    if format in ("int8", "fp8"):
        dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
        return x.new_empty(*batch, k, dtype=dtype), x.new_empty(*batch, 1, dtype=torch.float32), low
    groups = -(-k // ACTIVATION_GROUP)
    codes = x.new_empty(*batch, groups * (ACTIVATION_GROUP // 2), dtype=torch.uint8)
    return codes, x.new_empty(*batch, groups, dtype=torch.float32), low


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    segments, codes, scales, smooth, down, up, bias, weight, group_size, _, shift, gelu_from = inputs
    ctx.has_gelu = gelu_from is not None
    ctx.save_for_backward(codes, scales, smooth, down, up)
    ctx.layout = (weight, group_size, [x.shape[-1] for x in segments])
    ctx.bias_dtype = None if bias is None else bias.dtype
    # Autograd takes an empty list for a list of tensors and wants a list of gradients back.
    ctx.shift_gradient = None if shift else []


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if ctx.has_gelu:
        raise NotImplementedError("a fused GELU has no gradient; ops.few_bit_linear takes it apart for training")
    if any(ctx.needs_input_grad[1:6]):
        raise NotImplementedError(
            "the tensors of a few-bit layer (codes, scales, smooth, down, up) have no gradient; train a LoRA"
        )
    inputs = torch.ops.bittern.few_bit_linear_backward.default(grad, *ctx.saved_tensors, *ctx.layout)
    bias = None
    if ctx.needs_input_grad[6]:
        # Not by -1: without outputs there may be any number of rows.
        rows = grad.flatten(0, -2) if grad.ndim > 1 else grad[None]
        bias = rows.sum(0).to(ctx.bias_dtype)
    gradients = [*inputs.split(ctx.layout[-1], -1)]
    return gradients, None, None, None, None, None, bias, None, None, None, ctx.shift_gradient, None


def without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Products have the types in which the numbers are defined, whatever autocast would make of them."""

    @functools.wraps(run)
    def implementation(first: Tensor | Sequence[Tensor], *args: Any) -> Any:
        kind = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(kind):
            return run(first, *args)
        with torch.autocast(kind, enabled=False):
            return run(first, *args)

    return implementation


_run_linear = without_autocast(_linear)
for _device in ("CPU", "CUDA"):
    library.impl("few_bit_linear", _run_linear, _device)
    library.impl("few_bit_linear_backward", without_autocast(reference.few_bit_linear_backward), _device)
    library.impl("dequantize", without_autocast(_dequantize), _device)
    library.impl("quantize_activations", without_autocast(_quantize), _device)
torch.library.register_fake("bittern::few_bit_linear", _linear_shape, lib=library)
torch.library.register_fake("bittern::few_bit_linear_backward", _backward_shape, lib=library)
torch.library.register_fake("bittern::dequantize", _dequantize_shape, lib=library)
torch.library.register_fake("bittern::quantize_activations", _quantize_shape, lib=library)
torch.library.register_autograd(
    "bittern::few_bit_linear", _linear_gradients, setup_context=_save_for_backward, lib=library
)
