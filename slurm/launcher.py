"""What can be asked of Slurm."""

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
    hours: float = 24.0
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
