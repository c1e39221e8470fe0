"""Streaming a checkpoint: every path once, in disk order, quantised weights as one record."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.formats import bnb
from conversion.rules import Rename, Rules, Spelling, plan, same
from conversion.safetensors_io import INDEX_NAME, Checkpoint, open_checkpoint
from conversion.stream import stream

RULES = Rules(
    (Spelling("hub", (Rename("visual", "model.visual"), Rename("model", "model.language_model"), *same("lm_head"))),),
    ties={"lm_head.weight": "model.language_model.embed_tokens.weight"},
)
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "bnb" / "bf16.safetensors"
WANTED = ["model.visual.fc.weight", "model.language_model.embed_tokens.weight", "lm_head.weight"]


def write(folder, *shards):
    weight_map = {}
    for i, tensors in enumerate(shards):
        save_file(tensors, folder / f"m-{i}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"m-{i}.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(folder)


def test_paths_come_with_their_arrays_and_tied_ones_do_not(tmp_path):
    tensors = {"visual.fc.weight": np.ones((2, 3)), "model.embed_tokens.weight": np.zeros((4, 2))}
    checkpoint = write(tmp_path, tensors)
    found = dict(stream(checkpoint, plan(checkpoint.names(), WANTED, RULES, tied=True)))
    assert {p: a.shape for p, a in found.items()} == {WANTED[0]: (2, 3), WANTED[1]: (4, 2)}


def test_each_shard_is_read_once_from_front_to_back(tmp_path, monkeypatch):
    shards = [
        {f"model.{n}.weight": np.ones(2, d) for n, d in zip("dbca", "bdfh", strict=True)},
        {"model.z.weight": np.ones(1), "model.y.weight": np.ones(2)},
    ]
    checkpoint, reads, read = write(tmp_path, *shards), [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.append(self.info(name)) or read(self, name))
    wanted = [f"model.language_model.{n}.weight" for n in "zyabcd"]
    assert len(dict(stream(checkpoint, plan(checkpoint.names(), wanted, RULES)))) == 6
    places = [(info.file, info.offset) for info in reads]
    assert places == sorted(places) and len(places) == 6


@pytest.mark.parametrize("variant", ["nf4", "nf4.double", "fp4", "fp4.double"])
def test_a_4_bit_weight_is_one_record_though_its_companions_are_in_other_shards(tmp_path, variant):
    golden = load_file(GOLDEN)
    parts = {k.replace(f"{variant}.weight", "visual.fc.weight"): v for k, v in golden.items() if k.startswith(f"{variant}.weight")}
    checkpoint = write(tmp_path, *({name: array} for name, array in reversed(parts.items())))
    ((path, q),) = stream(checkpoint, plan(checkpoint.names(), WANTED[:1], RULES))
    assert path == WANTED[0] and isinstance(q, bnb.QuantizedTensor)
    assert bnb.dequantise(q).tobytes() == golden[f"{variant}.dequantised"].tobytes()


def test_an_int8_weight_is_one_record(tmp_path):
    golden = load_file(GOLDEN)
    checkpoint = write(tmp_path, {"visual.fc.SCB": golden["int8.SCB"]}, {"visual.fc.weight": golden["int8.weight"]})
    ((_, q),) = stream(checkpoint, plan(checkpoint.names(), WANTED[:1], RULES))
    assert bnb.dequantise_int8(q).tobytes() == golden["int8.dequantised"].tobytes()


def test_a_plan_of_another_checkpoint_is_refused_before_anything_is_read(tmp_path):
    checkpoint = write(tmp_path, {"visual.fc.weight": np.ones(1)})
    other = plan(["visual.fd.weight"], ["model.visual.fd.weight"], RULES)
    with pytest.raises(ValueError, match="1 of 1 tensors that (.|\n)*'visual.fd.weight'; did you mean 'visual.fc.weight'"):
        stream(checkpoint, other)
