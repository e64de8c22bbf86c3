"""Writes the tables and plots of docs/how_low.md, and one of docs/quality.md, from what how_low.py measured.

python benchmarks/how_low_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from how_low_plot import Panel, Point, picture
from how_low_variants import REFERENCE
from quality import gain_over

from bittern.evaluation.scenes import TASKS
from bittern.outputs import write_text

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
MODELS = ("tiny-flux", "tiny-unet")
AIM = {"tiny-flux": 0.97, "tiny-unet": 0.95}
"""The share of the 16-bit score that ternary weights are to keep."""
ENOUGH = 1000
"""Pictures from which on a table is a result."""
NOISE, ROUNDING = "16 bit, other batches", "absmean rounding"
FOUR_BITS = {
    "tiny-flux": ("quality_tiny_flux.json", "W4A4 abs-max [a4]"),
    "tiny-unet": ("ablation_tiny_unet_256.json", "W4A4 abs-max"),
}
"""Where plain rounding of weights and activations was measured, on the first of the same prompts."""


def records() -> dict[str, Row]:
    """What was measured, by model."""
    files = {model: ROOT / f"benchmarks/results/how_low_{model.replace('-', '_')}.json" for model in MODELS}
    return {model: json.loads(file.read_text()) for model, file in files.items() if file.exists()}


def pages(found: dict[str, Row]) -> dict[Path, str]:
    """The text of every file that is made."""
    docs = ROOT / "docs"
    return {
        docs / "how_low_table.md": "".join(f"{line}\n" for record in found.values() for line in tables(record)),
        docs / "ranks_table.md": "".join(f"{line}\n" for line in ranks(found)),
        docs / "images/how_low_psnr.svg": picture(
            "Size against fidelity", "PSNR to the 16-bit pictures, dB", [fidelities(each) for each in found.values()]
        ),
        docs / "images/how_low_score.svg": picture(
            "Size against score", "scenes score", [scores(each) for each in found.values()]
        ),
    }


def tables(record: Row) -> Iterator[str]:
    """A model's heading, what its pictures are, and two tables."""
    place, rows = record["environment"], record["rows"]
    commits = ", ".join(sorted({row["commit"] for row in rows.values()} - {""})) or "unknown"
    yield f"### {place['model']}\n"
    if place["images"] < ENOUGH:
        yield (
            f"**A rehearsal: {place['images']} pictures, calibrated on {place['samples']} samples. It shows "
            "the form of the table, and no number of it tells anything.**\n"
        )
    yield (
        f"{place['images']} held-out prompts, {place['steps']} steps, calibrated on {place['samples']} samples, "
        f"{place['dtype'].removeprefix('torch.')}, {place['device']}, torch {place['torch']}, diffusers "
        f"{place['diffusers']}, commit {commits}.\n"
    )
    if len({row["reference"] for row in rows.values() if "reference" in row}) > 1:
        yield "Processes drew the 16-bit pictures apart by a rounding: each row is compared with its own process's.\n"
    yield "| stored as | arithmetic | bits per weight | file MB | PSNR dB | score | kept | difference, 95 % interval |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        psnr = f"{row['psnr']:.2f} ± {row['psnr_stderr']:.2f}" if "psnr" in row else ""
        yield (
            f"| {_stored(name, row)} | {row.get('path', '')} | {row['bits_per_weight']:.2f} | {_megabytes(row)} "
            f"| {psnr} | {_score(row['overall'])} | {_kept(row, rows)} | {_difference(row)} |"
        )
    yield ""
    yield from _recovered(rows)
    yield from _warnings(rows)
    tasks = " | ".join(task.replace("_", " ") for task in TASKS)
    yield f"| {place['model']}: score by task, interval of the difference | {tasks} |"
    yield f"|---|{'---|' * len(TASKS)}"
    for name, row in rows.items():
        cells = [_task(row["tasks"][task]) if task in row["tasks"] else "" for task in TASKS]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def ranks(found: dict[str, Row]) -> Iterator[str]:
    """What branches gain over plain rounding to four bits, with exact 4-bit activations, picture by picture."""
    yield "| model | stored as | bits per weight | PSNR dB | gain over rounding dB | score, difference, 95 % interval |"
    yield "|---|---|---|---|---|---|"
    for model, record in found.items():
        file, name = FOUR_BITS[model]
        rounded = json.loads((ROOT / "benchmarks/results" / file).read_text())["rows"][name]
        count = len(rounded["psnr_each"])
        for name, row in record["rows"].items():
            if not name.endswith("[a4]"):
                continue
            same = {"psnr_each": row["psnr_each"][:count]}
            gain = gain_over(same, rounded) if len(same["psnr_each"]) == count else ""
            yield (
                f"| {model} | {name.removesuffix(' [a4]')} | {row['bits_per_weight']:.2f} | {row['psnr']:.2f} ± "
                f"{row['psnr_stderr']:.2f} | {gain} | {_score(row['overall'])}, {_difference(row)} |"
            )


