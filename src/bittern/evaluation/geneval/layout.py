"""GenEval's folders, `00000/metadata.jsonl` and `00000/samples/0000.png`, and its results file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bittern.errors import UserError
from bittern.evaluation.geneval.metadata import Request, parse_line
from bittern.evaluation.runs.folder import RESULTS, Picture
from bittern.evaluation.runs.judging import Outcome
from bittern.outputs import write_text

_PICTURE = re.compile(r"(\d+)\.png")
_IN_RESULTS = re.compile(r"(\d+)/samples/(\d+)\.png$")


def pictures_of(out: Path, requests: Sequence[Request], per_prompt: int) -> list[Picture[Request]]:
    """The pictures that a run draws, in their order."""
    names = ((request, sample, _name(request, sample)) for request in requests for sample in range(per_prompt))
    return [Picture(request, sample, out / name, name) for request, sample, name in names]


def _name(request: Request, sample: int) -> str:
    return f"{request.index:05d}/samples/{sample:04d}.png"


def lay_out(out: Path, requests: Iterable[Request]) -> None:
    """Put every prompt's metadata where the official scorer looks for it."""
    for request in requests:
        file = out / f"{request.index:05d}" / "metadata.jsonl"
        if not file.exists():
            write_text(request.line, file, "evaluation")


def read_pictures(images: Path, requests: Sequence[Request] | None, per_prompt: int | None) -> list[Picture[Request]]:
    """The pictures in a folder of the official layout.

    Args:
        images: the folder.
        requests: the prompts that it must hold; None for those it holds.
        per_prompt: how many pictures each has; None for as many as the first.

    Raises:
        UserError: if prompts or pictures are missing, or their number differs.
    """
    if not images.is_dir():
        raise UserError(f"--images {images}: expected a folder with 00000/samples/0000.png in it")
    folders = _once((int(place.name), place) for place in images.iterdir() if place.name.isdecimal() and place.is_dir())
    if not folders:
        raise UserError(f"--images {images} holds no numbered folder: expected 00000/samples/0000.png and so on")
    pictures: list[Picture[Request]] = []
    for index in sorted(folders) if requests is None else [request.index for request in requests]:
        if index not in folders:
            raise UserError(f"--images {images} lacks the folder {index:05d}: draw it, or leave the prompt out")
        request = _read_request(folders[index], index)
        wanted = next((each for each in requests or () if each.index == index), request)
        if request.prompt != wanted.prompt:
            raise UserError(
                f"{folders[index] / 'metadata.jsonl'} is about {request.prompt!r} and the metadata file about "
                f"{wanted.prompt!r}: give the file that the pictures were drawn from"
            )
        samples = _samples(folders[index] / "samples")
        if not samples:
            raise UserError(
                f"{folders[index] / 'samples'} holds no picture: expected 0000.png and so on; draw what is missing, or "
                "leave the prompt out"
            )
        per_prompt = per_prompt or len(samples)
        if len(samples) != per_prompt:
            raise UserError(
                f"{folders[index] / 'samples'} holds {len(samples)} pictures: expected {per_prompt}, as many for every "
                "prompt; draw what is missing or give --images-per-prompt"
            )
        pictures += [Picture(wanted, sample, file, _name(wanted, sample)) for sample, file in sorted(samples.items())]
    return pictures


def _read_request(folder: Path, index: int) -> Request:
    file = folder / "metadata.jsonl"
    try:
        line = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: every numbered folder needs the metadata of its prompt") from error
    return parse_line(line, str(file), index)


def _samples(folder: Path) -> dict[int, Path]:
    files = [(_PICTURE.fullmatch(file.name), file) for file in folder.iterdir()] if folder.is_dir() else []
    return _once((int(match[1]), file) for match, file in files if match)


def _once(numbered: Iterable[tuple[int, Path]]) -> dict[int, Path]:
    """Files or folders by their numbers: 0.png is the picture that 0000.png is."""
    found: dict[int, Path] = {}
    for number, place in numbered:
        other = found.setdefault(number, place)
        if other is not place:
            first, second = sorted((other.name, place.name))
            raise UserError(
                f"{place.parent} holds {first} and {second}, one number twice: expected each once; remove one"
            )
    return found


def read_results(folder: Path) -> dict[tuple[int, int], Outcome]:
    """What became of every picture, from a results file, ours or the official scorer's.

    Raises:
        UserError: for a line that is not in the official form.
    """
    found: dict[tuple[int, int], Outcome] = {}
    file = folder / RESULTS
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            index, sample = _IN_RESULTS.findall(value["filename"])[0]
            found[int(index), int(sample)] = Outcome(
                str(value["tag"]), str(value["prompt"]), float(bool(value["correct"]))
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{file}:{number} is no line of GenEval's results: write the file again") from error
    if not found:
        raise UserError(f"{file} is empty: expected a line a picture; evaluate again")
    return found
