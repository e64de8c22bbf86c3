"""A pipeline's denoiser as CUDA graphs: each kind of call is recorded once and replayed from then on.

In 4 bits a GPU is done with a layer before the host has launched the next; a replay launches all layers at once. The
same kernels run on the same numbers. Every recording is replayed once before it is trusted, and refused if the result
is not what the ordinary call gave, to within what a library's kernels may do from run to run.

The first call with new shapes is an ordinary one. If a second follows it is made with inputs that stay where they are,
and then recorded, which launches nothing; calls after that copy their inputs there, replay, and return copies of the
results. So a call that never comes again, such as one with a step's number among its arguments, costs nothing.

A recording knows nothing of Python. Before each replay the model is compared with what it was (`watch`), and all
recordings are let go if anything has changed but numbers within tensors. What is set outside the model (backends,
precision) belongs to the kind of call.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from bittern.graphs import Recorder
from bittern.integrations.watch import Watch
from bittern.ops.dispatch import forced_backend
from bittern.quantization import component

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Target: TypeAlias = "DiffusionPipeline | nn.Module"

MOST = 4
"""Recordings that are kept, and kinds of calls that are remembered for having been made once. No more of the latter, or
calls that come round in a longer circle would be recorded in vain each time."""

_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}
"""How far a replay may be from the call that it repeats: a library's kernels may add in another order."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def enable_cuda_graphs(pipe: Target) -> CudaGraphs | None:
    """From now on a pipeline's transformer or U-Net replays CUDA graphs, of the same kernels.

    Each new combination of shapes, dtypes and other arguments makes two ordinary calls and is recorded in the second;
    a recording that does not repeat the second's result is not used.
    Recordings are made anew when the model has changed: adapters loaded or set, paths forced, attention processors
    changed, weights moved. Strengths of fused LoRAs change in place, and recordings go on.

    Calls are ordinary ones where a graph would not do: on a CPU, with gradients, under autocast, with hooks on any
    module (offloading, caches that skip blocks). A warning says why, once. Blocks may be compiled
    (`compile_repeated_blocks`); a model that is compiled as a whole is left alone.

    Args:
        pipe: A pipeline, or its transformer or U-Net.

    Returns:
        What replays, which tells what it does; None for a model that is compiled as a whole.

    Raises:
        UserError: if there is no model to be found.
    """
    model: Any = component(pipe)
    found = _graphs_of(model)
    if found is None and (hasattr(model, "_orig_mod") or model._compiled_call_impl is not None):
        warnings.warn(
            f"{type(getattr(model, '_orig_mod', model)).__name__} is compiled as a whole and stays as it is: give "
            'torch.compile mode="reduce-overhead", or compile its blocks only, with compile_repeated_blocks()',
            stacklevel=2,
        )
        return None
    if found is None:
        # Where torch keeps what to call in place of forward and its hooks; copies and pickles are made without it.
        model._compiled_call_impl = found = CudaGraphs(model)
    return found


def disable_cuda_graphs(pipe: Target) -> None:
    """Undoes `enable_cuda_graphs`, and gives the memory back. Nothing happens where that was not asked for.

    Raises:
        UserError: if there is no model to be found.
    """
    model: Any = component(pipe)
    model = getattr(model, "_orig_mod", model)
    if found := _graphs_of(model):
        found.forget()
        model._compiled_call_impl = None


@contextmanager
def using(pipe: Target, wanted: bool = True) -> Generator[None]:
    """`enable_cuda_graphs` for the time of the block, if it is wanted; a model that has it on keeps it.

    Raises:
        UserError: if there is no model to be found.
    """
    mine = wanted and _graphs_of(component(pipe)) is None
    if mine:
        enable_cuda_graphs(pipe)
    try:
        yield
    finally:
        if mine:
            disable_cuda_graphs(pipe)


def _graphs_of(model: Any) -> CudaGraphs | None:
    found = getattr(model, "_orig_mod", model)._compiled_call_impl
    return found if isinstance(found, CudaGraphs) else None


@dataclass(frozen=True)
class _Recording:
    """A recorded call.

    Attributes:
        inputs: Tensors that it reads, without the dimensions that repeat.
        replay: Launches it.
        outputs: What it returned, flattened; tensors are those that a replay fills.
        spec: How they were nested.
    """

    inputs: Sequence[Tensor]
    replay: Callable[[], object]
    outputs: Sequence[Any]
    spec: Any


