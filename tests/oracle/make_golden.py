"""Writes the committed references: ``JAXLORA_ORACLE_PYTHON=… python -m tests.oracle.make_golden [name …]``.

A name is that of a reference (a model_type, or one of its towers), "peft_parity", "vision_peft" (of one model: "vision_peft/mllama"),
"bnb_folders", "rope", "images" (processors), or "videos", for which alone the oracle's Python needs torchvision, and which is written only
when asked for.
"""

import functools
import shutil
import sys

from tests.jaxlora import vision_peft
from tests.jaxlora.data import processor_reference
from tests.jaxlora.models.llava_configs import CONFIGS
from tests.jaxlora.peft_reference import write_bnb_reference, write_peft_reference
from tests.jaxlora.reference import TESTS, write_reference, write_rope_reference

MODELS = ("gemma2", "gemma3", "gemma3_text", "llama", "mistral", "mllama", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_vl", *CONFIGS)
WRITERS = {
    "peft_parity": write_peft_reference,
    "vision_peft": vision_peft.write_all,
    "bnb_folders": write_bnb_reference,
    "rope": write_rope_reference,
}
OF_ONE = {f"vision_peft/{name}": functools.partial(vision_peft.write_committed, name) for name in vision_peft.MODELS}
# Two kinds of files in one folder.
PROCESSED = {f"{kind}s": functools.partial(processor_reference.write_all, kind=kind) for kind in ("image", "video")}

for name in sys.argv[1:] or (*MODELS, *WRITERS, "images"):
    folder = TESTS / "golden" / ("processors" if name in PROCESSED else name)
    if name in PROCESSED:
        PROCESSED[name](folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        {**WRITERS, **OF_ONE}.get(name, functools.partial(write_reference, name))(folder)
    print("wrote", folder)
