"""From captions to latents: the stream of scenes, the VAE, and the bank that the denoiser learns from."""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bittern.evaluation import scenes
from training.parts import IMAGE_SIZE
from training.student import Say, Student

# Two objects are learned last, so they are seen most.
TASK_SHARES = {
    "single_object": 0.05, "two_object": 0.14, "counting": 0.20, "colors": 0.05, "position": 0.31, "color_attr": 0.25
}  # fmt: skip


class SceneStream:
    """Random training scenes with the index of their caption; an effect changes the drawings."""

    def __init__(
        self,
        prompts: tuple[scenes.ScenePrompt, ...],
        device: torch.device,
        generator: torch.Generator,
        effect: scenes.Effect | None = None,
    ):
        scenes.refuse_held_out([prompt.prompt for prompt in prompts])
        self.effect = effect or scenes.Effect()
        self.prompts, self.device, self.generator = prompts, device, generator
        self.table = scenes.SceneTable.of(prompts, device)
        of_task = torch.tensor([scenes.TASKS.index(prompt.tag) for prompt in prompts])
        share = torch.tensor([TASK_SHARES[task] for task in scenes.TASKS])
        weight = share[of_task] / torch.bincount(of_task)[of_task]
        self.cumulative = weight.double().cumsum(0).to(device)

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] and caption indices [B]."""
        u = torch.rand(count, device=self.device, generator=self.generator, dtype=torch.float64)
        index = torch.searchsorted(self.cumulative, u * self.cumulative[-1]).clamp(max=len(self.prompts) - 1)
        batch = scenes.sample(self.table, index, self.generator)
        images = scenes.draw(batch, IMAGE_SIZE, stroke=self.effect.stroke, paint=self.effect.paint)
        return images.float() / 127.5 - 1, index


def train_vae(vae: nn.Module, scenes_of: SceneStream, args: argparse.Namespace, world: int, say: Say) -> float:
    vae.train().to(memory_format=torch.channels_last)
    params = list(vae.parameters())
    if world > 1:
        for param in params:
            dist.broadcast(param.data, 0)
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.compile(disable=not args.compile_vae)
    def loss_of(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            output = vae.decode(mean + std * torch.randn_like(mean)).sample.float()
        error = F.mse_loss(output, images)
        divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return error + 1e-5 * divergence, error

    warm_up, start, psnr = 50, 0.0, 0.0
    for step in range(args.max_steps):
        # The clock starts after the warm-up: compilation takes longer than some trainings and is none.
        done = (time.monotonic() - start) / args.vae_seconds if step > warm_up else 0.0
        if world > 1:  # all processes must take the same number of steps
            shared = torch.tensor(done, device=params[0].device)
            dist.broadcast(shared, 0)
            done = shared.item()
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        images, _ = scenes_of(args.vae_batch)
        loss, error = loss_of(images.contiguous(memory_format=torch.channels_last))
        loss.backward()
        average_gradients(params, world)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / error.item())
        if step == warm_up:
            start = time.monotonic()
        if step % 250 == 0:
            say(f"vae step {step} {psnr:.2f} dB")
    vae.eval()
    return psnr


def average_gradients(params: list[nn.Parameter], world: int) -> None:
    if world == 1:
        return
    grads = [param.grad for param in params]
    flat = torch._utils._flatten_dense_tensors(grads)
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))


class Bank:
    """Encoded scenes, as the denoiser reads them, with their captions' tokens, all on the GPU."""

    @torch.no_grad()
    def __init__(self, model: Student, scenes_of: SceneStream, count: int, compile_vae: bool, say: Say):
        start = time.monotonic()
        vae = model.pipe.vae
        vae.eval().to(memory_format=torch.channels_last)
        self.device = scenes_of.device
        self.tokens = model.read([prompt.prompt for prompt in scenes_of.prompts])
        latents, captions_of = [], []
        size = min(1024, count)

        @torch.compile(disable=not compile_vae)
        def encode(images: Tensor) -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16):
                return model.pack(vae.encode(images).latent_dist.mean)

        for _ in range(-(-count // size)):
            images, index = scenes_of(size)
            latents.append(encode(images.contiguous(memory_format=torch.channels_last)).to(torch.bfloat16))
            captions_of.append(index)
        self.latents, self.caption = torch.cat(latents), torch.cat(captions_of)
        if vae.config.scaling_factor == 0.18215:  # the default: nobody has measured this VAE yet
            sample = self.latents[:20000].float()
            moments = torch.stack([sample.mean(), sample.std()])
            if dist.is_initialized():
                dist.broadcast(moments, 0)
            mean, std = moments.tolist()
            vae.register_to_config(scaling_factor=round(1 / std, 4))
            if model.shifts:
                vae.register_to_config(shift_factor=round(mean, 4))
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        for part in self.latents.split(65536):
            part.sub_(shift).mul_(scale)
        say(f"bank of {len(self.latents)} latents in {time.monotonic() - start:.0f} s, shift {shift}, scale {scale}")
