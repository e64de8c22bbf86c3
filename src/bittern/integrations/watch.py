"""Whether a model still computes what it did: a fingerprint that costs a millisecond for a thousand modules.

What a forward does follows from its modules, their attributes, what lies in those that are dictionaries or lists
(peft's strengths), what attention processors note on themselves, and where the tensors lie. Numbers within tensors are
not looked at: whoever reads the same addresses reads the new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bittern.layers import is_unhooked

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ALWAYS = ("training", "_modules")
_END = object()
_ORDINARY = {Tensor, nn.Parameter, nn.Buffer}
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


class Watch:
    """A model at one moment.

    It keeps no tensor of the model alive that is a parameter or a buffer, and other parts until it is let go.

    Attributes:
        devices: Where its tensors lie.
        hooked: The path of a module whose call is more than its own `forward`; None if there is none.
    """

    # Thousands of modules, dozens of attributes each: the loops that `holds` needs are all within C.

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        self._modules = list(named.values())
        self._types = list(map(type, self._modules))
        self._attributes = list(map(vars, self._modules))
        self._sizes = list(map(len, self._attributes))
        counted = ((m._forward_hooks, m._forward_pre_hooks, m._modules) for m in self._modules)
        self._counted = list(chain.from_iterable(counted))
        self._counts = list(map(len, self._counted))
        # Modules by what they have of their own, and what takes that out of one.
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for attributes in self._attributes:
            alike.setdefault((*_ALWAYS, *(attributes.keys() - _OF_EVERY_MODULE)), []).append(attributes)
        self._own = [(itemgetter(*names), those) for names, those in alike.items()]
        self._views = list(chain.from_iterable(map(_views, self._attributes)))
        self._was = list(self._now())
        self._held = [held.values() for m in self._modules for held in (m._parameters, m._buffers)]
        self._layout = self._laid_out()
        self.devices = {tensor.device for tensor in self._tensors()}
        hooked = (path or type(model).__name__ for path, module in named.items() if not is_unhooked(module))
        self.hooked = next(hooked, None)

    def holds(self) -> bool:
        """Whether everything is as it was."""
        return (
            list(map(type, self._modules)) == self._types
            and list(map(len, self._attributes)) == self._sizes
            and list(map(len, self._counted)) == self._counts
            and self._same()
            and self._laid_out() == self._layout
        )

    def wants_gradients(self) -> bool:
        """Whether a parameter does."""
        return any(tensor.requires_grad for tensor in self._tensors())

    def _now(self) -> Iterator[Any]:
        own = (chain.from_iterable(map(take, those)) for take, those in self._own)
        return chain(chain.from_iterable(own), chain.from_iterable(self._views), (_END,))

    def _same(self) -> bool:
        try:
            return all(map(is_, self._now(), self._was)) or self._equal()
        except KeyError:
            return False

    def _equal(self) -> bool:
        """Whether what is not the same is equal: a strength that was multiplied and divided again."""
        now = list(self._now())
        if len(now) != len(self._was):
            return False
        others = [(a, b) for a, b in zip(now, self._was, strict=True) if a is not b]
        if not all(_same_value(a, b) for a, b in others):
            return False
        self._was = now
        return True

    def _tensors(self) -> list[Tensor]:
        """Parameters and buffers, as they are now; of wrappers what they wrap."""
        tensors = [tensor for tensor in chain.from_iterable(self._held) if tensor is not None]
        if _ORDINARY.issuperset(map(type, tensors)):
            return tensors
        return [part for tensor in tensors for part in parts(tensor)]

    def _laid_out(self) -> tuple[list[Any], ...]:
        tensors = self._tensors()
        return tuple(list(map(ask, tensors)) for ask in (Tensor.data_ptr, Tensor.stride, _SHAPE, _DTYPE))


def parts(tensor: Any) -> Iterator[Tensor]:
    """The tensors that one is made of: those of other libraries wrap codes and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    else:
        yield tensor


def _views(attributes: dict[str, Any]) -> Iterator[Iterable[Any]]:
    """What lies in a module's attributes, as views that follow its changes."""
    if attributes["_modules"]:
        yield attributes["_modules"].values()
    for name in attributes.keys() - _OF_EVERY_MODULE - {"_compiled_call_impl"}:
        value = attributes[name]
        if isinstance(value, dict):
            yield value.values()
        elif isinstance(value, list):
            yield value
        elif callable(value) and not isinstance(value, (nn.Module, type, FunctionType, MethodType)):
            # An attention processor, with the backend that was chosen for it.
            yield getattr(value, "__dict__", {}).values()


def _same_value(now: Any, was: Any) -> bool:
    return type(now) is type(was) and isinstance(now, (bool, int, float, str, torch.dtype)) and now == was
