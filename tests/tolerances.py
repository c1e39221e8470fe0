"""Every tolerance, with its reason. None is widened in the commit that needs it."""

# Largest difference of fp32 logits (rms 1 to 9) from transformers: the sum of ~1e2 roundings of 6e-8, products in another order.
LOGITS_FP32 = 1e-4
# A parameter or a trick that moves no logit by this much is not tested by the parity tests.
SENSITIVITY = 1e-2
# Loss and gradients in fp32 against PEFT.
LOSS_FP32 = 1e-4
GRADIENT_COSINE = 0.99999
# The cosine does not see a wrong scale, so the norms are compared as well: sums of up to 1e3 roundings of 6e-8, after 5 Adam steps.
GRADIENT_NORM = 1e-4
# The same sum in another order, in fp32.
REORDERED_FP32 = 1e-6
# The same for one small leaf of a gradient: its sums cancel, so that roundings of 6e-8 are 20 times as large beside them.
LEAF_REORDERED_FP32 = 5e-6
# Packed rows against the same rows alone, fp32: blocks of keys are summed in another order.
PACKED_FP32 = 1e-5
# Pixels of resized frames in standard deviations: one level of 8 bits, 1 / 255 / 0.26, which pillow and torchvision round apart.
RESIZED_PIXELS = 0.016
# Relative error of a product rounded once to bf16 (2^-9, rms 0.0017).
ROUNDED_BF16 = 2e-3
# e4m3 has 3 bits of mantissa: rounding errors uniform in ±2^-4 of the lower binade's end, rms 2.6 % over normal weights in groups.
FLOAT8_ROUNDING = 0.026
# int4's error on normal weights, 0.0899, and that of rounding its products of code and scale: the root of the sum of squares.
FLOAT8_INT4_ERROR = 0.0937
# Both operands rounded to e4m3: 1.42 x 2.7 %, and what 7 rows of sums of 20 leave to chance.
E4M3_PRODUCT = 0.05
# A step's loss with the base's products in e4m3 against exact products, relative: what a user is promised over a run.
FLOAT8_LOSS = 0.01
