"""The selector against the table of Unsloth's worked examples, and PEFT's meaning of lists and regexes."""

import itertools
import re

import jax.numpy as jnp
import pytest

from jaxlora import select
from jaxlora.models import registry
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_flags, by_pattern, classify, of_layers
from tests.jaxlora import reference

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
FC = ["fc1", "fc2"]
VA, VM, LA, LM, NEVER = "vision attention", "vision mlp", "language attention", "language mlp", None


def layers(prefix, suffixes, depth=2):
    return [f"{prefix}.{i}.{suffix}" for i in range(depth) for suffix in suffixes]


def under(block, leaves):
    return [f"{block}.{leaf}" for leaf in leaves]


# Architecture: [(paths, the pair of switches that selects them, or NEVER)], by rows of the table.
QWEN2_VL = [
    (layers("model.visual.blocks", ["attn.qkv", "attn.proj"]), VA),
    (layers("model.visual.blocks", under("mlp", FC)), VM),
    (layers("model.language_model.layers", under("self_attn", QKVO)), LA),
    (layers("model.language_model.layers", under("mlp", GATED)), LM),
    (["model.visual.merger.mlp.0", "model.visual.merger.mlp.2", "lm_head"], NEVER),
]
TABLE = {
    "qwen2_vl": QWEN2_VL,
    "qwen2_vl as on the hub": [
        ([p.replace("model.visual", "visual").replace("model.language_model", "model") for p in ps], c) for ps, c in QWEN2_VL
    ],
    "qwen2_5_vl": [
        (layers("model.visual.blocks", ["attn.qkv", "attn.proj"]), VA),
        (layers("model.visual.blocks", under("mlp", GATED)), VM),
        *QWEN2_VL[2:],
    ],
    "mllama": [
        (layers("model.vision_model.transformer.layers", under("self_attn", QKVO)), VA),
        (layers("model.vision_model.global_transformer.layers", under("self_attn", QKVO)), VA),
        (layers("model.vision_model.transformer.layers", under("mlp", FC)), VM),
        (layers("model.vision_model.global_transformer.layers", under("mlp", FC)), VM),
        (layers("model.language_model.layers", under("self_attn", QKVO)), LA),
        (under("model.language_model.layers.2.cross_attn", QKVO), LA),
        (layers("model.language_model.layers", under("mlp", GATED), 3), LM),
        (["model.multi_modal_projector", "lm_head"], NEVER),
    ],
    "mllama as on the hub": [
        (layers("vision_model.transformer.layers", under("self_attn", QKVO)), VA),
        (layers("vision_model.global_transformer.layers", under("self_attn", QKVO)), VA),
        (layers("vision_model.transformer.layers", under("mlp", FC)), VM),
        (layers("language_model.model.layers", under("self_attn", QKVO)), LA),
        (under("language_model.model.layers.2.cross_attn", QKVO), LA),
        (layers("language_model.model.layers", under("mlp", GATED), 3), LM),
        (["multi_modal_projector", "language_model.lm_head"], NEVER),
    ],
    "pixtral": [
        (layers("vision_tower.transformer.layers", under("attention", QKVO)), VA),
        (layers("vision_tower.transformer.layers", under("feed_forward", GATED)), VM),
        (layers("language_model.model.layers", under("self_attn", QKVO)), LA),
        (layers("language_model.model.layers", under("mlp", GATED)), LM),
        (["multi_modal_projector.linear_1", "multi_modal_projector.linear_2", "language_model.lm_head"], NEVER),
    ],
    "llava": [
        (layers("model.vision_tower.encoder.layers", under("self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"])), VA),
        (layers("model.vision_tower.encoder.layers", under("mlp", FC)), VM),
        *QWEN2_VL[2:4],
        (["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2", "lm_head"], NEVER),
    ],
    "llava_pixtral": [
        (layers("model.vision_tower.transformer.layers", under("attention", QKVO)), VA),
        (layers("model.vision_tower.transformer.layers", under("feed_forward", GATED)), VM),
        *QWEN2_VL[2:4],
        (["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2", "lm_head"], NEVER),
    ],
    "mistral3": [
        (layers("model.vision_tower.transformer.layers", under("attention", QKVO)), VA),
        (layers("model.vision_tower.transformer.layers", under("feed_forward", GATED)), VM),
        *QWEN2_VL[2:4],
        (under("model.multi_modal_projector", ["patch_merger.merging_layer", "linear_1", "linear_2"]), NEVER),
        (["lm_head"], NEVER),
    ],
    "gemma3": [
        (layers("model.vision_tower.encoder.layers", under("self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"])), VA),
        (layers("model.vision_tower.encoder.layers", under("mlp", FC)), VM),
        *QWEN2_VL[2:4],
        (["lm_head"], NEVER),
    ],
    "gemma3 as on the hub": [
        (layers("vision_tower.vision_model.encoder.layers", under("self_attn", ["q_proj", "k_proj", "v_proj", "out_proj"])), VA),
        (layers("vision_tower.vision_model.encoder.layers", under("mlp", FC)), VM),
        (layers("language_model.model.layers", under("self_attn", QKVO)), LA),
        (layers("language_model.model.layers", under("mlp", GATED)), LM),
        (["language_model.lm_head"], NEVER),
    ],
    "qwen3_vl": [
        (layers("model.visual.blocks", ["attn.qkv", "attn.proj"]), VA),
        (layers("model.visual.blocks", under("mlp", ["linear_fc1", "linear_fc2"])), VM),
        *QWEN2_VL[2:4],
        (under("model.visual.merger", ["linear_fc1", "linear_fc2"]), NEVER),
        (layers("model.visual.deepstack_merger_list", ["linear_fc1", "linear_fc2"]), NEVER),
        (["lm_head"], NEVER),
    ],
    "gpt2": [
        (layers("transformer.h", ["attn.c_attn", "attn.c_proj"]), LA),
        (layers("transformer.h", ["mlp.c_fc", "mlp.c_proj"]), LM),
        (["lm_head"], NEVER),
    ],
}
TABLE["llava_siglip"] = TABLE["llava"]
FLAGS = list(itertools.product([False, True], repeat=4))
QWEN = [path for paths, _ in QWEN2_VL for path in paths]
LINEAR_LLAMA = [*layers("model.layers", [*under("self_attn", QKVO), *under("mlp", GATED)]), "lm_head"]


