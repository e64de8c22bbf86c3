"""What a training takes, told before it starts.

    parameters that learn   20 bytes each: value, gradient, two moments, average, in float32
    the best average so far  4 bytes each, on the host
    other tensors            of the student, the teacher and the deployed model, as they are
    bank                     states and targets
    activations              what a forward pass keeps for its backward pass: batch · states + weights

The last line is measured: forward passes with two states and with three tell what grows with the batch. Where a
model hardly fits it is foreseen from shapes (`foresight`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bittern.distillation.sharding import local
from bittern.distillation.trainer import Trainer
from bittern.errors import UserError, memory_size


@dataclass(frozen=True)
class Memory:
    """Bytes of the device.

    Attributes:
        learning: Of what learns, with gradients, moments and averages.
        models: Of all other tensors of the student, and of the teacher and the deployed model.
        bank: Of states and targets, the watched ones included.
        activations: Kept between the forward and the backward pass.
    """

    learning: int
    models: int
    bank: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {memory_size(size)}" for name, size in asdict(self).items())
        return f"training takes {memory_size(self.total)}: {parts}"


def needed(trainer: Trainer, others: Iterable[Tensor], banks: int) -> Memory:
    """What a training takes.

    Args:
        trainer: Before its first step, and not compiled.
        others: The tensors of the teacher and of the deployed model.
        banks: Bytes of all banks.
    """
    held = held_bytes(trainer, others)
    # Of a single state some tensors are kept as views of others.
    two, three = kept_bytes(trainer, 2), kept_bytes(trainer, 3)
    activations = two + (trainer.settings.batch - 2) * (three - two)
    return Memory(learning_bytes(trainer), held, banks, activations)


def learning_bytes(trainer: Trainer) -> int:
    """Of what learns: value, gradient, two moments, average."""
    return 20 * sum(parameter.numel() for parameter in trainer.params)


def held_bytes(trainer: Trainer, others: Iterable[Tensor] = ()) -> int:
    """Of the student's tensors that do not learn, and of others, each counted once."""
    learns = {parameter.untyped_storage()._cdata for parameter in trainer.params}
    model = trainer.student.model
    storages = (local(tensor).untyped_storage() for tensor in (*model.parameters(), *model.buffers(), *others))
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in learns}.values())


def kept_bytes(trainer: Trainer, states: int) -> int:
    """Bytes that a forward pass with so many states keeps for the backward pass, parameters aside."""
    held = (*trainer.student.model.parameters(), *trainer.student.model.buffers())
    own = {local(tensor).untyped_storage()._cdata for tensor in held}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # An address that is given out again would hide what lies there. Without its history: a saved tensor that
            # knows it keeps all of it alive, and a step that is captured later must find no gradients of another
            # stream.
            kept[storage._cdata] = tensor.detach()
        return 0

    def unpack(_: int) -> Tensor:
        raise AssertionError("nobody asks for gradients here")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        trainer.errors(torch.arange(states, device=trainer.device) % len(trainer.bank)).mean()
    # Only now: weights that were put together for a block are gone by the end of it.
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check(memory: Memory, device: torch.device, held: int) -> None:
    """Refuses a training that the device has no room for.

    Args:
        memory: What it takes.
        device: Where.
        held: Bytes of it that are there already.

    Raises:
        UserError: naming what is needed and what there is.
    """
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if memory.total - held > free:
        raise UserError(
            f"{memory}; {memory_size(free + held)} are free: lower `batch` or `bank_gib` in the recipe's distillation, "
            "or set `checkpointing`"
        )
