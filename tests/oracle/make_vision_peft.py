"""Has PEFT adapt a vision-language model and writes its loss, logits and every gradient. Run by the oracle's Python.

    python make_vision_peft.py SPEC.json FOLDER

SPEC is {"base": folder, "inputs": npz, "cases": {name: LoraConfig's arguments}}. FOLDER/name gets the adapter that PEFT saved, with A and
B random, and expected.npz: the loss, logits at tokens, and the gradients ("random:path").
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from make_peft_reference import loss_and_gradients, redraw, save
from peft import LoraConfig, get_peft_model


def main(spec_path: str, folder: str) -> None:
    spec = json.loads(pathlib.Path(spec_path).read_text())
    with np.load(spec["inputs"]) as file:
        inputs = {name: torch.from_numpy(array) for name, array in file.items()}
    for name, lora in spec["cases"].items():
        base = transformers.AutoModelForImageTextToText.from_pretrained(spec["base"], dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(base.train(), LoraConfig(task_type="CAUSAL_LM", **lora))
        model.peft_config["default"].base_model_name_or_path = "someone/tiny"
        redraw(model, zero_b=False, seed=1)
        target = pathlib.Path(folder) / name
        save(model, target)
        loss, gradients = loss_and_gradients(model, inputs)
        with torch.no_grad():
            logits = model(**inputs).logits[inputs["attention_mask"].bool()].numpy()
        np.savez_compressed(target / "expected.npz", loss=loss, logits=logits, **{f"random:{k}": v for k, v in gradients.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
