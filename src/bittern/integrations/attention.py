"""Diffusers' attention backends by name: which run here, why others do not, and a model that uses one for a while.

Diffusers knows what each backend needs and says so when it is asked for. Whether one runs on this device in this dtype
is found out by running it on a small problem. Those whose code comes from the hub are not run to find out.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bittern.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT = "native"
"""What diffusers takes by itself: torch's own attention, which chooses among its kernels."""

_FROM_THE_HUB = "_hub"


def names() -> list[str]:
    """Every backend that diffusers lists."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName]


def check_name(name: str) -> None:
    """Refuses a name that diffusers does not list.

    Raises:
        UserError: with the nearest names.
    """
    if name not in names():
        raise UserError(f"unknown attention {name!r}: {did_you_mean(name, names())}")


def is_fetched(name: str) -> bool:
    """Whether a backend's code comes from the hub."""
    return name.endswith(_FROM_THE_HUB)


def refusal(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> str | None:
    """Why a backend cannot be used on a device; None if it can.

    Args:
        name: One of `names`.
        device: Where it would run.
        dtype: Of queries, keys and values; bfloat16 by default.
    """
    import torch
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    if is_fetched(name):
        return _hub_refusal()
    q = torch.ones(1, 64, 2, 64, device=device, dtype=dtype or torch.bfloat16)
    try:
        # Torch explains in warnings what it then raises in two words.
        with torch.no_grad(), warnings.catch_warnings(record=True) as told, attention_backend(name):
            warnings.simplefilter("always")
            found: Any = dispatch_attention_fn(q, q, q)
        return None if bool(torch.isfinite(found).all()) else "its output is not finite"
    except Exception as error:
        # Whatever foreign kernels raise.
        said = next((str(w.message) for w in told if "because" in str(w.message)), "")
        return " ".join(f"{_first_line(error)} {_first_line(said)}".split())[:200]


def _hub_refusal() -> str | None:
    from diffusers.utils import is_kernels_available

    return None if is_kernels_available() else "needs the package 'kernels', with which it fetches code from the hub"


def _first_line(said: object) -> str:
    return next((line.strip() for line in str(said).splitlines() if line.strip()), type(said).__name__ if said else "")


@contextmanager
def using(model: nn.Module, name: str | None) -> Generator[None]:
    """Within the block a model's attention is computed by one backend; None leaves it as it is.

    Args:
        model: A diffusers model, on its device.
        name: One of `names`.

    Raises:
        UserError: for an unknown name, a backend that does not run on the model's device and in its dtype, or a model
            whose attention asks torch directly.
    """
    if name is None:
        yield
        return
    check_name(name)
    processors = {id(processor): processor for processor in _processors(model)}
    if not processors:
        raise UserError(
            f"attention {name!r} cannot be chosen for {type(model).__name__}: "
            "its attention in this version of diffusers calls torch directly; leave --attention out"
        )
    device, dtype = _place(model)
    if reason := refusal(name, device, dtype):
        usable = [other for other in names() if not is_fetched(other) and not refusal(other, device, dtype)]
        raise UserError(
            f"attention {name!r} does not run on {device} in {str(dtype).removeprefix('torch.')}: {reason}; "
            f"usable here: {', '.join(usable)}"
        )
    from diffusers.models.attention_dispatch import attention_backend

    before = {key: processor._attention_backend for key, processor in processors.items()}
    # Setting a model's backend sets the one of all models as well; the context puts that back.
    with attention_backend(name):
        try:
            any_model: Any = model
            any_model.set_attention_backend(name)
            yield
        finally:
            for key, processor in processors.items():
                processor._attention_backend = before[key]


def chosen(model: nn.Module) -> str:
    """The backend that a model's attention asks for: its name, or "torch" for a model that asks torch directly.

    Attention that asks for none takes the process' one, which diffusers sets for all when a model is given one.
    """
    found = {p._attention_backend or active() for p in _processors(model)}
    return "+".join(sorted(str(getattr(name, "value", name)) for name in found)) or "torch"


def active() -> str:
    """The backend of the process, for attention that asks for none."""
    from diffusers.models import attention_dispatch

    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    found: Any = registry.get_active_backend()[0] if registry else DEFAULT
    return str(getattr(found, "value", found))


def _processors(model: nn.Module) -> Iterator[Any]:
    """The attention processors that let a backend be chosen."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            yield processor


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model computes, and in what."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return parameter.device, getattr(model, "dtype", parameter.dtype)
