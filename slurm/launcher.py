"""What can be asked of Slurm."""

import math
from dataclasses import dataclass, field
from typing import Annotated

from dashattn.fields import Checked, Line, NonNegativeInt, PositiveFloat, PositiveInt, Range, Text


@dataclass
class LauncherConfig(Checked, at="launcher"):
    """What a job asks Slurm for. One rank runs on each GPU; all of a run's nodes are one job."""

    partition: Line | None = None  # as of sbatch; null = the cluster's default
    account: Line | None = None  # that the time is charged to
    qos: Line | None = None  # quality of service
    nodes: PositiveInt = 1  # that train together
    gpus_per_node: NonNegativeInt = 1  # 0 = none; then a node has one rank
    cpus_per_task: PositiveInt = 8  # of a rank
    mem_gb: PositiveFloat | None = None  # of a node
    hours: Annotated[float, Range(float, 0, 24 * 366, "hours of up to a year", but=(0,))] = 24.0  # time limit
    signal_s: PositiveInt = 120  # so long before the time is up, SIGUSR2 asks the run to save; then it is queued again
    jobs: PositiveInt = 256  # cells of a sweep at a time
    setup: list[Text] = field(default_factory=list)  # shell lines before the job: module load ..., export ...
    python: Line | None = None  # what starts Python there, null = this one: apptainer exec --nv image.sif python
    srun_args: list[Line] = field(default_factory=list)  # such as --container-image=...
    sbatch_args: dict[Line, Line] = field(default_factory=dict)  # such as constraint: h100
    evaluate: list[Text] | None = None  # of a single run: overrides of the evaluate.py that follows it; null = none

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
