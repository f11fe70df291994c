"""Prompts: the chat template, marks of pictures, and prompts that do not fit one picture."""

import pytest
import torch
from support.checkpoints import llava, picture
from support.comparing import QUESTION, compare

from vlmtok import loading
from vlmtok.errors import ParameterError
from vlmtok.lab import prompts


def test_a_question_goes_through_the_chat_template_and_marks_pass_through(speaker):
    asked = prompts.encode_prompt(speaker, picture(), QUESTION)["input_ids"]
    typed = prompts.encode_prompt(speaker, picture(), f"USER: <image>\n{QUESTION} ASSISTANT:")["input_ids"]
    assert torch.equal(asked, typed)
    plain = prompts.encode_prompt(speaker, picture(), f"<image> {QUESTION}")["input_ids"]
    assert plain.shape[1] < asked.shape[1] and (plain == asked[0, 2]).sum() == 144
    twice = prompts.encode_prompt(speaker, picture(), QUESTION, batch=2)
    assert torch.equal(twice["input_ids"], asked.expand(2, -1)) and len(twice["pixel_values"]) == 2


def test_without_a_chat_template_the_mark_stands_in_front(tmp_path):
    model = loading.load(str(llava(tmp_path, template=False, layers=1)))
    ids = prompts.encode_prompt(model, picture(), QUESTION)["input_ids"]
    assert torch.equal(ids, prompts.encode_prompt(model, picture(), f"<image>{QUESTION}")["input_ids"])


@pytest.mark.parametrize(("prompt", "what"), [("<image> or <image> ?", "2 image marks"), ("  ", "empty")])
def test_prompts_that_do_not_fit_one_picture_are_refused(speaker, prompt, what):
    with pytest.raises(ParameterError, match=what):
        compare(speaker, picture(), prompt)
