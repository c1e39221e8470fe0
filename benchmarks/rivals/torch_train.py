"""A LoRA or QLoRA step of a text model in Unsloth, or in transformers + PEFT + bitsandbytes.

    python -m benchmarks.rivals.torch_train --stack unsloth --gc off --checkpoint FOLDER

FOLDER is one of ``benchmarks.make_checkpoint``; the batch and the optimizer are those of ``benchmarks.train_step``.
"""

import argparse
import json
from typing import Any

from benchmarks.rivals import measure
from benchmarks.workload import make_inputs


def load(args: argparse.Namespace) -> Any:
    """The adapted model, ready to train."""
    return {"unsloth": load_unsloth, "hf": load_hf}[args.stack](args)


def load_unsloth(args: argparse.Namespace) -> Any:
    # Before torch and transformers, which it patches.
    from unsloth import FastLanguageModel  # isort: skip
    import torch

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(args.checkpoint), max_seq_length=args.sequence, dtype=torch.bfloat16, load_in_4bit=args.bits == 4
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=args.rank,
        target_modules=list(measure.TARGETS),
        lora_alpha=args.rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=measure.checkpointing(args.gc),
        random_state=3407,
    )
    FastLanguageModel.for_training(model)
    return model


def load_hf(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": measure.nf4()} if args.bits == 4 else {}
    place = {"": 0 if args.device == "cuda" else args.device}
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.bfloat16, device_map=place, attn_implementation="sdpa", **options
    )
    return measure.adapt_with_peft(model, list(measure.TARGETS), args)


def main() -> None:
    args = measure.parse(__doc__, rows=4, sequence=2048, steps=8, bits=4, rank=16)
    inputs = make_inputs(json.loads((args.checkpoint / "config.json").read_text()), args.rows, args.sequence)
    if args.stack == "unsloth":
        # Its faster way: without a mask, rows are known to be whole.
        del inputs["attention_mask"]
    measure.train(load, inputs, args)


if __name__ == "__main__":
    main()
