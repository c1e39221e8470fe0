"""The loop: what it logs, when it saves, what stops it."""

import itertools
import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.nn.decoder import Execution
from jaxlora.train import loop
from jaxlora.train.step import make_step
from tests.jaxlora.train import toy

GRAPHDEF, TRAINABLE, FROZEN = toy.parts()
TX = optax.adam(1e-2)
STEP = make_step(GRAPHDEF, TX, Execution())


def fresh():
    trainable = toy.copied(TRAINABLE)
    return loop.LoopState(trainable=trainable, opt_state=TX.init(trainable))


class Recorder:
    def __init__(self, evaluate=None):
        self.saved = []
        self.evaluate = evaluate

    def save(self, state):
        self.saved.append((state.step, toy.copied(state.trainable)))
        return f"checkpoint-{state.step}"

    def callbacks(self):
        return loop.Callbacks(rate=lambda step: 10.0 + step, epoch=lambda step: step / 4, save=self.save, evaluate=self.evaluate)


def run(state, *, step=STEP, frozen=FROZEN, batches=None, recorder=None, **config):
    recorder = recorder or Recorder()
    loop.run(step, state, frozen, batches or toy.batches(), loop.LoopConfig(progress=False, **config), recorder.callbacks())
    return recorder


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_every_logged_step_has_the_mean_loss_since_the_last_one():
    state = fresh()
    run(state, total_steps=5, logging_steps=2)
    assert [entry["step"] for entry in state.log_history] == [2, 4, 5]
    means = [np.mean(state.losses[:2]), np.mean(state.losses[2:4]), state.losses[4]]
    np.testing.assert_allclose([entry["loss"] for entry in state.log_history], means)


def test_a_log_entry_tells_the_rate_of_its_own_step_and_counts_labels():
    state = fresh()
    run(state, total_steps=2)
    last = state.log_history[-1]
    assert (last["learning_rate"], last["epoch"], last["tokens"]) == (11.0, 0.5, 14)
    assert last["grad_norm"] > 0


def test_tokens_per_second_hold_where_dispatching_blocks_until_the_step_ends():
    def step(*args):
        results = jax.block_until_ready(STEP(*args))
        time.sleep(0.1)
        return results

    state, batches = fresh(), list(itertools.islice(toy.batches(), 5))
    run(state, step=step, batches=iter(batches), total_steps=5)
    tokens = sum(int(batch.segment_lengths.sum()) for batch in batches[1:])
    # Four steps of 0.1 s and what the machine adds; counting by the loop's own clock would find three.
    assert state.log_history[-1]["tokens_per_s"] <= tokens / 0.4


def test_saves_and_evaluates_when_due():
    seen = []

    def evaluate(state):
        seen.append(state.step)
        return {"eval_loss": 0.5}

    state = fresh()
    recorder = run(state, total_steps=6, save_steps=3, eval_steps=2, recorder=Recorder(evaluate))
    assert [step for step, _ in recorder.saved] == [3, 6]
    assert seen == [2, 4, 6]
    assert [e for e in state.log_history if "eval_loss" in e][0] == {"eval_loss": 0.5, "step": 2, "epoch": 0.5}


def test_the_last_step_is_saved_and_evaluated_whatever_its_number():
    seen = []
    recorder = run(fresh(), total_steps=5, save_steps=3, eval_steps=4, recorder=Recorder(lambda state: seen.append(state.step) or {}))
    assert [step for step, _ in recorder.saved] == [3, 5]
    assert seen == [4, 5]


def test_no_strategy_saves_nothing_at_the_end_either():
    assert not run(fresh(), total_steps=2).saved


def test_the_losses_of_a_save_are_complete():
    state, counts = fresh(), []
    recorder = Recorder()
    recorder.save = lambda state: counts.append(len(state.losses))
    run(state, total_steps=4, save_steps=2, recorder=recorder)
    assert counts == [2, 4]


def test_stopping_and_going_on_gives_the_same_bits():
    straight, stopped = fresh(), fresh()
    run(straight, total_steps=6)
    batches = toy.batches()
    run(stopped, total_steps=2, batches=batches)
    run(stopped, total_steps=6, batches=batches)
    assert straight.losses == stopped.losses
    assert same(straight.trainable, stopped.trainable)
    assert same(straight.opt_state, stopped.opt_state)


def test_every_step_is_told_its_number_also_after_a_stop():
    state, numbers = fresh(), []

    def step(*args):
        numbers.append(int(args[-1]))
        return STEP(*args)

    for stop in (2, 5):
        run(state, step=step, total_steps=stop)
    assert numbers == [0, 1, 2, 3, 4]


def test_a_batch_without_labels_is_an_error_that_names_the_step():
    with pytest.raises(ValueError, match="step 1 has no labelled token"):
        run(fresh(), total_steps=3, batches=toy.batches(labelled=False))


