"""Fidelity beside other libraries: same model, same prompts, same noise, one run, bits per weight in every row.

    python benchmarks/peers_quality.py --model tiny-flux --out benchmarks/results/peers_tiny_flux.json
    python benchmarks/peers_quality.py --table benchmarks/results/peers_tiny_flux.json > docs/peers_table.md

Every method quantizes the layers that our plan names, and no others, and is drawn from the same noise; pictures are
compared with those of the model in 16 bits. Bits per weight count all that is stored for those layers: codes, scales,
zero points, smoothing, branches. What other libraries make of a weight is worked out once and drawn as a plain product
(`peers.py` says why, and checks it for every layer). A convolution goes to them as the matrix that our plan makes of
it. A library that is not there, or fails, has its row with the reason. Rows of kind "rounding" are not methods but a
measure: plain rounding to 5, 6 and 8 bits, simulated, so that a branch that costs bits is compared with those bits.

Finished rows are kept in a JSON file, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import peers
import torch
from ablation import quantized, samples_of
from quality import ROUNDING, Trajectory, environment, fill, gain_over, keep, put, round_as_published
from torch import Tensor, nn

from bittern import layers, pipelines, recipes
from bittern.architectures import plan
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.evaluation.drawing import path_name
from bittern.evaluation.fidelity import fidelity
from bittern.evaluation.generate import generate
from bittern.layers import flat_weight
from bittern.quantization import component
from bittern.trajectories import State

SMALL_BITS = 4.5
"""Where peers are compared; as tables round it."""

GROUP = 64
PLAIN: dict[str, Any] = {"rank": 0, "rounds": 0, "smoothing": "none", "shift": 0.0}
NO_BRANCH: dict[str, Any] = {"default": PLAIN, "modulation": {"scales": "search"}}
ABSMAX: dict[str, Any] = {"default": PLAIN | {"scales": "absmax"}, "modulation": {"scales": "absmax"}}
RANKS = (32, 16, "1/96")

Row = dict[str, Any]


class Bench:
    """The model in 16 bits, what it draws, and what calibrated recipes need to know of it."""

    def __init__(self, args: argparse.Namespace):
        self.pipe: Any = pipelines.load(args.model, dtype=args.dtype, device=args.device)
        self.dense = component(self.pipe)
        self.steps = args.steps
        self.base = recipes.load("svdquant")
        if args.samples:
            self.base = self.base.override(samples=args.samples)
        self.texts = [prompt.prompt for prompt in scenes.held_out(args.images)]
        jobs = plan(self.dense, recipes.load("int4")).jobs
        self.targets = [path for job in jobs for path in job.paths]

    @cached_property
    def states(self) -> list[State]:
        """The samples that all calibrated rows are solved with; no held-out prompt among the pipeline's own."""
        put(self.pipe, self.dense)
        return samples_of(self.pipe, self.dense, self.base, None)

    @cached_property
    def reference(self) -> Tensor:
        put(self.pipe, self.dense)
        return generate(self.pipe, self.texts, steps=self.steps)

    @cached_property
    def trajectory(self) -> Trajectory:
        put(self.pipe, self.dense)
        return Trajectory(self.pipe, self.texts[:12], self.steps)


@dataclass(frozen=True)
class Method:
    """Something that makes a model's targets smaller.

    Attributes:
        name: What the table calls it.
        kind: "ours", "peer" or "rounding".
        build: Puts a small model into the pipeline; says how many bits a weight takes, and what else is worth keeping.
        paths: Arithmetic to draw it on, a row each; for ours alone.
        library: Whose it is, for a peer.
    """

    name: str
    kind: str
    build: Callable[[Bench], Row]
    paths: tuple[str, ...] = ("a16",)
    library: str | None = None

    def key(self, path: str) -> str:
        return f"{self.name} [{path}]" if self.kind == "ours" else self.name


def methods() -> list[Method]:
    """All rows; what is calibrated comes last, because it takes the longest to begin."""
    out = [
        Method("int4 abs-max", "ours", ours("int4", {"default": {"scales": "absmax"}})),
        Method("int4", "ours", ours("int4", {})),
        Method(ROUNDING, "ours", ours("svdquant-fast", ABSMAX), ("a4",)),
        Method("W4A4 searched scales", "ours", ours("svdquant-fast", NO_BRANCH), ("a4",)),
        Method("ternary-fast", "ours", ours("ternary-fast", {}), ("auto",)),
    ]
    out += [Method(setting.name, "peer", by_peer(setting), library=setting.library) for setting in peers.settings()]
    out += [Method(f"int{bits} abs-max", "rounding", by_rounding(bits)) for bits in (5, 6, 8)]
    for recipe in ("svdquant-fast", "svdquant"):
        for rank in RANKS:
            build = ours(recipe, {"default": {"rank": rank}})
            out.append(Method(f"{recipe} rank {rank}", "ours", build, ("a16", "a4")))
    # Solved for the activations that it is drawn with: there is no outlier to smooth away.
    weights_only = {"rank": "1/96", "activations": 16, "smoothing": "none"}
    out += [
        Method("svdquant W4A16 rank 1/96", "ours", ours("svdquant", {"default": weights_only})),
        Method("int4-gptq", "ours", ours("int4-gptq", {})),
        Method("int4-gptq, groups of 32", "ours", ours("int4-gptq", {"default": {"group_size": 32}})),
    ]
    return out


