"""The conductor: model + recipe -> few-bit model, and what it says about the result."""

from __future__ import annotations

from bittern.quantization.calibration import Calibration, calibrate, calibration_bytes
from bittern.quantization.conductor import quantize
from bittern.quantization.jobs import Progress, check_seed, check_weight, checkpoint_config, solve_job, swap
from bittern.quantization.report import Report, Row, inspect, predict, predict_size

__all__ = [
    "Calibration",
    "Progress",
    "Report",
    "Row",
    "calibrate",
    "calibration_bytes",
    "check_seed",
    "check_weight",
    "checkpoint_config",
    "inspect",
    "predict",
    "predict_size",
    "quantize",
    "solve_job",
    "swap",
]
