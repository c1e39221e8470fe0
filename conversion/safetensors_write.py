"""Writes safetensors files and sharded folders, one tensor in memory at a time, and reads them back before they count."""

import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import safetensors

from conversion._faults import describe, raise_all
from conversion.atomic import new_file, new_folder
from conversion.safetensors_io import DTYPES, INDEX_NAME, CheckpointError, read_header

_CHUNK_BYTES = 16 * 2**20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Old transformers refuse a file without it.
_PT = {"format": "pt"}


class Pending(NamedTuple):
    """A tensor that is made when it is written: name, safetensors dtype ("BF16"), shape, and a function that gives its array or bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray | bytes]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * DTYPES[self.dtype].itemsize


class Shard(NamedTuple):
    """One file to write: its name, its tensors in order, and its header's metadata (None for none)."""

    file: str
    tensors: Sequence[Pending]
    metadata: Mapping[str, str] | None = _PT


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = _PT,
    *,
    require_finite: bool = False,
    require_nonempty: bool = False,
) -> None:
    """Writes one file, byte for byte as the safetensors library would; it replaces ``path`` only after it was read back.

    Raises:
      ValueError: for a dtype that the format lacks, and where asked for tensors without elements or with values that are
        not finite: all of them in one error.
    """
    faults = [f"{n}: dtype {t.dtype} is not one of safetensors'" for n, t in tensors.items() if t.dtype not in _NAMES]
    if require_nonempty:
        faults += [f"{n}: shape {list(t.shape)} has no elements" for n, t in tensors.items() if t.size == 0]
    if require_finite and not faults:
        # ml_dtypes' floats have kind V, so their own test is asked.
        counts = {n: int(t.size - np.isfinite(t).sum()) for n, t in tensors.items()}
        faults += [f"{n}: {bad} of {tensors[n].size} values are not finite" for n, bad in counts.items() if bad]
    raise_all(f"{len(faults)} of the {len(tensors)} tensors for {path} are refused", faults)
    # The library's order: widest first, so that every tensor is aligned, then by name.
    order = sorted(tensors, key=lambda n: (-list(DTYPES).index(_NAMES[tensors[n].dtype]), n))
    pending = [Pending(n, _NAMES[tensors[n].dtype], tensors[n].shape, lambda n=n: tensors[n]) for n in order]
    with new_file(path) as temporary:
        _write_file(temporary, pending, metadata)


def write_shards(folder: str | os.PathLike, shards: Sequence[Shard], *, index_metadata: Mapping[str, object] | None = None) -> None:
    """Writes shards into an existing folder, and their index if there are several or ``index_metadata`` is given.

    A shard whose tensors, order and metadata are its source's is byte-identical to it, if the safetensors library wrote that.
    ``index_metadata``'s ``total_size`` is computed; its other entries are kept.

    Raises:
      ValueError: if a name is in two shards, or bytes of the wrong length arrive.
    """
    folder = pathlib.Path(folder)
    names = [p.name for shard in shards for p in shard.tensors]
    doubles = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
    raise_all(f"{len(doubles)} tensors are in more than one shard", describe(doubles, repr))
    for shard in shards:
        _write_file(folder / shard.file, shard.tensors, shard.metadata)
    if len(shards) > 1 or index_metadata is not None:
        total = sum(p.nbytes for shard in shards for p in shard.tensors)
        weight_map = {p.name: shard.file for shard in shards for p in shard.tensors}
        index = {"metadata": {**(index_metadata or {}), "total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_checkpoint(
    folder: str | os.PathLike,
    shards: Sequence[Shard],
    *,
    files: Mapping[str, bytes] | None = None,
    index_metadata: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a whole checkpoint: the shards, their index and other files (config.json, …); it exists only when complete.

    Raises:
      FileExistsError: if the folder is not empty and ``overwrite`` is False.
      OSError: if the disk is too full, before anything is written.
      ValueError: as ``write_shards``.
    """
    # Every header is under a kilobyte and 256 bytes a tensor.
    needed = sum(p.nbytes + 256 for shard in shards for p in shard.tensors) + 1024 * len(shards)
    needed += sum(len(content) for content in (files or {}).values())
    with new_folder(folder, overwrite=overwrite, needed_bytes=needed) as temporary:
        write_shards(temporary, shards, index_metadata=index_metadata)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)


def _write_file(path: pathlib.Path, tensors: Sequence[Pending], metadata: Mapping[str, str] | None) -> None:
    header, sums = _header(tensors, metadata), {}
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for pending in tensors:
            sums[pending.name] = _write_tensor(file, pending)
        file.flush()
        os.fsync(file.fileno())
    _verify(path, tensors, sums)


def _header(tensors: Sequence[Pending], metadata: Mapping[str, str] | None) -> bytes:
    fields: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for pending in tensors:
        offsets = [end, end + pending.nbytes]
        fields[pending.name] = {"dtype": pending.dtype, "shape": list(pending.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _write_tensor(file: BinaryIO, pending: Pending) -> int:
    content = pending.read()
    if isinstance(content, np.ndarray):
        if content.shape != pending.shape or content.dtype != DTYPES[pending.dtype]:
            got = f"{content.dtype} {list(content.shape)}"
            raise ValueError(f"{pending.name}: expected {pending.dtype} {list(pending.shape)}, got {got}")
        content = np.ascontiguousarray(content).reshape(-1).view(np.uint8).data if content.size else b""
    if len(content) != pending.nbytes:
        raise ValueError(f"{pending.name}: expected {pending.nbytes} bytes for {pending.dtype} {list(pending.shape)}, got {len(content)}")
    file.write(content)
    return zlib.crc32(content)


def _verify(path: pathlib.Path, tensors: Sequence[Pending], sums: Mapping[str, int]) -> None:
    """Compares the file with what was meant: names, dtypes and shapes as the library reads them, and every tensor's checksum."""
    with safetensors.safe_open(path, "numpy") as library:
        found = {n: (library.get_slice(n).get_dtype(), tuple(library.get_slice(n).get_shape())) for n in library.keys()}
    faults = [] if found == {p.name: (p.dtype, p.shape) for p in tensors} else ["names, dtypes or shapes differ from what was written"]
    with open(path, "rb") as file:
        for name, info in read_header(path).tensors.items():
            file.seek(info.offset)
            total, left = 0, info.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    break
                total, left = zlib.crc32(chunk, total), left - len(chunk)
            if left or total != sums.get(name):
                faults.append(f"{name!r} does not have the bytes that were written")
    raise_all(f"{path} was written, but reads back differently (a faulty disk?)", faults, kind=CheckpointError)
