"""LoRA adapters in PEFT's format, against adapters and decisions of PEFT itself (tests/oracle/make_peft_golden.py)."""

import dataclasses
import json
import os
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.peft_config import AdapterConfig, compress, config_from_json, layer_index, pattern_key
from conversion.peft_format import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter, write_adapter
from conversion.safetensors_io import CheckpointError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "peft"
DECISIONS = json.loads((GOLDEN / "decisions.json").read_text())
NAMES = ("plain", "patterns", "embedding")
MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def draw(dtype=np.float32, **changes):
    rng = np.random.default_rng(0)
    config = AdapterConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ("q_proj", "v_proj")} | changes))
    paths = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    return Adapter(
        config, {p: {"lora_A": rng.normal(size=(4, 8)).astype(dtype), "lora_B": rng.normal(size=(6, 4)).astype(dtype)} for p in paths}
    )


def bits(array):
    return array.dtype, array.shape, array.tobytes()


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# what PEFT means


@pytest.mark.parametrize("case", DECISIONS["targets"], ids=lambda case: json.dumps(case["config"]))
def test_targets_are_the_modules_that_peft_would_adapt(case):
    config = config_from_json(case["config"])
    assert [p for p in DECISIONS["paths"] if config.targets(p)] == case["hits"]


@pytest.mark.parametrize("case", DECISIONS["patterns"], ids=lambda case: str(case["keys"]))
def test_a_pattern_decides_where_it_decides_in_peft(case):
    assert {p: pattern_key(case["keys"], p) or p for p in DECISIONS["paths"]} == case["found"]


@pytest.mark.parametrize("name", NAMES)
def test_ranks_and_scales_are_pefts(name):
    expected, adapter = json.loads((GOLDEN / name / "expected.json").read_text()), read_adapter(GOLDEN / name)
    assert {p: adapter.config.rank(p) for p in adapter.tensors} == expected["ranks"]
    assert {p: adapter.config.scale(p) for p in adapter.tensors} == pytest.approx(expected["scales"], rel=1e-15)


def test_all_linear_targets_every_path_but_the_excluded():
    config = AdapterConfig(r=1, lora_alpha=1, target_modules="All-Linear", exclude_modules=("fc1",))
    assert config.targets("a.b") and not config.targets("a.fc1")


def test_the_layer_is_the_first_number_and_not_an_expert_index():
    assert layer_index("model.layers.3.mlp.experts.7.w1") == 3


