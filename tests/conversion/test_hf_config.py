"""config.json: nothing that changes a model is ignored, and old and new spellings mean the same."""

import dataclasses

import pytest
import transformers

from conversion.hf_config import FIXED, INERT, REQUIRED, Rope, dtype_name, rope, split_text, take

USES = {"hidden_size": REQUIRED, "num_attention_heads": REQUIRED, "head_dim": None, "rms_norm_eps": 1e-6}
CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "hidden_act": "silu"}
ACT = {"hidden_act": "silu"}


def test_used_keys_come_with_their_defaults():
    assert take(CONFIG | {"rms_norm_eps": 1e-5}, uses=USES, requires=ACT) == {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
    }


def test_every_fault_is_listed_at_once_with_the_nearest_name():
    config = {
        "model_type": "llama",
        "hiden_size": 8,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "use_qk_norm": True,
        "attention_dropout": 0.1,
    }
    with pytest.raises(ValueError) as caught:
        take(config, uses=USES, requires=ACT)
    text = str(caught.value)
    assert "llama's configuration has 5 faults" in text
    for part in (
        "hiden_size = 8 is unknown, and may change the model; did you mean 'hidden_size'",
        "use_qk_norm = True is unknown",
        "hidden_act = 'gelu' is not implemented; expected 'silu'",
        "attention_dropout = 0.1 is not implemented; expected 0.0",
        "hidden_size is missing; did you mean 'hiden_size'?",
    ):
        assert part in text


def test_an_unknown_key_that_is_null_asks_for_nothing():
    assert take(CONFIG | {"something_new": None}, uses=USES, requires=ACT)["hidden_size"] == 8


@pytest.mark.parametrize("value", [False, 0, "", {}, []])
def test_an_unknown_key_with_any_other_value_is_refused(value):
    with pytest.raises(ValueError, match="something_new"):
        take(CONFIG | {"something_new": value}, uses=USES, requires=ACT)


def test_a_required_key_may_have_several_values_and_may_be_absent():
    requires = {"hidden_act": ("silu", "swish")}
    assert take(CONFIG | {"hidden_act": "swish"}, uses=USES, requires=requires) == take(
        {**CONFIG, "hidden_act": "silu"}, uses=USES, requires=requires
    )
    take({k: v for k, v in CONFIG.items() if k != "hidden_act"}, uses=USES, requires=requires)


def test_true_is_not_one():
    with pytest.raises(ValueError, match="attention_bias = 1 is not implemented; expected True"):
        take(CONFIG | {"attention_bias": 1}, uses=USES, requires=ACT | {"attention_bias": True})


def test_an_architecture_may_use_a_key_that_is_fixed_elsewhere():
    assert take(CONFIG | {"attention_dropout": 0.1}, uses=USES | {"attention_dropout": 0.0}, requires=ACT)["attention_dropout"] == 0.1


def test_a_required_null_head_dim_is_missing():
    with pytest.raises(ValueError, match="hidden_size is missing"):
        take(CONFIG | {"hidden_size": None}, uses=USES, requires=ACT)


def test_the_keys_that_transformers_writes_into_every_config_are_known():
    keys = transformers.PretrainedConfig().to_dict()
    assert {k for k, v in keys.items() if v is not None and k not in INERT and k not in FIXED} == set()


LLAMA = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "attention_bias", "mlp_bias"),
}


def test_a_llama_config_of_transformers_has_no_unknown_key():
    config = transformers.LlamaConfig().to_dict()
    assert take(config, uses=dict.fromkeys(LLAMA), requires=ACT).keys() == LLAMA


def test_no_inert_key_is_one_that_an_architecture_uses():
    assert not INERT & (LLAMA | {"rope_theta", "rope_scaling", "sliding_window", "layer_types", "hidden_act", "attention_dropout"})


# nested and flat


OUTER = ("vision_config", "image_token_id", "tie_word_embeddings")
TEXT = {"hidden_size": 8, "rope_theta": 1e6}
WHOLE = {"vision_config": {"depth": 1}, "image_token_id": 5, "architectures": ["X"], "tie_word_embeddings": True}


def test_flat_and_nested_text_configurations_split_alike():
    assert split_text(WHOLE | TEXT, OUTER) == split_text(WHOLE | {"text_config": TEXT}, OUTER) == (WHOLE, TEXT)


