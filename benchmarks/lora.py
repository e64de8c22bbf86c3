"""What few bits do to a LoRA: the same prompts and noise, in 16 bits and in few, without the LoRA and with it.

    python benchmarks/lora.py --out benchmarks/results/lora_tiny_flux.json
    python benchmarks/lora.py --model-few-bit ternary --images 256 --device cpu
    python benchmarks/lora.py --table benchmarks/results/lora_tiny_flux.json

Two questions. Does a few-bit model stay as near to the 16-bit one with a LoRA as without (PSNR, paired picture by
picture)? And does the LoRA do as often what it was made for, which `scenes.EFFECTS` sees in every picture (a paired
bootstrap over prompts)? Prompts are held out; for `outline` they ask for no ring, which is its own outline. Apart from
the effect, pictures are also judged by their prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from quality import commit, keep
from torch import Tensor

import bittern
from bittern import pipelines, recipes
from bittern.evaluation import scenes
from bittern.evaluation.drawing import device_name, dtype_name, versions
from bittern.evaluation.fidelity import fidelity
from bittern.evaluation.generate import generate
from bittern.evaluation.stats import mean_estimate, paired_difference, proportion
from bittern.layers import paths, set_path
from bittern.quantization import component

DENSE, DENSE_LORA, FEW, FEW_LORA, FEW_FUSED = (
    "16 bit", "16 bit + LoRA", "few bits", "few bits + LoRA", "few bits + fused LoRA"
)  # fmt: skip
REFERENCE = {FEW: DENSE, FEW_LORA: DENSE_LORA, FEW_FUSED: DENSE_LORA}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux", help="the 16-bit pipeline")
    parser.add_argument("--model-few-bit", default="svdquant", help="a recipe, or the folder of a quantized pipeline")
    parser.add_argument("--lora", default="outline", help="a built-in name or a file")
    parser.add_argument("--effect", choices=scenes.EFFECTS, help="what the LoRA does; by default its file's name")
    parser.add_argument("--images", type=int, default=1024, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--path", default=None, help="force an arithmetic on the few-bit layers, such as a4")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--grid", type=Path, help="a PNG of the first eight prompts, a row a model")
    parser.add_argument("--table", type=Path, help="print the Markdown table of a finished run and stop")
    args = parser.parse_args()
    record = json.loads(args.table.read_text()) if args.table else run(args)
    print(table(record))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draws every row, and compares; the record as JSON values."""
    lora = pipelines.resolve_lora(args.lora)
    name = args.effect or lora.stem
    if name not in scenes.EFFECTS:
        raise SystemExit(f"{lora} is the LoRA of no known effect: give --effect")
    effect = scenes.EFFECTS[name]
    prompts = [prompt for prompt in scenes.held_out(2 * args.images) if effect.concerns(prompt)][: args.images]
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": {
            "device": device_name(args.device), "commit": commit(), "versions": versions(), "model": args.model,
            "few_bit": args.model_few_bit, "lora": args.lora, "effect": name, "images": len(prompts),
            "steps": args.steps,
        },
        "rows": {},
    }  # fmt: skip
    drawn: dict[str, Tensor] = {}
    for row, images, details in rows(args, lora, [prompt.prompt for prompt in prompts]):
        drawn[row] = images
        record["rows"][row] = {**details, **judged(images, prompts, effect)}
        said = {key: value for key, value in record["rows"][row].items() if not key.endswith("_each")}
        print(row, said, file=sys.stderr, flush=True)
        keep(record, args.out)
    if args.grid:
        lines = [torch.cat(list(images[:8]), dim=2) for images in drawn.values()]
        Image.fromarray(torch.cat(lines, dim=1).permute(1, 2, 0).numpy()).save(args.grid)
    near = {name: fidelity(drawn[name], drawn[other]) for name, other in REFERENCE.items() if name in drawn}
    for name, found in near.items():
        each = [round(value, 3) for value in found.psnr]
        record["rows"][name] |= {"psnr": rounded(found.mean_psnr), "psnr_each": each}
    record["compared"] = {
        name: compared(record["rows"][name], record["rows"][DENSE_LORA], record["rows"][FEW], prompts)
        for name in near
        if name != FEW
    }
    keep(record, args.out)
    return record


