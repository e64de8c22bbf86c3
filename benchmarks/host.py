"""What a few-bit layer costs the host: microseconds to hand one call to the GPU, beside a bf16 linear.

    python benchmarks/host.py --json benchmarks/results/host_h100.json

Calls are issued in batches that the GPU has room to queue, and only the issuing is timed. Layers are small, since the
host's part does not depend on their size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern.layers import QuantLinear
from bittern.scheme import Scheme

BF16 = torch.bfloat16
BATCH = 100
# Weight, group, rank, segments, tokens, path.
CASES: list[tuple[str, int | None, int, tuple[int, ...], int, str]] = [
    ("int4", 64, 32, (128,), 2048, "a8-fp8"),
    ("int4", 64, 32, (128, 256), 2048, "a8-fp8"),
    ("int4", 64, 0, (128,), 1, "a16"),
    ("ternary", None, 0, (128,), 2048, "a8-fp8"),
    ("ternary", None, 0, (128, 256), 2048, "a8-fp8"),
    ("ternary", None, 0, (128,), 1, "a16"),
]


def microseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median time to issue one call."""
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BATCH):
            call()
        times.append((time.perf_counter() - start) / BATCH * 1e6)
    return statistics.median(times)


def layer(weight: Any, group: int | None, rank: int, segments: tuple[int, ...]) -> QuantLinear:
    scheme = Scheme(weight=weight, group_size=group, rank=rank, smooth=rank > 0)
    made = QuantLinear.empty(sum(segments), 256, scheme, segments, True, "cuda", BF16).requires_grad_(False)
    for tensor in made.tensors().values():
        tensor.fill_(1)
    return made


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dense, x = torch.nn.Linear(128, 256, device="cuda", dtype=BF16), torch.randn(1, 2048, 128, device="cuda").to(BF16)
    rows: list[dict[str, Any]] = [{"case": "bf16 linear", "us": round(microseconds(lambda: dense(x)), 1)}]
    for weight, group, rank, segments, m, path in CASES:
        made = layer(weight, group, rank, segments)
        made.path = path
        inputs: list[Tensor] = [torch.randn(1, m, k, device="cuda").to(BF16) for k in segments]
        us = microseconds(lambda: made(inputs))  # noqa: B023
        rows.append({"case": f"{weight} rank {rank} {path} K={'+'.join(map(str, segments))} M={m}", "us": round(us, 1)})
    for row in rows:
        print(f"{row['us']:8.1f} us  {row['case']}")
    if args.json:
        result = {"command": " ".join(sys.argv), "device": torch.cuda.get_device_name(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
