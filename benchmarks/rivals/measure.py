"""What the rivals' scripts share: their arguments, the timed steps, the RESULT line. torch is imported where Unsloth has already been."""

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import results

GB = 1e9
WARMUPS = 3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "unsloth")


def parse(description: str, *, stack: tuple[str, ...] = ("unsloth", "hf"), **defaults: int) -> argparse.Namespace:
    """The arguments of a script; ``defaults`` are its own integers. Also keeps the libraries from asking the network."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--stack", choices=stack, required=True, help="hf: transformers + PEFT + bitsandbytes")
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--device", default="cuda", help='"cpu" only shows that the script runs')
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    if "steps" in defaults:
        parser.add_argument("--gc", choices=("unsloth", "on", "off"), default="on", help="gradient checkpointing")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1", TOKENIZERS_PARALLELISM="false")
    # Else long rows do not fit 80 GB, for all the pieces between what torch holds.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    args = parser.parse_args()
    if args.stack == "hf" and vars(args).get("gc") == "unsloth":
        parser.error('--gc unsloth is Unsloth\'s own; --stack hf has "on" and "off"')
    return args


def checkpointing(gc: str) -> bool | str:
    """Unsloth's ``use_gradient_checkpointing``."""
    return {"unsloth": "unsloth", "on": True, "off": False}[gc]


def nf4() -> Any:
    """QLoRA's configuration of bitsandbytes."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


def adapt_with_peft(model: Any, targets: Any, args: argparse.Namespace) -> Any:
    """A transformers model, prepared and adapted as PEFT's guide to QLoRA does."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    options = {"use_reentrant": False}
    if args.bits == 4:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gc == "on", gradient_checkpointing_kwargs=options)
    elif args.gc == "on":
        model.gradient_checkpointing_enable(options)
        model.enable_input_require_grads()
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, lora_dropout=0, bias="none", target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    model.config.use_cache = False
    return model


def train(load: Callable[[argparse.Namespace], Any], inputs: Mapping[str, np.ndarray], args: argparse.Namespace) -> None:
    """Loads the model, times steps of AdamW on one batch, each waited for, and prints the RESULT line."""
    started = time.perf_counter()
    model = load(args)
    load_s = time.perf_counter() - started
    import torch

    batch = {name: torch.from_numpy(array).to(args.device) for name, array in inputs.items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    base_gb = allocated_gb(args, restart_peak=True)
    seconds, losses = [], []
    for _ in range(WARMUPS + args.steps):
        wait(args)
        started = time.perf_counter()
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(args)
        seconds.append(time.perf_counter() - started)
        losses.append(round(loss.item(), 4))
    step_s = statistics.median(seconds[WARMUPS:])
    figures = {"step_s": round(step_s, 4), "tok_s": round(args.rows * args.sequence / step_s), "base_gb": base_gb}
    report(args, "train", {**figures, "load_s": round(load_s, 1), "trainable": sum(p.numel() for p in parameters), "losses": losses})


def report(args: argparse.Namespace, task: str, figures: Mapping[str, Any]) -> None:
    """Prints the RESULT line: what was run, its figures, the allocator's peak, and where it was."""
    import torch

    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    names = ("bits", "gc", "rank", "rows", "sequence")
    settings = {name: vars(args)[name] for name in names if name in vars(args)}
    row = {"task": task, "system": args.stack, "model": args.checkpoint.name, **settings, **figures}
    row["peak_gb"] = peak_gb(args)
    results.print_result({**row, **results.provenance(device, PACKAGES)})


def wait(args: argparse.Namespace) -> None:
    """Until the device has done what it was given."""
    import torch

    torch.get_device_module(args.device).synchronize()


def allocated_gb(args: argparse.Namespace, *, restart_peak: bool = False) -> float:
    """What torch holds on the GPU; 0 on a CPU, where nobody counts."""
    import torch

    if args.device != "cuda":
        return 0.0
    if restart_peak:
        torch.cuda.reset_peak_memory_stats()
    return round(torch.cuda.memory_allocated() / GB, 2)


def peak_gb(args: argparse.Namespace) -> float:
    """The most that torch held since the peak was restarted; 0 on a CPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / GB, 2) if args.device == "cuda" else 0.0
