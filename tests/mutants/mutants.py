"""Applies seeded bugs one at a time to a copy of the tree and says which of them the tests notice; see README.md."""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from kernels import KERNEL_MUTANTS
from layers import LAYER_MUTANTS
from record import Mutant
from vision import VISION_MUTANTS

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600


# Groups of test files, by what they are about.
INIT = "tests/jaxlora/test_adapter_init.py"
EXPORT = "tests/jaxlora/test_export.py"
LINEAR = "tests/jaxlora/nn/test_linear.py"
AUTO = "tests/jaxlora/train/test_auto.py"
MEMORY = "tests/jaxlora/train/test_out_of_memory.py"
ROPE = "tests/jaxlora/nn/test_rope.py"
PARITY = "tests/jaxlora/models/test_parity.py"
PEFT = "tests/jaxlora/test_peft_parity.py"
STEP = "tests/jaxlora/train/test_step.py"
LOOP = "tests/jaxlora/train/test_loop.py"
OPTIM = "tests/jaxlora/train/test_optim.py"
CHECKPOINT = "tests/jaxlora/train/test_checkpoint.py"
RESUME = "tests/jaxlora/train/test_resume.py"
QWEN = "tests/jaxlora/models/test_qwen_vl.py"
GENERATE = "tests/jaxlora/api/test_generate.py"
EVALUATION = "tests/jaxlora/api/test_user_scripts.py::TestLanguage::test_evaluation_is_the_mean_token_loss_of_the_logits"
ERRORS = "tests/jaxlora/api/test_errors.py"
FORMATS = "tests/jaxlora/weights/test_formats.py"
SELECT = "tests/jaxlora/test_select.py"
BATCHES = "tests/jaxlora/data/test_batches.py"
RESPONSES = "tests/jaxlora/data/test_responses.py"
COLLATOR = "tests/jaxlora/data/test_collator.py"
ATTENTION = "tests/pallas_kernels/test_attention.py"
CUDNN = "tests/pallas_kernels/test_attention_cudnn.py"
SHORT = "tests/pallas_kernels/test_attention_short.py"
ENTROPY = "tests/pallas_kernels/test_linear_cross_entropy.py"
REFERENCE = "tests/pallas_kernels/test_against_reference.py"
BNB = "tests/conversion/test_bnb.py"

