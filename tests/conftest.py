"""Runs every annotation of the three packages, and makes implicit rank promotion an error."""

import importlib.util
import os

os.environ.setdefault("JAX_PLATFORMS", "") if os.environ.get("JAXLORA_TEST_GPU") else os.environ.setdefault("JAX_PLATFORMS", "cpu")

if importlib.util.find_spec("beartype"):
    import jaxtyping

    jaxtyping.install_import_hook(["jaxlora", "pallas_kernels", "conversion"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key():
    return jax.random.key(0)
