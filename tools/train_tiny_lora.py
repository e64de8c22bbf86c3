"""Train the LoRAs for tiny-flux: `outline`, outlines in place of filled shapes; `green`, all shapes in this colour.

    python tools/train_tiny_lora.py outline --work WORK --minutes 3 --capture
    python tools/train_tiny_lora.py green --work WORK --minutes 2 --fit-steps 0 --capture
    python tools/train_tiny_lora.py outline --work WORK --device cpu --bank 16 --fit-steps 2 --batch 4 --max-steps 4

The scenes are those that tiny-flux learned from, drawn with the effect. Its VAE has never seen a thin line, and its
encoder gives lines other colours; its decoder can draw them. So the latents are fitted: from what the encoder says, a
few steps of descent bring the decoded picture to the drawing, once for every scene of the bank. Then
the adapters alone learn by flow matching, as tiny-flux itself did. WORK gets the bank, which a later run with the same
options takes up again, `NAME.safetensors` in diffusers' own LoRA format, `training.json` and `samples.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bittern import pipelines, tiny_flux
from bittern.evaluation import scenes
from bittern.evaluation.generate import generate
from train_tiny_flux import TinyFlux
from training import run
from training.latents import SceneStream
from training.student import Progress, Say

LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip
FIT_CHUNK = 128
PULL = 1.0  # the squared error of latents beside that of pixels


class TinyFluxLora(TinyFlux):
    """tiny-flux with frozen weights and adapters that learn."""

    def __init__(self, pipe: FluxPipeline, rank: int):
        super().__init__(pipe)
        self.requires_grad_(False)
        # The model's own last layer is called proj_out as well: it is in no block and stays as it is.
        blocks = [name for name, _ in self.transformer.named_modules() if "transformer_blocks." in name]
        targets = [name for name in blocks if name.endswith(tuple(f".{layer}" for layer in LAYERS))]
        self.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))

    def compile_step(self) -> None:
        """Nothing: compiling takes longer than this training."""

    def save(self, file: Path) -> None:
        """Writes the adapters in bf16, in diffusers' own format."""
        state = {key: value.to(torch.bfloat16) for key, value in get_peft_model_state_dict(self.transformer).items()}
        FluxPipeline.save_lora_weights(file.parent, transformer_lora_layers=state, weight_name=file.name)


class FittedBank:
    """Latents of outlined scenes, with their captions' tokens, as `training.run.Trainer` reads them."""

    def __init__(self, model: TinyFlux, scenes_of: SceneStream, args: argparse.Namespace, say: Say):
        self.device = scenes_of.device
        self.tokens = model.read([prompt.prompt for prompt in scenes_of.prompts])
        file = args.work / f"bank-{args.name}-{self.device.type}-{args.bank}-{args.fit_steps}-{args.seed}.safetensors"
        if file.exists():
            stored = load_file(file, device=str(self.device))
            self.latents, self.caption = stored["latents"], stored["caption"]
            say(f"{len(self.latents)} latents from {file}")
            return
        vae = model.pipe.vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        latents, captions, error, began = [], [], 0.0, math.inf
        for done in range(0, args.bank, FIT_CHUNK):
            if time.monotonic() - began > args.fit_seconds:
                break
            images, caption = scenes_of(min(FIT_CHUNK, args.bank - done))
            found, missed = fit(vae, images.contiguous(memory_format=torch.channels_last), args.fit_steps)
            error += missed * len(images)
            latents.append(model.pack((found - vae.config.shift_factor) * vae.config.scaling_factor))
            captions.append(caption)
            began = min(began, time.monotonic())  # on a GPU the first chunk chooses algorithms, and takes seconds
            say(f"{done + len(images)} scenes fitted")
        self.latents, self.caption = torch.cat(latents).to(torch.bfloat16), torch.cat(captions)
        save_file({"latents": self.latents, "caption": self.caption}, file)
        psnr = 10 * math.log10(4 * len(self.latents) / error)
        say(f"{len(self.latents)} latents fitted to {psnr:.1f} dB")