MUTANTS = [
    # adapters
    Mutant("jaxlora/adapt.py", "(math.sqrt(r) if self.use_rslora else r)", "1", "alpha instead of alpha / r", INIT),
    Mutant("jaxlora/adapt.py", "math.sqrt(r) if self.use_rslora", "r if self.use_rslora", "rsLoRA without its square root", INIT),
    Mutant("jaxlora/adapt.py", "bound = 1 / math.sqrt(shape[1])", "bound = 1 / shape[1]", "A drawn from U(1/in)", INIT),
    Mutant("jaxlora/adapt.py", "jax.random.normal(key, shape) / shape[0]", "jax.random.normal(key, shape)", "gaussian A without 1/r", INIT),
    Mutant(
        "jaxlora/nn/products.py",
        "_narrow_product(dys[i], scaled_b(lora, dtype))",
        "_narrow_product(dys[i], lora.b.astype(dtype))",
        "the scale is missing from dx and dA",
        LINEAR,
    ),
    Mutant("jaxlora/nn/products.py", "(lora.scale * db)", "db", "the scale is missing from dB", LINEAR),
    Mutant(
        "jaxlora/nn/products.py",
        "((0, 0), (at, total - at - lora.rank))",
        "((0, 0), (total - at - lora.rank, at))",
        "a group's B meets another Linear's u",
        LINEAR,
    ),
    Mutant("jaxlora/nn/products.py", "outer(dus[i], x * kept)", "outer(dus[i], x)", "dA ignores the dropout mask", LINEAR),
    Mutant(
        "jaxlora/nn/products.py",
        "        kept = _keep(keys[i], rates[i], x)",
        "        kept = _keep(jax.random.fold_in(keys[i], 1), rates[i], x)",
        "another dropout mask in the backward",
        LINEAR,
    ),
    Mutant("jaxlora/nn/products.py", ".astype(x.dtype) / (1 - rate)", ".astype(x.dtype)", "dropout keeps no expectation", LINEAR),
    # norms, rope, attention
    Mutant("jaxlora/nn/rope.py", "1.0 / rope.theta **", "1.0 / (2 * rope.theta) **", "another rope theta", ROPE),
    Mutant(
        "jaxlora/nn/rope.py",
        "(1 - smooth) * base / rope.factor + smooth * base",
        "smooth * base / rope.factor + (1 - smooth) * base",
        "llama-3 scaling the wrong way round",
        ROPE,
    ),
    Mutant(
        "jaxlora/nn/rope.py",
        "jnp.array([-1, 1], cos.dtype)",
        "jnp.array([1, -1], cos.dtype)",
        "rope turns backwards",
        ROPE,
    ),
    Mutant(
        "jaxlora/nn/rope.py",
        "np.repeat(np.arange(3), sections)",
        "np.repeat(np.arange(3)[::-1], sections)",
        "M-RoPE sections reversed",
        ROPE,
    ),
    Mutant(
        "pallas_kernels/functions.py",
        "jnp.square(x32), axis=-1, keepdims=True) + eps)",
        "jnp.square(x32), axis=-1, keepdims=True) + 1e-2)",
        "another epsilon in RMSNorm",
        PARITY,
    ),
    Mutant(
        "jaxlora/nn/norm.py",
        "1.0 + _row(self.weight, x.astype(jnp.float32))",
        "_row(self.weight, x.astype(jnp.float32))",
        "Gemma's norm without its 1",
        PARITY,
    ),
    Mutant("jaxlora/nn/embed.py", "rows * jnp.asarray(self.scale, rows.dtype)", "rows", "Gemma's embeddings are not scaled", PARITY),
    Mutant(
        "jaxlora/nn/attention.py",
        "shared.rope if self.window is None or shared.local_rope is None else shared.local_rope",
        "shared.rope",
        "sliding layers turn as full ones do",
        PARITY,
    ),
    Mutant(
        "jaxlora/nn/attention.py",
        "config.softcap * jnp.tanh(scores / config.softcap)",
        "scores * 1",
        "a cached step without its soft-cap",
        PARITY,
    ),
    Mutant("jaxlora/train/loss.py", "softcap=head.softcap", "softcap=None", "the loss without the head's soft-cap", PARITY),
    Mutant(
        "jaxlora/nn/rope.py",
        "base / rope.factor * ramp + base * (1 - ramp)",
        "base / rope.factor * (1 - ramp) + base * ramp",
        "yarn stretches the wrong end",
        ROPE,
    ),
    Mutant("jaxlora/nn/rope.py", "(factor * jnp.sin(full))", "jnp.sin(full)", "yarn's factor on cos alone", ROPE),
    Mutant(
        "pallas_kernels/attention/spec.py",
        "jnp.maximum(position[:, 0] + 1, reach)",
        "position[:, 0] + 1 + 0 * reach",
        "tokens of an image do not see ahead",
        ATTENTION,
    ),
    Mutant(
        "pallas_kernels/attention/xla.py", "(key >= lo) & (key < hi)", "(key >= lo) & (key <= hi)", "a query sees the next key", ATTENTION
    ),
    Mutant("pallas_kernels/attention/xla.py", "acc * rescale[..., None] + pv", "acc + pv", "online softmax forgets to rescale", REFERENCE),
    Mutant("pallas_kernels/attention/xla.py", "(dp - delta[..., None])", "dp", "softmax's backward without delta", REFERENCE),
    Mutant(
        "jaxlora/nn/attention.py", "columns > last - window", "columns >= last - window", "the window of decoding is one longer", GENERATE
    ),
    Mutant(
        "jaxlora/nn/attention.py", "visible = columns <= last", "visible = columns < last", "decoding does not see its own token", GENERATE
    ),
    # the step
    Mutant("jaxlora/nn/products.py", "(pull(dx), None)", "(pull(x), None)", "an activation's gradient of its value", LINEAR),
    Mutant("jaxlora/weights/base.py", "part + total, parts", "total, parts", "the gradient by the first of a group alone", LINEAR),
    Mutant("jaxlora/weights/base.py", "beside(*dys, update[0])", "beside(update[0], *dys)", "columns swapped", FORMATS),
    Mutant("pallas_kernels/attention/cudnn.py", "<= (2 if spec", ">= (2 if spec", "documents see each other", CUDNN),
    Mutant("pallas_kernels/attention/cudnn.py", "(key >= lo) &", "(key > lo) &", "cuDNN's mask hides the first key", CUDNN),
    Mutant("pallas_kernels/attention/short.py", "segments[1] > spec.longest", "segments[1] < 0", "a cut segment is not told", SHORT),
    Mutant("pallas_kernels/attention/short.py", "& filled.reshape", "| ~filled.reshape", "a segment sees what follows it", REFERENCE),
    Mutant("jaxlora/nn/vision.py", "config.window**2 * config.merged", "config.window**2", "windows of too few patches", QWEN),
    Mutant("pallas_kernels/attention/spec.py", "length - end, 0", "length - end - 1, 0", "the last padding is left out", ATTENTION),
    Mutant("jaxlora/train/auto.py", "limit_gib and tried[-1].pinned", "limit_gib", "memory that the host cannot pin is planned with", AUTO),
    Mutant("jaxlora/train/auto.py", "{limit_gib} {host.room_bytes() >> 30}", "{limit_gib}", "another host's choice is taken", AUTO),
    Mutant("jaxlora/nn/host.py", "1 << (nbytes - 1).bit_length()", "nbytes", "XLA is taken to pin no more than is needed", AUTO),
    Mutant("jaxlora/train/out_of_memory.py", 'or "host_bfc" in said', "and False", "the host's memory is the device's", MEMORY),
    Mutant("jaxlora/train/out_of_memory.py", 'if "RESOURCE_EXHAUSTED" not in said:', "if False:", "any fault is a lack of memory", MEMORY),
    Mutant("jaxlora/train/auto.py", "needed_gib <= limit_gib", "needed_gib >= limit_gib", "a policy that does not fit", AUTO),
    Mutant("jaxlora/train/loop.py", ".sum()), at)", ".sum()), time.perf_counter())", "steps end when they are read", LOOP),
    # formats
    Mutant(
        "jaxlora/weights/int4.py",
        "nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)",
        "(nibbles[:, 0::2] << 4) | nibbles[:, 1::2]",
        "int4's nibbles swapped",
        FORMATS,
    ),
    Mutant("jaxlora/weights/int4.py", "(0.6 + 0.4 / 24 * (i // 2))", "1.0", "int4 scales are not searched", FORMATS),
    Mutant("jaxlora/weights/nf4.py", "midpoints = (bnb.NF4[1:] + bnb.NF4[:-1]) / 2", "midpoints = bnb.NF4[1:]", "NF4 rounds down", FORMATS),
    Mutant("conversion/formats/bnb.py", "    return codes << 4 | codes >> 4", "    return codes", "bitsandbytes' nibble order kept", BNB),
    # data
    Mutant("jaxlora/data/batches.py", "np.append(row.labels[1:], IGNORE)[:n]", "row.labels[:n].copy()", "labels are not shifted", BATCHES),
    Mutant("jaxlora/data/batches.py", "    shifted[starts[1:] - 1] = IGNORE\n", "", "a document predicts the next one", BATCHES),
    Mutant(
        "jaxlora/data/inputs.py", "else np.arange(length))\n", "else at + np.arange(length))\n", "positions run on in packed rows", BATCHES
    ),
    Mutant(
        "jaxlora/data/padding.py",
        "stacked(labels, IGNORE)",
        "stacked([np.where(row == tokenizer.eos_token_id, IGNORE, row) for row in labels], IGNORE)",
        "the end token is masked",
        COLLATOR,
    ),
    Mutant(
        "jaxlora/data/responses.py",
        "for start, end in spans[-1:] if last_response_only else spans:",
        "for start, end in spans[:1] if last_response_only else spans:",
        "the first response for the last",
        RESPONSES,
    ),
    Mutant(
        "jaxlora/data/collate.py", "IGNORE, encoded.labels)", "encoded.labels, encoded.labels)", "image placeholders are trained", COLLATOR
    ),
    # loss, step, loop
    Mutant(
        "pallas_kernels/linear_cross_entropy.py",
        "(count + chunk - 1) // chunk",
        "count // chunk",
        "the last chunk of labels is dropped",
        ENTROPY,
    ),
    Mutant(
        "pallas_kernels/linear_cross_entropy.py",
        "dh += scale * _dot(gb.astype(a.dtype), a)",
        "dh += _dot(gb.astype(a.dtype), a)",
        "dHidden without the head adapter's scale",
        REFERENCE,
    ),
    Mutant(
        "jaxlora/train/step.py",
        "head_grad=head_grad) / count",
        "head_grad=head_grad) / jnp.maximum(label_count(micro.labels), 1)",
        "each micro-batch has its own normaliser",
        STEP,
    ),
    Mutant(
        "jaxlora/train/step.py",
        "lambda s, g: s + g.astype(jnp.float32)",
        "lambda s, g: g.astype(jnp.float32)",
        "only the last micro-batch is kept",
        STEP,
    ),
    Mutant(
        "jaxlora/train/step.py",
        '"lm_head.weight", "embed_tokens.weight"',
        '"lm_head.weight"',
        "a tied embedding is trained without its head's gradient",
        PEFT,
    ),
    Mutant("jaxlora/train/step.py", "jnp.where(finite, n, o)", "n", "a step that is not finite is applied", LOOP),
    Mutant(
        "jaxlora/train/optim.py",
        "[optax.linear_schedule(0.0, peak, warmup), after], [warmup]",
        "[optax.linear_schedule(0.0, peak, warmup + 1), after], [warmup]",
        "warm-up ends a step late",
        OPTIM,
    ),
    Mutant(
        "jaxlora/train/optim.py",
        "rest = max(config.total_steps - warmup, 1)",
        "rest = max(config.total_steps, 1)",
        "decay forgets the warm-up",
        OPTIM,
    ),
    Mutant(
        "jaxlora/train/loop.py", "rate(number - 1 - state.skipped)", "rate(number - state.skipped)", "the next step's rate is logged", LOOP
    ),
    Mutant(
        "jaxlora/train/loop.py",
        'if path.endswith("lora_B") and not norm and not excused:',
        "if False:",
        "a blocked tower goes unnoticed",
        LOOP,
    ),
    Mutant(
        "jaxlora/train/checkpoint.py",
        "stored[name][i] if is_stacked(name)",
        "stored[name][0] if is_stacked(name)",
        "regrouping repeats a layer",
        CHECKPOINT,
    ),
    Mutant(
        "jaxlora/api/trainer.py",
        "batches.starting(state.step, total)",
        "batches.starting(0, total)",
        "a resumed run reads its rows again",
        RESUME,
    ),
    Mutant("jaxlora/train/loop.py", "jnp.int32(state.step)", "jnp.int32(0)", "every step has number 0: dropout repeats", LOOP),
    Mutant("jaxlora/api/trainer.py", "total += float(_eval_loss(", "total += 2 * float(_eval_loss(", "evaluation counts twice", EVALUATION),
    # stacks, selection, export, decoding
    Mutant(
        "jaxlora/select.py",
        'return path == target or path.endswith("." + target)',
        "return path.endswith(target)",
        "suffixes match inside names",
        SELECT,
    ),
    Mutant(
        "jaxlora/select.py", "        return vision\n", "        return True\n", "all-linear ignores a vision tower that is off", SELECT
    ),
    Mutant("conversion/source.py", "np.float32(scale) * (b[block] @ a)", "b[block] @ a", "a merge without its scale", EXPORT),
    Mutant(
        "jaxlora/export.py",
        "self._value(path, self.source.read(name))",
        "self._value(path, np.zeros_like(self.source.read(name)))",
        "a merge onto the wrong base",
        EXPORT,
    ),
    Mutant(
        "jaxlora/generate/decode.py", "next_position + t - 1, ends)", "next_position + t, ends)", "decoding is one position ahead", GENERATE
    ),
    Mutant(
        "jaxlora/generate/decode.py",
        "column=lengths + t - 1",
        "column=columns + t - 1",
        "the cache is written behind the padding",
        GENERATE,
    ),
    Mutant(
        "jaxlora/generate/decode.py", "chosen = jnp.where(done, pad, chosen)", "chosen = chosen", "a row goes on after its end", GENERATE
    ),
    Mutant(
        "jaxlora/api/model.py",
        "placed[b, start : start + length]",
        "placed[b, :length]",
        "logits of left-padded rows out of place",
        GENERATE,
    ),
    Mutant(
        "jaxlora/api/fast.py", 'refuse_unknown("get_peft_model"', '(lambda *_: None)("get_peft_model"', "unknown arguments vanish", ERRORS
    ),
    *LAYER_MUTANTS,
    *KERNEL_MUTANTS,
    *VISION_MUTANTS,
]


