"""bitsandbytes' weights in plain numpy: 4-bit (NF4 and FP4, double quantisation or not) and LLM.int8.

A 4-bit weight is flattened row-major and cut into blocks, which cross rows where ``in`` is no multiple of the block:

    w[i] = code_book[codes[i]] * absmax[i // blocksize]       in fp32, then rounded to nearest even into the stored dtype
    absmax[j] = nested.code_book[nested.codes[j]] * nested.absmax[j // nested.blocksize] + nested.offset

Here the LOW nibble of a byte is the even element; on disk it is the high one, and the functions below swap.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from conversion._faults import raise_all

# Dettmers et al., QLoRA (arXiv 2305.14314), appendix E: quantiles of a normal distribution, with an exact zero.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
BLOCK, NESTED_BLOCK = 64, 256
_KINDS = ("nf4", "fp4")
_STATE = "quant_state.bitsandbytes__"
_SUFFIXES_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(_STATE + kind for kind in _KINDS))
_SUFFIXES_INT8 = ("SCB", "weight_format")
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Nested:
    """Block scales that are quantised themselves, as stored: u8 codes [blocks], f32 code_book [256], f32 absmax [ceil(blocks / 256)]."""

    codes: np.ndarray
    code_book: np.ndarray
    absmax: np.ndarray
    offset: float
    blocksize: int

    def dequantise(self) -> np.ndarray:
        """Returns f32 [blocks]."""
        scale = np.repeat(self.absmax, self.blocksize)[: self.codes.size]
        return self.code_book[self.codes] * scale + np.float32(self.offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """What of a 4-bit weight is known without its codes: logical shape, dtype ("bfloat16", …), quant_type ("nf4", "fp4"), block sizes.

    ``nested_blocksize`` is None where the block scales are not quantised themselves.
    """

    shape: tuple[int, ...]
    dtype: str
    quant_type: str
    blocksize: int
    nested_blocksize: int | None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedTensor:
    """A 4-bit weight of logical ``shape``: u8 codes [ceil(n / 2)], f32 code_book [16], f32 absmax [blocks], low nibble first.

    ``dtype`` is the dtype it was quantised from ("bfloat16", "float16", "float32"); ``storage`` the safetensors dtype whose bytes
    hold the codes on disk, usually "U8".
    """

    codes: np.ndarray
    code_book: np.ndarray
    absmax: np.ndarray
    nested: Nested | None
    quant_type: str
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    storage: str = "U8"

    @property
    def structure(self) -> Structure:
        """All but the arrays."""
        nested = None if self.nested is None else self.nested.blocksize
        kind = self.quant_type
        return Structure(shape=self.shape, dtype=self.dtype, quant_type=kind, blocksize=self.blocksize, nested_blocksize=nested)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Int8Tensor:
    """An LLM.int8 weight: i8 codes [out, in] and f32 absmax [out] (``SCB``); w = codes * absmax / 127."""

    codes: np.ndarray
    absmax: np.ndarray


def weight_of(name: str) -> str:
    """Returns the weight to which a tensor with this name would be the quantisation state, or an empty string.

    >>> weight_of("model.q_proj.weight.nested_absmax"), weight_of("model.q_proj.SCB"), weight_of("model.q_proj.bias")
    ('model.q_proj.weight', 'model.q_proj.weight', '')
    """
    suffix = suffix_of(name)
    stem = name.removesuffix(f".{suffix}")
    return f"{stem}.weight" if suffix in _SUFFIXES_INT8 else stem if suffix else ""


def suffix_of(name: str) -> str:
    """Returns the part of a companion's name that says what it is, or an empty string.

    >>> suffix_of("q_proj.weight.quant_state.bitsandbytes__nf4"), suffix_of("q_proj.weight")
    ('quant_state.bitsandbytes__nf4', '')
    """
    return next((s for s in (*_SUFFIXES_4BIT, *_SUFFIXES_INT8) if name.endswith(f".{s}")), "")


def state_suffix(suffixes: Iterable[str]) -> str:
    """Returns the one of a weight's companions that holds its ``Structure``, or an empty string.

    >>> state_suffix(["absmax", "quant_map", "quant_state.bitsandbytes__fp4"])
    'quant_state.bitsandbytes__fp4'
    """
    return next((s for s in suffixes if s.startswith(_STATE)), "")


def read_structure(name: str, suffix: str, state: np.ndarray) -> Structure:
    """Returns the structure of the weight ``name`` from its companion ``suffix`` (``state_suffix``), a few hundred bytes.

    Raises:
      ValueError: if it is not a complete quantisation state.
    """
    fields, kind = _read_state(name, state), suffix.removeprefix(_STATE)
    nested = fields["nested_blocksize"] if "nested_offset" in fields else None
    shape = tuple(fields["shape"])
    return Structure(shape=shape, dtype=fields["dtype"], quant_type=kind, blocksize=fields["blocksize"], nested_blocksize=nested)


def decode(name: str, weight: np.ndarray, companions: Mapping[str, np.ndarray]) -> QuantizedTensor | Int8Tensor:
    """Returns the weight as stored, from its tensor and its companions by suffix; ``name`` is for the messages.

    Raises:
      ValueError: if companions are missing or sizes disagree, all at once.
      NotImplementedError: for an int8 layout other than rows.
    """
    if "SCB" in companions:
        return _decode_int8(name, weight, companions)
    kind = next((k for k in _KINDS if _STATE + k in companions), None)
    if kind is None:
        raise ValueError(f"{name} has {sorted(companions)} but no {_STATE}nf4 or {_STATE}fp4; is the checkpoint complete?")
    state = _read_state(name, companions[_STATE + kind])
    nested_keys = ("nested_absmax", "nested_quant_map")
    needed = ("absmax", "quant_map", *(nested_keys if "nested_offset" in state else ()))
    raise_all(f"{name} lacks parts of its quantisation state", [k for k in needed if k not in companions])
    nested, absmax = None, companions["absmax"]
    if "nested_offset" in state:
        nested = Nested(
            codes=absmax,
            code_book=companions["nested_quant_map"],
            absmax=companions["nested_absmax"],
            offset=state["nested_offset"],
            blocksize=state["nested_blocksize"],
        )
    codes = weight.reshape(-1).view(np.uint8)
    _check_sizes(name, state, codes, companions["quant_map"], absmax, nested)
    return QuantizedTensor(
        codes=_swap_nibbles(codes),
        code_book=companions["quant_map"],
        absmax=absmax if nested is None else nested.dequantise(),
        nested=nested,
        quant_type=kind,
        blocksize=state["blocksize"],
        dtype=state["dtype"],
        shape=tuple(state["shape"]),
        storage=_storage_name(weight.dtype),
    )


def dequantise(q: QuantizedTensor) -> np.ndarray:
    """Returns the weight in its stored dtype and shape, bit for bit what bitsandbytes' reference computes."""
    n = math.prod(q.shape)
    nibbles = np.stack([q.codes & 0xF, q.codes >> 4], axis=-1).reshape(-1)[:n]
    w = q.code_book[nibbles]
    w *= np.repeat(q.absmax, q.blocksize)[:n]
    return w.astype(_DTYPES[q.dtype]).reshape(q.shape)


