"""What refuses an evaluation before anything is read for it, and, where its run is still to be trained, before that."""

from dashattn.fields import user_path
from data import NO_TOKEN, MQARDataConfig, PackedDataConfig, TextTokenizer
from data.config import LEAST_VOCABULARY
from data.prompts import PromptEncoder
from data.task_sets import SUITES, TEXT_TASKS, check_set, haystack_corpora
from data.tokenizer import DEFAULT_EOS, train_bpe
from experiments.config import TrainConfig
from experiments.evaluation.config import PREFIX, ROUTING, EvaluateConfig, check_tasks
from experiments.evaluation.knobs import setpoints
from experiments.evaluation.lm_eval_task import manager_that_knows
from experiments.evaluation.tasks.streams import data_at
from experiments.files import check_exists
from experiments.origin import lying_at
from experiments.sparsity import doubt, turned_layers


def check_request(config: EvaluateConfig, train: TrainConfig) -> None:
    """Refuses what a run of the configuration ``train`` cannot be asked.

    Raises:
        ValueError: a task, length or file that cannot be, or a knob value or sparsity that the attention cannot have.
    """
    check_tasks(config, train)
    setpoints(config, train)
    for length in _lengths(config, train):
        try:
            data_at(train.data, length, config.rows or train.data.validation_rows, config.mqar)
        except ValueError as error:
            raise ValueError(f"rows of lengths={length} cannot be made: {error}") from None
    if not isinstance(train.data, MQARDataConfig):
        _check_text_tasks(config, train.data, _lengths(config, train))


def check_of_run(config: EvaluateConfig) -> None:
    """Refuses what is told of a Hugging Face folder alone. Raises ValueError."""
    if config.attention is not None:
        raise ValueError(f"attention=... is for a Hugging Face folder: the run {config.run} has its own, leave it out")


def check_ahead(config: EvaluateConfig, train: TrainConfig) -> list[str]:
    """Refuses an evaluation that would end without its rows when a run of the configuration ``train`` is there. Returns
    what its weights will decide, a line for each sparsity that they may not allow.

    Raises:
        ValueError: as ``check_request``, or other data, a template or a task of lm_eval that cannot be.
    """
    check_of_run(config)
    if config.data is not None:
        lying_at(train.data, config.data)
    check_request(config, train)
    if not isinstance(train.data, MQARDataConfig):
        for name in config.tasks:
            if name.startswith(PREFIX):
                manager_that_knows(name, config.task_folder)
        _check_template(config, train.data)
    model = train.model
    layers, group = turned_layers(train.attention, model.num_layers), model.num_heads // model.num_kv_heads
    places = [(sparsity, length) for sparsity in config.sparsities or () for length in _lengths(config, train)]
    said = [doubt(layers, sparsity, config.sparsity_count, length, group) for sparsity, length in places]
    return [line for line in said if line is not None]


def _lengths(config: EvaluateConfig, train: TrainConfig) -> list[int]:
    return list(dict.fromkeys(config.lengths or [train.data.seq_len]))


def _check_text_tasks(config: EvaluateConfig, data: PackedDataConfig, lengths: list[int]) -> None:
    """Of a suite is left out what it cannot have, unless that is all; what is named itself is not."""
    named = [*config.tasks, *(config.probes if ROUTING in config.tasks else ())]
    for name in dict.fromkeys(named):
        if name in TEXT_TASKS:
            for length in lengths:
                _check_text_task(name, config, data, length)
        elif name in SUITES:
            wrong = [_wrong(member, config, data, length) for member in SUITES[name] for length in lengths]
            if None not in wrong:
                raise ValueError(f"nothing of {name} can be had: {wrong[0]}")


def _check_text_task(name: str, config: EvaluateConfig, data: PackedDataConfig, length: int) -> None:
    needs = TEXT_TASKS[name].needs
    file = None if needs is None else getattr(config, needs)
    has_material = needs is None or file is not None or (needs == "haystack" and bool(haystack_corpora(data)))
    check_set(name, length, has_material=has_material)
    if file is not None:
        check_exists(user_path(file), f"give {needs}=FILE, of which samples of {name} are made")


def _wrong(*task) -> ValueError | None:
    try:
        _check_text_task(*task)
    except ValueError as error:
        return error
    return None


def _check_template(config: EvaluateConfig, data: PackedDataConfig) -> None:
    """By the tokenizer, if it is at hand; of one that is still to be trained all special tokens are known."""
    if config.template == "base":  # needs none
        return
    if data.tokenizer is None:
        eos_token = data.eos_token or DEFAULT_EOS
        bos_token = None if data.bos_token == NO_TOKEN else data.bos_token
        special_tokens = [token for token in (eos_token, bos_token) if token is not None]
        bare = train_bpe(iter(()), LEAST_VOCABULARY, *special_tokens)
        PromptEncoder(TextTokenizer(bare, eos_token, bos_token=bos_token), config.template)
    elif user_path(data.tokenizer).exists():
        PromptEncoder(TextTokenizer.load(data.tokenizer, data.eos_token, data.bos_token), config.template)
