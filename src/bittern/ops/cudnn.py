"""8-bit attention by cuDNN, through NVIDIA's `nvidia-cudnn-frontend`; the numbers are in `bittern.ops.attention`.

A graph is built once for each shape and thread, with cuDNN's own choice of kernel, and is executed on torch's current
stream with a workspace of torch's allocator. Building takes memory and time of the device, so a CUDA graph can be
captured only of shapes that were computed before.

Of the package this needs what 1.16 to 1.27 have: `pygraph` with `tensor` and `sdpa_fp8`, `execute` by uid, handles.
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bittern.errors import UserError
from bittern.ops.attention import INSTALL, SOFTMAX_SCALE

_MOST_GRAPHS = 64


class _Uid(IntEnum):
    Q = 1
    K = 2
    V = 3
    O = 4  # noqa: E741
    DESCALE_Q = 10
    DESCALE_K = 11
    DESCALE_V = 12
    DESCALE_S = 13
    SCALE_S = 14
    SCALE_O = 15
    AMAX_S = 16
    AMAX_O = 17


_SCALARS = (
    _Uid.DESCALE_Q,
    _Uid.DESCALE_K,
    _Uid.DESCALE_V,
    _Uid.DESCALE_S,
    _Uid.SCALE_S,
    _Uid.SCALE_O,
    _Uid.AMAX_S,
    _Uid.AMAX_O,
)
"""In the order in which the kernels lay them down; the last two are cuDNN's, and nobody reads them."""


class Problem(NamedTuple):
    """What a graph is built for: a device, sizes, and what multiplies products of queries and keys."""

    device: int
    images: int
    tokens: int
    key_tokens: int
    heads: int
    size: int
    scale: float


class _Built(NamedTuple):
    graph: Any
    workspace: int


class _Here(threading.local):
    """This thread's handles, one a device, and its graphs: a handle has one stream at a time."""

    def __init__(self) -> None:
        self.handles: dict[int, Any] = {}
        self.graphs: OrderedDict[Problem, _Built] = OrderedDict()


_here = _Here()


def attention_8bit(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """As `bittern.ops.attention.attention_8bit`, for what it does not refuse.

    Raises:
        UserError: if cuDNN refuses it, or its first call is while a CUDA graph is captured.
    """
    kernels: Any = importlib.import_module("bittern.ops.triton.attention")
    images, tokens, heads, size = q.shape
    device = q.get_device()
    problem = Problem(device, images, tokens, k.shape[1], heads, size, size**-0.5 if scale is None else scale)
    with torch.cuda.device(device):
        built = _built(problem)
        codes = [torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in (q, k, v, q)]
        scalars = torch.empty(len(_SCALARS), kernels.SLOT, device=q.device)
        kernels.quantize(q, k, v, codes[:3], scalars, SOFTMAX_SCALE)
        execute(built, problem, codes, scalars)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kernels.dequantize(codes[3], scalars[_SCALARS.index(_Uid.SCALE_O)], out)
    return out


def execute(built: _Built, problem: Problem, codes: list[Tensor], scalars: Tensor) -> None:
    """Attention of codes, on the current stream of the current device.

    Args:
        built: What `build` gave for the problem.
        problem: The problem.
        codes: e4m3, contiguous [b, l, h, d]: queries, keys, values, and the results, which are filled.
        scalars: float32, a row for each of `_SCALARS`, at a multiple of 16 bytes.
    """
    pack = dict(zip((int(uid) for uid in (_Uid.Q, _Uid.K, _Uid.V, _Uid.O)), codes, strict=True))
    pack |= {int(uid): scalars[i] for i, uid in enumerate(_SCALARS)}
    workspace = torch.empty(max(1, built.workspace), dtype=torch.uint8, device=scalars.device)
    built.graph.execute(pack, workspace, handle=_handle(problem.device))


def _built(problem: Problem) -> _Built:
    graphs = _here.graphs
    if problem in graphs:
        graphs.move_to_end(problem)
        return graphs[problem]
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            f"8-bit attention of {problem.tokens} to {problem.key_tokens} tokens is computed for the first time while "
            "a CUDA graph is captured: call the model once with these shapes before"
        )
    graphs[problem] = build(problem)
    if len(graphs) > _MOST_GRAPHS:
        # Inputs of ever new lengths must not fill the memory.
        graphs.popitem(last=False)
    return graphs[problem]


def build(problem: Problem) -> _Built:
    """CuDNN's plan for a problem on the current device.

    Raises:
        UserError: with cuDNN's reason for not having one.
    """
    cudnn = _package()
    graph = describe(problem, handle=_handle(problem.device))
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except (RuntimeError, ValueError, cudnn.cudnnGraphNotSupportedError) as error:
        # What follows the first line is about each of its engines.
        said = str(error).splitlines()[0].strip(" _")[:200]
        raise UserError(
            f"cuDNN {cudnn.backend_version_string()} has no 8-bit attention for {problem.images} x {problem.heads} "
            f"heads of {problem.size}, {problem.tokens} to {problem.key_tokens} tokens here: {said}"
        ) from error
    return _Built(graph, graph.get_workspace_size())


def describe(problem: Problem, **options: Any) -> Any:
    """The problem as a graph of cuDNN's, not built yet.

    Args:
        problem: What it computes.
        options: More for cuDNN's `pygraph`.
    """
    cudnn = _package()
    e4m3, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=e4m3, intermediate_data_type=single, compute_data_type=single, name="attention_8bit", **options
    )

    def layout(tokens: int) -> dict[str, list[int]]:
        """Of [b, l, h, d] as cuDNN wants it, by image, head, token and place."""
        heads, size = problem.heads, problem.size
        return {
            "dim": [problem.images, heads, tokens, size],
            "stride": [tokens * heads * size, size, heads * size, 1],
        }

    def operand(uid: _Uid, tokens: int) -> Any:
        return graph.tensor(uid=int(uid), name=uid.name.lower(), data_type=e4m3, **layout(tokens))

    def scalar(uid: _Uid) -> Any:
        return graph.tensor(
            uid=int(uid), name=uid.name.lower(), data_type=single, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1]
        )

    out, _, amax_s, amax_o = graph.sdpa_fp8(
        q=operand(_Uid.Q, problem.tokens),
        k=operand(_Uid.K, problem.key_tokens),
        v=operand(_Uid.V, problem.key_tokens),
        **{uid.name.lower(): scalar(uid) for uid in _SCALARS[:6]},
        attn_scale=problem.scale,
        generate_stats=False,
        name="attention",
    )
    where = layout(problem.tokens)
    out.set_uid(int(_Uid.O)).set_output(True).set_data_type(e4m3).set_dim(where["dim"]).set_stride(where["stride"])
    for uid, amax in ((_Uid.AMAX_S, amax_s), (_Uid.AMAX_O, amax_o)):
        amax.set_uid(int(uid)).set_output(True).set_data_type(single).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1])
    return graph


def _handle(device: int) -> Any:
    """This thread's handle of the current device, on torch's current stream."""
    cudnn = _package()
    if device not in _here.handles:
        _here.handles[device] = cudnn.create_handle()
    handle = _here.handles[device]
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _package() -> Any:
    try:
        return importlib.import_module("cudnn")
    except (ImportError, OSError) as error:
        raise UserError(f"nvidia-cudnn-frontend cannot be loaded ({error}): {INSTALL}") from error
