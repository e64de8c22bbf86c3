"""One training on several processes, started by `torchrun`: each holds a share of what learns and a share of the bank.

Parameters, gradients, moments and averages are cut along their first axis (`torch.distributed.fsdp.fully_shard`, after
ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054); a block's are put together when it is called, in float32, since what
is rounded to codes cannot be rounded before. All that a step does to parameters is done to the shares, which are plain
tensors. What is decided by a clock or a measurement is decided by the first process.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from bittern.errors import UserError


def rank() -> int:
    """Which of the processes this is; 0 where there is one."""
    return dist.get_rank() if _many() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _many() else 1


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device: str | torch.device) -> Generator[torch.device]:
    """For as long as it lasts the processes that `torchrun` started know each other; a process by itself is alone.

    Gives the device of this process: of a machine's GPUs each has its own.
    """
    device = torch.device(device)
    if _many() or not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))
    try:
        if on_gpu:
            device = torch.device("cuda", dist.get_node_local_rank())
            torch.cuda.set_device(device)
        yield device
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: Sequence[str], device: torch.device) -> None:
    """Leaves this process its share of a model, which is put together block by block when it is called."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count(),))
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh, reshard_after_forward=True)
    # What is left together after a call would not be told of what a step changes.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a parameter, in the same memory; of one that is not shared the parameter itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """The same as a parameter that an optimizer may have."""
    return nn.Parameter(local(parameter)) if isinstance(parameter, DTensor) else parameter


def full(tensor: Tensor) -> Tensor:
    """A parameter put together; all processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def whole(module: nn.Module) -> Generator[None]:
    """A module whose own parameters are put together for the time of the block; in all processes."""
    own = dict(module._parameters)
    for name, parameter in own.items():
        if isinstance(parameter, DTensor):
            module._parameters[name] = nn.Parameter(full(parameter).detach(), requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(own)


def mean(values: Tensor) -> Tensor:
    """Of the values of all processes, each of which has as many."""
    return summed(values.mean()) / count() if _many() else values.mean()


def summed(values: Tensor) -> Tensor:
    """Element by element, over the processes."""
    if not _many():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def agreed(values: Sequence[float], device: torch.device) -> list[float]:
    """What the first process says."""
    if not _many():
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return told.tolist()


def common(numbers: Sequence[int]) -> set[int]:
    """Those that every process has."""
    found: list[list[int]] = [list(numbers)]
    if _many():
        found *= count()
        dist.all_gather_object(found, list(numbers))
    return set(found[0]).intersection(*found[1:])


def wait() -> None:
    """Until all processes are here."""
    if _many():
        dist.barrier()


def told() -> str:
    """How many processes there are, before what is said of one."""
    return f"each of {count()} processes: " if count() > 1 else ""


def check_batch(batch: int) -> int:
    """States of a step that are this process's.

    Raises:
        UserError: for a batch that cannot be shared evenly.
    """
    if batch % count():
        raise UserError(f"batch {batch}: expected a multiple of {count()}, the number of processes")
    return batch // count()
