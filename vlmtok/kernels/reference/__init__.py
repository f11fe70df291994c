"""Plain torch definitions of the ops: what each means, and the path on CPU."""

from .merging import *  # noqa: F403
