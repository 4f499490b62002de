"""Our checkpoints as a model of lm-evaluation-harness.

    python -m experiments.evaluation.harness --model dashattn --model_args run=outputs/NAME,knob=4 --tasks hellaswag

is lm_eval's own command line with this model registered; lm_eval looks for no plug-ins, so ``lm_eval`` alone does not
know it. From evaluate.py: ``tasks=[lm_eval/hellaswag]``, which makes rows like any other task.
"""

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from dashattn.stats import AttentionStats
from data import TextTokenizer
from experiments.evaluation.target import build_model, locate, validation_stream
from experiments.evaluation.tasks.base import SparsityTally
from models import Transformer
from models.generate import generate

MAX_NEW_TOKENS = 256  # where a task does not say


@register_model("dashattn")
class HarnessModel(TemplateLM):
    """Rows of a batch are padded at their ends, which causal attention never sees.

    Args:
        run: run directory or checkpoint.
        knob: of the attention's sparsity; None: as trained.
        batch_size: rows of a forward pass.
        max_length: tokens of context and continuation; longer contexts lose their beginning. None: model.max_seq_len.
        device: auto | cpu | cuda; lm_eval's --device, where cuda:0 is the same as cuda.

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
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size={batch_size}: a number of rows is needed")
        target = locate(run, (device or "auto").split(":")[0])
        model = build_model(target)
        if knob is not None:
            model.set_knob(knob)
        tokenizer = validation_stream(target).tokenizer
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
        self.sparsity = SparsityTally()  # of all that was scored, and of the prompts

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether it is the greedy one) of each (key, context,
        continuation)."""
        rows = [
            # The last token is no input. A context that is too long loses its beginning.
            ((context + continuation)[-(self.max_length + 1) :][:-1], continuation[-self.max_length :])
            for _, context, continuation in requests
        ]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        results: list[tuple[float, bool] | None] = [None] * len(rows)
        for start in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm, desc="log-likelihoods"):
            indices = order[start : start + self.batch_size]
            logits_BTV = self._logits([rows[i][0] for i in indices])
            for i, logits_TV in zip(indices, logits_BTV, strict=True):
                inputs, continuation = rows[i]
                logits_TV = logits_TV[len(inputs) - len(continuation) : len(inputs)].float()
                targets = torch.tensor(continuation, device=self._device)
                log_p = -F.cross_entropy(logits_TV, targets, reduction="sum").item()
                results[i] = (log_p, bool((logits_TV.argmax(-1) == targets).all()))
                key = requests[i][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, results[i])
        return results

    @torch.inference_mode()
    def _logits(self, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.eot_token_id] * (longest - len(row)) for row in rows], device=self._device)
        output = self.model(ids, return_stats=True)
        for i, row in enumerate(rows):
            own = [
                AttentionStats(*(x[i : i + 1, : len(row)] for x in (s.active_tokens, s.positions, s.routing_reads)))
                for s in output.stats
            ]
            self.sparsity.add(own, packed=False)
        return output.logits

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, read in windows of max_length tokens, each token predicted once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
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
        """Continuations, cut before the first of their stop strings."""
        texts: list[str | None] = [None] * len(requests)
        groups: dict[tuple, list[int]] = {}  # what is generated alike
        for i, request in enumerate(requests):
            options = request.args[1]
            new_tokens = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
            if new_tokens >= self.max_length:
                raise ValueError(f"max_gen_toks={new_tokens} leaves no room for a context within {self.max_length}")
            groups.setdefault((new_tokens, temperature, float(options.get("top_p", 1.0))), []).append(i)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="generating")
        for (new_tokens, temperature, top_p), group in groups.items():
            for start in range(0, len(group), self.batch_size):
                indices = group[start : start + self.batch_size]
                room = self.max_length - new_tokens
                prompts = [(self.tok_encode(requests[i].args[0]) or [self.eot_token_id])[-room:] for i in indices]
                self._logits(prompts)
                continuations = generate(
                    self.model,
                    prompts,
                    max_new_tokens=new_tokens,
                    stop_tokens=[self.eot_token_id],
                    temperature=temperature,
                    top_p=top_p,
                )
                for i, tokens in zip(indices, continuations, strict=True):
                    until = requests[i].args[1].get("until") or []
                    texts[i] = _cut(self.tokenizer.decode(tokens), [until] if isinstance(until, str) else until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                bar.update(len(indices))
        return texts


def _cut(text: str, stops: list[str]) -> str:
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
