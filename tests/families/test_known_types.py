"""Every vision-language type that the installed transformers knows has a row or is refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import pytest
import torch
import transformers as tf
from packaging.version import Version
from support import since
from transformers.models.auto import modeling_auto
from vlmtok.adapters.language.families import LOOKED_THROUGH, REFUSED, ROWS

import vlmtok
from vlmtok.errors import UnsupportedModel

TASKS = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
"""Tables of transformers that name a class for each model type that reads pictures, or anything, and writes text."""


def seeing() -> dict[str, type]:
    """Classes of the installed transformers that take pictures or clips, by the model type of their configuration."""
    found = {}
    for task in TASKS:
        for kind, name in getattr(modeling_auto, task).items():
            model = getattr(tf, name)
            if {"image", "video"} & set(model.input_modalities):
                found[tf.CONFIG_MAPPING[kind].model_type] = model
    return found


def unknown(types: Mapping[str, type]) -> list[str]:
    """Types that nobody looked at, as ``type (class)``."""
    return [f"{kind} ({model.__name__})" for kind, model in types.items() if kind not in ROWS and kind not in REFUSED]


def complain(missing: list[str], installed: str) -> None:
    """Fails for a release that was looked through, and warns for a newer one."""
    if not missing:
        return
    said = (
        f"transformers {installed} has types that take pictures and are neither carried nor refused: "
        f"{', '.join(missing)}. For each: try vlmtok.compress(model, method, adapter='generic-vlm') on a tiny model; "
        "where that works add a row to adapters/language/further_families.py and a tiny family to "
        "vlmtok/lab/tiny/further_families.py, and run tests/families; else add the reason to "
        "adapters/language/refused_families.py. Then raise LOOKED_THROUGH there"
    )
    here, known = Version(installed), Version(LOOKED_THROUGH)
    if (here.major, here.minor) > (known.major, known.minor):
        warnings.warn(said, UserWarning, stacklevel=2)
        return
    pytest.fail(said)


def test_every_type_is_carried_or_refused():
    assert len(seeing()) > 80
    complain(unknown(seeing()), tf.__version__)


def test_a_type_that_nobody_looked_at_fails_or_warns_where_the_host_is_newer():
    missing = unknown({**seeing(), "novel_vlm": tf.LlavaForConditionalGeneration})
    assert "novel_vlm (LlavaForConditionalGeneration)" in missing
    with pytest.raises(pytest.fail.Exception, match="novel_vlm .*further_families.py.*refused_families.py"):
        complain(missing, f"{LOOKED_THROUGH}.7")
    major, minor = LOOKED_THROUGH.split(".")
    with pytest.warns(UserWarning, match="novel_vlm"):
        complain(missing, f"{major}.{int(minor) + 1}.0")


def test_nothing_is_listed_that_takes_no_pictures():
    """And nothing that no release knows: types of newer ones than the installed wait for their release."""
    known = {*seeing(), *since.FAMILIES}
    assert {*ROWS, *REFUSED} <= known | {kind for kind in ROWS if kind in tf.CONFIG_MAPPING}
    assert not set(ROWS) & set(REFUSED)


KINDS = [kind for kind in seeing() if kind in REFUSED]


@pytest.mark.parametrize("adapter", [None, "generic-vlm"])
@pytest.mark.parametrize("kind", KINDS)
def test_refused_families_say_why(kind, adapter):
    """Their class and config are enough to know."""
    model = bare_shell(seeing()[kind], kind)
    assert model.config.model_type == kind
    with pytest.raises(UnsupportedModel) as said:
        vlmtok.compress(model, "random:keep=0.5", adapter=adapter)
    assert REFUSED[kind] in str(said.value)


def bare_shell(model_class, kind):
    """An instance with its config and without parts: building one takes seconds and gigabytes."""
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.config = tf.CONFIG_MAPPING[kind]()
    return model
