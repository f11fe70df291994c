"""What tests of lifetimes compress."""

from __future__ import annotations

import pytest
from support import models
from support.checks import Subject
from support.lifetimes import EVERY


@pytest.fixture(params=EVERY)
def subject(request):
    return Subject(request.param, models.fresh(request.param))


@pytest.fixture
def vit():
    return Subject("timm ViT", models.fresh("timm ViT"))
