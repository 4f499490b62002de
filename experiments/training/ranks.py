"""The processes of a run, and what they tell each other.

DeepSpeed is imported inside the functions: its import chooses an accelerator and sets environment variables.
"""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed

from dashattn.ops.full.reference import use_flash_attention_3
from experiments.errors import Stopped

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks of this launch, as torchrun says it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    What they tell each other here lies on the host and stays there: no rank waits for its device to have computed.

    Attributes:
        host: of all ranks, for tensors on the CPU; None = there is but one.
        sequence_parallel: consecutive ranks that read the same rows, and share them.
        sequence: those of them that this rank shares with, for tensors on its device; None = it shares none.
    """

    rank: int
    world_size: int
    device: torch.device
    host: torch.distributed.ProcessGroup | None = None
    sequence_parallel: int = 1
    sequence: torch.distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Which of the readers of different rows this rank is."""
        return self.rank // self.sequence_parallel

    @property
    def readers(self) -> int:
        return self.world_size // self.sequence_parallel

    def sum(self, *values: float) -> list[float]:
        """Sum of each value over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.host)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value, group=self.host)
        return gathered

    def gather_readers(self, value: Any) -> list[Any]:
        """``value`` of every reader, which is the same on all ranks that share its rows."""
        return self.gather(value)[:: self.sequence_parallel]

    def first(self, work: Callable[[], T]) -> T | None:
        """``work()`` of the first rank, None on the others. Where it fails all of them end alike, and none waits for
        another.

        Raises:
            ValueError, OSError, Stopped: as ``work`` does; on the other ranks Stopped.
        """
        result = error = None
        if self.is_main:
            try:
                result = work()
            except (ValueError, OSError, Stopped) as caught:
                error = caught
        told = self.gather(None if error is None else (str(error), getattr(error, "exit_code", 1)))[0]
        if error is not None:
            raise error
        if told is not None:
            stopped = Stopped(told[0])
            stopped.exit_code = told[1]
            raise stopped
        return result

    def barrier(self) -> None:
        if self.world_size > 1:
            torch.distributed.barrier(group=self.host)


def init_ranks(device: str, sequence_parallel: int = 1) -> Ranks:
    """Start the process group, once per process; a process without a launcher is a group of its own.

    Args:
        device: ``cpu`` or ``cuda``; a rank takes the GPU of its LOCAL_RANK.
        sequence_parallel: as in ``Ranks``; divides the number of ranks.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    os.environ["DS_ACCELERATOR"] = device
    torch_device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(torch_device)
    use_flash_attention_3(torch_device)

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives that PyTorch renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if get_accelerator().device_name() != device:
        raise ValueError(
            f"device={device}, but DeepSpeed already runs on {get_accelerator().device_name()} in this process: "
            "start a new process for another device"
        )
    if device == "cpu":
        # DeepSpeed would probe the compiler and then spend 40 s on a shared-memory operation that only inference uses.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if device == "cuda" else "gloo"
    if not torch.distributed.is_initialized() and "RANK" not in os.environ:
        # Without a launcher DeepSpeed would look for MPI; and a group of one needs no network port.
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not torch.distributed.is_initialized() and attempt != "0":
        # torchrun's store outlives a restart, and the addresses of the ranks that died with it.
        store, rank, world_size = next(torch.distributed.rendezvous("env://"))
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    world_size = torch.distributed.get_world_size()
    host = torch.distributed.new_group(backend="gloo") if world_size > 1 else None
    sequence = torch.distributed.new_subgroups(sequence_parallel)[0] if sequence_parallel > 1 else None
    return Ranks(torch.distributed.get_rank(), world_size, torch_device, host, sequence_parallel, sequence)