def ours(name: str, changes: dict[str, Any]) -> Callable[[Bench], Row]:
    """A recipe with changes."""

    def build(bench: Bench) -> Row:
        recipe = recipes.load(name).override(**changes)
        states = bench.states if recipe.calibrated else []
        model = copy.deepcopy(bench.dense)
        put(bench.pipe, model)
        return {"bits_per_weight": quantized(bench.pipe, model, recipe, states)[0]}

    return build


def by_peer(setting: peers.Setting) -> Callable[[Bench], Row]:
    """Another library's weights in place of the model's."""

    def build(bench: Bench) -> Row:
        worst = 0.0

        def change(weight: Tensor) -> tuple[Tensor, float]:
            nonlocal worst
            found, stored, apart = peers.effective(setting, weight)
            worst = max(worst, apart)
            return found, stored

        bits = replace_weights(bench, change)
        return {"bits_per_weight": bits, "own_forward_apart": float(f"{worst:.2g}")}

    return build


def by_rounding(bits: int) -> Callable[[Bench], Row]:
    """Plain rounding, simulated."""

    def build(bench: Bench) -> Row:
        return {"bits_per_weight": replace_weights(bench, lambda weight: rounded(weight, bits))}

    return build


@torch.no_grad()
def replace_weights(bench: Bench, change: Callable[[Tensor], tuple[Tensor, float]]) -> float:
    """Changes the weight of every target of a copy of the model, as a matrix; the bits per weight."""
    model = copy.deepcopy(bench.dense)
    stored = weights = 0.0
    for path in bench.targets:
        module = model.get_submodule(path)
        flat = flat_weight(module).contiguous()
        found, size = change(flat)
        stored, weights = stored + size, weights + flat.numel()
        fill(module, found)
    put(bench.pipe, model)
    return 8 * stored / weights


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    """A weight [n, k] after symmetric rounding in groups of 64 with a bfloat16 scale, and its bytes."""
    n, k = weight.shape
    top = 2 ** (bits - 1) - 1
    groups = nn.functional.pad(weight.float(), (0, -k % GROUP)).unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / top).bfloat16().float()
    codes = torch.where(scale == 0, 0.0, groups / scale).round().clamp(-top, top)
    found = (codes * scale).flatten(1)[:, :k].to(weight.dtype)
    return found, n * k * bits / 8 + 2.0 * scale.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux", help="whatever bittern.pipelines.load takes")
    parser.add_argument("--limit", dest="images", type=int, default=256, help="held-out prompts to draw (256)")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=None, help="to calibrate with; by default the recipe's number")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--json", action="store_true", help="print the record, not the table")
    parser.add_argument("--out", type=Path, help="where rows are kept; by default out/peers_MODEL.json")
    parser.add_argument("--table", type=Path, help="print the Markdown table of a finished run and stop")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    args.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(args.dtype)
    args.out = args.out or Path("out") / f"peers_{re.sub(r'[^A-Za-z0-9]+', '_', args.model).strip('_')}.json"
    try:
        record = run(args)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(record, indent=1) if args.json else table(record))


