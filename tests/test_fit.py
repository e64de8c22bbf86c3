"""`--fit`: recipes that are bent to a size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bittern
from bittern import folders, pipelines, recipes, tiny_flux
from bittern.architectures import plan
from bittern.cli import main
from bittern.errors import UserError
from bittern.quantization import Fit, foreseen, predict_size, preview, solve_job, stream
from bittern.quantization.fit import parse_size
from bittern.quantization.preview import skeleton
from bittern.recipes import Recipe
from families import FAMILIES

if TYPE_CHECKING:
    from diffusers import FluxPipeline

NewPipeline = Callable[[], "FluxPipeline"]
PROMPTS = ["a red circle", "two stars"]
FILE = "transformer/diffusion_pytorch_model.safetensors"


def small_svdquant() -> Recipe:
    return recipes.load("svdquant").override(name="small", samples=4, rows=96, default={"smoothing": "none"})


def sizes(folder: Path, recipe: str | Recipe) -> tuple[int, int]:
    """The least that a recipe can make, and the model in 16 bits (or 32)."""
    model, _ = skeleton(folder)
    whole = (folder / FILE).stat().st_size
    return Fit.of(model, recipe if isinstance(recipe, Recipe) else recipes.load(recipe), whole - 1).smallest, whole


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    """tiny-flux on the meta device."""
    return skeleton(tiny_flux.path())[0]


def profiles(model: torch.nn.Module, recipe: Recipe) -> dict[str, set[object]]:
    """The different blocks of each kind."""
    made = plan(model, recipe)
    blocks: dict[str, dict[str, object]] = {}
    for job in made.jobs:
        for path in job.paths:
            site = made.architecture.site(path)
            assert site is not None
            blocks.setdefault(site.parent, {})[site.name] = job.scheme
    found: dict[str, set[object]] = {}
    for parent, block in blocks.items():
        found.setdefault(parent.rpartition(".")[0], set()).add(tuple(sorted(block.items(), key=lambda item: item[0])))
    return found


# ---- sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.0GiB", 6 * 2**30), ("6 gb", 6 * 10**9), ("700MB", 7 * 10**8), ("1.5MiB", 3 * 2**19), ("20 kb", 20_000),
        ("3KiB", 3072), ("12345", 12345), ("12345B", 12345), (12345, 12345), (".5kB", 500),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "6 Gi", "6 giraffes", "-1GB", "1e9", "6iB", "1.2.3MB", "inf", "nan", "6,0GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"expected a number and B, KB, MB, GB, KiB, MiB or GiB, such as 6\.0GiB"):
        parse_size(text)


def test_sizes_out_of_reach_are_one_line_before_any_work(
    tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "foreseen", lambda *_, **__: pytest.fail("work was begun"))
    least, whole = sizes(tiny_random_folder, "svdquant-fast")
    for size, message in (
        (str(least - 1), f"makes this model no smaller than {least} bytes"),
        (str(whole), f"the model has {whole} bytes"),
        ("much", "size 'much': expected a number"),
    ):
        arguments = ["quantize", str(tiny_random_folder), "--recipe", "svdquant-fast", "--fit", size]
        assert main.run([*arguments, "--out", str(tmp_path / "out")]) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err, shown.err
        assert list(tmp_path.iterdir()) == []


# ---- what is chosen


@pytest.mark.parametrize(
    ("name", "share"), [("int4", 0.3), ("svdquant-fast", 0.0), ("svdquant-fast", 0.8), ("ternary-fast", 0.2)]
)
def test_the_size_is_met_and_foretold_to_the_byte(
    name: str, share: float, tiny_random_folder: Path, tmp_path: Path
) -> None:
    least, whole = sizes(tiny_random_folder, name)
    size = round(least + share * (whole - 1 - least))
    told: list[tuple[Recipe, int]] = []
    report = folders.quantize_folder(
        tiny_random_folder, name, tmp_path / "out", fit=size, on_fit=lambda *known: told.append(known)
    )
    ((recipe, foretold),) = told
    real = (tmp_path / "out" / FILE).stat().st_size
    assert real == foretold == report.file_bytes <= size
    assert recipe.name == report.recipe == f"{name}[fit={size}]"
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]
    assert config["recipe"] == recipe.dump()
    # An ordinary recipe: the same again without `fit`.
    folders.quantize_folder(tiny_random_folder, recipe, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()
    # In memory it is the same, too.
    pipe = pipelines.load(tiny_random_folder)
    assert bittern.quantize(pipe, name, fit=size) == report
    assert preview(tiny_random_folder, name, fit=size).report.file_bytes == real
    own = recipes.load(name).default.rank
    assert all(row.rank % 16 == 0 or row.rank == own for row in report.rows)
    assert all(row.rank == 0 and row.activations == 16 for row in report.rows if ".norm" in row.path)


@pytest.mark.slow
def test_more_bytes_leave_less_error(tiny: torch.nn.Module) -> None:
    """On tiny-flux, and less than one rank for all leaves: errors as foreseen."""
    recipe = recipes.load("svdquant-fast").override(default={"svd_iterations": 1, "scales": "absmax"})
    read = stream.reader(tiny, tiny_flux.path() / "transformer")
    fit = Fit.of(tiny, recipe, "9MB")
    errors = foreseen(fit, tiny, read)

    def total(chosen: Recipe) -> float:
        jobs = {job.paths[0]: job for job in plan(tiny, chosen).jobs}
        return sum(
            errors[name][next(i for i, level in enumerate(slot.levels) if level.patch and level.job == jobs[name])]
            for name, slot in fit.slots.items()
            if name in jobs
        )

    before = np.inf
    for rank in (16, 32):
        uniform = recipe.override(default={"rank": rank})
        size = predict_size(tiny, uniform)
        chosen = Fit.of(tiny, recipe, size).choose(errors)
        assert 0.995 * size < predict_size(tiny, chosen) <= size
        # The header that tells layers apart takes bytes of its own.
        assert total(chosen) <= 1.005 * total(uniform)
        assert total(chosen) < before
        before = total(chosen)
        # Without data blocks of a kind are alike.
        assert [len(kind) for kind in profiles(tiny, chosen).values()] == [1, 1]


def test_sensitive_layers_get_more_in_all_blocks(tiny: torch.nn.Module) -> None:
    """Made-up errors that are largest in one layer of one block."""
    fit = Fit.of(tiny, recipes.load("svdquant"), "8MB")
    errors: dict[str, list[float]] = {}
    for name, slot in fit.slots.items():
        ranks = [level.job.scheme.rank if level.patch else np.inf for level in slot.levels]
        weight = 1000.0 if name == "single_transformer_blocks.3.proj_out" else 1.0
        errors[name] = [weight * float(np.exp(-rank / 32)) for rank in ranks]
    chosen = fit.choose(errors)
    assert 0.995 * fit.size < predict_size(tiny, chosen) <= fit.size
    assert [len(kind) for kind in profiles(tiny, chosen).values()] == [1, 1]
    jobs = {path: job for job in plan(tiny, chosen).jobs for path in job.paths}

    def rank(path: str) -> float:
        return jobs[path].scheme.rank if path in jobs else 1000

    outs = {rank(f"single_transformer_blocks.{i}.proj_out") for i in range(6)}
    assert len(outs) == 1 and outs.pop() > max(rank(f"transformer_blocks.{i}.ff.net.2") for i in range(2))
    # Groups stay whole.
    assert all(len(job.paths) in (1, 3, 4) for job in jobs.values())


def test_what_a_recipe_says_of_a_layer_stays(tiny: torch.nn.Module) -> None:
    mixed = recipes.load("int4").override(
        name="mixed",
        overrides={"single_transformer_blocks.*.proj_out": {"rank": 4, "activations": 8}},
        keep=["transformer_blocks.0.*"],
    )
    fit = Fit.of(tiny, mixed, "10.5MB")
    assert not any("proj_out" in name or name.startswith("transformer_blocks.0.") for name in fit.slots)
    errors = {name: [1.0 / (1 + i) for i in range(len(slot.levels))] for name, slot in fit.slots.items()}
    chosen = fit.choose(errors)
    made = plan(tiny, chosen)
    outs = [job for job in made.jobs if "proj_out" in job.paths[0]]
    assert len(outs) == 6 and all(job.scheme.rank == 4 and job.scheme.activations == 8 for job in outs)
    assert {path for path, why in made.kept.items() if why == "kept by the recipe"} >= {
        path for path, _ in tiny.named_modules() if path.startswith("transformer_blocks.0.") and path.endswith("to_q")
    }
    assert predict_size(tiny, chosen) <= 10_500_000


@pytest.mark.parametrize("name", [pytest.param("sd15", marks=pytest.mark.slow), "pixart"])
def test_other_families(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build()
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    recipe = recipes.load("svdquant-fast").override(default={"rank": 4})
    least = Fit.of(model, recipe, whole).smallest
    report = bittern.quantize(model, recipe, fit=(2 * least + whole) // 3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size == report.file_bytes
    assert 0.9 * (2 * least + whole) // 3 < report.file_bytes <= (2 * least + whole) // 3


COLUMNS = """
samples: 4
rows: 96
modulation: {weight: int4, group_size: 64, activations: 16, smoothing: none, rounding: nearest}
default:
  {weight: ternary, group_size: null, activations: 8, rounding: gptq, smoothing: columns, refits: 1, sweeps: 1}
