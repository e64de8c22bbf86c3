"""The bank gives back what the teacher was called with, and what it answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bittern import pipelines
from bittern.distillation.bank import Bank, draw_bank, join, output_of, pattern_of
from bittern.quantization import component

TEXTS = ["a red circle", "two blue stars", "a cat on a mat"]


@pytest.fixture(params=["flux", "unet"])
def pipe(request: pytest.FixtureRequest, new_tiny_random_pipeline: Callable, unet_folder: Path):
    return new_tiny_random_pipeline() if request.param == "flux" else pipelines.load(unet_folder, dtype=torch.float32)


def test_states_replayed_give_the_targets(pipe) -> None:
    teacher = component(pipe)
    pattern = pattern_of(pipe, teacher, TEXTS)
    bank = draw_bank(pipe, teacher, TEXTS, pattern=pattern, seed=5)
    assert pattern.branches == (2 if type(teacher).__name__.startswith("UNet") else 1)
    assert len(bank) == 3 * pattern.steps * pattern.branches
    assert bank.nbytes == 3 * pattern.trajectory_bytes
    rows = torch.tensor([0, 7, len(bank) - 1, len(bank) // 2])
    args, kwargs = bank.call(rows, torch.float32)
    with torch.no_grad():
        again = output_of(teacher(*args, **kwargs))
    missed = (again - bank.targets[rows].float()).norm() / again.norm()
    # States and targets are kept in bf16: 2^-9 each, and the model passes the former on.
    assert missed < 0.02
    wrong = (again - bank.targets[rows.flip(0)].float()).norm() / again.norm()
    assert wrong > 5 * missed


def test_a_trajectory_depends_on_its_place_and_not_on_its_company(pipe) -> None:
    teacher = component(pipe)
    pattern = pattern_of(pipe, teacher, TEXTS)
    whole = draw_bank(pipe, teacher, TEXTS, pattern=pattern, seed=5)
    parts = [draw_bank(pipe, teacher, TEXTS[a:b], pattern=pattern, seed=5, start=a) for a, b in ((0, 1), (1, 3))]
    joined = join(parts)
    for name, tensor in whole.tensors().items():
        other = joined.tensors()[name]
        assert other.dtype == tensor.dtype
        # A batch of another size is multiplied in another order.
        torch.testing.assert_close(other.float(), tensor.float(), rtol=0.05, atol=0.05)
    assert Bank.of(pattern, joined.tensors()).nbytes == whole.nbytes
    other_noise = draw_bank(pipe, teacher, TEXTS, pattern=pattern, seed=6)
    assert (other_noise.targets.float() - whole.targets.float()).norm() > 0.1 * whole.targets.float().norm()
