"""Logits of model folders, with or without an adapter, as transformers and PEFT compute them in fp32. Run by the oracle's Python.

    python compute_logits.py JOBS.json FOLDER

JOBS is {name: {"base": folder, "adapter": folder or null, "inputs": npz}}. FOLDER/name.npz gets logits. PEFT must load every tensor of
an adapter into a model that it adapted at exactly those modules, without a warning.
"""

import json
import pathlib
import sys
import warnings

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file


def with_adapter(model: torch.nn.Module, folder: str) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The library's own deprecations, and a reminder that merging an adapted head unties it.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        model = PeftModel.from_pretrained(model, folder)
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(pathlib.Path(folder) / "adapter_model.safetensors")
    assert set(held) == set(file), f"PEFT holds other tensors than the file: {sorted(set(held) ^ set(file))}"
    assert all(torch.equal(held[name], file[name].to(held[name].dtype)) for name in file), "PEFT holds other values than the file"
    return model


def main(jobs_path: str, folder: str) -> None:
    for name, job in json.loads(pathlib.Path(jobs_path).read_text()).items():
        sees = "vision_config" in json.loads((pathlib.Path(job["base"]) / "config.json").read_text())
        auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
        model, report = auto.from_pretrained(job["base"], dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        bad = {k: v for k, v in report.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        assert not bad, f"{name}: {bad}"
        if job["adapter"]:
            model = with_adapter(model, job["adapter"])
        with np.load(job["inputs"]) as file:
            inputs = {k: torch.from_numpy(v if v.dtype.kind == "f" else v.astype(np.int64)) for k, v in file.items()}
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        np.savez(pathlib.Path(folder) / f"{name}.npz", logits=logits.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
