"""Reads a safetensors checkpoint, one file or shards with an index, without trusting it.

The header is parsed here, strictly, because an export must repeat it and a tensor must be found without loading the file; the
reference library reads every file that this module accepts (tests compare them) and re-opens every file that is written.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from conversion._faults import describe, nearest, raise_all

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
# The format's own limit on a header.
MAX_HEADER_BYTES = 100_000_000
# In the library's order: it writes the tensors of the last dtype here first, so that each is aligned.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "C64": np.dtype(np.complex64),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class CheckpointError(ValueError):
    """A checkpoint, or a file of one, is refused; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: safetensors dtype ("BF16"), shape, file name, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """One file's tensors in the order of its header, and its metadata (None where it has none)."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder. ``metadata`` is per file; ``index_metadata`` is the index's, None for a single file."""

    folder: pathlib.Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Mapping[str, str] | None]
    index_metadata: Mapping[str, object] | None = None

    def names(self) -> list[str]:
        """Returns all names, file by file, in the order of the headers."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Returns dtype, shape and place of a tensor.

        Raises:
          CheckpointError: if there is no such tensor; it gives the nearest names.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}{nearest(name, self.tensors)}")
        return self.tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor, copied once from disk into its own aligned buffer; nothing else is read."""
        info = self.info(name)
        out = np.empty(info.shape, DTYPES[info.dtype])
        self._read_into(info, out.reshape(-1).view(np.uint8).data if info.nbytes else memoryview(b""))
        return out

    def read_bytes(self, name: str) -> bytes:
        """Returns one tensor's bytes as they are on disk."""
        info, buffer = self.info(name), bytearray(self.info(name).nbytes)
        self._read_into(info, memoryview(buffer))
        return bytes(buffer)

    def _read_into(self, info: TensorInfo, buffer: memoryview) -> None:
        done, path = 0, self.folder / info.file
        with open(path, "rb", buffering=0) as file:
            file.seek(info.offset)
            # One read returns at most 2 GiB.
            while done < info.nbytes:
                count = file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(f"{path} ended {info.nbytes - done} bytes early; it was cut since it was opened")
                done += count


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Opens ``model.safetensors``, or else the shards that ``model.safetensors.index.json`` names. Reads headers only.

    Raises:
      CheckpointError: if the folder has none of them, an index and its shards disagree, a file name leaves the folder
        (links may lead to the blobs of a hub cache), or a header is malformed.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder")
    if os.path.lexists(root / SINGLE_NAME):
        return open_single(root, SINGLE_NAME)
    if not (root / INDEX_NAME).exists():
        raise CheckpointError(_why_nothing_opens(root))
    weight_map, index_metadata = _read_index(root / INDEX_NAME)
    files = sorted(set(weight_map.values()))
    check_names(root, set(files))
    headers = {file: read_header(root / file) for file in files}
    _check_coverage(root, weight_map, headers)
    tensors = {name: info for header in headers.values() for name, info in header.tensors.items()}
    return Checkpoint(root, tensors, {file: header.metadata for file, header in headers.items()}, index_metadata)


def open_single(folder: str | os.PathLike, file: str) -> Checkpoint:
    """Opens one safetensors file of a folder as a checkpoint of its own; raises as ``open_checkpoint``."""
    root = pathlib.Path(folder)
    check_names(root, {file})
    header = read_header(root / file)
    return Checkpoint(root, header.tensors, {file: header.metadata})


