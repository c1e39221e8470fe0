import runpy
import sys
from pathlib import Path

from PIL import Image

from jaxlora.models import registry
from jaxlora.recipes.random_model import write_random_checkpoint
from jaxlora.recipes.small_qwen2_vl import write_checkpoint
from jaxlora.recipes.tiny_tokenizer import make_tokenizer

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run(monkeypatch, name, *arguments):
    path = next(example for example in EXAMPLES if example.name == name)
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments), "--steps", "2"])
    runpy.run_path(str(path), run_name="__main__")


def test_the_text_example_saves_an_adapter_and_a_merged_model(monkeypatch, tmp_path):
    folder = make_tokenizer(tmp_path / "model", "llama")
    write_random_checkpoint(folder, {**registry.get("llama").tiny, "vocab_size": 384})
    run(monkeypatch, "qlora_text.py", folder, "--output-dir", tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


def test_the_vision_example_saves_an_adapter(monkeypatch, tmp_path):
    folder = write_checkpoint(tmp_path / "model", seed=0)
    for shade, word in ((0, "one"), (255, "two")):
        Image.new("RGB", (32, 32), (shade, shade, shade)).save(tmp_path / f"{word}.png")
        (tmp_path / f"{word}.txt").write_text(word)
    run(monkeypatch, "lora_vlm.py", folder, tmp_path, "--output-dir", tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_examples_are_short():
    assert EXAMPLES and all(len(path.read_text().splitlines()) < 60 for path in EXAMPLES)
