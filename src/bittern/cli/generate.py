"""`bittern generate`: pictures that say how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bittern.cli import options
from bittern.cli.output import Output, hush, table
from bittern.errors import UserError

if TYPE_CHECKING:
    from bittern.evaluation.drawing import Settings


def generate(
    model: options.OptionalModel = None,
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)
    ] = None,
    prompts: options.PromptsFile = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="Draw this PNG again as its file says, or with MODEL.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="A .png for one prompt, a folder for several.")] = Path("out"),
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    path: options.ArithmeticPath = "auto",
    attention: options.Attention = None,
    lora: options.Loras = None,
    lora_strength: options.Strength = 1.0,
    fuse: options.Fuse = False,
    cuda_graphs: options.CudaGraphs = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.Json = False,
) -> None:
    """Draw prompts. Every PNG carries model, prompt, seed, steps, size, path and more as text.

    --replay draws such a PNG again, with its own seed, and says whether every pixel is the same.
    """
    with Output(json) as output:
        hush()
        if replay is not None:
            if seed or steps:
                given = f"--seed {seed}" if seed else f"--steps {steps}"
                raise UserError(f"--replay {replay} has a seed and steps of its own: leave out {given}")
            chosen = options.settings(
                seed, steps, batch_size, path, device, dtype, attention, lora or (), lora_strength, fuse, cuda_graphs
            )
            _again(output, replay.expanduser(), model, [*(prompt or []), *([prompts] if prompts else [])], out, chosen)
            return
        if model is None:
            raise UserError("no model: expected a MODEL and a PROMPT, or --replay PICTURE.png")
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
        if fuse and not lora:
            raise UserError("--fuse is for LoRAs and none is given: expected --lora, too")
        chosen = options.settings(
            seed, steps, batch_size, path, device, dtype, attention, lora or (), lora_strength, fuse, cuda_graphs
        )
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
            "loras": [{"file": one.file, "strength": one.strength} for one in drawing.loras],
            "fused": drawing.fused,
            "device": drawing.device,
            "seconds": round(drawing.seconds, 2),
        }
        rows = [(image["file"], image["seed"], image["prompt"]) for image in payload["images"]]
        noun = "picture" if len(rows) == 1 else "pictures"
        summary = f"{len(rows)} {noun} in {drawing.seconds:.1f} s, {drawing.steps} steps, path {drawing.path}"
        output.result(payload, table(("file", "seed", "prompt"), rows, left=3), summary)


def _again(
    output: Output, picture: Path, model: str | None, prompts: list[object], out: Path, settings: Settings
) -> None:
    """Draw a picture again, write it beside what is asked for, and say whether it is the same."""
    from bittern.evaluation.generate import save_png
    from bittern.evaluation.replay import replay
    from bittern.outputs import check_file_out

    if prompts:
        raise UserError(f"--replay {picture} has a prompt of its own: leave out {str(prompts[0])!r}")
    file = _files(out.expanduser(), ["one"])[0]
    if file.suffix and out.suffix.lower() != ".png":
        file = file.with_name(f"{picture.stem}-replay.png")
    if file.resolve() == picture.resolve():
        raise UserError(f"--out {out} is the picture itself: expected another file")
    check_file_out(file, "--out")
    found = replay(picture, model=model, settings=settings, progress=output.progress)
    drawing = found.drawing
    # Its place in the batch is part of how it came about: this picture can be drawn again in turn.
    save_png(drawing.images[0], file, drawing.metadata(0) | {"batch": found.metadata.get("batch", "1 of 1")})
    payload = {
        "replay": str(picture),
        "file": str(file),
        "model": drawing.model,
        "prompt": drawing.prompts[0],
        "seed": drawing.seed,
        "steps": drawing.steps,
        "path": drawing.path,
        "identical": found.identical,
        "psnr": found.psnr,
        "changed": {key: {"was": was, "is": now} for key, (was, now) in found.changed.items()},
    }
    same = "every pixel is the same" if found.identical else f"it differs: PSNR {found.psnr:.2f} dB"
    changes = [f"  {key}: was {was}, is {now}" for key, (was, now) in found.changed.items()]
    output.result(payload, f"{file}: {picture} drawn again; {same}", *changes)


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
