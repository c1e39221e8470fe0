"""Programs: one for all batches of a shape, and of 40 layers no more than their kinds ask for."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxlora.adapt import LoRAConfig, attach, partition, select_from
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.models import llama, mllama
from jaxlora.models.mllama import Mllama
from jaxlora.models.text import CausalLM
from jaxlora.nn.attention import Vision
from jaxlora.nn.decoder import Execution
from jaxlora.nn.scan import Run, Scan
from jaxlora.nn.stack import edit_linears
from jaxlora.select import by_flags
from jaxlora.train.remat import execution
from jaxlora.train.step import merge_trees
from jaxlora.weights.int4 import Int4
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
NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
CROSSING = range(3, 40, 5)


def mllama_decoder(depth, crossing, sizes=TEXT):
    """Llama 3.2 11B Vision's decoder with that many layers, of which ``crossing`` attend to images."""
    own = {"num_hidden_layers": depth, "cross_attention_layers": list(crossing)}
    raw = {"model_type": "mllama", "text_config": {**sizes, **own}, "vision_config": {"image_size": 560}}
    return Mllama(mllama.read(raw)).model.language_model


def plain_decoder(sizes=TEXT):
    """A Llama of 40 layers of the same sizes."""
    return CausalLM(llama.read({**sizes, "model_type": "llama", "num_hidden_layers": 40})).model


def loss_of(decoder, execution, x, ids, seen):
    segments = jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 2048)
    options = {} if seen is None else {"vision": Vision(seen, ids, ids)}
    return decoder(x, ids, segments, execution, **options)[0].astype(jnp.float32).sum()


def given(sizes, vision):
    """(x, ids, vision states) of a row, as shapes."""
    width, four_tiles = sizes["hidden_size"], 4 * 1601
    x, ids = jax.ShapeDtypeStruct((1, 2048, width), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    return x, ids, jax.ShapeDtypeStruct((1, four_tiles, width), jnp.bfloat16) if vision else None


def program(module, vision):
    """The text of the lowered program of a decoder's forward and backward pass by its input, over abstract weights."""
    graphdef, state = nnx.split(module)

    def loss(x, state, ids, seen):
        return loss_of(nnx.merge(graphdef, state), Execution(scan=Scan(checkpoint=True)), x, ids, seen)

    x, ids, seen = given(TEXT, vision)
    return jax.jit(jax.grad(loss)).lower(x, state, ids, seen).as_text()


def adapted(build, weights):
    """(graphdef, trainable, frozen) of a decoder with an adapter on every Linear; the trees as shapes."""
    graphdefs = []

    def trees():
        decoder = build()
        if weights is not None:
            edit_linears(decoder, lambda path, linear: linear.weight.set_value(weights.abstract(linear.features, jnp.bfloat16)))
        nnx.update(decoder, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), nnx.state(decoder)))
        attach(decoder, select_from(decoder, by_flags), LoRAConfig(r=16))
        graphdef, trainable, frozen = partition(decoder)
        graphdefs.append(graphdef)
        return trainable, frozen

    trainable, frozen = jax.eval_shape(trees)
    return graphdefs[0], trainable, frozen


def equations(jaxpr, seen):
    """How many equations were traced: those of a function that is called more than once count once."""
    if id(jaxpr) in seen:
        return 0
    seen[id(jaxpr)] = jaxpr
    return sum(1 + sum(equations(inner, seen) for inner in jaxprs_in_params(eqn.params)) for eqn in jaxpr.eqns)


def sizes_of(build, weights, vision):
    """{measure: size} of the program of a training step of a decoder's adapters, without the head and the optimizer."""
    graphdef, trainable, frozen = adapted(build, weights)

    def loss(trainable, x, frozen, ids, seen):
        return loss_of(nnx.merge(graphdef, merge_trees(trainable, frozen)), execution(True), x, ids, seen)

    x, ids, seen = given(NARROW, vision)
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(trainable, x, frozen, ids, seen)
    text = traced.lower().as_text()
    return {"characters": len(text), "operations": text.count(" = "), "equations": equations(traced.jaxpr.jaxpr, {})}


@pytest.mark.parametrize("weights", [None, Int4], ids=["bf16", "int4"])
def test_forty_layers_of_mllama_are_at_most_one_and_a_half_times_the_program_of_forty_layers_of_llama(weights):
    ours = sizes_of(lambda: mllama_decoder(40, CROSSING, NARROW), weights, True)
    of_llama = sizes_of(lambda: plain_decoder(NARROW), weights, False)
    ratios = {measure: round(ours[measure] / of_llama[measure], 3) for measure in ours}
    assert max(ratios.values()) <= 1.5, ratios


def test_forty_layers_of_mllama_are_one_period_of_five_and_the_program_of_a_layer_of_each_kind():
    whole = mllama_decoder(40, CROSSING)
    assert whole.layers.runs == (Run(start=0, kinds=(0, 0, 0, 1, 0), repeats=8),)
    assert len(program(whole, True)) <= 1.2 * len(program(mllama_decoder(2, [1]), True))


def test_layers_of_different_kinds_have_one_mlp_in_the_program():
    lines = [line for line in program(mllama_decoder(40, CROSSING), True).splitlines() if "stablehlo.dot_general" in line]
    # y, dx and the dW that nothing reads, of three Linears: the backward computes y by the function that the forward does.
    assert sum("14336" in line for line in lines) == 3 * 3


def test_self_and_cross_attention_share_what_a_pair_of_blocks_is_computed_by():
    lines = [line for line in program(mllama_decoder(40, CROSSING), True).splitlines() if "stablehlo.dot_general" in line]
    # Forward logits and output, which the backward computes once more; logits again, dp, dq, dk and dv.
    assert sum("batching_dims" in line for line in lines) == 2 + 5
