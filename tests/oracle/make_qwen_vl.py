"""Writes a tiny random Qwen-VL model and what transformers computes with it. Run by the oracle's Python (torch, transformers).

    python make_qwen_vl.py CONFIG.json FOLDER

CONFIG.json names its ``architectures``. FOLDER gets it, config_v5.json (as transformers writes it), model.safetensors and
expected.npz: inputs, positions, fp32 logits, the outputs of blocks, layers and merger, and the rms error of transformers' bf16 logits.
Parameters are bf16 numbers, so that the file is small and fp32 computes with exactly what it holds.
"""

import json
import pathlib
import re
import sys

import numpy as np
import torch
import transformers

# In patches of 4 and merged cells of 8 pixels: the first image is what smart_resize makes of 11 x 7 pixels at a least size of 350, the last
# what it makes of 1000 x 90 at a limit of 832.
IMAGES, VIDEO = [(1, 4, 6), (1, 8, 4), (1, 2, 24)], (4, 4, 6)
SECONDS_PER_GRID = 1.5


def redraw(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draws every parameter anew: default initialisation hides whole sub-modules (zero biases, unit norms)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            drawn = 0.5 * torch.randn(p.shape, generator=generator)
        elif p.ndim == 1:
            drawn = 0.5 + torch.rand(p.shape, generator=generator)
        else:
            drawn = torch.randn(p.shape, generator=generator) * (1.0 if id(p) in embeddings else p[0].numel() ** -0.5)
        p.data.copy_(drawn.bfloat16().float())


def make_inputs(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of two images of different sizes, of none, of a long thin one, and of a video; right-padded."""
    merged = config.vision_config.spatial_merge_size**2

    def words(n):
        return torch.randint(10, 320, (n,), generator=generator)

    def vision(token, grid):
        placeholders = torch.full((grid[0] * grid[1] * grid[2] // merged,), token)
        return torch.cat([torch.tensor([config.vision_start_token_id]), placeholders, torch.tensor([config.vision_end_token_id])])

    def film(token):
        # Qwen3-VL writes a time before each frame.
        if config.model_type == "qwen3_vl":
            return torch.cat([torch.cat([words(2), vision(token, (1, *VIDEO[1:]))]) for _ in range(VIDEO[0])])
        return vision(token, VIDEO)

    image, video = config.image_token_id, config.video_token_id
    rows = [
        torch.cat([words(2), vision(image, IMAGES[0]), words(3), vision(image, IMAGES[1]), words(2)]),
        words(9),
        torch.cat([words(2), vision(image, IMAGES[2]), words(3)]),
        torch.cat([words(1), film(video), words(4)]),
    ]
    v = config.vision_config
    elements = v.in_channels * v.temporal_patch_size * v.patch_size**2

    def pixels(grids):
        return torch.randn((sum(t * h * w for t, h, w in grids), elements), generator=generator).bfloat16().float()

    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    timed = {"second_per_grid_ts": torch.tensor([SECONDS_PER_GRID])} if config.model_type == "qwen2_5_vl" else {}
    return {
        "input_ids": ids,
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int(),
        "pixel_values": pixels(IMAGES),
        "image_grid_thw": torch.tensor(IMAGES),
        "pixel_values_videos": pixels([VIDEO]),
        "video_grid_thw": torch.tensor([VIDEO]),
        **timed,
    }


def compute(model, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Logits, and by module path the outputs of the tower's blocks and mergers, images' first, and the state after each layer."""
    found: dict[str, list[torch.Tensor]] = {}
    watched = r"model\.visual\.(blocks\.\d+|merger|deepstack_merger_list\.\d+)"
    for name, module in model.named_modules():
        if re.fullmatch(watched, name):
            module.register_forward_hook(lambda _m, _i, out, name=name: found.setdefault(name, []).append(out))
    decoder = model.model.language_model
    # What the next one gets: features may be added to a layer's output.
    for i, following in enumerate([*decoder.layers[1:], decoder.norm]):
        name = f"model.language_model.layers.{i}"
        following.register_forward_pre_hook(lambda _m, given, name=name: found.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        logits = model(**inputs).logits
    kept = inputs["attention_mask"][..., None]
    outputs = {name: torch.cat(parts) for name, parts in found.items()}
    masked = {name: out * kept if "language_model" in name else out for name, out in outputs.items()}
    return {"logits": (logits * kept).numpy(), **{f"module:{name}": out.numpy() for name, out in masked.items()}}


def main(config_path: str, folder: pathlib.Path) -> None:
    raw = json.loads(pathlib.Path(config_path).read_text())
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    architecture = getattr(transformers, raw["architectures"][0])
    model = architecture(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    redraw(model, generator)
    inputs = make_inputs(config, generator)
    positions, _ = model.model.get_rope_index(**{n: value for n, value in inputs.items() if not n.startswith("pixel_values")})
    expected = compute(model, inputs)
    model.bfloat16().save_pretrained(folder)
    # Loaded anew, since a cast model would compute its rotary angles in bf16, which transformers does not.
    low_model = architecture.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        low = low_model(**inputs).logits.float().numpy()
    (folder / "generation_config.json").unlink()
    (folder / "config.json").rename(folder / "config_v5.json")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    kept = inputs["attention_mask"].numpy().astype(bool)
    error = np.sqrt(np.mean((low - expected["logits"])[kept] ** 2))
    arrays = {n: v.numpy() for n, v in inputs.items()} | expected | {"position_ids": positions.numpy(), "bf16_error": error}
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
