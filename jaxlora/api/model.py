"""The model that users hold: the owner of (graphdef, trainable, frozen), callable, generating, saving."""

import functools
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from jaxlora import export
from jaxlora.adapt import LoRAConfig
from jaxlora.api import folders
from jaxlora.data.batches import Batch, make_batch
from jaxlora.data.inputs import IGNORE, split_rows, token_spans
from jaxlora.data.ladder import Shape
from jaxlora.errors import nearest
from jaxlora.generate.decode import generate
from jaxlora.generate.sampling import Sampling
from jaxlora.load import Loaded
from jaxlora.nn.decoder import Execution
from jaxlora.nn.stack import flatten_leaves
from jaxlora.select import Selection, expand
from jaxlora.train.meters import shows_bars
from jaxlora.train.step import merge_trees
from jaxlora.typing import Array

log = logging.getLogger(__name__)

SAVE_METHODS = ("merged_16bit", "lora")
# Arguments of transformers' generate that change nothing here.
GENERATE_IGNORED = ("use_cache", "cache_implementation", "pad_token_id")
# … and those that would change it, with the values that ask for nothing.
GENERATE_UNAVAILABLE: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "return_dict_in_generate": (None, False),
    "repetition_penalty": (None, 1, 1.0),
    "streamer": (None,),
}


