"""The student's own states are learned with the teacher's answers there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from bittern import recipes
from bittern.distillation import on_policy
from bittern.distillation.bank import draw_bank, output_of, pattern_of
from bittern.distillation.student import make_student
from bittern.distillation.trainer import Trainer
from bittern.quantization.workspace import Workspace

TEXTS = ["a red circle", "two blue stars", "a cat"]


def test_states_are_the_students_and_answers_the_teachers(new_tiny_random_pipeline: Callable, tmp_path: Path) -> None:
    pipe = new_tiny_random_pipeline()
    teacher = pipe.transformer
    recipe = recipes.load("ternary-distilled").override(distillation={"batch": 4})
    assert recipe.distillation is not None
    student = make_student(pipe, teacher, recipe, recipe.distillation)
    with torch.no_grad():
        # A student that goes the other way.
        student.model.proj_out.weight.neg_()
    bank = draw_bank(pipe, teacher, TEXTS, pattern=pattern_of(pipe, teacher, TEXTS))
    before = {name: tensor.clone() for name, tensor in bank.tensors().items()}
    trainer = Trainer(student, bank, recipe.distillation, seed=1, dtype=torch.float32)
    with Workspace(tmp_path / "work", {}) as workspace:
        on_policy.replace_states(trainer, pipe, teacher, TEXTS, 0, 2, workspace)
        assert pipe.transformer is teacher
        steps = bank.pattern.steps
        (latents,) = (name for name in bank.pattern.states if bank.states[name].ndim == 3)
        # Another noise, and from the second step on another path; the third trajectory is the teacher's still.
        assert not torch.equal(bank.states[latents][: 2 * steps], before[f"states.{latents}"][: 2 * steps])
        assert torch.equal(bank.states[latents][2 * steps :], before[f"states.{latents}"][2 * steps :])
        rows = torch.arange(2 * steps)
        args, kwargs = bank.call(rows, torch.float32)
        with torch.no_grad():
            taught = output_of(teacher(*args, **kwargs))
            torch.testing.assert_close(bank.targets[rows].float(), taught, rtol=0.01, atol=0.01)
            own = output_of(student.model(*args, **kwargs))
        # The latents moved by the student's answers, not by the teacher's.
        moved = bank.states[latents].float()[1:steps] - bank.states[latents].float()[: steps - 1]
        by_student, by_teacher = (_cosine(moved, -answer[: steps - 1]) for answer in (own, taught))
        assert by_student > 0.97 and by_teacher < -0.9

        after = {name: tensor.clone() for name, tensor in bank.tensors().items()}
        for name, tensor in bank.tensors().items():
            tensor.copy_(before[name])
        on_policy.restore(trainer, 2, workspace)
        assert all(torch.equal(tensor, after[name]) for name, tensor in bank.tensors().items())


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_the_share_grows_over_the_second_half() -> None:
    assert [on_policy.wanted(0.5, 100, done) for done in (0.0, 0.4, 0.5, 0.75, 1.0, 1.2)] == [0, 0, 0, 25, 50, 50]
