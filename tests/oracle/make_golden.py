"""Writes the committed references: ``JAXLORA_ORACLE_PYTHON=… python -m tests.oracle.make_golden [name …]``.

A name is a model_type, "peft_parity" or "bnb_folders".
"""

import shutil
import sys

from tests.jaxlora.peft_reference import write_bnb_reference, write_peft_reference
from tests.jaxlora.reference import TESTS, write_reference

TEXT = ("llama", "mistral", "qwen2", "qwen3")
WRITERS = {"peft_parity": write_peft_reference, "bnb_folders": write_bnb_reference}

for name in sys.argv[1:] or (*TEXT, *WRITERS):
    folder = TESTS / "golden" / name
    shutil.rmtree(folder, ignore_errors=True)
    if name in WRITERS:
        WRITERS[name](folder)
    else:
        write_reference(name, folder)
    print("wrote", folder)
