"""Train tiny-flux, the embedded FLUX pipeline, from scratch on the scenes world.

    python tools/train_tiny_flux.py --work WORK --minutes 9 --planned-minutes 18
    torchrun --nproc-per-node 2 tools/train_tiny_flux.py --work WORK ...

The first piece trains the VAE, then every piece draws a bank of latents and trains the transformer and both text
encoders on it by flow matching [Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206].
WORK/pipeline is the state: an ordinary diffusers folder with the averaged weights in bf16, beside WORK/training.json.
A piece that finds WORK/state.pt continues exactly; one that finds only the pipeline restarts the optimizer with a
short warm-up. The learning rate follows one cosine over --planned-minutes of training, whatever the pieces.

Everything a step needs lies on the GPU and is drawn there, so the whole step is one CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor, nn

from bittern.evaluation import scenes
from tiny_flux_parts import IMAGE_SIZE, TEXT_TOKENS, build_pipeline

# Two objects are learned last, so they are seen most.
TASK_SHARES = {
    "single_object": 0.05, "two_object": 0.14, "counting": 0.20, "colors": 0.05, "position": 0.31, "color_attr": 0.25
}  # fmt: skip
# The scheduler's shift is chosen among these, on training prompts.
SHIFTS = (1.0, 1.5, 2.0, 2.5, 3.0)


@dataclass
class Progress:
    """What has been done so far, over all pieces."""

    samples: int = 0
    steps: int = 0
    seconds: float = 0.0
    vae_seconds: float = 0.0
    curve: list[dict] = field(default_factory=list)
    pieces: list[dict] = field(default_factory=list)


def main() -> None:
    args = parse_args()
    started = time.monotonic()
    rank, world, device = join_processes()
    torch.set_float32_matmul_precision("high")
    # Of the fused attention kernels only this one survives its own backward pass at these shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    work = args.work
    progress, pipe, state = resume(work, args.seed, device)
    say = print if rank == 0 else (lambda *_: None)
    generator = torch.Generator(device).manual_seed(args.seed + 1000 * len(progress.pieces) + rank)
    torch.cuda.manual_seed(args.seed + 7919 * len(progress.pieces) + rank)
    prompts = scenes.training_prompts()
    scenes_of = SceneStream(prompts, device, generator)
    progress.pieces.append({"device": torch.cuda.get_device_name(device), "gpus": world, "torch": torch.__version__,
                            "seed": args.seed, "batch": args.batch * world, "lr": args.lr, "ema": args.ema,
                            "bank": args.bank, "task_shares": TASK_SHARES})  # fmt: skip

    if progress.vae_seconds == 0:
        psnr = train_vae(pipe.vae, scenes_of, args, world, say)
        progress.vae_seconds = args.vae_seconds
        say(f"vae {psnr:.2f} dB, read back {reconstruction_score(pipe.vae, device):.4f}")
        if rank == 0:
            pipe.save_pretrained(work / "pipeline")
            (work / "training.json").write_text(json.dumps(asdict(progress), indent=1) + "\n")
    bank = Bank(pipe, scenes_of, args.bank // world, say)
    model = Student(pipe).to(device).train()
    trainer = Trainer(model, bank, args, progress, state, world)
    deadline = started + args.minutes * 60 - args.reserve
    train(trainer, deadline, say, pipe, rank)
    if rank == 0:
        torch.save(trainer.state(), work / "state.pt.tmp")
        os.replace(work / "state.pt.tmp", work / "state.pt")
        trainer.export(pipe)
        finish(work, pipe, progress, device)
        say(f"done: {progress.samples / 1e6:.2f} M samples, {progress.seconds:.0f} s of training, "
            f"{time.monotonic() - started:.0f} s in all")  # fmt: skip
    if world > 1:
        # A communicator that a CUDA graph has captured hangs when it is torn down: leave without.
        dist.barrier()
        torch.cuda.synchronize()
        os._exit(0)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this piece, start-up included")
    parser.add_argument("--planned-minutes", type=float, default=18.0, help="training time of all pieces together")
    parser.add_argument("--last", action="store_true", help="stretch the rest of the schedule over this piece")
    parser.add_argument("--reserve", type=float, default=25.0, help="seconds kept for the export at the end")
    parser.add_argument("--vae-seconds", type=float, default=75.0)
    parser.add_argument("--bank", type=int, default=1_000_000, help="latents drawn per piece, over all GPUs")
    parser.add_argument("--batch", type=int, default=512, help="per GPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=float, default=60.0, help="seconds between scores")
    parser.add_argument("--max-steps", type=int, default=10**9)
    return parser.parse_args()


def join_processes() -> tuple[int, int, torch.device]:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    return rank, world, device


def resume(work: Path, seed: int, device: torch.device) -> tuple[Progress, FluxPipeline, dict | None]:
    work.mkdir(parents=True, exist_ok=True)
    record = work / "training.json"
    if not record.exists():
        return Progress(), build_pipeline(seed).to(device), None
    pipe = FluxPipeline.from_pretrained(work / "pipeline", torch_dtype=torch.float32).to(device)
    state = work / "state.pt"
    loaded = torch.load(state, map_location=device, weights_only=True) if state.exists() else None
    return Progress(**json.loads(record.read_text())), pipe, loaded


class SceneStream:
    """Random training scenes with the index of their caption."""

    def __init__(self, prompts: tuple[scenes.ScenePrompt, ...], device: torch.device, generator: torch.Generator):
        self.prompts, self.generator = prompts, generator
        self.table = scenes.SceneTable.of(prompts, device)
        of_task = torch.tensor([scenes.TASKS.index(prompt.tag) for prompt in prompts])
        share = torch.tensor([TASK_SHARES[task] for task in scenes.TASKS])
        weight = share[of_task] / torch.bincount(of_task)[of_task]
        self.cumulative = weight.double().cumsum(0).to(device)

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [-1, 1] and caption indices [B]."""
        u = torch.rand(count, device=self.cumulative.device, generator=self.generator, dtype=torch.float64)
        index = torch.searchsorted(self.cumulative, u * self.cumulative[-1]).clamp(max=len(self.prompts) - 1)
        images = scenes.draw(scenes.sample(self.table, index, self.generator), IMAGE_SIZE)
        return images.float() / 127.5 - 1, index


