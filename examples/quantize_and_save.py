"""Make a few-bit pipeline and save it as an ordinary diffusers folder.

    python examples/quantize_and_save.py
    python examples/quantize_and_save.py --model tiny-flux --recipe ternary-fast --out out/ternary

Nothing is downloaded: tiny-flux comes with the package.
"""

from __future__ import annotations

import argparse

import bittern
from bittern import pipelines, recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux", help="a pipeline's folder, a hub id, or tiny-flux")
    parser.add_argument("--recipe", default="svdquant-fast", help="a recipe's name or a YAML file")
    parser.add_argument("--rank", help="another rank for the layers inside the blocks, such as 16 or 1/96")
    parser.add_argument("--out", default="out/few-bit")
    args = parser.parse_args()

    pipe = pipelines.load(args.model)
    recipe = recipes.load(args.recipe)
    if args.rank is not None:
        rank = int(args.rank) if args.rank.isdigit() else args.rank
        recipe = recipe.override(default={"rank": rank})
    # Known before anything is solved: it follows from shapes.
    print(f"predicted: {bittern.predict(pipe, recipe)}")

    report = bittern.quantize(pipe, recipe, seed=0)
    print(f"quantized: {report}")
    worst = max(report.rows, key=lambda row: row.error)
    print(f"largest relative weight error: {worst.error:.3f} ({worst.path})")

    pipe.save_pretrained(args.out)
    print(f"saved:     {bittern.inspect(args.out)}")


if __name__ == "__main__":
    main()
