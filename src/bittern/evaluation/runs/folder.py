"""The folder of a run: its pictures, what is known of them, and what makes a run that was killed go on.

Pictures are drawn in batches whose members never change, because a picture's low bits may depend on its batch. A
finished batch goes to `.drawn/` under a temporary name, is renamed, and only then dealt out: a kill leaves either the
whole batch, which the next run deals out, or nothing of it. Verdicts are lines that are appended, a file a process; a
torn last line is cut off. As long as a process of a run lives no other run may begin in its folder: torchrun may be
killed and leave its processes behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from jaxtyping import UInt8
from torch import Tensor

from bittern.errors import UserError
from bittern.evaluation.generate import save_png
from bittern.outputs import disk_problem, existing_parent, write_text

RESULTS = "results.jsonl"
_JUDGE = "judge.json"
_RUN = "run.json"
_DRAWN = ".drawn"
_NOTE = {"prompt": int, "sample": int, "picture": str, "judge": str, "size": str}  # and what the suite's judge found


class Request(Protocol):
    """A prompt that a suite asks for."""

    @property
    def index(self) -> int:
        """Its number, which no other prompt of the suite has."""
        ...

    @property
    def tag(self) -> str:
        """Its task."""
        ...

    @property
    def prompt(self) -> str:
        """Its text."""
        ...


R = TypeVar("R", bound=Request, covariant=True)


@dataclass(frozen=True)
class Picture(Generic[R]):
    """One sample of one prompt, its file, and where the official layout has it in the run's folder."""

    request: R
    sample: int
    file: Path
    name: str

    @property
    def key(self) -> tuple[int, int]:
        """The prompt's number and the sample's."""
        return self.request.index, self.sample


class Claim:
    """A process's hold on its run's folder; the system lets go of it when the process ends, however it ends.

    Args:
        out: the folder.
        alone: whether nobody may hold it already.

    Raises:
        UserError: if somebody does.
    """

    def __init__(self, out: Path, *, alone: bool) -> None:
        self._handle = os.open(out, os.O_RDONLY)
        self._take(out, alone=alone)

    def _take(self, out: Path, *, alone: bool) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: runs in one folder are the user's to keep apart
            return
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(
                f"--out {out} is in use by a run that has not ended: wait for it, end its processes, or choose "
                "another folder"
            ) from error
        except OSError:  # a file system without locks
            return

    def share(self, out: Path) -> None:
        """Let the other processes of the run in."""
        self._take(out, alone=False)

    def release(self) -> None:
        """Let go."""
        with suppress(OSError):
            os.close(self._handle)


def prepare(out: Path, run: Mapping[str, Any], held: ExitStack, *, force: bool) -> None:
    """Make the folder of a run, or find it as the same run left it.

    Args:
        out: the folder.
        run: what the run is about, as JSON values.
        held: lets go of the folder when it closes.
        force: whether to throw away what another run left.

    Raises:
        UserError: if it holds another run and `force` is not given, holds something else, is in use, or cannot be
            written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: expected a folder that is new, empty, or of the same run")
    parent = existing_parent(out / "any")
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {parent} is not writable; choose another place")
    if out.is_dir() and any(out.iterdir()):
        before = read_run(out)
        if before is None:
            raise UserError(
                f"--out {out} holds something else: --force replaces only evaluations; choose another folder"
            )
        if not force:
            for key in dict.fromkeys([*run, *before]):
                if run.get(key) != before.get(key):
                    raise UserError(
                        f"--out {out} holds a run with another {key} ({before.get(key)!r}, now {run.get(key)!r}): "
                        "choose another folder, or replace it with --force"
                    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        claim = Claim(out, alone=True)
        held.callback(claim.release)
        if force:
            _empty(out)
        if not (out / _RUN).exists():
            write_text(json.dumps(run, indent=2) + "\n", out / _RUN, "evaluation")
        _settle(out)
        claim.share(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {disk_problem(error) or error}") from error


def _empty(out: Path) -> None:
    # What tells that the folder is ours goes last, should this be killed.
    for each in sorted(out.iterdir(), key=lambda file: file.name == _RUN):
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def deliver(
    out: Path,
    number: int,
    batch: Sequence[Picture[Request]],
    images: UInt8[Tensor, "b 3 h w"],
    metadata: Sequence[Mapping[str, object]],
) -> None:
    """Write a batch, as a whole or not at all; pictures that are there already stay.

    Raises:
        UserError: if the disk refuses.
    """
    ready = out / _DRAWN / f"{number:06d}"
    temporary = ready.with_suffix(".tmp")
    for index, picture in enumerate(batch):
        save_png(images[index], temporary / picture.name, metadata[index])
    temporary.rename(ready)
    _deal_out(out, ready)


def _settle(out: Path) -> None:
    """Deal out the batches that a killed run had finished, and forget the one that it had not."""
    for folder in sorted((out / _DRAWN).glob("*")):
        if folder.suffix == ".tmp":
            shutil.rmtree(folder)
        else:
            _deal_out(out, folder)


def _deal_out(out: Path, ready: Path) -> None:
    for file in sorted(file for file in ready.rglob("*") if file.is_file()):
        place = out / file.relative_to(ready)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            file.replace(place)
    shutil.rmtree(ready)


def read_run(out: Path) -> dict[str, Any] | None:
    """What the run in a folder is about; None where there is none."""
    run = _read_object(out / _RUN)
    return run if run is not None and "suite" in run else None


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def tell_judge(out: Path, judge: Mapping[str, Any] | None) -> None:
    """Say in a run's folder who reached the results there; None while they are being written.

    Raises:
        UserError: if it cannot be written.
    """
    if judge is not None:
        write_text(json.dumps(judge, indent=2) + "\n", out / _JUDGE, "evaluation")
        return
    try:
        (out / _JUDGE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {disk_problem(error) or error}") from error


def read_judge(out: Path) -> dict[str, Any] | None:
    """Who reached the results in a run's folder; None where it does not say."""
    return _read_object(out / _JUDGE)


class Notes:
    """What is known of pictures: a line a picture, appended as soon as it is known."""

    def __init__(self, out: Path, rank: int) -> None:
        self._file = out / f"verdicts.{rank}.jsonl"
        if self._file.exists():
            text = self._file.read_bytes()
            with self._file.open("r+b") as handle:
                handle.truncate(text.rfind(b"\n") + 1)
        self._handle = self._file.open("a", encoding="utf-8")

    def add(self, note: Mapping[str, Any]) -> None:
        """Write a line; it is there when this returns."""
        self._handle.write(json.dumps(note) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def read_notes(out: Path) -> list[dict[str, Any]]:
    """Every whole line that any process wrote; of several about one picture the last is the newest.

    Raises:
        UserError: for a line that is damaged, named by its number.
    """
    notes: list[dict[str, Any]] = []
    for file in sorted(out.glob("verdicts.*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                note = json.loads(line)
            except ValueError:
                note = None
            if not isinstance(note, dict) or not all(isinstance(note.get(key), kind) for key, kind in _NOTE.items()):
                raise UserError(f"{file}:{number} is no verdict: remove that line, and its picture is judged again")
            notes.append(note)
    return notes


def picture_hash(file: Path) -> str:
    """What tells a picture's file from another.

    Raises:
        UserError: if it is not there.
    """
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"picture {file} cannot be read ({error.strerror}): draw or fetch it again") from error


def hash_of(texts: Iterable[str]) -> str:
    """A short hash of some texts in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
