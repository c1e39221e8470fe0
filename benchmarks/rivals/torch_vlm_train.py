"""A QLoRA step of Qwen2-VL, both towers adapted, in Unsloth, or in transformers + PEFT + bitsandbytes; one 896 x 896 image a row.

    python -m benchmarks.rivals.torch_vlm_train --stack unsloth --gc unsloth --checkpoint FOLDER

FOLDER is one of ``benchmarks.make_checkpoint``; the batch and the optimizer are those of ``benchmarks.train_step``.
"""

import argparse
import json
from typing import Any

from benchmarks.rivals import measure
from benchmarks.workload import make_inputs

# All Linears of the tower's blocks and of the decoder; not the merger, not the head.
TARGETS = r".*(attn\.(qkv|proj)|mlp\.fc[12]|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)$"


def load(args: argparse.Namespace) -> Any:
    """The adapted model, ready to train."""
    return {"unsloth": load_unsloth, "hf": load_hf}[args.stack](args)


def load_unsloth(args: argparse.Namespace) -> Any:
    # Before torch and transformers, which it patches.
    from unsloth import FastVisionModel

    checkpointing = measure.checkpointing(args.gc)
    model, _ = FastVisionModel.from_pretrained(
        model_name=str(args.checkpoint),
        max_seq_length=args.sequence,
        load_in_4bit=args.bits == 4,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastVisionModel.get_peft_model(
        model,
        finetune_vision_layers=True,
        finetune_language_layers=True,
        finetune_attention_modules=True,
        finetune_mlp_modules=True,
        r=args.rank,
        lora_alpha=args.rank,
        lora_dropout=0,
        bias="none",
        random_state=3407,
        use_gradient_checkpointing=checkpointing,
    )
    FastVisionModel.for_training(model)
    return model


def load_hf(args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    options = {"quantization_config": measure.nf4()} if args.bits == 4 else {}
    place = {"": 0 if args.device == "cuda" else args.device}
    model = AutoModelForImageTextToText.from_pretrained(
        args.checkpoint, dtype=torch.bfloat16, device_map=place, attn_implementation="sdpa", **options
    )
    return measure.adapt_with_peft(model, TARGETS, args)


def main() -> None:
    args = measure.parse(__doc__, rows=4, sequence=2048, steps=8, bits=4, rank=16)
    measure.train(load, make_inputs(json.loads((args.checkpoint / "config.json").read_text()), args.rows, args.sequence), args)


if __name__ == "__main__":
    main()
