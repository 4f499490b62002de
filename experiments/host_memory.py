"""The machine's memory, where a model computes on its CPU: how much a process may still take, and an end to it there.

Linux ends a process that takes more without a word. Below that end allocations fail instead, which is an error that can
be told.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Of what is free, what tables of pages, caches and other processes leave.
USABLE = 0.95
_FREE = {  # version of cgroups -> limit, use, and what of it can be given back
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that are free to this process: of the machine, or of the control groups that it is in (a container's or a
    job's limit), whichever has least.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    return max(0, min([psutil.virtual_memory().available, *_free_of_groups(root)]))


def _free_of_groups(root: Path) -> Iterator[int]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version = 1 if controllers else 2
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.strip("/")
        # Its ancestors limit it, too; in a container the mount may begin at the group itself.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(mount))):
            limit_name, use_name, kept_name = _FREE[version]
            try:
                limit, use = ((folder / name).read_text().strip() for name in (limit_name, use_name))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                yield int(limit) - int(use) + int(stat.get(kept_name, 0))


def share_of_memory() -> int:
    """Bytes that this process may still take: as much as each other one of the same launch."""
    return int(USABLE * free_memory()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def limit_memory(device: str) -> None:
    """Let this process's allocations fail where ``share_of_memory`` ends, if it computes on the CPU, and on Linux.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``, a GPU if there is one.
    """
    is_here = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not is_here or sys.platform != "linux":
        return
    import resource

    # Threads and their buffers are made at the first use, and where they cannot be, OpenMP ends the process.
    warm = torch.ones(512, 512)
    (warm @ warm).cos_()
    status = Path("/proc/self/status").read_text().splitlines()
    (has,) = (1024 * int(line.split()[1]) for line in status if line.startswith("VmData:"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    end = has + share_of_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (end if most == resource.RLIM_INFINITY else min(end, most), most))
