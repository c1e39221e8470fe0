"""QLoRA on both towers of a vision-language model: python examples/lora_vlm.py MODEL_FOLDER IMAGES_FOLDER [--steps 60]

MODEL_FOLDER is a local folder or a hub id. IMAGES_FOLDER holds pictures, each with the text that describes it: cat.png and cat.txt.
"""

import argparse
import pathlib

from PIL import Image

from jaxlora import FastVisionModel, SFTConfig, SFTTrainer, UnslothVisionDataCollator

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    """Adapts the model, saves the adapter, and describes the first picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("images", type=pathlib.Path)
    parser.add_argument("--question", default="Describe this picture.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output-dir", default="lora_vlm")
    options = parser.parse_args()

    def question(path: pathlib.Path) -> dict:
        return {"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": options.question}]}

    paths = sorted(path for path in options.images.iterdir() if path.suffix.lower() in SUFFIXES)
    rows = [{"messages": [question(p), {"role": "assistant", "content": p.with_suffix(".txt").read_text().strip()}]} for p in paths]
    model, processor = FastVisionModel.from_pretrained(options.model, load_in_4bit=True)
    model = FastVisionModel.get_peft_model(model, r=16, lora_alpha=16, finetune_vision_layers=True, finetune_language_layers=True)
    trainer = SFTTrainer(
        model=model,
        tokenizer=processor,
        data_collator=UnslothVisionDataCollator(model, processor, train_on_responses_only=True),
        train_dataset=rows,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=options.steps,
            learning_rate=2e-4,
            save_strategy="no",
            output_dir=options.output_dir,
        ),
    )
    print(trainer.train())
    model.save_pretrained(f"{options.output_dir}/adapter")
    processor.save_pretrained(f"{options.output_dir}/adapter")

    prompt = processor.apply_chat_template([question(paths[0])], add_generation_prompt=True)
    inputs = processor(images=[Image.open(paths[0])], text=[prompt])
    print(processor.decode(FastVisionModel.for_inference(model).generate(**inputs, max_new_tokens=64)[0]))


if __name__ == "__main__":
    main()