class Output(dict[str, Any]):
    """What a call returns: ``logits`` [B, S, V] in fp32 and, where labels were given, ``loss``; also as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has {sorted(self)}, not {name!r}") from None


class Model:
    """A model on the device, as ``from_pretrained`` returns it.

    It owns its arrays. While a trainer's steps run, the trainer holds what is trained; a use in between is refused with that reason.
    """

    def __init__(self, loaded: Loaded, parts: tuple[Any, Mapping[str, Any], Mapping[str, Any]], *, name: str, max_seq_length: int):
        self.loaded, self.name_or_path, self.max_seq_length = loaded, name, max_seq_length
        self.graphdef, self._trainable, self.frozen = parts
        self.lora: LoRAConfig | None = None
        self.selection: Selection | None = None
        self.full_finetuning = False
        self.use_gradient_checkpointing: bool | str = "unsloth"
        self.lent_to: str | None = None

    @functools.cached_property
    def config(self) -> Any:
        """The configuration as transformers reads it."""
        return folders.hf_config(self.loaded.folder)

    @property
    def trainable(self) -> Mapping[str, Any]:
        """What is trained.

        Raises:
          RuntimeError: a trainer holds it right now.
        """
        if self.lent_to is not None:
            raise RuntimeError(
                f"the trained parameters are with {self.lent_to}; they come back at its next save, evaluation or callback, or when it ends"
            )
        return self._trainable

    def lend(self, to: str) -> Mapping[str, Any]:
        """Hands the trained parameters out, whose buffers the borrower may reuse."""
        trainable, self.lent_to = self.trainable, to
        return trainable

    def give_back(self, trainable: Mapping[str, Any]) -> None:
        """Takes the trained parameters back."""
        self._trainable, self.lent_to = trainable, None

    @property
    def state(self) -> dict[str, Any]:
        """All leaves as one tree."""
        return merge_trees(self.trainable, self.frozen)

    def module(self) -> nnx.Module:
        """The model as a Flax module over the same buffers."""
        return nnx.merge(self.graphdef, self.state)

    def replace(self, parts: tuple[Any, Mapping[str, Any], Mapping[str, Any]]) -> None:
        """Takes over another split of the same model (after adapters were attached)."""
        self.graphdef, self._trainable, self.frozen = parts

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, all) parameters; a packed weight counts its logical elements."""
        return _count(self.trainable), _count(self.trainable) + _count(self.frozen)

    def print_trainable_parameters(self) -> None:
        """Prints one line as PEFT does, and which Linears are adapted in which tower."""
        trained, total = self.parameter_counts()
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")
        if self.selection is not None:
            print(f"LoRA on {self.selection.describe()}")

    def __call__(self, **inputs: Any) -> Output:
        """Logits of a micro-batch with Hugging Face's input names (numpy or jax arrays), in the layout that came in.

        >>> # model(input_ids=ids, attention_mask=mask).logits.shape == (*ids.shape, vocab_size)
        """
        batch, spans, columns = self._batch(inputs)
        logits = _logits(self.graphdef, self.state, batch)
        placed = np.zeros((*columns, logits.shape[-1]), np.float32)
        for b, (start, length) in enumerate(spans):
            placed[b, start : start + length] = logits[b, :length]
        output = Output(logits=placed)
        if inputs.get("labels") is not None:
            output["loss"] = float(_mean_loss(logits, jnp.asarray(batch.labels)))
        return output

    def generate(self, *, max_new_tokens: int = 64, seed: int = 0, eos_token_id: Any = None, **arguments: Any) -> np.ndarray:
        """The prompt followed by new tokens [B, S + new], padded after a row's end; transformers' names.

        Sampling arguments: ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``; all others are model inputs.

        Raises:
          ValueError: an argument that nobody knows; less than one new token.
          NotImplementedError: beams, several sequences a prompt, a streamer.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        refuse_unavailable("generate", arguments, GENERATE_UNAVAILABLE)
        names = {f.name for f in Sampling.__dataclass_fields__.values()}
        sampling = Sampling(**{k: v for k, v in arguments.items() if k in names and v is not None})
        inputs = {k: v for k, v in arguments.items() if k not in names and k not in GENERATE_IGNORED}
        batch, spans, _ = self._batch(inputs)
        eos = self._eos(eos_token_id)
        pad = self._values.pad_token_id
        new, counts = generate(
            self.graphdef, self.state, batch, jax.random.key(seed), max_new_tokens=max_new_tokens, sampling=sampling, eos=eos, pad=pad,
            dtype=self._dtype,
        )  # fmt: skip
        longest = int(np.asarray(counts)[: len(spans)].max())
        ids = np.asarray(inputs["input_ids"])
        return np.concatenate([ids, np.asarray(new)[: len(ids), :longest].astype(ids.dtype)], axis=1)

    def save_pretrained(self, folder: str | pathlib.Path, **arguments: Any) -> None:
        """Writes the adapter as PEFT does, or, after full fine-tuning, the whole model.

        Raises:
          ValueError: there is no adapter and nothing was trained.
        """
        refuse_unknown("save_pretrained", arguments, IGNORED_WHEN_SAVING)
        if self.full_finetuning:
            self._save_merged(folder)
            return
        if self.lora is None:
            raise ValueError("this model has no adapter to save: call get_peft_model first, or save_pretrained_merged for the whole model")
        self.write_adapter(pathlib.Path(folder), self.trainable)

    def write_adapter(self, folder: pathlib.Path, trainable: Mapping[str, Any]) -> None:
        """Writes these values as the adapter (a trainer that holds them calls it)."""
        assert self.lora is not None
        export.save_adapter(
            folder, trainable=trainable, frozen=self.frozen, config=self.lora, loaded=self.loaded, base_model_name_or_path=self.name_or_path
        )

    def save_pretrained_merged(
        self,
        folder: str | pathlib.Path,
        tokenizer: Any = None,
        save_method: str = "merged_16bit",
        *,
        base_folder: str | pathlib.Path | None = None,
        **arguments: Any,
    ) -> None:
        """Writes the whole model with the adapter merged ("merged_16bit"), or the adapter alone ("lora").

        ``base_folder`` names 16-bit weights to merge onto where the base itself is quantised.

        Raises:
          NotImplementedError: another save method; says what to run on the merged folder instead.
        """
        refuse_unknown("save_pretrained_merged", arguments, IGNORED_WHEN_SAVING)
        if save_method == "lora":
            self.save_pretrained(folder)
        elif save_method == "merged_16bit":
            self._save_merged(folder, base_folder)
        else:
            raise NotImplementedError(
                f"save_method {save_method!r} is not available{nearest(save_method, SAVE_METHODS)}; the methods are {SAVE_METHODS}. For "
                "other formats merge to 16 bits and run that format's own tool (llm-compressor, AutoAWQ, bitsandbytes) on the folder"
            )
        if tokenizer is None:
            log.warning("no tokenizer was given: the one of the base folder was copied, if it has one")
        else:
            folders.save_processor(tokenizer, folder)

    def push_to_hub_merged(self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", token: str | None = None) -> None:
        """Merges into a temporary folder and uploads it."""
        folders.push(repo_id, functools.partial(self.save_pretrained_merged, tokenizer=tokenizer, save_method=save_method), token=token)

    def push_to_hub(self, repo_id: str, token: str | None = None) -> None:
        """Uploads the adapter."""
        folders.push(repo_id, self.save_pretrained, token=token)

    def save_pretrained_gguf(self, folder: str | pathlib.Path, tokenizer: Any = None, **arguments: Any) -> None:
        """Not written here.

        Raises:
          NotImplementedError: always; says what to run.
        """
        raise NotImplementedError(
            f"GGUF is written by llama.cpp: model.save_pretrained_merged({str(folder)!r}, tokenizer), then "
            f"`python llama.cpp/convert_hf_to_gguf.py {folder}` and `llama-quantize`"
        )

    def _save_merged(self, folder: str | pathlib.Path, base_folder: str | pathlib.Path | None = None) -> None:
        with Progress(transient=True, disable=not shows_bars()) as bar:
            task = bar.add_task("merging", total=None)
            report = export.save_merged(
                folder,
                trainable=self.trainable,
                frozen=self.frozen,
                loaded=self.loaded,
                base_folder=base_folder,
                overwrite=True,
                progress=lambda _, done, total: bar.update(task, completed=done, total=total),
            )
        print(f"jaxlora: {report.describe()}")

    @property
    def _values(self) -> Any:
        return self.loaded.spec.values(self.loaded.raw_config)

    @property
    def _dtype(self) -> Any:
        table = next(leaf for path, leaf in flatten_leaves(self.state).items() if path.endswith("embed_tokens.weight"))
        return table.array.dtype

    def _batch(self, inputs: Mapping[str, Any]) -> tuple[Batch, list[tuple[int, int]], tuple[int, int]]:
        """One micro-batch of rounded sizes, where its tokens lay, and the shape of input_ids."""
        arrays = {k: np.asarray(v) for k, v in inputs.items() if v is not None}
        if "input_ids" not in arrays:
            raise ValueError(f"expected input_ids, got {sorted(arrays)}")
        rows = split_rows(arrays, self._values)
        patches, frames = sum(row.patch_count for row in rows), sum(run.grid[0] for row in rows for run in row.runs)
        shape = Shape(-(-arrays["input_ids"].shape[1] // 16) * 16, -(-patches // 64) * 64)
        segments = max(max(len(row.lengths) for row in rows), 1)
        batch = make_batch([arrays], self._values, shape, rows=len(rows), segments=segments, images=-(-frames // 4) * 4)
        micro = jax.tree.map(lambda a: jnp.asarray(a[0]), batch)
        return micro, token_spans(arrays["input_ids"], arrays.get("attention_mask")), arrays["input_ids"].shape

    def _eos(self, given: Any) -> tuple[int, ...]:
        if given is None:
            given = self.loaded.raw_config.get("eos_token_id")
            path = self.loaded.folder / "generation_config.json"
            if path.is_file():
                given = folders.read_json(path).get("eos_token_id", given)
        return () if given is None else tuple(given) if isinstance(given, list | tuple) else (int(given),)


IGNORED_WHEN_SAVING = (
    "push_to_hub token is_main_process state_dict save_function max_shard_size safe_serialization variant save_peft_format tags "
    "temporary_location maximum_memory_usage datasets selected_adapters"
).split()


def refuse_unknown(what: str, arguments: Mapping[str, Any], ignored: Sequence[str], known: Iterable[str] = ()) -> None:
    """Says once that an ignored argument has no effect; an unknown one is an error. ``known`` are the names that have one.

    Raises:
      TypeError: names every unknown argument with the nearest known one.
    """
    unknown = [f"{name!r}{nearest(name, [*known, *ignored])}" for name in arguments if name not in ignored]
    if unknown:
        raise TypeError(f"{what} got unknown arguments: {', '.join(unknown)}")
    for name in arguments:
        say_no_effect(what, name)


def refuse_unavailable(what: str, arguments: dict[str, Any], unavailable: Mapping[str, tuple[Any, ...]]) -> None:
    """Removes from ``arguments`` those that ask for nothing; the others are refused.

    Raises:
      NotImplementedError: names every option that is not available.
    """
    asked = {name: arguments.pop(name) for name in list(arguments) if name in unavailable}
    faults = [f"{name}={value!r}" for name, value in asked.items() if not any(value is v or value == v for v in unavailable[name])]
    if faults:
        raise NotImplementedError(f"{what}: not available: {', '.join(faults)}")


@functools.cache
def say_no_effect(what: str, name: str) -> None:
    """Logs, once a process, that an argument means nothing here."""
    log.warning("%s: %s has no effect in jaxlora", what, name)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, state: Any, batch: Batch) -> Array:
    model = nnx.merge(graphdef, state)
    hidden, _ = model(batch, Execution())
    return model.head().logits(hidden)


@jax.jit
def _mean_loss(logits: Array, labels: Array) -> Array:
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    kept = labels != IGNORE
    return -jnp.sum(jnp.where(kept, picked, 0)) / jnp.maximum(kept.sum(), 1)


def _count(tree: Mapping[str, Any]) -> int:
    total = 0
    for path, leaf in flatten_leaves(tree).items():
        shape = leaf.shape if not path.endswith("lora_scale") else (0,)
        layers = len(expand(path)) if len(shape) == 2 and not isinstance(leaf, jax.Array) else 1
        total += int(np.prod(shape)) * layers
    return total
