"""What PEFT and bitsandbytes computed on tiny models: made now if there is an oracle, else the committed folders."""

import functools
import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from flax import nnx

from conversion.safetensors_io import open_checkpoint
from conversion.safetensors_write import write_safetensors
from jaxlora.load import LoadConfig, load
from jaxlora.models import registry
from jaxlora.nn.stack import flatten_leaves, iter_layers
from jaxlora.select import expand
from jaxlora.weights.base import AbstractWeight
from tests.jaxlora.reference import ORACLE_PYTHON, TESTS, reference_folder, run_oracle

GOLDEN = TESTS / "golden" / "peft_parity"
STEPS, ROWS, LENGTH = 20, 2, 16
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "attention_bias": True, "max_position_embeddings": 64, "tie_word_embeddings": True, "rope_theta": 1e4,
}  # fmt: skip
# Every in is a multiple of 64, since bitsandbytes' CPU kernel is wrong for others.
BNB = {**TINY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "attention_bias": False, "tie_word_embeddings": False}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora": dict(r=4, lora_alpha=8, target_modules=ALL),
    "qlora": dict(r=4, lora_alpha=8, target_modules=ALL),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=r"model\.layers\.\d+\.(self_attn\.(q|k)_proj|mlp\.up_proj)",
        rank_pattern={"layers.0.self_attn.q_proj": 2, "up_proj": 3},
        alpha_pattern={".*k_proj": 5},
    ),
    "lm_head": dict(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"]),
    "saved": dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head", "norm"]),
}
LIVE_MODELS = ("gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")


@functools.cache
def peft_folder() -> pathlib.Path:
    """base/, batches.npz, and a folder for each case (and "full") as tests/oracle/make_peft_reference.py writes them."""
    if not ORACLE_PYTHON:
        return GOLDEN
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxlora-peft-"))
    write_peft_reference(folder, models=LIVE_MODELS)
    return folder


@functools.cache
def bnb_folder() -> pathlib.Path:
    """base/ in bfloat16, and nf4/, nf4-double/, fp4/, fp4-double/ as tests/oracle/make_bnb_folders.py writes them."""
    if not ORACLE_PYTHON:
        return TESTS / "golden" / "bnb_folders"
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxlora-bnb-"))
    write_bnb_reference(folder)
    return folder


def expected(case: str) -> dict[str, np.ndarray]:
    """What PEFT computed."""
    with np.load(peft_folder() / case / "expected.npz") as file:
        return dict(file)


def base_of(case: str) -> pathlib.Path:
    """The model under a case's adapter."""
    return reference_folder(case) if case in LIVE_MODELS else peft_folder() / "base"


def write_peft_reference(folder: pathlib.Path, models: tuple[str, ...] = ()) -> None:
    """Draws a base model and batches, and has PEFT train on them; ``models`` adds the parity tests' models."""
    write_model(folder / "base", TINY, np.float32)
    np.savez_compressed(folder / "batches.npz", **batches())
    with tempfile.TemporaryDirectory() as dequantised, tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        write_dequantised(folder / "base", pathlib.Path(dequantised))
        bases = {name: dequantised if name == "qlora" else str(folder / "base") for name in CASES}
        cases = {name: {"base": bases[name], "lora": lora} for name, lora in CASES.items()}
        cases |= {"full": {"base": str(folder / "base"), "lora": None}}
        cases |= {name: {"base": str(reference_folder(name)), "lora": CASES["lora"]} for name in models}
        json.dump({"batches": str(folder / "batches.npz"), "steps": STEPS, "cases": cases}, file)
        file.flush()
        run_oracle("make_peft_reference.py", file.name, folder)


def write_bnb_reference(folder: pathlib.Path) -> None:
    """Draws a bfloat16 model and has bitsandbytes quantise it."""
    write_model(folder / "base", BNB, ml_dtypes.bfloat16)
    run_oracle("make_bnb_folders.py", folder / "base", folder)


def batches(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch a step, [STEPS, ROWS, LENGTH]: rows of different lengths, prompts without labels."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, TINY["vocab_size"], (STEPS, ROWS, LENGTH), dtype=np.int32)
    lengths, prompts = rng.integers(9, LENGTH + 1, (2, STEPS, ROWS)) - [[[0]], [[6]]]
    column = np.arange(LENGTH)
    mask = column < lengths[..., None]
    labels = np.where(mask & (column >= prompts[..., None]), ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask.astype(np.int32), "labels": labels.astype(np.int32)}


def write_model(folder: pathlib.Path, config: dict, dtype: type) -> None:
    """Writes a random model: matrices N(0, 1/in), embeddings N(0, 1), norms U(0.5, 1.5), biases N(0, 0.5)."""
    spec, rng = registry.get(config["model_type"]), np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    model, tensors = spec.build(spec.read(config), dtype=np.float32), {}
    for stacked, leaf in flatten_leaves(nnx.to_pure_dict(nnx.state(model))).items():
        shape = leaf.shape if isinstance(leaf, AbstractWeight) else leaf.shape[-1:]
        for path in expand(stacked):
            if path.endswith("norm.weight"):
                value = rng.uniform(0.5, 1.5, shape)
            else:
                value = rng.normal(size=shape) * (0.5 if path.endswith("bias") else 1 if "embed" in path else shape[1] ** -0.5)
            tensors[path] = value.astype(np.float32).astype(dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    dtype_name = "bfloat16" if dtype is ml_dtypes.bfloat16 else "float32"
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype_name}, indent=2))


def write_dequantised(base: pathlib.Path, folder: pathlib.Path) -> None:
    """The model as NF4 decodes it, in fp32: what PEFT has to be given to train as QLoRA does."""
    loaded = load(base, LoadConfig(load_in_4bit=True, quant_type="nf4", dtype="float32"))
    checkpoint = open_checkpoint(base)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    for path, leaf in iter_layers(nnx.to_pure_dict(nnx.state(loaded.model))):
        if isinstance(leaf, AbstractWeight) and not leaf.trainable:
            tensors[path] = np.asarray(leaf.dequantise())
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
