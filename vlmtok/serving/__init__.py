"""Serving: what an engine that lays out prompts beforehand needs, without any engine.

`plan` checks a spec on a model and counts, `Counter` does so for what a processor made of pictures, `Encoder` gives what
a language model is given of them. `integrations/vllm` builds on these three alone.
"""

from .counter import Counter
from .encoder import Encoded, Encoder
from .item import Item, Left
from .plan import ServingPlan, plan

__all__ = ["Counter", "Encoded", "Encoder", "Item", "Left", "ServingPlan", "plan"]
