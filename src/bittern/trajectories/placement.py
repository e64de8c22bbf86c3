"""A model on a device that it does not fit: as many blocks as fit stay there, the others come when they are called.

The first blocks stay. Of the others each layer's weights are copied to the device for its call and let go again,
which is accelerate's work; they wait on the host, in memory that a GPU reads by itself. A backward pass works as
well, where blocks are checkpointed: a block's weights come again with it, and stay until its gradients are through.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bittern.errors import UserError, memory_size


def place(
    model: nn.Module, blocks: Iterable[str], device: torch.device, room: int | None = None, *, pin: bool = True
) -> int:
    """Puts a model that is on the CPU on a device, as far as there is room.

    Args:
        model: In full precision, not to be used otherwise afterwards.
        blocks: Paths of its blocks in the order of their calls, none within another.
        device: Where it is to compute.
        room: Bytes for weights on the device; None takes what the model needs.
        pin: Whether what waits is copied to memory that a GPU reads by itself, and faster.

    Returns:
        Bytes of the weights that wait on the host.

    Raises:
        UserError: if there is no room even for what is outside the blocks.
    """
    from accelerate import cpu_offload

    sizes = {path: weight_bytes(model.get_submodule(path)) for path in blocks}
    outside = weight_bytes(model) - sum(sizes.values())
    left = None if room is None else room - outside
    if left is not None and left < 0:
        raise UserError(
            f"{memory_size(room or 0)} of device memory are left for weights, and those outside the blocks take "
            f"{memory_size(outside)}: allow more device memory"
        )
    waiting: list[str] = []
    for path, size in sizes.items():
        if left is not None and (size > left or waiting):
            waiting.append(path)
        elif left is not None:
            left -= size
    late = {id(tensor) for path in waiting for tensor in _tensors(model.get_submodule(path))}
    # First what leaves the host, then what is copied within it.
    for tensor in _tensors(model):
        if id(tensor) not in late:
            tensor.data = tensor.data.to(device)
    for path in waiting:
        block = model.get_submodule(path)
        held = {name: tensor.detach() for name, tensor in block.state_dict().items()}
        if pin and device.type == "cuda":
            held = {name: tensor.pin_memory() for name, tensor in held.items()}
        cpu_offload(block, execution_device=device, state_dict=held)
    return sum(sizes[path] for path in waiting)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in _tensors(model))


def _tensors(model: nn.Module) -> tuple[Tensor, ...]:
    return (*model.parameters(), *model.buffers())
