"""The generation options of lm_eval's tasks and of its ``--gen_kwargs``: each is honoured or refused."""

import math
from dataclasses import dataclass

from models.generate import Sampling

MAX_NEW_TOKENS = 256  # where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing
STOPS = ("until", "stop")
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
KNOWN = (*LENGTHS, *STOPS, "do_sample", *SAMPLING, "seed", "num_beams")
NEUTRAL = {"temperature": (0, 1), "top_p": (1,), "top_k": (0,)}  # what has no effect on the likeliest token


@dataclass(frozen=True)
class GenerationOptions:
    """How one request is continued.

    Attributes:
        max_new_tokens: at most.
        stops: texts before whose first the continuation ends; ``until`` and ``stop`` together.
        seed: of the whole evaluation; requests draw independently of each other.
    """

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int


def read_options(given: dict) -> GenerationOptions:
    """As transformers means them: tokens are sampled where ``do_sample`` says so, at a temperature of 1 if none is
    given. A temperature alone does not: lm_eval's cache would take such requests for greedy ones, and give one answer
    to all. None stands for an option that is not given.

    Raises:
        ValueError: an option is unknown, impossible, contradicts another, or would have no effect.
    """
    given = {key: value for key, value in given.items() if value is not None}
    unknown = sorted(set(given) - set(KNOWN))
    if unknown:
        raise ValueError(
            f"there is no generation option {', '.join(unknown)}: leave it out; known are {', '.join(KNOWN)}"
        )
    if given.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams={given['num_beams']}: there is no beam search here, only num_beams=1")
    lengths = {key: _whole(key, given[key], least=1) for key in LENGTHS if key in given}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in lengths.items())} contradict each other: give one of them")
    length = next(iter(lengths.values()), MAX_NEW_TOKENS)
    return GenerationOptions(length, _stops(given), _sampling(given), _whole("seed", given.get("seed", 0), least=0))


def _stops(given: dict) -> tuple[str, ...]:
    texts = []
    for key in STOPS:
        value = given.get(key, [])
        texts += value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"until and stop must be texts; got {texts}")
    return tuple(text for text in texts if text)


def _sampling(given: dict) -> Sampling:
    for name in SAMPLING:
        if isinstance(given.get(name, 0), bool) or not isinstance(given.get(name, 0), int | float):
            raise ValueError(f"{name}={given[name]!r} must be a number")
    do_sample = given.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample={do_sample!r} must be true or false")
    penalty = float(given.get("repetition_penalty", 1.0))
    if not do_sample:
        idle = [f"{key}={given[key]}" for key, values in NEUTRAL.items() if key in given and given[key] not in values]
        if idle:
            raise ValueError(f"{', '.join(idle)} would have no effect: add do_sample=True, or leave it out")
        return Sampling(repetition_penalty=penalty)
    temperature = float(given.get("temperature", 1.0))
    if not 0 < temperature < math.inf:
        raise ValueError(f"do_sample=True with temperature={temperature}: give one above 0, or do_sample=False")
    top_k = _whole("top_k", given.get("top_k", 0), least=0)
    return Sampling(temperature, float(given.get("top_p", 1.0)), top_k, penalty)


def _whole(name: str, value: float, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
        raise ValueError(f"{name}={value} must be a whole number, at least {least}")
    return int(value)