def train_vae(vae: nn.Module, scenes_of: SceneStream, args: argparse.Namespace, world: int, say) -> float:
    vae.train().to(memory_format=torch.channels_last)
    params = list(vae.parameters())
    if world > 1:
        for param in params:
            dist.broadcast(param.data, 0)
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.compile
    def loss_of(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            output = vae.decode(mean + std * torch.randn_like(mean)).sample.float()
        error = F.mse_loss(output, images)
        divergence = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return error + 1e-5 * divergence, error

    start, step, smooth = time.monotonic(), 0, 1.0
    while True:
        done = (time.monotonic() - start) / args.vae_seconds
        if world > 1:  # all processes must take the same number of steps
            shared = torch.tensor(done, device=params[0].device)
            dist.broadcast(shared, 0)
            done = shared.item()
        if done >= 1 or step >= args.max_steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        images, _ = scenes_of(96)
        loss, error = loss_of(images.contiguous(memory_format=torch.channels_last))
        loss.backward()
        average_gradients(params, world)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            smooth = error.item()
            if step == 50:
                start = time.monotonic()  # compilation is not training
        if step % 250 == 0:
            say(f"vae step {step} {10 * math.log10(4 / smooth):.2f} dB")
        step += 1
    vae.eval()
    return 10 * math.log10(4 / smooth)


def average_gradients(params: list[nn.Parameter], world: int) -> None:
    if world == 1:
        return
    grads = [param.grad for param in params]
    flat = torch._utils._flatten_dense_tensors(grads)
    dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))


