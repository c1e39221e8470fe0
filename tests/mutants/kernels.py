"""Seeded bugs of packed products, fused MLPs and products in e4m3."""

from record import Mutant

REFERENCE = "tests/pallas_kernels/test_against_reference.py"
FLOAT8 = "tests/jaxlora/weights/test_float8.py"
GATED = "tests/jaxlora/nn/test_gated.py"
LINEAR = "tests/jaxlora/nn/test_linear.py"
PENDING = "tests/jaxlora/nn/test_pending.py"
FORMATS = "tests/jaxlora/weights/test_formats.py"
STEP = "tests/jaxlora/train/test_step.py"
FUNCTIONS = "tests/pallas_kernels/test_functions.py"
CUDNN = "tests/pallas_kernels/test_attention_cudnn.py"
TILES = "tests/jaxlora/nn/test_mlp.py"

KERNEL_MUTANTS = [
    Mutant(
        "pallas_kernels/packed.py", "(nibbles ^ 8).astype(jnp.int8) - 8", "nibbles.astype(jnp.int8)", "codes without their sign", FLOAT8
    ),
    Mutant("jaxlora/weights/float8.py", "return raw, scales * scale", "return raw, scales", "a product without the weight's scale", FLOAT8),
    Mutant("pallas_kernels/float8_rows/xla.py", "axis=1).astype", "axis=1).max().astype", "one scale for all rows", REFERENCE),
    Mutant("pallas_kernels/float8_weight/xla.py", "for shift in (0, 4)", "for shift in (4, 0)", "odd columns before even ones", FLOAT8),
    Mutant(
        "pallas_kernels/gated_gradients/xla.py",
        "dh.astype(jnp.float32) * scales[:, None]",
        "dh.astype(jnp.float32)",
        "wide gradients without their scales",
        REFERENCE,
    ),
    Mutant(
        "jaxlora/nn/mlp_products.py",
        "zip(us.values(), first, strict=True)]",
        "zip([*us.values()][::-1], first, strict=True)]",
        "gate's B gets up's columns in the pass over scaled products",
        GATED,
    ),
    Mutant(
        "jaxlora/nn/mlp_products.py",
        "du, a, scales=scales, unadapted",
        "du, a, scales=None, unadapted",
        "the gradient by h is not scaled",
        GATED,
    ),
    Mutant(
        "jaxlora/nn/mlp_products.py",
        "tuple((s, scaled_b(lora, dy.dtype)) for",
        "tuple((s, lora.b.astype(dy.dtype)) for",
        "a backward's products with unscaled updates",
        GATED,
    ),
    Mutant("jaxlora/nn/mlp_products.py", "if unadapted is not None:", "if False:", "h of unfinished products, for a trained weight", GATED),
    Mutant(
        "jaxlora/nn/mlp_products.py", "update=update, unadapted", "update=None, unadapted", "a plain MLP's gradient is not scaled", GATED
    ),
    Mutant("pallas_kernels/adapted_activation/xla.py", "total(z, s, *update)", "z", "an activation without updates", REFERENCE),
    Mutant(
        "pallas_kernels/adapted_sum/xla.py",
        "return (y + jax.lax.dot_general(u, b, (((1,), (1,)), ((), ())))).astype(z.dtype)",
        "return y.astype(z.dtype) + jax.lax.dot_general(u, b, (((1,), (1,)), ((), ())))",
        "a rounded product in e4m3 swallows its update",
        FLOAT8,
    ),
    Mutant("pallas_kernels/adapted_sum/xla.py", "z[:, : len(b)]", "z[:, -len(b) :]", "the last columns of a wide product", REFERENCE),
    Mutant("jaxlora/weights/float8.py", "for w in weights]).max()", "for w in weights]).min()", "joined weights overflow", FLOAT8),
    Mutant(
        "jaxlora/weights/float8.py", "jnp.arange(len(self.scale),", "jnp.zeros(len(self.scale),", "the first layer's codes for all", FLOAT8
    ),
    Mutant(
        "pallas_kernels/int4_matmul/front.py",
        "transpose=not transpose, backend=backend if",
        "transpose=transpose, backend=backend if",
        "an input gradient with the weight the wrong way",
        REFERENCE,
    ),
    Mutant(
        "pallas_kernels/lora_swiglu/front.py",
        "jnp.pad(b_up, ((0, 0), (b_gate.shape[1], 0)))",
        "jnp.pad(b_up, ((0, 0), (0, b_gate.shape[1])))",
        "up's adapter takes the gate's columns",
        REFERENCE,
    ),
    Mutant(
        "jaxlora/nn/products.py", "residuals, cotangents[:2])", "residuals, cotangents[1::-1])", "gradients of gate and up swapped", GATED
    ),
    Mutant(
        "jaxlora/nn/mlp_products.py",
        "gated_gradients(e, g, dh, u_gate, u_up, du",
        "gated_gradients(e, g, dh, u_up, u_gate, du",
        "gate's B gets the sums over up's columns",
        GATED,
    ),
    Mutant(
        "jaxlora/nn/mlp_products.py",
        "du, a = dy @ scaled_b(lora, dy.dtype)",
        "du, a = dy @ lora.b.astype(dy.dtype)",
        "down's A without its scale",
        GATED,
    ),
    Mutant(
        "pallas_kernels/plain_gradients/xla.py",
        "return de, outer(de, u)",
        "return de, outer(dh, u)",
        "sums over a gradient that the activation did not turn",
        REFERENCE,
    ),
    Mutant(
        "pallas_kernels/gated_gradients/xla.py",
        "pull(with_update(dh, du, a, scales))",
        "pull(dh)",
        "no gradient through down's A",
        REFERENCE,
    ),
    Mutant("pallas_kernels/functions.py", "total -= jnp.sum(scaled", "total += jnp.sum(scaled", "a layer norm's mean is added", FUNCTIONS),
    Mutant("jaxlora/weights/base.py", "return -(width + columns) % 64", "return 0", "rows that end within a cache line", FORMATS),
    Mutant("jaxlora/weights/dense.py", "self.stack, self.layer - 1,", "self.stack, 0,", "the first layer's weight for all", STEP),
    Mutant(
        "pallas_kernels/gated_gradients/xla.py",
        "jnp.concatenate([de, dg], axis=1)",
        "jnp.concatenate([dg, de], axis=1)",
        "wide gradients change places in one array",
        GATED,
    ),
    Mutant(
        "jaxlora/nn/products.py",
        "adapted_sum(input_gradient(weights, dys), None, update[0], update[1].T), du",
        "input_gradient(weights, dys), du",
        "no adapter in the gradient by what 16-bit weights in place take",
        STEP,
    ),
    Mutant("jaxlora/weights/base.py", "du, (0, width))", "du, (0, 0))", "du over the first of the gradients", FORMATS),
    Mutant(
        "pallas_kernels/attention/cudnn.py",
        "all(error < 2e-2 for error in errors.values())",
        "max(errors.values()) < 2e-2",
        "a gradient that is no number passes",
        CUDNN,
    ),
    Mutant(
        "jaxlora/nn/products.py",
        "sums[starts[i] : starts[i + 1], firsts[i] : firsts[i + 1]]",
        "sums[starts[i] : starts[i + 1], : firsts[i + 1] - firsts[i]]",
        "k's B gets the sums over q's columns",
        PENDING,
    ),
    Mutant(
        "pallas_kernels/gated_gradients/xla.py",
        "zip((de, dg), us",
        "zip((dg, de), us",
        "sums over the other projection's gradient",
        REFERENCE,
    ),
    Mutant(
        "jaxlora/weights/base.py",
        "stacked(weights, both.dtype, right=",
        "stacked(weights[::-1], both.dtype, right=",
        "joined outputs swapped",
        LINEAR,
    ),
    Mutant(
        "pallas_kernels/logsumexp/xla.py",
        "b[1] * jnp.exp(b[0] - largest)",
        "b[1]",
        "a row's sum forgets to rescale",
        "tests/pallas_kernels/test_linear_cross_entropy.py",
    ),
    Mutant(
        "jaxlora/nn/decoder.py",
        "return None if layer.keys else shared.mlp_tile",
        "return shared.mlp_tile",
        "tiles drop the same elements",
        TILES,
    ),
]