class CudaGraphs:
    """Stands in for a model's call. Made by `enable_cuda_graphs`.

    Args:
        model: Whose calls are recorded.
        recorder: Makes what records, for a device.
        device_type: Devices on which calls are recorded.

    Attributes:
        recorded: Recordings made.
        replayed: Calls that were replays.
        why_not: Why the last call was an ordinary one, if it could not have been any other.
    """

    def __init__(
        self, model: nn.Module, recorder: Callable[[torch.device], Any] = Recorder, device_type: str = "cuda"
    ) -> None:
        self._model, self._recorder_for, self._device_type = model, recorder, device_type
        self._one_at_a_time = threading.Lock()
        self._told: set[str] = set()
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._failed: dict[Hashable, str] = {}
        self._watch: Watch | None = None
        self._recorder: Any = None
        self.recorded = self.replayed = 0
        self.why_not: str | None = None

    def __repr__(self) -> str:
        why = f", ordinary calls: {self.why_not}" if self.why_not else ""
        return f"<CudaGraphs of {type(self._model).__name__}: {self.recorded} recorded, {self.replayed} replayed{why}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's answer."""
        # A compiler and somebody else's recording go through; so does a call from within a call, or from another thread
        # meanwhile.
        if torch.compiler.is_compiling() or _is_recording() or not self._one_at_a_time.acquire(blocking=False):
            return self._model._call_impl(*args, **kwargs)
        try:
            return self._answer(args, kwargs)
        finally:
            self._one_at_a_time.release()

    def forget(self) -> None:
        """Lets go of all recordings and their memory."""
        if self._recordings:
            self._recorder.finish()
        self._recordings.clear()
        self._seen.clear()
        self._failed.clear()
        self._watch = None

    def _answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        if self._watch is None or not self._watch.holds():
            self.forget()
            answer = self._ordinary(args, kwargs)
            # Not before the call: the first may keep what it needs for others.
            self._watch = Watch(self._model)
            self._meet(self._watch, leaves, spec)
            return answer
        key = self._meet(self._watch, leaves, spec)
        if key in self._recordings:
            self._recordings.move_to_end(key)
            return self._replayed(self._recordings[key], leaves)
        if key is not None and self._seen.get(key, 0) > 1:
            return self._recorded(key, leaves, spec)
        return self._ordinary(args, kwargs)

    def _meet(self, watch: Watch, leaves: Sequence[Any], spec: Any) -> Hashable | None:
        """The kind of a call, which is noted as met once more; None for one that has to be ordinary."""
        self.why_not = self._lasting(watch, leaves)
        if self.why_not is not None:
            self._tell(self.why_not)
            return None
        self.why_not = self._for_now(watch, leaves)
        if self.why_not is not None:
            return None
        key = (spec, _surroundings(), *map(_described, leaves))
        if key in self._recordings:
            return key
        self.why_not = self._failed.get(key)
        if self.why_not is not None:
            return None
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > MOST:
            self._seen.popitem(last=False)
        return key

    def _lasting(self, watch: Watch, leaves: Sequence[Any]) -> str | None:
        """Why such calls have to be ordinary ones, which a user should know."""
        if watch.hooked is not None:
            return f"{watch.hooked} has hooks (offloading, caching) or a forward of its own"
        devices = {*watch.devices, *(leaf.device for leaf in leaves if isinstance(leaf, Tensor))}
        if len(devices) != 1 or any(device.type != self._device_type for device in devices):
            where = " and ".join(sorted(map(str, devices))) or "no device"
            return f"tensors lie on {where}: expected one {self._device_type} device"
        if torch.is_autocast_enabled(self._device_type):
            return "autocast casts weights in every call"
        odd = (type(leaf) for leaf in leaves if type(leaf) not in (Tensor, nn.Parameter, *_PLAIN))
        return next((f"arguments hold a {kind.__name__}" for kind in odd), None)

    def _for_now(self, watch: Watch, leaves: Sequence[Any]) -> str | None:
        """Why this call has to be an ordinary one, which its caller knows."""
        if torch.is_grad_enabled() and (
            watch.wants_gradients() or any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))
        ):
            return "gradients are wanted"
        if torch._C._len_torch_dispatch_stack() or torch.nn.modules.module._has_any_global_hook():
            return "somebody watches all operations or modules"
        return None

    def _tell(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            warnings.warn(f"{type(self._model).__name__} is called without CUDA graphs: {why}", stacklevel=2)

    def _ordinary(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._model._call_impl(*args, **kwargs)
        except torch.OutOfMemoryError:
            if not self._recordings:
                raise
        # Out of the handler, or the failed call's tensors would still be held.
        self.forget()
        return self._model._call_impl(*args, **kwargs)

    def _recorded(self, key: Hashable, leaves: Sequence[Any], spec: Any) -> Any:
        """An ordinary call that is recorded."""
        watch = self._watch
        assert watch is not None
        del self._seen[key]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        (device,) = {*watch.devices, *(tensor.device for tensor in tensors)}
        if self._recorder is None or self._recorder.device != device:
            self._recorder = self._recorder_for(device)
        self._recorder.take_turns()
        # Tensors of the inference mode could not be written outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            inputs = [_still(tensor) for tensor in tensors]
            _fill(inputs, tensors)
            wide = iter([i.expand(tensor.shape) for i, tensor in zip(inputs, tensors, strict=True)])
            given = [next(wide) if isinstance(leaf, Tensor) else leaf for leaf in leaves]

            def call() -> Any:
                args, kwargs = tree_unflatten(given, spec)
                return self._model._call_impl(*args, **kwargs)

            # With these very inputs, so that whatever is compiled or planned for their addresses is.
            answer = tree_map_only(Tensor, torch.clone, self._ordinary(*tree_unflatten(given, spec)))
            if self._watch is None or not watch.holds():
                # Out of memory, or the model notes something in each call: nothing would be replayed.
                return answer
            try:
                replay, result = self._recorder.record(call)
                outputs, nesting = tree_flatten(result)
                odd = next((o for o in outputs if type(o) not in (Tensor, *_PLAIN)), None)
                if odd is not None:
                    raise TypeError(f"its call returns a {type(odd).__name__}")
                if not watch.holds():
                    raise TypeError("its call changes the model")
                replay()
                if not _agree(outputs, tree_flatten(answer)[0]):
                    raise ValueError("a replay gave other numbers than the call")
            except Exception as error:
                self._fail(key, error)
                return answer
        self._recordings[key] = _Recording(inputs, replay, outputs, nesting)
        self.recorded += 1
        if len(self._recordings) > MOST:
            self._recorder.finish()
            self._recordings.popitem(last=False)
        return answer

    def _fail(self, key: Hashable, error: BaseException) -> None:
        while error.__context__ is not None:
            error = error.__context__
        why = f"recording failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        if len(self._failed) >= 16 * MOST:
            self._failed.clear()
        self._failed[key] = self.why_not = why
        self._tell(why)

    def _replayed(self, recording: _Recording, leaves: Sequence[Any]) -> Any:
        self._recorder.take_turns()
        with torch.inference_mode(False), torch.no_grad():
            _fill(recording.inputs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
            recording.replay()
        self.replayed += 1
        # Pipelines keep results of several calls, and the next replay writes over these.
        outputs = [o.clone() if isinstance(o, Tensor) else o for o in recording.outputs]
        return tree_unflatten(outputs, recording.spec)


def _agree(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two answers are the same, floats as vectors to within `_TOLERANCE`."""
    return len(found) == len(wanted) and all(
        _near(one, other) if isinstance(one, Tensor) else one == other for one, other in zip(found, wanted, strict=True)
    )


def _near(found: Tensor, wanted: Tensor) -> bool:
    tolerance = _TOLERANCE.get(wanted.dtype)
    if tolerance is None or torch.equal(found, wanted):
        return torch.equal(found, wanted)
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    error, size = ((t.float() * finite).nan_to_num().norm() for t in (found.float() - wanted.float(), wanted))
    return bool(error <= tolerance * size)


def _is_recording() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _described(leaf: Any) -> Hashable:
    """What a recording depends on: a tensor's form, and anything else by value, 1 and True apart."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _surroundings() -> Hashable:
    """What is set outside the model and decides which kernels run."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    attention: Any = sys.modules.get("diffusers.models.attention_dispatch")
    return (
        forced_backend(),
        attention and attention._AttentionBackendRegistry.get_active_backend()[0],
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        tuple(torch._C._get_sdp_priority_order()),
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        cuda.preferred_blas_library(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.conv.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


def _thin(tensor: Tensor) -> Tensor:
    """A tensor without the dimensions that only repeat."""
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _still(tensor: Tensor) -> Tensor:
    """Memory for inputs like this one, with its strides: they may decide which kernel is best."""
    thin = _thin(tensor)
    return torch.empty_strided(thin.shape, thin.stride(), dtype=tensor.dtype, device=tensor.device)


def _fill(inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for still, tensor in zip(inputs, tensors, strict=True):
        still.copy_(_thin(tensor))
