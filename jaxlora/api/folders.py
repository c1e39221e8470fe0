"""From a name to a folder: a local one as it is, else a hub repository's safetensors snapshot."""

import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import huggingface_hub
import transformers

from conversion.atomic import files_into
from jaxlora.data.processors import TOKENIZER_FILES, load_processor

# Never weights that unpickle, never code.
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def cache() -> pathlib.Path:
    """Where what can be made again is kept: compiled programs, choices."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxlora"


def resolve(name: str | pathlib.Path, *, token: str | None = None, revision: str | None = None) -> pathlib.Path:
    """The local folder of a model or adapter; downloads a hub repository once.

    Raises:
      ValueError: neither a folder nor a repository that can be reached.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ValueError(f"there is no folder {str(name)!r}")
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(name), token=token, revision=revision, allow_patterns=list(HUB_FILES)))
    except (OSError, huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError) as error:
        raise ValueError(f"{str(name)!r} is no local folder, and the hub gave: {error}") from error


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: pathlib.Path) -> str:
    """The base model that an adapter names.

    Raises:
      ValueError: it names none.
    """
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder}/adapter_config.json names no base_model_name_or_path: load the base, then the adapter")
    return base


def processor_of(folders: Sequence[pathlib.Path], model_type: str) -> Any:
    """The processor (or tokenizer) of the first folder that has tokenizer files, else None with a warning."""
    found = next((folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)), folders[-1])
    return load_processor(found, model_type)


def save_processor(processor: Any, folder: str | pathlib.Path) -> None:
    """A processor's or tokenizer's files, each of which replaces an older one only when all are written."""
    with files_into(folder) as new:
        processor.save_pretrained(new)


def hf_config(folder: pathlib.Path) -> Any:
    """The configuration as transformers' object; no weights and no code are read."""
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON file as a dict."""
    return json.loads(path.read_text())


def push(repo_id: str, save: Callable[[str], None], *, token: str | None = None) -> None:
    """Saves into a temporary folder and uploads that to a hub repository, which is made if it does not exist."""
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/{repo_id.rpartition('/')[2]}"
        save(folder)
        api = huggingface_hub.HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
