"""Which arithmetic a layer runs, and which implementation computes it.

Two questions, answered apart.

The *path* is the arithmetic: it follows from what the scheme was solved for and from what the device has, and
it decides the numbers. The *backend* is an implementation of a path, chosen call by call among the registered
kernels, each of which declares what it accepts. `use_backend` changes the second and never the first, so that
a kernel is compared with the reference on the same arithmetic. Every refusal has a reason.

Which matrix arithmetic NVIDIA's GPUs have: int4 on compute capability 7.5 to 8.9 (later ones emulate it
slowly), fp8 from 8.9, int8 from 7.5. Ada (8.9) prefers int8 to fp8, whose float32 accumulation runs at half
rate there; from 9.0 on fp8 wins, and it needs less smoothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from bittern.errors import UserError, did_you_mean
from bittern.scheme import Scheme

Path = Literal["a4", "a8-fp8-folded", "a8-fp8", "a8-int8", "a16"]
Capability = tuple[int, int]

PATHS: tuple[Path, ...] = get_args(Path)

_UNITS = {
    "a4": (4, "int4"),
    "a8-fp8-folded": (8, "fp8"),
    "a8-fp8": (8, "fp8"),
    "a8-int8": (8, "int8"),
    "a16": (16, "16-bit"),
}
NEWEST = (99, 9)
# AMD's devices call themselves "cuda" too, with capabilities of their own counting.
_IS_ROCM = bool(getattr(torch.version, "hip", None))
_CAPABILITIES = {"int4": ((7, 5), (8, 9)), "fp8": ((8, 9), NEWEST), "int8": ((7, 5), NEWEST)}


@dataclass(frozen=True)
class Call:
    """What a kernel may ask about a call; None stands for what is not known yet.

    Attributes:
        weight: Weight format.
        device: Device type.
        capability: Compute capability; None also for what has none.
        dtype: Dtype of the inputs.
        rows: Rows of each input.
        group: Inputs under one weight scale; 0 for whole rows.
        segments: Number of inputs.
        outputs: Rows of codes.
    """

    weight: str
    device: str
    capability: Capability | None = None
    dtype: torch.dtype | None = None
    rows: int | None = None
    group: int | None = None
    segments: int | None = None
    outputs: int | None = None


@dataclass(frozen=True)
class Kernel:
    """One implementation of `few_bit_linear` on one path, and the calls it accepts.

    Attributes:
        path: The arithmetic that it computes.
        backend: Name of the implementation, such as "torch" or "triton".
        run: Has the arguments of the operation `bittern::few_bit_linear`; None where `plan` makes one.
        plan: Makes a `run` for calls of one signature (shapes, strides and dtypes), from their path and rows. It may
            keep whatever follows from the signature.
        prologue: Has the arguments of `bittern::quantize_activations`, for the path's format; None for the
            reference's.
        lacks: A package that the kernel needs and that is not installed.
        native: Whether it uses the device's own arithmetic of that width, rather than emulate it.
        devices: Device types; None for all.
        capability: Lowest and highest compute capability; None for all.
        dtypes: Dtypes of the input.
        weights: Weight formats; None for all.
        rows: Least and most rows of the input; None for no limit above.
        groups: Inputs under one weight scale, 0 for whole rows; None for any number.
        segments: Most inputs; None for no limit.
        outputs: Least number of them.
    """

    path: Path
    backend: str
    run: Callable[..., Tensor] | None = None
    plan: Callable[[str, int], Callable[..., Tensor]] | None = None
    native: bool = True
    devices: tuple[str, ...] | None = None
    capability: tuple[Capability, Capability] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    weights: tuple[str, ...] | None = None
    rows: tuple[int, int | None] = (0, None)
    groups: tuple[int, ...] | None = None
    segments: int | None = None
    outputs: int = 0
    prologue: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
    lacks: str | None = None

    def refusal(self, call: Call) -> str | None:
        """Why this kernel cannot take the call; None if it can."""
        if self.devices is not None and call.device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {call.device}"
        if self.lacks is not None:
            return f"needs the package {self.lacks}, which is not installed"
        if self.capability is not None:
            low, high = self.capability
            if call.capability is None:
                return f"needs a GPU of NVIDIA's, of compute capability {_dotted(low)} or more"
            if not low <= call.capability <= high:
                return f"needs compute capability {_dotted(low)} {_upwards(high)}, not {_dotted(call.capability)}"
        if call.dtype is not None and call.dtype not in self.dtypes:
            return f"takes {', '.join(str(d) for d in self.dtypes)}, not {call.dtype}"
        if self.weights is not None and call.weight not in self.weights:
            return f"takes {', '.join(self.weights)} weights, not {call.weight}"
        least, most = self.rows
        if call.rows is not None and (call.rows < least or (most is not None and call.rows > most)):
            return f"takes {least} to {most if most is not None else 'any number of'} rows, not {call.rows}"
        if self.groups is not None and call.group is not None and call.group not in self.groups:
            known = ", ".join("whole rows" if group == 0 else str(group) for group in self.groups)
            return f"takes weight groups of {known}, not {call.group or 'whole rows'}"
        if self.segments is not None and call.segments is not None and call.segments > self.segments:
            return f"takes at most {self.segments} inputs, not {call.segments}"
        if call.outputs is not None and call.outputs < self.outputs:
            return f"takes at least {self.outputs} output{'s' * (self.outputs > 1)}, not {call.outputs}"
        return None


@dataclass(frozen=True)
class Choice:
    """The arithmetic and the implementation that a layer gets, and why."""

    path: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What became of one path and backend: whether it may run, and the reason."""

    path: str
    backend: str
    accepted: bool
    reason: str