@torch.no_grad()
def reconstruction_score(vae: nn.Module, device: torch.device, count: int = 600) -> float:
    prompts = scenes.held_out(count)
    generator = torch.Generator(device).manual_seed(5)
    batch = scenes.sample(scenes.SceneTable.of(prompts, device), torch.arange(count, device=device), generator)
    images = scenes.draw(batch, IMAGE_SIZE).float() / 127.5 - 1
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(100)])
    return sum(scenes.judge(to_bytes(decoded), prompts)) / count


def to_bytes(images: Tensor) -> Tensor:
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class Bank:
    """Encoded scenes, packed as FLUX packs them, with their captions' tokens, all on the GPU."""

    @torch.no_grad()
    def __init__(self, pipe: FluxPipeline, scenes_of: SceneStream, count: int, say):
        start = time.monotonic()
        captions = [prompt.prompt for prompt in scenes_of.prompts]
        device = scenes_of.cumulative.device
        self.t5 = tokens(pipe.tokenizer_2, captions).to(device)
        self.clip = tokens(pipe.tokenizer, captions).to(device)
        pipe.vae.eval().to(memory_format=torch.channels_last)
        latents, captions_of = [], []
        size = 1024

        @torch.compile
        def encode(images: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return pack(pipe.vae.encode(images).latent_dist.mean)

        for _ in range(-(-count // size)):
            images, index = scenes_of(size)
            latents.append(encode(images.contiguous(memory_format=torch.channels_last)).to(torch.bfloat16))
            captions_of.append(index)
        self.latents, self.caption = torch.cat(latents), torch.cat(captions_of)
        if pipe.vae.config.scaling_factor == 0.18215:  # the default: nobody has measured this VAE yet
            sample = self.latents[:20000].float()
            moments = torch.stack([sample.mean(), sample.std()])
            if dist.is_initialized():
                dist.broadcast(moments, 0)
            mean, std = moments.tolist()
            pipe.vae.register_to_config(shift_factor=round(mean, 4), scaling_factor=round(1 / std, 4))
        shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
        for part in self.latents.split(65536):
            part.sub_(shift).mul_(scale)
        say(f"bank of {len(self.latents)} latents in {time.monotonic() - start:.0f} s, shift {shift}, scale {scale}")


def tokens(tokenizer, texts: list[str]) -> Tensor:
    encoded = tokenizer(texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4 C], as FluxPipeline packs."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


class Student(nn.Module):
    """What is trained: the transformer and both text encoders."""

    def __init__(self, pipe: FluxPipeline):
        super().__init__()
        self.transformer, self.clip, self.t5 = pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
        side = IMAGE_SIZE // 16
        ids = FluxPipeline._prepare_latent_image_ids(1, side, side, pipe.device, torch.float32)
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TEXT_TOKENS, 3, device=pipe.device), persistent=False)
        # The encoders' own masks, ready made: building them copies from the host, which a CUDA graph cannot hold.
        everything = torch.zeros(1, 1, TEXT_TOKENS, TEXT_TOKENS, device=pipe.device)
        self.register_buffer("t5_mask", everything, persistent=False)
        causal = torch.full_like(everything, torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("clip_mask", causal, persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor) -> Tensor:
        text = self.t5(t5, attention_mask=self.t5_mask)[0]
        pooled = self.clip(clip, attention_mask=self.clip_mask).pooler_output
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]


class Trainer:
    """One optimisation step as a CUDA graph, with the averaged weights beside it."""

    def __init__(self, model: Student, bank: Bank, args: argparse.Namespace, progress: Progress, state, world: int):
        self.model, self.bank, self.args, self.progress, self.world = model, bank, args, progress, world
        device = bank.latents.device
        self.params = [param for param in model.parameters() if param.requires_grad]
        if state is not None:
            model.load_state_dict(state["model"], strict=False)
        if world > 1:
            for param in self.params:
                dist.broadcast(param.data, 0)
        self.average = [param.detach().clone() for param in self.params]
        self.lr = torch.tensor(0.0, device=device)
        decay = [param for param in self.params if param.ndim > 1]
        rest = [param for param in self.params if param.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99), fused=True, capturable=True)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            torch._foreach_copy_(self.average, state["average"])
        # A restart from averaged weights has no moments: give them a moment to settle.
        self.warmup_from = progress.steps if state is None else -(10**9)
        self.loss = torch.zeros((), device=device)
        for param in self.params:
            param.grad = torch.zeros_like(param)
        model.transformer.compile_repeated_blocks(fullgraph=True)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        bank, batch = self.bank, self.args.batch
        device = bank.latents.device
        index = torch.randint(len(bank.latents), (batch,), device=device)
        clean = bank.latents[index].float()
        caption = bank.caption[index]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch, device=device))
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        torch._foreach_zero_([param.grad for param in self.params])
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            velocity = self.model(noisy, sigma, bank.t5[caption], bank.clip[caption])
        loss = F.mse_loss(velocity.float(), noise - clean)
        loss.backward()
        average_gradients(self.params, self.world)
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [param.data for param in self.params], 1 - self.args.ema)
        self.loss.lerp_(loss.detach(), 0.02)

    def capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Thread local: the communication library's own thread may touch the device meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.step()

    def advance(self, done: float) -> None:
        since = self.progress.steps - self.warmup_from
        warmup = min(1.0, (since + 1) / 400)
        self.lr.fill_(self.args.lr * warmup * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))))
        self.graph.replay()
        self.progress.steps += 1
        self.progress.samples += self.args.batch * self.world

    def export(self, pipe: FluxPipeline) -> None:
        torch._foreach_copy_([param.data for param in self.params], self.average)
        pipe.transformer.eval()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }


