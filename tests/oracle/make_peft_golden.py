"""Writes tests/golden/peft: adapters that PEFT saved for a tiny Llama, and what PEFT decides about module paths.

Run from the repository root, in the oracle's environment: python tests/oracle/make_peft_golden.py
"""

import json
import pathlib

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "peft"
ADAPTERS = {
    "plain": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r"model\.layers\.\d+\.(self_attn\.(q|k)_proj|mlp\.up_proj)",
        rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 3},
        alpha_pattern={".*k_proj": 5},
        modules_to_save=["norm"],
    ),
    "embedding": dict(r=2, lora_alpha=4, target_modules=["embed_tokens", "lm_head", "o_proj"]),
}
PATHS = [
    f"model.{tower}.{i}.{leaf}"
    for tower, leaves in {
        "language_model.layers": ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.1.up_proj"),
        "visual.blocks": ("attn.qkv", "mlp.fc1"),
    }.items()
    for i in (0, 1, 10)
    for leaf in leaves
] + ["model.visual.merger.mlp.0", "lm_head", "up_proj", "model.setup_proj"]
TARGETS = [
    dict(target_modules=["up_proj", "qkv"]),
    dict(target_modules=["mlp.up_proj", "lm_head", "model.visual.blocks.1.mlp.fc1"], layers_to_transform=[0]),
    dict(target_modules=["up_proj", "qkv", "fc1"], layers_to_transform=[1], layers_pattern=["layers"]),
    dict(target_modules=["up_proj", "qkv", "fc1"], layers_to_transform=1),
    dict(target_modules=["up_proj", "qkv", "fc1", "0"], layers_to_transform=[0, 10], layers_pattern=["layers", "blocks"]),
    dict(target_modules=r".*\.(up_proj|fc1)"),
    dict(target_modules=r"up_proj"),
    dict(target_modules=["up_proj", "qkv"], exclude_modules=["attn.qkv"]),
    dict(target_modules=["up_proj", "qkv"], exclude_modules=r".*language_model.*"),
    dict(target_modules=["up_proj", "lm_head", "fc1"], modules_to_save=["lm_head", "visual"]),
]
PATTERNS = [["up_proj"], ["layers.1.mlp.up_proj", ".*up_proj"], ["1"], [r"layers\.\d\..*", "qkv"], ["proj", "self_attn.*"], ["lm_head|fc1"]]


def tiny_llama() -> LlamaForCausalLM:
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=16)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def save_adapters() -> None:
    for name, options in ADAPTERS.items():
        model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **options))
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        model.peft_config["default"].base_model_name_or_path = "someone/tiny-llama"
        model.save_pretrained(FOLDER / name)
        (FOLDER / name / "README.md").unlink()
        adapted = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
        scales, ranks = {n: m.scaling["default"] for n, m in adapted.items()}, {n: m.r["default"] for n, m in adapted.items()}
        (FOLDER / name / "expected.json").write_text(json.dumps({"scales": scales, "ranks": ranks}, indent=1))


def save_decisions() -> None:
    def targeted(config: LoraConfig, path: str) -> bool:
        found = check_target_module_exists(config, path)
        return bool(found) and not isinstance(found, _ExcludedModule)

    targets = [{"config": t, "hits": [p for p in PATHS if targeted(LoraConfig(**t), p)]} for t in TARGETS]
    found = [{"keys": keys, "found": {p: get_pattern_key(keys, p) for p in PATHS}} for keys in PATTERNS]
    (FOLDER / "decisions.json").write_text(json.dumps({"paths": PATHS, "targets": targets, "patterns": found}, indent=1))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_adapters()
    save_decisions()
