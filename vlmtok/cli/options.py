"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer.core

Model = Annotated[
    str | None,
    typer.Option(
        help="A folder or hub id of a transformers checkpoint, timm:NAME or open_clip:NAME[:PRETRAINED]; by default "
        "the checkpoint that ships with the package.",
        show_default=False,
    ),
]

Picture = Annotated[
    str | None, typer.Option("--image", help="A picture file; by default a sample.", show_default=False)
]

Prompt = Annotated[str | None, typer.Option(help="What to ask about the picture; needs --image.", show_default=False)]

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help='A spec string, for instance "todre:keep=0.1" or "pitome:ratio=0.9+fastv". Give several, or values behind '
        'commas ("todre:keep=0.1,0.25,0.5"), for one table.',
        show_default=False,
    ),
]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]

Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]

Random = Annotated[bool, typer.Option("--random", help="Draw the weights instead of loading trained ones.")]

Adapter = Annotated[
    str | None, typer.Option(help='"generic-vlm" tries a family that is not listed.', show_default=False)
]

Overlay = Annotated[str, typer.Option(help="Where the picture with what became of its patches goes.")]

Html = Annotated[
    str | None,
    typer.Option(
        "--html",
        help="Where one self-contained page goes: the picture with a slider over stages and layers, answers, report.",
        show_default=False,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds of the measurement.")]

Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of the answer, which is greedy.")]

ImageSize = Annotated[
    list[str] | None,
    typer.Option(
        "--image-size",
        metavar="WxH",
        help="Width and height of a picture in pixels, for instance 896x672; give several for several pictures.",
        show_default=False,
    ),
]