def train(trainer: Trainer, deadline: float, say, pipe: FluxPipeline, rank: int) -> None:
    args, progress = trainer.args, trainer.progress
    compiled = time.monotonic()
    trainer.capture()
    torch.cuda.synchronize()
    start = last = last_eval = time.monotonic()
    say(f"step captured after {start - compiled:.0f} s; {deadline - start:.0f} s of training ahead")
    before = progress.seconds
    samples = progress.samples
    device = trainer.loss.device
    stop = torch.zeros(2, device=device)
    for count in range(args.max_steps):
        if count % 20 == 0:
            torch.cuda.synchronize()
            now = time.monotonic()
            done = (before + now - start) / (60 * args.planned_minutes)
            if args.last:
                begun = before / (60 * args.planned_minutes)
                done = begun + (1 - begun) * (now - start) / (deadline - start)
            ended = now > deadline or done >= 1
            if trainer.world > 1:
                stop.copy_(torch.tensor([float(ended), done], device=device))
                dist.broadcast(stop, 0)
                ended, done = bool(stop[0].item()), stop[1].item()
            progress.seconds = before + now - start
            if ended:
                break
            if now - last > 15:
                last = now
                rate = (progress.samples - samples) / (now - start)
                say(f"{progress.samples / 1e6:7.2f} M  loss {trainer.loss.item():.4f}  {rate:.0f} images/s  "
                    f"done {done:.2f}")  # fmt: skip
            if rank == 0 and now - last_eval > args.eval_every:
                last_eval = now
                scores = score_average(trainer, pipe, 240)
                progress.curve.append({"samples": progress.samples, "seconds": round(progress.seconds),
                                       "loss": round(trainer.loss.item(), 5), **scores})  # fmt: skip
                say(json.dumps(progress.curve[-1]))
        trainer.advance(done)
    torch.cuda.synchronize()
    progress.pieces[-1] |= {"images_per_second": round((progress.samples - samples) / (time.monotonic() - start))}


