"""How near a picture is to the one the 16-bit model draws from the same noise: PSNR and SSIM, no weights needed.

PSNR = 10 log10(255^2 / MSE) over all pixels and channels. SSIM is that of Wang et al. (2004,
https://doi.org/10.1109/TIP.2003.819861): an 11-tap Gaussian window with sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255,
population moments, only windows that lie inside the picture, each colour channel by itself and then the mean. Both
run in float64, because SSIM subtracts squares that nearly cancel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float64, UInt8
from torch import Tensor

from bittern.evaluation.stats import Estimate, mean_estimate

PSNR_CAP = 100.0
"""dB; identical pictures have infinite PSNR, which neither averages nor fits in JSON."""

WINDOW = 11
SIGMA = 1.5
C1 = (0.01 * 255) ** 2
C2 = (0.03 * 255) ** 2


@dataclass(frozen=True)
class Fidelity:
    """PSNR and SSIM of a batch of pictures against their references.

    Attributes:
        psnr: dB per picture, at most `PSNR_CAP`.
        ssim: per picture, at most 1.
        identical: number of pictures equal to their reference in every byte.
    """

    psnr: list[float]
    ssim: list[float]
    identical: int

    @property
    def mean_psnr(self) -> Estimate:
        """Mean of the pictures' PSNR, in dB."""
        return mean_estimate(self.psnr)

    @property
    def mean_ssim(self) -> Estimate:
        """Mean of the pictures' SSIM."""
        return mean_estimate(self.ssim)


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


def ssim(images: UInt8[Tensor, "b c h w"], reference: UInt8[Tensor, "b c h w"]) -> Float64[Tensor, " b"]:
    """Structural similarity of each picture, mean over windows and channels.

    Raises:
        ValueError: if the pictures are smaller than the window.
    """
    _check(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW}, got {tuple(images.shape[-2:])}")
    x, y = (t.double().flatten(0, 1).unsqueeze(1) for t in (images, reference))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).unflatten(0, images.shape[:2]).mean(dim=1)


def _blur(x: Float64[Tensor, "b 1 h w"]) -> Float64[Tensor, "b 1 h2 w2"]:
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    taps = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(x, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1))


def fidelity(images: UInt8[Tensor, "b c h w"], reference: UInt8[Tensor, "b c h w"], *, chunk: int = 16) -> Fidelity:
    """PSNR and SSIM of every picture; `chunk` pictures at a time, so that memory stays bounded."""
    _check(images, reference)
    pairs = list(zip(images.split(chunk), reference.split(chunk), strict=True))
    return Fidelity(
        psnr=[v for a, b in pairs for v in psnr(a, b).tolist()],
        ssim=[v for a, b in pairs for v in ssim(a, b).tolist()],
        identical=sum(int((a == b).flatten(1).all(dim=1).sum()) for a, b in pairs),
    )
