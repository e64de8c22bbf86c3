"""What every launch needs, and how a layer's launches are repeated without what Triton does for each.

`kernel[grid](...)` looks at every argument to find the kernel that was compiled for it, checks tensor descriptors
as they are built, and asks the driver about every pointer: tens of microseconds on the host, several times a layer.
All of it follows from dtypes, shapes, strides and the alignment of addresses. So a call with a signature not seen
before launches in the ordinary way and writes down what it launched, and calls of the same signature launch that
with their own addresses, which takes a fifth of the time; where the addresses are known, too, `direct` makes it less.

Of Triton this needs three things that hold in 3.6 and 3.7: `kernel[grid](...)` returns the compiled kernel;
`compiled[grid]` launches it, given all arguments in order; an integer does for a pointer. Where the first fails,
as in the interpreter, every launch is an ordinary one.
"""

# A type checker knows little of Triton.
# pyright: basic

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from bittern.ops.triton.direct import Ready, is_hooked, ready

_HERE = contextlib.nullcontext()
_ALIGNED = 16
_SCRATCH_MULTIPLE = 512
_MOST_ADDRESSES = 128
_MOST_SIGNATURES = 256


class Tiled(NamedTuple):
    """A matrix that a kernel reaches by tensor descriptor, in tiles of a shape."""

    matrix: Tensor
    tile: list[int]


Operand = Tensor | Tiled | None
Launch = Callable[..., Any]
"""Has the arguments of `launch`."""


def launch(
    kernel: Any, grid: tuple[int, ...], operands: Sequence[Operand], sizes: Sequence[int], **constants: Any
) -> Any:
    """Launches a kernel as Triton does.

    Args:
        kernel: A `triton.jit` function that takes operands, sizes and constants, in this order.
        grid: Programs along each axis.
        operands: What becomes pointers and tensor descriptors.
        sizes: Integers.
        constants: The kernel's constants, and Triton's options.

    Returns:
        The compiled kernel; None from the interpreter.
    """
    first = next(o.matrix if isinstance(o, Tiled) else o for o in operands if o is not None)
    describe = _described_for_gluon if _is_gluon(kernel) else TensorDescriptor.from_tensor
    arguments = [describe(*o) if isinstance(o, Tiled) else o for o in operands]
    with on_device_of(first):
        return kernel[grid](*arguments, *sizes, **constants)


def _is_gluon(kernel: Any) -> bool:
    # Kernels of the interpreter cannot say.
    return getattr(kernel, "is_gluon", bool)()


def _described_for_gluon(matrix: Tensor, tile: list[int]) -> Any:
    """A tensor descriptor that says how its tiles lie in shared memory."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Described

    layout: Any = gl.NVMMASharedLayout.get_default_for(tile, _gluon_dtype(matrix.dtype))
    return Described.from_tensor(matrix, tile, layout)


@functools.cache
def _gluon_dtype(dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return {
        torch.float8_e4m3fn: gl.float8e4nv,
        torch.bfloat16: gl.bfloat16,
        torch.float16: gl.float16,
        torch.float32: gl.float32,
    }[dtype]


class _Address(int):
    """An address as Triton's descriptors want one."""

    def data_ptr(self) -> int:
        return self