def dequantise_int8(q: Int8Tensor) -> np.ndarray:
    """Returns f32 [out, in]: codes * absmax * (1 / 127), in that order, as bitsandbytes multiplies."""
    return q.codes.astype(np.float32) * q.absmax[:, None] * np.float32(1 / 127)


def quantise_nf4(w: np.ndarray, *, double_quant: bool = True) -> QuantizedTensor:
    """Quantises a bf16, f16 or f32 weight to NF4 in blocks of 64: the nearest code of w / absmax, ties to the lower code.

    Codes and absmax are bitsandbytes', byte for byte; the codes of a double quantised absmax may differ from it at ties.

    >>> q = quantise_nf4(np.eye(8, dtype=np.float32), double_quant=False)
    >>> q.absmax.tolist(), float(dequantise(q).trace())
    ([1.0], 8.0)

    Raises:
      ValueError: for another dtype, or values that are not finite.
    """
    dtype = next((name for name, d in _DTYPES.items() if d == w.dtype), None)
    if dtype is None:
        raise ValueError(f"expected a weight in {sorted(_DTYPES)}, got {w.dtype}")
    flat = w.astype(np.float32).reshape(-1)
    if not np.isfinite(flat).all():
        raise ValueError(f"the weight has {int((~np.isfinite(flat)).sum())} values that are not finite, of {flat.size}")
    blocks = np.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(axis=1)
    # A block of zeros keeps absmax 0; dividing it by 1 gives code 7, whose value is 0.
    scaled = blocks / np.where(absmax == 0, np.float32(1), absmax)[:, None]
    codes = np.searchsorted((NF4[1:] + NF4[:-1]) / 2, scaled.reshape(-1)[: flat.size + flat.size % 2], side="left").astype(np.uint8)
    nested = _nest(absmax) if double_quant else None
    return QuantizedTensor(
        codes=codes[0::2] | codes[1::2] << 4,
        code_book=NF4.copy(),
        absmax=absmax if nested is None else nested.dequantise(),
        nested=nested,
        quant_type="nf4",
        blocksize=BLOCK,
        dtype=dtype,
        shape=w.shape,
    )


