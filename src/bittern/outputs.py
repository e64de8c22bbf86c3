"""Where results go: refused before time is spent, and written as a whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from bittern.errors import UserError

INDEX = "model_index.json"


def check_out(out: str | Path, *, force: bool = False, source: Path | None = None) -> None:
    """Refuses an output folder that `new_folder` would refuse, before time is spent.

    What processes that were killed have left of this output is swept away first (`sweep`).

    Raises:
        UserError: if it is a file, holds something and `force` is not given, holds something that is no model,
            is the source itself or around it, or cannot be written.
    """
    path = Path(out).expanduser().resolve()
    sweep(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"output {str(out)!r} is a file: expected a folder that is new or empty")
    if source is not None and (source.resolve().is_relative_to(path) or path.is_relative_to(source.resolve())):
        raise UserError(
            f"output {str(out)!r} would replace the model it is made from, or a part of it: choose another folder"
        )
    if path.is_mount():
        raise UserError(f"output {str(out)!r} is a mount point, which cannot be replaced: choose a folder in it")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise UserError(f"output folder {str(out)!r} is not empty: choose another, or replace it with --force")
        if not any(_names_a_class(path / name) for name in (INDEX, "config.json")):
            raise UserError(f"output folder {str(out)!r} holds no model: --force replaces only models; empty it first")
    parent = existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output {str(out)!r} is not writable: {parent} allows no new folder; choose another place")


@contextmanager
def new_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when not.

    Raises:
        UserError: as `check_out` does, and if the disk is full or not writable.
    """
    check_out(out, force=force)
    path = Path(out).expanduser().resolve()
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh, aside = _fresh(path, held)
            try:
                yield fresh
                _open_to_readers(fresh)
                if path.exists():
                    held.callback(_close, _lock(path))
                    path.rename(aside)
                try:
                    fresh.rename(path)
                except BaseException:
                    if aside.exists():
                        aside.rename(path)
                    raise
                shutil.rmtree(aside, ignore_errors=True)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        except Exception as error:
            reason = disk_problem(error)
            if reason is None:
                raise
            raise UserError(f"output {str(out)!r} cannot be written: {reason}; nothing was left behind") from error


def sweep(path: Path) -> None:
    """Takes away what processes that were killed while they wrote `path` have left beside it.

    A process locks its folders for as long as it lives, and what is locked stays. One that was killed between its two
    renames had put aside what was at `path`, which comes back.

    Args:
        path: The output, absolute.
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.([0-9a-f]{{8}})\.(tmp|old)")
    try:
        left = [(found, entry) for entry in path.parent.iterdir() if (found := name.fullmatch(entry.name))]
    except OSError:  # no folder there yet, or none to look into: then there is nothing to do
        return
    with ExitStack() as held:
        dead: dict[tuple[str, str], Path] = {}
        for found, folder in left:
            if not folder.is_symlink() and (handle := _lock(folder, wait=False)) is not None:
                held.callback(_close, handle)
                dead[found[1], found[2]] = folder
        for (token, kind), folder in dead.items():
            if kind == "old" and (token, "tmp") in dead and not path.exists():
                with suppress(OSError):
                    folder.rename(path)
        for folder in dead.values():
            shutil.rmtree(folder, ignore_errors=True)


def _fresh(path: Path, held: ExitStack) -> tuple[Path, Path]:
    """A new folder beside an output, locked while `held` lasts, and a name for what has to make room."""
    while True:
        token = secrets.token_hex(4)
        fresh, aside = (path.parent / f".{path.name}.{token}.{kind}" for kind in ("tmp", "old"))
        fresh.mkdir()
        held.callback(_close, _lock(fresh))
        # Before it was locked another run may have taken it for a dead one's.
        if fresh.exists():
            return fresh, aside


def _lock(folder: Path, *, wait: bool = True) -> int | None:
    """Locks a folder for this process, under whatever name it goes; the lock goes with the process, however it ends.

    Args:
        folder: Which.
        wait: Whether to wait for a process that has locked it.

    Returns:
        What `os.close` unlocks; None if another process has locked it, or nothing can be locked here.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # some file systems of networks lock no folders
        _close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _names_a_class(file: Path) -> bool:
    """Whether a file is the config of a model or the index of a pipeline: both name their class."""
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8"))["_class_name"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _open_to_readers(folder: Path) -> None:
    """Give every file the mode that a plain `open` would have given it; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def check_file_out(file: Path, option: str) -> None:
    """Refuses a file that could not be written, before time is spent.

    Args:
        file: what is to be written.
        option: the option it was given with, for the message.

    Raises:
        UserError: if it is a folder, or its folder cannot be made or written.
    """
    if file.is_dir():
        raise UserError(f"{option} {file} is a folder: expected a file such as {file / 'name.ending'}")
    parent = existing_parent(file.expanduser())
    if not parent.is_dir():
        raise UserError(f"{option} {file}: {parent} is a file, not a folder; choose another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {file}: {parent} is not writable; choose another place")


def check_replaces(file: Path, option: str, mark: str, *, force: bool) -> None:
    """Refuses to replace a file that is not of the kind that is written there, before time is spent.

    Args:
        file: what is to be written.
        option: the option it was given with, for the message.
        mark: what a file of that kind has among its first 2,000 bytes.
        force: whether any file may be replaced.

    Raises:
        UserError: if something else is there and `force` is not given, or as `check_file_out` does.
    """
    check_file_out(file, option)
    if file.exists() and not force:
        with file.open("rb") as handle:
            if mark.encode() not in handle.read(2000):
                raise UserError(f"{option} {file} is another file: choose another name, or replace it with --force")


def write_text(text: str, file: Path, what: str) -> None:
    """Write a file as a whole or not at all. What killed processes have left of it is taken away.

    Args:
        text: its content.
        file: where it goes; folders above it are made.
        what: what it is, for the message.

    Raises:
        UserError: if it cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _sweep_texts(file)
        with ExitStack() as held:
            while not temporary.exists():
                # Before it was locked another process may have taken it for a dead one's.
                temporary.touch()
                held.callback(_close, _lock(temporary))
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot write {file}: {reason}; choose a writable place for the {what}") from error


def _sweep_texts(file: Path) -> None:
    """Takes away temporary files of processes that were killed while they wrote `file`: those that nobody locks."""
    name = re.compile(rf"\.{re.escape(file.name)}\.\d+\.tmp")
    with suppress(OSError):  # a folder that may not be looked into
        for entry in file.parent.iterdir():
            ours = name.fullmatch(entry.name) and not entry.is_symlink()
            if ours and (handle := _lock(entry, wait=False)) is not None:
                entry.unlink(missing_ok=True)
                _close(handle)


def bytes_of(place: Path) -> int:
    """Bytes of a file, or of all files in a folder; those behind links count, since a pipeline may be made of links."""
    if place.is_file():
        return place.stat().st_size
    return sum((Path(at) / file).stat().st_size for at, _, files in os.walk(place, followlinks=True) for file in files)


def existing_parent(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    return next(parent for parent in path.resolve().parents if parent.exists())


def disk_problem(error: Exception) -> str | None:
    """What the disk said, if this is the disk's error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, shutil.Error | SafetensorError):
        # These two give the number only in their text.
        match = re.search(r"(?:os error|Errno) (\d+)", str(error))
        number = int(match[1]) if match else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG):
        return f"{os.strerror(number)}, choose another place"
    if number == errno.ENOENT:  # the folder above was there a moment ago: /proc and the like refuse new names so
        return "nothing new can be made there, choose another place"
    return os.strerror(number) if number else None
