"""From a sample to the token ids that a base or a chat model continues.

A chat model gets the prompt as the user's turn and begins its own turn with the answer prefix, as in RULER.
"""

from dataclasses import astuple, dataclass

from tokenizers import Tokenizer

from data.cache import fingerprint
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
OWN_TEMPLATE = "tokenizer"  # the one that the tokenizer's folder holds
_CONTENT = "CONTENT-OF-THE-TURN"


def chat_tokenizer(tokenizer: TextTokenizer):
    """transformers' tokenizer, of which only the chat template and the token that ends a turn are used.

    Raises:
        ValueError: there is no template.
    """
    from transformers import PreTrainedTokenizerFast

    templates = tokenizer.settings.get("chat_template")
    if not templates:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has no chat template: set data.tokenizer to a folder whose "
            "tokenizer_config.json or chat_template.jinja holds one, or ask without (template=base)"
        )
    if isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    tokens = {name: tokenizer.settings[name] for name in ("bos_token", "eos_token") if name in tokenizer.settings}
    backend = Tokenizer.from_str(tokenizer.backend.to_str())  # theirs to change
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=templates, **tokens)


def own_template(tokenizer: TextTokenizer) -> Template:
    """What the tokenizer's chat template puts around one turn of the user's, where the answer begins.

    Raises:
        ValueError: it has none, or one that puts more than a frame around a turn.
    """
    from jinja2 import TemplateError

    chat = chat_tokenizer(tokenizer)
    turns = [{"role": "user", "content": _CONTENT}]
    try:
        text = chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"the chat template of {tokenizer.name} refuses one turn of a user: {error}") from error
    before, *after = text.split(_CONTENT)
    if len(after) != 1:
        raise ValueError(f"the chat template of {tokenizer.name} says a user's turn {len(after)} times: use another")
    ends = None if chat.eos_token_id in (None, tokenizer.eos_id) else chat.eos_token
    return Template(before, after[0], stop=ends)


class PromptEncoder:
    """Token ids of samples under one template.

    Attributes:
        key: differs with what the template says.

    Raises:
        ValueError: no such template, or the vocabulary lacks its markers.
    """

    def __init__(self, tokenizer: TextTokenizer, template: str = "base") -> None:
        if template not in (*TEMPLATES, OWN_TEMPLATE):
            raise ValueError(f"template={template}: choose one of {', '.join((*TEMPLATES, OWN_TEMPLATE))}")
        self.template = own_template(tokenizer) if template == OWN_TEMPLATE else TEMPLATES[template]
        self.tokenizer, self.name = tokenizer, template
        self.key = fingerprint(*astuple(self.template)) if template == OWN_TEMPLATE else template
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
