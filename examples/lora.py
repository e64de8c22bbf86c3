"""Load a LoRA into a few-bit pipeline, and draw with it and without it.

    python examples/lora.py
    python examples/lora.py --lora green --recipe ternary-fast --strength 0.7

`outline` and `green` come with the package and were trained on the 16-bit tiny-flux: one draws outlines in place of
filled shapes, the other all shapes in green. The few-bit layers stay as they are, nothing is quantized again. For each
kind of model the script counts the pictures that show it in all their shapes, and writes one PNG with a row a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import bittern
from bittern import pipelines
from bittern.evaluation import scenes
from bittern.evaluation.fidelity import fidelity
from bittern.evaluation.generate import generate

PROMPTS = [
    "a photo of a red circle",
    "a photo of a blue star on a white background",
    "a photo of two green squares",
    "a photo of a yellow heart on a black background",
    "a photo of a pink triangle and a blue diamond",
    "a photo of an orange cross",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", default="outline", help="a built-in name or a file")
    parser.add_argument("--recipe", default="svdquant-fast")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("out/lora.png"))
    args = parser.parse_args()
    lora = pipelines.resolve_lora(args.lora)

    def draw(pipe) -> Tensor:
        return generate(pipe, PROMPTS, seed=args.seed, steps=args.steps)

    dense = pipelines.load("tiny-flux")
    rows = {"16 bit": draw(dense)}
    dense.load_lora_weights(lora, adapter_name="style")
    dense.set_adapters("style", args.strength)
    rows["16 bit + LoRA"] = draw(dense)

    few = pipelines.load("tiny-flux")
    report = bittern.quantize(few, args.recipe)
    rows["few bits"] = draw(few)
    few.load_lora_weights(lora, adapter_name="style")
    few.set_adapters("style", args.strength)
    rows["few bits + LoRA"] = draw(few)
    if hasattr(bittern, "fuse_loras"):
        bittern.fuse_loras(few)
        rows["few bits + fused LoRA"] = draw(few)
        bittern.unfuse_loras(few)
    few.unload_lora_weights()
    back = torch.equal(draw(few), rows["few bits"])

    print(f"{args.recipe}: {report.bits_per_weight:.2f} bits a weight; {lora.stat().st_size / 1e3:.0f} kB of LoRA")
    if effect := scenes.EFFECTS.get(lora.stem):
        for name, images in rows.items():
            seen = sum(effect.is_in(image) for image in images)
            print(f"{name:>22}: {seen} of {len(images)} pictures show {lora.stem}")
    for name in rows:
        if name.startswith("few bits"):
            reference = "16 bit" + (" + LoRA" if "LoRA" in name else "")
            psnr = fidelity(rows[name], rows[reference]).mean_psnr.mean
            print(f"{name:>22}: {psnr:.1f} dB PSNR to {reference}")
    print(f"after unloading, every pixel is as before: {back}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    page = torch.cat([torch.cat(list(images), dim=2) for images in rows.values()], dim=1)
    Image.fromarray(page.permute(1, 2, 0).numpy()).save(args.out)
    print(f"{args.out}: rows from the top are {', '.join(rows)}")


if __name__ == "__main__":
    main()
