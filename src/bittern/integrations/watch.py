"""Whether a model still computes what it did: a fingerprint that costs a millisecond for a thousand modules.

What a forward does follows from its modules, their attributes, what lies in those that are dictionaries or lists
(peft's strengths), what attention processors note on themselves, and where the tensors lie. Numbers within tensors are
not looked at: whoever reads the same addresses reads the new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bittern.layers import is_unhooked

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_WATCHED = frozenset({"_modules", "_forward_hooks", "_forward_pre_hooks"})
_END = object()
_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)
_LAYOUT = attrgetter("dtype", "shape")


class Watch:
    """A model at one moment.

    It keeps no tensor of the model alive that is a parameter or a buffer, and other parts until it is let go.

    Attributes:
        devices: Where its tensors lie.
        hooked: The path of a module whose call is more than its own `forward`; None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        self._modules = list(named.values())
        self._types = list(map(type, self._modules))
        self._held = [held.values() for module in self._modules for held in (module._parameters, module._buffers)]
        self._live = list(chain.from_iterable(map(_live, self._modules)))
        self._was = [*chain.from_iterable(self._live), _END]
        self._layout = self._laid_out()
        self.devices = {tensor.device for tensor in self._tensors()}
        hooked = (path or type(model).__name__ for path, module in named.items() if not _is_plain(module))
        self.hooked = next(hooked, None)

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return (
            (all(map(is_, chain(*self._live, (_END,)), self._was)) or self._equal())
            and list(map(type, self._modules)) == self._types
            and self._laid_out() == self._layout
        )

    def wants_gradients(self) -> bool:
        """Whether a parameter does."""
        return any(tensor.requires_grad for tensor in self._tensors())

    def _equal(self) -> bool:
        """Whether what is not the same is equal: a strength that was multiplied and divided again."""
        now = [*chain.from_iterable(self._live), _END]
        if len(now) != len(self._was) or not all(
            map(_same_value, *zip(*((a, b) for a, b in zip(now, self._was, strict=True) if a is not b), strict=True))
        ):
            return False
        self._was = now
        return True

    def _tensors(self) -> list[Tensor]:
        """Parameters and buffers, as they are now; of wrappers what they wrap."""
        held = chain.from_iterable(self._held)
        found: list[Tensor] = []
        for tensor in held:
            if type(tensor) in _ORDINARY:
                found.append(tensor)  # pyright: ignore[reportArgumentType]
            elif tensor is not None:
                found += parts(tensor)
        return found

    def _laid_out(self) -> tuple[list[Any], ...]:
        tensors = self._tensors()
        return list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors)), list(map(_LAYOUT, tensors))


def _is_plain(module: nn.Module) -> bool:
    """Whether a call is the class's `forward` and nothing else. Hooks that were removed leave that on the module."""
    own = vars(module).get("forward")
    returned = getattr(own, "__self__", None) is module and getattr(own, "__func__", None) is type(module).forward
    return is_unhooked(module) or (returned and not (module._forward_hooks or module._forward_pre_hooks))


def parts(tensor: Any) -> Iterator[Tensor]:
    """The tensors that one is made of: those of other libraries wrap codes and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    else:
        yield tensor


def _live(module: nn.Module) -> Iterator[Iterable[Any]]:
    """What tells of a module, as views that follow its changes."""
    attributes = vars(module)
    yield attributes.values()
    for name, value in attributes.items():
        if name == "_compiled_call_impl" or (name in _OF_EVERY_MODULE and name not in _WATCHED):
            continue
        if isinstance(value, dict):
            yield value.keys()
            yield value.values()
        elif isinstance(value, list):
            yield value
        elif callable(value) and not isinstance(value, (nn.Module, type, FunctionType, MethodType)):
            # An attention processor, with the backend that was chosen for it.
            yield getattr(value, "__dict__", {}).values()


def _same_value(now: Any, was: Any) -> bool:
    return type(now) is type(was) and isinstance(now, (bool, int, float, str, torch.dtype)) and now == was
