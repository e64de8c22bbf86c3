"""Normalized, rotated heads: what diffusers computes, in one operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bittern import ops
from bittern.errors import UserError
from bittern.ops.heads import refusal


def arguments(lengths: tuple[int, ...], heads: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> list[Any]:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    q, k = ([random(2, length, heads, size) for length in lengths] for _ in range(2))
    weights = [[random(size) for _ in lengths] for _ in range(2)]
    angles = random(sum(lengths), size // 2).float().repeat_interleave(2, dim=1)
    return [q, k, *weights, 1e-6, angles.cos(), angles.sin()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(5,), (3, 6)])
def test_it_is_what_diffusers_does_in_steps(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, q_weights, k_weights, eps, cos, sin = arguments(lengths, dtype=dtype)
    for found, streams, weights in zip(
        ops.rotary_heads(q, k, q_weights, k_weights, eps, cos, sin), (q, k), (q_weights, k_weights), strict=True
    ):
        normed = []
        for x, weight in zip(streams, weights, strict=True):
            norm = nn.RMSNorm(x.shape[-1], eps=eps)
            norm.weight = nn.Parameter(weight)
            normed.append(norm(x))
        expected = apply_rotary_emb(torch.cat(normed, dim=1), (cos, sin), sequence_dim=1)
        assert found.dtype == dtype and torch.equal(found, expected)


def test_the_operation_is_sound_to_torch() -> None:
    torch.library.opcheck(torch.ops.bittern.rotary_heads.default, tuple(arguments((3, 6))))
    whole = torch.randn(2, 5, 3, 4, 8)
    args = arguments((5,), heads=4)
    torch.library.opcheck(torch.ops.bittern.rotary_heads.default, ([whole[:, :, 0]], [whole[:, :, 1]], *args[2:]))
    last = args[0][0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.bittern.rotary_heads.default, ([last], [last], *args[2:]))


def test_gradients_go_through() -> None:
    """A LoRA on the projections is trained through it."""
    q, k, *rest = arguments((3, 2))
    q = [x.double().requires_grad_() for x in q]
    k = [x.double().requires_grad_() for x in k]
    rest = [[w.double() for w in ws] for ws in rest[:2]] + rest[2:]
    assert torch.autograd.gradcheck(lambda *x: ops.rotary_heads(x[:2], x[2:], *rest), (*q, *k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[1].pop(), "2 queries, 1 keys, 2 and 2 weights: expected one of each"),
        (lambda a: a[1].__setitem__(0, a[1][0][:, :1]), r"queries \[2, 3, 3, 8\] and keys \[2, 1, 3, 8\]"),
        (lambda a: a.__setitem__(5, a[5][:4]), r"cos has shape \[4, 8\]: expected \[9, 8\] for 9 tokens"),
        (lambda a: a.__setitem__(6, a[6].to("meta")), "tables are on cpu, meta: expected one device"),
        (lambda a: a[3].__setitem__(1, a[3][1].to("meta")), "are on cpu, meta: expected one device"),
        (lambda a: a.__setitem__(5, a[5].long()), "have dtype torch.int64: expected float types"),
        (lambda a: a[2].__setitem__(0, a[2][0][:4]), "heads of 8: expected an even size and weights of that length"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    given = arguments((3, 6))
    change(given)
    with pytest.raises(UserError, match=message):
        ops.rotary_heads(*given)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: None, None),
        (lambda a: a[2].__setitem__(0, a[2][0].float()), "of one dtype, not others beside torch.bfloat16"),
        (lambda a: a[1].__setitem__(1, a[1][1].half()), "of one dtype"),
        (lambda a: a.__setitem__(5, a[5].to(BF16)), "cos and sin in torch.float32, not torch.bfloat16 and torch.float"),
        (lambda a: a.__setitem__(0, [x.float() for x in a[0]]), "takes torch.bfloat16, torch.float16, not torch.float"),
        (lambda a: a.__setitem__(0, [x[..., :6] for x in a[0]]), "takes heads of powers of two up to 256, not of 6"),
        (lambda a: a[0].__setitem__(0, a[0][0][:, :0]), "takes tokens, not none"),
    ],
)
def test_the_kernel_declares_what_it_takes(change: Any, reason: str | None) -> None:
    given = arguments((3, 6), dtype=BF16)
    change(given)
    q, k, q_weights, k_weights, _, cos, sin = given
    assert refusal(q, k, q_weights, k_weights, cos, sin) == "runs on cuda, not on cpu"
    with FakeTensorMode(allow_non_fake_inputs=True):
        streams = [[torch.empty_like(t, device="cuda") for t in part] for part in (q, k, q_weights, k_weights)]
        found = refusal(*streams, *(torch.empty_like(t, device="cuda") for t in (cos, sin)))
    assert found is None if reason is None else reason in str(found)


def test_weights_of_another_dtype_round_as_torch_does() -> None:
    q, k, q_weights, k_weights, eps, cos, sin = arguments((3, 6), dtype=BF16)
    wide = [w.float() for w in q_weights], [w.float() for w in k_weights]
    for y, same in zip(
        ops.rotary_heads(q, k, *wide, eps, cos, sin),
        ops.rotary_heads(q, k, q_weights, k_weights, eps, cos, sin), strict=True,
    ):  # fmt: skip
        assert y.dtype == BF16 and torch.allclose(y.float(), same.float(), rtol=2**-6, atol=2**-6)


def test_a_backend_that_cannot_is_refused_with_its_reason() -> None:
    with ops.use_backend("triton"), pytest.raises(UserError, match="'triton': triton runs on cuda, not on cpu"):
        ops.rotary_heads(*arguments((3, 6)))
    with ops.use_backend("torch"):
        ops.rotary_heads(*arguments((3, 6)))
