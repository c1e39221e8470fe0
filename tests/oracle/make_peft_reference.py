"""Trains adapters with PEFT and torch and writes every loss and gradient. Run by the oracle's Python (torch, transformers, peft).

    python make_peft_reference.py SPEC.json FOLDER

SPEC is {"batches": npz, "steps": n, "cases": {name: {"base": folder, "lora": LoraConfig's arguments, or null to train the whole model}}}.
FOLDER/name gets the adapter that PEFT saved with A and B random (random/) and with B = 0 (zero/), and expected.npz: the losses of
``steps`` AdamW steps from B = 0, the gradients at the random values ("random:path") and after 5 steps ("later:path"), and logits.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

OPTIMIZER = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
WEIGHT_DECAY = 0.01
WARMUP, MAX_GRAD_NORM, LATER = 2, 1.0, 5


def path_of(name: str) -> str:
    """PEFT's name of a parameter as the module path that adapters are saved under, with A and B as ``.lora_A`` and ``.lora_B``."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return name.removesuffix(".default.weight")


def gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {path_of(n): p.grad.numpy().copy() for n, p in model.named_parameters() if p.requires_grad}


def redraw(model: torch.nn.Module, *, zero_b: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad and ".lora_" in name:
            is_b = ".lora_B." in name
            # An update smaller than the weight, as training gives: a larger one makes the logits' rounding larger too.
            drawn = torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5 * (0.25 if is_b else 1)
            p.data = torch.zeros_like(p) if zero_b and is_b else drawn


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), gradients(model)


def train(model, batches, steps):
    """Returns the losses, and the gradients of step LATER."""
    # The groups that transformers' Trainer makes: norms and biases do not decay. The method reads nothing of its trainer.
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **OPTIMIZER)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, steps)
    losses, later = [], {}
    for step in range(steps):
        loss, grads = loss_and_gradients(model, batches[step])
        losses.append(loss)
        later = grads if step == LATER else later
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
    return losses, later


def run(case: dict, batches: list[dict], steps: int, folder: pathlib.Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(case["base"], dtype=torch.float32, attn_implementation="eager").train()
    if case["lora"] is not None:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **case["lora"]))
        model.peft_config["default"].base_model_name_or_path = "someone/tiny"
        redraw(model, zero_b=False, seed=1)
        save(model, folder / "random")
    _, random = loss_and_gradients(model, batches[0])
    with torch.no_grad():
        logits = model(**batches[0]).logits.numpy()
    arrays = {f"random:{k}": v for k, v in random.items()} | {"logits": logits}
    if case["lora"] is not None:
        redraw(model, zero_b=True, seed=2)
        save(model, folder / "zero")
        losses, later = train(model, batches, steps)
        arrays |= {f"later:{k}": v for k, v in later.items()} | {"losses": np.array(losses)}
    np.savez_compressed(folder / "expected.npz", **arrays)


def save(model, folder: pathlib.Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def main(spec_path: str, folder: str) -> None:
    torch.manual_seed(0)
    spec = json.loads(pathlib.Path(spec_path).read_text())
    with np.load(spec["batches"]) as file:
        arrays = {k: torch.from_numpy(v.astype(np.int64)) for k, v in file.items()}
    batches = [{k: v[i] for k, v in arrays.items()} for i in range(spec["steps"])]
    for name, case in spec["cases"].items():
        target = pathlib.Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        run(case, batches, spec["steps"], target)


if __name__ == "__main__":
    main(*sys.argv[1:])
