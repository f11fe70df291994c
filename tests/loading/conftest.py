"""A model that answers, as a folder holds it."""

from __future__ import annotations

import pytest
from support.checkpoints import llava

from vlmtok import loading


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return loading.load(str(llava(tmp_path_factory.mktemp("llava"))))
