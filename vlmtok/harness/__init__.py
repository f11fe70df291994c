"""The plug-in for lmms-eval: ``lmms-eval eval --model vlmtok --model_args pretrained=...,method=divprune:keep=0.111``.

lmms-eval finds `manifests` by the entry point group ``lmms_eval.models``; nothing else imports this wing, and lmms-eval
is no dependency of the package.
"""

from __future__ import annotations

import sys
from typing import Any

MODEL = "vlmtok"
"""The id behind ``--model``."""
CLASS = "vlmtok.harness.model.Vlmtok"


def manifests() -> list[Any]:
    """What lmms-eval registers: one id, for chat messages.

    Returns:
        A list of `lmms_eval.models.registry_v2.ModelManifest`.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    # Release 0.7.3 prints this table as the list of models and leaves out what entry points bring.
    listed = getattr(sys.modules.get("lmms_eval.models"), "AVAILABLE_CHAT_TEMPLATE_MODELS", None)
    if isinstance(listed, dict):
        listed.setdefault(MODEL, CLASS)
    return [ModelManifest(model_id=MODEL, chat_class_path=CLASS)]