# The last registered comes first, and so the reference, registered first, is everybody's last resort.
_kernels: list[Kernel] = []
_plans: dict[Hashable, Callable[..., Tensor]] = {}
_MOST_PLANS = 4096
_forced_backend: contextvars.ContextVar[str | None] = contextvars.ContextVar("backend", default=None)


def register(kernel: Kernel) -> None:
    """Adds an implementation; it is preferred to those registered before it."""
    _kernels.insert(0, kernel)
    _plans.clear()


def backends() -> tuple[str, ...]:
    """Names of the registered implementations."""
    return tuple(sorted({kernel.backend for kernel in _kernels}))


@contextlib.contextmanager
def use_backend(name: str) -> Generator[None]:
    """Within the block, few-bit layers are computed by this backend only, with unchanged arithmetic.

    Raises:
        UserError: if there is no such backend; and from a layer's call, if the backend refuses it.
    """
    if name not in backends():
        raise UserError(f"unknown backend {name!r}: {did_you_mean(name, backends())}")
    token = _forced_backend.set(name)
    try:
        yield
    finally:
        _forced_backend.reset(token)


def forced_backend() -> str | None:
    """The only backend that may compute, within `use_backend`; None elsewhere."""
    return _forced_backend.get()


def want_reference(operation: str, *refusals: tuple[str, str]) -> None:
    """Refuses an operation that only the reference computes here, within `use_backend` of another backend.

    Args:
        operation: What is asked for.
        refusals: Backends that have it, and why each cannot compute it here.

    Raises:
        UserError: with the reason.
    """
    forced = _forced_backend.get()
    if forced not in (None, "torch"):
        reason = dict(refusals).get(forced, "has no kernel for it: leave use_backend out, or ask for 'torch'")
        raise UserError(f"{operation} cannot be computed here by the backend {forced!r}: {forced} {reason}")


def select(path: str, call: Call) -> Kernel:
    """The kernel that computes a call.

    Raises:
        UserError: if the path is unknown, or no kernel accepts the call, with each one's reason.
    """
    forced = _forced_backend.get()
    reasons: list[str] = []
    for kernel in _kernels:
        if kernel.path != path or (forced is not None and kernel.backend != forced):
            continue
        refusal = kernel.refusal(call)
        if refusal is None:
            return kernel
        reasons.append(f"{kernel.backend} {refusal}")
    _check_path(path)
    raise UserError(f"no kernel computes path {path!r} here: {'; '.join(reasons) or f'{forced} has none'}")


def planned(signature: Hashable) -> Callable[..., Tensor] | None:
    """What runs calls of this signature, if one was planned before."""
    return _plans.get((_forced_backend.get(), signature))


def plan(signature: Hashable, path: str, call: Call) -> Callable[..., Tensor]:
    """Chooses what runs calls of a signature, and remembers it.

    Raises:
        UserError: as `select`.
    """
    kernel = select(path, call)
    run = kernel.run if kernel.plan is None else kernel.plan(path, call.rows or 0)
    assert run is not None
    if len(_plans) >= _MOST_PLANS:
        # Inputs of ever new lengths must not fill the memory.
        _plans.clear()
    _plans[_forced_backend.get(), signature] = run
    return run


