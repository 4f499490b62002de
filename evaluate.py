"""Evaluates one checkpoint: ``python evaluate.py run=outputs/NAME tasks=[loss,position] sparsities=[0.5,0.75]``.

Rows are added to results.jsonl in the run directory, or where ``output`` says; what is there already is not computed
again, and several evaluations of a run may go side by side.
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("evaluate")  # before PyTorch is imported

import hydra
import torch
from omegaconf import DictConfig

from experiments.errors import user_errors
from experiments.evaluation.config import register_evaluate_config
from experiments.evaluation.evaluate import evaluate, find_target
from experiments.files import CONFIGS, RESULTS
from experiments.schema import to_config

register_evaluate_config()


def line(row: dict) -> str:
    """A result for the reader of the terminal."""
    parts = [f"{row['task']} {row['score']:.4f}", f"{row['length']} tokens"]
    if row["task"] not in ("loss", "position", "recall"):
        parts[0] = f"{row['task']} {row['metric']} {row['score']:.4f}"
    if row["position"] is not None:
        parts.append(f"positions {row['position'][0]}-{row['position'][1]}")
    parts += [f"{key} {row[key]}" for key in ("probe", "relevant", "depth", "variant") if row.get(key) is not None]
    if row["knob"] is not None:
        parts.append(f"{row['knob_name']} {row['knob']:.4g}")
    if row.get("target_sparsity") is not None:
        parts.append(f"for {row['target_sparsity']:.1%} ({row['sparsity_count']})")
    return "  ".join([*parts, f"causal sparsity {row['causal_sparsity']:.1%}"])


@hydra.main(config_path=CONFIGS, config_name="evaluate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        config = to_config(cfg)
        target = find_target(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        count = 0
        for row in evaluate(config, target):
            count += 1
            print(line(row))
        print(f"{count} new rows in {target.rows_dir / RESULTS}")


if __name__ == "__main__":
    main()
