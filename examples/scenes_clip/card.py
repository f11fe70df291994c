"""Examines the finished checkpoint, as any user loads it, and writes its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny_llava.card import weigh
from tiny_llava.training import logger
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

import vlmtok
from scenes_clip.cross import MERGED, SPEC
from vlmtok.evaluation.dual import CROSS_TOKENS
from vlmtok.evaluation.scenes.captioned import CLASSES, TEMPLATE
from vlmtok.evaluation.scenes.galleries import Shown, gallery, lone_pictures
from vlmtok.evaluation.scenes.shifts import SEVERITIES, shift

_LEFT = 256 - 6 * MERGED
WAYS = {
    "no reduction": None,
    "CrossGET, no guide": f"crossget:rv={MERGED}:guidance=None",
    "CrossGET, the class token guides": f"crossget:rv={MERGED}:guidance=cls",
    "CrossGET, untrained cross tokens": SPEC,
    "CrossGET, trained cross tokens": SPEC,
    "ToMe": f"tome:r={MERGED}",
}
Drawn = tuple[Sequence[Shown], Sequence[Image.Image]]
_FIGURES = ("zero-shot", "picture to text", "text to picture")


class Examined:
    """The checkpoint as transformers loads it.

    Args:
        folder: The checkpoint.
        device: Where it computes.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.clip = CLIPModel.from_pretrained(folder).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.no_grad()
    def see(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings of pictures, `[B, E]`."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        parts = [self.clip.get_image_features(pixel_values=part).pooler_output for part in pixels.split(100)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings of texts, `[T, E]`."""
        ids = self.processor(text=list(texts), padding="max_length", return_tensors="pt")["input_ids"].to(self.device)
        return F.normalize(self.clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)

    def classify(self, lone: Sequence[Shown], pictures: Sequence[Image.Image]) -> float:
        """Share of pictures whose class is told right, among 48."""
        sentences = [TEMPLATE.format(*one) for one in CLASSES]
        truth = torch.tensor([sentences.index(one.caption) for one in lone])
        return ((self.see(pictures) @ self.read(sentences).T).argmax(1).cpu() == truth).float().mean().item()

    def score(self, lone: Drawn, galleries: Sequence[Drawn]) -> list[float]:
        """Shares of right answers, in the order of `_FIGURES`."""
        found = [self.classify(*lone)]
        to_text, to_picture = [], []
        for shown, pictures in galleries:
            table = self.see(pictures) @ self.read([one.caption for one in shown]).T
            right = torch.arange(len(shown), device=self.device)
            to_text.append((table.argmax(1) == right).float().mean().item())
            to_picture.append((table.argmax(0) == right).float().mean().item())
        return [*found, sum(to_text) / len(galleries), sum(to_picture) / len(galleries)]


def examine(folder: Path, work: Path, device: torch.device, number: int) -> dict[str, Any]:
    """Measures everything the card says.

    Args:
        folder: The checkpoint.
        work: Folder of the training's state, for the time it took.
        device: Where to answer.
        number: Of galleries; as many hundred lone pictures.

    Returns:
        `ways`: the shares of `_FIGURES` by row of `WAYS`; `shifts`: shares of classes told right by shift and severity;
        `parameters`, `bytes`, `seconds` by phase and `device`.
    """
    examined = Examined(folder, device)
    lone, *galleries = (
        (shown, [one.picture.draw() for one in shown])
        for shown in (lone_pictures(100 * number), *(gallery(i) for i in range(number)))
    )
    figures: dict[str, Any] = {"galleries": number, "ways": {}, "shifts": {}}
    for name, spec in WAYS.items():
        if spec is None:
            figures["ways"][name] = examined.score(lone, galleries)
        else:
            with vlmtok.compress(examined.clip, spec) as run:
                if name == "CrossGET, trained cross tokens":
                    run.load_state_dict(load_file(folder / CROSS_TOKENS, str(device)))
                figures["ways"][name] = examined.score(lone, galleries)
        logger.info("%s: %s", name, " ".join(f"{share:.3f}" for share in figures["ways"][name]))
    for kind, strengths in SEVERITIES.items():
        rows = []
        for severity in range(1, 1 + len(strengths)):
            worse = [shift(picture, kind, severity, one.id) for one, picture in zip(*lone)]
            rows.append(examined.classify(lone[0], worse))
        figures["shifts"][kind] = rows
        logger.info("%s: %s", kind, " ".join(f"{share:.3f}" for share in rows))
    figures |= weigh(folder, work, ("clip", "cross"))
    figures["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    (work / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """Writes `README.md` beside the weights, from what `examine` measured."""
    ways = [f"| {name} | {' | '.join(f'{s:.1%}' for s in shares)} |" for name, shares in figures["ways"].items()]
    shifts = [f"| {name} | {' | '.join(f'{s:.1%}' for s in shares)} |" for name, shares in figures["shifts"].items()]
    text = _CARD.format(
        parameters=figures["parameters"] / 1e6,
        megabytes=figures["bytes"] / 1e6,
        pictures=100 * figures["galleries"],
        galleries=figures["galleries"],
        merged=MERGED,
        left=_LEFT,
        spec=SPEC,
        ways="\n".join(ways),
        shifts="\n".join(shifts),
        spent=", ".join(f"{phase} {spent['wall']:.0f} s" for phase, spent in figures["seconds"].items()),
        device=figures["device"],
    )
    (folder / "README.md").write_text(text, "utf-8")


_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# scenes-clip

A CLIP of {parameters:.1f} million parameters (half precision, stored for two libraries: {megabytes:.1f} MB)
that matches rendered pictures of one to four coloured shapes with captions. It ships with vlmtok so that
methods of token reduction can be measured on classification and retrieval without a download. It is no general
model: it knows the world described below and nothing else.

Both towers have 6 layers: pictures of 128 px in patches of 8 px, 256 tokens and a class token of width 128;
captions of 28 words of width 64.

```python
import open_clip
from transformers import CLIPModel, CLIPProcessor

clip, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
same, _, transform = open_clip.create_model_and_transforms(f"local-dir:{{folder}}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")
```

## Figures

Right answers on held-out pictures: zero-shot, {pictures:,} pictures of one large thing among clutter, 48
classes (colour and shape), "a picture of a red star"; retrieval, the first one found in {galleries} galleries
of 100 pictures and captions, each picture with four near-duplicates (one attribute changed, two exchanged,
places exchanged).

| way | zero-shot | picture to text | text to picture |
| --- | --- | --- | --- |
{ways}

Below the first row {merged} tokens are merged in every layer of the vision tower, which leaves {left} of 256. At
this budget merging costs next to nothing: most of a picture is backdrop, and merging like with like loses none
of it. Smaller budgets and worse pictures tell methods apart (`vlmtok eval scenes-clip`, `vlmtok eval
scenes-shift`).

Zero-shot without reduction on worse pictures:

| shift | 1 | 2 | 3 | 4 | 5 |
| --- | --- | --- | --- | --- | --- |
{shifts}

## Data

Everything is rendered by `vlmtok.evaluation.scenes.captioned`: large things of 12 to 13.5 px radius and small
ones of 5 to 7, on plain, graded or cluttered backdrops (grey lines and speckles). Captions name all things with
size and colour, the relation of the first two ("a small red star above a large blue ring with a large pink
cross"), the place of a lone one ("a small red star at the top left"). The split is by the SHA-256 of the
arrangement (what stands in which of 16 cells; of a lone thing, on which patch): one in sixteen is held out. In
training pixels get mild noise (8 levels at most) and mild contrast (0.8 to 1.1), and no blur.

## Training

One seeded, resumable command: `python examples/scenes_clip/make.py --device cuda`. CLIP's loss in batches of
1,024, in which every picture comes with three near-duplicates and more than one caption may be true; beside it
the patches of the last layer but one say through a linear reader what they lie on. On one {device}: {spent}.

`{cross}` holds cross tokens for CrossGET, `{spec}`: the model frozen, only the cross tokens trained, half of
the loss CLIP's and half CrossGET's. The paper fine-tunes the whole model with them, so that these figures are
no measure of its published ones; the rows above compare what changes without touching the model.

```python
import vlmtok
from safetensors.torch import load_file

run = vlmtok.compress(clip, "{spec}")
run.load_state_dict(load_file(f"{{folder}}/{cross}"))
```

## Limits

Other words, shapes, colours and relations are outside what it learned. Zero-shot means that the sentences of
the classes stand for classes; they did occur as captions of training pictures. Ranks of methods on this
checkpoint say what a method keeps of such pictures, not how it does on photographs.
""".replace("{cross}", CROSS_TOKENS)
