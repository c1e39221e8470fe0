"""Rename tables: every spelling that Hugging Face used, both ways, and plans that account for every tensor."""

import re

import pytest

from conversion.rules import Rename, Rules, Spelling, plan, same

HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
VLM_HEAD = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
LLAMA = Rules((Spelling("hub", same("model", "lm_head")),), ties=HEAD)
MODULES_V5 = Spelling("v5", same("model.visual", "model.language_model", "lm_head"))
QWEN2_VL = Rules(
    (
        Spelling("hub", (Rename("visual", "model.visual"), Rename("model", "model.language_model"), *same("lm_head"))),
        MODULES_V5,
        Spelling("legacy", (*same("model.visual", "lm_head"), Rename("model.language_model.model", "model.language_model"))),
    ),
    ties=VLM_HEAD,
)


def nested_hub(*towers):
    return (
        *(Rename(disk, path) for disk, path in towers),
        Rename("multi_modal_projector", "model.multi_modal_projector"),
        Rename("language_model.model", "model.language_model"),
        Rename("language_model.lm_head", "lm_head"),
    )


V5_VLM = same("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
MLLAMA = Rules((Spelling("hub", nested_hub(("vision_model", "model.vision_model"))), Spelling("v5", same("model", "lm_head"))))
LLAVA = Rules(
    (
        Spelling("hub", nested_hub(("vision_tower.vision_model", "model.vision_tower"))),
        Spelling("pixtral", nested_hub(("vision_tower", "model.vision_tower"))),
        Spelling("v5", V5_VLM),
    ),
)
MIXTRAL = Rules((Spelling("hub", (*same("model", "lm_head"), Rename("model.layers.*.block_sparse_moe.gate", "model.layers.*.mlp.gate"))),))

# architecture, spelling, {name on disk: path in transformers 5's module tree}
CASES = {
    "llama": (
        LLAMA,
        "hub",
        {"model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight", "lm_head.weight": "lm_head.weight"},
    ),
    "qwen2_vl hub": (
        QWEN2_VL,
        "hub",
        {
            "visual.blocks.0.attn.qkv.bias": "model.visual.blocks.0.attn.qkv.bias",
            "visual.merger.mlp.0.weight": "model.visual.merger.mlp.0.weight",
            "model.layers.3.self_attn.q_proj.weight": "model.language_model.layers.3.self_attn.q_proj.weight",
            "lm_head.weight": "lm_head.weight",
        },
    ),
    "qwen2_vl v5": (
        QWEN2_VL,
        "v5",
        {
            "model.visual.blocks.0.attn.qkv.bias": "model.visual.blocks.0.attn.qkv.bias",
            "model.language_model.norm.weight": "model.language_model.norm.weight",
            "lm_head.weight": "lm_head.weight",
        },
    ),
    "qwen2_vl legacy": (
        QWEN2_VL,
        "legacy",
        {
            "model.visual.blocks.0.attn.qkv.bias": "model.visual.blocks.0.attn.qkv.bias",
            "model.language_model.model.norm.weight": "model.language_model.norm.weight",
        },
    ),
    "mllama hub": (
        MLLAMA,
        "hub",
        {
            "vision_model.class_embedding": "model.vision_model.class_embedding",
            "language_model.model.layers.3.cross_attn.q_norm.weight": "model.language_model.layers.3.cross_attn.q_norm.weight",
            "language_model.lm_head.weight": "lm_head.weight",
            "multi_modal_projector.bias": "model.multi_modal_projector.bias",
        },
    ),
    "mllama v5": (
        MLLAMA,
        "v5",
        {"model.vision_model.class_embedding": "model.vision_model.class_embedding", "lm_head.weight": "lm_head.weight"},
    ),
    "llava and gemma3 hub": (
        LLAVA,
        "hub",
        {
            "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
            "multi_modal_projector.linear_1.weight": "model.multi_modal_projector.linear_1.weight",
            "language_model.model.norm.weight": "model.language_model.norm.weight",
        },
    ),
    "pixtral hub": (LLAVA, "pixtral", {"vision_tower.patch_conv.weight": "model.vision_tower.patch_conv.weight"}),
    "llava v5": (LLAVA, "v5", {"model.vision_tower.encoder.layers.0.mlp.fc1.weight": "model.vision_tower.encoder.layers.0.mlp.fc1.weight"}),
    "mixtral": (MIXTRAL, "hub", {"model.layers.7.block_sparse_moe.gate.weight": "model.layers.7.mlp.gate.weight"}),
}
cases = pytest.mark.parametrize(("rules", "spelling", "names"), CASES.values(), ids=CASES)


@cases
def test_the_spelling_is_recognised_by_its_names(rules, spelling, names):
    assert rules.detect(names).name == spelling


@cases
def test_names_become_the_newest_module_paths(rules, spelling, names):
    found = rules.detect(names)
    assert {name: found.to_path(name) for name in names} == names


@cases
def test_a_path_goes_back_to_the_name_it_came_from(rules, spelling, names):
    found = rules.detect(names)
    assert {found.to_disk(path): path for path in names.values()} == names


@cases
def test_a_leading_peft_prefix_is_accepted_and_written_again(rules, spelling, names):
    prefixed = {f"base_model.model.{name}": path for name, path in names.items()}
    found = rules.detect(prefixed)
    assert {name: found.to_path(name) for name in prefixed} == prefixed
    assert {found.to_disk(path): path for path in names.values()} == prefixed


@cases
def test_quantisation_companions_are_renamed_with_their_module(rules, spelling, names):
    found = rules.detect(names)
    for suffix in ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"):
        assert {f"{name}.{suffix}": found.to_path(f"{name}.{suffix}") for name in names} == {
            f"{name}.{suffix}": f"{path}.{suffix}" for name, path in names.items()
        }


def test_adapter_keys_of_old_transformers_are_renamed_like_weights():
    names = ["visual.blocks.0.attn.qkv.lora_A.weight", "model.layers.0.mlp.up_proj.lora_A.weight"]
    found = QWEN2_VL.detect(names)
    assert [found.to_path(n) for n in names] == [
        "model.visual.blocks.0.attn.qkv.lora_A.weight",
        "model.language_model.layers.0.mlp.up_proj.lora_A.weight",
    ]


def test_the_order_of_lines_means_nothing():
    hub = QWEN2_VL.spellings[0]
    reverse = Spelling("hub", hub.renames[::-1])
    for name in CASES["qwen2_vl hub"][2]:
        assert reverse.to_path(name) == hub.to_path(name)


def test_a_module_is_matched_at_a_dot_only():
    with pytest.raises(ValueError, match="'modelling.norm.weight' does not fit spelling 'hub'"):
        LLAMA.spellings[0].to_path("modelling.norm.weight")


def test_a_path_that_no_name_leads_to_is_an_error():
    with pytest.raises(ValueError, match="no name of spelling 'hub' leads to 'model.other.weight'"):
        QWEN2_VL.spellings[0].to_disk("model.other.weight")


def test_two_lines_to_one_module_are_refused():
    with pytest.raises(ValueError, match="not invertible"):
        Spelling("bad", (Rename("a", "x"), Rename("b", "x")))


def test_stars_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="different numbers of"):
        Rename("layers.*.a", "layers.b")


