"""Which processors workers get, how the machine is read, and where interleaved pages go."""

import mmap
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemini.kernels.topology import (
    MachineTopology,
    choose_num_workers,
    choose_worker_cpus,
    interleave_memory,
    parse_cpu_list,
    read_launching_core,
    read_num_cores,
    read_topology,
)


def machine(*nodes):
    return MachineTopology(
        cpus=frozenset().union(*nodes), nodes=tuple((i, frozenset(cpus)) for i, cpus in enumerate(nodes))
    )


def test_workers_use_every_processor_when_none_is_spare():
    assert choose_worker_cpus(machine({0, 1}), 2, (0,)) == ({0, 1}, {0, 1})
    assert choose_worker_cpus(machine({0, 1}), 5, (1,)) == ({0, 1},) * 5


def test_workers_leave_the_launching_core_when_enough_processors_remain():
    assert choose_worker_cpus(machine({0, 1}), 1, (1,)) == ({0},)
    assert choose_worker_cpus(machine(set(range(8))), 4, (2, 6)) == ({0, 1, 3, 4, 5, 7},) * 4


def test_a_sibling_is_kept_off_only_if_it_can_be_spared():
    assert choose_worker_cpus(machine(set(range(8))), 7, (2, 6)) == ({0, 1, 3, 4, 5, 6, 7},) * 7


def test_workers_are_spread_over_nodes_in_proportion():
    chosen = choose_worker_cpus(machine(set(range(4)), set(range(4, 8))), 4, (0,))
    assert sorted(map(sorted, chosen)) == [[1, 2, 3], [1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    chosen = choose_worker_cpus(machine({0, 1, 2, 3, 4, 5}, {8, 9}), 4, ())
    assert sorted(len(cpus) for cpus in chosen) == [2, 6, 6, 6]


def test_a_node_that_has_only_the_launching_core_gets_no_worker():
    assert choose_worker_cpus(machine({0}, {1, 2}), 2, (0,)) == ({1, 2}, {1, 2})


def test_a_launching_processor_outside_the_affinity_mask_costs_nothing():
    assert choose_worker_cpus(machine({4, 5}), 1, (0, 4)) == ({5},)
    assert choose_worker_cpus(machine({4, 5}), 1, (0,)) == ({4, 5},)


@given(
    cpus=st.sets(st.integers(0, 63), min_size=1),
    num_workers=st.integers(1, 70),
    node_of=st.integers(1, 64),
    launching=st.lists(st.integers(0, 63), max_size=2),
)
def test_every_worker_gets_processors_it_may_use(cpus, num_workers, node_of, launching):
    nodes = [group for i in range(4) if (group := {cpu for cpu in cpus if cpu // node_of % 4 == i})]
    chosen = choose_worker_cpus(machine(*nodes), num_workers, launching)
    assert len(chosen) == num_workers
    assert all(set() < set(group) <= cpus for group in chosen)
    if num_workers < len(cpus) and launching:
        assert all(launching[0] not in group for group in chosen)


def test_cpu_lists_are_read_as_the_kernel_writes_them():
    assert parse_cpu_list("0-2,8\n") == {0, 1, 2, 8}
    assert parse_cpu_list("\n") == set()
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpu_list("0-x")


def test_the_topology_has_the_nodes_with_processors_this_process_may_use(tmp_path):
    mine = min(os.sched_getaffinity(0))
    for node, text in {0: "", 1: "100000-100003", 10: f"{mine}", 2: ""}.items():
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{text}\n")
    topology = read_topology(tmp_path)
    assert topology.cpus == os.sched_getaffinity(0)
    assert topology.nodes == ((10, frozenset({mine})),)


def test_a_machine_that_says_nothing_of_nodes_has_none(tmp_path):
    assert read_topology(tmp_path / "missing").nodes == ()
    (tmp_path / "node0").mkdir()
    assert read_topology(tmp_path).nodes == ()


def test_the_launching_core_is_the_calling_threads(tmp_path):
    cores = []

    def look():
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        (tmp_path / f"cpu{max(os.sched_getaffinity(0))}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{max(os.sched_getaffinity(0))}" / "topology" / "thread_siblings_list").write_text("0-1000\n")
        cores.append(read_launching_core(tmp_path))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    last = max(os.sched_getaffinity(0))
    assert cores == [(last, *(cpu for cpu in range(1001) if cpu != last))]


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="needs a kernel with memory policies")
def test_interleaved_memory_has_the_policy_and_is_writable():
    buffer = torch.frombuffer(mmap.mmap(-1, 4 << 20), dtype=torch.uint8)
    node = read_topology().nodes[0][0]
    assert interleave_memory(buffer.data_ptr(), buffer.numel(), [node])
    buffer.fill_(3)
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    assert any(line.startswith(f"{buffer.data_ptr():x} interleave:{node}") for line in lines)


def test_memory_the_system_cannot_interleave_is_left_alone():
    buffer = torch.frombuffer(mmap.mmap(-1, 1 << 20), dtype=torch.uint8)
    assert not interleave_memory(buffer.data_ptr() + 1, 4096, [0])
    assert not interleave_memory(buffer.data_ptr(), 4096, [-1])
    assert not interleave_memory(buffer.data_ptr(), 4096, [1023])


@pytest.mark.parametrize(
    ("num_cpus", "num_cores", "has_device", "num_sharers", "expected"),
    [
        (2, 1, False, 1, 2),
        (64, 32, False, 1, 16),
        (8, 4, False, 4, 2),
        (2, 2, False, 4, 1),
        (16, 8, True, 1, 6),  # a desktop: eight cores of two threads each
        (64, 32, True, 1, 16),
        (16, 16, True, 2, 6),
        (2, 1, True, 1, 1),
        (4, 4, True, 4, 1),
    ],
)
def test_workers_leave_cores_to_whom_launches_kernels(num_cpus, num_cores, has_device, num_sharers, expected):
    found = choose_num_workers(num_cpus=num_cpus, num_cores=num_cores, has_device=has_device, num_sharers=num_sharers)
    assert found == expected


def test_siblings_are_one_core(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        directory = tmp_path / f"cpu{cpu}/topology"
        directory.mkdir(parents=True)
        (directory / "thread_siblings_list").write_text(siblings + "\n")
    assert read_num_cores(MachineTopology(cpus=frozenset(range(4)), nodes=()), tmp_path) == 2
    assert read_num_cores(MachineTopology(cpus=frozenset({0, 1}), nodes=()), tmp_path) == 2
    assert read_num_cores(MachineTopology(cpus=frozenset({0, 9}), nodes=()), tmp_path) == 2  # not told
