"""A container's limits, from control groups of both versions laid out as kernels lay them."""

from __future__ import annotations

import math
import os

import pytest

from streammerge import container, memory, threads

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """(text of /proc/self/cgroup, {file under /sys/fs/cgroup: content}) -> in force."""

    def lay(text: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(text)
        for name, content in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(content + "\n")
        monkeypatch.setattr(container, "GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(container, "MOUNTED", tmp_path / "fs")

    return lay


def test_no_limit(groups):
    groups("0::/\n", {"memory.max": "max", "cpu.max": "max 100000"})
    assert (container.memory_limit(), container.cpu_limit()) == (math.inf, math.inf)
    assert memory.total("host") == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_no_control_groups_at_all(groups, tmp_path):
    groups("", {})
    (tmp_path / "cgroup").unlink()
    assert (container.memory_limit(), container.cpu_limit()) == (math.inf, math.inf)


def test_version_2_with_its_own_namespace(groups):
    groups("0::/\n", {"memory.max": str(2 * GIB), "cpu.max": "150000 100000"})
    assert (container.memory_limit(), container.cpu_limit()) == (2 * GIB, 1.5)
    assert memory.total("host") == 2 * GIB
    assert threads.usable_cores() == min(2, len(os.sched_getaffinity(0)))


def test_a_parent_may_be_stricter(groups):
    files = {"user/memory.max": str(GIB), "user/job/memory.max": str(3 * GIB), "user/job/cpu.max": "50000 100000"}
    groups("0::/user/job\n", files)
    assert (container.memory_limit(), container.cpu_limit()) == (GIB, 0.5)
    assert threads.usable_cores() == 1


def test_version_1_with_the_hosts_path(groups):
    text = "9:name=systemd:/docker/ab\n4:memory:/docker/ab\n2:cpu,cpuacct:/docker/ab\n"
    files = {"memory/memory.limit_in_bytes": str(4 * GIB), "cpu/cpu.cfs_quota_us": "200000"}
    groups(text, files | {"cpu/cpu.cfs_period_us": "100000"})
    assert (container.memory_limit(), container.cpu_limit()) == (4 * GIB, 2.0)


def test_version_1_without_a_limit(groups):
    files = {"memory/memory.limit_in_bytes": "9223372036854771712", "cpu/cpu.cfs_quota_us": "-1"}
    groups("4:memory:/\n2:cpu:/\n", files | {"cpu/cpu.cfs_period_us": "100000"})
    assert container.cpu_limit() == math.inf
    assert memory.total("host") == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