def test_names_that_fit_no_spelling_are_listed():
    with pytest.raises(ValueError, match=r"2 of 3 names do not fit(.|\n)*'encoder.x'(.|\n)*'decoder.y'"):
        LLAMA.detect(["model.norm.weight", "encoder.x", "decoder.y"])


WANTED = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_every_wanted_path_is_placed_at_its_name():
    assert plan(WANTED, WANTED, LLAMA).placed == {name: name for name in WANTED}


def test_an_absent_head_of_a_tied_model_equals_the_embedding():
    assert plan(WANTED[:2], WANTED, LLAMA, tied=True).tied == HEAD


def test_a_head_that_is_present_in_a_tied_model_is_placed():
    found = plan(WANTED, WANTED, LLAMA, tied=True)
    assert "lm_head.weight" in found.placed and not found.tied


def test_an_absent_head_of_an_untied_model_is_a_gap_that_says_so():
    with pytest.raises(ValueError, match="gap: 'lm_head.weight'.*may equal 'model.embed_tokens.weight', but the config says"):
        plan(WANTED[:2], WANTED, LLAMA)


def test_layer_norm_gamma_and_beta_are_placed_as_weight_and_bias():
    found = plan(["model.norm.gamma", "model.norm.beta"], ["model.norm.weight", "model.norm.bias"], LLAMA)
    assert found.placed == {"model.norm.weight": "model.norm.gamma", "model.norm.bias": "model.norm.beta"}


def test_rotary_buffers_of_old_files_are_ignored():
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert plan([*WANTED, name], WANTED, LLAMA).ignored == (name,)


def test_companions_follow_their_weight():
    names = [
        "visual.fc.weight",
        "visual.fc.weight.absmax",
        "visual.fc.weight.quant_state.bitsandbytes__nf4",
        "model.q.weight",
        "model.q.SCB",
    ]
    found = plan(names, ["model.visual.fc.weight", "model.language_model.q.weight"], QWEN2_VL)
    assert found.companions == {
        "model.visual.fc.weight": {"absmax": names[1], "quant_state.bitsandbytes__nf4": names[2]},
        "model.language_model.q.weight": {"SCB": "model.q.SCB"},
    }


def test_one_error_lists_every_stray_gap_and_double_with_the_nearest_name():
    names = ["model.norm.weight", "model.norm.gamma", "model.embed_token.weight", "elsewhere.x.weight.absmax", "model.old.weight"]
    rules = Rules((Spelling("hub", same("model", "lm_head", "elsewhere")),))
    with pytest.raises(ValueError) as caught:
        plan(names, ["model.norm.weight", "model.embed_tokens.weight"], rules)
    lines = str(caught.value).splitlines()
    assert "3 strays, 1 gaps and 1 doubles" in lines[0]
    assert sorted(re.sub(r"stray: |gap: |double: ", "", line)[4:].split("'")[1] for line in lines[1:]) == sorted(
        ["model.embed_token.weight", "elsewhere.x.weight.absmax", "model.old.weight", "model.embed_tokens.weight", "model.norm.weight"]
    )
    assert "'model.embed_tokens.weight' is in the model but not on disk; did you mean 'model.embed_token.weight'" in str(caught.value)


def test_a_companion_of_an_unwanted_weight_is_a_stray():
    with pytest.raises(ValueError, match="2 strays"):
        plan([*WANTED, "model.x.weight", "model.x.weight.absmax"], WANTED, LLAMA)


def test_wanted_paths_decide_between_spellings_that_both_fit():
    rules = Rules((Spelling("outer", same("model")), Spelling("inner", (Rename("model", "model.language_model"),))))
    assert plan(["model.norm.weight"], ["model.language_model.norm.weight"], rules).spelling.name == "inner"