def faults(mutants: list[Mutant]) -> list[str]:
    """What keeps a mutant from being applied."""
    found = []
    for number, mutant in enumerate(mutants):
        times = (ROOT / mutant.file).read_text().count(mutant.old)
        if times != 1:
            found.append(f"{number} ({mutant.what}): {mutant.file} has its line {times} times")
        found += [f"{number}: there is no {path}" for path in mutant.tests.split() if not (ROOT / path.partition("::")[0]).is_file()]
    return found


def survives(tree: pathlib.Path, mutant: Mutant) -> bool:
    """Whether the tests pass although the mutant is in the tree."""
    path = tree / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    # No bytecode: a mutant of the same length in the same second would be taken for its original.
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", *mutant.tests.split()]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS)
    finally:
        path.write_text(original)
    # 1: tests failed; 2: collection failed. Anything else than these and success is a fault of this script.
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.returncode == 0


def run(numbers: list[int]) -> int:
    """Applies these mutants in turn; prints a table; returns how many survived."""
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="jaxlora-mutants-") as parent:
        tree = pathlib.Path(parent) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".hypothesis", "*.egg-info"))
        for number in numbers:
            start = time.monotonic()
            alive = survives(tree, MUTANTS[number])
            survivors += alive
            verdict = "SURVIVED" if alive else "killed"
            print(f"{number:3}  {verdict:8}  {time.monotonic() - start:5.0f} s  {MUTANTS[number].what}", flush=True)
    print(f"{len(numbers) - survivors} of {len(numbers)} killed")
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants")
    parser.add_argument("--check", action="store_true", help="say which mutants no longer apply")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants")
    parser.add_argument("--match", help="a word of the description")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{number:3}  {mutant.file}: {mutant.what}" for number, mutant in enumerate(MUTANTS)))
        return 0
    wrong = faults(MUTANTS)
    print("\n".join(wrong), end="\n" if wrong else "")
    if options.check or wrong:
        return len(wrong) > 0
    chosen = options.only if options.only is not None else range(len(MUTANTS))
    return run([number for number in chosen if not options.match or options.match in MUTANTS[number].what]) > 0


if __name__ == "__main__":
    sys.exit(main())
