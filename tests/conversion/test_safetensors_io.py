"""Reading checkpoints that may be hostile: opened as the library would, or refused with the reason."""

import json
import os
import random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.safetensors_io import DTYPES, INDEX_NAME, CheckpointError, open_checkpoint
from tests.conversion.checkpoints import PT, draw, sharded


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
    "same place twice in a file of the right length": (one() | one("y"), 16),
    "hole in a file of the right length": (one() | one("y", offsets=(12, 20)), 16),
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
