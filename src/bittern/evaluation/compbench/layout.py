"""T2I-CompBench's folders: `color/samples/a green bench and a blue bowl_000000.png`, and its `vqa_result.json`.

The official scorers take one category at a time and want its pictures in `samples/`: so every category has a folder of
its own, in which they run as it is. A picture's number is its prompt's times the pictures of a prompt, plus its own.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bittern.errors import UserError
from bittern.evaluation.compbench.prompts import CATEGORIES, Request, index_of, request_of
from bittern.evaluation.runs.folder import RESULTS, Picture
from bittern.evaluation.runs.judging import Outcome
from bittern.outputs import write_text

PARTS = {
    "blip": "annotation_blip",
    "spatial": "labels/annotation_obj_detection_2d",
    "3d_spatial": "labels/annotation_obj_detection_3d",
    "numeracy": "annotation_num",
    "clip": "annotation_clip",
    "3_in_1": "annotation_3_in_1",
}
_NAME = re.compile(r"(.+)_(\d{6,})\.(?:png|jpe?g|webp)", re.IGNORECASE | re.DOTALL)
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_EXAMPLE = "'a green bench and a blue bowl_000000.png'"


def pictures_of(out: Path, requests: Sequence[Request], per_prompt: int) -> list[Picture[Request]]:
    """The pictures that a run draws, in their order."""
    names = (
        (request, sample, f"{request.tag}/samples/{request.prompt}_{request.number * per_prompt + sample:06d}.png")
        for request in requests
        for sample in range(per_prompt)
    )
    return [Picture(request, sample, out / name, name) for request, sample, name in names]


def question_id(picture: Picture[Request]) -> int:
    """A picture's number, by its name."""
    match = _NAME.fullmatch(Path(picture.name).name)
    assert match is not None
    return int(match[2])


def read_pictures(images: Path, requests: Sequence[Request] | None, per_prompt: int | None) -> list[Picture[Request]]:
    """The pictures in folders of the official names.

    Args:
        images: a folder with a folder a category, each with pictures, or with `samples/`; where only one category is
            asked for, also that category's folder itself.
        requests: the prompts that must be there; None for those that are, whose categories the folders tell.
        per_prompt: how many pictures each has; None for as many as the first.

    Raises:
        UserError: if prompts or pictures are missing, or their number differs, or a name is not in the official form.
    """
    if not images.is_dir():
        raise UserError(f"--images {images}: expected a folder with pictures such as {_EXAMPLE}")
    wanted = None if requests is None else list(dict.fromkeys(request.tag for request in requests))
    folders = {tag: images / tag for tag in wanted or CATEGORIES if (images / tag).is_dir()}
    if not folders and wanted is not None and len(wanted) == 1:
        folders = {wanted[0]: images}
    if not folders:
        raise UserError(
            f"--images {images} has no folder of a category: expected color/samples and so on; for the pictures of one "
            "category alone add --prompts with its file"
        )
    missing = [tag for tag in wanted or () if tag not in folders]
    if missing:
        raise UserError(f"--images {images} lacks the folder {missing[0]}: draw it, or leave its prompts out")
    pictures: list[Picture[Request]] = []
    for tag, place in folders.items():
        place = place / "samples" if (place / "samples").is_dir() else place
        files = _by_prompt(place)
        asked = _found_requests(files, tag, place) if requests is None else [r for r in requests if r.tag == tag]
        same = {prompt: sum(each.prompt == prompt for each in asked) for prompt in files}
        taken = dict.fromkeys(files, 0)
        for request in asked:
            mine = files.get(request.prompt, [])
            if not mine:
                raise UserError(
                    f"{place} has no picture of {request.prompt!r}: expected names such as {_EXAMPLE}; draw it, or "
                    "leave the prompt out"
                )
            per_prompt = per_prompt or max(1, len(mine) // same[request.prompt])
            if len(mine) != per_prompt * same[request.prompt]:
                raise UserError(
                    f"{place} holds {len(mine)} pictures of {request.prompt!r}: expected "
                    f"{per_prompt * same[request.prompt]}, {per_prompt} for every prompt; draw what is missing or give "
                    "--images-per-prompt"
                )
            start = taken[request.prompt]
            taken[request.prompt] += per_prompt
            pictures += [
                Picture(request, sample, file, f"{tag}/samples/{file.name}")
                for sample, file in enumerate(mine[start : start + per_prompt])
            ]
    return pictures


def _by_prompt(place: Path) -> dict[str, list[Path]]:
    """The pictures in a folder by their prompts, in the order of their numbers."""
    numbered: dict[int, tuple[str, Path]] = {}
    for file in sorted(place.iterdir()):
        if file.suffix.lower() not in _ENDINGS or file.name.startswith("."):
            continue
        match = _NAME.fullmatch(file.name)
        if match is None:
            raise UserError(f"picture {file} is not named in the official form: expected a name such as {_EXAMPLE}")
        number = int(match[2])
        if number in numbered:
            raise UserError(f"{place} holds two pictures of the number {number:06d}: expected each once; remove one")
        numbered[number] = unicodedata.normalize("NFC", match[1]), file
    found: dict[str, list[Path]] = {}
    for _, (prompt, file) in sorted(numbered.items()):
        found.setdefault(prompt, []).append(file)
    return found


def _found_requests(files: Mapping[str, Sequence[Path]], tag: str, place: Path) -> list[Request]:
    if not files:
        raise UserError(f"{place} holds no picture: expected names such as {_EXAMPLE}")
    return [
        request_of(prompt, tag, index_of(tag, number), f"the prompt of {those[0]}")
        for number, (prompt, those) in enumerate(files.items())
    ]


def write_results(out: Path, told: Iterable[tuple[Picture[Request], Mapping[str, Any]]]) -> None:
    """Write what the official scorers would write, a file a category and part, and all of it as one.

    Args:
        out: the run's folder.
        told: every picture, with its "score" and, by the keys of `PARTS`, its "scores".
    """
    told = list(told)
    answers: dict[str, list[dict[str, Any]]] = {}
    for picture, note in told:
        for part, value in note["scores"].items():
            answer = f"{value:.4f}" if part == "blip" else value
            file = f"{picture.request.tag}/{PARTS[part]}/vqa_result.json"
            answers.setdefault(file, []).append({"question_id": question_id(picture), "answer": answer})
    for file, rows in answers.items():
        ordered = sorted(rows, key=lambda row: row["question_id"])
        write_text(json.dumps(ordered), out / file, "results")
    lines = (json.dumps(_line(picture, note)) for picture, note in told)
    write_text("".join(line + "\n" for line in lines), out / RESULTS, "results")


def _line(picture: Picture[Request], note: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "category": picture.request.tag,
        "number": picture.request.number,
        "sample": picture.sample,
        "question_id": question_id(picture),
        "filename": picture.name,
        "prompt": picture.request.prompt,
        "score": note["score"],
        "scores": note["scores"],
        "details": note["details"],
    }


def read_results(folder: Path) -> dict[tuple[int, int], Outcome]:
    """What became of every picture of a finished run.

    Raises:
        UserError: for a line that is none of ours.
    """
    found: dict[tuple[int, int], Outcome] = {}
    file = folder / RESULTS
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            key = index_of(value["category"], int(value["number"])), int(value["sample"])
            found[key] = Outcome(value["category"], str(value["prompt"]), float(value["score"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number} is no line of T2I-CompBench's results: evaluate again") from error
    if not found:
        raise UserError(f"{file} is empty: expected a line a picture; evaluate again")
    return found