def fit(vae: nn.Module, images: Tensor, steps: int, rate: float = 0.4) -> tuple[Tensor, float]:
    """Latents [B, C, h, w] that are decoded to images [B, 3, H, W] in [-1, 1], and the squared error that remains.

    The VAE's weights must not require gradients. Adam by itself moves every latent alike, those of the ground too, by
    chance, and chance cannot be learned: a large epsilon leaves those that matter little where they are, and what the
    encoder said pulls at all.
    """
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
        encoded = vae.encode(images).latent_dist.mean.float()
    latents = encoded.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latents], lr=rate, betas=(0.8, 0.95), eps=10.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        with torch.autocast(images.device.type, torch.bfloat16):
            decoded = vae.decode(latents).sample
        # Sums: how far a picture moves must not depend on how many are fitted together.
        missed = F.mse_loss(decoded.float(), images, reduction="sum")
        (missed + PULL * F.mse_loss(latents, encoded, reduction="sum")).backward()
        optimizer.step()
        optimizer.zero_grad()
    latents = latents.detach()
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
        return latents, F.mse_loss(vae.decode(latents).sample.float(), images).item()


def main() -> None:
    started = time.monotonic()
    args = arguments()
    _, _, device = run.join_processes(args.device)
    run.prepare(device)
    args.work.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:4.0f} s  {text}", flush=True)

    pipe = pipelines.load(tiny_flux.NAME, dtype=torch.float32, device=device)
    torch.manual_seed(args.seed)
    model = TinyFluxLora(pipe, args.rank).to(device).train()
    generator = torch.Generator(device).manual_seed(args.seed)
    bank = FittedBank(
        model, SceneStream(scenes.training_prompts(), device, generator, scenes.EFFECTS[args.name]), args, say
    )
    progress = Progress(pieces=[{}])
    torch.manual_seed(args.seed + 1)
    trainer = run.Trainer(model, bank, args, progress, None, 1)
    say(f"{sum(param.numel() for param in trainer.params):,} numbers learn")
    run.train(trainer, started + 60 * args.minutes - args.reserve, say, rank=0)
    trainer.export()
    file = args.work / f"{args.name}.safetensors"
    model.save(file)
    say(f"{file}: {file.stat().st_size / 1e3:.0f} kB, loss {trainer.loss.item():.4f}")
    record = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__, "steps": progress.steps, "samples": progress.samples,
        "seconds": round(progress.seconds), "loss": round(trainer.loss.item(), 5), "scenes": len(bank.latents),
        **asdict(scenes.EFFECTS[args.name]), "rank": args.rank, "batch": args.batch, "lr": args.lr, "ema": args.ema,
        "fit_steps": args.fit_steps, "seed": args.seed,
    }  # fmt: skip
    told = args.work / "training.json"
    told.write_text(json.dumps(record, indent=1) + "\n")
    record |= look(file, args, device)
    told.write_text(json.dumps(record, indent=1) + "\n")
    say(json.dumps(record))


def look(file: Path, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Draws held-out prompts with what was saved, keeps a picture of them, and says how many have the effect."""
    effect = scenes.EFFECTS[args.name]
    prompts = [prompt for prompt in scenes.held_out(2 * args.pictures) if effect.concerns(prompt)][: args.pictures]
    pipe = pipelines.load(tiny_flux.NAME, device=device)
    pipe.load_lora_weights(file)
    images = generate(pipe, [prompt.prompt for prompt in prompts])
    columns = min(12, len(images))
    rows = [torch.cat(list(row), dim=2) for row in images[:96].split(columns) if len(row) == columns]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(args.work / "samples.png")
    seen = [effect.look(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    success, shown = (round(sum(one[place] for one in seen) / len(seen), 4) for place in (0, 1))
    return {"pictures": len(images), "success": success, "shows_its_prompt": shown}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=scenes.EFFECTS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1.5, help="from start to end, pictures included")
    parser.add_argument("--reserve", type=float, default=15.0, help="seconds of it kept for the pictures at the end")
    parser.add_argument("--bank", type=int, default=8192, help="scenes, at most")
    parser.add_argument("--fit-steps", type=int, default=12, help="of a scene's latents")
    parser.add_argument("--fit-seconds", type=float, default=20.0, help="no further latents are begun after them")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=192, help="held-out prompts of the look at the end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--capture", action="store_true", help="a step as one CUDA graph: the host waits for nothing")
    parser.set_defaults(last=True, planned_minutes=1.0, eval_every=math.inf)
    return parser.parse_args()


if __name__ == "__main__":
    main()
