"""Where the parity tests get their reference: committed golden folders, or the oracle's Python, live."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import tempfile

import numpy as np
from flax import nnx

from jaxlora.load import LoadConfig, Loaded, load
from jaxlora.models import registry
from jaxlora.models.spec import ModelSpec
from tests.jaxlora.models import llava_configs

TESTS = pathlib.Path(__file__).parents[1]
ORACLE_PYTHON = os.environ.get("JAXLORA_ORACLE_PYTHON")

# Vision-language models need images in their inputs; all others are written by make_reference.py.
MAKERS = {
    "gemma3": "make_gemma3.py",
    "mllama": "make_mllama.py",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "make_qwen_vl.py"),
    **dict.fromkeys(llava_configs.CONFIGS, "make_llava.py"),
}


def config_of(name: str) -> dict:
    """The config.json of a reference: its own, or the tiny one of the model_type that it is named after."""
    return dict(llava_configs.CONFIGS.get(name) or registry.get(name).tiny)


def spec_of(name: str) -> ModelSpec:
    """The architecture of a reference."""
    return registry.get(config_of(name)["model_type"])


def run_oracle(script: str, *args: object) -> str:
    """Runs a script of tests/oracle with the oracle's Python; its output."""
    assert ORACLE_PYTHON, "set JAXLORA_ORACLE_PYTHON to a Python with torch, transformers, peft and bitsandbytes"
    command = [ORACLE_PYTHON, str(TESTS / "oracle" / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, f"{script} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def reference_folder(model_type: str) -> pathlib.Path:
    """A tiny Hugging Face model with expected.npz: made now if there is an oracle, else the committed one."""
    if not ORACLE_PYTHON:
        return TESTS / "golden" / model_type
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"jaxlora-{model_type}-"))
    write_reference(model_type, folder)
    return folder


def fresh(model_type: str, **options: object) -> Loaded:
    """A reference as ``load`` gives it, for a test to change: new modules over arrays that are loaded once, and that nobody may donate."""
    loaded = _loaded(model_type, LoadConfig(**options))
    return dataclasses.replace(loaded, model=nnx.merge(*nnx.split(loaded.model)))


@functools.cache
def _loaded(model_type: str, config: LoadConfig) -> Loaded:
    return load(reference_folder(model_type), config)


def write_reference(model_type: str, folder: pathlib.Path) -> None:
    """Has the oracle write the reference of that name."""
    spec = spec_of(model_type)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({**config_of(model_type), "architectures": [spec.architecture]}, file)
        file.flush()
        run_oracle(MAKERS.get(model_type, "make_reference.py"), file.name, folder)


def expected(model_type: str) -> dict[str, np.ndarray]:
    """What transformers computed."""
    with np.load(reference_folder(model_type) / "expected.npz") as file:
        return dict(file)


# Scalings of rotary positions, each with the text lengths at which transformers is asked for its frequencies.
ROPE_CASES = {
    "default": ({}, [1]),
    "linear": ({"rope_type": "linear", "factor": 4.0}, [1]),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, [5, 64, 65, 200, 1000]),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        [1],
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, [1]),
    "yarn of gpt-oss": (
        {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 1.5e5},
        [1],
    ),
    "yarn of deepseek": (
        {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 1.2},
        [1],
    ),
    "yarn with its factor": ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.7}, [1]),
    "yarn that shortens": ({"rope_type": "yarn", "factor": 0.5}, [1]),
    "yarn with an empty band": ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2}, [1]),
}
# A Llama's config.json but for its rope_parameters.
ROPE_MODEL = {"head_dim": 24, "hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64}


def rope_config(case: str) -> dict:
    """The text configuration of a case of ``ROPE_CASES``."""
    return {**ROPE_MODEL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **ROPE_CASES[case][0]}}


@functools.cache
def rope_expected() -> dict:
    """For each case [frequencies, attention factor] at each of its lengths, from ROPE_INIT_FUNCTIONS."""
    if not ORACLE_PYTHON:
        return json.loads((TESTS / "golden" / "rope" / "expected.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        write_rope_reference(pathlib.Path(folder))
        return json.loads((pathlib.Path(folder) / "expected.json").read_text())


def write_rope_reference(folder: pathlib.Path) -> None:
    """Has the oracle compute the frequencies of every case."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = {name: {"config": rope_config(name), "lengths": lengths} for name, (_, lengths) in ROPE_CASES.items()}
    run_oracle("make_rope.py", json.dumps(cases), folder / "expected.json")
