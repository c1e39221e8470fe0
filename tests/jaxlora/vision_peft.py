"""What PEFT computed on tiny vision-language models: made now if there is an oracle, else the committed folders (both towers adapted)."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import numpy as np

from jaxlora.data.inputs import ModelValues
from jaxlora.load import Loaded
from jaxlora.nn.stack import linear_paths
from jaxlora.select import by_flags
from tests.jaxlora import reference
from tests.jaxlora.models import qwen_vl

MODELS = ("gemma3", "mllama", *qwen_vl.FAMILY, "llava", "llava_pixtral", "mistral3")
# Written live alone: Gemma 3 has the same tower.
LIVE_ALONE = ("llava_siglip",)
INPUTS = (
    *(*qwen_vl.INPUTS, "token_type_ids", "mm_token_type_ids", "image_sizes"),
    *("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"),
)
# Layers whose states no feature needs: PEFT gives them no gradient.
UNUSED = dict.fromkeys(("llava", "llava_siglip"), "vision_tower.encoder.layers.2.")
CASES = {
    "both": {"vision": True, "language": True},
    "vision": {"vision": True, "language": False},
    "language": {"vision": False, "language": True},
}


@functools.cache
def folder(model_type: str) -> pathlib.Path:
    """A folder for each case as tests/oracle/make_vision_peft.py writes it."""
    if not reference.ORACLE_PYTHON:
        return reference.TESTS / "golden" / "vision_peft" / model_type
    made = pathlib.Path(tempfile.mkdtemp(prefix=f"jaxlora-peft-{model_type}-"))
    write(model_type, made)
    return made


def expected(model_type: str, case: str) -> dict[str, np.ndarray]:
    """What PEFT computed."""
    with np.load(folder(model_type) / case / "expected.npz") as file:
        return dict(file)


def inputs(model_type: str) -> dict[str, np.ndarray]:
    """The reference's inputs with labels: every token that is text, but the first three of a row."""
    arrays = reference.expected(model_type)
    ids, vision = arrays["input_ids"], values(model_type).vision
    assert vision is not None
    media = np.isin(ids, [token for token in (vision.image_token_id, vision.video_token_id) if token is not None])
    text = arrays["attention_mask"].astype(bool) & ~media & (np.arange(ids.shape[1]) > 2)
    return {**{name: arrays[name] for name in INPUTS if name in arrays}, "labels": np.where(text, ids, -100)}


def values(model_type: str) -> ModelValues:
    """What batches need, with transformers' rules for the positions of videos and for tokens that see no image."""
    made = reference.spec_of(model_type).values(reference.config_of(model_type))
    assert made.vision is not None
    return dataclasses.replace(made, vision=dataclasses.replace(made.vision, mrope_advance="hf5", unseen="hf5"))


def load_reference(model_type: str) -> Loaded:
    """The reference model, computing as transformers does."""
    loaded = reference.fresh(model_type, dtype="float32")
    if model_type == "mllama":
        loaded.model.model.vision_model.config = dataclasses.replace(loaded.config.vision, compat="hf5")
    return loaded


def at_tokens(model_type: str, array: np.ndarray) -> np.ndarray:
    """The values at tokens."""
    mask = reference.expected(model_type)["attention_mask"].astype(bool)
    return np.asarray(array)[: len(mask), : mask.shape[1]][mask]


def write(model_type: str, target: pathlib.Path, cases: tuple[str, ...] = tuple(CASES)) -> None:
    """Has PEFT adapt the reference model at the Linears that the selector's flags give."""
    spec, unused = reference.spec_of(model_type), UNUSED.get(model_type)
    paths = [path for path in linear_paths(spec.build(spec.read(reference.config_of(model_type)))) if not unused or unused not in path]
    lora = {case: dict(r=2, lora_alpha=3, target_modules=list(by_flags(paths, **CASES[case]).paths)) for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        job = {"base": str(reference.reference_folder(model_type)), "inputs": f"{scratch}/inputs.npz", "cases": lora}
        np.savez(f"{scratch}/inputs.npz", **inputs(model_type))
        pathlib.Path(scratch, "spec.json").write_text(json.dumps(job))
        reference.run_oracle("make_vision_peft.py", f"{scratch}/spec.json", target)


def write_committed(model_type: str, target: pathlib.Path) -> None:
    """The committed folder of one model."""
    write(model_type, target, ("both",))


def write_all(target: pathlib.Path) -> None:
    """The committed folders."""
    for model_type in MODELS:
        write_committed(model_type, target / model_type)
