"""Load a few-bit folder with stock diffusers, draw, and draw again with other arithmetic.

    python examples/quantize_and_save.py          # makes out/few-bit
    python examples/load_with_diffusers.py out/few-bit

The only thing stock diffusers needs is that bittern has been imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import bittern  # noqa: F401  registers the quantization method with diffusers
from bittern.layers import paths, set_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="out/few-bit")
    parser.add_argument("--prompt", default="a photo of two green triangles")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    pipe = DiffusionPipeline.from_pretrained(args.folder, dtype=torch.bfloat16)
    print(pipe.transformer.single_transformer_blocks[0].attn.to_q)

    # "auto" takes what suits the device; "a4" is the exact 4-bit arithmetic, emulated where there is none.
    for path in ("auto", "a4"):
        set_path(pipe.transformer, path)
        image = pipe(
            args.prompt,
            # What tiny-flux was trained for; a pipeline does not know it by itself.
            height=128,
            width=128,
            num_inference_steps=24,
            guidance_scale=0.0,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(args.seed),
        ).images[0]
        file = args.out / f"{path}.png"
        image.save(file)
        print(f"{file}: layers by arithmetic {paths(pipe.transformer)}")


if __name__ == "__main__":
    main()
