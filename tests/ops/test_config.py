from __future__ import annotations

import pytest

from bittern.ops.triton import config

HOPPER = config.Device((9, 0), 232448)


@pytest.mark.parametrize("m", [1100, 2048, 4096, 4250, 4608, 16896])
@pytest.mark.parametrize("n", [256, 1000, 3072, 9216, 21504])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("processors", [132, 114, 20])
def test_parts_cover_all_columns_in_fewer_waves(m: int, n: int, segments: int, processors: int) -> None:
    parts = config.specialized_parts(HOPPER, m, n, segments, 32, processors)
    assert parts is not None
    assert parts[0][0] == 0 and parts[-1][1] == n
    if len(parts) == 1:
        return
    (_, stop, wide), (start, _, narrow) = parts
    assert start == stop and start % wide.block_n == 0 and narrow.block_n * 2 == wide.block_n
    rows = -(-m // 128)

    def waves(columns: int, block: int) -> int:
        return -(-rows * -(-columns // block) // processors)

    assert waves(stop, 256) + 0.6 * waves(n - start, 128) < waves(n, 256)


def test_the_last_wave_of_flux_is_split() -> None:
    parts = config.specialized_parts(HOPPER, 4608, 3072, 2, 32, 132)
    assert parts is not None and [part[:2] for part in parts] == [(0, 2816), (2816, 3072)]
    whole = config.specialized_parts(HOPPER, 4608, 21504, 1, 32, 132)
    assert whole is not None and len(whole) == 1


@pytest.mark.parametrize(("capability", "m"), [((8, 9), 4608), ((9, 0), 512), ((10, 0), 4608)])
def test_other_devices_and_few_tokens_have_the_other_kernel(capability: tuple[int, int], m: int) -> None:
    assert config.specialized_parts(config.Device(capability, 232448), m, 3072, 1, 32, 132) is None
