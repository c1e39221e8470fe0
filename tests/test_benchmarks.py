import doctest
import importlib
import importlib.util
import json
import math
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import absent_gpu, gate, jobs, kernel_sizes, kernels, longest, plot, results, train_step, tune, versus, workload
from benchmarks.geometries import GEOMETRIES, text_layers, with_layers
from benchmarks.rivals import measure, torch_train, torch_vlm_train
from jaxlora.models import registry
from pallas_kernels import KERNELS, _tuned, mosaic_code

MODULES = ("absent_gpu", "gate", "instructions", "kernel_times", "kernels", "longest", "results", "versus", "workload")
HOST_ONLY = ("gate", "geometries", "jobs", "results", "rivals.measure", "rivals.torch_decode", "rivals.torch_train", "versus", "workload")
SIGHTED = [name for name in GEOMETRIES if "vision_config" in GEOMETRIES[name]]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{module}")).failed == 0


def test_traffic_is_what_the_kernels_of_a_body_with_products_read_and_write_in_a_layer():
    hlo = """HloModule step

%body (p: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %weights = bf16[32,8,8]{2,1,0} parameter(1)
  %copy.1 = bf16[4,8]{1,0} copy(%x)
  %fetch = ((bf16[32,8,8]{2,1,0}), bf16[8,8]{1,0}) copy-start(%weights)
  ROOT %product = (bf16[4,8]{1,0}, s8[99]{0}) custom-call(%copy.1, %weights), custom_call_target="__cublas$lt$matmul"
}

%condition (p: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  ROOT %less = pred[] fusion(%i), kind=kLoop
}
"""
    found = absent_gpu.traffic(hlo, layers=32)
    assert {name: [(round(1e6 * moved), kind) for moved, kind, _ in rows] for name, rows in found.items()} == {
        "body": [(64 + 64 + 128, "__cublas$lt$matmul"), (64 + 64, "copy")]
    }


def test_what_starts_the_rivals_imports_neither_jax_nor_torch():
    code = f"import sys, {', '.join(f'benchmarks.{m}' for m in HOST_ONLY)}; sys.exit(bool({{'jax', 'torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=results.FOLDER.parent.parent).returncode == 0


@pytest.mark.parametrize(("script", "model"), [(torch_train, "llama-3.1-8b"), (torch_vlm_train, "qwen2-vl-7b")])
def test_a_rival_is_fed_the_ids_labels_and_pixels_of_our_step(script, model, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRIES[model]))
    monkeypatch.setattr(sys, "argv", ["script", "--stack", "hf", "--checkpoint", str(tmp_path), "--rows", "1"])
    fed = []
    monkeypatch.setattr(measure, "train", lambda load, inputs, args: fed.append((inputs, args.sequence)))
    script.main()
    (theirs, sequence), config = fed[0], GEOMETRIES[model]
    ours = train_step.batch_of(config, registry.get(config["model_type"]).values(config), 1, sequence)
    assert np.array_equal(ours.input_ids[0], theirs["input_ids"])
    assert np.array_equal(ours.labels[0, :, :-1], theirs["labels"][:, 1:])
    if ours.patches is not None:
        assert np.array_equal(ours.patches[0, 0], theirs["pixel_values"])


@pytest.mark.parametrize("model", GEOMETRIES)
def test_every_geometry_reads_and_its_batch_fits(model):
    config = GEOMETRIES[model]
    spec = registry.get(config["model_type"])
    read = spec.read(config)
    assert (read.text if model in SIGHTED else read).num_hidden_layers == text_layers(config)
    batch = train_step.batch_of(config, spec.values(config), 1, 2048)
    labelled = int((batch.labels >= 0).sum())
    prefix = 0 if model not in SIGHTED else workload.PREFIX + len(workload.make_image(config, 1).tokens)
    assert labelled == 2048 - max(prefix, 1)
    assert np.isin(np.asarray(batch.input_ids)[0, 0, prefix:], range(*workload.TEXT_IDS)).all()


# One stands for all: the others take 2 to 5 s each.
def test_a_geometry_of_two_layers_lowers_without_weights():
    args = train_step.parser().parse_args(["pixtral-12b", "--rows", "1", "--remat", "dots"])
    lowered, trace_s, _ = train_step.lower_abstract(with_layers(GEOMETRIES["pixtral-12b"], 2), args)
    assert trace_s > 0 and "stablehlo.while" in lowered.as_text()
    assert all(isinstance(leaf, jax.stages.ArgInfo) for leaf in jax.tree.leaves(lowered.args_info))


@pytest.mark.parametrize("name", jobs.JOBS)
def test_the_commands_of_a_job_are_understood_by_the_scripts_that_get_them(name, monkeypatch):
    job = jobs.JOBS[name]
    script, *ours = versus.ours_command(job, "cache", "--steps 2")
    assert script == "benchmarks.train_step" and train_step.parser().parse_args(ours).steps == 2
    for rival in job.rivals.values():
        script, *arguments = versus.rival_command(job, rival, pathlib.Path("checkpoints"))
        if script == versus.OURS:
            parsed = train_step.parser().parse_args(arguments)
        else:
            assert importlib.util.find_spec(script)
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            parsed = measure.parse("", rows=0, sequence=0, steps=0, bits=4, rank=0)
            assert parsed.bits == (16 if "bf16" in job.ours else 4)
        assert (parsed.rows, parsed.sequence, parsed.rank) == (job.rows, job.sequence, job.rank)


