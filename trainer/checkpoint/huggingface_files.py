"""Safetensors folders, local or gs://: the headers first, then any rows of any tensor; and writing tensor by tensor.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range in what
follows), the tensors (https://github.com/huggingface/safetensors). The safetensors package reads local files only.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, Final, Self

import ml_dtypes
import numpy as np
from etils import epath

from trainer.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
CONFIG_FILE: Final = "config.json"
UNFINISHED: Final = "UNFINISHED"
"""A file of a folder that an export has not written to its end."""
MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the reference implementation

STORED_DTYPES: Final[dict[str, np.dtype[Any]]] = {"U8": np.dtype(np.uint8), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Of tensors that stand for others."""
DTYPES: Final[dict[str, np.dtype[Any]]] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES: Final = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    file: str
    dtype: str  # as the format spells it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self, stored: Callable[..., np.ndarray], first: int, last: int, within: tuple[int, ...] = ()) -> np.ndarray:
        """As `SafetensorsFolder.read`; `stored` reads a tensor's rows as they are in its file."""
        return stored(self, first, last, within)


class SafetensorsFolder:
    """The tensors of a folder. Opening reads headers only; use it as a context manager."""

    def __init__(self, folder: str, config_file: str = CONFIG_FILE) -> None:
        """config_file: the JSON file beside them. Raises CheckpointError where there is no readable safetensors file."""
        self.folder = folder.rstrip("/")
        self._path = epath.Path(folder)
        self._files: dict[str, IO[bytes]] = {}
        self.config: dict[str, Any] = self._json(config_file)
        with ExitStack() as opening:  # closes what was opened where a header cannot be read
            self._open = opening
            self.tensors: dict[str, Tensor] = {name: tensor for file in self._names() for name, tensor in self._header(file)}
            self._open = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, name: str, first: int, last: int, within: tuple[int, ...] = ()) -> np.ndarray:
        """Rows `first` up to `last` (not included) of the dim after those that `within` gives an index of."""
        return self.tensors[name].read(self._stored, first, last, within)

    def _stored(self, tensor: Tensor, first: int, last: int, within: tuple[int, ...] = ()) -> np.ndarray:
        dtype = DTYPES.get(tensor.dtype) or STORED_DTYPES[tensor.dtype]
        depth = len(within)
        row = math.prod(tensor.shape[depth + 1 :])
        begin = first * row + (int(np.ravel_multi_index(within, tensor.shape[:depth])) * math.prod(tensor.shape[depth:]) if within else 0)
        file = self._file(tensor.file)
        file.seek(tensor.offset + begin * dtype.itemsize)
        data = file.read((last - first) * row * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(last - first, *tensor.shape[depth + 1 :])

    def _names(self) -> list[str]:
        if (self._path / SINGLE_FILE).exists():  # also where an index lies beside it, as transformers does
            return [SINGLE_FILE]
        if (self._path / INDEX_FILE).exists():
            files = self._json(INDEX_FILE).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) and "/" not in file for file in files.values()):
                raise CheckpointError(f"{self.folder}/{INDEX_FILE}: its weight_map must say in which file of the folder each tensor is")
            return sorted(set(files.values()))
        raise CheckpointError(
            f"{self.folder}: neither {SINGLE_FILE} nor {INDEX_FILE} there", hint="only safetensors are read; convert .bin files first"
        )

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self._path / name).read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder}/{name}: not found", hint="give the folder of a Hugging Face checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"{self.folder}/{name} cannot be read: {error}") from None
        except ValueError as error:
            raise CheckpointError(f"{self.folder}/{name}: not JSON: {error}") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{self.folder}/{name}: not a JSON object")
        return content

    def _file(self, name: str) -> IO[bytes]:
        if name not in self._files:
            try:
                self._files[name] = self._open.enter_context((self._path / name).open("rb"))
            except FileNotFoundError:
                raise CheckpointError(f"{self.folder}/{name}: not found, but {INDEX_FILE} names it") from None
        return self._files[name]

    def _header(self, name: str) -> Iterator[tuple[str, Tensor]]:
        file = self._file(name)
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"header of {length:,} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
            found = {key: _entry(key, name, entry, 8 + length) for key, entry in header.items() if key != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.folder}/{name}: not a safetensors file: {error}", hint="copy it again") from None
        end = max([8 + length, *(entry["data_offsets"][1] + 8 + length for key, entry in header.items() if key != "__metadata__")])
        if (size := file.seek(0, 2)) != end:
            raise CheckpointError(
                f"{self.folder}/{name}: {size:,} bytes long, its header says {end:,}", hint="the file is cut; copy it again"
            )
        yield from found.items()


def _entry(tensor: str, file: str, entry: Mapping[str, Any], data: int) -> Tensor:
    """An entry of a header, whose tensors begin at byte `data`. Raises ValueError, TypeError or KeyError for one that is none."""
    shape = tuple(map(int, entry["shape"]))
    begin, end = map(int, entry["data_offsets"])
    dtype = DTYPES.get(entry["dtype"]) or STORED_DTYPES.get(entry["dtype"])
    if min([begin, *shape]) < 0 or end < begin or (dtype is not None and end - begin != math.prod(shape) * dtype.itemsize):
        raise ValueError(f"{tensor}: {end - begin:,} bytes for {entry['dtype']} of shape {list(shape)}")
    return Tensor(file, entry["dtype"], shape, data + begin)


def write_safetensors(
    folder: str, shapes: Mapping[str, tuple[int, ...]], pieces: Callable[[str], Iterable[np.ndarray]], *, dtype: str, max_file_bytes: int
) -> None:
    """Write tensors one at a time, in the order of `shapes`; a second file begins where one would exceed `max_file_bytes`.

    dtype: `float32`, `float16` or `bfloat16`; `pieces(name)` gives the values, in one or more parts of the leading dims.
    Raises CheckpointError before anything is written where a local disk has no room for all of it.
    """
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    numpy_dtype = DTYPES[NAMES[dtype]]
    sizes = {name: math.prod(shape) * numpy_dtype.itemsize for name, shape in shapes.items()}
    if "://" not in folder and (free := shutil.disk_usage(folder).free) < (needed := sum(sizes.values())):
        raise CheckpointError(f"{folder}: {needed:,} bytes are to be written, {free:,} are free there")
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    file_names = [SINGLE_FILE] if len(files) == 1 else [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for file_name, names in zip(file_names, files, strict=True):
        with (target / file_name).open("wb") as file:
            file.write(_header_bytes(names, shapes, sizes, NAMES[dtype]))
            for name in names:
                written = 0
                for piece in pieces(name):
                    values = np.ascontiguousarray(piece.astype(numpy_dtype, copy=False))
                    file.write(values.reshape(-1).view(np.uint8).data)
                    written += values.nbytes
                if written != sizes[name]:
                    raise ValueError(f"{name}: {written:,} bytes written, {sizes[name]:,} announced")
    if len(files) > 1:
        weight_map = {name: file_name for file_name, names in zip(file_names, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _header_bytes(names: list[str], shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say this
    offset = 0
    for name in names:
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
