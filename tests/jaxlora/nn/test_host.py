"""The host's memory is read from where its limits stand."""

import os

import pytest

from jaxlora.nn import host


@pytest.mark.parametrize(
    ("limits", "least"),
    [(["1048576\n"], 1 << 20), (["max\n", "2097152\n"], 1 << 21), (["max\n"], None), ([], None), (["9223372036854771712\n"], None)],
    ids=["version 2", "version 1", "no limit", "no cgroup", "version 1, no limit"],
)
def test_a_container_may_have_less_memory_than_its_host(monkeypatch, tmp_path, limits, least):
    files = [tmp_path / str(i) for i in range(2)]
    for file, limit in zip(files, limits, strict=False):
        file.write_text(limit)
    monkeypatch.setattr(host, "_LIMITS", files)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.__getitem__)
    assert host.memory_bytes() == (4096 << 20 if least is None else least)


@pytest.mark.parametrize(
    ("memory_gib", "pool", "room_gib"),
    [(64, None, 16), (1024, None, 32), (1024, "256", 128), (64, "256", 16)],
    ids=["a quarter", "half of the pool", "of a larger pool", "the smaller of both"],
)
def test_room_is_a_share_of_the_memory_and_of_what_is_pinned(monkeypatch, memory_gib, pool, room_gib):
    monkeypatch.setattr(host, "memory_bytes", lambda: memory_gib << 30)
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    if pool is not None:
        monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", pool)
    assert host.room_bytes() == room_gib << 30
