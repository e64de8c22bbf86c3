"""How low one can go: size against fidelity and scenes score, a row a variant, one model, one reference.

    python benchmarks/how_low.py --model tiny-flux --images 2048 --json benchmarks/results/how_low_tiny_flux.json
    python benchmarks/how_low.py --model tiny-unet --distilled FOLDER --json benchmarks/results/how_low_tiny_unet.json
    python benchmarks/how_low_page.py                        # the table and the plots of docs/how_low.md

Every variant is made few-bit, written to a file whose bytes are counted, and drawn from held-out prompts of the scenes
world. Its pictures are compared with the 16-bit model's from the same noise (PSNR) and judged (GenEval's six tasks),
and so are the paired differences to the 16-bit model's score, with their intervals. What was distilled is judged on
prompts of the training side, too: a score that is much better there would be one learned by heart. Formats that have no
file (int8, two ternary planes) are simulated in 16 bits, and their bytes counted by what they would store.

Finished rows are kept, so that an interrupted run goes on where it stopped. Several processes may share the rows:

    for i in 0 1 2 3; do python benchmarks/how_low.py --share $i 4 --limit-seconds 540 --json part_$i.json & done; wait
    python benchmarks/how_low.py --merge part_?.json --json benchmarks/results/how_low_tiny_flux.json
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from how_low_variants import REFERENCE, Bench, Row, Variant, sized, variants
from quality import commit, compared, environment, put
from torch import nn

from bittern import layers, pipelines
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.evaluation.drawing import path_name, versions
from bittern.evaluation.generate import default_batch_size
from bittern.evaluation.stats import paired_difference
from bittern.evaluation.suites import Score, difference_dict, score_scenes
from bittern.outputs import check_file_out, write_text
from bittern.quantization import component


class OutOfTime(BaseException):
    """The limit of this run; no error of a row, and nothing that catches errors may keep it."""


def judged(score: Score, reference: Score | None) -> Row:
    """A score, by task as well, with the paired differences to another and their intervals."""
    found: Row = {
        "overall": {"mean": score.overall.mean, "stderr": score.overall.stderr},
        "tasks": {task: {"mean": each.mean, "stderr": each.stderr} for task, each in score.tasks.items()},
    }
    if reference is not None:
        mine, theirs = score.outcomes, reference.outcomes
        found["difference"] = difference_dict(paired_difference(mine, theirs))
        for task, row in found["tasks"].items():
            row["difference"] = difference_dict(paired_difference({task: mine[task]}, {task: theirs[task]}))
            row["difference"].pop("claim")
    return shortened(found)


def shortened(value: Any) -> Any:
    """Numbers with the digits that they are worth."""
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measured(bench: Bench, variant: Variant, wanted: dict[str, str]) -> list[tuple[str, Row]]:
    """A variant's rows: built once, drawn on each path."""
    reference, base = bench.reference, bench.score
    put(bench.pipe, bench.dense)
    began = time.perf_counter()
    size = sized(bench, variant.build(bench))
    model = component(bench.pipe)
    size["building_seconds"] = round(time.perf_counter() - began, 1)
    out: list[tuple[str, Row]] = []
    for key, path in wanted.items():
        began = time.perf_counter()
        layers.set_path(model, path)
        # Other batches tell how much of a difference is only that of sums in another order.
        batch = 3 * default_batch_size(bench.pipe, reference[0, 0].numel()) // 4
        images = bench.draw(bench.world, max(1, batch) if model is bench.dense else None)
        row = {
            "variant": variant.name,
            "family": variant.family,
            "path": path_name(layers.paths(model), str(bench.dense.dtype).removeprefix("torch.")),
            **size,
            **compared("psnr", images, reference),
            **judged(score := score_scenes(images, bench.world), base),
            "right": digits(score, bench.world),
        }
        row["psnr_each"] = [round(value, 1) for value in row["psnr_each"]]
        if variant.learned:
            theirs = bench.learned_score
            put(bench.pipe, model)
            row["training"] = {
                **judged(score_scenes(bench.draw(bench.learned), bench.learned), theirs),
                REFERENCE: judged(theirs, None),
            }
        if variant.stamp:
            row["sha256"] = variant.stamp
        row |= {"drawing_seconds": round(time.perf_counter() - began, 1), "commit": bench.args.commit}
        row["reference"] = bench.digest
        out.append((key, row))
    return out


def digits(score: Score, world: list[scenes.ScenePrompt]) -> str:
    """Whether each picture is right, in the order of the prompts."""
    outcomes = {task: iter(each) for task, each in score.outcomes.items()}
    return "".join(str(int(next(outcomes[prompt.tag]))) for prompt in world)


