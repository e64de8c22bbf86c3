"""A pipeline that draws on a device and waits on the host: weights come when they are called.

What lies outside the denoiser's blocks stays on the device meanwhile. A second denoiser of the same tensors draws, so
that the teacher's weights can be read where they are.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from bittern.distillation.student import in_place_of
from bittern.trajectories import place, run_on
from bittern.trajectories.placement import weight_bytes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@contextmanager
def hosted(
    pipe: DiffusionPipeline, teacher: nn.Module, blocks: Sequence[str], device: torch.device
) -> Generator[nn.Module]:
    """For as long as it lasts the pipeline draws on a device with the model that is given; then it is as it was.

    Args:
        pipe: On the CPU.
        teacher: Its denoiser.
        blocks: Paths of the denoiser's blocks, none within another.
        device: Where to compute.
    """
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    tensors = [*teacher.parameters(), *teacher.buffers()]
    model = copy.deepcopy(teacher, {id(tensor): tensor for tensor in tensors})
    own, outside = type(pipe), weight_bytes(teacher) - sum(weight_bytes(teacher.get_submodule(b)) for b in blocks)
    others = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not teacher]
    with ExitStack() as stack:
        stack.callback(_bring_home, tensors)
        place(model, blocks, device, outside, pin=False)
        for part in others:
            cpu_offload(part, execution_device=device)
            stack.callback(remove_hook_from_submodules, part)
        stack.callback(setattr, pipe, "__class__", own)
        run_on(pipe, device)
        stack.enter_context(in_place_of(pipe, teacher, model))
        yield model


def _bring_home(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.cpu()