def score_average(trainer: Trainer, pipe: FluxPipeline, count: int) -> dict[str, float]:
    kept = [param.data.clone() for param in trainer.params]
    torch._foreach_copy_([param.data for param in trainer.params], trainer.average)
    scores, _ = score(trainer.model, pipe, scenes.held_out(count), steps=12)
    torch._foreach_copy_([param.data for param in trainer.params], kept)
    return scores


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def score(
    model: Student, pipe: FluxPipeline, prompts: Sequence[scenes.ScenePrompt], steps: int
) -> tuple[dict[str, float], Tensor]:
    """Scenes scores of the prompts, and the images."""
    count = len(prompts)
    texts = [prompt.prompt for prompt in prompts]
    device = pipe.device
    generator = torch.Generator(device).manual_seed(0)
    t5, clip = tokens(pipe.tokenizer_2, texts).to(device), tokens(pipe.tokenizer, texts).to(device)
    x = torch.randn(count, 64, 64, device=device, generator=generator)
    sigmas = torch.linspace(1, 0, steps + 1, device=device)
    shift = pipe.scheduler.config.shift
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        for now, then in itertools.pairwise(sigmas):
            parts = [model(part, now.expand(len(part)), a, b)
                     for part, a, b in zip(x.split(512), t5.split(512), clip.split(512), strict=True)]  # fmt: skip
            x = x + (then - now) * torch.cat(parts).float()
    latents = FluxPipeline._unpack_latents(x, IMAGE_SIZE, IMAGE_SIZE, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    images = torch.cat([to_bytes(pipe.vae.decode(part).sample) for part in latents.split(256)]).cpu()
    right = scenes.judge(images, prompts)
    scores = {}
    for task in scenes.TASKS:
        mine = [ok for ok, prompt in zip(right, prompts, strict=True) if prompt.tag == task]
        scores[task] = round(sum(mine) / len(mine), 4)
    return {"overall": round(sum(scores.values()) / len(scores), 4)} | scores, images


def choose_shift(model: Student, pipe: FluxPipeline) -> float:
    """The shift that scores best on training prompts, so that the held-out score stays a fair one."""
    every = scenes.training_prompts()
    prompts = [p for task in scenes.TASKS for p in random.Random(1).choices([q for q in every if q.tag == task], k=300)]
    overall = {}
    for shift in SHIFTS:
        pipe.scheduler.register_to_config(shift=shift)
        scores, _ = score(model, pipe, prompts, steps=24)
        overall[shift] = scores["overall"]
        print(f"shift {shift}: {json.dumps(scores)} on {len(prompts)} training prompts")
    return max(overall, key=overall.get)


def finish(work: Path, pipe: FluxPipeline, progress: Progress, device: torch.device) -> None:
    """Save in the stored types, reload, score what was saved, and keep a picture."""
    pipe.vae.to(memory_format=torch.contiguous_format)
    # Text encoders stay float32: transformers loads a stored type as it is, diffusers loads float32, and a plain
    # from_pretrained must give one type throughout.
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    pipe.save_pretrained(work / "pipeline.tmp")
    for config in (work / "pipeline.tmp").rglob("*.json"):
        record = json.loads(config.read_text())
        if record.pop("_name_or_path", None):  # where the last piece lay is nobody's business
            config.write_text(json.dumps(record, indent=2) + "\n")
    saved = FluxPipeline.from_pretrained(work / "pipeline.tmp", torch_dtype=torch.float32).to(device)
    model = Student(saved).to(device).eval()
    shift = choose_shift(model, saved)
    saved.scheduler.register_to_config(shift=shift)
    saved.scheduler.save_pretrained(work / "pipeline.tmp" / "scheduler")
    scores, images = score(model, saved, scenes.held_out(2048), steps=24)
    progress.curve.append({"samples": progress.samples, "seconds": round(progress.seconds), "steps": 24,
                           "images": 2048, "shift": shift, "saved": True, **scores})  # fmt: skip
    print(json.dumps(progress.curve[-1]))
    rows = [torch.cat(list(images[i * 12 : i * 12 + 12]), dim=2) for i in range(8)]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(work / "samples.png")
    (work / "training.json").write_text(json.dumps(asdict(progress), indent=1) + "\n")
    old = work / "pipeline"
    if old.exists():
        old.rename(work / f"pipeline.{int(time.time())}")
    (work / "pipeline.tmp").rename(old)


if __name__ == "__main__":
    main()
