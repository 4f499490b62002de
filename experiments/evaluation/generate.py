"""The command line of ``models/generate.py``: a run's model continues a prompt, streaming, or several at once.

``python -m experiments.evaluation.generate run=outputs/NAME prompt="..."``
"""

from experiments.help import answer_help

if __name__ == "__main__":
    answer_help("generate")  # before PyTorch is imported

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from dashattn.fields import (
    AnyText,
    Checked,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Seed,
    Threads,
    UserPath,
)
from data import TextTokenizer
from data.cache import fingerprint
from experiments.config import Device
from experiments.errors import user_errors
from experiments.evaluation.folder import locate_model
from experiments.evaluation.target import build_model
from experiments.evaluation.tasks.base import in_parts
from experiments.files import CONFIGS
from experiments.host_memory import limit_memory
from experiments.overrides import as_text
from experiments.schema import to_config
from models.generate import Sampling, generate


@dataclass
class GenerateConfig(Checked):
    """One batch of prompts, halved where memory is short."""

    run: UserPath = MISSING  # run directory (its latest checkpoint), one of its checkpoints, or a Hugging Face folder
    prompt: AnyText | None = None  # the text to continue
    prompts: list[AnyText] = field(default_factory=list)  # in its place: several, of any length, continued at once
    max_new_tokens: PositiveInt = 200  # of each prompt
    stop_tokens: list[AnyText] = field(default_factory=list)  # of one token each, beside the one that ends a text
    temperature: NonNegativeFloat = 0.0  # 0 = the likeliest token
    top_p: PositiveShare = 1.0  # share of the probability that is drawn from; 1 = all
    top_k: NonNegativeInt = 0  # 0 = all tokens
    repetition_penalty: PositiveFloat = 1.0  # divides the logits of tokens that are there already; 1 = none
    seed: Seed = 0  # each prompt draws for itself, whatever stands beside it
    knob: NonNegativeFloat | None = None  # value of the sparsity knob; null = the one trained with
    compile: bool = False  # torch.compile the layers, which takes a while at the first token
    device: Device = "auto"  # auto: a GPU if there is one
    threads: Threads | None = None  # of PyTorch on the CPU; null = PyTorch's choice


class Printer:
    """Prints the first prompt's tokens as text as they come, whole characters only; keeps the time of every token."""

    def __init__(self, tokenizer: TextTokenizer, prompt: list[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt)
        self.printed = 0
        self.times: list[float] = []
        self._print()

    def __call__(self, row: int, token: int) -> None:
        self.times.append(time.perf_counter())
        if row == 0:
            self.tokens.append(token)
            self._print()

    def _print(self) -> None:
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self.printed :], end="", flush=True)
            self.printed = len(text)

    def end(self) -> None:
        """Prints what waited for the rest of a character, which will not come, and ends the line."""
        print(self.tokenizer.decode(self.tokens)[self.printed :])

    def tell_speed(self, start: float, prompts: Sequence[list[int]], results: Sequence[list[int]]) -> None:
        """On stderr, how fast the tokens came since ``start``; nothing if none came."""
        if not self.times:
            return
        first, last, count = self.times[0], self.times[-1], len(self.times)
        later = count - sum(map(bool, results))  # than the first step's
        rate = f", then {later / (last - first):.1f} tokens/s" if later else ""
        read = sum(map(len, prompts))
        report = f"{read} tokens read, the first new one after {first - start:.2f} s{rate}; {count} in all"
        print(report, file=sys.stderr)


def run_generation(config: GenerateConfig) -> None:
    """Prints every prompt with its continuation, and on stderr how fast they came.

    Raises:
        ValueError: no such run, a run without text, or an impossible setting.
    """
    if (config.prompt is None) == (not config.prompts):
        raise ValueError('give prompt="..." or, for several, prompts=["...","..."]')
    texts = config.prompts or [config.prompt]
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.repetition_penalty)
    target = locate_model(config.run, config.device)
    train = target.train
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise ValueError(f"{config.run} was trained on {train.data.name}, which is no text: give a run trained on text")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    limit_memory(train.device)
    model = build_model(target)
    if config.knob is not None:
        model.set_knob(config.knob)
    if config.compile:
        # Matrices times one row become reductions, fused with what stands around them.
        model.compile_layers(options={"coordinate_descent_tuning": True})
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    stop_tokens = {tokenizer.eos_id, *(_stop_token(tokenizer, text) for text in config.stop_tokens)}
    printer = Printer(tokenizer, tokenizer.encode(texts[0]))  # a token that begins the document is not shown
    told = Counter()  # tokens of each prompt: where memory ends they come once more, and are told once

    def continue_some(indices: range) -> list[list[int]]:
        came = Counter()

        def tell(row: int, token: int) -> None:
            index = indices[row]
            came[index] += 1
            if came[index] > told[index]:
                told[index] += 1
                printer(index, token)

        return generate(
            model,
            [prompts[index] for index in indices],
            max_new_tokens=config.max_new_tokens,
            stop_tokens=stop_tokens,
            sampling=sampling,
            seeds=[int(fingerprint(config.seed, index), 16) for index in indices],
            on_token=tell,
        )

    start = time.perf_counter()
    parts = in_parts(range(len(prompts)), len(prompts), continue_some)
    results = [new for _, part in parts for new in part]
    printer.end()
    for number, (text, result) in enumerate(zip(texts[1:], results[1:], strict=True), start=2):
        print(f"\n[{number}] {tokenizer.decode(tokenizer.encode(text) + result)}")
    printer.tell_speed(start, prompts, results)


def _stop_token(tokenizer: TextTokenizer, text: str) -> int:
    """Special tokens may be spelled out."""
    tokens = tokenizer.encode_markup(text)
    if len(tokens) != 1:
        raise ValueError(f"stop_tokens has {text!r}, which is {len(tokens)} tokens: give texts of one token each")
    return tokens[0]


ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


@hydra.main(config_path=CONFIGS, config_name="generate", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with user_errors():
        run_generation(to_config(cfg))


if __name__ == "__main__":
    sys.argv[1:] = [as_text(argument, "prompt") for argument in sys.argv[1:]]
    main()
