"""``python -m experiments.speed``."""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("speed")  # before PyTorch is imported

import hydra
import torch
from omegaconf import DictConfig

from dashattn.fields import user_path
from experiments.errors import user_errors
from experiments.files import CONFIGS
from experiments.schema import to_config
from experiments.speed.benchmark import run
from experiments.speed.config import check, register_speed_config
from experiments.speed.report import write_report

register_speed_config()


@hydra.main(config_path=CONFIGS, config_name="speed", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        check(config)
        if not torch.cuda.is_available():
            raise ValueError(
                "speed is measured on a CUDA GPU and PyTorch sees none; table and figure of rows that are there: "
                f"python -m experiments.speed.report {config.output_dir}"
            )
        run(config, "cuda", lambda line: print(line, flush=True))
        print(write_report(user_path(config.output_dir)))


if __name__ == "__main__":
    main()
