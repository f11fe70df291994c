"""What a compressed model must compute, written out: one picture or one row at a time, no cache, no padding, no hook.

Nothing here comes from the library under test, and masks, rotations and attention are written by hand; of the host
models only weights, norms, MLPs, embeddings and heads are used. What to keep is asked of a `Decider`, which sees
dense signals (softmax over all keys of the layer, then cut to the columns in question).
"""

from .blocks import vision_of
from .cuts import Cut, Decider, Moment, select
from .llava import Llava
from .rows import Plan
from .towers import run_tower

__all__ = ["Cut", "Decider", "Llava", "Moment", "Plan", "run_tower", "select", "vision_of"]