def _recovered(rows: dict[str, Row]) -> Iterator[str]:
    """What the recipes make good of that which plain rounding loses."""
    rounding, whole = rows.get(ROUNDING), rows[REFERENCE]["overall"]["mean"]
    if rounding is None:
        return
    lost = whole - rounding["overall"]["mean"]
    for name in ("ternary-fast", "ternary", "ternary-distilled"):
        if name in rows:
            back = rows[name]["overall"]["mean"] - rounding["overall"]["mean"]
            share = f"; of the score that rounding loses {100 * back / lost:.0f} % is back" if lost > 0 else ""
            yield f"- {name} over {ROUNDING}: {gain_over(rows[name], rounding)} dB, picture by picture{share}."
    yield ""


def _warnings(rows: dict[str, Row]) -> Iterator[str]:
    """What was trained, on prompts that it has learned."""
    for name, row in rows.items():
        if "training" in row:
            seen = row["training"]
            yield (
                f"{name} on prompts of the training side: {_score(seen['overall'])}, where 16 bits have "
                f"{_score(seen[REFERENCE]['overall'])}; difference {_difference(seen)}. On held-out prompts: "
                f"{_score(row['overall'])} and {_score(rows[REFERENCE]['overall'])}; {_difference(row)}.\n"
            )


def _stored(name: str, row: Row) -> str:
    share = row.get("ternary_share_blocks", 0)
    return f"{name} ({100 * share:.0f} % ternary)" if 0 < share < 0.99 else name


def _megabytes(row: Row) -> str:
    # What has no format is worked out.
    return f"{row['file_bytes'] / 1e6:.2f}" + ("" if row["written"] else " (no format)")


def _score(score: Row) -> str:
    return f"{score['mean']:.3f} ± {score['stderr']:.3f}"


def _kept(row: Row, rows: dict[str, Row]) -> str:
    whole = rows[REFERENCE]["overall"]["mean"]
    return f"{100 * row['overall']['mean'] / whole:.1f} %" if whole else ""


def _difference(row: Row) -> str:
    found = row.get("difference")
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})" if found else ""


def _task(task: Row) -> str:
    found = task.get("difference")
    return f"{task['mean']:.3f}" + (f" ({found['low']:+.3f} to {found['high']:+.3f})" if found else "")


def fidelities(record: Row) -> Panel:
    """PSNR over bits per weight."""
    rows = record["rows"]
    noise = rows.get(NOISE)
    lines = {"16 bit, drawn in other batches": noise["psnr"]} if noise and noise["psnr"] < 60 else {}
    return Panel(_title(record), _points(rows, lambda row: (row["psnr"], row["psnr_stderr"])), lines)


def scores(record: Row) -> Panel:
    """Scenes score over bits per weight."""
    rows, aim = record["rows"], AIM[record["environment"]["model"]]
    whole = rows[REFERENCE]["overall"]["mean"]
    lines = {"16 bit": whole, f"{100 * aim:.0f} % of it": aim * whole}
    return Panel(_title(record), _points(rows, lambda row: tuple(row["overall"].values())), lines)


def _title(record: Row) -> str:
    place = record["environment"]
    said = f"{place['model']}, {place['images']} pictures"
    return said if place["images"] >= ENOUGH else f"{said}: a rehearsal"


def _points(rows: dict[str, Row], height: Any) -> list[Point]:
    return [
        Point(name, _label(name, row), row["family"], row["bits_per_weight"], *height(row), not name.endswith("[a4]"))
        for name, row in rows.items()
        if "psnr" in row and name != NOISE
    ]


def _label(name: str, row: Row) -> str:
    """A name without what the colour says."""
    return name.removeprefix(f"{row['family']}, ").replace("groups of ", "g")


def main() -> None:
    for file, text in pages(records()).items():
        write_text(text, file, "page")
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