class _Described(NamedTuple):
    """What launching reads of a `TensorDescriptor` that was checked before."""

    base: _Address
    shape: Sequence[int]
    strides: Sequence[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


class _Place(NamedTuple):
    """Where an operand lies: bytes from the start of one of the call's tensors; shape and strides of a `Tiled`."""

    tensor: int
    offset: int
    shape: tuple[int, ...] | None
    strides: tuple[int, ...]

    def at(self, address: int) -> Any:
        if self.shape is None:
            return address + self.offset
        return _Described(_Address(address + self.offset), self.shape, self.strides)


class _Step(NamedTuple):
    """One launch: a compiled kernel, programs along each axis, where operands lie, and the other arguments."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    places: list[_Place | None]
    rest: list[Any]


class Recorder:
    """Launches one call of a layer in the ordinary way, and writes down what is launched.

    Args:
        tensors: All that the call reads or writes. Later calls give theirs in the same order.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        given = [t for t in tensors if t is not None]
        self._tensors = list(tensors)
        # By identity, so that what only happens to overlap is kept apart; the tensors are alive meanwhile.
        self._known = {id(t): i for i, t in enumerate(tensors) if t is not None}
        self._views: list[Tensor] = []
        self._steps: list[_Step] = []
        self._bytes = 0
        self._whole = len(self._known) == len(given) and all(t.data_ptr() % _ALIGNED == 0 for t in given)

    def part(self, whole: Tensor, view: Tensor) -> Tensor:
        """A view, as one of a tensor that the recorder knows; a copy stays unknown."""
        if view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and id(whole) in self._known:
            self._known[id(view)] = self._known[id(whole)]
            self._views.append(view)
        return view

    def slices(self, whole: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Views of so many rows each, one behind the other, as `part`."""
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        return [self.part(whole, whole[start : start + n]) for start, n in zip(starts, lengths, strict=True)]

    def scratch(self, device: torch.device, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        """Empty tensors of these shapes and dtypes for the length of the call, one allocation for all."""
        starts, size = list[int](), 0
        for shape, dtype in wanted:
            starts.append(size)
            size += -(-prod(shape) * dtype.itemsize // _SCRATCH_MULTIPLE) * _SCRATCH_MULTIPLE
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._known[id(buffer)], self._bytes = len(self._tensors), size
        self._tensors.append(buffer)
        return [
            self.part(buffer, buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape))
            for start, (shape, dtype) in zip(starts, wanted, strict=True)
        ]

    def launch(
        self, kernel: Any, grid: tuple[int, ...], operands: Sequence[Operand], sizes: Sequence[int], **constants: Any
    ) -> None:
        """As `launch`."""
        compiled = launch(kernel, grid, operands, sizes, **constants)
        matrices = [o.matrix if isinstance(o, Tiled) else o for o in operands]
        if not isinstance(compiled, CompiledKernel) or any(
            m is not None and id(m) not in self._known for m in matrices
        ):
            self._whole = False
            return
        places = [None if o is None else self._place(o) for o in operands]
        rest = [constants[name] for name in kernel.arg_names[len(operands) + len(sizes) :]]
        self._steps.append(_Step(compiled, cast(Any, (*grid, 1, 1)[:3]), places, [*sizes, *rest]))

    def _place(self, operand: Tensor | Tiled) -> _Place:
        matrix = operand.matrix if isinstance(operand, Tiled) else operand
        tensor = self._known[id(matrix)]
        offset = matrix.data_ptr() - cast(Tensor, self._tensors[tensor]).data_ptr()
        shape = tuple(matrix.shape) if isinstance(operand, Tiled) else None
        return _Place(tensor, offset, shape, matrix.stride())

    def launches(self) -> Launches | None:
        """What was launched; None if other calls could not repeat it."""
        return Launches(self._steps, self._bytes) if self._whole else None


class Launches:
    """Launches that a `Recorder` wrote down. They hold no tensors."""

    def __init__(self, steps: list[_Step], scratch: int) -> None:
        self._steps, self._scratch = steps, scratch
        # The allocator gives a model's steps the same addresses again and again.
        self._ready: dict[tuple[int, ...], list[Ready]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def repeat(self, tensors: Sequence[Tensor | None], device: torch.device) -> bool:
        """Launches with other tensors of the same signature, on the current device.

        Returns:
            Whether it did: addresses that are not multiples of 16 want other kernels.
        """
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        if self._scratch:
            scratch = torch.empty(self._scratch, dtype=torch.uint8, device=device)
            addresses.append(scratch.data_ptr())
        key = tuple(addresses)
        launches = self._ready.get(key)
        if launches is None:
            if any(address % _ALIGNED for address in addresses):
                return False
            if len(self._ready) >= _MOST_ADDRESSES:
                self._ready.clear()
            launches = self._ready[key] = [
                ready(
                    step.compiled,
                    step.grid,
                    [
                        *(None if place is None else place.at(addresses[place.tensor]) for place in step.places),
                        *step.rest,
                    ],
                )
                for step in self._steps
            ]
        here = cast(Any, driver.active)
        stream = here.get_current_stream(here.get_current_device())
        hooked = is_hooked()
        for run in launches:
            run(stream, hooked)
        return True


class Remembered:
    """Launches of an operation by the signature of its calls: all that they depend on but addresses."""

    def __init__(self) -> None:
        self._launches: dict[Hashable, Launches | None] = {}

    def repeat(self, signature: Hashable, tensors: Sequence[Tensor | None], device_of: Tensor) -> bool:
        """Repeats what a call of this signature launched; whether there was one, and it could."""
        known = self._launches.get(signature)
        if known is None:
            return False
        with on_device_of(device_of):
            return known.repeat(tensors, device_of.device)

    def keep(self, signature: Hashable, recorder: Recorder) -> None:
        """Remembers what a call launched."""
        if len(self._launches) >= _MOST_SIGNATURES:
            # Inputs of ever new lengths must not fill the memory.
            self._launches.clear()
        self._launches[signature] = recorder.launches()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes x's device the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up. Triton's own takes microseconds on the host."""
    return -(-a // b)


def contiguous_rows(x: Tensor) -> Tensor:
    """As kernels want it: they step from number to number of a row. A copy is unknown to recorders."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix: rows contiguous, everything at multiples of 16 bytes."""
    size = x.element_size()
    return x.stride(1) == 1 and x.stride(0) * size % 16 == 0 and x.data_ptr() % 16 == 0 and x.numel() > 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; a handful in the interpreter."""
    if device.type != "cuda":
        return 3
    properties = cast(Any, torch.cuda.get_device_properties(device))
    return int(properties.multi_processor_count)
