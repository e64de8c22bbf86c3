"""The conductor: model + recipe -> few-bit model, and what it says about the result."""

from __future__ import annotations

from bittern.quantization.calibration import Calibration, Progress, Recorder
from bittern.quantization.conductor import quantize
from bittern.quantization.fit import Fit, foreseen
from bittern.quantization.jobs import (
    check_seed,
    check_targets,
    check_weight,
    checkpoint_config,
    empty_layers,
    few_bit_class,
    fill_meta,
    other_shapes,
    refuse_training,
    solve_job,
)
from bittern.quantization.memory import Limits, calibration_bytes, passes
from bittern.quantization.model_card import model_card
from bittern.quantization.on_meta import model_on_meta
from bittern.quantization.preview import Kept, Preview, preview
from bittern.quantization.report import Report, Row, component, inspect, predict, predict_size

__all__ = [
    "Calibration",
    "Fit",
    "Kept",
    "Limits",
    "Preview",
    "Progress",
    "Recorder",
    "Report",
    "Row",
    "calibration_bytes",
    "check_seed",
    "check_targets",
    "check_weight",
    "checkpoint_config",
    "component",
    "empty_layers",
    "few_bit_class",
    "fill_meta",
    "foreseen",
    "inspect",
    "model_card",
    "model_on_meta",
    "other_shapes",
    "passes",
    "predict",
    "predict_size",
    "preview",
    "quantize",
    "refuse_training",
    "solve_job",
]
