"""The packages point one way: the contracts of pyproject.toml hold."""

import pathlib

from importlinter import cli
from importlinter.application import use_cases


def test_every_import_contract_is_kept(monkeypatch):
    root = pathlib.Path(__file__).parents[1]
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(root)
    assert cli.EXIT_STATUS_SUCCESS == 0
    options = use_cases.read_user_options(str(root / "pyproject.toml"))