def switched_on(category, vision, language, attention, mlp):
    if category is NEVER:
        return False
    tower, kind = category.split()
    return {"vision": vision, "language": language}[tower] and {"attention": attention, "mlp": mlp}[kind]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "".join(c if on else "-" for c, on in zip("VLAM", f, strict=True)))
@pytest.mark.parametrize("architecture", TABLE)
def test_flags_select_what_the_table_says(architecture, flags):
    names = dict(zip(("vision", "language", "attention", "mlp"), flags, strict=True))
    paths = [path for paths, _ in TABLE[architecture] for path in paths]
    wanted = [path for paths, category in TABLE[architecture] for path in paths if switched_on(category, *flags)]
    if wanted:
        assert set(by_flags(paths, **names).paths) == set(wanted)
    else:
        with pytest.raises(ValueError, match="no layers to fine-tune|no modules to fine-tune|the flags select nothing"):
            by_flags(paths, **names)


@pytest.mark.parametrize("model_type", [*registry.MODELS, "llava_siglip", "llava_pixtral"])
def test_the_real_module_trees_have_the_names_of_the_table(model_type):
    spec = reference.spec_of(model_type)
    text = layers("model.layers", [*under("self_attn", QKVO), *under("mlp", GATED)])
    expected = [path for paths, _ in TABLE.get(model_type, [(text, LA), (["lm_head"], NEVER)]) for path in paths]

    def in_any_layer(paths):
        return {re.sub(r"\.\d+\.", ".N.", path) for path in paths}

    assert in_any_layer(linear_paths(spec.build(spec.read(reference.config_of(model_type))))) == in_any_layer(expected)


