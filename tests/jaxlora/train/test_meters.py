import time

import pytest

from jaxlora.train.meters import Throughput


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_first_step_which_compiles_is_left_out(clock):
    meter = Throughput()
    clock[0] += 60
    meter.add(1000)
    assert meter.read() is None
    clock[0] += 2
    meter.add(500)
    assert meter.read() == pytest.approx(250)


def test_only_the_last_steps_count(clock):
    meter = Throughput(window=2)
    for seconds, tokens in [(1, 10), (100, 10), (1, 30), (1, 50)]:
        clock[0] += seconds
        meter.add(tokens)
    assert meter.read() == pytest.approx(40)
