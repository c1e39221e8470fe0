"""The files beside the weights: which are copied with a merged model, and config.json with as little changed as possible."""

import json
import logging
import os
import pathlib
from fnmatch import fnmatchcase
from typing import Any

from conversion.safetensors_io import INDEX_NAME, check_names, parse_json

log = logging.getLogger(__name__)

CONFIG = "config.json"
# Tokenizers, processors, templates and generation settings; never code, pickles, or another library's weights.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_COPIED = (CONFIG, INDEX_NAME, "*.index.json", "adapter_config.json", "trainer_state.json")
_MOST_BYTES = 256 * 2**20


def read_small_files(folder: str | os.PathLike) -> dict[str, bytes]:
    """Returns the files of a model folder that a merged model needs too, by name, without config.json and weights.

    Raises:
      CheckpointError: if one of them is a link out of the folder.
    """
    root = pathlib.Path(folder)
    names = {p.name for p in root.iterdir() if p.is_file() and any(fnmatchcase(p.name, pattern) for pattern in _COPIED)}
    names = {name for name in names if not any(fnmatchcase(name, pattern) for pattern in _NOT_COPIED)}
    check_names(root, names)
    large = {name for name in names if (root / name).stat().st_size > _MOST_BYTES}
    if large:
        log.warning("not copied, being larger than %d MiB: %s", _MOST_BYTES // 2**20, ", ".join(sorted(large)))
    return {name: (root / name).read_bytes() for name in sorted(names - large)}


def edit_config(raw: bytes, *, untied: bool) -> bytes:
    """Returns config.json without ``quantization_config`` and, with ``untied``, with a false tie flag; else byte for byte.

    >>> edit_config(b'{"a": 1}', untied=False)
    b'{"a": 1}'
    >>> json.loads(edit_config(b'{"a": 1, "quantization_config": {}}', untied=True))
    {'a': 1, 'tie_word_embeddings': False}
    """
    fields = parse_json(raw.lstrip())
    parts = [fields, *(v for v in fields.values() if isinstance(v, dict))]
    quantised = [part for part in parts if "quantization_config" in part]
    if not quantised and not untied:
        return raw
    for part in quantised:
        del part["quantization_config"]
    if untied:
        fields["tie_word_embeddings"] = False
        # Older transformers read the flag of the text model.
        text: Any = fields.get("text_config")
        if isinstance(text, dict):
            text["tie_word_embeddings"] = False
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
