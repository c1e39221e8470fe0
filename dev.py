#!/usr/bin/env python3
"""Sets up what a command needs and runs it: ``python3 dev.py quickstart | test | check | oracle | shell``.

Needs a Python 3.12 or newer somewhere on the machine, with pip; everything else it installs into .venv, from the registry that pip uses.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent
EXTRAS = {"quickstart": "quickstart", "test": "dev", "check": "dev", "oracle": "dev", "shell": "dev"}
ORACLE_PINS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "bitsandbytes==0.50.2",
    "accelerate==1.15.0",
    "pillow",
    "safetensors",
    "triton==3.6.0",
)
# A file's tests share models and references, which a second worker would make again.
PYTEST = ("-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
# Tests whose reference is a live torch, transformers, peft or bitsandbytes when there is one.
LIVE = (
    "test_vision_peft_parity.py",
    "models/test_qwen_vl.py",
    "models/test_llava.py",
    "models/test_parity.py",
    "models/test_mllama.py",
    "models/test_gemma3.py",
    "models/test_qwen_vl_towers.py",
    "test_peft_parity.py",
    "test_export.py",
    "test_export_quantised.py",
    "test_adapt.py",
    "data/test_processors.py",
    "nn/test_rope.py",
    "train/test_optim.py",
)
# Names of tests in those files that ask no reference: they have run with all others.
NO_REFERENCE = (
    "moves_the_logits or is_trained or generation_continues or padding_changes or packed_rows or remat_changes or data_shards or "
    "dropout_follows or are_refused or is_refused or quantising_leaves or every_field"
)


def main() -> int:
    """Runs one command; its exit status."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command not in EXTRAS:
        print(__doc__)
        return 2
    python = environment(EXTRAS[command])
    return {"quickstart": quickstart, "test": test, "check": check, "oracle": oracle, "shell": shell}[command](python, arguments)


def quickstart(python: pathlib.Path, arguments: list[str]) -> int:
    """Trains on real digits, from nothing, offline."""
    return run(python, "-m", "jaxlora.cli", "quickstart", *arguments)


def test(python: pathlib.Path, arguments: list[str]) -> int:
    """All tests that need no torch and no GPU."""
    return run(python, *PYTEST, *arguments)


def check(python: pathlib.Path, arguments: list[str]) -> int:
    """Lint, format, types, import contracts."""
    steps = (
        ("-m", "ruff", "check", "."),
        ("-m", "ruff", "format", "--check", "."),
        ("-m", "pyright", "--pythonpath", str(python)),
        ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"),
    )
    return max(run(python, *step) for step in steps)


def oracle(python: pathlib.Path, arguments: list[str]) -> int:
    """The parity tests against torch, live; that environment is made outside the tree and kept by the hash of its pins."""
    os.environ["JAXLORA_ORACLE_PYTHON"] = str(oracle_environment())
    files = [*(f"tests/jaxlora/{name}" for name in LIVE), "tests/pallas_kernels/test_device_code.py"]
    return run(python, *PYTEST, "-k", f"not ({NO_REFERENCE})", *arguments, *files)


def shell(python: pathlib.Path, arguments: list[str]) -> int:
    """Any program of the environment."""
    return run(python, *arguments)


def run(python: pathlib.Path, *arguments: str) -> int:
    """Runs the environment's Python in the repository."""
    print("+", "python", *arguments, flush=True)
    return subprocess.run([str(python), *arguments], cwd=ROOT).returncode


def environment(extra: str) -> pathlib.Path:
    """The .venv with jaxlora and an extra, made or completed if need be."""
    folder = ROOT / ".venv"
    python = folder / "bin" / "python"
    pins = hashlib.sha256(b"".join((ROOT / f).read_bytes() for f in ("pyproject.toml", "constraints.txt"))).hexdigest()
    done = folder / f"installed-{extra}"
    if done.is_file() and done.read_text() == pins:
        return python
    started = time.perf_counter()
    if not python.exists():
        print(f"making {folder}", flush=True)
        subprocess.run([newest_python(), "-m", "venv", str(folder)], check=True)
    print(f"installing jaxlora[{extra}]", flush=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[{extra}]"], check=True)
    done.write_text(pins)
    print(f"installed in {time.perf_counter() - started:.0f} s", flush=True)
    return python


def oracle_environment() -> pathlib.Path:
    """A Python 3.11 environment with torch for the CPU, transformers, peft and bitsandbytes."""
    pins = hashlib.sha256(" ".join(ORACLE_PINS).encode()).hexdigest()[:12]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    folder = cache / "jaxlora" / f"oracle-{pins}"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file():
        found = shutil.which("python3.11") or sys.exit("the oracle needs python3.11 on the PATH")
        # .python-version asks for 3.12, which a version manager's python3.11 would obey.
        settings = {**os.environ, "PYENV_VERSION": "3.11:3.11.7"}
        print(f"making {folder}", flush=True)
        subprocess.run([found, "-m", "venv", "--clear", str(folder)], check=True, cwd="/", env=settings)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *ORACLE_PINS], check=True)
        done.write_text("\n".join(ORACLE_PINS))
    return python


def newest_python() -> str:
    """A Python of at least 3.12: this one, or one on the PATH."""
    if sys.version_info >= (3, 12):
        return sys.executable
    for name in ("python3.12", "python3.13", "python3.14"):
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", "pass"], capture_output=True).returncode == 0:
            return found
    sys.exit(f"jaxlora needs Python 3.12 or newer; this is {sys.version.split()[0]}, and no newer one is on the PATH")


if __name__ == "__main__":
    sys.exit(main())
