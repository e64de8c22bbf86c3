"""The scenes world: prompts, drawings and a detector, so that a small model's obedience is measured offline."""

from bittern.evaluation.scenes.detect import Detection, detect
from bittern.evaluation.scenes.draw import MAX_OBJECTS, PALETTE, SceneBatch, SceneTable, draw, sample
from bittern.evaluation.scenes.effects import EFFECTS, Effect, Outlines, outlines, painted
from bittern.evaluation.scenes.judge import judge, satisfies
from bittern.scene_prompts import (
    COLORS,
    GROUNDS,
    SHAPES,
    TASKS,
    SceneObject,
    ScenePrompt,
    every_prompt,
    held_out,
    refuse_held_out,
    some_of_training,
    training_prompts,
)

__all__ = [
    "COLORS",
    "EFFECTS",
    "GROUNDS",
    "MAX_OBJECTS",
    "PALETTE",
    "SHAPES",
    "TASKS",
    "Detection",
    "Effect",
    "Outlines",
    "SceneBatch",
    "SceneObject",
    "ScenePrompt",
    "SceneTable",
    "detect",
    "draw",
    "every_prompt",
    "held_out",
    "judge",
    "outlines",
    "painted",
    "refuse_held_out",
    "sample",
    "satisfies",
    "some_of_training",
    "training_prompts",
]
