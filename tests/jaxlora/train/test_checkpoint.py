"""Checkpoints give back what was saved, under any grouping of layers, and are complete or absent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.select import layers_of
from jaxlora.train import checkpoint

TX = optax.adamw(1e-2)


def tree(*runs, seed=0):
    """Layers 0 to 3 in the given runs; a layer's values do not depend on the run that it is in."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((4, 2, 3)).astype(np.float32), rng.standard_normal((4, 3, 2)).astype(np.float32)
    layers = {
        run: {"q_proj": {"lora_A": jnp.asarray(a[at]), "lora_B": jnp.asarray(b[at])}} for run in runs for at in [np.array(layers_of(run))]
    }
    return {"model": {"layers": layers}, "lm_head": {"lora_A": jnp.asarray(a[0, 0])}}


def trained(*runs):
    """(trainable, opt_state) after a step whose gradient is the parameters."""
    params = tree(*runs)
    _, state = TX.update(params, TX.init(params), params)
    return params, state


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    trainable, opt_state = trained("0:4:1")
    folder = checkpoint.save(tmp_path, 7, trainable, opt_state, {"data": {"epoch": 1}})
    zeros = jax.tree.map(jnp.zeros_like, (trainable, opt_state))
    restored = checkpoint.restore(folder, *zeros)
    assert same(restored[0], trainable)
    assert same(restored[1], opt_state)
    assert checkpoint.read_record(folder) == {"data": {"epoch": 1}, "global_step": 7}


@pytest.mark.parametrize("runs", [("0:4:2", "1:4:2"), ("0:1:1", "1:4:1"), ("0:4:1",), ("0,1:4:3", "2:4:3")])
def test_layers_may_be_grouped_otherwise_when_it_is_read(tmp_path, runs):
    folder = checkpoint.save(tmp_path, 1, *trained("0:2:1", "2:4:1"), {})
    wanted, wanted_state = trained(*runs)
    trainable, opt_state = checkpoint.restore(folder, *jax.tree.map(jnp.zeros_like, (wanted, wanted_state)))
    assert same(trainable, wanted)
    assert same(opt_state, wanted_state)


def test_another_adapter_is_an_error_that_lists_what_differs(tmp_path):
    folder = checkpoint.save(tmp_path, 1, *trained("0:4:1"), {})
    other = tree("0:3:1")
    other["model"]["layers"]["0:3:1"]["k_proj"] = {"lora_A": jnp.zeros((3, 2, 3))}
    with pytest.raises(
        ValueError, match=r"(?s)layers\.0\.k_proj\.lora_A: not in the checkpoint.*layers\.3\.q_proj\.lora_A: only in the checkpoint"
    ):
        checkpoint.restore(folder, other, TX.init(other))


def test_another_rank_is_an_error_that_gives_both_shapes(tmp_path):
    folder = checkpoint.save(tmp_path, 1, *trained("0:4:1"), {})
    other = jax.tree.map(lambda a: jnp.zeros((*a.shape[:-1], a.shape[-1] + 1)), tree("0:4:1"))
    with pytest.raises(ValueError, match=r"shape \(4, 2, 3\), expected \(4, 2, 4\)"):
        checkpoint.restore(folder, other, TX.init(other))


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15):
        checkpoint.save(tmp_path, step, *trained("0:4:1"), {}, keep=2)
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["checkpoint-10", "checkpoint-15"]


def test_checkpoints_are_ordered_by_step_and_incomplete_ones_are_none(tmp_path):
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.RECORD).write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert [path.name for path in checkpoint.find_all(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_a_save_that_fails_leaves_nothing_and_the_older_one_whole(tmp_path):
    old = checkpoint.save(tmp_path, 1, *trained("0:4:1"), {})

    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 2, *trained("0:4:1"), {}, extra=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert same(checkpoint.restore(old, *jax.tree.map(jnp.zeros_like, trained("0:4:1")))[0], tree("0:4:1"))


def test_a_folder_without_a_record_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="it is no checkpoint to resume from"):
        checkpoint.read_record(tmp_path)


def test_extra_files_are_inside(tmp_path):
    folder = checkpoint.save(tmp_path, 1, *trained("0:4:1"), {}, extra=lambda folder: (folder / "adapter.txt").write_text("a"))
    assert (folder / "adapter.txt").read_text() == "a"
