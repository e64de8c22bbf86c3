"""What a training takes, from shapes alone: for models that hardly fit, of which nothing can be tried out.

The training is made of tensors that have shapes and no numbers, by the code that makes the real one, and what its first
steps allocate is added up, operation by operation. That is exact as far as torch's operations go, temporaries of the
backward pass included; a context, what a library allocates within an operation, and fragments come on top.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bittern.distillation.memory import Memory, held_bytes, learning_bytes
from bittern.distillation.student import learner
from bittern.distillation.trainer import States, Trainer
from bittern.recipes import Distillation


def foreseen(
    teacher: nn.Module,
    deployed: nn.Module,
    bank: States,
    settings: Distillation,
    dtype: torch.dtype,
    others: Iterable[Tensor] = (),
) -> Memory:
    """What a training takes.

    Args:
        teacher: A denoiser or a block, where it is; it may be on meta.
        deployed: The same with few-bit layers.
        bank: States; its `device` is the one that is asked about. Those on meta stand for some on the host.
        settings: Of the training.
        dtype: What the teacher computes in.
        others: Further tensors that are there meanwhile; those that are not on the device are left out.
    """
    device = bank.device
    there = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in others if t.device == device}
    states = bank.everything()
    student = learner(_blank_module(teacher), _blank_module(deployed), settings)
    with FakeTensorMode():
        known = _blank(bank, states)
        shadow = _blank(student, (*_held(student.model), *_held(student.deployed)), device)
        with Allocations(device) as allocated:
            allocated.note(_held(shadow.model))
            trainer = Trainer(shadow, known, settings, seed=0, dtype=dtype)
            # AdamW makes its moments in the first.
            for _ in range(2):
                trainer.advance(1.0)
        learning, models = learning_bytes(trainer), held_bytes(trainer)
    given = sum(tensor.nbytes for tensor in states if tensor.device == device)
    return Memory(learning, models + sum(there.values()), given, allocated.most - learning - models)


class Allocations(TorchDispatchMode):
    """Counts what operations allocate on a device while it lasts.

    Attributes:
        most: Bytes that were alive at a time.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.alive, self.most = device, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.note(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that are there, once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if tensor.device != self.device or key in self.known:
                continue
            self.known.add(key)
            self.alive += size
            self.most = max(self.most, self.alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _blank_module(module: nn.Module) -> nn.Module:
    return _blank(module, _held(module), torch.device("meta"))


def _blank(thing: Any, tensors: Iterable[Tensor], device: torch.device | None = None) -> Any:
    """A copy whose tensors have shapes and no numbers, on a device or where they are."""

    def alike(tensor: Tensor) -> Tensor:
        made = torch.empty(
            tensor.shape, dtype=tensor.dtype, device=device or ("cpu" if tensor.is_meta else tensor.device)
        )
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    return copy.deepcopy(thing, {id(tensor): alike(tensor) for tensor in tensors})
