"""A folder in which a long run keeps what it has finished, so that it may be killed at any moment.

Every file is written beside its place, flushed to the disk and renamed: it is there whole or not at all. A manifest
says what the run is about; a run about anything else is refused, never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from bittern.errors import UserError

SAMPLES = "samples"
"""The name under which the samples of trajectories are kept, beside the blocks."""

_MANIFEST = "run.json"
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class Workspace:
    """The finished blocks of one run. Use it as a context: no other run may be in the folder meanwhile.

    Args:
        folder: Made if it is not there.
        manifest: What the run is about, as JSON values by name.
        restart: Whether to throw away what is there.

    Raises:
        UserError: if another run is in the folder, or was about something else.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], *, restart: bool = False) -> None:
        self.folder, self.manifest, self.restart = folder, dict(manifest), restart
        self._lock: int | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        try:
            if self.restart:
                self._empty()
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def has(self, name: str) -> bool:
        """Whether a block, or other work, is finished. A file of it that is damaged goes, and it is not."""
        if not self._file(name).is_file():
            return False
        try:
            self.load(name, mapped=True)
        except UserError:
            self._file(name).unlink()
            return False
        return True

    @property
    def finished(self) -> int:
        """How many blocks are; their names begin with their number."""
        return len(list(self.folder.glob("[0-9]*.safetensors")))

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Writes a block.

        Args:
            name: Of the block.
            tensors: Its tensors, on any device.
            notes: JSON values to keep beside them.

        Raises:
            OSError, SafetensorError: as the disk says.
        """
        from safetensors.torch import save_file

        file = self._file(name)
        fresh = file.with_suffix(".tmp")
        try:
            # More than one key would make the file's bytes depend on the order of a hash map.
            save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, fresh, {"notes": json.dumps(notes)})
            _flush(fresh)
            fresh.replace(file)
            _flush(self.folder)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def load(self, name: str, *, mapped: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished block: its tensors on the CPU, and its notes.

        Tensors of a file lie at any address, and a BLAS may sum what is not aligned in another order: a run that goes
        on would not give the bytes of one that was never interrupted. So tensors have memory of their own.

        Args:
            name: Of the block.
            mapped: Leaves tensors in the file, to be looked at or written again.

        Raises:
            UserError: if its file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        file = self._file(name)
        try:
            with safe_open(file, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
                if not mapped:
                    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
                return tensors, json.loads((handle.metadata() or {})["notes"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}): begin anew with --restart") from None

    def remove(self) -> None:
        """Throws everything away, the folder included."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self) -> None:
        file = self.folder / _MANIFEST
        if not file.is_file():
            # Blocks without a manifest cannot be told apart from another run's.
            self._empty()
            fresh = file.with_suffix(".tmp")
            fresh.write_text(json.dumps(self.manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            _flush(fresh)
            fresh.replace(file)
            return
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}): begin anew with --restart") from None
        now = json.loads(json.dumps(self.manifest))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} holds an unfinished run with another {' and '.join(changed)}: "
                "run that command again, or begin anew with --restart"
            )

    def _empty(self) -> None:
        for file in self.folder.iterdir():
            if file.suffix in (".safetensors", ".tmp", ".json"):
                file.unlink()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def fingerprint(files: Sequence[Path]) -> str:
    """A hash that changes with the files, without reading all of them: sizes, and samples spread over each.

    The first and last bytes are among the samples; a safetensors file has the names and shapes of its tensors there.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as handle:
            for i in range(_SAMPLES):
                handle.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Has the disk itself keep a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(folder: Path) -> int | None:
    """Locks the folder for this process; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another output") from None
    return handle
