"""The examples in all docstrings of the packages run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import conversion
import jaxlora
import pallas_kernels

PACKAGES = (jaxlora, conversion, pallas_kernels)
NAMES = [info.name for package in PACKAGES for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
# Device code needs Triton, which only a GPU does.
MODULES = [name for name in NAMES if not name.endswith(("triton_code", "__main__"))]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0
