"""What encoders know of the machine: a container's share of the cores, and whether there may be another device."""

import os
from pathlib import Path

import pytest

from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import load_settings
from embeddings_pipeline.encoders.processor import has_bf16, is_cpu, kind_of_processor, memory_left, share_of_cores
from embeddings_pipeline.errors import ConfigurationError

ALL = 1_000_000  # no machine has so many cores: a quota that limits nothing


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("group", "quotas", "cores"),
    [
        ("0::/", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/", {"cpu.max": "20000 100000\n"}, 1),  # a fifth of a core is one thread
        ("0::/a/b", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),  # the group above counts too
        ("0::/not/seen/from/here", {"cpu.max": "50000 100000"}, 1),
        ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALL),
        ("3:cpuset:/x", {}, ALL),
        ("0::/", {"cpu.max": "nonsense"}, ALL),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
    ],
)
def test_a_container_has_the_cores_that_its_control_group_pays_for(
    group: str, quotas: dict[str, str], cores: int, tmp_path: Path
) -> None:
    write(tmp_path / "cgroup", f"{group}\n")
    for name, text in quotas.items():
        write(tmp_path / "mounted" / name, text)
    unlimited = share_of_cores(tmp_path / "none", tmp_path)
    assert share_of_cores(tmp_path / "cgroup", tmp_path / "mounted") == min(cores, unlimited)


MACHINE = "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"


@pytest.mark.parametrize(
    ("group", "files", "left"),
    [
        ("0::/", {"memory.max": "max\n", "memory.current": "1\n", "memory.stat": ""}, 5_120_000),
        (
            "0::/a",
            {
                "a/memory.max": "4000000",
                "a/memory.current": "3000000",
                "a/memory.stat": "anon 1\ninactive_file 200000\nactive_file 9",
            },
            1_200_000,
        ),
        (
            "4:memory:/a\n3:cpu:/",
            {
                "memory/a/memory.limit_in_bytes": "9223372036854771712",
                "memory/a/memory.usage_in_bytes": "1",
                "memory/a/memory.stat": "inactive_file 5",
                "memory/memory.limit_in_bytes": "1000000",
                "memory/memory.usage_in_bytes": "900000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50000",
            },
            150_000,
        ),
        ("0::/", {"memory.max": "nonsense", "memory.current": "1"}, 5_120_000),
    ],
)
def test_a_process_may_take_what_its_machine_and_its_control_groups_leave(
    group: str, files: dict[str, str], left: int, tmp_path: Path
) -> None:
    write(tmp_path / "cgroup", f"{group}\n")
    write(tmp_path / "meminfo", MACHINE)
    for name, text in files.items():
        write(tmp_path / "mounted" / name, text)
    assert memory_left(tmp_path / "cgroup", tmp_path / "mounted", tmp_path / "meminfo") == left
    assert memory_left(tmp_path / "none", tmp_path, tmp_path / "none") is None


def test_a_process_has_the_cores_of_its_affinity(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert share_of_cores(tmp_path / "none") == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_threads_is_one_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_THREADS", value)
    with pytest.raises(ConfigurationError, match=rf"^EMBEDDING_THREADS cannot be '{value}': [^\n]*; correct it$"):
        load_settings()
    monkeypatch.setenv("EMBEDDING_THREADS", "3")
    assert load_settings().embedding_threads == 3


def test_a_device_that_is_named_is_the_device() -> None:
    def runs_on_cpu(device: str) -> bool:
        return is_cpu(Profile(name="any", provider="local", model="any", dimensions=1, device=device))

    assert runs_on_cpu("cpu") and not runs_on_cpu("cuda") and not runs_on_cpu("cuda:1")


def test_a_limit_to_older_instructions_is_another_kind_of_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = kind_of_processor()
    assert kind == kind_of_processor()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert kind_of_processor() != kind
    assert not has_bf16()
