"""Writes golden/qwen2_vl_processor.npz with transformers' own Qwen2VLProcessor (5.23.0, torch, no torchvision).

PYTHONPATH=. python tests/jaxlora/data/make_processor_golden.py
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from jaxlora.recipes.tiny_tokenizer import make_tokenizer

SIZES = [(90, 60), (29, 110), (300, 40)]
# Special tokens and single bytes only: their ids do not depend on how the tokenizer was trained.
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = [f"{PICTURE}<|im_end|>", "7", f"<|im_start|>{PICTURE}{PICTURE}"]


def picture(width, height):
    ramp = np.add.outer(7 * np.arange(height), 5 * np.arange(width))[..., None] + np.array([0, 85, 170])
    return Image.fromarray((ramp % 256).astype(np.uint8))


def main():
    from transformers import AutoTokenizer, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    # Without torchvision there is no video processor, which images do not need but the constructor asks for.
    ProcessorMixin.check_argument_for_proper_class = lambda *args, **options: None
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(folder, "qwen2_vl")
        processor = Qwen2VLProcessor(Qwen2VLImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), None)
        made = processor(images=[picture(*size) for size in SIZES], text=TEXTS, padding=True, return_tensors="np")
    made = dict(made)
    # Every 13th element of a patch keeps the file small and meets each channel, frame and row.
    made["pixel_values"] = made["pixel_values"][:, ::13]
    np.savez_compressed(Path(__file__).parent / "golden" / "qwen2_vl_processor.npz", **made)


if __name__ == "__main__":
    main()
