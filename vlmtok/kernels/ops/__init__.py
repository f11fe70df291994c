"""The public ops: check the arguments, choose the path, run."""

from .matching import *  # noqa: F403
from .matching import MergeRows  # noqa: F401
