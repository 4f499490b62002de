"""Our checkpoints as a model of lm-evaluation-harness.

    python -m experiments.evaluation.harness --model dashattn --model_args run=outputs/NAME,knob=4 --tasks hellaswag

is lm_eval's own command line with this model registered; lm_eval looks for no plug-ins, so ``lm_eval`` alone does not
know it. From evaluate.py: ``tasks=[lm_eval/hellaswag]``, which makes rows like any other task.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data import IGNORE, TextTokenizer
from data.cache import fingerprint
from data.prompts import chat_tokenizer
from experiments.errors import user_errors
from experiments.evaluation.folder import locate_model
from experiments.evaluation.lm_eval_options import read_options
from experiments.evaluation.target import build_model
from experiments.evaluation.tasks.base import SparsityTally, generate_measured, in_parts
from experiments.host_memory import limit_memory
from models import Transformer
from models.generate import padded


@register_model("dashattn")
class HarnessModel(TemplateLM):
    """Rows of a batch are padded at their ends, which causal attention never sees.

    Args:
        run: run directory, checkpoint or Hugging Face folder.
        knob: of the attention's sparsity; None: as trained.
        batch_size: rows of a forward pass.
        max_length: tokens of context and continuation; longer contexts lose their beginning. None: model.max_seq_len.
        device: auto | cpu | cuda; lm_eval's --device, where cuda:0 is the same as cuda. None: auto.

    Raises:
        ValueError: no such run, or one that was not trained on text.
    """

    def __init__(
        self,
        run: str,
        knob: float | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,  # lm_eval passes it on; nothing is tuned here
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: a number of rows is needed, at least 1")
        target = locate_model(run, (device or "auto").split(":")[0], max_length)
        model = build_model(target)
        if knob is not None:
            model.set_knob(knob)
        tokenizer = target.tokenizer
        if tokenizer is None:
            raise ValueError(f"{run} was trained on {target.train.data.name}, not on text: lm_eval needs a tokenizer")
        self._set(model, tokenizer, int(batch_size), max_length)

    @classmethod
    def of(cls, model: Transformer, tokenizer: TextTokenizer, batch_size: int, max_length: int) -> "HarnessModel":
        """From a model in memory."""
        harness_model = cls.__new__(cls)
        harness_model._set(model, tokenizer, batch_size, max_length)
        return harness_model

    def _set(self, model: Transformer, tokenizer: TextTokenizer, batch_size: int, max_length: int | None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = max_length or model.config.max_seq_len
        self._device = next(model.parameters()).device
        self._template: str | None = None  # the chat template, once it is asked for
        self.sparsity = SparsityTally()  # of all that was scored, and of the prompts

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text is read behind where it has no context: the token that begins texts, or the end of another."""
        begin = self.tokenizer.named_bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Special tokens spelled out in a text are those tokens, as with every tokenizer under lm_eval: chat templates
        are texts. Behind the token that begins the model's documents, unless ``add_special_tokens`` is False."""
        ids = self.tokenizer.encode_markup(string)
        return ids if add_special_tokens is False else self.tokenizer.begin(ids)

    @functools.cached_property
    def chat_tokenizer(self):
        return chat_tokenizer(self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, or the one it calls so; lm_eval asks for it before the first prompt.

        Raises:
            ValueError: it has none, or none of that name.
        """
        if not chat_template:
            return None
        templates = self.chat_tokenizer.chat_template
        names = sorted(templates) if isinstance(templates, dict) else []
        if chat_template is not True and chat_template not in names:
            raise ValueError(f"the tokenizer has no chat template {chat_template!r}, its names are {names}: give none")
        self._template = self.chat_tokenizer.get_chat_template(None if chat_template is True else chat_template)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The history as the text that the tokenizer's template makes of it.

        Raises:
            ValueError: there is no template, or it refuses the history.
        """
        from jinja2 import TemplateError

        try:
            return self.chat_tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except TemplateError as error:
            raise ValueError(f"the tokenizer's chat template refuses this history: {error}") from error

    @property
    def stop_tokens(self) -> list[int]:
        """What ends a text and, once the chat template is in use, a turn."""
        turn_end = self.chat_tokenizer.eos_token_id if self._template is not None else None
        return [self.eot_token_id] + ([turn_end] if turn_end not in (None, self.eot_token_id) else [])

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is the greedy one) of each (key, context,
        continuation). White space is no context.

        Raises:
            ValueError: a continuation is longer than ``max_length``.
        """
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"a continuation has {longest} tokens, more than max_length={self.max_length}: raise it")
        rows = [
            # The last token is no input. A context that is too long loses its beginning.
            (((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :][:-1], continuation)
            for _, context, continuation in requests
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        results: list[tuple[float, bool] | None] = [None] * len(rows)
        bar = tqdm(total=len(rows), disable=disable_tqdm, desc="log-likelihoods")
        parts = in_parts(order, self.batch_size, lambda indices: self._score([rows[i] for i in indices]))
        for indices, (scores, sparsity) in parts:
            self.sparsity.merge(*sparsity)
            for i, score in zip(indices, scores, strict=True):
                results[i] = score
                key = requests[i][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, score)
            bar.update(len(indices))
        return results

    @torch.inference_mode()
    def _score(self, rows: list[tuple[list[int], list[int]]]) -> tuple[list[tuple[float, bool]], list[SparsityTally]]:
        """Of (inputs, the targets of the last of them): the targets' log-probability, and whether all are greedy."""
        inputs = [row for row, _ in rows]
        targets = [[IGNORE] * (len(row) - len(last)) + last for row, last in rows]
        labels_BT = padded(targets, IGNORE, self._device)
        lengths = torch.tensor([len(row) for row in inputs], device=self._device)
        ids_BT = padded(inputs, self.eot_token_id, self._device)
        output = self.model(ids_BT, labels=labels_BT, lengths=lengths, return_stats=True)
        log_p = (-output.token_losses.double().sum(1)).tolist()
        is_greedy = (output.is_likeliest | (labels_BT == IGNORE)).all(1).tolist()
        return list(zip(log_p, is_greedy, strict=True)), SparsityTally.of_rows(output.stats, map(len, inputs))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, read in windows of max_length tokens, each token predicted once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)  # the prefix stands before them
            pieces = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first of their stop strings.

        What is sampled depends on the seed, the prompt and how often that was asked for before: samples of one prompt
        differ, and neither the batch nor the other requests matter.
        """
        options = [read_options(request.args[1]) for request in requests]
        for option in options:
            if option.max_new_tokens >= self.max_length:
                raise ValueError(
                    f"max_gen_toks={option.max_new_tokens} leaves no room for a context within {self.max_length}"
                )
        prompts = [
            (self.tok_encode(request.args[0]) or [self.prefix_token_id])[-(self.max_length - option.max_new_tokens) :]
            for request, option in zip(requests, options, strict=True)
        ]
        seeds, asked = [], Counter()
        for prompt, option in zip(prompts, options, strict=True):
            key = (option.seed, *prompt)
            seeds.append(int(fingerprint(*key, asked[key]), 16))
            asked[key] += 1
        groups: dict[tuple, list[int]] = {}  # what is generated alike
        for i, option in enumerate(options):
            groups.setdefault((option.max_new_tokens, option.sampling), []).append(i)
        texts: list[str | None] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generating")
        for (max_new_tokens, sampling), group in groups.items():

            def answer(indices: list[int], max_new_tokens=max_new_tokens, sampling=sampling):
                batch = [prompts[i] for i in indices]
                return generate_measured(
                    self.model,
                    batch,
                    max_new_tokens=max_new_tokens,
                    stop_tokens=self.stop_tokens,
                    sampling=sampling,
                    seeds=[seeds[i] for i in indices],
                )

            for indices, (continuations, sparsity) in in_parts(group, self.batch_size, answer):
                self.sparsity.merge(*sparsity)
                for i, tokens in zip(indices, continuations, strict=True):
                    texts[i] = _cut(self.tokenizer.decode(tokens), options[i].stops)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update(len(indices))
        return texts


def _cut(text: str, stops: Sequence[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def main() -> None:
    """lm_eval's command line. Without ``--device`` it takes what the machine has; lm_eval's own choice is cuda:0."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.config import evaluate_config

    @dataclass(slots=True)
    class Config(evaluate_config.EvaluatorConfig):
        device: str | None = "auto"

    evaluate_config.EvaluatorConfig = Config
    with user_errors():
        limit_memory("auto")
        try:
            cli_evaluate()
        except ConnectionError as error:  # of the libraries that fetch a task's data
            said = " ".join(str(error).split())
            raise ValueError(f"{said}: go online once for the data of these tasks, which then stay here") from error


if __name__ == "__main__":
    main()