def run(args: argparse.Namespace) -> tuple[Row, list[str]]:
    """Measures every row that is wanted and not in `args.json` yet.

    Returns:
        The record, and the variants that failed.

    Raises:
        UserError: for a name that no row has, or a file with rows of something else.
    """
    check_file_out(args.json, "--json")
    bench = Bench(args)
    record = started(args, bench)
    rows: dict[str, Row] = record["rows"]
    if REFERENCE not in rows:
        size = {"bits_per_weight": 16.0, "file_bytes": bench.file_bytes, "written": True}
        right = {"right": digits(bench.score, bench.world), "commit": args.commit}
        rows[REFERENCE] = {"variant": REFERENCE, "family": REFERENCE, **size, **judged(bench.score, None), **right}
        keep(record, args.json)
    failed: list[str] = []
    for variant in chosen(args, bench):
        wanted = {key: path for key, path in variant.keys().items() if stale(rows.get(key), variant)}
        if not wanted:
            continue
        try:
            found = measured(bench, variant, wanted)
        except UserError:
            raise
        except Exception:
            # Device time is dear: one variant that fails must not take those after it along.
            traceback.print_exc()
            failed.append(variant.name)
            continue
        finally:
            put(bench.pipe, bench.dense)
            gc.collect()
        for key, row in found:
            rows[key] = row
            said = f"{row['bits_per_weight']:.2f} bits, {row['psnr']:.2f} dB, score {row['overall']['mean']:.3f}"
            print(f"{key} ({row['path']}): {said}, {row['drawing_seconds']} s", file=sys.stderr, flush=True)
        keep(record, args.json)
    return record, failed


def stale(row: Row | None, variant: Variant) -> bool:
    return row is None or row.get("sha256") != variant.stamp


def all_of(args: argparse.Namespace, bench: Bench) -> list[Variant]:
    convolutions = any(isinstance(bench.dense.get_submodule(path), nn.Conv2d) for path in bench.targets)
    return variants(args.model, args.distilled, convolutions)


def chosen(args: argparse.Namespace, bench: Bench) -> list[Variant]:
    """This process's part of the variants that were asked for."""
    every = all_of(args, bench)
    fit = [variant for variant in every if any(part in variant.name for part in args.only)]
    if not fit:
        names = ", ".join(variant.name for variant in every)
        raise UserError(f"--only {' '.join(args.only)} is in no row's name: expected parts of some of {names}")
    index, count = args.share
    return fit[index::count]


def started(args: argparse.Namespace, bench: Bench) -> Row:
    """The record to go on with: the file's, if it is of the same model, prompts and machine."""
    place = environment(bench.pipe, args) | versions() | {"samples": bench.base.samples}
    del place["commit"]  # rows have their own
    record: Row = {"command": " ".join(["python", *sys.argv]), "environment": place, "rows": {}}
    if args.json.exists():
        old = read(args.json)
        refuse_others(old["environment"], place, args.json)
        record["rows"] = old["rows"]
    return record


def read(file: Path) -> Row:
    record = pipelines.read_json(file)
    if not record.keys() >= {"environment", "rows"}:
        raise UserError(f"{file} is not of this script: expected a record with rows")
    return record


def refuse_others(old: Row, place: Row, file: Path) -> None:
    """Refuses rows of another model, machine or number of prompts beside these."""
    other = [f"{key} {old.get(key)} there, {value} here" for key, value in place.items() if old.get(key) != value]
    if other:
        raise UserError(f"{file} holds rows of another run ({'; '.join(other)}): choose another file, or remove it")


def merge(files: list[Path], out: Path) -> Row:
    """One record of several; rows of later files win.

    Raises:
        UserError: for files of different runs.
    """
    records = [read(file) for file in files]
    merged = records[0]
    for file, record in zip(files[1:], records[1:], strict=True):
        refuse_others(record["environment"], merged["environment"], file)
        merged["rows"] |= record["rows"]
    keep(merged, out)
    return merged


def keep(record: Row, out: Path) -> None:
    """Writes what is finished, a line a row, from many bits to few."""
    order = sorted(record["rows"].items(), key=lambda item: (-item[1]["bits_per_weight"], item[0]))
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in order)
    write_text(f'{head[:-2]},\n "rows": {{\n{rows}\n }}\n}}\n', out, "rows")


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Ends the block after so many seconds of this process."""

    def end(_signal: int, _frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    # Imports take their time, too.
    gone = time.time() - psutil.Process().create_time()
    signal.setitimer(signal.ITIMER_REAL, 0 if seconds is None else max(0.001, seconds - gone))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    args.commit = commit() if args.commit is None else args.commit
    try:
        if args.merge:
            print(f"{args.json}: {len(merge(args.merge, args.json)['rows'])} rows")
            return
        with limited(args.limit_seconds):
            _, failed = run(args)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    except OutOfTime:
        parser.exit(3, f"{args.limit_seconds} s are over: finished rows are in {args.json}; the same command goes on\n")
    if failed:
        parser.exit(1, f"no row for {', '.join(failed)}: see above\n")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-flux")
    parser.add_argument("--images", type=int, default=2048, help="held-out prompts; as many training prompts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--samples", type=int, default=None, help="to calibrate with; by default the recipe's number")
    parser.add_argument("--samples-file", type=Path, help="a file that keeps the samples; read where it exists")
    parser.add_argument("--distilled", type=Path, metavar="FOLDER", help="the distilled model, whole or its denoiser")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="rows whose name contains one of these")
    parser.add_argument("--share", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every n-th variant")
    parser.add_argument("--limit-seconds", type=float, help="stop after these; finished rows are kept, exit code 3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=_dtype, help="bfloat16, float32; by default what the model is stored in")
    parser.add_argument("--commit", help="where git does not tell it")
    parser.add_argument("--json", type=Path, required=True, help="where rows are kept")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="join these files in --json and stop")
    return parser


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype of torch")
    return found


if __name__ == "__main__":
    main()