def choose_path(
    scheme: Scheme,
    device: torch.device | str,
    rows: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    path: str = "auto",
    capability: Capability | None = None,
) -> Choice:
    """The arithmetic for a scheme on a device.

    Args:
        scheme: What the layer was solved for. Its activation bits are the least precise that may be chosen.
        device: Where it runs.
        rows: Rows of the input, if known.
        dtype: Dtype of the input, if known.
        path: "auto", or a path to force, whatever the scheme and the device.
        capability: Compute capability, instead of asking the device.

    Raises:
        UserError: if the path is unknown, the device absent, or nothing accepts the call.
    """
    verdicts = explain(scheme, device, rows, dtype=dtype, path=path, capability=capability)
    for verdict in verdicts:
        if verdict.accepted:
            return Choice(verdict.path, verdict.backend, verdict.reason)
    raise UserError(
        f"no path for {scheme.weight} on {device}: "
        + "; ".join(f"{v.path} ({v.backend}): {v.reason}" for v in verdicts)
    )


def explain(
    scheme: Scheme,
    device: torch.device | str,
    rows: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    path: str = "auto",
    capability: Capability | None = None,
) -> list[Verdict]:
    """Every path and backend with its verdict, in order of preference. Arguments as in `choose_path`."""
    device = torch.device(device)
    if capability is None:
        capability = device_capability(device)
    call = Call(scheme.weight, device.type, capability, dtype, rows, scheme.group_size or 0)
    _check_path(path)
    verdicts: list[Verdict] = []
    for kernel in _candidates(path, capability):
        suits, reason = (True, "forced") if path != "auto" else _suits(kernel, scheme, call)
        refusal = kernel.refusal(call)
        verdicts.append(Verdict(kernel.path, kernel.backend, suits and refusal is None, refusal or reason))
    return verdicts


def _candidates(path: str, capability: Capability | None) -> list[Kernel]:
    """The kernels of one path, or of all, best first: native before emulated, then narrow before wide."""
    order = ("a4", "a8-int8", "a8-fp8-folded", "a8-fp8", "a16")
    if capability is not None and capability >= (9, 0):
        order = ("a4", "a8-fp8-folded", "a8-fp8", "a8-int8", "a16")
    kernels = [kernel for kernel in _kernels if path in ("auto", kernel.path)]
    return sorted(kernels, key=lambda kernel: (not kernel.native, order.index(kernel.path)))


def _suits(kernel: Kernel, scheme: Scheme, call: Call) -> tuple[bool, str]:
    """Whether a path may be chosen for a scheme on a device, and why or why not."""
    bits, unit = _UNITS[kernel.path]
    if bits < scheme.activations:
        return False, f"the scheme was solved for {scheme.activations}-bit activations"
    if kernel.path == "a16":
        return True, "the widest path, for want of a narrower one" if scheme.activations < 16 else "16-bit activations"
    if call.device == "cpu" and kernel.path == "a8-int8":
        return True, "a CPU has no narrower arithmetic, and integer sums are exact"
    if call.capability is None:
        return False, f"{call.device} has no {unit} matrix arithmetic that we know of"
    lowest, highest = _CAPABILITIES[unit]
    name = f"compute capability {_dotted(call.capability)}"
    if not lowest <= call.capability <= highest:
        return False, f"{name} has no {unit} tensor cores"
    if kernel.path == "a4" and not kernel.native:
        return False, "emulated 4 bits are slower and less precise than 8; path='a4' forces them"
    if kernel.path == "a8-fp8-folded":
        return False, "faster, and less precise beside inputs far beyond the others; path='a8-fp8-folded' forces it"
    return True, f"{name} has {unit} tensor cores"


def device_capability(device: torch.device) -> Capability | None:
    """Compute capability of an NVIDIA GPU; None for other devices.

    Raises:
        UserError: if the device is a GPU and there is none.
    """
    if device.type != "cuda" or _IS_ROCM:
        return None
    if not torch.cuda.is_available():
        raise UserError(f"device '{device}': no CUDA device is available here; expected 'cpu'")
    return torch.cuda.get_device_capability(device)


def _check_path(path: str) -> None:
    if path != "auto" and path not in PATHS:
        raise UserError(f"unknown path {path!r}: {did_you_mean(path, (*PATHS, 'auto'))}")


def _upwards(highest: Capability) -> str:
    return "or more" if highest == NEWEST else f"to {_dotted(highest)}"


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
