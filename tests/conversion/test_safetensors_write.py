"""Writing files and folders that are complete or absent, and byte for byte the library's."""

import itertools
import os
import shutil
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from conversion import safetensors_write as write
from conversion.safetensors_io import DTYPES, CheckpointError, open_checkpoint, read_header
from tests.conversion.checkpoints import PT, draw, sharded


def pending(tensors):
    return [write.Pending(n, next(k for k, d in DTYPES.items() if d == t.dtype), t.shape, lambda t=t: t) for n, t in tensors.items()]


def test_a_written_file_is_byte_for_byte_the_librarys(tmp_path):
    tensors = draw() | {f"d{i}": np.ones(3).astype(d) for i, d in enumerate(DTYPES.values())} | {"größe": np.ones(1, np.int8)}
    write.write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", PT)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_that_are_not_contiguous_are_written_in_order(tmp_path):
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    write.write_safetensors(tmp_path / "x", {"t": w.T, "s": w[:, ::2]})
    found = load_file(tmp_path / "x")
    assert found["t"].tolist() == w.T.tolist() and found["s"].tolist() == w[:, ::2].tolist()


def test_all_tensors_that_are_empty_or_not_finite_are_refused_at_once(tmp_path):
    bad = {
        "ok": np.ones(2, np.int32),
        "nan": np.array([1, np.nan], np.float32),
        "inf": np.array([np.inf, 0, 1], ml_dtypes.bfloat16),
    }
    with pytest.raises(ValueError, match=r"2 of the 3(.|\n)*nan: 1 of 2 values(.|\n)*inf: 1 of 3 values"):
        write.write_safetensors(tmp_path / "x", bad, require_finite=True)
    with pytest.raises(ValueError, match=r"empty: shape \[0, 3\] has no elements"):
        write.write_safetensors(tmp_path / "x", draw(), require_nonempty=True)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x: dtype complex128"):
        write.write_safetensors(tmp_path / "x", {"x": np.ones(1, np.complex128)})


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write.write_safetensors(tmp_path / "x", {"old": np.ones(2)})
    sums = itertools.count()
    monkeypatch.setattr(write.zlib, "crc32", lambda data, start=0: next(sums))
    with pytest.raises(CheckpointError, match="reads back differently"):
        write.write_safetensors(tmp_path / "x", {"new": np.arange(1000.0)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and list(load_file(tmp_path / "x")) == ["old"]


def test_an_unchanged_shard_is_byte_identical_to_its_source(tmp_path):
    (tmp_path / "a").mkdir()
    sharded(tmp_path / "a", {"m-1.safetensors": draw(1), "m-2.safetensors": {"z": np.ones(5)}})
    source = open_checkpoint(tmp_path / "a")
    shards = []
    for file, metadata in source.metadata.items():
        infos = {n: source.info(n) for n in source.names() if source.info(n).file == file}
        tensors = [write.Pending(n, i.dtype, i.shape, lambda n=n: source.read_bytes(n)) for n, i in infos.items()]
        shards.append(write.Shard(file, tensors, metadata))
    write.write_checkpoint(tmp_path / "b", shards, index_metadata=source.index_metadata)
    for file in source.metadata:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    copy = open_checkpoint(tmp_path / "b")
    assert copy.names() == source.names() and copy.index_metadata == {"total_size": sum(source.info(n).nbytes for n in source.names())}


def test_only_one_tensor_is_alive_while_writing(tmp_path):
    class Array(np.ndarray):
        alive = most = 0

        def __del__(self):
            Array.alive -= 1

    def make():
        array = np.ones(1000).view(Array)
        Array.alive += 1
        Array.most = max(Array.most, Array.alive)
        return array

    tensors = [write.Pending(f"t{i}", "F64", (1000,), make) for i in range(5)]
    write.write_checkpoint(tmp_path / "m", [write.Shard("model.safetensors", tensors)])
    assert Array.most == 1


def shard(**tensors):
    return [write.Shard("model.safetensors", pending(tensors))]


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="say overwrite=True"):
        write.write_checkpoint(tmp_path, shard(x=np.ones(1)))


def test_overwriting_replaces_the_weights_and_keeps_other_files(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    sharded(folder, {"m-1.safetensors": {"old": np.ones(2)}})
    (folder / "note.txt").write_text("mine")
    write.write_checkpoint(folder, shard(new=np.ones(1)), files={"config.json": b"{}"}, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "note.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and open_checkpoint(folder).names() == ["new"]


def test_a_failure_while_overwriting_leaves_the_old_folder_whole(tmp_path):
    write.write_checkpoint(tmp_path / "m", shard(old=np.ones(1)))

    def fail():
        raise RuntimeError("no power")

    broken = [write.Shard("model.safetensors", [*pending({"new": np.ones(3)}), write.Pending("y", "F64", (1,), fail)])]
    with pytest.raises(RuntimeError, match="no power"):
        write.write_checkpoint(tmp_path / "m", broken, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and open_checkpoint(tmp_path / "m").names() == ["old"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**29))
    tensors = [write.Pending("x", "F32", (2**28,), lambda: b"")]
    with pytest.raises(OSError, match=r"0.50 GiB free, but 1.00 GiB are needed"):
        write.write_checkpoint(tmp_path / "m", [write.Shard("model.safetensors", tensors)])
    assert not list(tmp_path.iterdir())


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    shards = [write.Shard(f"m-{i}.safetensors", pending({"x": np.ones(1)})) for i in range(2)]
    with pytest.raises(ValueError, match="1 tensors are in more than one shard"):
        write.write_checkpoint(tmp_path / "m", shards)


@pytest.mark.parametrize("content", [np.ones(3), np.ones(2, np.float32), b"1234567"])
def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="x: expected"):
        write.write_checkpoint(tmp_path / "m", [write.Shard("model.safetensors", [write.Pending("x", "F64", (2,), lambda: content)])])


def test_every_file_is_synced_before_the_folder_is_renamed(tmp_path, monkeypatch):
    calls = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle):
        calls.append(os.readlink(f"/proc/self/fd/{handle}"))
        real_sync(handle)

    def replace(source, target):
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write.write_checkpoint(tmp_path / "m", shard(x=np.ones(1)), files={"config.json": b"{}"})
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") :]
    assert {os.path.basename(c) for c in before} >= {"model.safetensors", "config.json"}
    assert after == ["rename", str(tmp_path)]


def test_the_library_opens_a_file_written_without_metadata(tmp_path):
    write.write_safetensors(tmp_path / "x", {"a": np.ones(1)}, None)
    with safetensors.safe_open(tmp_path / "x", "numpy") as file:
        assert file.metadata() is None
    assert read_header(tmp_path / "x").metadata is None
