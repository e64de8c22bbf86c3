"""Two processes with a share each learn what one learns with everything."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from bittern import folders, pipelines, recipes
from bittern.architectures import plan
from bittern.distillation import sharding
from bittern.distillation.bank import draw_bank, join, pattern_of
from bittern.distillation.student import make_student
from bittern.distillation.trainer import Trainer
from bittern.errors import UserError
from bittern.quantization.stored import blocks_of
from bittern.recipes import Recipe

TEXTS = ["a red circle", "two blue stars", "a cat", "three green rings", "a cross", "a pink heart"]
STEPS = 4
SETTINGS = {
    "trajectories": 4, "validation": 1, "steps": 4, "batch": 8, "warmup": 2, "lr_codes": 0.03, "lr_kept": 1e-3,
    "ema": 0.5, "validate_every": 2, "weighting": "error", "save_minutes": 1e-9,
}  # fmt: skip


def recipe_of(**settings: object) -> Recipe:
    return recipes.load("ternary-distilled").override(distillation={**SETTINGS, **settings})


def trainer_of(folder: Path, shares: list[int]) -> Trainer:
    """With these shares of the bank, and a student that is shared where there are several processes."""
    pipe = pipelines.load(folder, dtype=torch.float32)
    recipe, teacher = recipe_of(), pipe.transformer
    assert recipe.distillation is not None
    pattern = pattern_of(pipe, teacher, TEXTS)
    banks = [
        draw_bank(pipe, teacher, TEXTS[2 * share : 2 * share + 2], pattern=pattern, start=2 * share) for share in shares
    ]
    student = make_student(pipe, teacher, recipe, recipe.distillation)
    if sharding.count() > 1:
        sharding.shard(student.model, blocks_of(teacher, plan(teacher, recipe)), torch.device("cpu"))
    return Trainer(student, join(banks), recipe.distillation, seed=3, dtype=torch.float32)


def learned(trainer: Trainer, steps: int) -> dict[str, torch.Tensor]:
    """The loss of each step, and in the end what is deployed of the averages."""
    losses = []
    for _ in range(steps):
        trainer.advance(1.0)
        losses.append(float(trainer.loss))
    with trainer.averaged():
        trainer.student.export()
    tensors = {name: t.clone() for name, t in trainer.student.deployed.state_dict().items() if type(t) is torch.Tensor}
    return {"losses": torch.tensor(losses), "step_error": trainer.step_error, **tensors}


def steps_in_process(folder: Path, out: Path) -> None:
    trainer = trainer_of(folder, [sharding.rank()])
    # Each process has half of what learns.
    assert sum(p.numel() for p in trainer.params) < 0.6 * sum(p.numel() for _, p in trainer.shared)
    rows = torch.stack([trainer._rows_of(step) for step in range(STEPS)])
    with pytest.raises(UserError, match="batch 3: expected a multiple of 2"):
        sharding.check_batch(3)
    torch.save({"rows": rows, **learned(trainer, STEPS)}, out / f"steps-{sharding.rank()}.pt")


def process(rank: int, work: Callable[[Path, Path], None], port: int, folder: Path, out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(folder, out)
    finally:
        dist.destroy_process_group()


class Killed(BaseException):
    pass


def whole(folder: Path, out: Path) -> None:
    """From folder to folder, in peace and with a kill after which one process has a later checkpoint than the other."""
    folders.quantize_folder(folder, recipe_of(), out / "peace", prompts=TEXTS)
    steps = Trainer.advance

    def dies(trainer: Trainer, rate: float) -> None:
        if trainer.steps == 3:
            raise Killed
        steps(trainer, rate)

    Trainer.advance = dies
    with pytest.raises(Killed):
        folders.quantize_folder(folder, recipe_of(), out / "killed", prompts=TEXTS)
    Trainer.advance = steps
    if sharding.rank():
        work = folders.workspace_of(out / "killed") / "process-1"
        latest = max(work.glob("training-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
        latest.unlink()
    begun: list[int] = []
    Trainer.advance = lambda trainer, rate: (begun.append(trainer.steps), steps(trainer, rate))[1]
    folders.quantize_folder(folder, recipe_of(), out / "killed", prompts=TEXTS)
    Trainer.advance = steps
    (out / f"begun-{sharding.rank()}.json").write_text(json.dumps(begun))


def two(work: Callable[[Path, Path], None], folder: Path, out: Path) -> None:
    """Has two processes do something."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (work, port, folder, out), nprocs=2)


def test_losses_and_weights_are_those_of_one_process(tiny_random_folder: Path, tmp_path: Path) -> None:
    two(steps_in_process, tiny_random_folder, tmp_path)
    first, second = (torch.load(tmp_path / f"steps-{rank}.pt") for rank in (0, 1))
    trainer = trainer_of(tiny_random_folder, [0, 1])
    # The same states: the second process's rows are of the second half of the bank.
    both = torch.cat([first["rows"], second["rows"] + len(trainer.bank) // 2], dim=1)
    assert both.shape == (STEPS, 8) and not torch.equal(first["rows"], second["rows"])
    trainer._rows_of = both.__getitem__
    alone = learned(trainer, STEPS)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["step_error"], alone["step_error"], rtol=1e-5, atol=0)
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        if name.endswith(".codes"):
            # A code that lay on a border may have fallen to the other side.
            assert (first[name] != tensor).float().mean() < 1e-3
        else:
            torch.testing.assert_close(first[name], tensor, rtol=0.01, atol=1e-4)
    # Each step has changed what the next one meets.
    assert len(set(alone["losses"].tolist())) == STEPS


@pytest.mark.slow
def test_a_folder_is_the_same_after_a_kill_that_left_one_process_behind(
    tiny_random_folder: Path, tmp_path: Path
) -> None:
    two(whole, tiny_random_folder, tmp_path)
    peace, killed = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("peace", "killed")
    )
    assert peace.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in peace.items())
    # Not from where the first process was, but from where both were.
    assert (
        json.loads((tmp_path / "begun-0.json").read_text())
        == json.loads((tmp_path / "begun-1.json").read_text())
        == [2, 3]
    )
    assert not folders.workspace_of(tmp_path / "killed").exists()
    log = [json.loads(line) for line in (tmp_path / "killed" / "distillation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 2, 4]
    assert len({record["error"] for record in log}) == 3
