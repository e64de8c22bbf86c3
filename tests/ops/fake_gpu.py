"""A GPU that launches nothing: kernels are built for Hopper, and what would be launched is written down.

Tensors stay on the CPU, whose addresses do for those of a device. In a process of its own, for Triton and the
registry are told to believe in it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import wrap_handle_tensordesc
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bittern.ops import dispatch
from bittern.ops.triton import config, gemm

HOPPER = config.Device((9, 0), 227 << 10)

launched: list[tuple[str, tuple[int, ...], list[Any]]] = []
"""Kernel, grid and arguments of each launch; pointers as addresses, descriptors as address, shape and strides."""
searches: list[str] = []
"""Each time that Triton looked for the kernel to launch."""


class Utils:
    """The driver's functions. A tensor map is its address, shape and strides."""

    def fill_tma_descriptor(self, *args: Any) -> Any:
        address, *_, shape, strides, _ = args
        return address, tuple(shape), tuple(strides)

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": HOPPER.shared_memory, "multiprocessor_count": 132}

    def load_binary(self, name: str, *args: Any) -> Any:
        return name, name, 32, 0, 1024


class Raw:
    """The driver's own launcher: grid, stream, function, four of the launch, two of metadata, two hooks, arguments."""

    def __call__(self, *args: Any) -> None:
        x, y, z, _stream, function, _, _, _, _, _, _, enter, leave, *given = args
        for hook in (enter, leave):
            if hook is not None:
                hook(None)
        launched.append((function, (x, y, z), [a.data_ptr() if hasattr(a, "data_ptr") else a for a in given]))


class Launcher:
    """Takes what Triton's own takes: grid, stream, function, two of metadata, two hooks, and the arguments."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self, src: Any, metadata: Any) -> None:
        self.launch = wrap_handle_tensordesc(Raw(), src.signature, metadata.tensordesc_meta)

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, False, False, None, None, *rest)


class Driver:
    """What Triton asks of a driver."""

    launcher_cls = Launcher
    utils = Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def install() -> None:
    """Makes Triton and the registry believe in the GPU."""
    driver.set_active(Driver())
    dispatch.device_capability = lambda device: HOPPER.capability
    config.device_of = lambda device: HOPPER
    gemm.multiprocessors = lambda device: 132
    for i, kernel in enumerate(dispatch._kernels):
        if kernel.backend == "triton":
            dispatch._kernels[i] = dataclasses.replace(kernel, devices=None)
    search = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        searches.append(self.fn.__name__)
        return search(self, *args, **kwargs)

    JITFunction.run = run
