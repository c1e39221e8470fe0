"""Reading checkpoints that may be hostile, and writing files that are complete or absent."""

import itertools
import json
import os
import random
import shutil
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from conversion import safetensors_write as write
from conversion.safetensors_io import DTYPES, INDEX_NAME, CheckpointError, open_checkpoint, read_header

PT = {"format": "pt"}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "b.weight": rng.normal(size=(4,)).astype(np.float32),
        "c.weight": rng.integers(0, 255, (7,)).astype(np.uint8),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }


def sharded(folder, layout, weight_map=None):
    for file, tensors in layout.items():
        save_file(tensors, folder / file, PT)
    mapped = weight_map if weight_map is not None else {n: file for file, tensors in layout.items() for n in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def one(name="x", dtype="F32", shape=(2,), offsets=(0, 8)):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


# reading


def test_every_dtype_reads_as_the_library_wrote_it(tmp_path):
    tensors = {name: np.arange(3).astype(dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "model.safetensors", PT)
    checkpoint = open_checkpoint(tmp_path)
    assert {n: bits(checkpoint.read(n)) for n in checkpoint.names()} == {n: bits(t) for n, t in tensors.items()}


def test_scalars_and_empty_tensors_read_as_written(tmp_path):
    save_file(draw(), tmp_path / "model.safetensors", PT)
    checkpoint = open_checkpoint(tmp_path)
    assert {n: bits(checkpoint.read(n)) for n in checkpoint.names()} == {n: bits(t) for n, t in draw().items()}


def test_raw_bytes_are_those_of_the_array(tmp_path):
    save_file(draw(), tmp_path / "model.safetensors", PT)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read_bytes("a.weight") == draw()["a.weight"].tobytes()


def test_shards_are_found_through_the_index(tmp_path):
    sharded(tmp_path, {"m-1.safetensors": {"x": np.ones(2)}, "m-2.safetensors": {"y": np.zeros(3)}})
    checkpoint = open_checkpoint(tmp_path)
    assert [(n, checkpoint.info(n).file) for n in checkpoint.names()] == [("x", "m-1.safetensors"), ("y", "m-2.safetensors")]
    assert checkpoint.metadata == {"m-1.safetensors": PT, "m-2.safetensors": PT}


def test_an_unaligned_header_gives_an_aligned_array(tmp_path):
    header = json.dumps(one()).encode()
    raw_file(tmp_path / "model.safetensors", header + b" " * (len(header) % 2 == 0), np.array([1, 2], np.float32).tobytes())
    array = open_checkpoint(tmp_path).read("x")
    assert array.flags.aligned and array.tolist() == [1, 2]


def test_an_unknown_name_gets_the_nearest(tmp_path):
    save_file(draw(), tmp_path / "model.safetensors", PT)
    with pytest.raises(CheckpointError, match="did you mean 'a.weight'"):
        open_checkpoint(tmp_path).info("a.wieght")


def test_a_file_that_shrinks_after_opening_is_an_error(tmp_path):
    save_file({"x": np.ones(1000)}, tmp_path / "model.safetensors", PT)
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match="bytes early"):
        checkpoint.read("x")


def test_links_into_a_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"x": np.ones(2)}, blobs / "123", PT)
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert open_checkpoint(snapshot).names() == ["x"]


