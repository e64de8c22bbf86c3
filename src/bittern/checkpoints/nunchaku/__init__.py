"""Checkpoints of Nunchaku's: original files and Nunchaku Lite folders, read and written over plain state dicts."""

from __future__ import annotations

from bittern.checkpoints.nunchaku.metadata import LITE_METHOD, Lite, Original, describe, is_lite, lite, original
from bittern.checkpoints.nunchaku.packed import NEWER, OLDER
from bittern.checkpoints.nunchaku.reader import Incoming, incoming
from bittern.checkpoints.nunchaku.units import MODEL_CLASSES, Unit, flux_names, flux_units, lite_groups, lite_units
from bittern.checkpoints.nunchaku.writer import Outgoing, outgoing

__all__ = [
    "LITE_METHOD",
    "MODEL_CLASSES",
    "NEWER",
    "OLDER",
    "Incoming",
    "Lite",
    "Original",
    "Outgoing",
    "Unit",
    "describe",
    "flux_names",
    "flux_units",
    "incoming",
    "is_lite",
    "lite",
    "lite_groups",
    "lite_units",
    "original",
    "outgoing",
]
