"""Loss, logits and gradients of adapted vision-language models against PEFT, with vision and language switched on and off."""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.adapt import LoRAConfig, attach, attach_from, partition
from jaxlora.data.batches import make_batch
from jaxlora.data.ladder import Shape
from jaxlora.export import save_adapter
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_flags
from jaxlora.train.step import merge_trees
from tests.jaxlora import reference, vision_peft
from tests.jaxlora.models import llava, mllama, qwen_vl
from tests.jaxlora.test_peft_parity import arrays_by_path, assert_same_gradients, forward, gradient_of
from tests.jaxlora.vision_peft import CASES, LIVE_ALONE, MODELS
from tests.tolerances import LOGITS_FP32, LOSS_FP32

LIVE = [
    pytest.param(model_type, case, marks=pytest.mark.oracle)
    for model_type in (*MODELS, *LIVE_ALONE)
    for case in CASES
    if case != "both" or model_type in LIVE_ALONE
]
every_case = pytest.mark.parametrize(("model_type", "case"), [*((model_type, "both") for model_type in MODELS), *LIVE])


def attached(model_type, case):
    """A model with PEFT's adapter, and its trees for a step."""
    loaded = vision_peft.load_reference(model_type)
    config = attach_from(loaded.model, vision_peft.folder(model_type) / case, loaded.spec.rules)
    return loaded, config, partition(loaded.model)


def batch(model_type):
    inputs = {name: array for name, array in vision_peft.inputs(model_type).items() if name != "mm_token_type_ids"}
    tokens = max(qwen_vl.TOKENS, llava.TOKENS)
    shape = Shape(tokens, mllama.PATCHES if model_type == "mllama" else qwen_vl.PATCHES)
    return make_batch([inputs], vision_peft.values(model_type), shape, rows=4, images=qwen_vl.FRAMES)


def logits(model_type, graphdef, *trees):
    micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch(model_type))
    return vision_peft.at_tokens(model_type, forward(graphdef, merge_trees(*trees), micro))


@every_case
def test_loss_and_every_gradient_are_pefts(model_type, case):
    _, _, trees = attached(model_type, case)
    loss, gradient = gradient_of(*trees, batch(model_type), Execution())
    gradient, expected = arrays_by_path(gradient), vision_peft.expected(model_type, case)
    assert abs(float(loss) - float(expected["loss"])) <= LOSS_FP32
    assert all(np.any(array) for array in gradient.values())
    assert_same_gradients(gradient, expected, "random:")


@every_case
def test_adapter_that_peft_wrote_gives_pefts_logits(model_type, case):
    _, _, trees = attached(model_type, case)
    assert np.abs(logits(model_type, *trees) - vision_peft.expected(model_type, case)["logits"]).max() <= LOGITS_FP32


@functools.cache
def live_logits(model_type):
    """Writes every adapter and every merged model, and has the oracle compute all their logits in one process."""
    target = pathlib.Path(tempfile.mkdtemp(prefix="jaxlora-live-"))
    base, jobs, ours = reference.reference_folder(model_type), {}, {}
    np.savez(target / "inputs.npz", **{name: array for name, array in vision_peft.inputs(model_type).items() if name != "labels"})
    for case, towers in CASES.items():
        loaded, config = vision_peft.load_reference(model_type), LoRAConfig(r=3, lora_alpha=5.0, init_lora_weights=False)
        attach(loaded.model, by_flags(linear_paths(loaded.model), **towers), config)
        graphdef, trainable, frozen = partition(loaded.model)
        ours[case] = logits(model_type, graphdef, trainable, frozen)
        save_adapter(target / f"{case}-adapter", trainable=trainable, frozen=frozen, config=config, loaded=loaded)
        jobs[f"{case}-adapter"] = {"base": str(base), "adapter": str(target / f"{case}-adapter"), "inputs": str(target / "inputs.npz")}
    (target / "jobs.json").write_text(json.dumps(jobs))
    reference.run_oracle("compute_logits.py", target / "jobs.json", target)
    theirs = {}
    for job in jobs:
        with np.load(target / f"{job}.npz") as file:
            theirs[job] = vision_peft.at_tokens(model_type, file["logits"])
    return ours, theirs


@pytest.mark.oracle
@every_case
def test_adapter_that_we_wrote_gives_our_logits_in_peft(model_type, case):
    ours, theirs = live_logits(model_type)
    assert np.abs(ours[case] - theirs[f"{case}-adapter"]).max() <= LOGITS_FP32
