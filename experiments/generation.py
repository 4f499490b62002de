"""The command line of ``models/generate.py``: a run's model continues a prompt, streaming.

``python -m models.generate run=outputs/NAME prompt="..."``
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data import PackedDataConfig, TextTokenizer, build_tokenizer
from experiments.config import to_config
from experiments.errors import user_errors
from experiments.evaluation import build_model, locate
from models.generate import generate


@dataclass
class GenerateConfig:
    """One prompt."""

    run: str = MISSING  # run directory (its latest checkpoint), or one of its checkpoints
    prompt: str = MISSING
    max_new_tokens: int = 200
    temperature: float = 0.0  # 0 = the likeliest token
    top_p: float = 1.0
    seed: int = 0
    knob: float | None = None  # value of the sparsity knob; null = the one trained with
    compile: bool = False  # torch.compile the layers, which takes a while at the first token
    device: str = "auto"
    threads: int | None = None


class Printer:
    """Prints tokens as text as they come, whole characters only."""

    def __init__(self, tokenizer: TextTokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        self.printed = 0
        self.times: list[float] = []
        self._print()

    def __call__(self, _row: int, token: int) -> None:
        self.times.append(time.perf_counter())
        self.tokens.append(token)
        self._print()

    def _print(self) -> None:
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)


def run_generation(config: GenerateConfig) -> None:
    """Prints the prompt, its continuation, and on stderr how fast it came.

    Raises:
        ValueError: no such run, a run without text, or an impossible setting.
    """
    target = locate(config.run, config.device)
    train = target.train
    if not isinstance(train.data, PackedDataConfig):
        raise ValueError(f"{config.run} was trained on {train.data.name}, which is no text: give a run trained on text")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = build_tokenizer(train.data, Path(train.cache_dir).expanduser())
    model = build_model(target)
    if config.knob is not None:
        model.set_knob(config.knob)
    if config.compile:
        # Matrices times one row become reductions, fused with what stands around them.
        model.compile_layers(options={"coordinate_descent_tuning": True})
    prompt = tokenizer.encode(config.prompt)
    printer = Printer(tokenizer, prompt)
    start = time.perf_counter()
    generate(
        model,
        [prompt],
        max_new_tokens=config.max_new_tokens,
        stop_tokens={tokenizer.eos_id},
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        on_token=printer,
    )
    print()
    if printer.times:
        first, last, count = printer.times[0], printer.times[-1], len(printer.times)
        rate = f", then {(count - 1) / (last - first):.1f} tokens/s" if count > 1 else ""
        report = f"{len(prompt)} tokens read, the first new one after {first - start:.2f} s{rate}; {count} in all"
        print(report, file=sys.stderr)


ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
# Absolute, since a relative one would be looked up beside the module that was started.
CONFIGS = str(Path(__file__).resolve().parents[1] / "configs")


@hydra.main(config_path=CONFIGS, config_name="generate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        run_generation(to_config(cfg))