def run(args: argparse.Namespace) -> Row:
    """Measures every row that is not in `args.out` yet.

    Raises:
        UserError: for a model that cannot be loaded, no prompts, or a name that no row has.
    """
    chosen = [method for method in methods() if args.only in method.name]
    if not chosen:
        raise UserError(f"--only {args.only!r} is in no row's name: expected a part of one such as 'int4-gptq'")
    if args.images < 1:
        raise UserError(f"--limit {args.images}: expected at least one prompt")
    bench = Bench(args)
    libraries = sorted({setting.library for setting in peers.settings()})
    there = {library: peers.installed(library) for library in libraries}
    wanted = {method.library for method in chosen}
    if absent := [library for library in libraries if library in wanted and there[library] is None]:
        said = f'not installed, so not compared with: {", ".join(absent)}; pip install -e ".[peers]" brings them'
        print(said, file=sys.stderr, flush=True)
    record: Row = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(bench.pipe, args)
        | {
            "samples": bench.base.samples,
            "targets": len(bench.targets),
            "peers": there,
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.exists():
        old = json.loads(args.out.read_text())
        if old["environment"] == record["environment"]:
            record = old
    rows: dict[str, Row] = record.setdefault("rows", {})
    for method in chosen:
        keys = {method.key(path): path for path in method.paths}
        if all(key in rows for key in keys):
            continue
        for key, row in measured(bench, method, keys):
            rows[key] = row
            record["summary"] = summary(rows)
            keep(record, args.out)
            said = {name: value for name, value in row.items() if name != "psnr_each"}
            print(key, said, file=sys.stderr, flush=True)
    return record


def measured(bench: Bench, method: Method, keys: dict[str, str]) -> list[tuple[str, Row]]:
    """A method's rows, one a path; for a peer that does not run one that says why."""
    if method.library and peers.installed(method.library) is None:
        return [(key, {"kind": "peer", "reason": f"{method.library} is not installed"}) for key in keys]
    try:
        return drawn(bench, method, keys)
    except Exception as error:
        # Libraries raise all kinds. What is ours must not fail.
        if method.kind != "peer":
            raise
        said = next(iter(str(error).splitlines()), "")
        return [(key, {"kind": "peer", "reason": f"{type(error).__name__}: {said}"[:200]}) for key in keys]


def drawn(bench: Bench, method: Method, keys: dict[str, str]) -> list[tuple[str, Row]]:
    """Builds the model once, and draws it on each path."""
    reference, trajectory = bench.reference, bench.trajectory
    built = method.build(bench)
    built["bits_per_weight"] = round(built["bits_per_weight"], 3)
    model = component(bench.pipe)
    out: list[tuple[str, Row]] = []
    for key, path in keys.items():
        if method.name == ROUNDING:
            round_as_published(model)
        elif method.kind == "ours":
            layers.set_path(model, path)
        found = fidelity(generate(bench.pipe, bench.texts, steps=bench.steps), reference, borders="inside")
        row = {
            "kind": method.kind,
            "path": path_name(layers.paths(model), "a16"),
            **built,
            "psnr": round(found.mean_psnr.mean, 2),
            "psnr_stderr": found.mean_psnr.stderr and round(found.mean_psnr.stderr, 2),
            "psnr_each": [round(value, 2) for value in found.psnr],
            "ssim": round(found.mean_ssim.mean, 4),
            "velocity_error": round(trajectory.error(model), 4),
        }
        out.append((key, row))
    return out


def small(row: Row) -> bool:
    """Whether a row counts at 4.5 bits and less."""
    return "psnr" in row and round(row["bits_per_weight"], 2) <= SMALL_BITS


def best(rows: dict[str, Row], kind: str, four_bit_activations: bool = False) -> str | None:
    """The row of highest PSNR at 4.5 bits and less, among those that keep 16-bit activations or those that do not."""
    fit = [
        key
        for key, row in rows.items()
        if small(row)
        and row["kind"] == kind
        # The adaLN linears keep theirs in any case: "a4+a16".
        and ("a4" in row["path"].split("+") if four_bit_activations else row["path"] == "a16")
    ]
    return max(fit, key=lambda key: rows[key]["psnr"], default=None)


def summary(rows: dict[str, Row]) -> Row:
    """The best of ours and of the peers at 4.5 bits and less, and how far apart they are, picture by picture."""
    peer, found = best(rows, "peer"), best(rows, "ours")
    out: Row = {"best W4A16 peer": peer, "best W4A16 of ours": found}
    if peer:
        for name, key in (("W4A16", found), ("W4A4", best(rows, "ours", four_bit_activations=True))):
            out[f"our {name} over the best peer, dB"] = f"{gain_over(rows[key], rows[peer])} ({key})" if key else None
    return out


def table(record: Row) -> str:
    """The rows as Markdown, from few bits to many; the gain is paired, picture by picture, with its standard error."""
    rows: dict[str, Row] = record["rows"]
    peer = best(rows, "peer")
    place = record["environment"]
    lines = [
        f"{place['model']}, {place['images']} held-out prompts, {place['steps']} steps, {place['dtype']}, "
        f"{place['device']}, torch {place['torch']}, commit {place['commit']}; "
        + ", ".join(f"{name} {found or 'not installed'}" for name, found in place["peers"].items())
        + ".\n",
        "| whose | method | activations | bits per weight | PSNR dB | over the best peer dB | SSIM | velocity error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {key: row for key, row in rows.items() if "psnr" in row}
    for key, row in sorted(found.items(), key=lambda item: (item[1]["bits_per_weight"], item[1]["psnr"])):
        gain = gain_over(row, rows[peer]) if peer and key != peer else ""
        name = f"**{key.partition(' [')[0]}**" if row["kind"] == "ours" else key
        lines.append(
            f"| {row['kind']} | {name} | {row['path']} | {row['bits_per_weight']:.2f} | {row['psnr']:.2f} ± "
            f"{row['psnr_stderr']:.2f} | {gain} | {row['ssim']:.3f} | {row['velocity_error']:.4f} |"
        )
    lines += [f"| {row['kind']} | {key} | | | {row['reason']} | | | |" for key, row in rows.items() if "reason" in row]
    lines += ["", *(f"- {name}: {found}" for name, found in record.get("summary", {}).items())]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
