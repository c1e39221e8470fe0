"""The packages point one way: the contracts of pyproject.toml hold."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_every_import_contract_is_kept(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    # Imported here: a machine that only runs the kernels' tests need not have it.
    use_cases = pytest.importorskip("importlinter.application.use_cases")
    pytest.importorskip("importlinter.configuration").configure()
    assert use_cases.lint_imports(cache_dir=None, no_logo=True), capsys.readouterr().out
