"""Writes transformers' rotary frequencies. Run by the oracle's Python: ``python make_rope.py CASES EXPECTED.json``.

CASES is {name: {"config": a Llama's config.json, "lengths": [...]}} as JSON; EXPECTED gets {name: [[frequencies, factor] a length]}.
"""

import json
import pathlib
import sys

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def main(cases: str, path: str) -> None:
    found = {}
    for name, case in json.loads(cases).items():
        config = transformers.LlamaConfig(**case["config"])
        kind = config.rope_parameters["rope_type"]
        compute = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        made = [compute(config, seq_len=length) for length in case["lengths"]]
        found[name] = [[inverse.tolist(), factor] for inverse, factor in made]
    pathlib.Path(path).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
