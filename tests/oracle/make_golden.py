"""Writes the committed references of the text models: ``JAXLORA_ORACLE_PYTHON=… python -m tests.oracle.make_golden [model_type …]``."""

import sys

from tests.jaxlora.reference import TESTS, write_reference

for model_type in sys.argv[1:] or ("llama", "mistral", "qwen2", "qwen3"):
    write_reference(model_type, TESTS / "golden" / model_type)
    print("wrote", TESTS / "golden" / model_type)
