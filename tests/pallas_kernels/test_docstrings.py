import doctest
import importlib
import pkgutil

import pytest

import pallas_kernels

# Device code needs Triton, which only a GPU does.
MODULES = [info.name for info in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels.") if not info.name.endswith("triton_code")]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0