def read_header(path: str | os.PathLike) -> Header:
    """Parses the header of one safetensors file and checks that its tensors fill the file exactly, without holes or overlaps.

    Raises:
      CheckpointError: naming the file and the first thing that is wrong.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"its header claims {length} bytes, the file has {size}, at most {MAX_HEADER_BYTES} are allowed")
            raw = file.read(length)
        return _parse_header(raw, path.name, size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}; was its download cut short?") from error


def _parse_header(raw: bytes, file: str, size: int) -> Header:
    fields = parse_json(raw)
    metadata = fields.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CheckpointError("its metadata is not an object of strings")
    tensors = {name: _parse_entry(name, entry, file, 8 + len(raw)) for name, entry in fields.items()}
    end = 8 + len(raw)
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise CheckpointError(f"tensor {name!r} starts at byte {info.offset}, expected {end} (a hole or an overlap)")
        end += info.nbytes
    if end != size:
        raise CheckpointError(f"its tensors end at byte {end}, the file at {size}")
    return Header(tensors, metadata)


def _parse_entry(name: str, entry: object, file: str, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name!r} does not have just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r} has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(f"tensor {name!r} has {what} {str(numbers)[:80]}; expected whole numbers below 2^63")
    # numpy knows 64 axes; longer shapes of ones would make a huge product slow as well.
    if len(shape) > 64 or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointError(f"tensor {name!r} of {dtype} {str(shape)[:80]} has data_offsets {str(offsets)[:80]}, which do not fit")
    return TensorInfo(dtype, tuple(shape), file, start + offsets[0], offsets[1] - offsets[0])


def parse_json(raw: bytes) -> dict:
    """Parses a JSON object that may be hostile: no name twice in one object, no nesting beyond Python's, only real text.

    >>> parse_json(b'{"r": 8}')
    {'r': 8}

    Raises:
      CheckpointError: with the reason.
    """

    def unique(pairs: list) -> dict:
        found = dict(pairs)
        # A lone surrogate is JSON, but no file and no tensor can be called so.
        "".join(text for pair in pairs for text in pair if isinstance(text, str)).encode()
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
        return found

    try:
        if not raw.startswith(b"{"):
            raise CheckpointError("it does not begin with a JSON object")
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is not valid JSON ({str(error)[:200]})") from error
    return fields


def _read_index(path: pathlib.Path) -> tuple[dict[str, str], dict]:
    try:
        check_names(path.parent, {path.name})
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CheckpointError(f"it is larger than {MAX_HEADER_BYTES} bytes")
        fields = parse_json(path.read_bytes())
        weight_map, metadata = fields.get("weight_map"), fields.get("metadata") or {}
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError("weight_map is not an object of file names")
        if not isinstance(metadata, dict):
            raise CheckpointError("metadata is not an object")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a valid index: {error}") from error
    return weight_map, metadata


def check_names(root: pathlib.Path, names: set[str]) -> None:
    """Refuses file names that leave the folder, before any of them is opened."""
    home = pathlib.Path(os.path.realpath(root))
    # A hub cache keeps models--x/snapshots/<revision>/file as a link to models--x/blobs/<hash>.
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    faults = []
    for name in sorted(names):
        parts = pathlib.PurePosixPath(name)
        if "\0" in name or "\\" in name or not parts.parts or parts.is_absolute() or ".." in parts.parts:
            faults.append(f"{name!r}: not a name inside the folder")
            continue
        target = pathlib.Path(os.path.realpath(home / name))
        if not any(target.is_relative_to(r) for r in roots):
            faults.append(f"{name!r}: a link out of the folder, to {target}; copy the file, or link the whole folder")
        elif not os.path.isfile(target):
            faults.append(f"{name!r}: missing; was the download interrupted?")
    raise_all(f"{len(faults)} of {len(names)} files of {root} are refused", describe(faults, str), kind=CheckpointError)


def _check_coverage(root: pathlib.Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    places: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header.tensors:
            places.setdefault(name, []).append(file)
    twice = [n for n, files in places.items() if len(files) > 1]
    missing = [n for n, file in weight_map.items() if file not in places.get(n, ())]
    unlisted = [n for n in places if n not in weight_map]
    faults = describe(twice, lambda n: f"{n!r} is in more than one shard: {places[n]}")
    faults += describe(missing, lambda n: f"{n!r} is not in {weight_map[n]}, where the index places it")
    faults += describe(unlisted, lambda n: f"{n!r} is in {places[n][0]}, but not in the index")
    raise_all(f"{root / INDEX_NAME} and its {len(headers)} shards disagree", faults, kind=CheckpointError)


def _why_nothing_opens(root: pathlib.Path) -> str:
    files = sorted(path.name for path in root.iterdir())
    pickles = [name for name in files if name.endswith(_PICKLES)]
    tensors = [name for name in files if name.endswith(".safetensors")]
    missing = f"{root} has neither {SINGLE_NAME} nor {INDEX_NAME}"
    if "adapter_model.safetensors" in tensors:
        return f"{missing}; it holds an adapter, whose base model is named in its adapter_config.json"
    if tensors:
        return f"{missing}, but {len(tensors)} other safetensors files ({', '.join(tensors[:3])}); shards need their index"
    if pickles:
        return (
            f"{missing}, only pickle files ({', '.join(pickles[:3])}), which run code when they are opened and are never opened here. "
            "Convert them where you trust them: load the model with transformers and torch, then model.save_pretrained(folder)"
        )
    return f"{missing}, nor any other weights; it holds {files[:8]}"
