"""`bittern generate`: pictures that say how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table
from bittern.errors import UserError


def generate(
    model: options.Model,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)
    ] = None,
    prompts: options.PromptsFile = None,
    out: Annotated[Path, typer.Option("--out", help="A .png for one prompt, a folder for several.")] = Path("out"),
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    path: options.ArithmeticPath = "auto",
    attention: options.Attention = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Draw prompts. Every PNG carries model, prompt, seed, steps, size, path, attention and version as text."""
    with Output(json) as output:
        hush()
        from bittern.evaluation.drawing import draw
        from bittern.evaluation.generate import save_png
        from bittern.outputs import check_file_out
        from bittern.pipelines import resolve
        from bittern.quantization import inspect
        from bittern.trajectories import read_prompts

        texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        files = _files(out.expanduser(), texts)
        for file in files[:1]:
            check_file_out(file, "--out")
        chosen = options.settings(seed, steps, batch_size, path, device, dtype, attention)
        if chosen.path is not None and not inspect(resolve(model)).rows:
            raise UserError(f"--path {path} is for few-bit layers and {model} has none: leave it out")
        drawing = draw(model, texts, chosen, progress=output.progress)
        for index, file in enumerate(files):
            save_png(drawing.images[index], file, drawing.metadata(index))
        payload = {
            "model": model,
            "images": [
                {"file": str(file), "prompt": text, "seed": seed + index}
                for index, (file, text) in enumerate(zip(files, texts, strict=True))
            ],
            "steps": drawing.steps,
            "path": drawing.path,
            "paths": drawing.paths,
            "attention": drawing.attention,
            "device": drawing.device,
            "seconds": round(drawing.seconds, 2),
        }
        rows = [(image["file"], image["seed"], image["prompt"]) for image in payload["images"]]
        noun = "picture" if len(rows) == 1 else "pictures"
        summary = f"{len(rows)} {noun} in {drawing.seconds:.1f} s, {drawing.steps} steps, path {drawing.path}"
        output.result(payload, table(("file", "seed", "prompt"), rows, left=3), summary)


def _files(out: Path, texts: list[str]) -> list[Path]:
    """Where each picture goes; found out before anything is drawn."""
    if not texts:
        raise UserError("no prompts: expected at least one; give a PROMPT or --prompts FILE")
    if out.suffix.lower() == ".png":
        if len(texts) > 1:
            raise UserError(f"--out {out} names one picture for {len(texts)} prompts: expected a folder")
        return [out]
    if out.suffix and not out.is_dir():
        raise UserError(f"--out {out} is no .png: expected a .png file or a folder without suffix")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: expected a folder or a .png")
    return [out / f"{index:05d}.png" for index in range(len(texts))]
