"""Whatever names a checkpoint has, it loads to the same bits and is written again as it was."""

import json

import numpy as np
import pytest
from flax import nnx

from conversion.safetensors_io import open_checkpoint
from conversion.safetensors_write import write_safetensors
from jaxlora.adapt import partition
from jaxlora.export import save_merged
from jaxlora.load import LoadConfig, load
from jaxlora.nn.stack import flatten
from jaxlora.weights.dense import Dense
from tests.jaxlora import reference
from tests.jaxlora.models import llava_configs, qwen_vl

NAMES = ("gemma3", "mllama", *qwen_vl.FAMILY, *llava_configs.CONFIGS)
# Tensors that must be there under these names.
KNOWN = {
    "hub": {
        "gemma3": ("language_model.model.norm.weight", "vision_tower.vision_model.post_layernorm.weight"),
        "mllama": ("language_model.model.norm.weight", "vision_model.class_embedding"),
        "qwen2_vl": ("model.norm.weight", "visual.merger.mlp.0.weight"),
        "qwen3_vl": ("model.language_model.norm.weight", "model.visual.merger.linear_fc1.weight"),
        "llava": ("language_model.model.norm.weight", "vision_tower.vision_model.pre_layrnorm.weight", "language_model.lm_head.weight"),
    },
    "v5": {
        "gemma3": ("model.language_model.norm.weight", "model.vision_tower.post_layernorm.weight"),
        "mllama": ("model.language_model.norm.weight", "model.vision_model.class_embedding"),
        "qwen2_5_vl": ("model.language_model.norm.weight", "model.visual.merger.mlp.0.weight"),
        "mistral3": ("model.language_model.norm.weight", "model.multi_modal_projector.patch_merger.merging_layer.weight"),
    },
    "hub of v5": {
        "gemma3": ("language_model.model.norm.weight", "vision_tower.post_layernorm.weight"),
        "mistral3": (
            "language_model.lm_head.weight",
            "multi_modal_projector.patch_merger.merging_layer.weight",
            "vision_tower.ln_pre.weight",
        ),
    },
    "v4": {"gemma3": ("model.language_model.norm.weight", "model.vision_tower.vision_model.post_layernorm.weight")},
    "legacy": {"qwen2_vl": ("model.language_model.model.norm.weight", "model.visual.merger.mlp.0.weight")},
}
# What a tower has beyond the patches' states, which is no part of these models.
EXTRA = {name: {"model.vision_tower.head.probe": np.zeros((1, 1, 36), np.float32)} for name in ("gemma3", "llava_siglip")}
CASES = [(name, spelling) for name in NAMES for spelling in reference.spec_of(name).rules.spellings]


@pytest.mark.parametrize(("name", "spelling"), CASES, ids=[f"{name}-{spelling.name}" for name, spelling in CASES])
def test_every_spelling_loads_to_the_same_bits_and_is_written_again(name, spelling, tmp_path):
    checkpoint = open_checkpoint(reference.reference_folder(name))
    own = reference.spec_of(name).rules.detect(checkpoint.names())
    tensors = {spelling.to_disk(own.to_path(key)): np.asarray(checkpoint.read(key)) for key in checkpoint.names()}
    assert set(KNOWN[spelling.name].get(name, ())) <= set(tensors)
    everything = {**tensors, **{spelling.to_disk(path): array for path, array in EXTRA.get(name, {}).items()}}
    write_safetensors(tmp_path / "model.safetensors", everything)
    (tmp_path / "config.json").write_text(json.dumps(reference.config_of(name)))
    model = load(tmp_path, LoadConfig(dtype="bfloat16"))
    held = flatten(nnx.to_pure_dict(nnx.state(model.model)))
    arrays = {spelling.to_disk(path): leaf.array if isinstance(leaf, Dense) else leaf for path, leaf in held.items()}
    assert sorted(arrays) == sorted(tensors)
    assert [key for key, array in arrays.items() if np.asarray(array).tobytes() != tensors[key].tobytes()] == []
    _, trainable, frozen = partition(model.model, full=True)
    save_merged(tmp_path / "m", trainable=trainable, frozen=frozen, loaded=model)
    written = open_checkpoint(tmp_path / "m")
    assert sorted(written.names()) == sorted(everything)
    assert [key for key, array in everything.items() if written.read(key).tobytes() != array.tobytes()] == []
