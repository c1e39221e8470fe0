"""The whole way in a few minutes, offline: make a vision-language model, teach it, adapt it in 4 bits, save, load again, compare."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from jaxlora.api.collator import UnslothVisionDataCollator
from jaxlora.api.config import SFTConfig
from jaxlora.api.fast import FastVisionModel
from jaxlora.api.model import Model
from jaxlora.api.trainer import SFTTrainer
from jaxlora.errors import raise_all
from jaxlora.recipes import report
from jaxlora.recipes.digits import Scans, as_written, inverted_and_turned, load_scans, question, row
from jaxlora.recipes.report import Answers, Result
from jaxlora.recipes.small_qwen2_vl import write_checkpoint
from jaxlora.train.meters import shows_bars
from jaxlora.typing import Int

# fp32 on every device: the merged weights then differ from base and adapter by fp32 rounding alone, and answers can be compared.
_LOADING = {"dtype": "float32", "use_gradient_checkpointing": False}
_NEW_TOKENS = 3
_QUESTIONS_AT_ONCE = 120
_CAPTION = (
    "Both LoRA runs took {steps} steps, on inverted and turned digits alone: hence what they lose on the others. Without its adapter the "
    "base is what it was."
)


BASE, BASE_4BIT = "base", "base in 4 bits"
ADAPTED, WITHOUT_VISION = "4 bits + LoRA on vision and language", "4 bits + LoRA, vision layers off"
RELOADED, UNQUANTISED = "4 bits + saved adapter", "unquantised base + saved adapter"
MERGED = "saved merged model, unquantised"


class QuickstartError(RuntimeError):
    """Something that the quickstart is there to show does not hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """``seed`` draws weights, adapters and the order of the rows; the split into training and test scans is fixed.

    ``train_scans`` and ``test_scans`` use only so many (None: all). Accuracies on the new domain that must be seen: below ``before`` with
    the base, at least ``after`` with the adapter.
    """

    output_dir: pathlib.Path = pathlib.Path("jaxlora_quickstart")
    seed: int = 0
    base_steps: int = 350
    adapter_steps: int = 250
    rows_per_step: int = 32
    train_scans: int | None = None
    test_scans: int | None = None
    before: float = 0.40
    after: float = 0.85


def run(config: QuickstartConfig) -> list[Result]:
    """Runs the quickstart; writes the models, ``loss.png`` and ``answers.png`` into ``config.output_dir``, and prints one table.

    >>> # run(QuickstartConfig(output_dir=pathlib.Path("out")))[0].name == "base"

    Raises:
      ImportError: scikit-learn or matplotlib is missing; says what to install.
      QuickstartError: lists what was to be shown and does not hold, after the table is printed and the pictures are drawn.
    """
    report.require_matplotlib()
    began, folder = time.perf_counter(), config.output_dir
    train, test = (scans.first(count) for scans, count in zip(load_scans(), (config.train_scans, config.test_scans), strict=True))
    quickstart = _Quickstart(config, train, test)
    with _stage("1/5  a small Qwen2-VL checkpoint with random weights, in Hugging Face's format"):
        write_checkpoint(folder / "random", seed=config.seed)
    with _stage(f"2/5  full fine-tuning: it learns to read {len(train):,} handwritten digits"):
        quickstart.teach()
    with _stage("3/5  QLoRA: the base in 4 bits learns the digits inverted and turned"):
        quickstart.adapt(vision=True)
    with _stage("4/5  the same with the vision layers switched off"):
        quickstart.adapt(vision=False)
    with _stage("5/5  adapter and merged model are loaded again"):
        quickstart.load_again()
    results = quickstart.results
    by_name = {result.name: result for result in results}
    report.print_table(results, caption=_CAPTION.format(steps=config.adapter_steps))
    report.draw_losses(folder / "loss.png", quickstart.losses)
    report.draw_answers(folder / "answers.png", test, by_name[BASE], by_name[ADAPTED])
    print(f"written to {folder}: random, base, adapter, merged, loss.png, answers.png")
    print(f"the whole quickstart took {time.perf_counter() - began:.0f} s")
    check(results, before=config.before, after=config.after)
    return results


def check(results: Sequence[Result], *, before: float, after: float) -> None:
    """Asks for everything that the quickstart shows: saved models answer token for token, the new domain was failed and then learnt.

    Raises:
      QuickstartError: lists what does not hold.
    """
    accuracy = {result.name: result.new.accuracy for result in results}
    faults = [
        f"{result.name}: {result.differing} of {result.asked} answers are not those of: {result.compared_to}"
        for result in results
        if result.differing
    ]
    if accuracy[BASE] >= before:
        faults.append(f"the base reads {accuracy[BASE]:.1%} of the new domain, expected below {before:.0%}")
    if accuracy[ADAPTED] < after:
        faults.append(f"the adapted model reads {accuracy[ADAPTED]:.1%} of the new domain, expected at least {after:.0%}")
    raise_all("the quickstart did not show what it is there to show", faults, kind=QuickstartError)


