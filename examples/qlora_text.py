"""QLoRA on a text model, on its assistant turns only: python examples/qlora_text.py MODEL_FOLDER [ROWS.jsonl] [--steps 60]

MODEL_FOLDER is a local folder or a hub id. Each line of ROWS.jsonl is {"messages": [{"role": "user", "content": "…"}, …]}.
"""

import argparse
import json
import pathlib

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {a} plus {b}?"}, {"role": "assistant", "content": f"{a} plus {b} is {a + b}."}]}
    for a in range(10)
    for b in range(10)
]


def main() -> None:
    """Adapts the model, saves the adapter and the merged model, and answers one question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("rows", nargs="?", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output-dir", default="qlora_text")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows else ROWS

    model, tokenizer = FastLanguageModel.from_pretrained(options.model, max_seq_length=2048, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=options.steps,
            learning_rate=2e-4,
            warmup_steps=5,
            assistant_only_loss=True,
            save_strategy="no",
            output_dir=options.output_dir,
        ),
    )
    print(trainer.train())
    model.save_pretrained(f"{options.output_dir}/adapter")
    tokenizer.save_pretrained(f"{options.output_dir}/adapter")
    model.save_pretrained_merged(f"{options.output_dir}/merged", tokenizer)

    FastLanguageModel.for_inference(model)
    prompt = tokenizer.apply_chat_template(rows[0]["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="np")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))


if __name__ == "__main__":
    main()
