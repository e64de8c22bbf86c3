"""Blocks in turn, codes that stay, and a warm start: each learns, and each goes on after a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bittern import folders, pipelines, recipes
from bittern.architectures import plan
from bittern.distillation import distill
from bittern.distillation.bank import draw_bank, pattern_of
from bittern.distillation.block_bank import Walk
from bittern.distillation.fidelity import draw_images
from bittern.distillation.hosted import hosted
from bittern.distillation.student import learner, solve
from bittern.distillation.trainer import Trainer
from bittern.errors import UserError
from bittern.layers import quant_layers
from bittern.quantization import component
from bittern.quantization.stored import blocks_of
from bittern.recipes import Recipe

TEXTS = ["a red circle", "two blue stars", "a cat", "three green rings", "a cross", "a pink heart"]

SHORT = {
    "trajectories": 3, "validation": 1, "steps": 12, "batch": 12, "warmup": 2, "lr_codes": 0.03, "lr_others": 3e-3,
    "lr_kept": 1e-3, "ema": 0.8, "validate_every": 6, "weighting": "error",
}  # fmt: skip

MODES = {"blocks": {"mode": "blocks"}, "scales": {"mode": "scales"}, "warm start": {"warm_start": 12}}


def recipe_of(**settings: object) -> Recipe:
    return recipes.load("ternary-distilled").override(distillation={**SHORT, **settings})


@pytest.mark.parametrize("mode", MODES)
def test_the_error_falls_and_fidelity_rises(new_tiny_random_pipeline: Callable, mode: str) -> None:
    pipe, lines = new_tiny_random_pipeline(), []
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    done = distill(pipe, recipe_of(**MODES[mode]), prompts=TEXTS, say=lines.append)
    # What a warm start has brought, and then the whole model.
    first, last = done.log[0], done.log[1 if mode == "warm start" else -1]
    assert last["error"] < (0.6 if mode == "blocks" else 0.8) * first["error"]
    assert last["psnr"] > first["psnr"] + 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert any(line.startswith("training takes") for line in lines)
    assert done.report.ternary_share_blocks == 1
    assert all(row.error is not None and 0 < row.error < 2 for row in done.report.rows)
    if mode != "scales":
        told = [line for line in lines if "relative error" in line and " -> " in line]
        assert len(told) == 2 and told[0].startswith("transformer_blocks.0: relative error ")
        errors = [[float(word) for word in line.split() if word[:2] == "0."] for line in told]
        assert all(after < 0.8 * before for before, after in errors)


def test_codes_stay_while_scales_learn(new_tiny_random_pipeline: Callable) -> None:
    pipe, recipe = new_tiny_random_pipeline(), recipe_of(mode="scales").override(default={"rank": 4})
    teacher, settings = pipe.transformer, recipe.distillation
    assert settings is not None
    deployed = solve(pipe, teacher, recipe)
    before = {path: vars(copy.deepcopy(layer.parts())) for path, layer in quant_layers(deployed).items()}
    bank = draw_bank(pipe, teacher, TEXTS[:1], pattern=pattern_of(pipe, teacher, TEXTS))
    trainer = Trainer(learner(teacher, deployed, settings), bank, settings, seed=0, dtype=torch.float32)
    assert not any(layer.latent is not None for layer in trainer.student.layers.values())
    for _ in range(3):
        trainer.advance(1.0)
    trainer.student.export()
    moved: dict[str, list[bool]] = {"codes": [], "down": [], "scales": [], "up": []}
    for path, layer in quant_layers(deployed).items():
        for leaf, found in moved.items():
            found.append(not torch.equal(vars(layer.parts())[leaf], before[path][leaf]))
    assert not any(moved["codes"]) and not any(moved["down"])
    # A step may be too small for some numbers of 16 bits.
    assert all(sum(moved[leaf]) > len(moved[leaf]) / 2 for leaf in ("scales", "up"))


@pytest.mark.parametrize("model", ["flux", "unet"])
def test_what_a_block_was_given_gives_its_answers(
    new_tiny_random_pipeline: Callable, unet_folder: Path, model: str
) -> None:
    pipe = new_tiny_random_pipeline() if model == "flux" else pipelines.load(unet_folder, dtype=torch.float32)
    teacher = component(pipe)
    pattern = pattern_of(pipe, teacher, TEXTS)
    banks = tuple(draw_bank(pipe, teacher, TEXTS[:count], pattern=pattern, name=str(count)) for count in (2, 1))
    blocks = blocks_of(teacher, plan(teacher, recipe_of()))
    given = {"batch": 7, "dtype": torch.float32, "device": torch.device("cpu"), "seed": 0}
    walk = Walk(teacher, blocks, banks, room=2**40, **given)
    assert sorted(walk.order) == sorted(blocks)
    for turn in range(len(walk.order)):
        learned, watched = walk.record(turn)
        assert (len(learned), len(watched)) == (len(banks[0]), min(len(banks[1]), (len(banks[0]) + len(banks[1])) // 8))
        for bank in (learned, watched):
            rows = torch.tensor([0, len(bank) - 1])
            args, kwargs = bank.call(rows, torch.float32)
            with torch.no_grad():
                answer = teacher.get_submodule(walk.order[turn])(*args, **kwargs)
            # States and answers are kept in bf16.
            assert bank.missed(answer, rows).max() < 1e-3
            assert bank.missed(answer, rows.flip(0)).min() > 1e-3
    # A walk that begins in the middle gives the same.
    again, _ = Walk(teacher, blocks, banks, room=2**40, **given).record(turn)
    assert all(torch.equal(tensor, again.given[name]) for name, tensor in learned.given.items())
    few = Walk(teacher, blocks, banks, room=5 * walk.state_bytes, **given)
    assert few.learned == 4
    with pytest.raises(UserError, match=r"one state of a block takes .* expected room for two"):
        Walk(teacher, blocks, banks, room=walk.state_bytes, **given)


def test_a_pipeline_that_waits_on_the_host_draws_the_same(new_tiny_random_pipeline: Callable) -> None:
    pipe = new_tiny_random_pipeline()
    teacher, kind = pipe.transformer, type(pipe)
    blocks = blocks_of(teacher, plan(teacher, recipe_of()))
    images = draw_images(pipe, TEXTS[:1])
    parts = {name: id(part) for name, part in pipe.components.items()}
    with hosted(pipe, teacher, blocks, torch.device("cpu")) as drawing:
        assert pipe.transformer is drawing
        waiting = drawing.get_submodule(blocks[0])
        assert all(parameter.is_meta for parameter in waiting.parameters())
        # The teacher's own are to be read meanwhile.
        assert not any(parameter.is_meta for parameter in teacher.parameters())
        assert torch.equal(draw_images(pipe, TEXTS[:1]), images)
    assert type(pipe) is kind and {name: id(part) for name, part in pipe.components.items()} == parts
    assert torch.equal(draw_images(pipe, TEXTS[:1]), images)


def test_blocks_of_a_model_that_waits_on_the_host_learn_the_same(new_tiny_random_pipeline: Callable) -> None:
    recipe = recipe_of(mode="blocks", trajectories=1, steps=3, batch=4, validate_every=3)
    pipe = new_tiny_random_pipeline()
    # A number makes it another device than the pipeline's.
    waiting = distill(pipe, recipe, prompts=TEXTS, device="cpu:0")
    there = distill(new_tiny_random_pipeline(), recipe, prompts=TEXTS)
    assert [record["error"] for record in waiting.log] == [record["error"] for record in there.log]
    assert len({record["error"] for record in there.log}) == 3
    assert not any(parameter.is_meta for parameter in pipe.transformer.parameters())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_is_the_same_after_a_kill(
    tiny_random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    # In blocks the second is in hand at the kill.
    last, steps = (3, 4) if mode == "scales" else (6, 4)
    settings = {**MODES[mode], "steps": steps, "validate_every": 2, "trajectories": 1, "save_minutes": 1e-9}
    if mode == "warm start":
        settings["warm_start"] = 4
    out, again = tmp_path / "out", tmp_path / "again"
    folders.quantize_folder(tiny_random_folder, recipe_of(**settings), out, prompts=TEXTS)
    advance, taken, begun = Trainer.advance, [0], list[int]()

    def dies(trainer: Trainer, rate: float) -> None:
        # What is foreseen is no step.
        if type(trainer.loss) is Tensor:
            if taken[0] == last:
                raise Killed
            taken[0] += 1
        advance(trainer, rate)

    def noted(trainer: Trainer, rate: float) -> None:
        if type(trainer.loss) is Tensor:
            begun.append(trainer.steps)
        advance(trainer, rate)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", dies)
        with pytest.raises(Killed):
            folders.quantize_folder(tiny_random_folder, recipe_of(**settings), again, prompts=TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", noted)
        folders.quantize_folder(tiny_random_folder, recipe_of(**settings), again, prompts=TEXTS)
    assert begun == {"scales": [3], "blocks": [2, 3], "warm start": [2, 3, 0, 1, 2, 3]}[mode]
    files = [folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in (out, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (out / "distillation.svg").is_file()
    assert any(name.endswith(".codes") for name in load_file(files[0]))


def test_a_block_that_no_longer_improves_is_done(new_tiny_random_pipeline: Callable) -> None:
    lines: list[str] = []
    # A rate at which every step spoils it.
    settings = {"mode": "blocks", "steps": 40, "validate_every": 1, "patience": 2, "lr_codes": 1e-9, "lr_scales": 3.0}
    done = distill(new_tiny_random_pipeline(), recipe_of(**settings), prompts=TEXTS, say=lines.append)
    assert done.log[-1]["step"] < 20
    assert done.log[-1]["error"] == pytest.approx(done.log[0]["error"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "layers"}, "mode 'layers': expected 'end-to-end', 'scales' or 'blocks'"),
        ({"warm_start": -1}, "warm_start -1: expected"),
        ({"mode": "blocks", "warm_start": 5}, "warm_start 5 with mode 'blocks': blocks are all that learns"),
        ({"mode": "blocks", "student_share": 0.5}, "student_share 0.5 with mode 'blocks'"),
        ({"mode": "blocks", "checkpointing": True}, "checkpointing True with mode 'blocks'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as raised:
        recipe_of(**settings)
    assert message in str(raised.value)


def test_what_is_for_another_mode_is_refused(new_tiny_random_pipeline: Callable) -> None:
    pipe = new_tiny_random_pipeline()
    with pytest.raises(UserError, match="mode 'end-to-end' trains a model where it is"):
        distill(pipe, recipe_of(), prompts=TEXTS, device="cuda")
    with pytest.raises(UserError, match="a start is for the whole model"):
        distill(pipe, recipe_of(mode="blocks"), prompts=TEXTS, start={})