def test_text_keys_in_both_places_must_agree():
    assert split_text(WHOLE | TEXT | {"text_config": TEXT}, OUTER) == (WHOLE, TEXT)
    with pytest.raises(ValueError, match="hidden_size is 8 outside, 9 in text_config"):
        split_text(WHOLE | TEXT | {"text_config": TEXT | {"hidden_size": 9}}, OUTER)


def test_an_unknown_outer_key_is_not_lost():
    outer, _ = split_text(WHOLE | {"text_config": TEXT, "new_key": 3}, OUTER)
    assert outer["new_key"] == 3


def test_a_nested_dtype_counts_where_there_is_no_outer_one():
    assert dtype_name({"text_config": {"torch_dtype": "float16"}}) == "float16"


# rotary positions


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("default", {}), ("linear", {"factor": 2.0}), ("dynamic", {"factor": 4.0}), ("llama3", LLAMA3), ("yarn", YARN)],
)
def test_old_and_new_spellings_give_the_same_record(kind, parameters):
    shared = {"max_position_embeddings": 131072}
    new = rope(shared | {"rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **parameters}}, theta=1e4)
    for key in ("type", "rope_type"):
        assert rope(shared | {"rope_theta": 5e5, "rope_scaling": {key: kind, **parameters}}, theta=1e4) == new
    assert new.kind == kind and new.theta == 5e5 and new.factor == parameters.get("factor", 1.0)


def test_parameters_of_llama3_arrive():
    assert rope({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, theta=1e4) == Rope(
        theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )


def test_a_config_without_rotary_keys_has_the_architectures_theta():
    assert rope({}, theta=1e6) == rope({"rope_scaling": None, "rope_parameters": None}, theta=1e6) == Rope(theta=1e6)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}},
    ],
)
def test_mrope_is_default_frequencies_with_sections(config):
    assert rope(config, theta=1e4) == Rope(theta=1e6, mrope_section=(16, 24, 24))


def test_gemma3_layers_have_their_own_positions_in_both_spellings():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    full, sliding = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}, {"rope_theta": 1e4, "rope_type": "default"}
    new = {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}
    for config in (old, new):
        assert rope(config, theta=1.0, layer_type="full_attention") == Rope(theta=1e6, kind="linear", factor=8.0)
        assert rope(config, theta=1.0, layer_type="sliding_attention") == Rope(theta=1e4)
    del old["rope_local_base_freq"], new["rope_parameters"]["sliding_attention"]
    for config in (old, new):
        assert rope(config, theta=7.0, layer_type="sliding_attention") == Rope(theta=7.0)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen2Config", "MistralConfig", "Qwen3Config"])
def test_what_transformers_writes_by_default_is_read(name):
    config = getattr(transformers, name)().to_dict()
    assert rope(config, theta=-1.0) == Rope(theta=config["rope_parameters"]["rope_theta"])


def test_an_unknown_kind_is_named():
    with pytest.raises(NotImplementedError, match="rope type 'longrope'"):
        rope({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, theta=1e4)


def test_parameters_of_another_kind_and_missing_ones_are_listed():
    with pytest.raises(ValueError, match=r"beta_fast = 3 is not a parameter of 'linear'(.|\n)*factor is missing"):
        rope({"rope_scaling": {"type": "linear", "beta_fast": 3}}, theta=1e4)


def test_a_parameter_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="factor = '8' is not a number"):
        rope({"rope_scaling": {"type": "linear", "factor": "8"}}, theta=1e4)


def test_dynamic_scaling_starts_from_the_models_own_limit():
    scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    assert rope({"rope_scaling": scaling, "max_position_embeddings": 64}, theta=1e4).original_max_positions == 64
    with pytest.raises(ValueError, match="'dynamic' start from max_position_embeddings, which the file lacks"):
        rope({"rope_scaling": scaling}, theta=1e4)


def test_every_parameter_of_every_kind_has_a_field():
    fields = {f.name for f in dataclasses.fields(Rope)}
    everything = {"type": "yarn", "attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 1.0, "partial_rotary_factor": 0.5, **YARN}
    found = rope({"rope_scaling": everything}, theta=1e4)
    assert (found.attention_factor, found.mscale, found.partial_rotary_factor, found.truncate) == (1.5, 1.0, 0.5, False)
    assert {"beta_fast", "beta_slow", "mscale_all_dim"} <= fields
