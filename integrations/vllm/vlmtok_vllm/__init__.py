"""vlmtok in vLLM: a plug-in that prunes and merges the tokens of pictures while a server runs.

vLLM calls `register` in each of its processes. Nothing of a server changes by that; who wants the plug-in names its
architecture: ``LLM(model, **vlmtok_vllm.engine_args("divprune:keep=64"))``.
"""

from __future__ import annotations

from typing import Any

from .versions import check_version

__all__ = ["ARCHITECTURE", "engine_args", "register"]

ARCHITECTURE = "VlmtokForConditionalGeneration"
"""The name under which vLLM knows the class that serves every family."""


def register() -> None:
    """Tells vLLM of the class; imports nothing heavy and touches no device, since every process calls it.

    Raises:
        ImportError: the installed vLLM is not one that this plug-in was written for.
    """
    from vllm import ModelRegistry

    check_version()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "vlmtok_vllm.model:VlmtokForConditionalGeneration")


def engine_args(spec: str | None = None) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, and of the server's ``--hf-overrides`` as JSON, that choose the plug-in.

    Args:
        spec: what acts on pictures where a request does not say, as for `vlmtok.compress`; None for nothing.
    """
    overrides: dict[str, Any] = {"architectures": [ARCHITECTURE]}
    if spec is not None:
        overrides["vlmtok"] = spec
    return {"hf_overrides": overrides}
