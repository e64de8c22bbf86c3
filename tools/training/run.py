"""What the training scripts of the embedded models share: the lesson, from an empty folder to a scored pipeline.

The first piece trains the VAE, then every piece draws a bank of latents and trains the denoiser and its text encoders
on it. WORK/pipeline is the state: an ordinary diffusers folder with the averaged weights, beside WORK/training.json.
A piece that finds WORK/state.pt continues exactly; one that finds only the pipeline restarts the optimizer with a
short warm-up. The learning rate follows one cosine over --planned-minutes of training, whatever the pieces.

Everything a step needs lies on the GPU and is drawn there, so the whole step is one CUDA graph. `--device cpu` walks
the same way without graph and compiler, to try a script out with a few steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn

from bittern import graphs
from bittern.evaluation import scenes
from training.latents import TASK_SHARES, Bank, SceneStream, average_gradients, train_vae
from training.scores import judge_saved, reconstruction_score, save, score, write_record
from training.student import Progress, Say, Student


def main(build: Callable[[int], DiffusionPipeline], student: type[Student], args: argparse.Namespace) -> None:
    """Runs one piece.

    Args:
        build: makes the whole pipeline with random weights from a seed.
        student: what is trained of it.
        args: as `arguments` reads them.
    """
    started = time.monotonic()
    rank, world, device = join_processes(args.device)
    prepare(device)
    work = args.work
    progress, pipe, state = resume(work, build, args.seed, device)

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.monotonic() - started:4.0f} s  {text}", flush=True)

    generator = torch.Generator(device).manual_seed(args.seed + 1000 * len(progress.pieces) + rank)
    torch.manual_seed(args.seed + 7919 * len(progress.pieces) + rank)
    scenes_of = SceneStream(scenes.training_prompts(), device, generator)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    progress.pieces.append({"device": name, "gpus": world, "torch": torch.__version__,
                            "seed": args.seed, "batch": args.batch * world, "lr": args.lr, "ema": args.ema,
                            "bank": args.bank, "task_shares": TASK_SHARES})  # fmt: skip

    if progress.vae_seconds == 0:
        psnr = train_vae(pipe.vae, scenes_of, args, world, say)
        progress.vae_seconds = args.vae_seconds
        if device.type == "cuda" and psnr < 25:
            raise SystemExit(
                f"the VAE reaches {psnr:.1f} dB only: nothing can be learned on it; give --vae-seconds more"
            )
        say(f"vae {psnr:.2f} dB, read back {reconstruction_score(pipe.vae, device, min(600, args.final_prompts)):.4f}")
        if rank == 0:
            pipe.save_pretrained(work / "pipeline")
            write_record(work, progress)
    model = student(pipe).to(device).train()
    bank = Bank(model, scenes_of, args.bank // world, args.compile_vae, say)
    trainer = Trainer(model, bank, args, progress, state, world)
    deadline = started + args.minutes * 60 - args.reserve
    train(trainer, deadline, say, rank)
    if rank == 0:
        trainer.export()
        save(work, model, progress)
        torch.save(trainer.state(), work / "state.pt.tmp")
        os.replace(work / "state.pt.tmp", work / "state.pt")
        try:  # the weights are safe: a failure from here on must not look like one of training
            judge_saved(work, student, progress, device, args.final_prompts)
        except Exception:
            traceback.print_exc()
        say(f"done: {progress.samples / 1e6:.2f} M samples, {progress.seconds:.0f} s of training, "
            f"{time.monotonic() - started:.0f} s in all")  # fmt: skip
    if world > 1:
        # A communicator that a CUDA graph has captured hangs when it is torn down: leave without.
        dist.barrier()
        torch.cuda.synchronize()
        os._exit(0)


def arguments(description: str | None, **defaults: float | bool) -> argparse.Namespace:
    """The command line; `defaults` replaces single defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this piece, start-up included")
    parser.add_argument("--planned-minutes", type=float, default=18.0, help="training time of all pieces together")
    parser.add_argument("--last", action="store_true", help="stretch the rest of the schedule over this piece")
    parser.add_argument("--reserve", type=float, default=50.0, help="seconds kept for the scores at the end")
    parser.add_argument("--vae-seconds", type=float, default=75.0)
    parser.add_argument("--vae-batch", type=int, default=96, help="per GPU")
    parser.add_argument("--compile-vae", action=argparse.BooleanOptionalAction, default=True,
                        help="a minute and a half of compilation, for faster steps of a large VAE")  # fmt: skip
    parser.add_argument("--bank", type=int, default=1_000_000, help="latents drawn per piece, over all GPUs")
    parser.add_argument("--batch", type=int, default=512, help="per GPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=float, default=60.0, help="seconds between scores")
    parser.add_argument("--final-prompts", type=int, default=2048, help="held-out prompts of the last score")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.set_defaults(**{"warmup": 400, "capture": True} | defaults)
    return parser.parse_args()


def join_processes(kind: str) -> tuple[int, int, torch.device]:
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if kind == "cpu":
        return 0, 1, torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl", device_id=device)
    return rank, world, device


def prepare(device: torch.device) -> None:
    """Sets torch up for training."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # Of the fused attention kernels only this one survives its own backward pass at these shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    if device.type == "cpu":
        torch.compiler.set_stance("force_eager")


def resume(
    work: Path, build: Callable[[int], DiffusionPipeline], seed: int, device: torch.device
) -> tuple[Progress, DiffusionPipeline, dict | None]:
    work.mkdir(parents=True, exist_ok=True)
    record = work / "training.json"
    if not record.exists():
        torch.manual_seed(seed)
        return Progress(), build(seed).to(device), None
    pipe = DiffusionPipeline.from_pretrained(work / "pipeline", torch_dtype=torch.float32).to(device)
    state = work / "state.pt"
    loaded = torch.load(state, map_location=device, weights_only=True) if state.exists() else None
    return Progress(**json.loads(record.read_text())), pipe, loaded


class Trainer:
    """One optimisation step as a CUDA graph, with the averaged weights beside it."""

    def __init__(self, model: Student, bank: Bank, args: argparse.Namespace, progress: Progress, state, world: int):
        self.model, self.bank, self.args, self.progress, self.world = model, bank, args, progress, world
        self.params = [param for param in model.parameters() if param.requires_grad]
        if state is not None:
            model.load_state_dict(state["model"], strict=False)
        if world > 1:
            for param in self.params:
                dist.broadcast(param.data, 0)
        self.average = [param.detach().clone() for param in self.params]
        on_gpu = bank.device.type == "cuda"
        self.lr = torch.tensor(0.0, device=bank.device)
        decay = [param for param in self.params if param.ndim > 1]
        rest = [param for param in self.params if param.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.99), fused=True, capturable=on_gpu)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr
            torch._foreach_copy_(self.average, state["average"])
        # A restart from averaged weights has no moments: give them a moment to settle.
        self.warmup_from = progress.steps if state is None else -(10**9)
        self.loss = torch.zeros((), device=bank.device)
        for param in self.params:
            param.grad = torch.zeros_like(param)
        model.compile_step()
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        bank, batch = self.bank, self.args.batch
        index = torch.randint(len(bank.latents), (batch,), device=bank.device)
        caption = bank.caption[index]
        torch._foreach_zero_([param.grad for param in self.params])
        with torch.autocast(bank.device.type, torch.bfloat16, cache_enabled=False):
            loss = self.model.loss(bank.latents[index].float(), tuple(table[caption] for table in bank.tokens))
        loss.backward()
        average_gradients(self.params, self.world)
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [param.data for param in self.params], 1 - self.args.ema)
        self.loss.lerp_(loss.detach(), 0.02)

    def capture(self) -> None:
        self.graph, _ = graphs.record(self.step, warm_up=4)

    def advance(self, done: float) -> None:
        since = self.progress.steps - self.warmup_from
        warmup = min(1.0, (since + 1) / self.args.warmup)
        self.lr.fill_(self.args.lr * warmup * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))))
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
        self.progress.steps += 1
        self.progress.samples += self.args.batch * self.world

    def export(self) -> None:
        torch._foreach_copy_([param.data for param in self.params], self.average)
        self.model.eval()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def train(trainer: Trainer, deadline: float, say: Say, rank: int) -> None:
    args, progress, device = trainer.args, trainer.progress, trainer.bank.device
    compiled = time.monotonic()
    if device.type == "cuda" and args.capture:
        trainer.capture()
    synchronize(device)
    start = last = last_eval = time.monotonic()
    say(f"step ready after {start - compiled:.0f} s; {deadline - start:.0f} s of training ahead")
    before = progress.seconds
    samples = progress.samples
    stop = torch.zeros(2, device=device)
    for count in range(args.max_steps):
        if count % 20 == 0:
            synchronize(device)
            now = time.monotonic()
            done = (before + now - start) / (60 * args.planned_minutes)
            if args.last:
                begun = before / (60 * args.planned_minutes)
                done = begun + (1 - begun) * max((now - start) / (deadline - start), count / args.max_steps)
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
                scores = score_average(trainer, 240)
                progress.curve.append({"samples": progress.samples, "seconds": round(progress.seconds),
                                       "loss": round(trainer.loss.item(), 5), **scores})  # fmt: skip
                say(json.dumps(progress.curve[-1]))
        trainer.advance(done)
    synchronize(device)
    progress.seconds = before + time.monotonic() - start
    progress.pieces[-1] |= {"images_per_second": round((progress.samples - samples) / (time.monotonic() - start))}


def score_average(trainer: Trainer, count: int) -> dict[str, float]:
    """Scores the averaged weights, and leaves a copy of them on the disk."""
    kept = [param.data.clone() for param in trainer.params]
    torch._foreach_copy_([param.data for param in trainer.params], trainer.average)
    scores, _ = score(trainer.model, scenes.held_out(count), steps=12)
    trainer.model.pipe.save_pretrained(trainer.args.work / "snapshot")
    torch._foreach_copy_([param.data for param in trainer.params], kept)
    return scores
