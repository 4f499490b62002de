"""``python -m experiments.throughput``."""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("throughput")  # before PyTorch is imported

import hydra
import torch
from omegaconf import DictConfig

from dashattn.fields import user_path
from experiments.errors import user_errors
from experiments.files import CONFIGS
from experiments.schema import to_config
from experiments.throughput.report import write_report
from experiments.throughput.steps import check_throughput, register_throughput_config, run_benchmark

register_throughput_config()


@hydra.main(config_path=CONFIGS, config_name="throughput", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        check_throughput(config)
        run_benchmark(config, "cuda" if torch.cuda.is_available() else "cpu", lambda line: print(line, flush=True))
        print(write_report(user_path(config.output_dir)))


if __name__ == "__main__":
    main()
