"""What a replica takes of a machine, and what is wrong to ask for."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import pytest
from programs import Bench

from glm4.cluster.placement import Scale, replica_options
from glm4.cluster.ray_cluster import placed
from glm4.errors import OptionError
from glm4.options import EngineOptions

MODEL = "/m"


def cluster(*machines: dict[str, float]) -> ModuleType:
    """Ray, as far as it tells which machines there are."""
    ray = ModuleType("ray")
    gone = {"Alive": False, "Resources": {"CPU": 999.0, "GPU": 999.0}}
    ray.nodes = lambda: [gone, *({"Alive": True, "Resources": machine} for machine in machines)]  # type: ignore[attr-defined]
    return ray


def test_what_each_copy_on_one_machine_takes() -> None:
    two = EngineOptions(MODEL, device="cuda", data_parallel=2, tensor_parallel=2, device_id=1)
    assert [each.device_id for each in replica_options(two)] == [1, 3]
    shared = replica_options(EngineOptions(MODEL, device="cpu", data_parallel=2, max_device_memory="80%"))
    assert [each.max_device_memory for each in shared] == [0.4, 0.4]
    cores = len(os.sched_getaffinity(0))
    assert all(each.data_parallel == 1 and each.threads == max(1, cores // 2) for each in shared)
    [first, *_] = replica_options(EngineOptions(MODEL, device="cpu", data_parallel=4, threads=3, max_device_memory=400))
    assert first == EngineOptions(MODEL, device="cpu", threads=3, max_device_memory=100)


@pytest.mark.parametrize(
    ("copies", "least", "most", "expected"),
    [(1, None, None, (1, 1)), (3, None, None, (3, 3)), (1, None, 4, (1, 4)), (1, 2, None, (2, 2)), (4, 1, 2, (1, 2))],
)
def test_how_many_on_a_cluster(copies: int, least: int | None, most: int | None, expected: tuple[int, int]) -> None:
    assert Scale.of(EngineOptions(MODEL, data_parallel=copies), least, most) == Scale(*expected)


@pytest.mark.parametrize(
    ("options", "place", "expected"),
    [
        ({}, {"num_cpus": 1, "num_gpus": 1}, {"device": "cuda"}),
        ({"tensor_parallel": 4}, {"num_cpus": 1, "num_gpus": 4}, {"device": "cuda"}),
        ({"device": "npu", "pipeline_parallel": 2}, {"num_cpus": 1, "resources": {"NPU": 2}}, {}),
        ({"device": "cpu"}, {"num_cpus": 16}, {"threads": 16, "max_device_memory": 1.0}),
        ({"device": "cpu", "threads": 4}, {"num_cpus": 4}, {"max_device_memory": 0.25}),
        ({"device": "cpu", "threads": 4, "max_device_memory": 4000}, {"num_cpus": 4}, {"max_device_memory": 1000}),
        ({"device": "cpu", "tensor_parallel": 2}, {"num_cpus": 16}, {"threads": 8}),
    ],
)
def test_what_a_replica_takes_of_a_cluster(options: dict[str, Any], place: Any, expected: dict[str, Any]) -> None:
    ray = cluster({"CPU": 8.0}, {"CPU": 16.0, "GPU": 4.0, "NPU": 2.0})
    one, taken = placed(ray, EngineOptions(MODEL, data_parallel=3, **options))
    assert taken == place
    assert one.data_parallel == 1
    assert {name: getattr(one, name) for name in expected} == expected


def test_a_machine_without_cards_computes_itself_and_a_folder_is_named_from_the_root() -> None:
    one, place = placed(cluster({"CPU": 2.0}), EngineOptions("demo"))
    assert (one.device, place) == ("cpu", {"num_cpus": 2})
    assert one.model == os.path.abspath("demo")  # noqa: PTH100 - the oracle


@pytest.mark.parametrize("options", [{"tensor_parallel": 3, "device": "npu"}, {"device": "cpu", "threads": 17}])
def test_more_than_any_machine_has(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"of one machine, and no machine of the Ray cluster has more than (2|16): "):
        placed(cluster({"CPU": 16.0, "NPU": 2.0}), EngineOptions(MODEL, **options))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--max-replicas", "2"),
            "--min-replicas and --max-replicas belong to --ray: give --data-parallel, or add --ray",
        ),
        (
            ("--ray", "--min-replicas", "3", "--max-replicas", "2"),
            "min_replicas 3 and max_replicas 2: give 1 or more, ",
        ),
    ],
)
def test_flags_that_will_not_do(bench: Bench, flags: tuple[str, ...], message: str) -> None:
    (bench.folder / "in.jsonl").write_text('{"prompt": "hi"}\n')
    ran = bench.glm4("batch", "in.jsonl", "-o", "out.jsonl", "-m", "model", *flags)
    assert ran.code == 2
    assert ran.message.startswith(message)