def ran(step, peak, **other):
    work = {"model": "llama-3.1-8b", "rows": 4, "sequence": 2048, "rank": 16, "remat": "dots", "weights": "int4"}
    return {**work, "step_s": step, "tok_s": round(8192 / step), "peak_gb": peak, "first_step_s": 1.0, **other}


@pytest.mark.parametrize(("peak", "theirs", "ratio", "met"), [(33.0, 0.5, 1.25, True), (40.0, 0.5, 1.25, False), (33.0, 0.42, 1.05, False)])
def test_a_job_is_met_by_the_ratio_of_medians_within_the_memory(peak, theirs, ratio, met):
    row = versus.compare(jobs.JOBS["8b"], "unsloth", [ran(0.39, 32.0), ran(0.41, peak)], ran(theirs, 38.8))
    assert (row["ratio"], row["met"], row["peak_gb"]) == (ratio, met, peak)


def test_runs_of_different_work_have_no_ratio():
    with pytest.raises(ValueError, match="different work"):
        versus.same_work(jobs.JOBS["8b"], ran(0.4, 33.0, rows=1))


def versus_8b(tmp_path, monkeypatch, execute, *more):
    """Has `versus` run the job, with ``more`` arguments, and ``execute(who, path)`` in place of processes; its exit status."""
    (tmp_path / "checkpoints" / "llama-3.1-8b").mkdir(parents=True)
    (tmp_path / "checkpoints" / "llama-3.1-8b" / "config.json").touch()

    def instead(command, *, path=""):
        return execute(command[command.index("--stack") + 1] if "--stack" in command else "ours", path)

    monkeypatch.setattr(versus, "execute", instead)
    arguments = [
        "versus",
        "8b",
        *more,
        "--checkpoints",
        str(tmp_path / "checkpoints"),
        "--rival-path",
        "/wheels",
        "--csv",
        str(tmp_path / "csv"),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--rivals", "unsloth", "hf", "--commit", "abc"])
    return versus.main()


def a_run(who):
    return ran(0.4 if who == "ours" else 0.5, 33.0, device="a card", date="2026-11-24", commit="", jax="0")


def test_versus_runs_in_turn_records_every_row_and_goes_on_when_a_rival_fails(tmp_path, monkeypatch, capsys):
    order = []

    def execute(who, path):
        order.append((who, path))
        if who == "hf":
            raise RuntimeError("out of memory")
        return a_run(who)

    assert versus_8b(tmp_path, monkeypatch, execute) == 1
    assert order == [("ours", ""), ("unsloth", "/wheels"), ("ours", ""), ("hf", "/wheels")]
    said = capsys.readouterr().out
    assert "ratio 1.250; must 1.12: met" in said and "out of memory" in said and "no ratio to hf" in said
    assert [row["commit"] for row in results.read(tmp_path / "csv" / "train_step.csv")] == ["abc", "abc"]
    assert [row["ratio"] for row in results.read(tmp_path / "csv" / "versus.csv")] == ["1.25"]


def test_versus_runs_once_what_jobs_share(tmp_path, monkeypatch):
    order = []

    def execute(who, path):
        order.append(who)
        return a_run(who)

    monkeypatch.setitem(jobs.JOBS, "8b-again", jobs.JOBS["8b"])
    versus_8b(tmp_path, monkeypatch, execute, "8b-again", "--once")
    assert order == ["ours", "unsloth", "hf", "ours"]
    rows = results.read(tmp_path / "csv" / "versus.csv")
    assert [(row["job"], row["rival"]) for row in rows] == [(job, rival) for job in ("8b", "8b-again") for rival in ("unsloth", "hf")]


def test_versus_that_is_stopped_tells_the_pairs_that_are_complete(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def execute(who, path):
        if who == "hf":
            signal.raise_signal(signal.SIGTERM)
        return a_run(who)

    try:
        with pytest.raises(SystemExit, match="stopped"):
            versus_8b(tmp_path, monkeypatch, execute)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "ratio 1.250" in capsys.readouterr().out
    assert [row["rival"] for row in results.read(tmp_path / "csv" / "versus.csv")] == ["unsloth"]


def report(folder, **counts):
    path = folder / "report.xml"
    attributes = " ".join(f'{key}="{value}"' for key, value in {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, **counts}.items())
    path.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    return path


@pytest.mark.parametrize(
    ("status", "counts", "reason"),
    [
        (0, {"tests": 3}, None),
        (1, {"tests": 3, "failures": 1}, "1 of 3 GPU tests failed"),
        (1, {"tests": 3, "errors": 1}, "1 of 3 GPU tests failed"),
        (0, {"tests": 3, "skipped": 3}, "3 of 3 GPU tests were skipped"),
        (5, {}, "no GPU test ran"),
        (2, {"tests": 3}, "pytest ended with 2"),
    ],
)
def test_the_gate_opens_only_on_a_green_run_that_ran(status, counts, reason, tmp_path):
    _, found = gate.verdict(status, report(tmp_path, **counts))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("reason", "commands"), [(None, 2), ("no GPU test ran", 0)])
def test_a_shut_gate_starts_no_benchmark(reason, commands, monkeypatch):
    started = []
    monkeypatch.setattr(gate, "shut", lambda paths: reason)
    monkeypatch.setattr(gate.subprocess, "run", lambda command, **_: started.append(command) or subprocess.CompletedProcess(command, 0))
    assert gate.main(["--", "-m", "a", "--", "b.py"]) == (0 if reason is None else 1)
    assert len(started) == commands


def test_an_appended_row_keeps_old_rows_and_adds_its_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("model,loss\r\nold,1.5\r\n")
    results.append(path, {"model": "new", "losses": [2.0, 1.0]})
    assert results.read(path) == [{"model": "old", "loss": "1.5", "losses": ""}, {"model": "new", "loss": "", "losses": "2.0 1.0"}]


@pytest.mark.parametrize("file", sorted(results.FOLDER.glob("*.csv")), ids=lambda file: file.name)
def test_a_recorded_figure_says_where_and_when(file):
    rows = results.read(file)
    assert rows and all(row["device"] and row["date"] and None not in row for row in rows)


def test_a_result_line_is_found_among_other_output_and_its_lack_is_told():
    assert results.parse_result('x\nRESULT {"a": 1}\nRESULT {"a": 2}\nbye') == {"a": 2}
    with pytest.raises(ValueError, match="CUDA out of memory"):
        results.parse_result("CUDA out of memory")


@pytest.mark.parametrize("limit", [8.0, 24.0, 80.0])
def test_the_longest_sequence_is_found_to_the_unit_when_memory_bends(limit):
    def needed(length):
        return 6 + length / 4096 + max(0, length - 50_000) / 9000

    length, gb = longest.longest(needed, limit, tries=12)
    assert gb == needed(length) <= limit < needed(length + longest.UNIT)


def test_the_plot_takes_the_newest_row_of_each_setting():
    same = {"model": "llama-3.1-8b", "rows": "4", "sequence": "2048", "rank": "16", "device": "a card"}
    ours = [{**same, "weights": "int4", "remat": "dots", "peak_gb": "33", "tok_s": t, "date": d} for t, d in (("1", "a"), ("2", "b"))]
    other, narrow = {**ours[0], "weights": "nf4"}, {**ours[0], "compute": "float8", "tok_s": "4"}
    rival = {**same, "task": "train", "system": "unsloth", "gc": "off", "bits": "4", "peak_gb": "38.8", "tok_s": "3", "date": "a"}
    found = plot.points(plot.PANELS[0], [*ours, other, narrow], [rival])
    assert [(p.system, p.label, p.tok_s) for p in found] == [
        ("jaxlora", '"dots"', 2.0),
        ("jaxlora, float8", '"dots"', 4.0),
        ("unsloth", "no checkpointing", 3.0),
    ]
    assert "measured in different runs" in plot.caption(found)


def test_every_timed_size_belongs_to_a_kernel():
    assert not set(kernel_sizes.SIZES) - set(KERNELS)


def test_the_tuner_keeps_the_fastest_that_is_right_for_what_kernels_read(tmp_path, monkeypatch, capsys):
    right = {64: 3.0, 128: "relative error 1.0e+00", 192: 2.0, 256: "ValueError: exceeds shared memory"}
    monkeypatch.setattr(tune, "SIZES", {"int4_matmul": {"small": kernel_sizes._product(8, (128, 64), 4)}})
    monkeypatch.setattr(tune, "timed", lambda kernel, backend, case, inputs, config: right[config.block_m])
    monkeypatch.setattr(tune, "median_s", lambda *_, **__: 2.5e-3)
    monkeypatch.setattr(sys, "argv", ["tune", "--kernel", "int4_matmul", "--backend", "mosaic", "--out", str(tmp_path)])
    tune.main()
    (file,) = tmp_path.glob("*.json")
    table = json.loads(file.read_text())["int4_matmul"]
    assert table["fastest"] == "mosaic" and table["mosaic"]["8 x 64 x 128"]["ms"] == 2.0
    monkeypatch.setattr(_tuned, "_here", lambda: {"int4_matmul": table})
    assert _tuned.config("int4_matmul", "mosaic", mosaic_code.Config, (16, 64, 128)).block_m == 192
    assert _tuned.fastest("int4_matmul") == "mosaic" and _tuned.fastest("attention") is None
    assert "relative error" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1])
def test_a_result_that_is_no_number_is_the_largest_error(place):
    found = [jnp.ones(3), jnp.ones(3)]
    found[place] = found[place].at[1].set(jnp.nan)
    assert math.isnan(kernels.relative_error(found, [jnp.ones(3), jnp.ones(3)]))
