"""Where the parity tests get their reference: committed golden folders, or the oracle's Python, live."""

import functools
import json
import os
import pathlib
import subprocess
import tempfile

import numpy as np

from jaxlora.models import registry

TESTS = pathlib.Path(__file__).parents[1]
ORACLE_PYTHON = os.environ.get("JAXLORA_ORACLE_PYTHON")


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


def write_reference(model_type: str, folder: pathlib.Path) -> None:
    """Has the oracle write the reference of an architecture's tiny config."""
    spec = registry.get(model_type)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({**spec.tiny, "architectures": [spec.architecture]}, file)
        file.flush()
        run_oracle("make_reference.py", file.name, folder)


def expected(model_type: str) -> dict[str, np.ndarray]:
    """What transformers computed."""
    with np.load(reference_folder(model_type) / "expected.npz") as file:
        return dict(file)
