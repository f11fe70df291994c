"""A task's settings for generation, and the lengths of answers."""

import pytest

from vlmtok.harness.generation import IMPLICIT, LONGEST, cut, length, settings_for, stops


def test_runs_are_greedy_unless_a_temperature_is_asked():
    greedy = {"temperature": None, "top_p": None, "top_k": None, "do_sample": False}
    assert settings_for({}) == {"max_new_tokens": LONGEST, **greedy}
    asked = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert settings_for(asked) == {"max_new_tokens": 16, "num_beams": 1, **greedy}
    assert settings_for({"temperature": 0.7, "do_sample": False})["do_sample"] is False
    drawn = settings_for({"temperature": 0.7, "top_p": 0.9})
    assert drawn["do_sample"] and drawn["temperature"] == 0.7 and drawn["top_p"] == 0.9 and drawn["top_k"] is None


def test_answers_end_at_what_a_task_names_and_not_at_what_lmms_eval_adds():
    assert stops({"until": [IMPLICIT]}) == stops({}) == stops({"until": None}) == []
    assert stops({"until": "ASSISTANT:"}) == ["ASSISTANT:"]
    assert cut("a cat ASSISTANT: a dog", stops({"until": ["ASSISTANT:", IMPLICIT]})) == "a cat "
    assert cut("two\n\nlines", stops({"until": [IMPLICIT]})) == "two\n\nlines"


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([7, 8, 2, 0, 0], (3, True)),
        ([2, 0, 0], (1, False)),  # the model ended at once
        ([7, 8], (2, True)),  # cut off by the limit
        ([0, 0], (0, False)),
        ([9, 0], (1, False)),  # a second id that ends
    ],
)
def test_an_answer_ends_at_the_end_of_its_sequence(ids, found):
    assert length(ids, {2, 9}, 0) == found
