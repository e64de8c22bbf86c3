"""The named recipes, and what happens to files that are not recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bittern import recipes
from bittern.errors import UserError


def test_named_recipes() -> None:
    assert recipes.names() == [
        "int4", "int4-gptq", "svdquant", "svdquant-fast", "ternary", "ternary-distilled", "ternary-fast",
    ]  # fmt: skip
    for name in recipes.names():
        recipe = recipes.load(name)
        assert recipe.name == name
        assert recipe.summary
    assert recipes.load("int4").default.activations == 16
    fast = recipes.load("svdquant-fast")
    assert (fast.default.weight, fast.default.rank, fast.default.activations) == ("int4", 32, 4)
    for name in ("ternary-fast", "ternary"):
        ternary = recipes.load(name).default
        assert (ternary.weight, ternary.codes, ternary.activations) == ("ternary", "least-squares", 8)
        assert recipes.load(name).calibrated == (ternary.rounding == "gptq") == (name == "ternary")


def test_a_file_is_a_recipe_named_after_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("default: {weight: ternary, rank: 1/96, group_size: null}\n")
    recipe = recipes.load(file)
    assert recipe.name == "mine"
    assert recipe.default.group_size is None
    assert recipe.default.rank == "1/96"


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'svdqant': did you mean 'svdquant'\?"):
        recipes.load("svdqant")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "not valid YAML at line 1"),
        (b"default:\n  weight: int4\n  weight: ternary\n", r"key 'weight' is given twice \(line 3\)"),
        (b"- 1", "expected a mapping of keys to values, got list"),
        (b"", "expected a mapping of keys to values, got NoneType"),
        (b"default: {weight: int4}\n? [1, 2]\n: 3", "not valid YAML at line 2"),
        (b"default: {weight: int4}\n1: 2", "1 1: Keys should be strings"),
        (b"\xff\xfe\x00", "is not text"),
        (b"default: {weight: !!python/object/apply:os.getcwd []}", "not valid YAML"),
    ],
)
def test_what_is_not_a_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        recipes.load(file)
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml.*No such file"):
        recipes.load(tmp_path / "gone.yaml")
