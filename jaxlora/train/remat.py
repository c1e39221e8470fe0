"""What ``use_gradient_checkpointing`` means: which activations a block keeps for its backward."""

from typing import Any

import jax

from jaxlora.errors import nearest
from jaxlora.nn.decoder import Execution
from jaxlora.nn.offload import ATTENTION
from jaxlora.nn.scan import Scan

# Tokens: products of this many rows are as fast as any, and weights are decoded anew for each tile.
MLP_TILE = 8192
# Where memory is no concern: half as many products with the head, of twice the rows, for 0.4 GB of logits at 8B.
LOSS_CHUNK = 1024
CHOICES = (False, True, "unsloth", "attention", "dots", "auto")


def execution(use_gradient_checkpointing: bool | str, *, unroll: int | None = None, **other: Any) -> Execution:
    """Returns how to run a forward pass that will be differentiated.

    False keeps everything; True keeps each block's input and recomputes the rest; "unsloth" does that with the inputs in pinned host
    memory, from where each is fetched while another block runs. With them waits all that attention needs, where it can move behind products
    and has room (`jaxlora.nn.host.room_bytes`); else, of rows of 8,192 tokens and more, attention's output. "attention" keeps all that
    attention needs on the device and recomputes the MLP. "dots" keeps matrix products too and recomputes only elementwise work; there,
    unless ``unroll`` says otherwise, layers that are all alike are each compiled by themselves, because a loop would copy all that is kept.
    The R columns A·x of each adapter are kept by all of these, by True where all layers are alike: they are small, and recomputing them
    reads x again. So are a norm's statistics, which "attention" and "dots" keep where a kernel made the norm, and an e4m3 MLP's scales of
    its rows. Where MLPs are recomputed, the decoder's take at most 8,192 tokens at a time: more would need more memory and be no faster.

    >>> execution(True).scan.checkpoint, execution(False).scan.checkpoint
    (True, False)

    Raises:
      ValueError: another value; or "auto", which ``train.auto.choose`` turns into one of the others first.
    """
    saved = jax.checkpoint_policies.save_only_these_names
    periods = 1 if unroll is None else unroll
    match use_gradient_checkpointing:
        case False:
            return Execution(scan=Scan(unroll=periods), **other)
        case True:
            return Execution(scan=Scan(checkpoint=True, columns=True, unroll=periods), **{"mlp_tile": MLP_TILE, **other})
        case "unsloth":
            return Execution(scan=Scan(checkpoint=True, offload=True, unroll=periods), **{"mlp_tile": MLP_TILE, **other})
        case "attention":
            kept = saved(*ATTENTION.names)
            return Execution(scan=Scan(checkpoint=True, remat=kept, unroll=periods), **{"mlp_tile": MLP_TILE, **other})
        case "dots":
            kept = saved("dot", "attn_out", "attn_lse", "lora_u", "qkv", "residual")
            return Execution(scan=Scan(checkpoint=True, remat=kept, unroll=unroll), **{"loss_chunk": LOSS_CHUNK, **other})
        case "auto":
            raise ValueError('"auto" is no policy: train.auto.choose compiles the policies and takes one; SFTTrainer does so itself')
    hint = nearest(str(use_gradient_checkpointing), ["unsloth", "attention", "dots", "auto"])
    raise ValueError(f"use_gradient_checkpointing must be one of {CHOICES}, got {use_gradient_checkpointing!r}{hint}")
