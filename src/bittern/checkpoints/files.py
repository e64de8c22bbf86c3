"""The weight files of a checkpoint folder, and what their headers say, without reading a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bittern.errors import BitternError, UserError

STEM = "diffusion_pytorch_model"
MEND = "the file is damaged or incomplete: fetch or write it again"

# In safetensors' order: it writes the later ones first, and tensors of one dtype by name.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorSpec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.numel * self.dtype.itemsize

    @property
    def numel(self) -> int:
        """How many values it has."""
        return torch.Size(self.shape).numel()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers model folder: the shards its index lists, or the single file.

    Raises:
        UserError: if there are none, or a shard is missing.
    """
    index = _first(folder, f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.*.json")
    if index is not None:
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{index} is not a shard index: {MEND}") from None
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise UserError(f"{index} lists {shard!r}, which is not in its folder: {MEND}")
        return [folder / shard for shard in shards]
    file = _first(folder, f"{STEM}.safetensors", f"{STEM}.*.safetensors")
    if file is None:
        raise UserError(f"{folder} has no {STEM}.safetensors: expected a diffusers model folder")
    return [file]


def _first(folder: Path, name: str, variants: str) -> Path | None:
    """The file of that name, or else the first variant (`fp16` and the like)."""
    plain = folder / name
    return plain if plain.is_file() else next(iter(sorted(folder.glob(variants))), None)


def read_headers(files: Iterable[Path]) -> dict[str, tuple[Path, TensorSpec]]:
    """Where every tensor lies, with its shape and dtype.

    Raises:
        UserError: for a file that is not safetensors or is cut short, and a tensor that is in two files.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[Path, TensorSpec]] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise UserError(f"{file} is not safetensors: bittern reads no other files, since they may run code")
        try:
            with safe_open(file, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                specs = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}): {MEND}") from None
        for name, (shape, dtype) in specs.items():
            if name in found:
                raise UserError(f"tensor {name!r} is both in {found[name][0].name} and {file.name}: {MEND}")
            if dtype not in _DTYPES:
                raise UserError(f"tensor {name!r} in {file.name} has dtype {dtype}: expected {', '.join(_DTYPES)}")
            found[name] = (file, TensorSpec(shape, _DTYPES[dtype]))
    return found


def read_tensor(headers: Mapping[str, tuple[Path, TensorSpec]], name: str) -> Tensor:
    """One tensor's values, on the CPU.

    Raises:
        UserError: if the checkpoint has no such tensor, or its file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if name not in headers:
        raise UserError(f"tensor {name!r} is missing from the checkpoint: {MEND}")
    file = headers[name][0]
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): {MEND}") from None


def file_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Size of a safetensors file that diffusers would write with these tensors."""
    header, _ = _header(tensors, {"format": "pt"})
    return len(header) + sum(spec.nbytes for spec in tensors.values())


def _header(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, its length included, and where in the file each tensor begins."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    starts: dict[str, int] = {}
    order = {dtype: place for place, dtype in enumerate(_DTYPES.values())}
    for name, spec in sorted(tensors.items(), key=lambda item: (-order[item[1].dtype], item[0])):
        starts[name], end = end, end + spec.nbytes
        entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [starts[name], end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + start for name, start in starts.items()}


@contextmanager
def streamed_file(
    file: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """A safetensors file whose tensors come one by one, in any order: memory holds two of them.

    A thread writes one tensor while the next is made.

    Yields:
        What takes a tensor by its name.

    Raises:
        BitternError: at the end, if a tensor never came; at once, if one was not announced like that.
    """
    header, starts = _header(tensors, metadata or {"format": "pt"})
    left = set(tensors)
    with file.open("wb", buffering=0) as sink, ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(sink.write, header)]

        def write(start: int, values: Tensor) -> None:
            sink.seek(start)
            data = memoryview(values.numpy())
            while data:
                data = data[sink.write(data) :]

        def put(name: str, tensor: Tensor) -> None:
            if name not in left or TensorSpec(tuple(tensor.shape), tensor.dtype) != tensors[name]:
                raise BitternError(f"{name} is {tensor.dtype} {list(tensor.shape)}: expected {tensors.get(name)}, once")
            left.remove(name)
            # Its error, if it had one.
            waiting.pop().result()
            waiting.append(pool.submit(write, starts[name], tensor.contiguous().view(-1).view(torch.uint8)))

        yield put
        waiting.pop().result()
    if left:
        raise BitternError(f"{len(left)} tensors never came, {min(left)} among them")


@contextmanager
def opened(headers: Mapping[str, tuple[Path, TensorSpec]]) -> Iterator[Callable[[str], Tensor]]:
    """Gives tensors by name, on the CPU, from files that are opened once.

    Raises:
        UserError: as `read_tensor`.
    """
    with ExitStack() as stack:
        data = {
            file: stack.enter_context(file.open("rb", buffering=0))
            for file in dict.fromkeys(file for file, _ in headers.values())
        }
        begins = {file: int.from_bytes(stream.read(8), "little") for file, stream in data.items()}
        offsets = {
            file: {
                name: 8 + length + entry["data_offsets"][0]
                for name, entry in json.loads(data[file].read(length)).items()
                if name != "__metadata__"
            }
            for file, length in begins.items()
        }

        def read(name: str) -> Tensor:
            if name not in headers:
                raise UserError(f"tensor {name!r} is missing from the checkpoint: {MEND}")
            file, spec = headers[name]
            # Mapped memory would count as ours until the file is closed.
            values = torch.empty(spec.nbytes, dtype=torch.uint8)
            data[file].seek(offsets[file][name])
            if spec.nbytes and data[file].readinto(values.numpy().data) != spec.nbytes:
                raise UserError(f"{file} ends within tensor {name!r}: {MEND}")
            return values.view(spec.dtype).reshape(spec.shape)

        yield read
