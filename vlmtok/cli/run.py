"""``vlmtok run``: a question about a picture, bare and compressed, side by side."""

from __future__ import annotations

from .application import Once, app
from .console import at_work, print_json, standard_output
from .inputs import compare_inputs, say_overlay, write_overlay
from .options import Adapter, Device, Dtype, Json, Method, Model, Overlay, Picture, Prompt, Random, Rounds, Tokens


@app.command(cls=Once)
def run(
    model: Model = None,
    image: Picture = None,
    prompt: Prompt = None,
    method: Method = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overlay: Overlay = "overlay.png",
    max_new_tokens: Tokens = 32,
    rounds: Rounds = 5,
    random: Random = False,
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture, bare and compressed, side by side."""
    with at_work() as progress:
        result, picture = compare_inputs(
            progress, model, image, prompt, method, device, dtype, overlay, max_new_tokens, rounds, random, adapter
        )
        path, words = write_overlay(result, overlay)
    if as_json:
        print_json({**result.to_dict(), "image": picture, "overlay": path, "overlay_words": words})
        return
    console = standard_output()
    console.print(f"picture  {picture}", highlight=False, soft_wrap=True)
    console.print(result)
    say_overlay(console, path, words)
