"""Generated long-context tasks in text: RULER, needle heat maps, recall from JSON. Any length, any tokenizer."""

from data.tasks.build import SUITES, TEXT_TASKS, TaskSet, build_set, held_out_text
from data.tasks.material import Material, read_haystack
from data.tasks.prompts import TEMPLATES, PromptEncoder
from data.tasks.sample import Sample, TextTask

__all__ = [
    "SUITES",
    "TEMPLATES",
    "TEXT_TASKS",
    "Material",
    "PromptEncoder",
    "Sample",
    "TaskSet",
    "TextTask",
    "build_set",
    "held_out_text",
    "read_haystack",
]
