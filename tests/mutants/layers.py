"""Seeded bugs of layers: their norms, how they are stacked, recomputed, offloaded and cut into tiles."""

from record import Mutant

NORM = "tests/jaxlora/nn/test_norm.py"
OFFLOAD = "tests/jaxlora/nn/test_offload.py"
REMAT = "tests/jaxlora/train/test_remat.py"
PENDING = "tests/jaxlora/nn/test_pending.py"
STACK = "tests/jaxlora/nn/test_stack.py"
TILES = "tests/jaxlora/nn/test_mlp.py"

LAYER_MUTANTS = [
    Mutant("jaxlora/nn/stack.py", "one.within(stacked)", "one", "a layer does not know its stack", "tests/jaxlora/api/test_float8.py"),
    Mutant(
        "pallas_kernels/functions.py",
        "jnp.mean(g * x32, axis",
        "jnp.mean(g, axis",
        "the norm's backward forgets the direction of x",
        NORM,
    ),
    Mutant(
        "pallas_kernels/functions.py",
        "inverse * (g - shift - ",
        "inverse * (g - ",
        "the layer norm's backward forgets the mean",
        NORM,
    ),
    Mutant("jaxlora/nn/pending.py", "dy, past, function", "dy, 0 * past, function", "what comes past a norm is lost", PENDING),
    Mutant(
        "jaxlora/nn/products.py",
        "us = kept(down(rates, x, loras, keys))",
        "us = down(rates, x, loras, keys)",
        "adapters' columns are computed again",
        "tests/jaxlora/nn/test_linear.py",
    ),
    Mutant(
        "jaxlora/nn/products.py",
        "else (None, dx)",
        "else (None, 0 * dx)",
        "what comes through a pending norm is lost",
        PENDING,
    ),
    Mutant(
        "jaxlora/nn/mlp_products.py",
        "else (None, dx)",
        "else (None, 0 * dx)",
        "what comes through an MLP's norm is lost",
        PENDING,
    ),
    Mutant(
        "jaxlora/nn/linear.py",
        "return bool(keys) and any(linear.lora_dropout for linear in linears)",
        "return False",
        "a pending norm's adapters do not drop",
        PENDING,
    ),
    Mutant(
        "jaxlora/nn/products.py", "adapted_sum(both, None, du,", "adapted_sum(both, None, 0 * du,", "a wide product gets no update", PENDING
    ),
    Mutant(
        "jaxlora/nn/pending.py", "return None, dy.reshape", "return None, 0 * dy.reshape", "a pending norm's value has no gradient", PENDING
    ),
    Mutant("jaxlora/nn/offload.py", "first_of(layer - 1)", "first_of(layer)", "a block's backward begins with its successor's", STACK),
    Mutant("jaxlora/nn/offload.py", "put(dxs, layer, down)", "put(dxs, done, down)", "gradients in the order of the backward", STACK),
    Mutant("jaxlora/nn/vjp.py", "take(xs, i + zero)", "take(xs, zero)", "every block has the first one's weights", STACK),
    Mutant("jaxlora/nn/offload.py", "ATTENTION if fits and", "ATTENTION if", "more is kept than the host has room for", OFFLOAD),
    Mutant("jaxlora/nn/offload.py", "(2 if w.decoded else 1)", "2", "products in e4m3 count as long as others", OFFLOAD),
    Mutant("jaxlora/nn/offload.py", "if x.shape[-2] >= _LONG", "if False", "attention of long rows is computed again", OFFLOAD),
    Mutant("jaxlora/nn/offload.py", "jnp.add, dconst, added", "lambda a, b: b, dconst, added", "what blocks share, by one of them", STACK),
    Mutant("jaxlora/nn/scan.py", "jnp.add, dconsts, dconst", "lambda a, b: b, dconsts, dconst", "what kinds share, by one layer", STACK),
    Mutant("jaxlora/nn/scan.py", "put(downs, turn, down)", "put(downs, 0, down)", "all gradients of a kind in one place", STACK),
    Mutant("jaxlora/nn/scan.py", "self.plain or looped", "self.plain", "a number that XLA cannot work out in a loop", STACK),
    Mutant("jaxlora/train/remat.py", '"residual"', '"none"', "the projection is kept in place of the sum", REMAT),
    Mutant("jaxlora/nn/offload.py", ', "unnormed"', "", "what is normed is computed again beside what is kept of it", REMAT),
    Mutant("jaxlora/nn/attention.py", "if self.q_norm is None:", "if True:", "turned heads are kept beside what is normed", REMAT),
    Mutant("jaxlora/nn/scan.py", " + self.kinds[:p].count(kind)", "", "a period's layers of a kind are one layer", STACK),
    Mutant("jaxlora/nn/scan.py", "else [here, *saved]", "else [x, *saved]", "layers are recomputed from their outputs", STACK),
    Mutant("jaxlora/nn/scan.py", "repeats - 1 - done if reverse else done", "done", "the backward begins with the first period", STACK),
    Mutant(
        "jaxlora/nn/scan.py", "take(dout, i)", "jax.tree.map(jnp.zeros_like, take(dout, i))", "no gradient of what layers return", STACK
    ),
    Mutant("jaxlora/select.py", "return sorted(layer for", "return list(layer for", "stacked layers in the order of their starts", STACK),
    Mutant("jaxlora/nn/offload.py", "if dstates is not None:", "if False:", "collected states have no gradient", STACK),
    Mutant(
        "jaxlora/nn/mlp.py",
        "jnp.add, sums, few",
        "lambda a, b: b, sums, few",
        "an adapter's gradient by one tile",
        TILES,
    ),
    Mutant("jaxlora/nn/stack.py", "jnp.concatenate(parts)[inverse]", "jnp.concatenate(parts)", "outputs of layers out of order", STACK),
]