def test_ranks_compress_to_the_commonest_and_a_pattern_that_gives_each_back():
    ranks = {f"model.layers.{i}.q_proj": 4 + i % 3 // 2 for i in range(12)} | {"q_proj": 9, "model.layers.1.q_proj": 7}
    r, pattern = compress(ranks)
    config = AdapterConfig(r=r, lora_alpha=1, target_modules="all-linear", rank_pattern=pattern)
    assert {p: config.rank(p) for p in ranks} == ranks


def test_paths_that_no_pattern_tells_apart_are_refused():
    with pytest.raises(ValueError, match="no pattern tells them apart(.|\n)*axq"):
        compress({"a.q": 1, "axq": 2, "b": 3, "c": 3})


# reading


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_peft_reads_tensor_for_tensor(name):
    adapter, found = read_adapter(GOLDEN / name), {}
    for path, pair in adapter.tensors.items():
        found |= {f"base_model.model.{path}.{part}{'' if 'embedding' in part else '.weight'}": t for part, t in pair.items()}
    for path, tensor in adapter.modules_to_save.items():
        infix = ".base_layer.weight" if path.removesuffix(".weight") in adapter.tensors else ".weight"
        found[f"base_model.model.{path.removesuffix('.weight')}{infix}"] = tensor
    expected = load_file(GOLDEN / name / WEIGHTS_NAME)
    assert {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in expected.items()}


def test_a_minimal_configuration_takes_pefts_defaults():
    assert config_from_json({"target_modules": ["q_proj"]}) == AdapterConfig(r=8, lora_alpha=8, target_modules=("q_proj",))


UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "loftq_config": {"loftq_bits": 4},
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.down_proj"],
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "megatron_config": {"a": 1},
    "something_new": 3,
    "peft_type": "IA3",
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_goes_beyond_plain_lora_is_refused_by_name(key):
    with pytest.raises(NotImplementedError, match=key):
        config_from_json(MINIMAL | {key: UNSUPPORTED[key]})


def test_everything_that_is_refused_is_listed_at_once():
    with pytest.raises(NotImplementedError) as caught:
        config_from_json(MINIMAL | UNSUPPORTED)
    assert str(len(UNSUPPORTED)) in str(caught.value) and all(key in str(caught.value) for key in UNSUPPORTED)


@pytest.mark.parametrize("value", [None, False, 0, {}, [], ""])
def test_an_unknown_key_that_asks_for_nothing_is_ignored(value):
    assert config_from_json(MINIMAL | {"something_new": value}) == config_from_json(MINIMAL)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_are_accepted(start):
    assert config_from_json(MINIMAL | {"init_lora_weights": start}) == config_from_json(MINIMAL)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", "8"), ("r", True), ("r", 2.5), ("lora_alpha", "x"), ("lora_alpha", float("nan")), ("target_modules", 3),
        ("target_modules", "("), ("target_modules", [1]),
        ("rank_pattern", {"q": "x"}), ("rank_pattern", {"q": 0}), ("rank_pattern", {"(": 2}),
        ("alpha_pattern", [1]), ("modules_to_save", "norm"), ("lora_dropout", 1.5), ("use_rslora", 1), ("layers_to_transform", "1"),
        ("base_model_name_or_path", 3),
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_or_range_is_named(key, value):
    with pytest.raises(ValueError, match=rf"wrong:\n  - ('\('|q|\(|{key})"):
        config_from_json(MINIMAL | {key: value})


def test_missing_targets_are_an_error():
    with pytest.raises(ValueError, match="target_modules is missing"):
        config_from_json({"peft_type": "LORA", "target_modules": None})


def stored(folder, tensors, config=MINIMAL):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = np.ones((4, 8), np.float32), np.ones((6, 4), np.float32)
PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({f"{Q}.lora_A.weight": A.T, f"{Q}.lora_B.weight": B.T}, ValueError, r"1 of the adapter's 1 modules(.|\n)*were they swapped"),
        ({f"{Q}.lora_A.weight": A[:3]}, ValueError, r"rank is 4 by the configuration, but lora_A is \[3, 8\]"),
        ({f"{Q}.lora_A.weight": A[None]}, ValueError, r"only Linears and embeddings"),
        ({f"{Q}.lora_A.weight": A * np.nan}, ValueError, "32 of 32 values that are not finite"),
        ({f"{Q}.lora_A.weight": A.astype(np.int32)}, ValueError, "lora_A is int32"),
        ({f"{Q}.lora_B.weight": None}, ValueError, r"it has \['lora_A'\]; expected lora_A and lora_B"),
        ({f"{Q}.weight": A}, ValueError, "1 tensors(.|\n)*belong to nothing(.|\n)*did you mean 'q_proj'"),
        ({f"{Q}.lora_A.default.weight": A}, ValueError, "belong to nothing"),
        ({f"{Q}.lora_magnitude_vector": B[:, 0].copy()}, NotImplementedError, "DoRA: 1 tensors"),
        ({f"{Q}.lora_B.bias": B[:, 0].copy()}, NotImplementedError, "lora_bias: 1 tensors"),
        ({f"{Q}.base_layer.bias": B[:, 0].copy()}, NotImplementedError, "a trained bias: 1 tensors"),
        ({f"{Q}.base_layer.lora_A.weight": A}, NotImplementedError, "target_parameters: 1 tensors"),
        ({"x.token_adapter.trainable_tokens_delta": A}, NotImplementedError, "trainable_token_indices: 1 tensors"),
    ],
)
def test_a_broken_or_unsupported_tensor_is_a_named_error(tmp_path, change, error, message):
    tensors = {k: np.ascontiguousarray(v) for k, v in (PAIR | change).items() if v is not None}
    with pytest.raises(error, match=message):
        read_adapter(stored(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_dtype_is_kept(tmp_path, dtype):
    adapter = read_adapter(stored(tmp_path, {k: v.astype(dtype) for k, v in PAIR.items()}))
    assert {t.dtype for pair in adapter.tensors.values() for t in pair.values()} == {np.dtype(dtype)}


def test_a_pattern_that_matches_no_module_is_reported(tmp_path):
    folder = stored(tmp_path, PAIR, MINIMAL | {"alpha_pattern": {"v_porj": 3}})
    with pytest.warns(UserWarning, match=r"1 patterns of .* match none of 1 adapted modules: \['v_porj'\]"):
        read_adapter(folder)


def test_a_pickled_adapter_is_never_opened(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps(MINIMAL))
    (tmp_path / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "touched").encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match="is a pickle and is never opened"):
        read_adapter(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = stored(tmp_path / "a", PAIR)
    shutil.move(folder / WEIGHTS_NAME, tmp_path / "secret")
    (folder / WEIGHTS_NAME).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        read_adapter(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"r": 1, "r": 2}', '{"a":' + "[" * 100_000])
def test_a_malformed_configuration_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / CONFIG_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="not a valid adapter configuration"):
        read_adapter(tmp_path)


def test_a_folder_without_a_configuration_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
        read_adapter(tmp_path)


# writing


@pytest.mark.parametrize("name", NAMES)
def test_reading_an_adapter_of_peft_and_writing_it_gives_the_same_file(tmp_path, name):
    write_adapter(tmp_path / "out", read_adapter(GOLDEN / name))
    assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == (GOLDEN / name / WEIGHTS_NAME).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_written_configuration_says_what_pefts_says(tmp_path, name):
    write_adapter(tmp_path / "out", read_adapter(GOLDEN / name))
    ours, theirs = (json.loads((folder / CONFIG_NAME).read_text()) for folder in (tmp_path / "out", GOLDEN / name))
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"x": 4}, "alpha_pattern": {"q_proj": 2.5}},
        {"exclude_modules": "x.*", "layers_to_transform": (0, 1), "layers_pattern": ("layers",), "task_type": "CAUSAL_LM"},
        {
            "target_modules": r".*\.(q|v)_proj",
            "lora_dropout": 0.1,
            "base_model_name_or_path": "a/b",
            "revision": "main",
            "lora_alpha": 16.0,
        },
    ],
)
def test_a_written_configuration_reads_back_the_same(changes):
    config = draw(**changes).config
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config


