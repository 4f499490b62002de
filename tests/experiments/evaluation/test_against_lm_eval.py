"""RULER's variable tracking as lm-evaluation-harness has it, against ours: the same prompts and scores."""

import random
import re

import numpy as np
import pytest

from data.tasks.niah import NOISE
from data.tasks.sample import Sample
from data.tasks.tracing import HOPS, TRACKING, question


def test_variable_tracking():
    """Their samples, put as ours are: but for white space around the noise, and for "assgined", as RULER spells it,
    the text is the same; answers that are right, half right and wrong score the same."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.ruler import common_utils, vt_utils

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - theirs
    scores = []
    for index in range(60):
        text, variables = vt_utils.generate_input_output(num_noises=30, num_chains=1, num_hops=HOPS)
        context, value = re.search(r"following text\.\n\n(.*)\nQuestion: .* the value (\d+)", text, re.DOTALL).groups()
        prompt, prefix = question(context, value, HOPS + 1)
        assert prompt + prefix + " " == text.replace("assgined", "assigned")
        assert context.count(NOISE) == 30
        assert re.sub(r"\s+", " ", context).count("VAR") == 2 * HOPS + 1
        prediction = " ".join(variables[: index % 6]).lower() + "\x07\n"
        (theirs,) = {
            score
            for score in common_utils.process_results({"max_length": 4096, "outputs": variables}, [prediction]).values()
            if score != -1
        }
        scores.append(Sample(prompt, prefix, variables).score(prediction, TRACKING.match))
        assert theirs == scores[-1]
    assert sum(scores) / len(scores) == pytest.approx(0.5)
    assert set(scores) == {0, 0.2, 0.4, 0.6, 0.8, 1}
    assert TRACKING.max_new_tokens == vt_utils.CONFIG["variable_tracking"]["tokens_to_generate"]
