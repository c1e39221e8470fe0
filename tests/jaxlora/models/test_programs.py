"""Programs: one for all batches of a shape, and of 40 layers no more than their kinds ask for."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.models import llama, mllama
from jaxlora.models.mllama import Mllama
from jaxlora.models.text import CausalLM
from jaxlora.nn.attention import Vision
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import Run, Scan
from tests.jaxlora import reference, vision_peft

TOKENS, IMAGES = 64, 8
# Those of one row's images: two images, or in mllama one row of tiles.
OF_IMAGES = ("pixel_values", "image_sizes", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")


def inputs_of(name, rows):
    """The reference's rows with their images; the first has two, the second none."""
    given = {key: array for key, array in vision_peft.inputs(name).items() if key != "mm_token_type_ids"}
    if rows == slice(None):
        return given
    made = {key: given[key][rows] for key in ("input_ids", "attention_mask")}
    if rows == slice(1, 2):
        return made
    if "image_grid_thw" in given:
        grids = given["image_grid_thw"][:2]
        return {**made, "image_grid_thw": grids, "pixel_values": given["pixel_values"][: grids.prod(-1).sum()]}
    images = 1 if "aspect_ratio_ids" in given else 2
    return {**made, **{key: given[key][:images] for key in OF_IMAGES if key in given}}


@pytest.mark.parametrize("name", vision_peft.MODELS)
def test_batches_of_one_shape_are_one_program_whatever_their_rows_and_images_are(name):
    spec = reference.spec_of(name)
    config = reference.config_of(name)
    graphdef, state = nnx.split(spec.build(spec.read(config), dtype=jnp.float32))
    values, traced = spec.values(config), []

    @jax.jit
    def hidden(state, batch):
        traced.append(batch.input_ids.shape)
        return nnx.merge(graphdef, state)(batch, Execution())[0]

    def run(rows, tokens):
        batch = make_batch([inputs_of(name, rows)], values, Shape(tokens, 416), rows=4, images=IMAGES)
        jax.eval_shape(hidden, state, jax.tree.map(lambda a: a[0], batch))

    for rows in (slice(None), slice(1, 2), slice(0, 1)):
        run(rows, TOKENS)
    assert len(traced) == 1
    run(slice(0, 1), 2 * TOKENS)
    assert len(traced) == 2


TEXT = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}


def mllama_decoder(depth, crossing):
    """Llama 3.2 11B Vision's decoder with that many layers, of which ``crossing`` attend to images."""
    own = {"num_hidden_layers": depth, "cross_attention_layers": list(crossing)}
    raw = {"model_type": "mllama", "text_config": {**TEXT, **own}, "vision_config": {"image_size": 560}}
    return Mllama(mllama.read(raw)).model.language_model


def program(module, vision):
    """(text of the lowered program, seconds of tracing and lowering) of a decoder's forward and backward pass over abstract weights.

    Timed at the second time, when what programs share was traced by whichever came first.
    """
    graphdef, state = nnx.split(module)
    x, ids = jax.ShapeDtypeStruct((1, 2048, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    seen = jax.ShapeDtypeStruct((1, 4 * 1601, 4096), jnp.bfloat16) if vision else None

    def loss(x, state, ids, seen):
        segments = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 2048)
        options = {} if seen is None else {"vision": Vision(seen, ids, ids)}
        return nnx.merge(graphdef, state)(x, ids, segments, Execution(scan=Scan(checkpoint=True)), **options)[0].astype(jnp.float32).sum()

    for _ in range(2):
        started = time.perf_counter()
        # Another function to jax, which would answer from its cache.
        lowered = jax.jit(lambda *given: jax.grad(loss)(*given)).lower(x, state, ids, seen)
    return lowered.as_text(), time.perf_counter() - started


def plain_decoder():
    """A Llama of 40 layers of the same sizes."""
    return CausalLM(llama.read({**TEXT, "model_type": "llama", "num_hidden_layers": 40})).model


def test_forty_layers_of_mllama_are_one_period_of_five_and_the_program_of_a_layer_of_each_kind():
    whole = mllama_decoder(40, range(3, 40, 5))
    assert whole.layers.runs == (Run(start=0, period=5, repeats=8),)
    one_of_each, of_llama, ours = program(mllama_decoder(2, [1]), True), program(plain_decoder(), False), program(whole, True)
    for name, other in (("one layer of each kind", one_of_each), ("40 layers of Llama", of_llama)):
        size, seconds = len(ours[0]) / len(other[0]), ours[1] / other[1]
        print(f"40 layers of mllama are {size:.2f} x the program of {name}, traced in {seconds:.2f} x its time")
    # Beside what the kinds share, cross-attention is a program of its own, over other keys; all layers of a kind share one.
    assert len(ours[0]) <= 1.2 * len(one_of_each[0])
    assert len(ours[0]) <= 1.9 * len(of_llama[0])


def test_layers_of_different_kinds_have_one_mlp_in_the_program():
    def products(text):
        return [line for line in text.splitlines() if "stablehlo.dot_general" in line and "14336" in line]

    ours, of_llama = program(mllama_decoder(40, range(3, 40, 5)), True)[0], program(plain_decoder(), False)[0]
    assert len(products(ours)) == len(products(of_llama)) > 0


def test_self_and_cross_attention_share_what_a_pair_of_blocks_is_computed_by():
    def products(text):
        return [line for line in text.splitlines() if "stablehlo.dot_general" in line and "batching_dims" in line]

    ours, of_llama = program(mllama_decoder(40, range(3, 40, 5)), True)[0], program(plain_decoder(), False)[0]
    assert len(products(ours)) == len(products(of_llama)) > 0
