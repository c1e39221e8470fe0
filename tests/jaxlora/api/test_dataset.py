"""Sources and batches: one program for each shape of a run."""

import jax.numpy as jnp
import optax
import pytest

from jaxlora.api.collator import UnslothVisionDataCollator
from jaxlora.api.dataset import Batches, CollatedSource
from jaxlora.data.inputs import ModelValues
from jaxlora.data.positions import VisionValues
from jaxlora.data.processors import load_processor
from jaxlora.nn.decoder import Execution
from jaxlora.recipes.tiny_tokenizer import make_tokenizer
from jaxlora.train.step import make_step
from tests.jaxlora.api.conftest import picture
from tests.jaxlora.train import toy

IMAGES = (0, 1, 7, 1, 0, 2, 12, 2)


def row(images, height=56):
    question = [{"type": "text", "text": "total? " * (1 + images % 3)}, *[{"type": "image", "image": picture(0, height, 56)}] * images]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "It is 4."}]}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(make_tokenizer(tmp_path_factory.mktemp("processor"), "qwen2_vl"), "qwen2_vl")


def source(rows, processor):
    vision = VisionValues(image_token_id=processor.image_token_id, patch_size=14, merge_size=2, patch_elements=1176)
    collator = UnslothVisionDataCollator({"max_seq_length": 2048}, processor, resize="max")
    return CollatedSource(rows, collator), ModelValues(pad_token_id=0, vision=vision)


@pytest.fixture(scope="module")
def made(processor):
    return source([row(n) for n in IMAGES], processor)


@pytest.fixture
def batches(made):
    return Batches(*made, rows=1, accumulate=1, seed=0, shuffle=False)


def test_the_room_for_frames_is_that_of_the_rows_with_most(made):
    batches = Batches(*made, rows=2, accumulate=1, seed=0)
    assert batches.frames == 12 + 7
    assert batches.batch([2, 6]).patch_segment_lengths[0, 0].astype(bool).sum() == 12 + 7


def test_images_of_one_size_are_frames_alike_in_every_step(batches, processor):
    of_one, of_two = ([batch for _, batch in zip(range(len(IMAGES)), each, strict=False)] for each in (batches, mixed(processor)))
    assert {shape.frame for shape in batches.shapes} == {16} and all(batch.patch_segment_starts is None for batch in of_one)
    assert {shape.frame for shape in mixed(processor).shapes} == {None}
    assert all(batch.patches is None or batch.patch_segment_starts is not None for batch in of_two)


def mixed(processor):
    return Batches(*source([row(n, 56 + 28 * (n % 2)) for n in IMAGES], processor), rows=1, accumulate=1, seed=0, shuffle=False)


def test_rows_that_are_alike_by_their_mean_alone_are_segments(processor):
    different = {"messages": [{"role": "user", "content": [row(1, height)["messages"][0]["content"][1] for height in (56, 112)]}]}
    different["messages"].append(row(1)["messages"][1])
    batches = Batches(*source([row(1, 84), different], processor), rows=1, accumulate=1, seed=0, shuffle=False)
    assert {shape.frame for shape in batches.shapes} == {24}
    alike, apart = (batches.batch([i]) for i in range(2))
    assert alike.patch_segment_starts is None
    assert apart.patch_segment_lengths[0, 0].tolist() == [16, 32]


def test_an_epoch_of_mixed_rows_compiles_one_program_a_shape(batches):
    graphdef, trainable, frozen = toy.parts()
    step = make_step(graphdef, optax.sgd(0.0), Execution())
    state, pairs = (toy.copied(trainable), optax.sgd(0.0).init(trainable)), set()
    for i, batch in zip(range(batches.steps_per_epoch), batches, strict=False):
        *state, _ = step(*state, frozen, batch, jnp.int32(i))
        pairs.add((batch.input_ids.shape[-1], 0 if batch.patches is None else batch.patches.shape[2]))
    assert 1 < len(pairs) <= len(batches.shapes)
    assert step._cache_size() == len(pairs)
