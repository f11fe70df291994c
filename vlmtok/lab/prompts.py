"""From a question and a picture to what ``generate`` takes."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..errors import ParameterError
from ..guard import guarded
from ..loading.models import Loaded
from ..loading.problems import taken_in
from ..loading.processors import mark_of

DEFAULT_PROMPT = "Describe this picture."

NO_PROMPT = "{!r} is a vision tower: it takes a picture and no prompt"


@guarded
def encode_prompt(model: Loaded, image: Image.Image, prompt: str, batch: int = 1) -> dict[str, Any]:
    """What `generate` takes for a picture and a prompt.

    Args:
        model: from `load`.
        image: RGB.
        prompt: a question, which the processor's chat template frames; or, with the processor's image marks in it, the
            text as the model is to see it.
        batch: how often.

    Returns:
        Tensors on the model's device.

    Raises:
        ParameterError: an empty prompt, or not one image mark for one picture.
        LoadError: the processor cannot take the picture.
    """
    processor = model.processor
    if not prompt.strip():
        raise ParameterError("the prompt is empty")
    marks = prompt.count(mark_of(processor, prompt))
    if marks > 1:
        raise ParameterError(f"the prompt has {marks} image marks for one picture")
    if marks or not getattr(processor, "chat_template", None):
        text = prompt if marks else f"{mark_of(processor)}{prompt}"
        if getattr(processor, "num_query_tokens", None):  # BLIP's processors put the marks in themselves
            text = text.replace(mark_of(processor, text), "").strip()
        words = [text] * batch
        made = taken_in(
            model.name, image.size, lambda: processor(images=[[image]] * batch, text=words, return_tensors="pt")
        )
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        made = taken_in(
            model.name,
            image.size,
            lambda: processor.apply_chat_template(
                [[{"role": "user", "content": content}]] * batch,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ),
        )
    made = made.to(model.device, model.dtype)  # floating tensors alone take the dtype
    return {name: value for name, value in made.items() if name != "labels"}
