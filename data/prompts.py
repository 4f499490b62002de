"""From a sample to the token ids that a base or a chat model continues.

A chat model gets the prompt as the user's turn and begins its own turn with the answer prefix, as in RULER.
"""

from dataclasses import dataclass

from data.tasks.sample import Sample
from data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Template:
    """What stands before and after the user's words; ``markers`` in them are special tokens of the vocabulary.

    Attributes:
        stop: the marker that ends the model's turn; None: the tokenizer's end-of-document token alone.
    """

    before: str = ""
    after: str = ""
    markers: tuple[str, ...] = ()
    stop: str | None = None


TEMPLATES = {
    "base": Template(),
    "chatml": Template(
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "llama3": Template(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "mistral": Template("[INST] ", " [/INST]"),
}


class PromptEncoder:
    """Token ids of samples under one template.

    Raises:
        ValueError: no such template, or the vocabulary lacks its markers.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str = "base") -> None:
        if template not in TEMPLATES:
            raise ValueError(f"template={template}: choose one of {', '.join(TEMPLATES)}")
        self.tokenizer, self.name, self.template = tokenizer, template, TEMPLATES[template]
        missing = [m for m in self.template.markers if tokenizer.backend.token_to_id(m) is None]
        if missing:
            raise ValueError(
                f"template={template} needs the tokens {', '.join(missing)}, which the tokenizer lacks: "
                "use template=base, or that of the model's family"
            )
        self.before = tokenizer.begin(tokenizer.encode_markup(self.template.before))
        self.after = tokenizer.encode_markup(self.template.after)

    @property
    def stop_tokens(self) -> list[int]:
        stop = self.template.stop
        return [self.tokenizer.eos_id] + ([self.tokenizer.backend.token_to_id(stop)] if stop else [])

    def encode(self, sample: Sample) -> list[int]:
        """A base model reads prompt and answer prefix as one text, without white space at its end, which the tokens
        of a continuation begin with."""
        if self.template == TEMPLATES["base"]:
            return [*self.before, *self.tokenizer.encode((sample.prompt + sample.answer_prefix).rstrip())]
        prefix = self.tokenizer.encode(sample.answer_prefix.strip())
        return [*self.before, *self.tokenizer.encode(sample.prompt), *self.after, *prefix]

    def evidence(self, sample: Sample) -> list[tuple[int, int]]:
        """For each piece of evidence, the positions [first, last) of its tokens in ``encode(sample)``."""
        is_base = self.template == TEMPLATES["base"]
        text = (sample.prompt + sample.answer_prefix).rstrip() if is_base else sample.prompt
        offsets = self.tokenizer.backend.encode(text, add_special_tokens=False).offsets
        spans = []
        for piece in sample.evidence:
            start = text.index(piece)
            inside = [i for i, (a, b) in enumerate(offsets) if a < start + len(piece) and b > start]
            spans.append((len(self.before) + inside[0], len(self.before) + inside[-1] + 1))
        return spans
