"""A short training on a CPU: the loss falls, fidelity rises, and nothing depends on being left in peace."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import bittern
from bittern import folders, pipelines, recipes, scene_prompts
from bittern.distillation import distill, latents, memory
from bittern.distillation.bank import draw_bank, pattern_of
from bittern.distillation.run import rate_at
from bittern.distillation.student import make_student
from bittern.distillation.trainer import Trainer
from bittern.errors import UserError
from bittern.quantization import component
from bittern.quantization.workspace import Workspace
from bittern.recipes import Distillation, Recipe

TEXTS = ["a red circle", "two blue stars", "a cat", "three green rings", "a cross", "a pink heart"]

SHORT = {
    "trajectories": 4, "validation": 2, "steps": 24, "batch": 16, "warmup": 4, "lr_codes": 0.03, "lr_others": 3e-3,
    "lr_kept": 1e-3, "ema": 0.8, "validate_every": 12,
}  # fmt: skip


def recipe_of(**settings: object) -> Recipe:
    return recipes.load("ternary-distilled").override(distillation={**SHORT, **settings})


def trainer_of(pipe, batch: int = 4, **settings: object) -> Trainer:
    recipe = recipe_of(batch=batch, **settings)
    teacher = component(pipe)
    assert recipe.distillation is not None
    student = make_student(pipe, teacher, recipe, recipe.distillation)
    bank = draw_bank(pipe, teacher, TEXTS[:2], pattern=pattern_of(pipe, teacher, TEXTS))
    return Trainer(student, bank, recipe.distillation, seed=1, dtype=torch.float32)


def test_the_loss_falls_and_fidelity_rises(new_tiny_random_pipeline: Callable) -> None:
    pipe = new_tiny_random_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    lines: list[str] = []
    done = distill(pipe, recipe_of(), prompts=TEXTS, say=lines.append)
    first, last = done.log[0], done.log[-1]
    assert (first["step"], last["step"]) == (0, 24)
    assert last["error"] < 0.5 * first["error"]
    assert last["psnr"] > first["psnr"] + 1
    # The pipeline is the teacher still.
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert any(line.startswith("training takes") for line in lines)
    assert done.report.ternary_share_blocks == 1
    assert all(row.error is not None and 0 < row.error < 2 for row in done.report.rows)


def test_a_pipeline_in_16_bits_is_learned_in_mixed_precision(new_tiny_random_pipeline: Callable) -> None:
    pipe = new_tiny_random_pipeline().to(torch.bfloat16)
    done = distill(pipe, recipe_of(steps=14, validate_every=14, validation=1, trajectories=2), prompts=TEXTS)
    assert done.log[-1]["error"] < 0.75 * done.log[0]["error"]
    assert {parameter.dtype for parameter in done.model.parameters()} == {torch.bfloat16}


def test_a_folder_is_written_read_and_the_same_after_a_kill(
    tiny_random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "steps": 4, "validate_every": 2, "trajectories": 2, "validation": 1, "save_minutes": 1e-9, "student_share": 1.0,
    }  # fmt: skip
    out, again = tmp_path / "out", tmp_path / "again"
    folders.quantize_folder(tiny_random_folder, recipe_of(**settings), out, prompts=TEXTS)

    class Killed(BaseException):
        pass

    steps = Trainer.advance

    def dies(trainer: Trainer, rate: float) -> None:
        if trainer.steps == 3:
            raise Killed
        steps(trainer, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", dies)
        with pytest.raises(Killed):
            folders.quantize_folder(tiny_random_folder, recipe_of(**settings), again, prompts=TEXTS)
    assert not again.exists()
    begun: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", lambda trainer, rate: (begun.append(trainer.steps), steps(trainer, rate)))
        folders.quantize_folder(tiny_random_folder, recipe_of(**settings), again, prompts=TEXTS)
    assert begun == [3]
    assert not folders.workspace_of(again).exists()
    files = [folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in (out, again)]
    assert files[0].read_bytes() == files[1].read_bytes()

    log = [json.loads(line) for line in (out / "distillation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 2, 4]
    assert (out / "distillation.svg").read_text().startswith("<svg")
    assert "4 steps on states of the original's own trajectories" in (out / "README.md").read_text()
    report = bittern.inspect(out)
    assert report.recipe.startswith("ternary-distilled")
    assert report.ternary_share_blocks == 1
    # What was read draws what was trained: the stored codes are the student's own.
    few = pipelines.load(out, dtype=torch.float32)
    assert torch.isfinite(few("a cat", height=32, width=32, num_inference_steps=2, output_type="pt").images).all()
    assert any(name.endswith(".codes") for name in load_file(files[0]))


def test_a_mistake_leaves_nothing_behind(tiny_random_folder: Path, tmp_path: Path) -> None:
    held_out = [prompt.prompt for prompt in scene_prompts.held_out(6)]
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is held out for evaluation"):
        folders.quantize_folder(tiny_random_folder, recipe_of(), out, prompts=held_out)
    with pytest.raises(UserError, match="trains a model of one size"):
        folders.quantize_folder(tiny_random_folder, recipe_of(), out, prompts=TEXTS, fit="1MB")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_drawn(
    new_tiny_random_pipeline: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    with (
        Workspace(tmp_path / "work", {}) as workspace,
        pytest.raises(UserError, match=r"the disk of .*work lacks .*lower `bank_gib`"),
    ):
        distill(new_tiny_random_pipeline(), recipe_of(validation=1), prompts=TEXTS, workspace=workspace)


def test_memory_is_told_beforehand(new_tiny_random_pipeline: Callable) -> None:
    trainer = trainer_of(new_tiny_random_pipeline(), batch=5)
    told = memory.needed(trainer, [], 0)
    assert told.activations == memory.kept_bytes(trainer, 5)
    trainer.advance(1.0)
    state = sum(tensor.nbytes for held in trainer.optimizer.state.values() for tensor in held.values() if tensor.ndim)
    gradients = sum(parameter.grad.nbytes for parameter in trainer.params)
    own = sum(parameter.nbytes for parameter in trainer.params) + sum(tensor.nbytes for tensor in trainer.average)
    assert told.learning == state + gradients + own


def test_what_is_measured_leaves_no_history(new_tiny_random_pipeline: Callable) -> None:
    """A captured step may meet no gradients that belong to another stream."""
    trainer = trainer_of(new_tiny_random_pipeline())
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())
        memory.kept_bytes(trainer, 2)
        assert before == sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())
    finally:
        gc.enable()


def test_blocks_that_run_again_give_the_same_gradients_in_less_memory(new_tiny_random_pipeline: Callable) -> None:
    plain, again = (trainer_of(new_tiny_random_pipeline(), checkpointing=on) for on in (False, True))
    assert memory.kept_bytes(again, 4) < 0.5 * memory.kept_bytes(plain, 4)
    for trainer in (plain, again):
        trainer.advance(1.0)
    for one, other in zip(plain.params, again.params, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weighting", ["uniform", "error"])
def test_the_same_seed_gives_the_same_training(new_tiny_random_pipeline: Callable, weighting: str) -> None:
    first, second = (trainer_of(new_tiny_random_pipeline(), weighting=weighting) for _ in range(2))
    for trainer in (first, second):
        torch.manual_seed(id(trainer) % 1000)
        for _ in range(3):
            trainer.advance(1.0)
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
    assert float(first.loss) > 0


def test_averages_start_another_training(new_tiny_random_pipeline: Callable) -> None:
    trainer, other = (trainer_of(new_tiny_random_pipeline()) for _ in range(2))
    for _ in range(3):
        trainer.advance(1.0)
    rows = torch.arange(4)
    with trainer.averaged():
        wanted = trainer.errors(rows)
    with torch.no_grad():
        fresh = other.errors(rows)
    from bittern.distillation.run import load_latents

    load_latents(other, latents(trainer))
    with torch.no_grad():
        torch.testing.assert_close(other.errors(rows), wanted, rtol=0.02, atol=1e-6)
    assert (fresh - wanted).abs().max() > 0.1 * wanted.max()
    with pytest.raises(UserError, match="the start has no"):
        load_latents(other, {})


def test_what_trains_is_no_mere_quantization(new_tiny_random_pipeline: Callable) -> None:
    pipe = new_tiny_random_pipeline()
    with pytest.raises(UserError, match="trains the whole model"):
        bittern.quantize(pipe, "ternary-distilled")
    with pytest.raises(UserError, match="trains nothing"):
        distill(pipe, "ternary-fast")
    with pytest.raises(UserError, match="bank_gib"):
        distill(pipe, recipe_of(bank_gib=1e-9), prompts=TEXTS)


def test_a_training_that_is_another_is_refused(new_tiny_random_pipeline: Callable, tmp_path: Path) -> None:
    trainer = trainer_of(new_tiny_random_pipeline())
    with pytest.raises(UserError, match="does not fit"):
        trainer.load({**trainer.tensors(), "more": torch.zeros(1)}, 3)
    with Workspace(tmp_path / "work", {}) as workspace:
        workspace.save("x", trainer.tensors(), {})
        trainer.load(workspace.load("x")[0], 5)
    assert trainer.steps == 5


def test_learning_rates_rise_and_fall() -> None:
    settings = Distillation(warmup=10)
    assert rate_at(0, 0.0, settings) == pytest.approx(0.1)
    assert rate_at(9, 0.0, settings) == pytest.approx(1.0)
    assert rate_at(500, 0.5, settings) == pytest.approx(0.5)
    assert rate_at(1000, 1.0, settings) == pytest.approx(0.0, abs=1e-12)