def to_tensors(name: str, q: QuantizedTensor) -> dict[str, np.ndarray]:
    """Returns the tensors that bitsandbytes stores for the weight called ``name``; ``decode`` is the inverse, bit for bit.

    >>> sorted(to_tensors("fc.weight", quantise_nf4(np.eye(8, dtype=np.float32), double_quant=False)))
    ['fc.weight', 'fc.weight.absmax', 'fc.weight.quant_map', 'fc.weight.quant_state.bitsandbytes__nf4']
    """
    state = {"quant_type": q.quant_type, "blocksize": q.blocksize, "dtype": q.dtype, "shape": list(q.shape)}
    out = {name: _swap_nibbles(q.codes).view(_STORAGES[q.storage])[:, None], f"{name}.quant_map": q.code_book}
    if q.nested is None:
        out[f"{name}.absmax"] = q.absmax
    else:
        state |= {"nested_blocksize": q.nested.blocksize, "nested_dtype": "float32", "nested_offset": q.nested.offset}
        out[f"{name}.absmax"] = q.nested.codes
        out[f"{name}.nested_absmax"] = q.nested.absmax
        out[f"{name}.nested_quant_map"] = q.nested.code_book
    out[f"{name}.{_STATE}{q.quant_type}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out


def dynamic_map() -> np.ndarray:
    """Returns bitsandbytes' signed 8-bit dynamic code book, f32 [256], sorted.

    Decade i of 7 (down from 1) holds 2^i points on each side: the midpoints of 2^i equal steps from 0.1 to 1, times 10^(i - 6).
    Dettmers, 8-bit approximations (arXiv 1511.04561).

    >>> m = dynamic_map()
    >>> m.size, round(float(m[0]), 6), float(m[-1]), int((m == 0).sum())
    (256, -0.992969, 1.0, 1)
    """
    points = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = _linspace(2**i)
        decade = np.float32(10.0 ** (i - 6)) * ((edges[1:] + edges[:-1]) / np.float32(2))
        points += [*decade, *-decade]
    return np.sort(np.array(points, np.float32))


def _linspace(steps: int) -> np.ndarray:
    """Returns the f32 edges of equal steps from 0.1 to 1 in torch's rounding: an f32 step, fused from the nearer end."""
    i, step = np.arange(steps + 1), np.float64((np.float32(1) - np.float32(0.1)) / np.float32(steps))
    edges = np.where(i < (steps + 1) // 2, np.float64(np.float32(0.1)) + step * i, 1 - step * (steps - i))
    return edges.astype(np.float32)


_STORAGES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


def _storage_name(dtype: np.dtype) -> str:
    name = next((name for name, d in _STORAGES.items() if d == dtype), None)
    if name is None:
        raise ValueError(f"4-bit codes are stored in {dtype}; known are {sorted(_STORAGES)}")
    return name


def _swap_nibbles(codes: np.ndarray) -> np.ndarray:
    return codes << 4 | codes >> 4


def _nest(absmax: np.ndarray) -> Nested:
    offset = absmax.mean(dtype=np.float32)
    centred = absmax - offset
    padded = np.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    scale = np.abs(padded).max(axis=1)
    # Equal scales leave nothing but the offset; 1 instead of 0 keeps the division defined.
    scaled = (padded / np.where(scale == 0, np.float32(1), scale)[:, None]).reshape(-1)[: centred.size]
    book = dynamic_map()
    codes = np.searchsorted((book[1:] + book[:-1]) / 2, scaled, side="left").astype(np.uint8)
    return Nested(codes=codes, code_book=book, absmax=scale, offset=float(offset), blocksize=NESTED_BLOCK)


def _read_state(name: str, packed: np.ndarray) -> dict:
    try:
        state = json.loads(packed.tobytes())
        faults = [f"{k} is missing" for k in ("quant_type", "blocksize", "dtype", "shape") if k not in state]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the quantisation state of {name} is not a JSON object: {error}") from error
    raise_all(f"the quantisation state of {name} is incomplete", faults)
    sizes = [state["blocksize"], *state["shape"]]
    if "nested_offset" in state:
        sizes.append(state.get("nested_blocksize", NESTED_BLOCK))
        state.setdefault("nested_blocksize", NESTED_BLOCK)
        offset, dtype = state["nested_offset"], state.get("nested_dtype", "float32")
        if not isinstance(offset, float | int) or dtype != "float32":
            faults.append(f"nested_offset is {offset!r} and nested_dtype {dtype!r}: expected a number and 'float32'")
    if not all(type(s) is int and s > 0 for s in sizes):
        faults.append(f"block sizes and shape must be positive integers, got {sizes}")
    if state["dtype"] not in _DTYPES:
        faults.append(f"dtype is {state['dtype']!r}, known are {sorted(_DTYPES)}")
    raise_all(f"the quantisation state of {name} is wrong", faults)
    return state


def _check_sizes(name: str, state: dict, codes: np.ndarray, book: np.ndarray, absmax: np.ndarray, nested: Nested | None) -> None:
    n = math.prod(state["shape"])
    blocks = -(-n // state["blocksize"])
    expected = [("weight bytes", codes, np.uint8, (n + 1) // 2), ("quant_map", book, np.float32, 16)]
    if nested is None:
        expected.append(("absmax", absmax, np.float32, blocks))
    else:
        expected.append(("absmax", absmax, np.uint8, blocks))
        expected.append(("nested_absmax", nested.absmax, np.float32, -(-blocks // nested.blocksize)))
        expected.append(("nested_quant_map", nested.code_book, np.float32, 256))
    faults = [
        f"{what}: expected {size} of {np.dtype(dtype)}, got {list(array.shape)} of {array.dtype}"
        for what, array, dtype, size in expected
        if array.shape != (size,) or array.dtype != dtype
    ]
    raise_all(f"{name}, 4-bit of shape {state['shape']} in blocks of {state['blocksize']}, has parts of the wrong size", faults)


def _decode_int8(name: str, weight: np.ndarray, companions: Mapping[str, np.ndarray]) -> Int8Tensor:
    layout = int(companions.get("weight_format", np.zeros((), np.uint8)).reshape(-1)[0])
    if layout != 0:
        raise NotImplementedError(f"{name} is int8 in layout {layout}, and only rows (0) can be read; save it with a newer bitsandbytes")
    absmax = companions["SCB"]
    if weight.dtype != np.int8 or weight.ndim != 2 or absmax.dtype != np.float32 or absmax.shape != weight.shape[:1]:
        got = f"{weight.dtype} {list(weight.shape)} with {absmax.dtype} {list(absmax.shape)}"
        raise ValueError(f"{name}: expected int8 [out, in] with float32 SCB [out], got {got}")
    return Int8Tensor(codes=weight, absmax=absmax)