def test_order_is_the_models():
    assert by_flags(QWEN, mlp=False).paths == tuple(p for p in QWEN if classify(p)[1] == "attention")


class TestAllLinear:
    def test_takes_everything_but_the_head_and_with_vision_the_connector(self):
        assert set(by_flags(QWEN, targets="all-linear").paths) == set(QWEN) - {"lm_head"}

    def test_obeys_a_flag_that_is_false(self):
        chosen = by_flags(QWEN, vision=False, mlp=False, targets="all-linear").paths
        assert set(chosen) == {p for p in QWEN if "language_model" in p and "self_attn" in p}


class TestSuffixLists:
    def test_a_suffix_hits_whole_segments_only(self):
        assert set(by_pattern(QWEN, ["proj"]).paths) == {p for p in QWEN if p.endswith("attn.proj")}

    def test_a_longer_suffix_is_matched_from_the_end(self):
        assert set(by_pattern(QWEN, ["attn.proj", "1.mlp.fc1"]).paths) == {
            *(p for p in QWEN if p.endswith(".attn.proj")),
            "model.visual.blocks.1.mlp.fc1",
        }

    def test_flags_scope_a_list(self):
        paths = [p for ps, _ in TABLE["qwen2_5_vl"] for p in ps]
        chosen = by_flags(paths, vision=False, targets=["gate_proj", "q_proj"]).paths
        assert set(chosen) == {p for p in paths if "language" in p and p.endswith(("gate_proj", "q_proj"))}

    def test_a_list_without_flags_off_hits_every_tower(self):
        paths = [p for ps, _ in TABLE["qwen2_5_vl"] for p in ps]
        assert set(by_flags(paths, targets=["gate_proj"]).paths) == {p for p in paths if p.endswith("gate_proj")}

    def test_the_connector_is_not_hit_by_a_shared_leaf_name(self):
        paths = [p for ps, _ in TABLE["qwen3_vl"] for p in ps]
        assert all("merger" not in p for p in by_pattern(paths, ["linear_fc1"]).paths)

    def test_the_connector_is_hit_by_its_own_name(self):
        assert by_flags(QWEN, targets=["merger.mlp.0"]).paths == ("model.visual.merger.mlp.0",)

    def test_the_head_is_hit_by_its_name(self):
        assert by_flags(LINEAR_LLAMA, vision=False, targets=["q_proj", "lm_head"]).paths[-1] == "lm_head"

    def test_every_dead_suffix_is_named_with_its_nearest(self):
        with pytest.raises(ValueError, match=r"(?s)'q_porj'; did you mean 'q_proj'.*'up'") as error:
            by_pattern(QWEN, ["q_porj", "k_proj", "up"])
        assert "'k_proj':" not in str(error.value)

    def test_a_suffix_that_flags_switch_off_is_an_error(self):
        with pytest.raises(ValueError, match="(?s)leave switched on.*'qkv'.*vision attention"):
            by_flags(QWEN, vision=False, targets=["qkv"])

    def test_an_empty_list_is_an_error(self):
        with pytest.raises(ValueError, match="empty list"):
            by_flags(QWEN, targets=[])


class TestRegex:
    def test_matches_the_whole_path(self):
        assert by_pattern(QWEN, r".*layers\.1\.mlp\.up_proj").paths == ("model.language_model.layers.1.mlp.up_proj",)

    def test_a_part_of_a_path_is_no_match(self):
        with pytest.raises(ValueError, match="matches no Linear in full; did you mean 'q_proj'"):
            by_pattern(QWEN, "q_proj")

    def test_picks_the_connector_and_the_head(self):
        assert set(by_flags(QWEN, targets=r".*merger.*|lm_head").paths) == set(QWEN2_VL[4][0])

    def test_against_a_flag_is_an_error_that_lists_the_paths(self):
        with pytest.raises(ValueError, match=r"(?s)switches off.*model\.visual\.blocks\.0\.attn\.qkv"):
            by_flags(QWEN, vision=False, targets=r".*\.qkv")

    def test_that_does_not_compile_is_an_error(self):
        with pytest.raises(ValueError, match="is not a regex"):
            by_pattern(QWEN, "(q_proj")


