from __future__ import annotations

import itertools

import pytest
import torch

from bittern.errors import UserError
from bittern.formats import KLayout
from bittern.scheme import Scheme
from bittern.solvers import Solution, SolverOptions, relative_error, solve


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Like a trained weight: noise under a low-rank part, columns of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, k, generator=generator)
    strong = torch.randn(n, 12, generator=generator) @ torch.randn(12, k, generator=generator)
    return (noise + strong) * (torch.rand(k, generator=generator) * 2 + 0.2) / k**0.5


def tensors(solution: Solution) -> list[torch.Tensor | None]:
    return [solution.codes, solution.scales, solution.smooth, solution.down, solution.up]


def same(a: list[Solution], b: list[Solution]) -> bool:
    pairs = itertools.chain.from_iterable(zip(tensors(x), tensors(y), strict=True) for x, y in zip(a, b, strict=True))
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


SCHEMES = [
    Scheme(),
    Scheme(group_size=None, scale_dtype="fp16"),
    Scheme(rank=8, smooth=True),
    Scheme(rank=8, branch_dtype="fp32", scale_dtype="fp32", group_size=16),
    Scheme(weight="ternary", group_size=None),
    Scheme(weight="ternary", rank=8, smooth=True, packing="trits"),
]
SPAN = SolverOptions(smoothing="span")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("segments", [(100,), (60, 40)])
def test_tensors_are_those_of_the_scheme_and_reconstruct_is_the_layers_formula(scheme, segments):
    members = [weight(24, 100, 1), weight(7, 100, 2)]
    solutions = solve(members, scheme, SPAN, segments, seed=0)
    x = torch.randn(5, 100, dtype=torch.float64)
    for member, solution in zip(members, solutions, strict=True):
        expected = scheme.tensor_shapes(member.shape[0], segments)
        assert solution.codes.shape == (member.shape[0], solution.layout.padded_k)
        for leaf in ("scales", "smooth", "down", "up"):
            tensor = getattr(solution, leaf)
            assert (None if tensor is None else (tuple(tensor.shape), tensor.dtype)) == expected.get(leaf)
        packed = scheme.format.pack(solution.codes)
        assert (tuple(packed.shape), packed.dtype) == expected["codes"]

        codes = solution.layout.unpad(solution.codes).double()
        scales = solution.layout.unpad(solution.layout.expand_scales(solution.scales)).double()
        smoothed = x if solution.smooth is None else x / solution.smooth.double()
        y = smoothed @ (codes * scales).T
        if solution.down is not None and solution.up is not None:
            y += x @ solution.down.double().T @ solution.up.double().T
        assert torch.allclose(x @ solution.reconstruct().double().T, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_seed_gives_the_same_bits_whatever_the_global_state(scheme):
    members = [weight(24, 96, 1), weight(9, 96, 2)]
    torch.manual_seed(1)
    first = solve(members, scheme, SPAN, (96,), seed=5)
    torch.manual_seed(2)
    torch.rand(100)
    state = torch.random.get_rng_state()
    again = solve(members, scheme, SPAN, (96,), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(first, again)


def test_members_of_a_group_share_smoothing_and_branch():
    members = [weight(16, 64, seed) for seed in range(3)]
    solutions = solve(members, Scheme(rank=4, smooth=True), SPAN, (64,), seed=0)
    assert all(s.down is solutions[0].down and s.smooth is solutions[0].smooth for s in solutions)
    [joint] = solve([torch.cat(members)], Scheme(rank=4, smooth=True), SPAN, (64,), seed=0)
    assert torch.equal(torch.cat([s.codes for s in solutions]), joint.codes)
    assert torch.equal(torch.cat([s.reconstruct() for s in solutions]), joint.reconstruct())


def test_segments_share_one_branch_but_no_group():
    wide = weight(32, 50, 0)
    [solution] = solve([wide], Scheme(rank=4, group_size=16), SolverOptions(), (30, 20), seed=0)
    assert solution.layout.segments == (30, 20)
    assert solution.codes.shape == (32, 64)
    assert solution.down is not None
    assert solution.down.shape == (4, 50)
    assert not solution.codes[:, 30:32].any()
    assert not solution.codes[:, 52:].any()


@pytest.mark.parametrize("fmt", ["int4", "ternary"])
def test_the_branch_helps_and_more_rounds_never_hurt(fmt):
    w = weight(128, 192)

    def error(rank: int, rounds: int) -> float:
        scheme = Scheme(weight=fmt, rank=rank, branch_dtype="fp32")
        [solution] = solve([w], scheme, SolverOptions(rounds=rounds), (192,), seed=0)
        return relative_error(w, solution)

    errors = [error(16, rounds) for rounds in (0, 1, 2, 4, 8)]
    assert errors[0] < 0.75 * error(0, 0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("rounds", [1, 5])
def test_white_weights_end_no_worse_than_without_rounds(rounds):
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = []
    for r in (0, rounds):
        [solution] = solve([w], Scheme(rank=1, branch_dtype="fp32"), SolverOptions(rounds=r), (64,), seed=0)
        errors.append(relative_error(w, solution))
    assert errors[1] <= errors[0] * (1 + 1e-6)


def test_the_residual_absorbs_the_rounding_of_the_branch():
    # The branch alone misses by its bf16 rounding (2^-9); codes of 4 bits then leave a tenth of that at most.
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    [solution] = solve([w], Scheme(rank=4), SolverOptions(rounds=0), (64,), seed=0)
    assert solution.up is not None
    assert solution.down is not None
    branch = solution.up.float() @ solution.down.float()
    rounding = float((w - branch).norm() / w.norm())
    assert 1e-4 < rounding < 1e-2
    assert relative_error(w, solution) < 0.13 * rounding


def test_searched_scales_and_least_squares_codes_beat_their_baselines():
    w = weight(64, 256)

    def error(scheme: Scheme, **options: str) -> float:
        [solution] = solve([w], scheme, SolverOptions(**options), (256,), seed=0)
        return relative_error(w, solution)

    assert error(Scheme(), scales="search") < 0.9 * error(Scheme(), scales="absmax")
    rows = Scheme(weight="ternary", group_size=None)
    assert error(rows, codes="least-squares") < 0.9 * error(rows, codes="absmean")


def test_smoothing_by_exponent_zero_changes_nothing():
    w = weight(32, 64)
    flat = SolverOptions(smoothing="span", smoothing_exponent=0.0)
    [smoothed] = solve([w], Scheme(rank=4, smooth=True), flat, (64,), seed=0)
    [plain] = solve([w], Scheme(rank=4), SolverOptions(), (64,), seed=0)
    assert torch.equal(smoothed.codes, plain.codes)
    assert torch.equal(smoothed.reconstruct(), plain.reconstruct())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_type_is_solved_as_its_float32_values(dtype):
    w = weight(16, 64).to(dtype)
    scheme = Scheme(rank=4, smooth=True)
    assert same(solve([w], scheme, SPAN, (64,), 0), solve([w.float()], scheme, SPAN, (64,), 0))


@pytest.mark.parametrize("factor", [1e-30, 1e25])
@pytest.mark.parametrize("scheme", [Scheme(rank=4, smooth=True), Scheme(weight="ternary", rank=4)])
def test_tiny_and_huge_weights_are_solved_like_any_other(scheme, factor):
    w = weight(16, 64)
    [ordinary] = solve([w], scheme, SPAN, (64,), 0)
    [extreme] = solve([w * factor], scheme, SPAN, (64,), 0)
    assert relative_error(w * factor, extreme) == pytest.approx(relative_error(w, ordinary), rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme):
    [solution] = solve([torch.zeros(8, 64)], scheme, SPAN, (64,), 0)
    assert torch.equal(solution.reconstruct(), torch.zeros(8, 64))
    assert relative_error(torch.zeros(8, 64), solution) == 0


def test_a_rank_above_the_matrix_is_filled_with_zeros():
    [solution] = solve([weight(6, 64)], Scheme(rank=16), SolverOptions(), (64,), 0)
    assert solution.up is not None
    assert solution.up.shape == (6, 16)
    assert solution.reconstruct().isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e31])
def test_bad_values_are_counted_and_named(value):
    good, bad = weight(8, 64), weight(8, 64)
    bad[3, 4:6] = value
    with pytest.raises(UserError, match="to_k holds 2 values that are NaN, infinite or beyond 1e"):
        solve([good, bad], Scheme(), SolverOptions(), (64,), 0, names=["to_q", "to_k"])


def test_bad_shapes_dtypes_and_options_are_refused():
    cases = [
        ([], Scheme(), SolverOptions(), "no weights"),
        ([torch.zeros(4, 63)], Scheme(), SolverOptions(), r"weights\[0\] has shape \(4, 63\): expected \[N, 64\]"),
        ([torch.zeros(64)], Scheme(), SolverOptions(), r"expected \[N, 64\]"),
        ([torch.zeros(0, 64)], Scheme(), SolverOptions(), r"expected \[N, 64\]"),
        ([torch.zeros(4, 64, dtype=torch.int8)], Scheme(), SolverOptions(), "int8: expected a float type"),
        ([torch.zeros(4, 64)], Scheme(smooth=True), SolverOptions(), "make them agree"),
        ([torch.zeros(4, 64)], Scheme(smooth=True), SolverOptions(smoothing="modulation"), "magnitudes of 64 inputs"),
    ]
    for members, scheme, options, message in cases:
        with pytest.raises(UserError, match=message):
            solve(members, scheme, options, (64,), 0)
    for bad, message in (
        ({"scales": "serach"}, "did you mean 'search'"),
        ({"codes": "nearest"}, "codes 'nearest'"),
        ({"smoothing": "spam"}, "did you mean 'span'"),
        ({"smoothing_exponent": 1.5}, "expected 0 to 1"),
        ({"activation_exponent": -0.5}, "activation_exponent -0.5: expected 0 to 1"),
        ({"rounds": -1}, "rounds -1"),
    ):
        with pytest.raises(UserError, match=message):
            SolverOptions(**bad)


def test_relative_error_is_the_frobenius_ratio():
    codes = torch.tensor([[1, 0, -1, 0]], dtype=torch.int8)
    solution = Solution(codes, torch.tensor([[2.0]]), None, None, None, KLayout((4,), None))
    w = torch.tensor([[3.0, 0.0, -2.0, 0.0]])
    assert relative_error(w, solution) == pytest.approx(1 / 13**0.5)


def test_small_layers_have_the_same_bytes_for_any_number_of_threads():
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(5))
    scheme, options = Scheme(rank=8, activations=4), SolverOptions()
    before = torch.get_num_threads()
    solved = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            solved += solve([weight], scheme, options, (256,), 0)
            assert torch.get_num_threads() == threads, "the setting is the user's"
    finally:
        torch.set_num_threads(before)
    for leaf in ("codes", "scales", "down", "up"):
        assert torch.equal(getattr(solved[0], leaf), getattr(solved[1], leaf)), leaf
