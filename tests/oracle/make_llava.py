"""Writes a tiny random LLaVA or Mistral 3 with its tower and what transformers computes with it. Run by the oracle's Python.

    python make_llava.py CONFIG.json FOLDER

FOLDER gets the config as given and as transformers writes it (config_v5.json), model.safetensors under the hub's names, and expected.npz:
inputs, fp32 logits, the outputs of every layer of both towers and of the projector, and the rms error of transformers' bf16 logits.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers
from make_reference import redraw
from safetensors.torch import load_file, save_file

# (rows, columns) of the features of each image, where images have their own sizes; the third is as wide as an image may be.
GRIDS = [(2, 4), (5, 3), (1, 6), (3, 3)]
BREAK, END = 322, 323


def image_tokens(config, rows: int, columns: int) -> torch.Tensor:
    """The tokens of an image: in Pixtral, a break after each row of features but the last, which has the end token."""
    if config.vision_config.model_type != "pixtral":
        return torch.full((rows * columns,), config.image_token_index)
    tokens = torch.full((rows, columns + 1), config.image_token_index)
    tokens[:, -1] = BREAK
    tokens[-1, -1] = END
    return tokens.flatten()


def make_inputs(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images in the first row, none in the second, two images without a token between them in the third; right-padded."""
    vision, packed = config.vision_config, config.vision_config.model_type == "pixtral"
    side = None if packed else vision.image_size // vision.patch_size
    grids = GRIDS if packed else [(side, side)] * 4
    cell = vision.patch_size * getattr(config, "spatial_merge_size", 1)

    def words(n):
        return torch.randint(10, 320, (n,), generator=generator)

    first, second, third, fourth = (image_tokens(config, *grid) for grid in grids)
    rows = [torch.cat([words(3), first, words(4), second, words(5)]), words(17), torch.cat([words(1), third, fourth, words(9)])]
    sizes = torch.tensor(grids) * cell
    pixels = torch.randn((4, vision.num_channels, *sizes.max(0).values.tolist()), generator=generator).bfloat16().float()
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "pixel_values": pixels,
        **({"image_sizes": sizes} if packed else {}),
    }


def compute(model, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Logits, and the outputs of layers, attentions, tower, projector and its parts by module path; 0 at padding."""
    found, watched = {}, {"model.multi_modal_projector", "model.language_model.norm"}
    tower = model.get_submodule("model.vision_tower")
    projector = model.get_submodule("model.multi_modal_projector")
    watched |= {f"model.multi_modal_projector.{name}" for name in ("norm", "patch_merger") if hasattr(projector, name)}
    watched |= {f"model.vision_tower.{name}" for name in ("embeddings", "pre_layrnorm", "ln_pre") if hasattr(tower, name)}
    layers = "model.vision_tower." + ("transformer" if hasattr(tower, "transformer") else "encoder")
    parts = {
        layers: ("", ".attention", ".feed_forward") if "transformer" in layers else ("", ".self_attn", ".mlp"),
        "model.language_model": ("", ".self_attn", ".mlp"),
    }
    for stack, names in parts.items():
        watched |= {f"{stack}.layers.{i}{part}" for i in range(len(model.get_submodule(f"{stack}.layers"))) for part in names}

    def save(name):
        # A hook's result would replace the output.
        return lambda _module, _inputs, out: found.update({name: out[0] if isinstance(out, tuple) else out})

    for name, module in model.named_modules():
        if name in watched:
            module.register_forward_hook(save(name))
    with torch.no_grad():
        logits = model(**inputs).logits
    assert set(found) == watched
    kept = inputs["attention_mask"][..., None]
    masked = {name: out * kept if "language_model" in name else out for name, out in found.items()}
    return {"logits": (logits * kept).numpy(), **{f"module:{name}": out.numpy() for name, out in masked.items()}}


def hub_name(name: str, config) -> str:
    """The hub's files have one level more in CLIP's and SigLIP's towers than what transformers 5 writes of a new model."""
    return name if config.vision_config.model_type == "pixtral" else name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def main(config_path: str, folder: pathlib.Path) -> None:
    raw = json.loads(pathlib.Path(config_path).read_text())
    config = transformers.AutoConfig.for_model(**raw)
    config._attn_implementation = "eager"
    cls = getattr(transformers, raw["architectures"][0])
    model = cls(config).float().eval()
    redraw(model)
    for p in model.parameters():
        p.data.copy_(p.data.bfloat16().float())
    inputs = make_inputs(config, torch.Generator().manual_seed(0))
    expected = compute(model, inputs)
    model.bfloat16().save_pretrained(folder)
    # Loaded anew, since a cast model would compute its rotary angles in bf16, which transformers does not.
    with torch.no_grad():
        low = cls.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")(**inputs).logits.float().numpy()
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").rename(folder / "config_v5.json")
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tensors = load_file(folder / "model.safetensors")
    save_file({hub_name(name, config): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    with torch.no_grad():
        again = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")(**inputs).logits
    assert np.array_equal((again * inputs["attention_mask"][..., None]).numpy(), expected["logits"]), "the hub's names are read as its own"
    kept = inputs["attention_mask"].numpy().astype(bool)
    error = np.sqrt(np.mean((low - expected["logits"])[kept] ** 2))
    arrays = {n: v.numpy() for n, v in inputs.items()} | expected | {"bf16_error": error}
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
