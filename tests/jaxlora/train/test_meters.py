import pytest

from jaxlora.train.meters import Throughput


def test_the_first_step_which_compiles_is_left_out():
    meter = Throughput()
    meter.add(1000, at=160.0)
    assert meter.read() is None
    meter.add(500, at=162.0)
    assert meter.read() == pytest.approx(250)


def test_only_the_last_steps_count():
    meter, at = Throughput(window=2), 0.0
    for seconds, tokens in [(1, 10), (100, 10), (1, 30), (1, 50)]:
        at += seconds
        meter.add(tokens, at)
    assert meter.read() == pytest.approx(40)
