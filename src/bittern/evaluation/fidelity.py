"""How near a picture is to the one the 16-bit model draws from the same noise: PSNR, SSIM, MS-SSIM; no weights needed.

PSNR = 10 log10(255^2 / MSE) over all pixels and channels. SSIM is that of Wang et al. (2004,
https://doi.org/10.1109/TIP.2003.819861): an 11-tap Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255,
population moments, each colour channel by itself and then the mean. Windows are centred on every pixel, and the
picture is mirrored beyond its borders, as in torchmetrics; `borders="inside"` takes only windows that lie inside the
picture, as the paper does: lower by .002 at .98 and by .015 at .64, on tiny-flux's pictures. MS-SSIM is that of Wang,
Simoncelli and Bovik (2003, https://doi.org/10.1109/ACSSC.2003.1292216): contrast and structure at five scales, each
half the one before, luminance at the last, weighted as they found; negative means count as zero. All run in float64,
because SSIM subtracts squares that nearly cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float64, UInt8
from torch import Tensor

from bittern.evaluation.stats import Estimate, mean_estimate

Borders = Literal["mirrored", "inside"]
PSNR_CAP = 100.0
"""dB; identical pictures have infinite PSNR, which neither averages nor fits in JSON."""

WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST_MS_SSIM = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)
"""Pixels; a smaller picture has no whole window at the last scale."""


@dataclass(frozen=True)
class Fidelity:
    """PSNR and SSIM of a batch of pictures against their references.

    Attributes:
        psnr: dB per picture, at most `PSNR_CAP`.
        ssim: per picture, at most 1.
        identical: number of pictures equal to their reference in every byte.
        ms_ssim: per picture, at most 1; None for pictures that are too small for it.
    """

    psnr: list[float]
    ssim: list[float]
    identical: int
    ms_ssim: list[float] | None = None

    @property
    def mean_psnr(self) -> Estimate:
        """Mean of the pictures' PSNR, in dB."""
        return mean_estimate(self.psnr)

    @property
    def mean_ssim(self) -> Estimate:
        """Mean of the pictures' SSIM."""
        return mean_estimate(self.ssim)

    @property
    def mean_ms_ssim(self) -> Estimate | None:
        """Mean of the pictures' MS-SSIM, where they have one."""
        return None if self.ms_ssim is None else mean_estimate(self.ms_ssim)


def _check(images: Tensor, reference: Tensor) -> None:
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8:
        raise TypeError(f"expected uint8 images, got {images.dtype} and {reference.dtype}")
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(f"expected two [B, C, H, W] batches of one shape, got {images.shape} and {reference.shape}")


def psnr(images: UInt8[Tensor, "b c h w"], reference: UInt8[Tensor, "b c h w"]) -> Float64[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture in dB, capped at `PSNR_CAP`."""
    _check(images, reference)
    mse = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / mse)).clamp(max=PSNR_CAP)


def ssim(
    images: UInt8[Tensor, "b c h w"], reference: UInt8[Tensor, "b c h w"], *, borders: Borders = "mirrored"
) -> Float64[Tensor, " b"]:
    """Structural similarity of each picture, mean over windows and channels.

    Args:
        images: the pictures.
        reference: what they are compared with.
        borders: whether windows reach beyond the borders, where the picture is mirrored, or stay inside.

    Raises:
        ValueError: if the pictures are smaller than the window.
    """
    _check(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW}, got {tuple(images.shape[-2:])}")
    whole, _ = _similarity(images.double(), reference.double(), borders)
    return whole


def ms_ssim(images: UInt8[Tensor, "b c h w"], reference: UInt8[Tensor, "b c h w"]) -> Float64[Tensor, " b"]:
    """Multi-scale structural similarity of each picture.

    Raises:
        ValueError: if the pictures are smaller than `SMALLEST_MS_SSIM`.
    """
    _check(images, reference)
    if min(images.shape[-2:]) < SMALLEST_MS_SSIM:
        raise ValueError(
            f"MS-SSIM needs pictures of at least {SMALLEST_MS_SSIM} pixels, got {tuple(images.shape[-2:])}"
        )
    x, y = images.double(), reference.double()
    product = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        whole, structure = _similarity(x, y, "mirrored")
        last = scale == len(SCALE_WEIGHTS) - 1
        product *= (whole if last else structure).clamp(min=0) ** weight
    return product


def _similarity(
    images: Float64[Tensor, "b c h w"], reference: Float64[Tensor, "b c h w"], borders: Borders
) -> tuple[Float64[Tensor, " b"], Float64[Tensor, " b"]]:
    """SSIM of each picture; and its contrast and structure without the luminance, of windows inside the picture."""
    x, y = (t.flatten(0, 1).unsqueeze(1) for t in (images, reference))
    reach = WINDOW // 2 if borders == "mirrored" else 0
    x, y = (F.pad(t, (reach,) * 4, mode="reflect") if reach else t for t in (x, y))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    inside = structure[..., reach : structure.shape[-2] - reach, reach : structure.shape[-1] - reach]
    whole, alone = (
        t.mean(dim=(1, 2, 3)).unflatten(0, images.shape[:2]).mean(dim=1) for t in (luminance * structure, inside)
    )
    return whole, alone


def _blur(x: Float64[Tensor, "b 1 h w"]) -> Float64[Tensor, "b 1 h2 w2"]:
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))


def fidelity(
    images: UInt8[Tensor, "b c h w"],
    reference: UInt8[Tensor, "b c h w"],
    *,
    chunk: int = 16,
    borders: Borders = "mirrored",
) -> Fidelity:
    """PSNR, SSIM and MS-SSIM of every picture; `chunk` pictures at a time, so that memory stays bounded."""
    _check(images, reference)
    pairs = list(zip(images.split(chunk), reference.split(chunk), strict=True))
    large = min(images.shape[-2:]) >= SMALLEST_MS_SSIM
    return Fidelity(
        psnr=[v for a, b in pairs for v in psnr(a, b).tolist()],
        ssim=[v for a, b in pairs for v in ssim(a, b, borders=borders).tolist()],
        identical=sum(int((a == b).flatten(1).all(dim=1).sum()) for a, b in pairs),
        ms_ssim=[v for a, b in pairs for v in ms_ssim(a, b).tolist()] if large else None,
    )