# refusing


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/passwd", "a/../../out.safetensors", "x\0.safetensors", "", ".", "a\\b", "x" * 5000]
)
def test_shard_names_that_leave_the_folder_are_refused(tmp_path, name):
    save_file({"x": np.ones(2)}, tmp_path / "out.safetensors", PT)
    (tmp_path / "m").mkdir()
    sharded(tmp_path / "m", {}, {"x": name})
    with pytest.raises(CheckpointError, match="not a name inside the folder|missing"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", "m-1.safetensors", INDEX_NAME])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / "m"
    folder.mkdir()
    sharded(folder, {"m-1.safetensors": {"x": np.ones(2)}})
    (folder / name).unlink(missing_ok=True)
    save_file({"x": np.ones(2)}, tmp_path / "secret", PT)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        open_checkpoint(folder)


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(tmp_path)


def test_all_missing_shards_are_named(tmp_path):
    sharded(tmp_path, {}, {"x": "m-1.safetensors", "y": "m-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"2 of 2 files(.|\n)*m-1.safetensors(.|\n)*m-2.safetensors"):
        open_checkpoint(tmp_path)


def test_an_index_that_disagrees_with_its_shards_lists_every_tensor(tmp_path):
    layout = {"m-1.safetensors": {"x": np.ones(2), "twice": np.ones(2)}, "m-2.safetensors": {"twice": np.ones(2), "extra": np.ones(1)}}
    sharded(tmp_path, layout, {"x": "m-1.safetensors", "twice": "m-1.safetensors", "gone": "m-2.safetensors"})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    for part in (
        "'twice' is in more than one shard",
        "'gone' is not in m-2.safetensors",
        "'extra' is in m-2.safetensors, but not in the index",
    ):
        assert part in str(caught.value)


def test_a_tensor_that_the_index_places_twice_is_refused(tmp_path):
    sharded(tmp_path, {"m-1.safetensors": {"x": np.ones(2)}})
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"x": "m-1.safetensors", "x": "m-1.safetensors"}}')
    with pytest.raises(CheckpointError, match="'x' appears twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": 1}}', '{"weight_map":' + "[" * 100_000, '{"a": "\\ud800"}']
)
def test_a_malformed_index_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("ending", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_pickle_files_are_never_opened(tmp_path, ending):
    canary = tmp_path / "touched"
    (tmp_path / f"pytorch_model.{ending}").write_bytes(b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match="never opened here. Convert them"):
        open_checkpoint(tmp_path)
    assert not canary.exists()


def test_an_adapter_folder_says_that_it_is_one(tmp_path):
    save_file({"x": np.ones(1)}, tmp_path / "adapter_model.safetensors", PT)
    with pytest.raises(CheckpointError, match="it holds an adapter"):
        open_checkpoint(tmp_path)


def test_shards_without_an_index_say_so(tmp_path):
    save_file({"x": np.ones(1)}, tmp_path / "model-00001-of-00002.safetensors", PT)
    with pytest.raises(CheckpointError, match="shards need their index"):
        open_checkpoint(tmp_path)


HEADERS = {
    "hole": (one() | one("y", offsets=(12, 20)), 20),
    "overlap": (one() | one("y", offsets=(4, 12)), 12),
    "same place twice": (one() | one("y"), 8),
    "short file": (one(), 7),
    "bytes after the end": (one(), 9),
    "size does not follow from the shape": (one(shape=(3,)), 8),
    "backwards": (one(offsets=(8, 0)), 8),
    "negative size": (one(shape=(-2,)), 8),
    "fraction": (one(shape=(2.0,)), 8),
    "true for one": (one(shape=(True, 2)), 8),
    "overflowing product": (one(shape=(2**62, 4)), 8),
    "nan": (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', 8),
    "unknown dtype": (one(dtype="F7"), 8),
    "dtype is a list": ({"x": {"dtype": [], "shape": [2], "data_offsets": [0, 8]}}, 8),
    "more axes than numpy has": (one(shape=[1] * 100 + [2]), 8),
    "entry is a list": ({"x": [1]}, 0),
    "metadata is a number": ({"__metadata__": 3}, 0),
    "metadata holds a number": ({"__metadata__": {"a": 3}}, 0),
    "two tensors of one name": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
    ),
    "deep json": (b'{"x":' + b"[" * 200_000, 0),
    "long number": (b'{"x":' + b"1" * 10_000 + b"}", 0),
    "no utf-8": (b'{"\xff":1}', 0),
    "lone surrogate": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
    "space first": (b" {}", 0),
    "empty": (b"", 0),
}


@pytest.mark.parametrize(("header", "data_bytes"), HEADERS.values(), ids=HEADERS)
def test_a_malformed_header_is_an_error_that_names_the_file(tmp_path, header, data_bytes):
    raw_file(tmp_path / "model.safetensors", header, b"\0" * data_bytes)
    with pytest.raises(CheckpointError, match="model.safetensors is not a valid safetensors file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10_000])
def test_a_header_length_that_the_file_cannot_hold_allocates_nothing(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"claims {length} bytes"):
        open_checkpoint(tmp_path)


def mutate(rng, content):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(content), 420))
        match rng.randrange(4):
            case 0:
                content[place] ^= 1 << rng.randrange(8)
            case 1:
                content[place] = rng.choice(b'0123456789{}[]",:-e')
            case 2:
                del content[place : place + rng.randrange(1, 9)]
            case 3:
                content[place:place] = bytes(rng.choice(b'0123456789"{}[],\\ ') for _ in range(rng.randrange(1, 5)))
    return bytes(content)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "model.safetensors"
    save_file(draw(), path, PT)
    valid, outcomes = path.read_bytes(), {"refused": 0, "read": 0}
    for _ in range(250):
        path.write_bytes(mutate(rng, valid))
        try:
            checkpoint = open_checkpoint(tmp_path)
        except CheckpointError:
            outcomes["refused"] += 1
            continue
        assert {n: bits(checkpoint.read(n)) for n in checkpoint.names()} == {n: bits(t) for n, t in load_file(path).items()}
        outcomes["read"] += 1
    # Flips inside the data, and in names, leave a valid file.
    assert outcomes["refused"] > 100 and outcomes["read"] > 0


# writing


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
