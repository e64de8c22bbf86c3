"""One optimizer step, and all that a training is made of at any moment.

On a GPU the whole step (states out of the bank, forward, backward, AdamW, average) is one CUDA graph: nothing in it
may ask the host, so the rows of a batch, learning rates and the loss are tensors that stay where they are. Blocks are
compiled, and rounding, scales and the cast to 16 bits melt into one kernel a layer. There a compiler leaves out what
rounds a scale before the weight is rounded: ternary weights come out the same, since a code changes no mantissa.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from bittern import graphs
from bittern.architectures import known
from bittern.distillation.sharding import check_batch, local, local_parameter, mean, rank, summed
from bittern.distillation.student import Student, copy_to
from bittern.errors import UserError
from bittern.recipes import Distillation
from bittern.trajectories.sensitivity import DIFFERENTIABLE

_CHUNK = 256
"""Batches whose rows are drawn together."""

_WARM_UP = 4
"""Steps before a capture, in which libraries set themselves up."""


class States(Protocol):
    """States to learn from, and what the teacher answers there: `Bank` for the whole model, `BlockBank` for a block."""

    def __len__(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where it is learned."""
        ...

    @property
    def steps(self) -> int:
        """Of a trajectory."""
        ...

    def everything(self) -> list[Tensor]:
        """All tensors."""
        ...

    def steps_of(self, rows: Tensor) -> Tensor:
        """The steps of the trajectories that these rows are."""
        ...

    def call(self, rows: Tensor, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in these states."""
        ...

    def missed(self, answer: Any, rows: Tensor) -> Tensor:
        """The error of an answer in each of these states, float32."""
        ...


class Trainer:
    """Parameters, their averages, the optimizer and the batches.

    Args:
        student: Learns.
        bank: States and targets; the student is on its device.
        settings: How.
        seed: Of the batches.
        dtype: What the teacher computes in; states are given in it.
    """

    def __init__(
        self, student: Student, bank: States, settings: Distillation, *, seed: int, dtype: torch.dtype
    ) -> None:
        self.student, self.bank, self.settings, self.seed, self.dtype = student, bank, settings, seed, dtype
        self.device = bank.device
        self.steps = 0
        found = student.parameters(settings)
        # Of a model that is shared among processes each has its own part.
        self.kinds = {kind: [local_parameter(parameter) for parameter in each] for kind, each in found.items()}
        self.params = [parameter for each in self.kinds.values() for parameter in each]
        whole = [parameter for each in found.values() for parameter in each]
        self.shared = [(own, one) for own, one in zip(self.params, whole, strict=True) if own is not one]
        self.ranges: dict[tuple[int, int], list[Tensor]] = {}
        for layer in student.layers.values():
            if layer.latent is not None:
                self.ranges.setdefault((layer.lowest, layer.highest), []).append(local(layer.latent.data))
        self.average = [parameter.detach().clone() for parameter in self.params]
        self.rates = {kind: torch.zeros((), device=self.device) for kind in self.kinds}
        groups = [{"params": each, "lr": self.rates[kind]} for kind, each in self.kinds.items()]
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, betas=settings.betas, weight_decay=0.0, fused=True, capturable=on_gpu
        )
        self.blend = torch.ones((), device=self.device)
        self.recent = torch.ones((), device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.step_error = torch.ones(bank.steps, device=self.device)
        self.rows = torch.zeros(check_batch(settings.batch), dtype=torch.int64, device=self.device)
        for parameter in self.params:
            parameter.grad = torch.zeros_like(parameter)
        self._chunk: tuple[int, Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if settings.checkpointing:
            self._checkpoint_blocks()

    def _checkpoint_blocks(self) -> None:
        model: Any = self.student.model
        if not getattr(model, "_supports_gradient_checkpointing", False):
            raise UserError(f"checkpointing: {type(model).__name__} cannot run blocks again; leave it out")
        model.enable_gradient_checkpointing()

    def _compute(self) -> Any:
        """Float32 parameters, and products in the teacher's type."""
        if self.dtype == torch.float32:
            return nullcontext()
        # Cached casts would be the first step's for ever in a graph.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def errors(self, rows: Tensor, bank: States | None = None) -> Tensor:
        """The mean squared error of each of these states, float32."""
        bank = bank or self.bank
        args, kwargs = bank.call(rows, self.dtype)
        with self._compute():
            answer = self.student.model(*args, **kwargs)
        return bank.missed(answer, rows)

    def _step(self) -> None:
        torch._foreach_zero_([parameter.grad for parameter in self.params])
        errors = self.errors(self.rows)
        if self.settings.weighting == "error":
            steps = self.bank.steps_of(self.rows)
            with torch.no_grad():
                # A product instead of a scattered sum, whose order would be any.
                belongs = (steps[None] == torch.arange(len(self.step_error), device=self.device)[:, None]).float()
                count, total = summed(belongs.sum(dim=1)), summed(belongs @ errors)
                found = torch.where(count > 0, total / count.clamp(min=1), self.step_error)
                self.step_error.lerp_(found, 0.02)
                weight = 1 / self.step_error[steps]
                weight = weight / mean(weight)
            loss = (errors * weight).mean()
        else:
            loss = errors.mean()
        loss.backward()
        for own, one in self.shared:
            if one.grad is not None:
                own.grad.copy_(local(one.grad))
                one.grad = None
        self.optimizer.step()
        reach = self.settings.reach
        with torch.no_grad():
            for (lowest, highest), latents in self.ranges.items():
                torch._foreach_clamp_min_(latents, lowest - reach)
                torch._foreach_clamp_max_(latents, highest + reach)
            moved = torch._foreach_sub([parameter.data for parameter in self.params], self.average)
            torch._foreach_mul_(moved, self.blend)
            torch._foreach_add_(self.average, moved)
            self.loss.lerp_(mean(errors.detach()), self.recent)

    def prepare(self) -> None:
        """Compiles and captures the step on a GPU; nothing has changed afterwards. On a CPU there is nothing to do."""
        if self.device.type != "cuda":
            return
        if self.shared:
            # Shares travel at every block, which neither a graph nor a compiled block holds.
            return
        if self.settings.compile:
            compile_blocks(self.student.model)
        kept = {name: tensor.clone() for name, tensor in self.tensors().items()}
        for rate in self.rates.values():
            rate.zero_()
        with sdpa_kernel(DIFFERENTIABLE):
            self._graph, _ = graphs.record(self._step, warm_up=_WARM_UP)
        self.load(kept, self.steps)

    def advance(self, rate: float) -> None:
        """One step, with the learning rates times `rate`."""
        for kind, tensor in self.rates.items():
            tensor.fill_(rate * getattr(self.settings, f"lr_{kind}"))
        # A young average forgets faster: it would drag the start along.
        self.recent.fill_(max(0.02, 1 / (self.steps + 1)))
        self.blend.fill_(1 - min(self.settings.ema, (1 + self.steps) / (10 + self.steps)))
        self.rows.copy_(self._rows_of(self.steps))
        if self._graph is None:
            with sdpa_kernel(DIFFERENTIABLE):
                self._step()
        else:
            self._graph.replay()
        self.steps += 1

    def _rows_of(self, step: int) -> Tensor:
        """The batch of a step, which depends on the seed and the step alone."""
        chunk = step // _CHUNK
        if self._chunk is None or self._chunk[0] != chunk:
            process = f":{rank()}" if rank() else ""
            own = random.Random(f"batches:{self.seed}:{chunk}{process}").getrandbits(63)
            generator = torch.Generator("cpu").manual_seed(own)
            drawn = torch.randint(len(self.bank), (_CHUNK, len(self.rows)), generator=generator)
            self._chunk = chunk, drawn.to(self.device)
        return self._chunk[1][step % _CHUNK]

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its averaged weights for the time of the block; the last ones if nothing is averaged."""
        last = [parameter.detach().clone() for parameter in self.params]
        with torch.no_grad():
            copy_to([parameter.data for parameter in self.params], self.average)
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), self._compute():
                yield self.student.model
        finally:
            with torch.no_grad():
                copy_to([parameter.data for parameter in self.params], last)

    # ---- what a training is at any moment

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; the tensors themselves."""
        named: dict[str, Tensor] = {"loss": self.loss, "step_error": self.step_error}
        for index, (parameter, average) in enumerate(zip(self.params, self.average, strict=True)):
            state: Mapping[str, Tensor] = self.optimizer.state[parameter]
            if not state:
                self._begin(parameter)
                state = self.optimizer.state[parameter]
            named |= {f"{index}.parameter": parameter.data, f"{index}.average": average}
            named |= {f"{index}.{key}": tensor for key, tensor in state.items()}
        return named

    def _begin(self, parameter: nn.Parameter) -> None:
        """The optimizer's state of a parameter before the first step, as AdamW itself would make it."""
        on = self.device if self.device.type == "cuda" else None
        self.optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=on),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Goes back to what `tensors` gave after so many steps.

        Raises:
            UserError: if they are another training's.
        """
        own = self.tensors()
        wrong = [name for name in {**own, **tensors} if name not in own or name not in tensors]
        wrong += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
        if wrong:
            raise UserError(f"a checkpoint of the training does not fit ({wrong[0]}): begin anew with --restart")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.steps = steps


def compile_blocks(model: nn.Module) -> None:
    """Compiles the repeated blocks of a model one by one: those of one shape share what is compiled."""
    family = known(type(model).__name__)
    if family is None:
        return
    sites = (family.site(path) for path, module in model.named_modules() if isinstance(module, nn.Module) and path)
    parents = {site.parent for site in sites if site is not None}
    for parent in sorted(parents):
        # A block within a block is compiled with it.
        if not any(parent.startswith(f"{other}.") for other in parents):
            compile_block(model.get_submodule(parent))


def compile_block(block: nn.Module) -> None:
    """Compiles one of many blocks, of which there are a few kinds."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    block.compile(fullgraph=True, dynamic=False)
