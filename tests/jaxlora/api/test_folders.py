"""Saving a processor or tokenizer beside other files."""

import pytest

from jaxlora.api import folders
from jaxlora.data.processors import load_processor
from jaxlora.recipes.tiny_tokenizer import make_tokenizer


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["qwen2_vl", "llama"])
def processor(request, tmp_path):
    return load_processor(make_tokenizer(tmp_path / "source", request.param), request.param)


def test_a_save_that_fails_half_way_changes_no_file(processor, tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    folders.save_processor(processor, folder)
    (folder / "adapter_config.json").write_text("{}")
    before = contents(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    write = tokenizer.save_pretrained

    def fails(where):
        write(where)
        raise OSError("no space left on device")

    tokenizer.chat_template = "another"
    monkeypatch.setattr(tokenizer, "save_pretrained", fails)
    with pytest.raises(OSError, match="no space left"):
        folders.save_processor(processor, folder)
    assert contents(folder) == before
    monkeypatch.undo()
    folders.save_processor(processor, folder)
    assert contents(folder).keys() == before.keys() and contents(folder) != before


def test_a_vision_processors_own_save_is_whole_too(tmp_path, monkeypatch):
    processor = load_processor(make_tokenizer(tmp_path / "source", "qwen2_vl"), "qwen2_vl")
    processor.save_pretrained(tmp_path / "saved")
    before = contents(tmp_path / "saved")
    processor.tokenizer.chat_template = "another"
    monkeypatch.setattr(processor.image_processor, "save_pretrained", lambda where: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        processor.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved") == before
