"""What Gemma's config files mean; what the models compute is in test_parity.py."""

import pytest
import transformers

from conversion.hf_config import Rope
from jaxlora.models import gemma2, gemma3_text

NEEDED = {"gemma2": "Gemma2Config", "gemma3_text": "Gemma3TextConfig"}
SPECS = {"gemma2": gemma2.SPEC, "gemma3_text": gemma3_text.SPEC}


@pytest.mark.parametrize("model_type", SPECS)
def test_an_empty_file_means_what_transformers_class_means(model_type):
    written = getattr(transformers, NEEDED[model_type])().to_dict()
    assert SPECS[model_type].read(written) == SPECS[model_type].read({})


@pytest.mark.parametrize("model_type", SPECS)
def test_old_and_new_spellings_mean_the_same(model_type):
    written = getattr(transformers, NEEDED[model_type])(**SPECS[model_type].tiny).to_dict()
    assert "rope_parameters" in written and "layer_types" in written
    assert SPECS[model_type].read(written) == SPECS[model_type].read(SPECS[model_type].tiny)


def test_the_4b_model_is_what_its_report_says():
    text = {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = gemma3_text.read(text)
    assert [i for i, window in enumerate(config.windows) if window is None] == [5, 11, 17, 23, 29]
    assert (config.rope, config.local_rope) == (Rope(theta=1e6, kind="linear", factor=8.0), Rope(theta=1e4))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262208)


def test_a_window_that_is_said_twice_is_read_once():
    twice = {**gemma2.TINY, "sliding_window_size": gemma2.TINY["sliding_window"], "_attn_implementation_autoset": True}
    assert gemma2.read(twice) == gemma2.read(gemma2.TINY)


def test_a_longer_context_stretches_the_full_layers_alone():
    longer = gemma3_text.SPEC.lengthen(gemma3_text.read({"max_position_embeddings": 1024}), 4096)
    assert (longer.rope, longer.local_rope) == (Rope(theta=1e6, kind="linear", factor=4.0), Rope(theta=1e4))


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not implemented"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not implemented"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null"),
        ("gemma2", {"sliding_window_size": 8}, "sliding_window_size = 8 is not implemented; expected 7"),
        ("gemma2", {"rope_local_base_freq": 1e4}, "rope_local_base_freq = 10000.0 is unknown"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not implemented"),
    ],
)
def test_what_is_not_modelled_is_refused(model_type, change, message):
    with pytest.raises(ValueError) as caught:
        SPECS[model_type].read({**SPECS[model_type].tiny, **change})
    assert message in str(caught.value)