def test_only_keys_of_old_peft_are_written_for_plain_lora():
    # LoraConfig's fields in peft's src/peft/tuners/lora.py, before there were patterns and rsLoRA.
    old = (
        "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha lora_dropout "
        "fan_in_fan_out bias modules_to_save init_lora_weights layers_to_transform layers_pattern"
    )
    assert set(draw().config.to_json()) == {*old.split()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_an_adapter_round_trips_bit_for_bit(tmp_path, dtype):
    adapter = draw(dtype)
    write_adapter(tmp_path / "a", adapter)
    write_adapter(tmp_path / "b", read_adapter(tmp_path / "a"))
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    again = read_adapter(tmp_path / "b")
    assert again.config == adapter.config
    assert {(p, k): bits(t) for p, pair in again.tensors.items() for k, t in pair.items()} == {
        (p, k): bits(t) for p, pair in adapter.tensors.items() for k, t in pair.items()
    }


def test_a_file_has_pefts_names_and_sorted_configuration(tmp_path):
    write_adapter(tmp_path, draw())
    assert f"{Q}.lora_A.weight" in load_file(tmp_path / WEIGHTS_NAME)
    text = (tmp_path / CONFIG_NAME).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)


def test_other_files_and_an_existing_readme_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoint-10").mkdir()
    write_adapter(tmp_path, draw())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME, "checkpoint-10"]
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("base", ["a/b", "/data/model", "./model", None])
def test_a_model_card_names_the_base_as_metadata_only_if_it_is_a_hub_id(tmp_path, base):
    write_adapter(tmp_path, draw(base_model_name_or_path=base))
    assert ("base_model: a/b" in (tmp_path / "README.md").read_text()) == (base == "a/b")


def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    write_adapter(tmp_path, draw())
    before = files_of(tmp_path)
    adapter = dataclasses.replace(draw(), config=dataclasses.replace(draw().config, lora_alpha=1))
    monkeypatch.setattr("conversion.peft_format.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_adapter(tmp_path, adapter)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("file", [WEIGHTS_NAME, CONFIG_NAME])
def test_a_crash_between_two_files_leaves_no_configuration_rather_than_a_mixture(tmp_path, monkeypatch, file):
    write_adapter(tmp_path, draw())
    real = os.replace

    def replace(source, target):
        if pathlib.Path(target) == tmp_path / file:
            raise OSError("no power")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no power"):
        write_adapter(tmp_path, draw(lora_alpha=1))
    assert not (tmp_path / CONFIG_NAME).exists()


@pytest.mark.parametrize(
    "adapter", [Adapter(draw().config, {}), Adapter(draw(r=5).config, draw().tensors), Adapter(draw().config, {}, {"x.weight": A})]
)
def test_an_adapter_that_could_not_be_read_back_is_not_written(tmp_path, adapter):
    with pytest.raises(ValueError, match="adapter"):
        write_adapter(tmp_path / "out", adapter)
    assert not (tmp_path / "out").exists()
