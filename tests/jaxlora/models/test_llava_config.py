"""What config.json files of LLaVA and Mistral 3 mean, and which are refused."""

import json
import shutil

import numpy as np
import pytest

from jaxlora.load import load
from jaxlora.models import mistral3
from jaxlora.models.llava import SPEC
from tests.jaxlora import reference
from tests.jaxlora.models.llava import NAMES, shared_model, values
from tests.jaxlora.models.llava_configs import CONFIGS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["config.json", "config_v5.json"])
def test_old_and_new_configs_mean_the_same(name, file):
    raw = json.loads((reference.reference_folder(name) / file).read_text())
    spec = reference.spec_of(name)
    assert spec.read(raw) == spec.read(CONFIGS[name])
    assert spec.values(raw) == values(name)


def test_the_hubs_sparse_file_of_llava_1_5_is_read():
    vision = {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    raw = {
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32064},
        "tie_word_embeddings": False,
        "vision_config": {**vision, "model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    config, found = SPEC.read(raw), SPEC.values(raw)
    assert (config.feature_layer, config.vision.side, config.text.hidden_size, len(config.text.windows)) == (23, 24, 4096, 32)
    assert (found.vocab_size, found.pad_token_id, found.vision.grid) == (32064, 32001, (1, 24, 24))


def test_the_hubs_sparse_file_of_pixtral_is_read():
    text = {"head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 14336, "is_composition": True}
    text |= {"max_position_embeddings": 1024000, "model_type": "mistral", "num_hidden_layers": 40, "num_key_value_heads": 8}
    vision = {"head_dim": 64, "hidden_act": "silu", "image_size": 1024, "is_composition": True, "model_type": "pixtral", "patch_size": 16}
    raw = {
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": 1,
        "image_token_index": 10,
        "projector_hidden_act": "gelu",
        "text_config": {**text, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0, "sliding_window": None, "vocab_size": 131072},
        "vision_config": {**vision, "rope_theta": 10000.0, "tie_word_embeddings": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    config, found = SPEC.read(raw), SPEC.values(raw)
    assert (config.feature_layer, config.vision.head_dim, config.text.windows[0], config.text.num_attention_heads) == (24, 64, None, 32)
    assert (found.vision.image_token_id, found.vision.row_breaks, found.vision.patch_elements) == (10, True, 768)


def test_the_hubs_file_of_mistral_small_3_1_is_read():
    text = {"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02}
    text |= {"intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32}
    text |= {"num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1e9, "sliding_window": None}
    vision = {"attention_dropout": 0.0, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024, "image_size": 1540}
    vision |= {"intermediate_size": 4096, "model_type": "pixtral", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24}
    raw = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {**text, "use_cache": True, "vocab_size": 131072},
        "torch_dtype": "bfloat16",
        "vision_config": {**vision, "initializer_range": 0.02, "patch_size": 14, "rope_theta": 10000.0},
        "vision_feature_layer": -1,
    }
    config, found = mistral3.read(raw), mistral3.values(raw)
    assert (config.feature_layer, config.merge, config.projector_bias, config.tie_word_embeddings) == (24, 2, False, True)
    assert (config.text.windows[0], config.text.num_attention_heads, config.text.hidden_size) == (None, 32, 5120)
    vision = found.vision
    assert (vision.image_token_id, vision.merge_size, vision.row_breaks, vision.patch_elements) == (10, 2, True, 588)


@pytest.mark.parametrize("key", ["image_token_index", "spatial_merge_size", "projector_hidden_act", "multimodal_projector_bias"])
def test_a_key_that_mistral3_leaves_out_has_the_value_of_the_released_model(key):
    released = {"image_token_index": 10, "spatial_merge_size": 2, "projector_hidden_act": "gelu", "multimodal_projector_bias": False}
    raw = {**CONFIGS["mistral3"], **released}
    left_out = {name: value for name, value in raw.items() if name != key}
    assert (mistral3.read(left_out), mistral3.values(left_out)) == (mistral3.read(raw), mistral3.values(raw))


def test_a_file_that_says_nothing_of_its_head_has_the_head_that_is_in_it(tmp_path):
    folder = reference.reference_folder("mistral3")
    silent = {key: value for key, value in json.loads((folder / "config.json").read_text()).items() if key != "tie_word_embeddings"}
    (tmp_path / "config.json").write_text(json.dumps(silent))
    shutil.copy(folder / "model.safetensors", tmp_path)
    assert mistral3.read(silent).tie_word_embeddings
    ours, theirs = (model.head().weight.array for model in (load(tmp_path).model, shared_model("mistral3")))
    assert np.array_equal(ours, theirs)


def test_towers_without_a_model_type_are_mistrals_and_pixtrals():
    raw = CONFIGS["mistral3"]
    bare = {part: {key: value for key, value in raw[part].items() if key != "model_type"} for part in ("text_config", "vision_config")}
    assert mistral3.read({**raw, **bare}) == mistral3.read(raw)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava", {"use_qk_norm": True}, "use_qk_norm = True is unknown"),
        ("llava", {"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu' is not implemented"),
        ("llava", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full' is not implemented for clip_vision"),
        ("llava", {"vision_feature_layer": [-2, -5]}, r"vision_feature_layer = \[-2, -5\] is not implemented"),
        ("llava", {"vision_feature_layer": -5}, "vision_feature_layer = -5 is not implemented"),
        ("llava", {"vision_config": {"hidden_act": "relu"}}, "hidden_act = 'relu' is not implemented"),
        ("llava", {"vision_config": {"model_type": "dinov2"}}, "vision_config is of model_type 'dinov2'"),
        ("llava", {"text_config": {"model_type": "phi"}}, "text_config is of model_type 'phi'"),
        ("llava", {"vision_config": {"num_attention_heads": 5}}, "hidden_size=36 must be a multiple of num_attention_heads=5"),
        ("llava_pixtral", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu' is not implemented in Pixtral's tower"),
        ("llava_pixtral", {"vision_config": {"head_dim": 16}}, "head_dim = 16 is not implemented"),
        ("llava_pixtral", {"vision_config": {"head_dim": None, "num_attention_heads": 20}}, "the head size 2 must be a multiple of 4"),
        ("llava_pixtral", {"vision_config": {"num_attention_heads": 3}}, "hidden_size=40 must be a multiple of num_attention_heads=3"),
        ("llava_pixtral", {"vision_feature_select_strategy": "default"}, "is not implemented for pixtral; expected 'full'"),
        ("mistral3", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full' is unknown"),
        ("mistral3", {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer = \[-1, -2\] is not implemented"),
        ("mistral3", {"vision_config": {"model_type": "siglip_vision_model"}}, "mistral3 is modelled with the tower 'pixtral' alone"),
        ("mistral3", {"text_config": {"model_type": "ministral3"}}, "text_config is of model_type 'ministral3'"),
    ],
)
def test_what_is_not_modelled_is_refused(name, change, message):
    config = CONFIGS[name]
    nested = {key: {**config[key], **value} if isinstance(value, dict) else value for key, value in change.items()}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        reference.spec_of(name).read({**config, **nested})