"""


def test_ternary_with_smoothed_columns_is_fitted(tiny_random_folder: Path, tmp_path: Path) -> None:
    """Its levels of four bits have no such smoothing, and the errors of all levels are foreseen without it."""
    file = tmp_path / "columns.yaml"
    file.write_text(COLUMNS)
    least, whole = sizes(tiny_random_folder, recipes.load(file))
    size = least + (whole - least) // 50
    report = folders.quantize_folder(tiny_random_folder, file, tmp_path / "out", prompts=PROMPTS, fit=size)
    assert (tmp_path / "out" / FILE).stat().st_size == report.file_bytes <= size
    assert {row.format for row in report.rows if ".norm" not in row.path} == {"int4", "ternary"}
    stored = load_file(tmp_path / "out" / FILE)
    smooth = {name.removesuffix(".smooth") for name in stored if name.endswith(".smooth")}
    ternary = {row.path for row in report.rows if row.format == "ternary"}
    assert smooth and smooth <= ternary


# ---- calibrated, interrupted


def test_a_calibrated_recipe_is_fitted_and_goes_on_after_a_kill(
    tiny_random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least, whole = sizes(tiny_random_folder, small_svdquant())
    size = (3 * least + whole) // 4
    given: dict[str, Any] = {"prompts": PROMPTS, "fit": size}
    report = folders.quantize_folder(tiny_random_folder, small_svdquant(), tmp_path / "whole", **given)
    assert (tmp_path / "whole" / FILE).stat().st_size == report.file_bytes <= size
    assert len({row.rank for row in report.rows}) > 1
    pipe = pipelines.load(tiny_random_folder)
    assert bittern.quantize(pipe, small_svdquant(), **given) == report

    def interrupt(what: str, done: float, _total: float) -> None:
        if what.startswith("solving") and done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.quantize_folder(tiny_random_folder, small_svdquant(), tmp_path / "out", progress=interrupt, **given)
    work = folders.workspace_of(tmp_path / "out")
    assert {file.stem[:7] for file in work.glob("*.safetensors")} == {"samples", "recipe", "0000.tr"}
    with pytest.raises(UserError, match="unfinished run with another size"):
        folders.quantize_folder(tiny_random_folder, small_svdquant(), tmp_path / "out", prompts=PROMPTS, fit=size + 1)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "foreseen", lambda *_, **__: pytest.fail("the choice was made already"))
        folders.quantize_folder(tiny_random_folder, small_svdquant(), tmp_path / "out", **given)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()
    assert not work.exists()


# ---- the commands


def test_the_commands_tell_what_was_chosen(
    tiny_random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    least, whole = sizes(tiny_random_folder, "svdquant-fast")
    size = (2 * least + whole) // 3
    arguments = [str(tiny_random_folder), "--recipe", "svdquant-fast", "--fit", f"{size / 1000:.3f}kB"]
    assert main.run(["inspect", *arguments, "--dry-run", "--json"]) == 0
    foretold = json.loads(capsys.readouterr().out)
    assert main.run(["quantize", *arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["real_bytes"] == result["predicted_bytes"] == foretold["predicted_bytes"] <= size
    assert result["fitted"]["name"] == result["recipe"] and result["fitted"]["overrides"]
    assert f"{result['real_bytes']} bytes" in shown.err and "rank: " in shown.err
    assert all(glob in shown.err for glob in [*result["fitted"]["overrides"], *result["fitted"]["keep"]])
    assert set(load_file(tmp_path / "out" / FILE)) > {"proj_out.weight"}
    assert main.run(["inspect", str(tiny_random_folder), "--fit", "1MB"]) == 2
    assert "--fit needs --recipe and --dry-run" in capsys.readouterr().err


# ---- the errors behind it


def test_foreseen_errors_rank_as_the_real_ones_do(tiny: torch.nn.Module) -> None:
    """Two blocks of tiny-flux under `int4` with ranks: against the report's errors, solved in full."""
    recipe = recipes.load("int4").override(default={"rank": 16})
    read = stream.reader(tiny, tiny_flux.path() / "transformer")
    fit = Fit.of(tiny, recipe, "9MB")
    names = [name for name in fit.slots if name.startswith(("transformer_blocks.1.", "single_transformer_blocks.5."))]
    some = Fit(tiny, recipe, fit.size, fit.name, fit.made, {name: fit.slots[name] for name in names})
    errors = foreseen(some, tiny, read)
    pairs: list[tuple[float, float]] = []
    for name in names:
        levels = [level for level in fit.slots[name].levels if level.patch and level.job.scheme.rank in (0, 16, 64)]
        for level in levels:
            modules = []
            for path in level.job.paths:
                shape = tiny.get_submodule(path).weight.shape
                linear = torch.nn.Linear(shape[1], shape[0], bias=False)
                linear.weight = torch.nn.Parameter(read(f"{path}.weight").float())
                modules.append(linear)
            _, real, _ = solve_job(level.job, modules, 0)
            whole = sum(n * k * error**2 for (n, k), error in zip(level.job.shapes, real, strict=True))
            pairs.append((errors[name][fit.slots[name].levels.index(level)], whole))
    found, real = np.array(pairs).T
    ranks = [np.argsort(np.argsort(values)) for values in (found, real)]
    assert len(pairs) >= 20 and np.corrcoef(*ranks)[0, 1] > 0.95


@pytest.mark.parametrize("size", ["8.2MB", "8200KB", "8200000", 8_200_000])
def test_one_size_has_one_number_of_bytes(size: str | int) -> None:
    assert parse_size(size) == 8_200_000


@pytest.mark.parametrize(
    "overrides",
    [
        {"transformer_blocks.0.ff.net.2": {"rank": 32}},
        {"transformer_blocks.0.*": {"rounds": 2}},
        {"transformer_blocks.1.*": {"rounds": 2}},
        {"single_transformer_blocks.2.attn.to_q*": {"rank": 16}},
    ],
)
def test_blocks_that_a_recipe_sets_apart_are_no_longer_alike(overrides: dict[str, dict[str, int]]) -> None:
    recipe = recipes.load("svdquant-fast").override(overrides=overrides)
    wanted = Fit.of(skeleton(tiny_flux.path() / "transformer")[0], recipe, "8.2MB")
    errors = {name: [1 / (1 + level) for level in range(len(slot.levels))] for name, slot in wanted.slots.items()}
    chosen = wanted.choose(errors)
    size = predict_size(wanted.model, chosen)
    assert wanted.smallest <= size <= 8_200_000
    for glob, patch in overrides.items():
        assert chosen.overrides[glob] == patch