class TestUnsafeFallbacks:
    """Where Unsloth drops a switch and trains something else."""

    def test_vision_only_on_a_text_model_is_an_error(self):
        with pytest.raises(ValueError, match="this model's Linears are language attention, language mlp"):
            by_flags(LINEAR_LLAMA, language=False)

    def test_everything_off_is_an_error(self):
        with pytest.raises(ValueError, match="vision and language are both switched off"):
            by_flags(QWEN, vision=False, language=False)
        with pytest.raises(ValueError, match="attention and mlp are both switched off"):
            by_flags(QWEN, attention=False, mlp=False)

    def test_a_model_of_one_layer_selects_its_projections_alone(self):
        paths = [*layers("model.layers", [*under("self_attn", QKVO), *under("mlp", GATED)], 1), "lm_head"]
        assert set(by_flags(paths).paths) == set(paths) - {"lm_head"}


class TestLayers:
    def test_the_first_number_is_the_layer(self):
        assert set(of_layers(by_flags(QWEN), [1]).paths) == {p for p in by_flags(QWEN).paths if ".1." in p}

    def test_a_pattern_names_the_list_that_is_counted(self):
        chosen = of_layers(by_flags(QWEN), [0], "blocks").paths
        assert set(chosen) == {p for p in QWEN if "blocks.0." in p}

    def test_a_layer_that_is_not_there_is_an_error(self):
        with pytest.raises(ValueError, match=r"layers \[7\] hold no selected Linear; the selected ones are in layers \[0, 1\]"):
            of_layers(by_flags(LINEAR_LLAMA), [1, 7])

    def test_a_pattern_without_layers_is_an_error(self):
        with pytest.raises(ValueError, match="needs layers_to_transform"):
            of_layers(by_flags(LINEAR_LLAMA), None, "layers")

    def test_a_linear_without_a_number_is_dropped(self):
        chosen = of_layers(by_pattern(LINEAR_LLAMA, ["q_proj", "lm_head"]), [0])
        assert chosen.paths == ("model.layers.0.self_attn.q_proj",)


class TestSelection:
    def test_counts_what_it_selected_of_what_there_is(self):
        selection = by_flags(QWEN, vision=False, mlp=False)
        assert selection.counts == {("language", "attention"): 8}
        assert selection.total == {
            ("vision", "attention"): 4,
            ("vision", "mlp"): 4,
            ("language", "attention"): 8,
            ("language", "mlp"): 6,
            ("language", "other"): 1,
            ("connector", "other"): 2,
        }
        assert selection.describe() == (
            "8 of 25 Linears: vision attention 0/4, vision mlp 0/4, language attention 8/8, language mlp 0/6, language other 0/1, "
            "connector other 0/2"
        )

    def test_mask_is_true_on_the_leaves_of_selected_linears(self):
        tree = {
            "model": {"layers": {"0:2:1": {"self_attn": {"q_proj": {"lora_A": 1}}, "mlp": {"up_proj": {"lora_A": 1}}}}},
            "lm_head": {"w": 1},
        }
        assert by_pattern(LINEAR_LLAMA, ["q_proj"]).mask(tree) == {
            "model": {"layers": {"0:2:1": {"self_attn": {"q_proj": {"lora_A": True}}, "mlp": {"up_proj": {"lora_A": False}}}}},
            "lm_head": {"w": False},
        }

    def test_mask_of_a_leaf_that_is_selected_in_part_names_the_layers(self):
        tree = {"model": {"layers": {"0:2:1": {"self_attn": {"q_proj": {"lora_A": jnp.zeros((2, 1))}}}}}}
        with pytest.raises(ValueError, match=r"1 of 2 stacked layers, not for model\.layers\.1\.self_attn\.q_proj"):
            of_layers(by_pattern(LINEAR_LLAMA, ["q_proj"]), [0]).mask(tree)


def test_expand_gives_every_layer_of_a_range():
    assert select.expand("a.1:6:2.b") == ["a.1.b", "a.3.b", "a.5.b"]
