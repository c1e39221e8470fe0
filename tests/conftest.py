"""Runs every annotation of the three packages, and makes implicit rank promotion an error."""

import gc
import importlib.util
import os
import tempfile

if not os.environ.get("JAXLORA_TEST_GPU"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Tiny programs, compiled once and run once: LLVM's optimisations cost twice what they save, and XLA's newer emitters, which make an
    # MLIR context and a pass pipeline for each fusion, take twice as long as the older ones.
    flags = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ.setdefault("XLA_FLAGS", flags)
    # Workers and the processes that they start compile many of the same programs: the first to come keeps them for the others.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        programs = tempfile.TemporaryDirectory(prefix="jaxlora-programs-")
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": programs.name, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

if importlib.util.find_spec("beartype"):
    import jaxtyping

    from tests import annotations

    jaxtyping.install_import_hook(["jaxlora", "pallas_kernels", "conversion"], f"{annotations.__name__}.checked")

import jax
import pytest

# Tracing makes many objects and little garbage: one twentieth of the suite's time was spent looking for it.
gc.set_threshold(200_000, 20, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key():
    return jax.random.key(0)


# Files of few and long tests: begun last, one of them would keep one worker busy while the other has nothing left.
LONG = ("test_quickstart.py", "test_examples.py", "test_resume.py", "test_user_scripts.py", "test_vision_peft_parity.py")


def pytest_collection_modifyitems(config, items):
    """Long files first; without a GPU, or the oracle's Python, tests that need it are deselected: counted, not hidden among the results."""
    items.sort(key=lambda item: item.path.name not in LONG)
    present = {"gpu": os.environ.get("JAXLORA_TEST_GPU"), "oracle": os.environ.get("JAXLORA_ORACLE_PYTHON")}
    lacking = [marker for marker, found in present.items() if not found]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in lacking)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
