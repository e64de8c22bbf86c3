"""How a few-bit model learns from the one it was made of: the part of a recipe that asks for training."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bittern.errors import UserError


class Distillation(BaseModel):
    """Settings of self-distillation (see `bittern.distillation`).

    Attributes:
        mode: What learns, and of whom: the whole model to answer as the teacher does ("end-to-end"); the same with the
            codes that the solver found, so that only scales, norms, biases and low-rank factors learn ("scales"); or
            one block after another to answer as the teacher's block does ("blocks"), for models that do not fit.
        warm_start: Steps that each block learns by itself before the whole model does; 0 for none.
        trajectories: Trajectories of the teacher to learn from, each from a prompt and noise of its own.
        bank_gib: GiB that their states may take; fewer trajectories are drawn where they would take more. While blocks
            learn it is also what a block's inputs and answers may take, and fewer states are learned.
        validation: Further trajectories, of prompts that training does not see, to watch fidelity with; the same ones
            for any seed.
        steps: Optimizer steps at most; of each block, where blocks learn one after another.
        minutes: Minutes of training and validation at most; learning rates then follow whichever is ahead, the clock or
            the steps. Blocks that learn one after another share them evenly.
        batch: States of a step.
        warmup: Steps in which the learning rates rise; then they fall along a cosine.
        lr_codes: Learning rate of the numbers that are rounded to codes, in units of a code.
        lr_scales: Learning rate of the scales' logarithms.
        lr_others: Learning rate of norms, biases and low-rank factors.
        lr_kept: Learning rate of the layers that keep 16 bits; 0 leaves them as they are.
        betas: AdamW's.
        ema: Decay of the averaged weights, which are the result; 0 takes the last ones.
        reach: How far beyond the outermost codes the numbers under the codes may go, in units of a code.
        weighting: What a state's error counts: all the same, or each step of the trajectory the same.
        student_share: Share of the bank that is replaced, evenly over the second half of the training, by states of the
            student's own trajectories with the teacher's answers there, so that its errors do not compound.
        compile: Whether a GPU's blocks are compiled: a minute at the start, for steps that are faster by far.
        checkpointing: Whether blocks are run again in the backward pass, for less memory.
        validate_every: Steps between validations. A block is watched by itself, and the whole model when a block is
            done.
        patience: Validations without improvement after which training ends.
        save_minutes: Minutes between checkpoints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mode: Literal["end-to-end", "scales", "blocks"] = "end-to-end"
    warm_start: int = Field(default=0, ge=0)
    trajectories: int = Field(default=16384, ge=1)
    bank_gib: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    validation: int = Field(default=64, ge=1)
    steps: int = Field(default=20000, ge=1)
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch: int = Field(default=512, ge=1)
    warmup: int = Field(default=200, ge=0)
    lr_codes: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    lr_scales: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    lr_others: float = Field(default=3e-4, ge=0, allow_inf_nan=False)
    lr_kept: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = Field(default=(0.9, 0.99), strict=False)
    ema: float = Field(default=0.999, ge=0, lt=1)
    reach: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    weighting: Literal["uniform", "error"] = "uniform"
    student_share: float = Field(default=0.0, ge=0, le=1)
    compile: bool = True
    checkpointing: bool = False
    validate_every: int = Field(default=2000, ge=1)
    patience: int = Field(default=10, ge=1)
    save_minutes: float = Field(default=3.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Distillation:
        if self.mode != "blocks":
            return self
        for name, reason in (
            ("warm_start", "blocks are all that learns"),
            ("student_share", "states of the student's own are learned by the whole model"),
            ("checkpointing", "a block keeps what it computes"),
        ):
            if value := getattr(self, name):
                raise UserError(f"{name} {value} with mode 'blocks': {reason}; leave it out")
        return self
