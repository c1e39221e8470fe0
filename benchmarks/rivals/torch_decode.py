"""Greedy decoding with a 4-bit base and a LoRA adapter on it, in Unsloth, or in transformers + PEFT + bitsandbytes.

python -m benchmarks.rivals.torch_decode --stack unsloth --checkpoint FOLDER --rows 1
"""

import argparse
import json
import time
from typing import Any

from benchmarks.rivals import measure
from benchmarks.workload import token_ids

WARM_TOKENS = 8


def load(args: argparse.Namespace) -> Any:
    """The adapted model, ready to generate."""
    if args.stack == "unsloth":
        # Before torch and transformers, which it patches.
        from unsloth import FastLanguageModel  # isort: skip
        import torch

        longest = max(2048, args.sequence + args.new)
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(args.checkpoint), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True
        )
        model = FastLanguageModel.get_peft_model(model, r=args.rank, target_modules=list(measure.TARGETS), lora_alpha=args.rank)
        FastLanguageModel.for_inference(model)
        return model
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    place = {"": 0 if args.device == "cuda" else args.device}
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.bfloat16, device_map=place, quantization_config=measure.nf4())
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(measure.TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(model, lora).eval()


def main() -> None:
    args = measure.parse(__doc__, rows=1, sequence=128, new=128, rank=16)
    model = load(args)
    import torch

    config = json.loads((args.checkpoint / "config.json").read_text())
    ids = torch.from_numpy(token_ids(args.rows, args.sequence, config["vocab_size"])).to(args.device)
    options = {"do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        for count in (WARM_TOKENS, args.new):
            measure.wait(args)
            started = time.perf_counter()
            made = model.generate(input_ids=ids, max_new_tokens=count, min_new_tokens=count, **options)
            measure.wait(args)
            seconds = time.perf_counter() - started
    tokens_per_s = args.rows * args.new / seconds
    measure.report(args, "decode", {"bits": 4, "new_tokens": made.shape[1] - args.sequence, "tok_s": round(tokens_per_s, 1)})


if __name__ == "__main__":
    main()
