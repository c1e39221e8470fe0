"""Has transformers' own processor make the inputs of texts with images, or with videos. Run by the oracle's Python (torch, transformers).

    python make_processor.py SPEC.json OUT.npz

SPEC is {"processor": class, "video_processor": class or null, "folder": path, "media": npz, "texts": […], "fps": one for each video}.
The folder has a tokenizer and the configurations; the media are "image_0" … [H, W, 3] or "video_0" … [T, H, W, 3]. Images go through the
Pil class; videos need torchvision, since transformers has no video processor without it.
"""

import json
import pathlib
import sys

import numpy as np
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def main(spec_path: str, out: str) -> None:
    spec = json.loads(pathlib.Path(spec_path).read_text())
    video = None
    if spec["video_processor"]:
        video = getattr(transformers, spec["video_processor"]).from_pretrained(spec["folder"])
    else:
        # Images need no video processor, but the constructor asks for one.
        transformers.processing_utils.ProcessorMixin.check_argument_for_proper_class = lambda *args, **options: None
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["folder"])
    processor = getattr(transformers, spec["processor"])(Qwen2VLImageProcessorPil.from_pretrained(spec["folder"]), tokenizer, video)
    with np.load(spec["media"]) as file:
        media = [file[name] for name in file.files]
    if video is None:
        given = {"images": [Image.fromarray(image) for image in media]}
    else:
        told = [
            {"total_num_frames": len(v), "fps": r, "frames_indices": list(range(len(v)))} for v, r in zip(media, spec["fps"], strict=True)
        ]
        given = {"videos": list(media), "video_metadata": told, "do_sample_frames": False, "cap_pixels_per_frame": False}
    made = processor(text=spec["texts"], padding=True, return_tensors="np", **given)
    arrays = {name: np.asarray(value) for name, value in made.items() if name != "video_metadata"}
    # Every 13th element of a patch keeps the file small and meets each channel, frame and row.
    np.savez_compressed(out, **{name: a[:, ::13] if name.startswith("pixel_values") else a for name, a in arrays.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
