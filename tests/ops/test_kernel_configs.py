from __future__ import annotations

import itertools
import json
from importlib import resources
from typing import Any

import pytest

from bittern.errors import UserError
from bittern.ops.triton import config, tuned

HOPPER = config.Device((9, 0), 232448)


@pytest.mark.parametrize("m", [65, 256, 512, 1024, 1100, 2048, 4096, 4250, 4608, 16896])
@pytest.mark.parametrize("n", [256, 1000, 3072, 9216, 21504])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("processors", [132, 114, 20])
def test_parts_cover_all_columns_in_fewer_waves(m: int, n: int, segments: int, processors: int) -> None:
    parts = config.specialized_parts(HOPPER, m, n, 3072, segments, 32, processors)
    assert parts is not None
    assert parts[0][0] == 0 and parts[-1][1] == n
    rows = -(-m // 128)

    def cost(start: int, stop: int, chosen: config.SpecializedConfig) -> float:
        waves = -(-rows * -(-(stop - start) // chosen.block_n) // processors)
        return {256: 1.0, 128: 0.57, 64: 0.34}[chosen.block_n] * waves

    widths = [config.specialized_for(HOPPER, m, segments, 32, width) for width in (256, 128, 64)]
    # Less than a launch more than tiles of any one width take.
    assert sum(cost(*part) for part in parts) <= min(cost(0, n, width) for width in widths if width is not None)
    assert (widths[2] is None) == (m > 1024)
    if len(parts) == 2:
        (_, stop, wide), (start, _, narrow) = parts
        assert start == stop and start % wide.block_n == 0 and narrow.block_n < wide.block_n


def test_the_last_wave_of_flux_is_split() -> None:
    parts = config.specialized_parts(HOPPER, 4608, 3072, 15360, 2, 32, 132)
    assert parts is not None and [part[:2] for part in parts] == [(0, 2816), (2816, 3072)]
    whole = config.specialized_parts(HOPPER, 4608, 21504, 3072, 1, 32, 132)
    assert whole is not None and len(whole) == 1


def test_few_tokens_have_narrow_tiles() -> None:
    for m, width in ((256, 64), (512, 128), (1024, 256)):
        parts = config.specialized_parts(HOPPER, m, 3072, 3072, 1, 32, 132)
        assert parts is not None and [(start, stop, c.block_n) for start, stop, c in parts] == [(0, 3072, width)]


def test_k_is_taken_in_parts_where_rows_are_few() -> None:
    tiles = config.SkinnyConfig(block_n=64, programs=4)
    # 48, 144 and 288 programs of 64 rows; a part has six tiles of a group or more.
    parts = [tiles.parts(1, n, 12288, 64, 2, 132) for n in (3072, 9216, 18432)]
    assert parts == [11, 3, 1]
    assert [tiles.parts(1, 3072, k, 64, 2, 132) for k in (64, 704, 768, 3072)] == [1, 1, 2, 8]
    assert tiles.parts(64, 64, 30720, 64, 2, 132) == 16


def test_weights_are_unpacked_in_the_product_where_that_was_faster() -> None:
    def found(n: int, k: int, group: int | None, operand_bytes: int, device: config.Device = HOPPER) -> list[int]:
        per_byte, tokens = 4 if group is None else 2, (1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 4608)
        chosen = {m: config.fused_unpack_for(device, m, n, k, group, per_byte, operand_bytes) for m in tokens}
        for tiles in chosen.values():
            assert tiles is None or tiles.shared_memory(per_byte, operand_bytes) <= device.shared_memory
            assert tiles is None or group is None or tiles.block_k % group == 0
        return [m for m, tiles in chosen.items() if tiles is not None]

    assert found(12288, 3072, 64, 1) == [1, 16, 17, 32, 33, 64, 65, 128]
    assert found(3072, 12288, 64, 1) == [1, 16, 17, 32, 33, 64, 65, 128, 129, 256]
    assert found(12288, 3072, None, 1) == [33, 64, 65, 128, 129, 256]
    assert found(12288, 3072, 64, 2) == [65, 128, 129, 256]
    assert found(3072, 3072, None, 2) == [33, 64, 65, 128]
    # Wide groups want tiles that were not measured; small layers have too few tiles; so have other devices no rules.
    assert found(12288, 12288, 256, 2) == [] and found(12288, 2048, 64, 1) == []
    for capability in ((0, 0), (8, 0), (8, 9), (10, 0), (12, 0)):
        assert found(12288, 3072, 64, 1, config.Device(capability, 232448)) == []
    assert found(12288, 3072, 64, 1, config.Device((9, 0), 64 << 10)) == [1, 16]


def test_tiles_that_are_too_few_for_a_device_take_k_in_parts() -> None:
    tiles = config.FusedUnpackConfig(64, 64, programs=2)
    assert [tiles.parts(64, n, 3072, 132) for n in (3072, 9216, 18432)] == [4, 1, 1]
    assert [tiles.parts(m, 3072, 12288, 132) for m in (0, 1, 64, 65, 256)] == [16, 5, 5, 2, 1]


def test_a_branch_with_a_lora_in_it_keeps_the_kernel_with_warps_that_load() -> None:
    for rank in (48, 64):
        for segments in (1, 2):
            parts = config.specialized_parts(HOPPER, 4608, 3072, 15360, segments, rank, 132)
            assert parts is not None and all(
                each.problem(HOPPER.shared_memory, rank, segments) is None for *_, each in parts
            )
    assert config.specialized_parts(HOPPER, 4608, 3072, 3072, 3, 32, 132) is None


@pytest.mark.parametrize(("capability", "m"), [((8, 9), 4608), ((9, 0), 64), ((10, 0), 4608)])
def test_other_devices_and_few_tokens_have_the_other_kernel(capability: tuple[int, int], m: int) -> None:
    assert config.specialized_parts(config.Device(capability, 232448), m, 3072, 3072, 1, 32, 132) is None


KERNELS: dict[str, Any] = {
    "prologue": config.PrologueConfig,
    "whole_rows": config.WholeRowsConfig,
    "unpack": config.UnpackConfig,
    "gemm": config.GemmConfig,
    "grouped_gemm": config.GroupedGemmConfig,
    "skinny": config.SkinnyConfig,
    "specialized_gemm": config.SpecializedConfig,
    "fused_unpack": config.FusedUnpackConfig,
}
FACTS = {"m", "n", "k", "bits", "grouped", "group", "segments", "sums", "rank"}


@pytest.mark.parametrize("family", ["default", *tuned.FAMILIES.values()])
def test_every_rule_makes_a_configuration(family: str) -> None:
    table = json.loads(resources.files("bittern.ops.triton.tuned").joinpath(f"{family}.json").read_text())
    assert table.pop("measured")
    for kernel, rules in table.items():
        for rule in rules:
            KERNELS[kernel](**rule["config"])
            assert {key.removeprefix("max_").removeprefix("min_") for key in rule["when"]} <= FACTS


@pytest.mark.parametrize("capability", [(0, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_device_and_problem_has_a_configuration(capability: tuple[int, int]) -> None:
    device = config.Device(capability, 64 * 1024)
    for m, grouped in itertools.product((0, 1, 16, 64, 512, 1025, 4608, 70000), (False, True)):
        for k in (16, 3072, 15360):
            assert not grouped or config.unpack_for(device, k, grouped).block_k % 64 == 0
            assert config.prologue_for(device, m) and config.prologue_for(device, m, 32)
            whole = config.whole_rows_for(device, m, k)
            assert (whole is None) == (capability != (9, 0) and m > 64) and (whole is None or whole.holds(k))
            assert config.skinny_for(device, m, k, 64 if grouped else None)
        assert config.grouped_gemm_for(device, m)
        for group, per_byte in itertools.product((None, 16, 32, 64, 128, 256), (2, 4)):
            for k in (1, 16, 64, 65, 300, 12288):
                chosen = config.skinny_for(device, m, k, group, per_byte)
                assert chosen.shared_memory(m, k, group, per_byte, capability) <= device.shared_memory
                assert chosen.parts(m, 0, k, group, per_byte, 132) >= 1
        for segments, integers in itertools.product((1, 2, 3), (False, True)):
            assert config.gemm_for(device, m, segments, integers, 32).problem(device.shared_memory, 32) is None


def test_rules_are_asked_in_turn() -> None:
    tiles = {(m, rank): config.prologue_for(HOPPER, m, rank).block_m for m in (1024, 1025) for rank in (32, 96)}
    assert tiles == {(1024, 32): 8, (1025, 32): 16, (1024, 96): 8, (1025, 96): 32}
    assert (
        config.prologue_for(HOPPER, 8).descriptors and not config.prologue_for(config.Device((8, 6), 0), 8).descriptors
    )
    # Whole rows where registers hold them and there is no branch, or one that would take too long in the prologue.
    whole = [(m, k, rank) for m in (512, 4608) for k in (3072, 12288, 40000) for rank in (0, 32, 48)]
    found = [facts for facts in whole if config.whole_rows_for(HOPPER, *facts) is not None]
    walked = [(4608, k, rank) for k in (3072, 12288) for rank in (32, 48)]
    assert found == [facts for facts in whole if facts not in walked and (facts[1] < 40000 or facts[0] == 512)]
    assert config.gemm_for(HOPPER, 4608, 1, False, 32).early
    # Two sets of sums leave no room for wide tiles.
    assert config.gemm_for(HOPPER, 4608, 2, True, 32).block_n == 128
    assert config.gemm_for(config.Device((9, 0), 100 * 1024), 4608, 1, False, 32).block_n == 128
    with pytest.raises(UserError, match="1024 bytes of shared memory"):
        config.gemm_for(config.Device((8, 0), 1024), 4608, 1, False, 32)
