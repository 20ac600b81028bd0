"""What encoders must know of this machine, without importing torch: device, share of the cores, kind of processor."""

import hashlib
import importlib.util
import os
import platform
import re
import runpy
from math import ceil
from pathlib import Path
from typing import Any

from embeddings_pipeline.config.profiles import Profile

DEVICES = {"cuda": ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"), "hip": ("/dev/kfd",), "xpu": ("/dev/dri",)}
"""What a build of torch may be for, and the files without which it has no such device."""
LIMIT = "ONEDNN_MAX_CPU_ISA"
"""Variable by which a person has the libraries use fewer of the processor's instructions."""


def is_cpu(profile: Profile) -> bool:
    """Whether the profile's model runs on the processor. torch is asked only where there may be another device."""
    if profile.device is not None:
        return profile.device == "cpu"
    may_be = (build and any(map(os.path.exists, DEVICES[name])) for name, build in _torch_builds().items())
    if platform.system() == "Linux" and not any(may_be):
        return True
    import torch

    return not torch.accelerator.is_available()


def _torch_builds() -> dict[str, Any]:
    """What torch was built for, as its version file says; everything, if there is no such file."""
    package = importlib.util.find_spec("torch")  # finds the folder, and imports nothing
    try:
        [folder] = (package and package.submodule_search_locations) or []
        words = runpy.run_path(str(Path(folder) / "version.py"))
    except (OSError, ValueError):
        return dict.fromkeys(DEVICES, True)
    return {name: words.get(name, True) for name in DEVICES}


def share_of_cores(cgroups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may use: those of its affinity (hyperthreads of a core are one), and no more than
    its control group has time for.
    """
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = {_siblings(number) for number in mine}
    quota = _quota(cgroups, mounted)
    return max(1, len(cores) if quota is None else min(len(cores), ceil(quota)))


def _siblings(number: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(number)


def _quota(cgroups: Path, mounted: Path) -> float | None:
    """The least quota of this process's control group and those above it, in cores."""
    groups = _groups(cgroups, mounted, "cpu")
    quotas = [_quota_of_v2(group) if version == 2 else _quota_of_v1(group) for group, version in groups]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(cgroups: Path, mounted: Path, controller: str) -> list[tuple[Path, int]]:
    """This process's control group and those above it that a controller may limit, with their version, 1 or 2."""
    try:
        lines = cgroups.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, controllers, place = line.split(":", 2)
        if number == "0":  # a container sees its own group as the root
            folder, version = mounted, 2
        elif controller in controllers.split(","):
            folder, version = mounted / controller, 1
        else:
            continue
        inner = folder / place.lstrip("/")
        groups += [(group, version) for group in (inner, *inner.parents) if group.is_relative_to(folder)]
    return groups


def _quota_of_v2(group: Path) -> float | None:
    try:
        most, period = (group / "cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    except (OSError, ValueError):
        return None


def _quota_of_v1(group: Path) -> float | None:
    try:
        most, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return most / period if most > 0 else None
    except (OSError, ValueError):
        return None


def memory_left(
    cgroups: Path = Path("/proc/self/cgroup"),
    mounted: Path = Path("/sys/fs/cgroup"),
    machine: Path = Path("/proc/meminfo"),
) -> int | None:
    """Bytes that this process may still take: of the machine's memory, and of what its control groups may have; None if
    the system does not say. What the kernel keeps of files counts as free.
    """
    left = [_left_in(group, version) for group, version in _groups(cgroups, mounted, "memory")]
    try:
        available = re.search(r"^MemAvailable:\s*(\d+) kB", machine.read_text(), re.MULTILINE)
    except OSError:
        available = None
    left.append(1024 * int(available.group(1)) if available else None)
    return min((each for each in left if each is not None), default=None)


def _left_in(group: Path, version: int) -> int | None:
    limit, used, files = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        most, taken = (group / limit).read_text().strip(), int((group / used).read_text())
        kept = re.search(rf"^{files} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        return None if most == "max" else int(most) - taken + (int(kept.group(1)) if kept else 0)
    except (OSError, ValueError):
        return None


def kind_of_processor() -> str:
    """Model and instructions, in a few letters: the same on machines on which a model gives the same vectors."""
    said = [*_lines("model name", "flags", "Features"), platform.machine(), os.environ.get(LIMIT, "")]
    return hashlib.blake2b("\n".join(said).encode(), digest_size=8).hexdigest()


def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16. Emulated, it is ten times slower than float32."""
    limit = os.environ.get(LIMIT, "ALL").upper()
    may = any(word in limit for word in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10"))
    flags = {flag for line in _lines("flags", "Features") for flag in line.split()}
    return may and not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def _lines(*names: str) -> list[str]:
    """The first core's lines of these names, of what the kernel says of the processor."""
    try:
        words = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return []
    found = (re.search(rf"^{name}\s*:.*", words, re.MULTILINE) for name in names)
    return [line.group() for line in found if line]
