from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bittern.evaluation import fidelity as fid


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def direct_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """One channel, window by window, in float64: the definition, with central moments."""
    offsets = np.arange(11) - 5
    taps = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(taps, taps)
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (z[top : top + 11, left : left + 11].astype(np.float64) for z in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("borders", ["mirrored", "inside"])
@pytest.mark.parametrize("shape", [(11, 11), (13, 24), (32, 19)])
def test_ssim_equals_the_definition(shape: tuple[int, int], borders: str) -> None:
    def seen(z: Tensor) -> np.ndarray:
        return np.pad(z.numpy(), 5, mode="reflect") if borders == "mirrored" else z.numpy()

    x = pictures(2, 3, *shape)
    near = (x.float() + 12 * torch.randn(x.shape)).clamp(0, 255).to(torch.uint8)
    for y in (near, pictures(*x.shape), 255 - x):
        expected = [
            np.mean([direct_ssim(seen(a), seen(b)) for a, b in zip(one, other, strict=True)])
            for one, other in zip(x, y, strict=True)
        ]
        assert fid.ssim(x, y, borders=borders).numpy() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_ssim_of_flat_pictures_is_finite_and_exact(level: int) -> None:
    x = torch.full((1, 3, 16, 16), level, dtype=torch.uint8)
    y = torch.full_like(x, 255 - level)
    c1 = (0.01 * 255) ** 2
    luminance = (2 * level * (255 - level) + c1) / (level**2 + (255 - level) ** 2 + c1)
    assert fid.ssim(x, y).item() == pytest.approx(luminance, abs=1e-9)
    assert fid.ssim(x, x).item() == pytest.approx(1.0, abs=1e-12)


def test_psnr_equals_the_definition() -> None:
    x, y = pictures(5, 3, 20, 30), pictures(5, 3, 20, 30)
    expected = [
        10 * math.log10(255**2 / np.mean((a.numpy().astype(float) - b.numpy().astype(float)) ** 2))
        for a, b in zip(x, y, strict=True)
    ]
    assert fid.psnr(x, y).numpy() == pytest.approx(expected, abs=1e-10)


def test_one_level_everywhere_is_48_decibels_and_opposites_are_zero() -> None:
    x = pictures(1, 3, 16, 16).clamp(max=254)
    assert fid.psnr(x, x + 1).item() == pytest.approx(48.1308, abs=1e-4)
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert fid.psnr(black, 255 - black).item() == pytest.approx(0.0, abs=1e-12)


def test_identical_pictures_are_capped_counted_and_fit_in_json() -> None:
    x = pictures(3, 3, 16, 16)
    y = x.clone()
    y[1] = 255 - y[1]
    found = fid.fidelity(x, y)
    assert found.psnr[0] == found.psnr[2] == fid.PSNR_CAP
    assert found.identical == 2
    json.dumps([found.psnr, found.ssim, found.mean_psnr.mean], allow_nan=False)


def test_a_single_differing_pixel_is_below_the_cap() -> None:
    x = pictures(1, 3, 128, 128).clamp(max=254)
    y = x.clone()
    y[0, 0, 5, 5] += 1
    assert fid.psnr(x, y).item() == pytest.approx(10 * math.log10(255**2 * 3 * 128 * 128), abs=1e-9)
    assert fid.psnr(x, y).item() < fid.PSNR_CAP


def test_chunks_change_nothing() -> None:
    x, y = pictures(7, 3, 24, 24), pictures(7, 3, 24, 24)
    one, all_at_once = fid.fidelity(x, y, chunk=3), fid.fidelity(x, y, chunk=100)
    assert one.psnr == pytest.approx(all_at_once.psnr, abs=1e-12)
    assert one.ssim == pytest.approx(all_at_once.ssim, abs=1e-12)
    assert one.mean_psnr.stderr == pytest.approx(np.std(one.psnr, ddof=1) / math.sqrt(7), abs=1e-12)


def test_wrong_batches_are_refused() -> None:
    x = pictures(2, 3, 16, 16)
    with pytest.raises(TypeError, match="uint8"):
        fid.psnr(x.float(), x)
    with pytest.raises(ValueError, match="one shape"):
        fid.fidelity(x, x[:1])
    with pytest.raises(ValueError, match="at least 11"):
        fid.ssim(pictures(1, 3, 10, 30), pictures(1, 3, 10, 30))
