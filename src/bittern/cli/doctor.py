"""`bittern doctor`: what this machine has, which arithmetic it will run, and why not another."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from bittern.cli.options import Json
from bittern.cli.output import Output, hush, table

_PACKAGES = ("bittern", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "triton")


def doctor(json: Json = False) -> None:
    """Print versions, devices, backends, and the paths and attentions that run here or the reason why not."""
    with Output(json) as out:
        hush()
        from bittern import ops

        here = _devices()
        payload = {
            "python": platform.python_version(),
            "versions": {package: _version(package) for package in _PACKAGES},
            "devices": here,
            "backends": list(ops.backends()),
            "registered_with_diffusers": _registered(),
            "paths": [row for device in here for row in _paths(device["device"])],
            "attention": [row for device in here for row in _attention(device["device"])],
        }
        found = [("python", payload["python"]), *((p, v or "not installed") for p, v in payload["versions"].items())]
        found.append(("registered with diffusers", "yes" if payload["registered_with_diffusers"] else "no"))
        devices = [
            (d["device"], d["name"], f"{d['memory_gib']:.1f} GiB", "yes" if d["bf16"] else "slow: draws in fp32")
            for d in here
        ]
        chosen = [
            (p["device"], p["weight"], p["activations"], p["path"], p["backend"], p["reason"])
            for p in payload["paths"]
            if p["chosen"]
        ]
        paths = [
            (
                p["device"],
                p["weight"],
                p["activations"],
                p["path"],
                p["backend"],
                "yes" if p["runs"] else "no",
                p["reason"],
            )
            for p in payload["paths"]
        ]
        attention = [
            (a["device"], a["attention"], "yes" if a["runs"] else "no", a["reason"]) for a in payload["attention"]
        ]
        out.result(
            payload,
            table(("package", "version"), found, left=2),
            table(("device", "name", "memory", "bf16"), devices, left=2),
            table(("device", "weights", "activations", "chosen path", "backend", "reason"), chosen, left=6),
            table(("device", "weights", "activations", "path", "backend", "runs", "reason"), paths, left=7),
            table(("device", "attention", "runs", "reason"), attention, left=4),
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _registered() -> bool:
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return "bittern" in AUTO_QUANTIZER_MAPPING


def _devices() -> list[dict[str, Any]]:
    import psutil
    import torch

    from bittern.evaluation.drawing import device_name
    from bittern.precision import multiplies

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    sizes = [torch.cuda.get_device_properties(name).total_memory for name in names[1:]]
    return [
        {
            "device": name,
            "name": device_name(name),
            "memory_gib": size / 2**30,
            "bf16": multiplies(name, torch.bfloat16),
        }
        for name, size in zip(names, [psutil.virtual_memory().total, *sizes], strict=True)
    ]


def _paths(device: str) -> list[dict[str, Any]]:
    """Every path and backend, best first for each scheme; the first that runs is chosen."""
    from bittern import ops
    from bittern.scheme import Scheme

    schemes = (
        Scheme(weight="int4", activations=4),
        Scheme(weight="nvfp4", group_size=16, scale_dtype="e4m3", activations=4),
        Scheme(weight="ternary", activations=8),
        Scheme(weight="int4", activations=16),
        Scheme(weight="nvfp4", group_size=16, scale_dtype="e4m3", activations=16),
    )
    rows: list[dict[str, Any]] = []
    for scheme in schemes:
        verdicts = ops.explain(scheme, device)
        chosen = next((verdict for verdict in verdicts if verdict.accepted), None)
        rows += [
            {
                "device": device,
                "weight": scheme.weight,
                "activations": scheme.activations,
                "path": verdict.path,
                "backend": verdict.backend,
                "runs": verdict.accepted,
                "chosen": verdict is chosen,
                "reason": verdict.reason,
            }
            for verdict in verdicts
        ]
    return rows


def _attention(device: str) -> list[dict[str, Any]]:
    from bittern.integrations import attention

    refusals = {name: attention.refusal(name, device) for name in attention.names()}
    return [
        {"device": device, "attention": name, "runs": why is None, "reason": why or _why_it_runs(name, device)}
        for name, why in refusals.items()
    ]


def _why_it_runs(name: str, device: str) -> str:
    from bittern.integrations import attention, attention_backend

    if name == attention_backend.NAME and device == "cpu":
        return "ours, as plain torch, which is slow: to see what 8 bits do to pictures"
    if attention.is_fetched(name):
        return "not tried: fetches code from the hub when it is first used"
    return "diffusers' own choice" if name == attention.DEFAULT else "ran on a small problem in bf16"
