"""The trainer around the loop: who holds the parameters when, what ends a run, what callbacks see and change."""

import jax
import numpy as np
import optax
import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from jaxlora import FastLanguageModel, SFTConfig, SFTTrainer
from jaxlora.train.out_of_memory import OutOfMemoryError
from tests.jaxlora.api.conftest import text_row

IDS = np.array([[5, 6, 7]])


@pytest.fixture(scope="module")
def adapted(llama_folder):
    model, tokenizer = FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=False), tokenizer


@pytest.fixture
def make(adapted, tmp_path):
    """Makes trainers of the same model; the next test finds it untrained."""
    start = jax.tree.map(np.array, adapted[0].trainable)

    def trainer(rows=4, eval_rows=2, **arguments):
        model, tokenizer = adapted
        options = {name: arguments.pop(name) for name in ("callbacks", "optimizers") if name in arguments}
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 4, "learning_rate": 1e-2}
        config = SFTConfig(**{**sizes, "save_strategy": "no", "output_dir": str(tmp_path / "out"), **arguments})
        made = [text_row(0)] * rows, [text_row(9)] * eval_rows
        return SFTTrainer(model, config, *made, tokenizer=tokenizer, **options)

    yield trainer
    adapted[0].give_back(jax.tree.map(jax.numpy.asarray, start))


def spy(monkeypatch, thing, name, call):
    """Calls ``call`` before each call of a method."""
    method = getattr(thing, name)

    def spied(*args, **kwargs):
        call()
        return method(*args, **kwargs)

    monkeypatch.setattr(thing, name, spied)


class TestWhoHoldsTheParameters:
    def test_a_use_while_steps_run_is_refused_and_afterwards_they_are_back(self, make, monkeypatch):
        trainer = make()
        spy(monkeypatch, trainer.train_source, "inputs", lambda: trainer.model(input_ids=IDS))
        with pytest.raises(RuntimeError, match="with a running trainer; they come back at its next save"):
            trainer.train()
        assert trainer.model(input_ids=IDS).logits.shape == (1, 3, 400)

    def test_an_evaluation_and_a_save_have_them_back_at_that_step(self, make, monkeypatch):
        trainer, seen = make(save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=2), []
        spy(monkeypatch, trainer.eval_source, "inputs", lambda: seen.append(trainer.model(input_ids=IDS).logits))
        spy(monkeypatch, trainer.processing_class, "save_pretrained", lambda: seen.append(trainer.model(input_ids=IDS).logits))
        trainer.train()
        seen.append(trainer.model(input_ids=IDS).logits)
        evaluated_2, saved_3, evaluated_4, saved_4, end = seen
        assert all(not np.array_equal(a, b) for a, b in ((evaluated_2, saved_3), (saved_3, evaluated_4)))
        assert np.array_equal(evaluated_4, end) and np.array_equal(saved_4, end)


class Recorder(TrainerCallback):
    """What happened, in order: (event, step)."""

    def __init__(self):
        self.events, self.logs = [], []

    def note(self, event, state):
        self.events.append((event, state.global_step))

    def on_train_begin(self, args, state, control, **_):
        self.note("begin", state)

    def on_epoch_begin(self, args, state, control, **_):
        self.note("epoch", state)

    def on_step_end(self, args, state, control, **_):
        self.note("step", state)

    def on_log(self, args, state, control, logs, **_):
        self.note("log", state)
        self.logs.append(logs)

    def on_evaluate(self, args, state, control, metrics, model, **_):
        self.note("evaluate", state)
        assert model.generate(input_ids=IDS, max_new_tokens=1).shape == (1, 4)
        assert set(metrics) == {"eval_loss"}

    def on_save(self, args, state, control, **_):
        self.note("save", state)

    def on_epoch_end(self, args, state, control, **_):
        self.note("epoch end", state)

    def on_train_end(self, args, state, control, **_):
        self.note("end", state)


