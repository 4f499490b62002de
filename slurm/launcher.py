"""What can be asked of Slurm."""

import math
from dataclasses import dataclass, field


@dataclass
class LauncherConfig:
    """What a job asks Slurm for. One rank runs on each GPU; all of a run's nodes are one job."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    gpus_per_node: int = 1  # 0 = none; then a node has one rank
    cpus_per_task: int = 8  # of a rank
    mem_gb: float | None = None  # of a node
    hours: float = 24.0  # time limit
    signal_s: int = 120  # so long before the time is up, SIGUSR2 asks the run to save; then it is queued again
    jobs: int = 256  # cells of a sweep at a time
    setup: list[str] = field(default_factory=list)  # shell lines before the job: module load ..., export ...
    python: str | None = None  # what starts Python there, null = this one: apptainer exec --nv image.sif python
    srun_args: list[str] = field(default_factory=list)  # such as --container-image=...
    sbatch_args: dict[str, str] = field(default_factory=dict)  # such as constraint: h100
    evaluate: list[str] | None = None  # of a single run: overrides of the evaluate.py that follows it; null = none

    @property
    def ranks(self) -> int:
        return self.nodes * max(self.gpus_per_node, 1)

    @property
    def minutes(self) -> int:
        """The time limit as Slurm takes it."""
        return math.ceil(self.hours * 60)

    def check(self) -> None:
        """Raises ValueError for a job that would do nothing but be queued again."""
        # Slurm may send the signal a minute early.
        if self.minutes * 60 <= self.signal_s + 60:
            raise ValueError(
                f"launcher.hours={self.hours} is a time limit of {self.minutes} minutes, and the signal to save comes "
                f"launcher.signal_s={self.signal_s} seconds before, or a minute earlier: the job would stop as soon as "
                "it begins, and be queued again for ever; raise launcher.hours or lower launcher.signal_s"
            )
