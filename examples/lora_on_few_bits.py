"""Train a LoRA on a ternary pipeline, save it, and load it into another one.

    python examples/lora_on_few_bits.py

The codes of a few-bit layer do not change; gradients pass through the layers to the adapters. This LoRA learns to
undo part of the rounding: it matches the velocities of the 16-bit model on that model's own trajectories. It is an
example of the mechanism, on a few prompts and a few dozen steps, not a recipe.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

import bittern
from bittern import pipelines
from bittern.evaluation import scenes
from bittern.evaluation.generate import generate

Call = tuple[dict[str, Any], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="ternary-fast")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--out", default="out/lora")
    args = parser.parse_args()

    prompts = [prompt.prompt for prompt in scenes.training_prompts()[:: len(scenes.training_prompts()) // 8][:8]]
    seen, unseen = trajectory(prompts, seed=0), trajectory(prompts, seed=1000)

    pipe = few_bit(args.recipe)
    print(f"velocity error before: {error(pipe.transformer, unseen):.3f}")

    torch.manual_seed(0)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"]
    pipe.transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=layers))
    trained = [p for name, p in pipe.transformer.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    for step in range(args.steps):
        inputs, velocity = seen[step % len(seen)]
        loss = torch.nn.functional.mse_loss(pipe.transformer(**inputs)[0], velocity)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"velocity error after:  {error(pipe.transformer, unseen):.3f}")
    pipe.save_lora_weights(args.out, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))

    other = few_bit(args.recipe)
    other.load_lora_weights(args.out, adapter_name="repair")
    print(f"loaded into another:   {error(other.transformer, unseen):.3f}")
    other.set_adapters("repair", 0.5)
    print(f"at half strength:      {error(other.transformer, unseen):.3f}")
    other.delete_adapters("repair")
    print(f"without it again:      {error(other.transformer, unseen):.3f}")


def few_bit(recipe: str):
    pipe = pipelines.load("tiny-flux", dtype=torch.float32)
    bittern.quantize(pipe, recipe)
    return pipe


def trajectory(prompts: list[str], seed: int) -> list[Call]:
    """The 16-bit transformer's inputs and outputs while it draws."""
    pipe, calls = pipelines.load("tiny-flux", dtype=torch.float32), []
    pipe.transformer.register_forward_hook(
        lambda module, args, inputs, output: calls.append((inputs, output[0])), with_kwargs=True
    )
    generate(pipe, prompts, seed=seed, steps=8)
    return calls


@torch.no_grad()
def error(transformer: torch.nn.Module, calls: list[Call]) -> float:
    """Relative error of the velocity."""
    missed = sum((transformer(**inputs)[0] - velocity).square().sum() for inputs, velocity in calls)
    return float((missed / sum(velocity.square().sum() for _, velocity in calls)).sqrt())


if __name__ == "__main__":
    main()