def rows(args: argparse.Namespace, lora: Path, texts: Sequence[str]) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Name, pictures and particulars of every row, each drawn from the same noise."""
    for plain, with_lora in ((DENSE, DENSE_LORA), (FEW, FEW_LORA)):
        folder = with_lora == FEW_LORA and args.model_few_bit not in recipes.names()
        pipe = pipelines.load(args.model_few_bit if folder else args.model, device=args.device)
        if with_lora == FEW_LORA:
            if not folder:
                bittern.quantize(pipe, args.model_few_bit)
            if args.path:
                set_path(component(pipe), args.path)
        yield plain, *drawing(pipe, texts, args.steps)
        pipe.load_lora_weights(lora)
        yield with_lora, *drawing(pipe, texts, args.steps)
    if hasattr(bittern, "fuse_loras"):
        bittern.fuse_loras(pipe)
        yield FEW_FUSED, *drawing(pipe, texts, args.steps)


def drawing(pipe: Any, texts: Sequence[str], steps: int | None) -> tuple[Tensor, dict[str, Any]]:
    """One picture a prompt, and how it came about."""
    began = time.perf_counter()
    images = generate(pipe, texts, steps=steps)
    details = {"dtype": dtype_name(component(pipe).dtype), "paths": paths(component(pipe))}
    return images, details | {"seconds": round(time.perf_counter() - began, 1)}


def judged(images: Tensor, prompts: Sequence[scenes.ScenePrompt], effect: scenes.Effect) -> dict[str, Any]:
    """The shares of pictures with the effect, and of those that show their prompt apart from it; a digit a picture."""
    with ThreadPoolExecutor() as pool:
        seen = list(pool.map(effect.look, images, prompts))
    success, shown = ([one[place] for one in seen] for place in (0, 1))
    return {
        "success": rounded(proportion(success)),
        "shows_its_prompt": rounded(proportion(shown)),
        "success_each": "".join(str(int(one)) for one in success),
    }


def compared(
    few: dict[str, Any], dense: dict[str, Any], plain: dict[str, Any], prompts: Sequence[scenes.ScenePrompt]
) -> dict[str, Any]:
    """A few-bit row with the LoRA beside the 16-bit one in success, and beside the one without it in PSNR."""
    gaps = [mine - theirs for mine, theirs in zip(few["psnr_each"], plain["psnr_each"], strict=True)]
    success = paired_difference(by_task(few["success_each"], prompts), by_task(dense["success_each"], prompts))
    found = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(success).items()}
    return {"psnr_gap": rounded(mean_estimate(gaps)), "success_difference": found, "claim": success.claim}


def by_task(each: str, prompts: Sequence[scenes.ScenePrompt]) -> dict[str, list[float]]:
    tasks: dict[str, list[float]] = {}
    for digit, prompt in zip(each, prompts, strict=True):
        tasks.setdefault(prompt.tag, []).append(float(digit))
    return tasks


def rounded(estimate: Any) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(estimate).items()}


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown, and a line a comparison."""
    lines = ["| model | effect | shows its prompt | PSNR dB to 16 bit | path |", "|---|---|---|---|---|"]
    for name, row in record["rows"].items():
        shares = (f"{row[key]['mean']:.3f} ± {row[key]['stderr']:.3f}" for key in ("success", "shows_its_prompt"))
        psnr = f"{row['psnr']['mean']:.2f} ± {row['psnr']['stderr']:.2f}" if "psnr" in row else ""
        path = "+".join(row["paths"]) or row["dtype"]
        lines.append(f"| {name} | {' | '.join(shares)} | {psnr} | {path} |")
    for name, found in record["compared"].items():
        gap = found["psnr_gap"]
        lines += [
            "",
            f"{name}: PSNR {gap['mean']:+.2f} ± {gap['stderr']:.2f} dB against {FEW}; its success {found['claim']}.",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
