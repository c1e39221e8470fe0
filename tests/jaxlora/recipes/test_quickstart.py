import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxlora.data.processors import load_processor
from jaxlora.recipes import quickstart
from jaxlora.recipes.digits import QUESTION, WORDS, as_written, inverted_and_turned, load_scans, row
from jaxlora.recipes.quickstart import ADAPTED, BASE, MERGED, RELOADED, UNQUANTISED, QuickstartConfig, QuickstartError, check
from jaxlora.recipes.report import Answers, Result, require_matplotlib
from jaxlora.recipes.small_qwen2_vl import CONFIG, write_checkpoint


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """A run of few steps on few scans, which learns to answer with some digit: (results, folder)."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = QuickstartConfig(
        output_dir=folder, base_steps=70, adapter_steps=20, rows_per_step=8, train_scans=16, test_scans=20, before=1.01, after=0.0
    )
    return quickstart.run(config), folder


def answers(tokens, right=0.9):
    tokens = np.asarray(tokens)
    return Answers(tokens=tokens, texts=["one"] * len(tokens), right=[i < right * len(tokens) for i in range(len(tokens))])


def shown(**changes):
    """Results in which everything holds, but for ``changes``."""
    tokens = np.arange(20).reshape(10, 2)
    results = {
        BASE: Result(name=BASE, old=answers(tokens), new=answers(tokens, right=0.1)),
        ADAPTED: Result(name=ADAPTED, old=answers(tokens), new=answers(tokens)),
        RELOADED: Result(name=RELOADED, old=answers(tokens), new=answers(tokens), compared_to=ADAPTED),
    }
    return list({**results, **changes}.values())


def test_saved_models_are_compared_and_answer_token_for_token(reduced):
    compared = {result.name: (result.compared_to, result.differing, result.asked) for result in reduced[0] if result.compared_to}
    assert compared == {RELOADED: (ADAPTED, 0, 40), MERGED: (UNQUANTISED, 0, 40)}


def test_compared_answers_are_of_several_kinds(reduced):
    answered = {result.name: {*result.old.texts, *result.new.texts} for result in reduced[0]}
    assert min(len(answered[name] & set(WORDS)) for name in (ADAPTED, UNQUANTISED)) >= 3


def test_folders_hold_models_and_pictures(reduced):
    folder = reduced[1]
    assert {path.name for path in folder.iterdir()} == {"random", "base", "adapter", "merged", "loss.png", "answers.png"}
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["loss.png", "answers.png"])
def test_pictures_are_drawn(reduced, name):
    pixels = np.asarray(Image.open(reduced[1] / name).convert("L"))
    assert min(pixels.shape) > 500 and 0.01 < (pixels < 128).mean() < 0.9


def test_the_quickstart_passes_where_everything_holds():
    check(shown(), before=0.4, after=0.85)


def test_one_other_token_fails_the_quickstart():
    tokens = np.arange(20).reshape(10, 2)
    other = Result(name=RELOADED, old=answers(tokens), new=answers(np.where(tokens == 7, 99, tokens))).compare(shown()[1])
    with pytest.raises(QuickstartError, match="1 of 20 answers are not those of"):
        check(shown(**{RELOADED: other}), before=0.4, after=0.85)


def test_accuracies_out_of_bounds_fail_the_quickstart_together():
    with pytest.raises(QuickstartError, match=r"(?s)base reads 10\.0%.*adapted model reads 90\.0%"):
        check(shown(), before=0.05, after=0.95)


def test_every_scan_is_either_trained_on_or_tested_on():
    train, test = load_scans()
    both = np.concatenate([train.pixels, test.pixels]).reshape(-1, 64)
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8).reshape(-1, 64)
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))


def test_a_fifth_of_each_digit_is_for_the_test():
    train, test = load_scans()
    of_digit = np.bincount(train.digits) + np.bincount(test.digits)
    assert np.abs(np.bincount(test.digits) - of_digit / 5).max() < 1


def test_the_new_domain_is_the_old_one_inverted_and_turned():
    scan = load_scans()[1].pixels[3]
    assert np.array_equal(inverted_and_turned(scan), 255 - np.rot90(np.asarray(as_written(scan))))


def test_a_scan_is_four_image_tokens_and_its_answer_one(tmp_path):
    processor = load_processor(write_checkpoint(tmp_path, seed=0), "qwen2_vl")
    image = as_written(load_scans()[0].pixels[0])
    for word in WORDS:
        made = processor.apply_chat_template(row(image, word)["messages"], tokenize=True)
        assert (made["input_ids"] == CONFIG["image_token_id"]).sum() == 4
        assert len(processor.tokenizer(word)["input_ids"]) == 1
    assert QUESTION in processor.decode(made["input_ids"][0])


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlora\[quickstart\]'"):
        load_scans()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlora\[quickstart\]'"):
        require_matplotlib()