class TestNonFinite:
    def test_a_step_changes_nothing(self):
        state = fresh()
        trainable, opt_state, metrics = STEP(
            toy.copied(state.trainable), toy.copied(state.opt_state), toy.with_table(FROZEN, jnp.inf), next(toy.batches()), jnp.int32(0)
        )
        assert not metrics["finite"]
        assert same(trainable, state.trainable)
        assert same(opt_state, state.opt_state)

    def test_patience_in_a_row_stops_and_nothing_is_saved(self):
        state, recorder = fresh(), Recorder()
        with pytest.raises(loop.NonFiniteError, match=r"3 steps in a row were not finite, the last is 3 \(loss nan\).*lm_head\.lora_[AB]"):
            run(state, frozen=toy.with_table(FROZEN, jnp.nan), total_steps=9, save_steps=3, patience=3, recorder=recorder)
        assert not recorder.saved
        assert same(state.trainable, TRAINABLE)

    def test_fewer_in_a_row_go_on_and_are_logged_as_they_are(self, caplog):
        state, calls = fresh(), itertools.count()

        def step(trainable, opt_state, frozen, batch, index):
            bad = next(calls) in (1, 2, 4)
            return STEP(trainable, opt_state, toy.with_table(frozen, jnp.inf) if bad else frozen, batch, index)

        run(state, step=step, total_steps=6, patience=3)
        assert [math.isfinite(loss) for loss in state.losses] == [True, False, False, True, False, True]
        assert not math.isfinite(state.log_history[1]["loss"])
        assert "step 3 is not finite" in caplog.text
        assert math.isfinite(loop.mean_loss(state.losses))
        # The rates of an optimizer that saw three of the six steps.
        assert [entry["learning_rate"] for entry in state.log_history] == [10, 11, 11, 11, 12, 12]
        assert state.skipped == 3 and int(optax.tree_utils.tree_get(state.opt_state, "count")) == 3


def test_the_mean_loss_of_no_finite_step_is_nan():
    assert math.isnan(loop.mean_loss([math.nan]))


VISION = "model.visual.blocks.0:2:1.attn.qkv.lora_B"
LANGUAGE = "model.language_model.layers.0:2:1.self_attn.q_proj.lora_B"


class TestGradientCheck:
    def test_a_blocked_vision_tower_is_an_error_that_names_it(self):
        with pytest.raises(
            ValueError, match=r"2 adapters got a gradient of exactly zero.*model\.visual\.blocks\.0\.attn\.qkv\.lora_B \(vision\)"
        ):
            loop.check_gradients({VISION: np.zeros(2), LANGUAGE: np.ones(2)}, saw_images=True)

    def test_one_dead_layer_of_a_stack_is_found(self):
        with pytest.raises(ValueError, match=r"1 adapters.*layers\.1\.self_attn"):
            loop.check_gradients({LANGUAGE: np.array([1.0, 0.0])}, saw_images=False)

    def test_vision_adapters_are_excused_without_images(self):
        loop.check_gradients({VISION: np.zeros(2), LANGUAGE: np.ones(2)}, saw_images=False)

    def test_layers_that_nothing_uses_are_excused(self):
        norms = {VISION: np.array([1.0, 0.0]), LANGUAGE: np.ones(2)}
        loop.check_gradients(norms, saw_images=True, unused=lambda path: ".blocks.1." in path)
        with pytest.raises(ValueError, match=r"1 adapters.*blocks\.1"):
            loop.check_gradients(norms, saw_images=True, unused=lambda path: ".blocks.0." in path)

    def test_a_is_zero_at_first_and_is_not_asked_for(self):
        loop.check_gradients({LANGUAGE.replace("lora_B", "lora_A"): np.zeros(2), LANGUAGE: np.ones(2)}, saw_images=False)

    def test_the_loop_asks_at_its_first_step(self):
        def step(*args):
            trainable, opt_state, metrics = STEP(*args)
            return trainable, opt_state, {**metrics, "norms": jax.tree.map(jnp.zeros_like, metrics["norms"])}

        with pytest.raises(ValueError, match="they would never learn"):
            run(fresh(), step=step, total_steps=3)


def signalling(signum, at, times=1):
    for i, batch in enumerate(toy.batches()):
        if i == at:
            for _ in range(times):
                os.kill(os.getpid(), signum)
        yield batch


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
class TestSignals:
    def test_save_the_step_in_hand_and_stop(self, signum):
        state, recorder = fresh(), Recorder()
        with pytest.raises(
            loop.Interrupted, match=f"stopped by {signum.name} after step 3; its checkpoint is complete: checkpoint-3"
        ) as stopped:
            run(state, total_steps=9, batches=signalling(signum, 2), recorder=recorder)
        assert stopped.value.signum == signum
        assert [step for step, _ in recorder.saved] == [3]
        assert same(recorder.saved[0][1], state.trainable)
        assert len(state.losses) == 3

    def test_handlers_are_put_back(self, signum):
        before = signal.getsignal(signum)
        with pytest.raises(loop.Interrupted):
            run(fresh(), total_steps=9, batches=signalling(signum, 1))
        assert signal.getsignal(signum) is before

    def test_a_second_one_aborts_at_once(self, signum):
        recorder = Recorder()
        with pytest.raises(KeyboardInterrupt):
            run(fresh(), total_steps=9, batches=signalling(signum, 1, times=2), recorder=recorder)
        assert not recorder.saved
