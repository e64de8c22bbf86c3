"""Speed beside other libraries: one process, one timing loop, the same layers, random weights at FLUX.1-dev's shape.

    python benchmarks/peers_speed.py --compile --json benchmarks/results/peers_speed_h100.json
    python benchmarks/peers_speed.py --table benchmarks/results/peers_speed_h100.json
    python benchmarks/peers_speed.py --mini --device cpu

Every library quantizes the layers that our plan names, and no others, through its public interface (`peers.py`), one
layer after the other, so that 16-bit weights are never there as a whole. Its blocks may compile with graph breaks; ours
and those in 16 bits may not. Ratios are to 16 bits in the same process: with `--only` 16 bits are timed anew.

Rows are kept in the file as they are finished, and others that are there already stay. A library that is not there, or
fails, has a row with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peers
import torch
from quality import commit, keep
from torch import nn

from bittern import recipes
from bittern.architectures import plan
from bittern.errors import UserError
from bittern.evaluation.cost import models, random_weights
from bittern.evaluation.cost.benchmark import How, Row, measure, place, weight_bytes
from bittern.evaluation.cost.inputs import inputs
from bittern.evaluation.cost.timing import Ratio
from bittern.layers import swap

RESULT = Path("benchmarks/results/peers_speed.json")
BASE = "bf16"
OURS = ("svdquant-fast", "ternary-fast")
LARGEST_SHARE = 0.75
"""Of the bytes in 16 bits. A library whose model is larger has passed most layers by."""


@dataclass(frozen=True)
class Method:
    """Something that is timed.

    Attributes:
        name: What the table calls it.
        kind: "16 bit", "ours" or "peer".
        build: Makes the model on a device.
        library: Whose it is, for a peer.
    """

    name: str
    kind: str
    build: Callable[[models.Subject, str], nn.Module]
    library: str | None = None


def methods(settings: list[peers.Setting] | None = None) -> list[Method]:
    """All rows, 16 bits first."""
    ours = [Method(recipe, "ours", _ours(recipe)) for recipe in OURS]
    theirs = [Method(s.name, "peer", by_peer(s), s.library) for s in settings or peers.fastest()]
    return [
        Method(BASE, "16 bit", lambda what, device: random_weights.dense(what, device, torch.bfloat16)),
        *ours,
        *theirs,
    ]


def _ours(recipe: str) -> Callable[[models.Subject, str], nn.Module]:
    return lambda what, device: random_weights.few_bit(what, recipe, device, torch.bfloat16)


def by_peer(setting: peers.Setting) -> Callable[[models.Subject, str], nn.Module]:
    """The model with another library's layers in the places of our plan's."""

    def build(what: models.Subject, device: str) -> nn.Module:
        model = random_weights.skeleton(what, torch.bfloat16)
        jobs = plan(model, recipes.load("int4")).jobs
        for path in (path for job in jobs for path in job.paths):
            linear: Any = model.get_submodule(path)
            random_weights.fill(linear, device)
            # Some libraries print.
            with contextlib.redirect_stdout(sys.stderr):
                layer, _ = setting.make(linear, peers.fitting_group(linear.in_features, setting.group))
            swap(model, path, layer)
        random_weights.fill(model, device)
        return model.requires_grad_(False)

    return build


def run(args: argparse.Namespace, chosen: list[Method]) -> Row:
    """Every method's rows, kept as they are finished."""
    what = models.subject("flux.1-dev", mini=args.mini)
    size = args.size or what.size
    how = How(
        size=size, steps=args.steps, runs=args.runs, compile=args.compile, graph=args.graph,
        attention=args.attention, device=args.device, compiler=args.compiler,
    )  # fmt: skip
    how.check()
    record = read(args.json)
    libraries = sorted({method.library for method in methods() if method.library})
    record |= {
        "command": " ".join(["python", *sys.argv]), "commit": commit(), "model": what.name, "mini": args.mini,
        "size": size, "steps": how.steps, "runs": how.runs, **place(how.device),
        "peers": {library: peers.installed(library) for library in libraries},
    }  # fmt: skip
    base: dict[str, Row] = {}
    for method in chosen:
        record["rows"] = {key: row for key, row in record["rows"].items() if row["model"] != method.name}
        for row in measured(method, what, how):
            if method.kind == "16 bit":
                base[row["mode"]] = row
            found = compared(row, base)
            record["rows"][f"{row['model']} [{row['mode']}]"] = found
            keep(record, args.json)
            print({name: value for name, value in found.items() if name != "ms_runs"}, file=sys.stderr, flush=True)
    return record


