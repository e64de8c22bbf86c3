"""Options that several commands share, and what they become."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bittern.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

    from bittern.evaluation.drawing import Settings

_MODEL = typer.Argument(
    metavar="MODEL", help="A folder, a hub id, tiny-flux, tiny-unet, or tiny-flux-ternary.", show_default=False
)
Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option("--seed", help="Prompt i starts from the noise of seed + i.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps.", show_default="the model's")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Pictures drawn together.", show_default="what fits")
]
ArithmeticPath = Annotated[
    str,
    typer.Option(
        "--path", help="Force an arithmetic: a16, a8-int8, a8-fp8, a8-fp8-folded or a4; auto takes the best here."
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="NAME",
        help="One of diffusers' attention backends, or bittern_fp8; `bittern doctor` lists them.",
        show_default="the model's",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="LORA[:STRENGTH]",
        help="A .safetensors file, or an embedded one, `green` or `outline`; may be given again.",
        show_default=False,
    ),
]
Strength = Annotated[float, typer.Option("--lora-strength", help="Of LoRAs that name none; negative turns them round.")]
Fuse = Annotated[
    bool, typer.Option("--fuse", help="Move LoRAs into the few-bit layers' branches, where they are fast.")
]
CudaGraphs = Annotated[
    bool, typer.Option("--cuda-graphs", help="Record a denoising step as a CUDA graph and replay it.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N; auto takes a GPU if there is one.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="bf16, fp16 or fp32; auto takes the model's own, if the device has arithmetic for it."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="How many prompts.", show_default=False)]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", help="A .txt file, one prompt a line, or .jsonl with a prompt key.", show_default=False),
]

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def resolve_device(device: str) -> str:
    """The device that "auto" means here; any other is checked to be there.

    Raises:
        UserError: for an unknown device, or one this machine has not.
    """
    import torch

    from bittern.pipelines import check_device

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """The dtype behind its short name; None for "auto".

    Raises:
        UserError: for an unknown name.
    """
    import torch

    if dtype == "auto":
        return None
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype '{dtype}': {did_you_mean(dtype, ['auto', *_DTYPES])}")
    return getattr(torch, _DTYPES[dtype])


def settings(
    seed: int,
    steps: int | None,
    batch_size: int | None,
    path: str,
    device: str,
    dtype: str,
    attention: str | None = None,
    loras: Sequence[str] = (),
    strength: float = 1.0,
    fuse: bool = False,
    cuda_graphs: bool = False,
) -> Settings:
    """The drawing settings that the options ask for.

    Raises:
        UserError: for a path, device, dtype, attention or LoRA that does not exist or is not here, and for CUDA graphs
            on a CPU.
    """
    from bittern.evaluation.drawing import Settings
    from bittern.integrations.attention import check_name
    from bittern.pipelines import Lora, resolve_lora

    if attention is not None:
        check_name(attention)
    if not math.isfinite(strength):
        raise UserError(f"--lora-strength {strength:g}: expected a finite number, such as 0.5")
    chosen = tuple(Lora.parse(text, strength) for text in loras)
    for lora in chosen:
        resolve_lora(lora.file)
    if not loras and strength != 1:
        raise UserError(f"--lora-strength {strength:g} is that of a LoRA: give --lora as well, or leave it out")
    where = resolve_device(device)
    if cuda_graphs and not where.startswith("cuda"):
        raise UserError(f"--cuda-graphs is for CUDA devices, and the device is {where}: leave it out")
    return Settings(
        seed,
        steps,
        batch_size,
        forced_path(path),
        where,
        resolve_dtype(dtype),
        attention,
        chosen,
        fuse,
        cuda_graphs,
    )


def forced_path(path: str) -> str | None:
    """The arithmetic behind its name; None for "auto".

    Raises:
        UserError: for an unknown name.
    """
    from bittern.ops import PATHS

    if path not in ("auto", *PATHS):
        raise UserError(f"unknown path '{path}': {did_you_mean(path, ('auto', *PATHS))}")
    return None if path == "auto" else path


def command_line(*words: object, **flags: object) -> str:
    """The command that does the same again; a flag that is None, False or "auto" is left to its default.

    A flag with a list is given once for each of its members.
    """
    given = [
        (name, value)
        for name, values in flags.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not False and value not in (None, "auto")
    ]
    pairs = [
        part for name, value in given for part in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    return shlex.join(["bittern", *map(str, (*words, *pairs))])
