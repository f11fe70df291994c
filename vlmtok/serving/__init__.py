"""Serving: what an engine that lays out prompts beforehand needs, without any engine.

`plan` checks a spec on a model, counts, and shortens tokens for engines with modules of their own. `Counter` counts
what stays of what a processor made of a picture, and `Encoder` gives what the language model is given of it, where the
tower is that of transformers. `integrations/vllm` builds on these alone.
"""

from .counter import Counter
from .encoder import Encoded, Encoder
from .item import Item, Left
from .plan import ServingPlan, plan

__all__ = ["Counter", "Encoded", "Encoder", "Item", "Left", "ServingPlan", "plan"]