def compared(row: Row, base: dict[str, Row]) -> Row:
    """A row with how many times faster it is than 16 bits run the same way, and how many times smaller."""
    against = base.get(row["mode"])
    if against is None or "ms" not in row or row["kind"] == "16 bit":
        return row
    return row | {
        "times_faster": Ratio.of(against["ms_runs"], row["ms_runs"]).to_dict(),
        "times_smaller": round(against["resident_gib"] / row["resident_gib"], 3),
    }


def measured(method: Method, what: models.Subject, how: How) -> Iterator[Row]:
    """A method's rows; for a peer that does not run, one that says why."""
    kind = {"kind": method.kind, "library": method.library}
    if method.library and peers.installed(method.library) is None:
        yield {"model": method.name, "mode": "eager", **kind, "reason": f"{method.library} is not installed"}
        return
    peer, done = method.kind == "peer", 0
    try:
        rows = measure(
            method.name,
            lambda: small(method, what, how.device),
            lambda model: inputs(model, what, how.size or what.size, how.batch, how.device, torch.bfloat16),
            replace(how, fullgraph=not peer),
        )
        for row in rows:
            done += 1
            yield row | kind
    except Exception as error:
        # Libraries raise all kinds. What is ours must not fail.
        if not peer:
            raise
        said = next(iter(str(error).splitlines()), "")
        reason = f"{type(error).__name__}: {said}"[:200]
        yield {"model": method.name, "mode": _ways(how)[done], **kind, "reason": reason}


def small(method: Method, what: models.Subject, device: str) -> nn.Module:
    """A method's model; one of a library that is not small is refused."""
    model = method.build(what, device)
    if method.kind == "peer":
        whole = random_weights.skeleton(what, torch.bfloat16)
        share = weight_bytes(model) / sum(parameter.nbytes for parameter in whole.parameters())
        if share > LARGEST_SHARE:
            raise RuntimeError(f"leaves layers in 16 bits: its model has {share:.0%} of their bytes")
    return model


def _ways(how: How) -> list[str]:
    """The modes in the order in which they are measured."""
    plain = ["eager", *(["compiled"] if how.compile else [])]
    return [way for mode in plain for way in (mode, *([f"{mode} graph"] if how.graph else []))]


def read(file: Path | None) -> Row:
    """What is kept already; rows only."""
    kept = json.loads(file.read_text()) if file and file.exists() else {}
    return {"rows": kept.get("rows", {})}


def select(only: list[str] | None, of: list[Method]) -> list[Method]:
    """16 bits, and the methods whose names contain one of some texts.

    Raises:
        UserError: if there is none.
    """
    names = [method.name for method in of]
    for part in only or ():
        if not any(part in name for name in names):
            raise UserError(f"--only {part!r}: expected a part of one of {', '.join(names)}")
    return [m for m in of if only is None or m.kind == "16 bit" or any(part in m.name for part in only)]


def table(record: Row) -> str:
    """The rows as Markdown, fastest first in each mode."""
    versions = record["versions"]
    lines = [
        f"{record['model']}{', miniature' * record['mini']}, {record['size']}x{record['size']}, {record['device']}, "
        f"torch {versions['torch']}, Triton {versions['triton']}, commit {record['commit']}; "
        + ", ".join(f"{name} {found or 'not installed'}" for name, found in record["peers"].items())
        + ".\n",
        "| whose | method | run | ms a step | spread | times faster than 16 bit | weights GiB | above them GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = list(record["rows"].values())
    for row in sorted((row for row in rows if "ms" in row), key=lambda row: (row["mode"], row["ms"])):
        ratio = row.get("times_faster")
        told = "" if ratio is None else ratio["ratio"] or f"not told ({ratio['low']} to {ratio['high']})"
        name = f"**{row['model']}**" if row["kind"] == "ours" else row["model"]
        peak = row["peak_above_resident_gib"]
        lines.append(
            f"| {row['kind']} | {name} | {row['mode']} | {row['ms']:.2f} | {100 * row['spread']:.1f} % | {told} "
            f"| {row['resident_gib']:.3f} | {'' if peak is None else peak} |"
        )
    lines += [
        f"| {row['kind']} | {row['model']} | {row['mode']} | {row['reason']} | | | | |"
        for row in rows
        if "reason" in row
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, nargs="?", const=RESULT)
    made.add_argument("--table", type=Path)
    made.add_argument("--only", nargs="+", help="Parts of the names of methods; 16 bits are timed in any case.")
    made.add_argument("--mini", action="store_true")
    made.add_argument("--size", type=int)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--runs", type=int, default=3)
    made.add_argument("--compile", action="store_true")
    made.add_argument("--graph", action="store_true")
    made.add_argument("--attention")
    made.add_argument("--compiler", default="inductor")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main() -> None:
    args = parser().parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    try:
        print(table(run(args, select(args.only, methods()))))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
