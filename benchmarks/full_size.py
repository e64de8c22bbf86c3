"""What quantizing costs at full size, on one GPU, with random weights: seconds of each phase, and peak memory.

    python benchmarks/full_size.py --recipe svdquant-fast --json benchmarks/results/full_size_fast_h100.json
    python benchmarks/full_size.py --recipe svdquant --blocks 2 --json benchmarks/results/full_size_svdquant_h100.json

Builds a pipeline folder with the transformer of FLUX.1-dev (11.9 B weights, bf16, shards of 5 GB) and stub encoders and
VAE, unless it is there, and takes it from disk to disk with `quantize_folder`, in a process of its own. Random weights
tell time and memory and nothing of quality.

With `--blocks N` only the first N double and the last N single blocks are quantized, and the whole is extrapolated:
what is drawn, loaded and replayed is that of the whole model either way (a replay ends with the last block that is
recorded, and so the last ones are taken), passes are counted for the whole model, and the solving of a block of each
kind is multiplied by their number. With `--run-samples N` fewer samples are drawn and recorded than asked for, and the
seconds that this takes are multiplied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

import bittern
from bittern import folders, recipes
from bittern.architectures import plan
from bittern.quantization import Limits, passes
from bittern.quantization.jobs import blocks_of
from bittern.quantization.preview import skeleton
from bittern.recipes import Recipe
from bittern.trajectories import enough

GIB = 2**30
OUTPUTS = 4096 * 64
"""Numbers that the transformer puts out for 1024 x 1024."""
SHARD = 5 * 10**9
STEM = "diffusion_pytorch_model"
MINI: dict[str, Any] = {
    "num_layers": 3, "num_single_layers": 4, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "bittern-full-size")
    parser.add_argument("--recipe", default="svdquant-fast")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--run-samples", type=int, help="the samples to draw; the rest is extrapolated")
    parser.add_argument("--blocks", type=int, help="of each kind; the rest is kept, and the whole extrapolated")
    parser.add_argument("--gpu-memory", type=float, default=24, help="GiB that the process may take")
    parser.add_argument("--record-memory", type=float, default=16, help="GiB of the host for records")
    parser.add_argument("--override", type=json.loads, default={}, help='e.g. {"default": {"sensitivity": false}}')
    parser.add_argument("--mini", action="store_true", help="a model of a megabyte, to try the script")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    model = args.folder / ("mini" if args.mini else "flux")
    record: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "environment": environment()}
    if not (model / "model_index.json").is_file():
        began = time.perf_counter()
        build(model, args.mini)
        record["building_seconds"] = round(time.perf_counter() - began, 1)
        print(f"{model}: built in {record['building_seconds']} s", flush=True)
    # In a process of its own, so that the peaks are those of the work alone.
    done = subprocess.run([sys.executable, *sys.argv, "--child"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    record |= json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__, "bittern": bittern.__version__}


# ---- the model


def build(folder: Path, mini: bool) -> None:
    """A pipeline folder: the denoiser shard by shard, the rest as small as it may be."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    config = MINI if mini else {}
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(in_channels=64, guidance_embeds=True, **config).to(torch.bfloat16)
    text, pooled = (transformer.config[key] for key in ("joint_attention_dim", "pooled_projection_dim"))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)
    pieces = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *letters)]
    tokenizer_2 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
    torch.manual_seed(0)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=AutoencoderKL(
            sample_size=64 if mini else 1024,
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=pooled, intermediate_size=64, projection_dim=pooled,
                num_hidden_layers=1, num_attention_heads=1, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        ),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_2), d_model=text, d_kv=16, d_ff=64, num_layers=1, num_heads=1)
        ),
        tokenizer_2=tokenizer_2,
        transformer=None,
    ).to(torch.bfloat16)  # fmt: skip
    fresh = folder.with_suffix(".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.save_pretrained(fresh)
    write_weights(transformer, fresh / "transformer", 100_000 if mini else SHARD)
    index = json.loads((fresh / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (fresh / "model_index.json").write_text(json.dumps(index, indent=2))
    fresh.rename(folder)


def write_weights(model: FluxTransformer2DModel, folder: Path, shard: int) -> None:
    """Random weights, made on the device shard by shard."""
    model.save_config(folder)
    shards: list[list[str]] = [[]]
    size = 0
    state = model.state_dict()
    for name, tensor in state.items():
        if size + tensor.nbytes > shard and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    generator = torch.Generator(device()).manual_seed(0)

    def value(name: str, like: Tensor) -> Tensor:
        if like.ndim < 2:
            return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
        noise = torch.empty(like.shape, dtype=like.dtype, device=device()).normal_(0, 0.02, generator=generator)
        return noise.cpu()

    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: value(name, state[name]) for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


# ---- the measurement


class Phases:
    """Seconds by what a progress callback said was being done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()
        self.now = "planning"

    def __call__(self, what: str, done: float, total: float) -> None:
        self.close()
        if what != self.now:
            print(f"{self.now}: {self.seconds[self.now]:.1f} s", file=sys.stderr, flush=True)
        self.now = "assembling and writing" if what == "solved" else what

    def close(self) -> None:
        now = time.perf_counter()
        self.seconds[self.now] = self.seconds.get(self.now, 0.0) + now - self.began
        self.began = now

    def total(self, start: str) -> float:
        return sum(seconds for what, seconds in self.seconds.items() if what.startswith(start))


class HostPeak(threading.Thread):
    """The process's memory ten times a second: all of it, and what is not the page cache's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = {"VmRSS": 0, "RssAnon": 0}

    def run(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peak:
                    self.peak[name] = max(self.peak[name], int(value.split()[0]) * 1024)
            time.sleep(0.1)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    source = args.folder / ("mini" if args.mini else "flux")
    out = args.folder / "out"
    blank = skeleton(source)[0]
    changes = {"rank": "1/8"} if args.mini else {}
    recipe = recipes.load(args.recipe).override(default=changes).override(**args.override)
    if recipe.calibrated:
        recipe = recipe.override(name=recipe.name, samples=args.run_samples or args.samples)
    depth = {"transformer_blocks": blank.config.num_layers, "single_transformer_blocks": blank.config.num_single_layers}
    part = recipe if args.blocks is None else partial(recipe, depth, args.blocks)
    budget = int(args.gpu_memory * GIB)
    if device() == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info()[1]))
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    # Beside the allocator's pool the process holds a CUDA context of about half a GiB.
    limits = Limits(budget if device() == "cuda" else None, int(args.record_memory * GIB))
    host, phases = HostPeak(), Phases()
    host.start()
    began = time.perf_counter()
    report = folders.quantize_folder(
        source, part, out, device=device(), force=True, restart=True, limits=limits, progress=phases
    )
    seconds = time.perf_counter() - began
    phases.close()
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "samples": args.samples if recipe.calibrated else 0,
        "samples_run": recipe.samples if recipe.calibrated else 0,
        "blocks_solved": depth if args.blocks is None else {kind: min(args.blocks, n) for kind, n in depth.items()},
        "seconds": round(seconds, 1),
        "phases": {what: round(value, 1) for what, value in phases.seconds.items()},
        "bits_per_weight": round(report.bits_per_weight, 3),
        "host_peak_gib": round(host.peak["VmRSS"] / GIB, 2),
        "host_peak_without_files_gib": round(host.peak["RssAnon"] / GIB, 2),
    }
    if device() == "cuda":
        result["device_peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        result["device_peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    if args.blocks is not None or args.run_samples is not None:
        result["extrapolated"] = extrapolated(
            phases, plan(blank, recipe), plan(blank, part), recipe, limits, depth, args.samples
        )
    shutil.rmtree(out)
    return result


def partial(recipe: Recipe, depth: dict[str, int], blocks: int) -> Recipe:
    """The recipe for the first double and the last single blocks."""
    double, single = depth.values()
    kept = [f"transformer_blocks.{index}.*" for index in range(blocks, double)]
    kept += [f"single_transformer_blocks.{index}.*" for index in range(single - blocks)]
    return recipe.override(name=recipe.name, keep=[*recipe.keep, *kept])


def extrapolated(
    phases: Phases, whole: Any, part: Any, recipe: Recipe, limits: Limits, depth: dict[str, int], samples: int
) -> dict[str, float]:
    """Seconds of the whole model with so many samples, by phase."""
    more, felt = samples / recipe.samples, enough(samples, OUTPUTS) / enough(recipe.samples, OUTPUTS)
    ran, wanted = (len(passes(blocks_of(made), recipe.rows, 2, limits)) for made in (part, whole))
    found = {"once": sum(phases.total(what) for what in ("planning", "encoding", "calibrating", "assembling"))}
    found["drawing"] = phases.total("drawing") * more
    for what in ("loading", "recording inputs", "recording sensitivities"):
        each_sample = {"loading": 1.0, "recording inputs": more, "recording sensitivities": felt}[what]
        found[what] = phases.total(what) / ran * wanted * each_sample if recipe.calibrated else 0.0
    for kind, count in depth.items():
        solved = {job.paths[0].split(".")[1] for job in part.jobs if job.paths[0].startswith(f"{kind}.")}
        found[f"solving {kind}"] = phases.total(f"solving {kind}.") / len(solved) * count
    found["all"] = sum(found.values())
    return {"passes": wanted, **{what: round(seconds, 1) for what, seconds in found.items()}}


if __name__ == "__main__":
    main()
