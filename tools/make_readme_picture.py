"""Draw the README's picture: the same prompts from the same noise, in 16 bits, in 4 bits and ternary.

    python tools/make_readme_picture.py

Run it again after tiny-flux or a recipe has changed. The prompts are the first held-out one of every task and are not
chosen by their pictures. Row labels carry the bits per weight that were measured on the models drawn.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import bittern
from bittern import pipelines, recipes, tiny_flux, tiny_flux_ternary
from bittern.evaluation import scenes
from bittern.evaluation.generate import generate, to_pil

ROWS = ("16 bits", "svdquant-fast", tiny_flux_ternary.NAME)
SEED = 0
CELL, GAP, LABELS, LINE = 128, 8, 142, 17
INK, FAINT, PAPER = (30, 30, 30), (105, 105, 105), (255, 255, 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs/images/tiny-flux.png")
    args = parser.parse_args()
    prompts = [prompt.prompt for prompt in scenes.held_out(len(scenes.TASKS))]
    rows = [(*label(name, pipe), pictures(pipe, prompts)) for name, pipe in models()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Median cut, the default, gives small shapes the colour of larger ones.
    palette = grid(rows, prompts).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=5, dither=Image.Dither.NONE)
    palette.save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


def models():
    for name in ROWS:
        pipe = pipelines.load(name if name == tiny_flux_ternary.NAME else tiny_flux.NAME)
        if name in recipes.names():
            bittern.quantize(pipe, name)
        yield name, pipe


def label(name: str, pipe) -> tuple[str, tuple[str, str]]:
    report = bittern.inspect(pipe)
    said = name.removeprefix("tiny-flux-")
    return said, (f"{report.bits_per_weight:.3g} bits a weight", f"{report.file_bytes / 1e6:.1f} MB")


def pictures(pipe, prompts: list[str]) -> list[Image.Image]:
    return [to_pil(image) for image in generate(pipe, prompts, seed=SEED)]


def grid(rows: list[tuple[str, tuple[str, str], list[Image.Image]]], prompts: list[str]) -> Image.Image:
    step = CELL + GAP
    captions = [textwrap.wrap(prompt, 19) for prompt in prompts]
    height = step * len(rows) + LINE * max(map(len, captions)) + GAP
    page = Image.new("RGB", (LABELS + step * len(prompts), height), PAPER)
    pen = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(17), ImageFont.load_default(13)
    for row, (name, detail, images) in enumerate(rows):
        middle = row * step + CELL // 2
        pen.text((GAP, middle - 26), name, INK, large)
        for line, text in enumerate(detail):
            pen.text((GAP, middle + LINE * line), text, FAINT, small)
        for column, image in enumerate(images):
            page.paste(image.resize((CELL, CELL)), (LABELS + column * step, row * step))
    for column, caption in enumerate(captions):
        for line, text in enumerate(caption):
            pen.text((LABELS + column * step, step * len(rows) + LINE * line), text, INK, small)
    return page


if __name__ == "__main__":
    main()
