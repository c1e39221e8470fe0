"""The packages point one way: the contracts of pyproject.toml hold."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]


def test_every_import_contract_is_kept(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    # Not at the top: the linter is missing where only the tests of kernels run, and those are collected with this one.
    from importlinter.application import use_cases
    from importlinter.configuration import configure

    configure()
    assert use_cases.lint_imports(cache_dir=None, no_logo=True), capsys.readouterr().out
