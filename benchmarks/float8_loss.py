"""What multiplying in e4m3 does to training: ``python -m benchmarks.float8_loss``, on a GPU or, emulated, on a CPU.

Two tasks with real data, each learnt by QLoRA twice for 200 steps, with exact products and with ``compute_dtype="float8"``, from the same
base, adapters and rows: the quickstart's digits in a domain that their base never saw, and the second half of Python's own help texts after
a base that read the first. Prints the mean loss over all steps, and over the last 50, of both.
"""

import argparse
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import results
from jaxlora import FastLanguageModel, FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator
from jaxlora.models import registry
from jaxlora.recipes.digits import as_written, inverted_and_turned, load_scans, row
from jaxlora.recipes.random_model import write_random_checkpoint
from jaxlora.recipes.small_qwen2_vl import write_checkpoint
from jaxlora.recipes.tiny_tokenizer import make_tokenizer

STEPS, BASE_STEPS, LAST = 200, 350, 50
SENTENCE, VOCABULARY = 512, 512


def fit(
    model: Any, tokenizer: Any, rows: list[Any], folder: pathlib.Path, *, steps: int, rate: float, rows_per_step: int, **more: Any
) -> list[float]:
    """The loss of every step."""
    args = SFTConfig(
        per_device_train_batch_size=rows_per_step,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        save_strategy="no",
        output_dir=str(folder / "checkpoints"),
    )
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=rows, args=args, **more)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def digits(folder: pathlib.Path, dtype: str) -> Callable[[str | None], list[float]]:
    """Teaches a base the digits as written; returns the run that adapts it."""
    train, _ = load_scans()
    write_checkpoint(folder / "random", seed=0)

    def learn(model: Any, processor: Any, domain: Any, steps: int, rate: float) -> list[float]:
        rows = [row(domain(scan), word) for scan, word in zip(train.pixels, train.words, strict=True)]
        collator = UnslothVisionDataCollator(model, processor, resize="max", train_on_responses_only=True)
        return fit(model, processor, rows, folder, steps=steps, rate=rate, rows_per_step=32, data_collator=collator)

    model, processor = FastVisionModel.from_pretrained(str(folder / "random"), full_finetuning=True, dtype="float32")
    learn(model, processor, as_written, BASE_STEPS, 1.5e-3)
    model.save_pretrained(str(folder / "base"))
    processor.save_pretrained(str(folder / "base"))

    def adapt(compute_dtype: str | None) -> list[float]:
        model, processor = FastVisionModel.from_pretrained(str(folder / "base"), dtype=dtype, compute_dtype=compute_dtype)
        return learn(FastVisionModel.get_peft_model(model, r=16, lora_alpha=32), processor, inverted_and_turned, STEPS, 3e-3)

    return adapt


def help_texts() -> list[str]:
    """Python's help topics, in pieces."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    return [whole[at : at + SENTENCE] for at in range(0, len(whole) - SENTENCE, SENTENCE)]


def text(folder: pathlib.Path, dtype: str) -> Callable[[str | None], list[float]]:
    """Has a small Llama read the first half of the help texts; returns the run that adapts it to the second."""
    pieces = [{"text": piece} for piece in help_texts()]
    first, second = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = {**registry.get("llama").tiny, **sizes, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 1024}
    make_tokenizer(folder / "random", "llama")
    write_random_checkpoint(folder / "random", config)
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder / "random"), full_finetuning=True, dtype="float32", max_seq_length=1024)
    fit(model, tokenizer, first, folder, steps=BASE_STEPS, rate=3e-3, rows_per_step=8)
    model.save_pretrained(str(folder / "base"))
    tokenizer.save_pretrained(str(folder / "base"))

    def adapt(compute_dtype: str | None) -> list[float]:
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(folder / "base"), dtype=dtype, compute_dtype=compute_dtype, max_seq_length=1024
        )
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
        return fit(model, tokenizer, second, folder, steps=STEPS, rate=1e-3, rows_per_step=8)

    return adapt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=["digits", "text"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            adapt = {"digits": digits, "text": text}[task](pathlib.Path(folder), args.dtype)
            exact, rounded = (np.array(adapt(compute_dtype)) for compute_dtype in (None, "float8"))
        found = {"task": task, "dtype": args.dtype, "steps": len(exact)}
        for name, part in (("all", slice(None)), ("last", slice(-LAST, None))):
            ours, theirs = float(rounded[part].mean()), float(exact[part].mean())
            found |= {f"{name}_exact": round(theirs, 5), f"{name}_float8": round(ours, 5), f"{name}_ratio": round(ours / theirs, 5)}
        results.print_result(found | results.provenance(jax.devices()[0].device_kind, ("jax",), args.commit))
        if args.csv:
            results.append(args.csv, found | results.provenance(jax.devices()[0].device_kind, ("jax",), args.commit))


if __name__ == "__main__":
    main()
