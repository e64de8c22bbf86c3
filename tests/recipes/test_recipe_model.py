"""Recipes: validation in one line, patches in order, ranks as fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bittern import recipes
from bittern.errors import UserError
from bittern.recipes import Recipe, resolve_rank, validated

INT4 = recipes.load("int4")


@given(st.integers(1, 512), st.integers(1, 20_000), st.integers(1, 20_000))
def test_fractional_rank_is_nearest_and_at_least_one(divisor: int, n: int, k: int) -> None:
    if divisor == 1:
        return
    rank = resolve_rank(f"1/{divisor}", n, k)
    exact = Fraction(min(n, k), divisor)
    assert rank == max(1, round(exact))
    assert 1 <= rank <= min(n, k)


def test_flux_proportion_is_rank_32_of_3072() -> None:
    assert resolve_rank("1/96", 3072, 12288) == 32
    assert resolve_rank(0.0104, 12288, 3072) == 32
    assert resolve_rank("1/96", 16, 16) == 1
    assert resolve_rank(0, 16, 16) == 0


def test_rank_beyond_the_layer_is_refused() -> None:
    with pytest.raises(UserError, match="rank 65 for a 64 x 256 layer: expected at most 64"):
        resolve_rank(65, 64, 256)


@pytest.mark.parametrize("rank", [True, -1, "3/2", "a", "1/0", 0.0, 1.0, float("nan"), float("inf"), None, [1]])
def test_impossible_rank_is_refused(rank: object) -> None:
    with pytest.raises(UserError, match=r"default\.rank .*: expected a whole number of 0 or more, or a fraction"):
        INT4.override(default={"rank": rank})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"defualt": {}}, r"unknown key 'defualt': did you mean 'default'\?"),
        ({"default": {"rnk": 1}}, r"unknown key 'default\.rnk': did you mean 'rank'\?"),
        ({"distillation": {"stepz": 3}}, r"unknown key 'distillation\.stepz': did you mean 'steps'\?"),
        ({"distillation": {"stepz": 3, "steps": 0}}, r"unknown key 'distillation\.stepz': .* \(and 1 more\)"),
        ({"modulation": {"rnak": 1}}, r"modulation: unknown key 'rnak': did you mean 'rank'\?"),
        ({"overrides": {"*.to_q": {"activation": 4}}}, r"overrides\['\*\.to_q'\]: .* mean 'activations'\?"),
        ({"default": {"weight": "int5"}}, r"default\.weight 'int5': expected 'int4', 'nvfp4' or 'ternary'"),
        ({"default": {"activations": 5}}, r"default\.activations 5: expected 4, 8 or 16"),
        ({"default": {"group_size": 6}}, r"group_size 6: expected a positive multiple of 4"),
        ({"default": {"group_size": "64"}}, r"default\.group_size '64': expected a valid integer"),
        ({"default": {"packing": "trits"}}, r"packing 'trits' does not fit int4"),
        ({"default": {"smoothing_exponent": 2.0}}, r"smoothing_exponent 2\.0: expected less than or equal to 1"),
        ({"default": {"smoothing": "columns"}}, r"smoothing 'columns' is for ternary weights"),
        (
            {"overrides": {"a": {"weight": "ternary", "smoothing": "grid"}}},
            r"smoothing 'grid' is not for ternary weights",
        ),
        ({"overrides": {"a": {"weight": "ternary", "branch": "outputs"}}}, r"with data: expected rounding 'gptq'"),
        (
            {"overrides": {"a": {"weight": "ternary", "rounding": "gptq", "smoothing": "span"}}},
            r"with data: expected rounding 'gptq', and smoothing 'columns' or none",
        ),
        (
            {"overrides": {"a": {"weight": "ternary", "rounding": "gptq", "sensitivity": True}}},
            r"sensitivity is not for ternary weights: expected false",
        ),
        ({"default": {"sweeps": -1}}, r"default\.sweeps -1: expected greater than or equal to 0"),
        ({"default": 3}, r"default 3: expected"),
        ({"keep": "proj_out"}, r"keep 'proj_out': expected a valid list"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        INT4.override(**changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("recipe int4: ")


def test_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"mine: key 'default' is missing: add it"):
        validated(Recipe, {"name": "x"}, "mine")


def test_a_mistyped_key_comes_before_the_one_that_is_missing() -> None:
    with pytest.raises(UserError, match=r"mine: unknown key 'defualt': did you mean 'default'\?"):
        validated(Recipe, {"name": "x", "defualt": {"weight": "int4"}}, "mine")


def test_patches_apply_in_order() -> None:
    recipe = recipes.load("svdquant-fast").override(
        overrides={"*.proj_out": {"rank": 8}, "single*.3.proj_out": {"rank": 4, "activations": 8}}
    )
    assert recipe.spec("single_transformer_blocks.3.attn.to_q").rank == 32
    assert recipe.spec("single_transformer_blocks.0.proj_out").rank == 8
    late = recipe.spec("single_transformer_blocks.3.proj_out")
    assert (late.rank, late.activations, late.weight) == (4, 8, "int4")
    modulation = recipe.spec("single_transformer_blocks.3.norm.linear", modulation=True)
    assert (modulation.rank, modulation.activations) == (0, 16)


def test_override_merges_validates_and_says_so_in_the_name() -> None:
    recipe = recipes.load("svdquant-fast")
    changed = recipe.override(default={"rank": "1/96"})
    assert changed.name == "svdquant-fast[default.rank=1/96]"
    assert changed.default.activations == 4
    assert changed.spec("x").scheme(256, 1024).rank == 3
    assert recipe.default.rank == 32
    assert recipe.override(name="mine", default={"rank": 8}).name == "mine"


@pytest.mark.parametrize("name", recipes.names())
def test_dump_restores_the_recipe(name: str) -> None:
    recipe = recipes.load(name)
    assert validated(Recipe, recipe.dump(), "dump") == recipe


def test_convolutions_are_int4_with_16_bit_activations_unless_the_recipe_says_more() -> None:
    for name in set(recipes.names()) - {"ternary-distilled"}:
        recipe = recipes.load(name)
        if "weight" in (recipe.convolution or {}):
            continue
        spec = recipe.spec("down_blocks.0.resnets.0.conv1", convolution=True)
        assert (spec.weight, spec.group_size, spec.activations) == ("int4", 64, 16)
        assert (spec.rank, spec.smoothing, spec.shift) == (0, "none", 0)
        assert spec.scheme(320, 2880).bits_per_weight(320, 2880, (320,) * 9) == 4.25
    fast = recipes.load("svdquant-fast")
    wide = fast.override(convolution={"rank": 16}, overrides={"*.conv2": {"group_size": 32}})
    assert wide.spec("a.conv1", convolution=True).rank == 16
    assert wide.spec("a.conv2", convolution=True).group_size == 32
    assert wide.spec("a.linear") == fast.spec("a.linear")
    kept = fast.override(convolution=None)
    assert kept.convolution is None and kept.dump()["convolution"] is None
    assert kept.name == "svdquant-fast[convolution=None]"