class TestCallbacks:
    def test_events_come_in_transformers_order_and_the_model_may_be_used_in_them(self, make):
        recorder = Recorder()
        strategies = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
        trainer = make(rows=3, callbacks=[recorder], max_steps=4, **strategies)
        trainer.train()
        assert recorder.events == [
            *[("begin", 0), ("epoch", 0), ("step", 1)],
            *[("step", 2), ("log", 2), ("log", 2), ("evaluate", 2), ("save", 2), ("step", 3), ("epoch end", 3)],
            *[("epoch", 3), ("step", 4), ("log", 4), ("log", 4), ("evaluate", 4), ("save", 4), ("epoch end", 4), ("end", 4)],
        ]
        assert recorder.logs == trainer.state.log_history
        assert (trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch) == (4, 4, pytest.approx(4 / 3))

    def test_callbacks_change_no_bit(self, make):
        losses = []
        for callbacks in ([], [Recorder()]):
            trainer = make(callbacks=callbacks)
            start = jax.tree.map(np.array, trainer.model.trainable)
            trainer.train()
            losses.append([entry["loss"] for entry in trainer.state.log_history])
            trainer.model.give_back(jax.tree.map(jax.numpy.asarray, start))
        assert losses[0] == losses[1]

    def test_what_they_ask_for_is_done(self, make, tmp_path):
        class Asks(Recorder):
            def on_step_end(self, args, state, control, **_):
                control.should_log = control.should_save = control.should_evaluate = state.global_step == 2
                control.should_training_stop = state.global_step == 3
                return control

        asks = Asks()
        result = make(callbacks=[asks], logging_steps=100).train()
        assert [event for event in asks.events if event[1]] == [
            *[("log", 2), ("log", 2), ("evaluate", 2), ("save", 2), ("epoch end", 3), ("end", 3)]
        ]
        assert result.global_step == 3
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]

    def test_a_stopped_run_is_saved_where_others_are(self, make, tmp_path):
        class Stops(TrainerCallback):
            def on_log(self, args, state, control, **_):
                control.should_training_stop = state.global_step == 2

        make(callbacks=[Stops()], save_strategy="steps", save_steps=50).train()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]

    def test_early_stopping_stops_when_the_evaluation_gets_no_better(self, make):
        stopping = EarlyStoppingCallback(early_stopping_patience=2)
        # A loss that falls, where more is better: every evaluation is worse than the first.
        options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
        trainer = make(callbacks=[stopping], max_steps=8, **options)
        trainer.train()
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        best = int(np.argmax(evaluated))
        assert trainer.state.best_metric == evaluated[best] and trainer.state.best_global_step == best + 1
        assert trainer.state.global_step == best + 3 < 8

    def test_ending_an_epoch_is_refused(self, make):
        class Ends(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_epoch_stop = True

        with pytest.raises(NotImplementedError, match="should_training_stop ends the run"):
            make(callbacks=[Ends]).train()

    def test_events_that_never_happen_are_told(self, make, caplog):
        class Waits(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **_):
                raise AssertionError

        make(callbacks=[Waits()]).train()
        assert "Waits: on_optimizer_step never happen in jaxlora" in caplog.text

    def test_what_is_no_callback_is_an_error(self, make):
        with pytest.raises(TypeError, match="a callback is a transformers.TrainerCallback, got str"):
            make(callbacks=["wandb"])


class TestOptimizers:
    def test_a_given_transformation_takes_the_place_of_adamw(self, make):
        trainer = make(optimizers=(optax.sgd(0.0), None), max_steps=2)
        before = jax.tree.map(np.array, trainer.model.trainable)
        trainer.train()
        assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(trainer.model.trainable)))
        assert "learning_rate" not in trainer.state.log_history[0]

    def test_its_schedule_is_logged(self, make):
        rate = optax.linear_schedule(0.5, 0.0, 2)
        trainer = make(optimizers=(optax.sgd(rate), rate), max_steps=2)
        trainer.train()
        assert [entry["learning_rate"] for entry in trainer.state.log_history] == [0.5, 0.25]

    def test_its_schedule_is_read_without_waiting_for_the_device_that_trains(self, make):
        where = []

        def rate(step):
            where.append(jax.config.jax_default_device)
            return 0.5

        make(optimizers=(optax.sgd(0.5), rate), max_steps=2).train()
        assert {device.platform for device in where} == {"cpu"}

    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            ({"optimizers": ("adam", None)}, TypeError, "optimizers=.an optax.GradientTransformation, …., got str"),
            ({"optimizers": (None, optax.constant_schedule(1.0))}, TypeError, "build the optax transformation with it"),
            ({"optimizers": (optax.sgd(1.0), None), "embedding_learning_rate": 1e-5}, ValueError, "use optax.partition"),
            ({"load_best_model_at_end": True}, NotImplementedError, "trainer.state.best_global_step says which"),
        ],
    )
    def test_what_it_cannot_be_is_an_error(self, make, arguments, kind, message):
        with pytest.raises(kind, match=message):
            make(**arguments)


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics", "peft_config", "model_init"])
def test_what_another_way_serves_is_refused_with_that_way(adapted, name):
    with pytest.raises(
        NotImplementedError, match=f"SFTTrainer does not take {name}: (an evaluation keeps no logits|call get_peft|pass the)"
    ):
        SFTTrainer(adapted[0], train_dataset=[text_row(0)], tokenizer=adapted[1], **{name: lambda: None})


def test_absent_is_no_request(adapted):
    SFTTrainer(adapted[0], train_dataset=[text_row(0)], tokenizer=adapted[1], compute_metrics=None, callbacks=None, optimizers=(None, None))


def test_what_is_printed_into_a_pipe_has_no_blank_line_and_no_bar(make, llama_folder, tmp_path, capfd):
    FastLanguageModel.from_pretrained(str(llama_folder), load_in_4bit=False)
    trainer = make(max_steps=2)
    trainer.train()
    trainer.model.save_pretrained_merged(tmp_path / "merged", trainer.processing_class)
    lines = capfd.readouterr().out.splitlines()
    assert all(line.strip() for line in lines)
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 1/2", "step 2/2"]
    assert not any("━" in line for line in lines)


def test_a_step_that_does_not_fit_says_what_to_change_and_loses_nothing(make, monkeypatch):
    trainer = make()
    before = jax.tree.map(np.asarray, dict(trainer.model.trainable))

    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 26843545600 bytes.")

    monkeypatch.setattr("jaxlora.api.trainer.make_step", lambda *_, **__: too_large)
    told = r"^micro-batches of up to 1 x \d+ tokens under use_gradient_checkpointing=False do not fit .* 25\.0 GiB more"
    with pytest.raises(OutOfMemoryError, match=told):
        trainer.train()
    jax.tree.map(np.testing.assert_array_equal, dict(trainer.model.trainable), before)


class TestAutomaticCheckpointing:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_takes_what_fits_says_so_and_trains(self, make, capsys, monkeypatch):
        trainer = make()
        monkeypatch.setattr(trainer.model, "use_gradient_checkpointing", "auto")
        assert trainer.train().global_step == 4
        assert "'dots'" in capsys.readouterr().out.split('"auto" with')[1]

    def test_says_what_each_policy_needs_where_none_fits(self, make, monkeypatch):
        trainer = make(max_memory_gib=1e-4)
        monkeypatch.setattr(trainer.model, "use_gradient_checkpointing", "auto")
        with pytest.raises(ValueError, match="no gradient checkpointing fits into 0.0 GiB: 'dots' needs"):
            trainer.train()