class _Quickstart:
    """The stages, and what they have found so far."""

    def __init__(self, config: QuickstartConfig, train: Scans, test: Scans):
        self.config, self.train, self.test = config, train, test
        self.results: list[Result] = []
        self.losses: dict[str, list[float]] = {}

    def teach(self) -> None:
        """Full fine-tuning on the digits as they were written."""
        model, processor = FastVisionModel.from_pretrained(self._path("random"), full_finetuning=True, **_LOADING)
        rows = [row(as_written(scan), word) for scan, word in zip(self.train.pixels, self.train.words, strict=True)]
        self._fit("full fine-tuning, digits as written", model, processor, rows, steps=self.config.base_steps, learning_rate=1.5e-3)
        model.save_pretrained(self._path("base"))
        processor.save_pretrained(self._path("base"))
        self._measure(BASE, model, processor)

    def adapt(self, *, vision: bool) -> None:
        """QLoRA on the digits inverted and turned; saves the adapter and the merged model where vision takes part."""
        model, processor = FastVisionModel.from_pretrained(self._path("base"), load_in_4bit=True, **_LOADING)
        if vision:
            self._measure(BASE_4BIT, model, processor)
        model = FastVisionModel.get_peft_model(
            model,
            r=16,
            lora_alpha=32,
            finetune_vision_layers=vision,
            random_state=self.config.seed,
            use_gradient_checkpointing=_LOADING["use_gradient_checkpointing"],
        )
        rows = [row(inverted_and_turned(scan), word) for scan, word in zip(self.train.pixels, self.train.words, strict=True)]
        label = f"QLoRA, new domain, vision layers {'on' if vision else 'off'}"
        self._fit(label, model, processor, rows, steps=self.config.adapter_steps, learning_rate=3e-3)
        self._measure(ADAPTED if vision else WITHOUT_VISION, model, processor)
        if vision:
            model.save_pretrained(self._path("adapter"))
            processor.save_pretrained(self._path("adapter"))
            model.save_pretrained_merged(self._path("merged"), processor, save_method="merged_16bit")

    def load_again(self) -> None:
        """From the files alone: the adapter on its 4-bit base, the adapter on the unquantised base, the merged model."""
        for name, saved, load_in_4bit, compared_to in (
            (RELOADED, "adapter", True, ADAPTED),
            (UNQUANTISED, "adapter", False, None),
            (MERGED, "merged", False, UNQUANTISED),
        ):
            model, processor = FastVisionModel.from_pretrained(self._path(saved), load_in_4bit=load_in_4bit, **_LOADING)
            self._measure(name, model, processor, compared_to=compared_to)

    def _path(self, name: str) -> str:
        return str(self.config.output_dir / name)

    def _fit(self, label: str, model: Model, processor: Any, rows: list[Any], *, steps: int, learning_rate: float) -> None:
        trainer = SFTTrainer(
            model=model,
            tokenizer=processor,
            data_collator=UnslothVisionDataCollator(model, processor, resize="max", train_on_responses_only=True),
            train_dataset=rows,
            args=SFTConfig(
                per_device_train_batch_size=self.config.rows_per_step,
                gradient_accumulation_steps=1,
                max_steps=steps,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                seed=self.config.seed,
                save_strategy="no",
                output_dir=self._path("checkpoints"),
            ),
        )
        trainer.train()
        self.losses[label] = [entry["loss"] for entry in trainer.state.log_history]

    def _measure(self, name: str, model: Model, processor: Any, *, compared_to: str | None = None) -> None:
        """Asks for every test scan in both domains; what is to be compared is compared token for token."""
        FastVisionModel.for_inference(model)
        old, new = (
            ask(model, processor, [domain(scan) for scan in self.test.pixels], self.test.words)
            for domain in (as_written, inverted_and_turned)
        )
        result = Result(name=name, old=old, new=new)
        if compared_to is not None:
            result = result.compare(next(other for other in self.results if other.name == compared_to))
        self.results.append(result)
        print(f"{name}: {old.accuracy:.1%} of the digits as written, {new.accuracy:.1%} inverted and turned")


def ask(model: Model, processor: Any, images: Sequence[Image.Image], words: Sequence[str]) -> Answers:
    """Greedy answers of at most three tokens to the question about each image, and how many are the right word."""
    tokens, texts = [], []
    for at in track(range(0, len(images), _QUESTIONS_AT_ONCE), description="answering", transient=True, disable=not shows_bars()):
        some = images[at : at + _QUESTIONS_AT_ONCE]
        prompts = [processor.apply_chat_template([question(image)], add_generation_prompt=True) for image in some]
        inputs = processor(images=some, text=prompts, padding=True)
        new = model.generate(**inputs, max_new_tokens=_NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
        tokens.append(_widen(new, processor.tokenizer.pad_token_id))
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return Answers(tokens=np.concatenate(tokens), texts=texts, right=[text == word for text, word in zip(texts, words, strict=True)])


def _widen(new: Int[np.ndarray, "B new"], pad: int) -> Int[np.ndarray, "B 3"]:
    """Answers of fewer tokens, padded as ``generate`` pads within a batch."""
    return np.pad(new, ((0, 0), (0, _NEW_TOKENS - new.shape[1])), constant_values=pad)


@contextlib.contextmanager
def _stage(title: str) -> Iterator[None]:
    print(f"\n{title}", flush=True)
    began = time.perf_counter()
    yield
    print(f"     {time.perf_counter() - began:.0f} s", flush=True)
