"""What the Qwen-VL towers share, most of it shown on Qwen2-VL: padding, shards, remat, dropout, and what its config refuses."""

import dataclasses
import functools
import json

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlora.models.qwen2_vl import SPEC
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten_leaves
from jaxlora.select import by_flags, by_pattern
from jaxlora.train.remat import execution
from tests.jaxlora import reference
from tests.jaxlora.models import qwen_vl
from tests.jaxlora.models.qwen_vl import USED, features_of, inputs_of, logits_of, square_loss
from tests.tolerances import LOGITS_FP32, PACKED_FP32, SENSITIVITY

NAME = "qwen2_vl"
micro = functools.partial(qwen_vl.micro, NAME)


def text_only():
    return micro({"input_ids": inputs_of(NAME)["input_ids"][1:2, :9]}, patches=0, rows=1)


@pytest.fixture(scope="module")
def model():
    return qwen_vl.shared_model(NAME)


@pytest.fixture(scope="module")
def run():
    return qwen_vl.runner(NAME)


def test_the_reference_rule_for_videos_is_the_default_and_differs(run):
    ours, theirs = run(micro(values=qwen_vl.values_of(NAME))), run(micro())
    assert np.array_equal(ours[:3], theirs[:3])
    assert np.abs(ours[3] - theirs[3]).max() > SENSITIVITY


def test_padding_patches_take_no_gradient_and_others_do(model):
    batch = micro()

    @jax.jit
    @jax.grad
    def gradient(patches):
        return jnp.square(logits_of(model, dataclasses.replace(batch, patches=patches))).sum()

    norms = jnp.linalg.norm(gradient(batch.patches)[0], axis=-1)
    assert (norms[:USED] > 0).all() and (norms[USED:] == 0).all()


@pytest.mark.parametrize("model_type", qwen_vl.FAMILY)
def test_data_shards_change_nothing(model_type):
    one, two = (qwen_vl.runner(model_type)(qwen_vl.micro(model_type, shards=shards)) for shards in (1, 2))
    assert np.abs(one - two).max() <= LOGITS_FP32


def test_remat_changes_nothing(model):
    batch = micro()
    again = logits_of(model, batch, execution(True))
    assert np.abs(again - logits_of(model, batch)).max() <= PACKED_FP32


def test_patches_that_are_no_multiple_of_a_feature_are_refused(model):
    with pytest.raises(ValueError, match="210 patches a shard, which is no multiple of the 4"):
        features_of(model, micro(patches=210))


def scans_of_tower(function, *arguments):
    """How many scans of a jaxpr carry the tower's state, [P, W, 40]."""

    def carries(equation):
        shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
        return equation.primitive.name == "scan" and any(len(shape) == 3 and shape[-1] == 40 for shape in shapes)

    def count(jaxpr):
        inner = [inner for equation in jaxpr.eqns for inner in jax.extend.core.jaxprs_in_params(equation.params)]
        return sum(map(carries, jaxpr.eqns)) + sum(map(count, inner))

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_the_tower_runs_only_where_there_are_patches(model):
    runs = [scans_of_tower(lambda batch: logits_of(model, batch), batch) for batch in (micro(), text_only())]
    assert runs == [1, 0]


@pytest.mark.parametrize(("vision", "scans"), [(False, 1), (True, 2)])
def test_a_frozen_tower_has_no_backward(vision, scans):
    graphdef, trainable, frozen = qwen_vl.adapted(NAME, lambda paths: by_flags(paths, vision=vision))
    assert scans_of_tower(jax.grad(square_loss(graphdef, frozen, micro())), trainable) == scans


DROPPING = [(NAME, target) for target in ("qkv", "merger.mlp.0", "k_proj", "down_proj")]
DROPPING += [("qwen2_5_vl", "gate_proj"), ("qwen3_vl", "deepstack_merger_list.1.linear_fc2"), ("qwen3_vl", "linear_fc1")]


@pytest.mark.parametrize(("model_type", "target"), DROPPING)
def test_dropout_of_one_kind_of_linear_alone_follows_its_key(model_type, target):
    graphdef, trainable, frozen = qwen_vl.adapted(model_type, lambda paths: by_pattern(paths, [target]), dropout=0.5)
    batch = qwen_vl.micro(model_type)
    loss = jax.jit(lambda key: square_loss(graphdef, frozen, batch, Execution(dropout_key=key))(trainable))
    a, again, b = (loss(jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == again != b


def test_an_untied_head_is_a_weight_of_its_own():
    built = SPEC.build(SPEC.read({**SPEC.tiny, "tie_word_embeddings": False}))
    assert flatten_leaves(nnx.to_pure_dict(nnx.state(built)))["lm_head.weight"].shape == (331, 72)


def test_a_tie_flag_inside_the_text_config_ties():
    raw = json.loads((reference.reference_folder(NAME) / "config_v5.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = raw.pop("tie_word_embeddings")
    assert SPEC.read(raw).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_qk_norm": True}, "use_qk_norm = True is unknown"),
        ({"head_dim": 16}, "head_dim = 16 is not implemented"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 3]}}, "has 7 frequencies, expected 6"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 3], "mrope_interleaved": True}}, "mrope_interleaved = True"),
        ({"vision": {"hidden_act": "gelu"}}, "hidden_act = 'gelu' is not implemented"),
        ({"vision": {"window_size": 112}}, "window_size = 112 is unknown"),
        ({"vision": {"in_chans": 1}}, "in_chans = 1 is not implemented"),
        ({"vision": {"hidden_size": 40}}, "the tower's output is 40, the text model's 72"),
        ({"vision": {"num_heads": 4}}, "head size 10 must be a multiple of 4"),
        ({"vision": {"num_heads": 3}}, "embed_dim=40 must be a multiple of num_heads=3"),
    ],
)
def test_what_is_not_modelled_is_refused(change, message):
    vision = {**SPEC.tiny["vision_config"], **change.pop("vision", {})}
    with pytest.raises(ValueError) as caught:
        SPEC.read({**SPEC.tiny, **change, "vision_config": vision})
    assert message in str(caught.value)
