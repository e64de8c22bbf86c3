"""Whether a module's call is its class's `forward`: the one rule for every way of running it that is not a call."""

from __future__ import annotations

from torch import nn


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call is the `forward` of the module's class and nothing else.

    Libraries that wrap `forward` on the module itself, as accelerate and the caches of diffusers do, put the bound
    method there when they take the wrapper off again. That is no hook.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    own = module.__dict__.get("forward")
    if own is None:
        return True
    return getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward
