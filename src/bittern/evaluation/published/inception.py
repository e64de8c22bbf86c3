"""FID [Heusel et al. 2017, arXiv:1706.08500]: how far one set of pictures is from another as a set.

Pictures become 2,048 numbers each by Inception v3 [Szegedy et al. 2015, arXiv:1512.00567] with the weights of the
published FID, which TensorFlow trained; resizing and pooling are those of pytorch-fid, with which scores agree. Both
sets are taken for Gaussians, and the distance of these is told. It falls with the number of pictures: compare only
scores of equally many.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from bittern.evaluation.published import weights
from bittern.precision import exact_products

FILE = "pt_inception-2015-12-05-6726825d.pth"
_ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
_SIDE = 299
_EPS = 1e-3
# Branches of each block by the shape of what its name begins with; "p" pools first. A name's convolutions follow one
# another, those in a tuple stand side by side.
_A = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
_C = (
    ("branch1x1",),
    tuple(f"branch7x7_{i}" for i in (1, 2, 3)),
    tuple(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)),
)


class Inception:
    """Inception v3 without its classifier.

    Args:
        tensors: the published ones, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._device = next(iter(self._tensors.values())).device

    @classmethod
    def load(cls, place: Path, device: str = "cpu") -> Inception:
        """The published weights from a folder.

        Raises:
            Absent: if they are not there.
            UserError: if they are damaged.
        """
        file = weights.find(place, FILE, _ADDRESS)
        tensors = weights.take(weights.read(file), shapes(), file)
        return cls({name: tensor.to(device) for name, tensor in tensors.items()})

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 h w"], *, chunk: int = 16) -> Float[Tensor, "b 2048"]:
        """2,048 numbers for each picture, on the CPU."""
        with exact_products():
            return torch.cat([self._forward(batch.to(self._device)).cpu() for batch in images.split(chunk)])

    def _forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 2048"]:
        conv = self._conv
        x = F.interpolate(images.float() / 255, (_SIDE, _SIDE), mode="bilinear", align_corners=False) * 2 - 1
        x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3", 0), "Conv2d_2b_3x3")
        x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 0)
        x = F.max_pool2d(x, 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = torch.cat([*(self._chain(x, block, names) for names in _A), self._pooled(x, block)], 1)
        x = self._halved(x, "Mixed_6a", ("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = torch.cat([*(self._chain(x, block, names) for names in _C), self._pooled(x, block)], 1)
        x = self._halved(x, "Mixed_7a", ("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        for block in ("Mixed_7b", "Mixed_7c"):
            wide = conv(x, f"{block}.branch3x3_1")
            deep = self._chain(x, block, ("branch3x3dbl_1", "branch3x3dbl_2"))
            parts = [conv(x, f"{block}.branch1x1")]
            parts += [conv(wide, f"{block}.branch3x3_2{side}") for side in "ab"]
            parts += [conv(deep, f"{block}.branch3x3dbl_3{side}") for side in "ab"]
            # The last block of the published weights pools by the maximum.
            x = torch.cat([*parts, self._pooled(x, block, by_maximum=block == "Mixed_7c")], 1)
        return x.mean((2, 3))

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """A convolution with its normalization and ReLU; stride 0 is stride 1 without padding, as stride 2 is."""
        t = self._tensors
        kernel = t[f"{name}.conv.weight"]
        padding = [side // 2 if stride == 1 else 0 for side in kernel.shape[2:]]
        x = F.conv2d(x, kernel, None, max(stride, 1), padding)
        mean, variance, weight, bias = (
            t[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=_EPS).relu()

    def _chain(self, x: Tensor, block: str, names: tuple[str, ...], last: int = 1) -> Tensor:
        for name in names:
            x = self._conv(x, f"{block}.{name}", last if name == names[-1] else 1)
        return x

    def _pooled(self, x: Tensor, block: str, *, by_maximum: bool = False) -> Tensor:
        pooled = F.max_pool2d(x, 3, 1, 1) if by_maximum else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self._conv(pooled, f"{block}.branch_pool")

    def _halved(self, x: Tensor, block: str, *branches: tuple[str, ...]) -> Tensor:
        return torch.cat([*(self._chain(x, block, names, 2) for names in branches), F.max_pool2d(x, 3, 2)], 1)


def shapes() -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the network reads."""
    kernels: dict[str, tuple[int, int, int, int]] = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }
    for block, inputs, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        kernels |= _named(block, branch1x1=(64, inputs, 1, 1), branch5x5_1=(48, inputs, 1, 1))
        kernels |= _named(block, branch5x5_2=(64, 48, 5, 5), branch3x3dbl_1=(64, inputs, 1, 1))
        kernels |= _named(block, branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3))
        kernels |= _named(block, branch_pool=(pool, inputs, 1, 1))
    kernels |= _named("6a", branch3x3=(384, 288, 3, 3), branch3x3dbl_1=(64, 288, 1, 1))
    kernels |= _named("6a", branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3))
    for block, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        kernels |= _named(block, branch1x1=(192, 768, 1, 1), branch_pool=(192, 768, 1, 1))
        kernels |= _named(block, branch7x7_1=(c, 768, 1, 1), branch7x7_2=(c, c, 1, 7), branch7x7_3=(192, c, 7, 1))
        kernels |= _named(block, branch7x7dbl_1=(c, 768, 1, 1), branch7x7dbl_2=(c, c, 7, 1))
        kernels |= _named(block, branch7x7dbl_3=(c, c, 1, 7), branch7x7dbl_4=(c, c, 7, 1))
        kernels |= _named(block, branch7x7dbl_5=(192, c, 1, 7))
    kernels |= _named("7a", branch3x3_1=(192, 768, 1, 1), branch3x3_2=(320, 192, 3, 3))
    kernels |= _named("7a", branch7x7x3_1=(192, 768, 1, 1), branch7x7x3_2=(192, 192, 1, 7))
    kernels |= _named("7a", branch7x7x3_3=(192, 192, 7, 1), branch7x7x3_4=(192, 192, 3, 3))
    for block, inputs in (("7b", 1280), ("7c", 2048)):
        kernels |= _named(block, branch1x1=(320, inputs, 1, 1), branch_pool=(192, inputs, 1, 1))
        kernels |= _named(block, branch3x3_1=(384, inputs, 1, 1), branch3x3dbl_1=(448, inputs, 1, 1))
        kernels |= _named(block, branch3x3_2a=(384, 384, 1, 3), branch3x3_2b=(384, 384, 3, 1))
        kernels |= _named(block, branch3x3dbl_2=(384, 448, 3, 3))
        kernels |= _named(block, branch3x3dbl_3a=(384, 384, 1, 3), branch3x3dbl_3b=(384, 384, 3, 1))
    found: dict[str, tuple[int, ...]] = {}
    for name, kernel in kernels.items():
        found[f"{name}.conv.weight"] = kernel
        found |= {f"{name}.bn.{part}": kernel[:1] for part in ("running_mean", "running_var", "weight", "bias")}
    return found


def _named(block: str, **kernels: tuple[int, int, int, int]) -> dict[str, tuple[int, int, int, int]]:
    return {f"Mixed_{block}.{name}": kernel for name, kernel in kernels.items()}


def frechet_distance(images: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]) -> float:
    """Squared Fréchet distance of two Gaussians with the means and covariances of two sets.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S = X^T X, X the centred rows over the root of their number less
    one, the last trace is the sum of the singular values of X1 X2^T: no root of a matrix is taken, and sets of fewer
    than d pictures are quick.

    Raises:
        ValueError: for a set of fewer than two.
    """
    if min(len(images), len(reference)) < 2:
        raise ValueError("a covariance needs two pictures at least")
    one, other = images.double(), reference.double()
    gap = one.mean(0) - other.mean(0)
    first, second = _centred(one), _centred(other)
    crossed = torch.linalg.svdvals(first @ second.T).sum()
    return float(gap @ gap + first.square().sum() + second.square().sum() - 2 * crossed)


def _centred(rows: Float64[Tensor, "n d"]) -> Float64[Tensor, "k d"]:
    """X with the covariance X^T X, of d rows at most."""
    x = (rows - rows.mean(0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x
