"""Seeded bugs of vision-language models: towers, projectors, where features go, processors."""

from record import Mutant

QWEN_VL = "tests/jaxlora/models/test_qwen_vl.py"
GEMMA3 = "tests/jaxlora/models/test_gemma3.py"
GEMMA3_PROCESSOR = "tests/jaxlora/data/test_gemma3_processor.py"
LLAVA = "tests/jaxlora/models/test_llava.py"
LLAVA_PROCESSOR = "tests/jaxlora/data/test_llava_processor.py"
MLLAMA = "tests/jaxlora/models/test_mllama.py"

VISION_MUTANTS = [
    Mutant("jaxlora/models/gemma3.py", "jnp.where(index < 0, columns,", "jnp.where(index <= 0, columns,", "an image ends early", GEMMA3),
    Mutant("jaxlora/data/gemma3.py", "{self.eoi_token}\\n\\n", "{self.eoi_token}", "no line breaks after an image", GEMMA3_PROCESSOR),
    Mutant(
        "jaxlora/nn/vision.py",
        "rope.rotate(t, shared.rope) for t in (q, k)",
        "rope.rotate(t, shared.rope) for t in (k, q)",
        "q and k of the tower swapped",
        QWEN_VL,
    ),
    Mutant(
        "jaxlora/data/positions.py",
        "blocks.reshape(h * w, 2)",
        "np.stack([row, column], -1).reshape(h * w, 2)",
        "patches in row order, not merge-block order",
        QWEN_VL,
    ),
    Mutant(
        "jaxlora/nn/vision.py", "shared.windows if self.windowed", "shared.windows if not self.windowed", "windows the wrong way", QWEN_VL
    ),
    Mutant(
        "jaxlora/data/batches.py", "at_feature + np.argsort(order)", "at_feature + order", "features are not put back in order", QWEN_VL
    ),
    Mutant(
        "jaxlora/data/batches.py",
        "run.grid[1] * run.grid[2] == frame",
        "run.grid[1] * run.grid[2] <= frame",
        "frames that fill less than their room are said to be alike",
        "tests/jaxlora/data/test_batches.py",
    ),
    Mutant("jaxlora/nn/vision.py", "Alike(lengths.shape[-1])", "Alike(1)", "frames alike see each other", QWEN_VL),
    Mutant("pallas_kernels/functions.py", "jax.nn.sigmoid(1.702 * x32)", "jax.nn.sigmoid(x32)", "silu for quick-gelu", QWEN_VL),
    Mutant(
        "jaxlora/models/mistral3.py",
        "self.merged, D).swapaxes(2, 3)",
        "self.merged, D)",
        "patches are merged one after the other, not channel by channel",
        LLAVA,
    ),
    Mutant(
        "jaxlora/models/mistral3.py",
        "eps=config.text.rms_norm_eps",
        "eps=1e-5",
        "the projector's norm has the tower's epsilon",
        LLAVA,
    ),
    Mutant(
        "jaxlora/nn/pixtral.py",
        "np.stack([both[0::2], both[1::2]])",
        "np.stack([both[1::2], both[0::2]])",
        "rows turn as columns do",
        LLAVA,
    ),
    Mutant(
        "jaxlora/data/llava.py",
        "columns = grid[1] // self.spatial_merge_size, grid[2] // self.spatial_merge_size",
        "columns = grid[1] // self.spatial_merge_size, grid[2]",
        "a placeholder for every patch of a row, not for every feature",
        LLAVA_PROCESSOR,
    ),
    Mutant(
        "jaxlora/nn/cross.py",
        "jnp.where((vision.lengths > 0)[..., None], y, jnp.zeros((), y.dtype))",
        "y",
        "a token that sees no image goes through the cross layer's MLP",
        MLLAMA,
    ),
]
