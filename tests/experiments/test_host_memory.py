"""A process ends in one line where its machine's memory does, and not by the kernel's hand."""

import re

import pytest
import torch

from experiments import host_memory
from experiments.errors import out_of_memory, run_faults, user_errors
from experiments.host_memory import free_memory, share_of_memory
from tests import forked

MIB = 2**20
FREE = "from experiments import host_memory\nhost_memory.free_memory = lambda: {mib} * 2**20\n"


def group(folder, version, limit, use, kept=0):
    limit_name, use_name, kept_name = host_memory._FREE[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in ((limit_name, limit), (use_name, use), ("memory.stat", f"anon 5\n{kept_name} {kept}")):
        (folder / name).write_text(f"{value}\n")


def member(root, line):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"5:devices:/other\n{line}\n")


def test_the_narrowest_group_counts_and_what_files_keep_is_free(tmp_path):
    member(tmp_path, "0::/slurm/job_7/step_0")
    mount = tmp_path / "sys/fs/cgroup"
    group(mount / "slurm/job_7/step_0", 2, "max", 70 * MIB)
    group(mount / "slurm/job_7", 2, 100 * MIB, 70 * MIB, kept=10 * MIB)
    group(mount / "slurm", 2, 400 * MIB, 90 * MIB)
    assert free_memory(tmp_path) == 40 * MIB
    group(mount / "slurm", 2, 60 * MIB, 90 * MIB)
    assert free_memory(tmp_path) == 0


def test_a_container_sees_its_own_group_at_the_root(tmp_path):
    member(tmp_path, "0::/")
    group(tmp_path / "sys/fs/cgroup", 2, 100 * MIB, 70 * MIB)
    assert free_memory(tmp_path) == 30 * MIB


def test_a_group_that_cannot_be_read_is_passed_over(tmp_path):
    member(tmp_path, "0::/of/the/host")
    group(tmp_path / "sys/fs/cgroup", 2, 100 * MIB, 70 * MIB)
    assert free_memory(tmp_path) == 30 * MIB


def test_groups_of_the_first_version(tmp_path):
    member(tmp_path, "4:memory:/job")
    group(tmp_path / "sys/fs/cgroup/memory/job", 1, 100 * MIB, 70 * MIB, kept=MIB)
    group(tmp_path / "sys/fs/cgroup/memory", 1, 9223372036854771712, 90 * MIB)
    assert free_memory(tmp_path) == 31 * MIB


def test_without_groups_it_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": 77}))
    assert free_memory(tmp_path) == 77
    monkeypatch.setattr(host_memory, "free_memory", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert share_of_memory() == 475


def limited(command, arguments, mib):
    """A command on a machine with little free memory."""
    return forked.run(
        "-c",
        f"{FREE.format(mib=mib)}import runpy, sys\n"
        f"sys.argv = {[command, *arguments]!r}\nrunpy.run_path({command!r}, run_name='__main__')\n",
    )


def test_allocations_fail_where_the_share_ends():
    code = FREE.format(mib=400) + (
        "import resource, torch\nlimits = [resource.getrlimit(resource.RLIMIT_DATA)]\n"
        "for device in ('cuda', 'auto'):\n"
        "    torch.cuda.is_available = lambda: device == 'auto'\n"
        "    host_memory.limit_memory(device)\n"
        "    limits.append(resource.getrlimit(resource.RLIMIT_DATA))\n"
        "assert len(set(limits)) == 1, 'a GPU has memory of its own'\n"
        "torch.cuda.is_available = lambda: False\n"
        "host_memory.limit_memory('auto')\n"
        "for _ in range(8): torch.ones(50 * 2**20)\n"  # 200 MiB, given back each time
        "try: torch.ones(110 * 2**20)\n"
        "except RuntimeError as error:\n"
        "    from experiments.errors import out_of_memory\n"
        "    print(out_of_memory(error))\n"
    )
    done = forked.run("-c", code)
    assert (done.returncode, done.stdout) == (
        0,
        "out of memory: this machine has no 0.43 GiB more for this process\n",
    ), done.stderr


def test_what_is_no_lack_of_memory_is_told_apart():
    assert out_of_memory(RuntimeError("shape '[3]' is invalid")) is None
    assert (
        out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")) is None
    )
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore")).endswith("Tried 2 GiB")
    for error in (MemoryError(), RuntimeError("std::bad_alloc")):
        assert out_of_memory(error) == "out of memory: this machine has no more for this process"
        for told in (user_errors, run_faults):
            with pytest.raises(SystemExit), told():
                raise error


def test_training_ends_in_one_line(tiny_overrides):
    rows = ["rows_per_batch=1024", "rows_per_micro_batch=1024", "model.intermediate_size=4096"]
    done = limited("train.py", tiny_overrides("many", *rows, "check_memory=false")[0], mib=300)
    assert done.returncode == 1
    assert re.search(
        r"^error: out of memory: this machine has no \d\.\d+ GiB more for this process\.$", done.stderr, re.M
    )
    assert "lower rows_per_micro_batch" in done.stderr
    assert "Traceback" not in done.stderr
