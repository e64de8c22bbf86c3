"""The teacher's trajectories: what its denoiser was called with, and what it answered, for batches of any states.

Trajectories run in batches of prompts. Nothing is known of a pipeline but how it calls its denoiser: two probes, with
one prompt and with two, tell which tensors of a call grow with the prompts, and two steps of each tell which change
along the trajectory. What changes is stored for each state, what does not once a trajectory, the rest once.

    bytes = trajectories · branches · (context + steps · (state + target))

Of FLUX.1 at 1024 x 1024 a state and its target take half a megabyte each; of tiny-flux 8 kB. Guidance that runs as a
second half of the batch is a branch: its states are states like any other. Targets are stored, too, so that the
teacher need not be in memory while the student learns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern.errors import UnusableModel, UserError
from bittern.threads import is_small, one_thread
from bittern.trajectories import State, defaults, pack, unpack
from bittern.trajectories.texts import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_FEW = 16
"""Tensors with so few numbers a row are times and sizes, which keep their type; others are stored in 16 bits."""

_PIXELS = {"cpu": 2**18, "cuda": 2**24}
"""Pixels of the pictures that are denoised together."""


class _Enough(Exception):
    """All calls that somebody wants are done."""


@dataclass(frozen=True)
class Pattern:
    """How a pipeline calls its denoiser.

    Attributes:
        tree: The arguments, with names in place of tensors (see `trajectories.pack`).
        fixed: Tensors that are always the same.
        context: Names of tensors that belong to a trajectory.
        states: Names of tensors that belong to a state.
        branches: Rows of a call for each prompt.
        steps: Calls of a trajectory.
        context_bytes: Of a trajectory's branch.
        state_bytes: Of a state and its target.
    """

    tree: list[Any]
    fixed: Mapping[str, Tensor]
    context: tuple[str, ...]
    states: tuple[str, ...]
    branches: int
    steps: int
    context_bytes: int
    state_bytes: int

    @property
    def trajectory_bytes(self) -> int:
        """Of one trajectory."""
        return self.branches * (self.context_bytes + self.steps * self.state_bytes)


@dataclass(frozen=True)
class Bank:
    """States and targets, row by row: trajectories, in them steps, in them branches.

    Attributes:
        pattern: How the denoiser is called.
        context: By name, [trajectories · branches, ...].
        states: By name, [trajectories · steps · branches, ...].
        targets: The teacher's answers, [trajectories · steps · branches, ...].
    """

    pattern: Pattern
    context: dict[str, Tensor]
    states: dict[str, Tensor]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that grow with trajectories, by name."""
        return {
            **{f"context.{name}": tensor for name, tensor in self.context.items()},
            **{f"states.{name}": tensor for name, tensor in self.states.items()},
            "targets": self.targets,
        }

    def everything(self) -> list[Tensor]:
        """All tensors."""
        return [*self.tensors().values(), *self.pattern.fixed.values()]

    @classmethod
    def of(cls, pattern: Pattern, tensors: Mapping[str, Tensor]) -> Bank:
        """The bank of which `tensors` gave these."""
        return cls(
            pattern,
            {name: tensors[f"context.{name}"] for name in pattern.context},
            {name: tensors[f"states.{name}"] for name in pattern.states},
            tensors["targets"],
        )

    def to(self, device: torch.device | str) -> Bank:
        """The same on a device."""
        pattern = replace(self.pattern, fixed={name: t.to(device) for name, t in self.pattern.fixed.items()})
        return Bank.of(pattern, {name: tensor.to(device) for name, tensor in self.tensors().items()})

    @property
    def device(self) -> torch.device:
        """Where states and targets lie."""
        return self.targets.device

    @property
    def steps(self) -> int:
        """Of a trajectory."""
        return self.pattern.steps

    def missed(self, answer: Any, rows: Tensor) -> Tensor:
        """The mean squared error of a denoiser's answer in each of these states, float32."""
        return (output_of(answer).float() - self.targets[rows].float()).square().flatten(1).mean(dim=1)

    def steps_of(self, rows: Tensor) -> Tensor:
        """The steps of the trajectories that these rows are."""
        return rows // self.pattern.branches % self.pattern.steps

    def call(self, rows: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the denoiser in these states, 16-bit tensors in `dtype`."""
        branches, steps = self.pattern.branches, self.pattern.steps
        owners = rows // (steps * branches) * branches + rows % branches
        tensors = {
            **self.pattern.fixed,
            **{name: wide(tensor[owners], dtype) for name, tensor in self.context.items()},
            **{name: wide(tensor[rows], dtype) for name, tensor in self.states.items()},
        }
        (state,) = unpack(tensors, self.pattern.tree)
        return state.args, state.kwargs


def join(banks: Sequence[Bank]) -> Bank:
    """Banks of one pattern as one."""
    if len(banks) == 1:
        return banks[0]
    tensors = [bank.tensors() for bank in banks]
    return Bank.of(banks[0].pattern, {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})


def output_of(answer: Any) -> Tensor:
    """The tensor that a denoiser gives."""
    return answer if isinstance(answer, Tensor) else answer[0]


@torch.no_grad()
def pattern_of(pipe: DiffusionPipeline, denoiser: nn.Module, texts: Sequence[str]) -> Pattern:
    """How a pipeline calls its denoiser, by two steps with one prompt and two with two.

    Raises:
        UserError: for calls that do not grow with the prompts, or in which more changes than their rows.
    """
    one, two = (_probe(pipe, denoiser, list(texts[:1]) * count) for count in (1, 2))
    kept: dict[str, list[str]] = {"context": [], "states": []}
    fixed: dict[str, Tensor] = {}
    sizes = {"context": 0, "states": 0}
    branches = {
        len(tensor) for name, tensor in one.first.items() if tensor.ndim and len(two.first[name]) == 2 * len(tensor)
    }
    if len(branches) != 1:
        raise UserError(f"{type(pipe).__name__} calls its model with rows {sorted(branches)} a prompt: expected one")
    (rows,) = branches
    for name, tensor in one.first.items():
        grows = tensor.ndim > 0 and len(two.first[name]) == 2 * len(tensor)
        same = torch.equal(tensor, one.second[name])
        if not grows and same:
            fixed[name] = tensor
            continue
        if not grows and tensor.numel() > 1:
            raise UserError(
                f"{type(pipe).__name__} gives its model a tensor {list(tensor.shape)} that changes with the step and "
                "does not belong to a prompt: such models cannot be distilled"
            )
        kind = "context" if same else "states"
        kept[kind].append(name)
        row = narrow(tensor[:1] if grows else tensor.reshape(1))
        sizes[kind] += row.nbytes
    target = narrow(one.output[:1])
    return Pattern(
        one.tree, fixed, tuple(kept["context"]), tuple(kept["states"]), rows, defaults(pipe).steps,
        sizes["context"], sizes["states"] + target.nbytes,
    )  # fmt: skip


@torch.no_grad()
def draw_bank(
    pipe: DiffusionPipeline,
    denoiser: nn.Module,
    texts: Sequence[str],
    *,
    pattern: Pattern | None = None,
    seed: int = 0,
    name: str = "bank",
    start: int = 0,
) -> Bank:
    """The trajectories of these texts, on the device where the pipeline draws.

    A trajectory's noise comes from a generator of its own: it depends on its place, the name and the seed.

    Args:
        pipe: In full precision.
        denoiser: The one of its components that denoises.
        texts: One a trajectory.
        pattern: What `pattern_of` gave.
        seed: Of the noise.
        name: Another name gives other noise.
        start: The place of the first.

    Raises:
        UnusableModel: if a trajectory stops being finite.
    """
    pattern = pattern or pattern_of(pipe, denoiser, texts)
    call = defaults(pipe)
    states: dict[str, list[Tensor]] = {key: [] for key in pattern.states}
    context: dict[str, Tensor] = {}
    targets: list[Tensor] = []
    rows = len(texts) * pattern.branches

    def by_branch(tensor: Tensor) -> Tensor:
        # A call has all prompts of a branch after one another; the bank has a prompt's branches side by side.
        rows_of = tensor.expand(rows) if tensor.ndim == 0 or len(tensor) != rows else tensor
        return narrow(rows_of.unflatten(0, (pattern.branches, len(texts))).transpose(0, 1))

    def called(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        tensors, _ = pack([State(0, 0, args, kwargs)])
        for key in pattern.states:
            states[key].append(by_branch(tensors[key]))
        if not context:
            context.update({key: by_branch(tensors[key]).flatten(0, 1) for key in pattern.context})
        targets.append(by_branch(output))

    generators = [noise(seed, name, start + index) for index in range(len(texts))]
    with _watching(denoiser, called), quiet(pipe), one_thread(is_small(denoiser)):
        pipe(prompt=list(texts), generator=generators, output_type="latent", **call.options())
    if len(targets) != pattern.steps:
        raise UserError(
            f"{type(pipe).__name__} calls its model {len(targets)} times in {pattern.steps} steps: expected one call a "
            "step; such models cannot be distilled yet"
        )
    if not torch.isfinite(targets[-1]).all():
        raise UnusableModel("the model gives NaN or infinity along its own trajectory: try another dtype")
    # [trajectories, steps, branches, ...]
    flat = {key: torch.stack(parts, dim=1).flatten(0, 2) for key, parts in states.items()}
    return Bank(pattern, context, flat, torch.stack(targets, dim=1).flatten(0, 2))


def noise(seed: int, name: str, index: int) -> torch.Generator:
    """The generator of one trajectory's noise."""
    own = random.Random(f"noise:{seed}:{name}:{index}").getrandbits(63)
    return torch.Generator("cpu").manual_seed(own)


def together(pipe: DiffusionPipeline) -> int:
    """Trajectories that are drawn in a batch."""
    call = defaults(pipe)
    kind = "cpu" if pipe.device.type == "cpu" else "cuda"
    return max(1, _PIXELS[kind] // (call.height * call.width))


@dataclass(frozen=True)
class _Probe:
    """The tensors of the first two calls."""

    tree: list[Any]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    output: Tensor


def _probe(pipe: DiffusionPipeline, denoiser: nn.Module, texts: list[str]) -> _Probe:
    calls: list[tuple[dict[str, Tensor], list[Any], Tensor]] = []

    def called(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.append((*pack([State(0, 0, args, kwargs)]), output))
        if len(calls) == 2:
            raise _Enough

    generators = [noise(0, "probe", index) for index in range(len(texts))]
    with _watching(denoiser, called), quiet(pipe), one_thread(is_small(denoiser)), suppress(_Enough):
        pipe(prompt=texts, generator=generators, output_type="latent", **defaults(pipe).options())
    (first, tree, output), (second, _, _) = calls
    return _Probe(tree, first, second, output)


@contextmanager
def _watching(
    denoiser: nn.Module, called: Callable[[tuple[Any, ...], dict[str, Any], Tensor], None]
) -> Generator[None]:
    """Has a function told of each call of a module, and its answer."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        called(args, kwargs, output_of(answer))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def narrow(tensor: Tensor) -> Tensor:
    """What is stored of rows."""
    few = tensor[0].numel() <= _FEW if tensor.ndim else True
    return tensor.clone() if few or not tensor.is_floating_point() else tensor.to(torch.bfloat16)


def wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the denoiser takes them."""
    return tensor.to(dtype) if tensor.dtype == torch.bfloat16 else tensor
