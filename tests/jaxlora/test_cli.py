import pathlib
import signal
import sys

import jax
import pytest

from jaxlora import cli
from jaxlora.recipes import quickstart
from tests.jaxlora.train.test_loop import fresh, run, signalling


def test_the_quickstart_gets_its_arguments(monkeypatch):
    runs = []
    monkeypatch.setattr(quickstart, "run", runs.append)
    cli.main(["quickstart", "--output-dir", "there", "--seed", "3"])
    assert runs == [quickstart.QuickstartConfig(output_dir=pathlib.Path("there"), seed=3)]


def test_the_command_line_has_the_recipes_defaults(monkeypatch):
    runs = []
    monkeypatch.setattr(quickstart, "run", runs.append)
    cli.main(["quickstart"])
    assert runs == [quickstart.QuickstartConfig()]


def test_env_prints_versions_and_every_device(capsys):
    cli.main(["env"])
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["jax"].strip() == jax.__version__
    assert [name for name in printed if name.startswith("device")] == [f"device {device.id}" for device in jax.devices()]


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quickstrat"])
    assert "quickstart" in capsys.readouterr().err


def test_without_tyro_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxlora\[cli\]'"):
        cli.main(["env"])


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_stops_exits_as_shells_expect_and_says_where_its_checkpoint_is(monkeypatch, capsys, signum, status):
    monkeypatch.setattr(quickstart, "run", lambda config: run(fresh(), total_steps=9, batches=signalling(signum, 1)))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart"])
    assert stopped.value.code == status
    assert f"stopped by {signum.name} after step 2; its checkpoint is complete: checkpoint-2" in capsys.readouterr().err
