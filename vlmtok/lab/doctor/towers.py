"""The self-test of a vision model: timm, open_clip, or transformers without a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...compression import compress
from ...core.site import Layout
from .facts import OK, Broken, Fact, check_close, check_cut, check_equal, settle, told
from .probes import Fixed, Nothing, cut_sites, scattered, some
from .replay import blocks_of, cut_tower

TEXT_LENGTH = 12
"""Ids of a text."""


class Vision:
    """A vision model and two pictures; a dual encoder gets two texts too.

    Args:
        model: bare.
        run: from the model and pixels, its output, `[B, ...]`.
        pixels: `[2, 3, H, W]`.
        adapter: as for `vlmtok.compress`.
    """

    def __init__(
        self,
        model: Any,
        run: Callable[[Any, Tensor], Tensor],
        pixels: Tensor,
        adapter: str | None = None,
    ) -> None:
        self.model, self.run, self.pixels = model, run, pixels
        self.adapter, self.adapter_name = adapter, ""
        self.texts: Tensor | None = None
        self.ends: tuple[int, ...] = ()
        self.bare = self.bare_text = torch.empty(0)

    def open(self) -> None:
        """Asks the adapter where the model can be cut.

        Raises:
            VlmtokError: it is not carried.
        """
        from ...adapters import adapter_for

        carrier = adapter_for(self.model, self.adapter)
        self.layout: Layout = carrier.layout()
        self.cuts = cut_sites(self.layout)
        if "text" in self.cuts:
            self.texts, self.ends = texts_for(self.model)
            self.bare_text = self.read(self.texts)
        self.adapter_name = carrier.name

    # ------------------------------------------------------------------ the model
    @torch.no_grad()
    def look(self) -> Tensor:
        """Output for the pictures."""
        return self.run(self.model, self.pixels)

    @torch.no_grad()
    def read(self, texts: Tensor) -> Tensor:
        """Output for texts, `[B, F]`."""
        if hasattr(self.model, "encode_text"):
            encoded: Tensor = self.model.encode_text(texts)
            return encoded
        made = self.model.get_text_features(input_ids=texts)
        return made if isinstance(made, Tensor) else made.pooler_output

    # ------------------------------------------------------------------ facts
    def host(self) -> float:
        """The bare model runs, and says of a batch what it says of a picture alone."""
        self.bare = self.look()
        with torch.no_grad():
            alone = self.run(self.model, self.pixels[1:2])
        return check_close(self.bare[1:2], alone, "outputs of a batch", "the picture's alone")

    def neutral(self) -> float:
        """A compression that cuts nothing changes nothing, nor does one that was removed."""
        self.open()
        method = Nothing()
        with compress(self.model, method, adapter=self.adapter):
            found = self.look()
            if self.texts is not None:
                check_equal(self.read(self.texts), self.bare_text, "outputs of the text tower")
        check_equal(found, self.bare, "outputs")
        sites = [site for site in method.sites(self.layout) if site.stage != "text" or self.texts is not None]
        missed = [str(site) for site in sites if str(site) not in method.asked]
        if missed:
            raise Broken(f"methods were never asked at {', '.join(missed)}")
        return check_equal(self.look(), self.bare, "outputs after removal")

    def tower(self) -> float:
        """A cut between attention and MLP is the output of that block, shortened, and the blocks behind it."""
        stage, site = self.layout.stages["vision"], self.cuts["tower"]
        with told("with the cut"), compress(self.model, Fixed(site), adapter=self.adapter):
            found = self.look()
        blocks = blocks_of(_visual(self.model), stage.depth)
        with told("the oracle itself"), cut_tower(blocks, site.layer or 0, some, stage.num_prefix):
            wanted = self.look()
        return check_cut(found, wanted, self.bare, "outputs")

    def text(self) -> float:
        """The same in the text tower: the first and the last token of the text stay, and rows get their length back."""
        assert self.texts is not None
        stage, site = self.layout.stages["text"], self.cuts["text"]
        with told("with the cut"), compress(self.model, Fixed(site), adapter=self.adapter):
            found = self.read(self.texts)
        blocks, wanted = blocks_of(_textual(self.model), stage.depth), []
        for row, end in zip(self.texts, self.ends):

            def choose(length: int, end: int = end) -> Tensor:
                others = [column for column in range(1, length) if column != end]
                return torch.tensor(sorted([0, end, *(others[i] for i in scattered(len(others)))]))

            with told("the oracle itself"), cut_tower(blocks, site.layer or 0, choose, 0, stage.depth - 1):
                wanted.append(self.read(row[None]))
        return check_cut(found, torch.cat(wanted), self.bare_text, "outputs of the text tower")

    def facts(self) -> list[Fact]:
        """All of them; where the host fails bare, that one alone."""
        bare = settle("bare", self.host)
        if bare.status != OK:
            return [bare]
        found = [bare, settle("neutral", self.neutral)]
        if not self.adapter_name:
            return found
        found.append(settle("tower", self.tower))
        return [*found, settle("text", self.text)] if self.texts is not None else found


def _visual(model: Any) -> Any:
    """The part of a model that sees: of a dual encoder, its vision tower."""
    return getattr(model, "visual", getattr(model, "vision_model", model))


def _textual(model: Any) -> Any:
    """The part of a dual encoder that reads; open_clip's CLIP keeps the blocks on itself."""
    for name in ("text", "text_model", "transformer"):
        if isinstance(getattr(model, name, None), torch.nn.Module):
            return getattr(model, name)
    return model


def texts_for(model: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Two texts for a dual encoder: ids `[2, T]`, and the column of each one's end, which the head reads.

    Args:
        model: a dual encoder of open_clip or transformers.
    """
    embeddings = [part for part in _textual(model).modules() if isinstance(part, torch.nn.Embedding)]
    table = max([*embeddings, *_own_embedding(model)], key=lambda part: part.num_embeddings)
    config = getattr(getattr(model, "config", None), "text_config", None)
    end = getattr(config, "eos_token_id", None)
    if end in (None, 2):  # the head reads the highest id
        end = table.num_embeddings - 1
    ends = (TEXT_LENGTH - 1, TEXT_LENGTH - 5)
    ids = torch.zeros(2, TEXT_LENGTH, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for row, column in enumerate(ends):
        ids[row, :column] = torch.randint(1, min(int(end), table.num_embeddings), (column,), generator=generator)
        ids[row, column] = end
    return ids.to(table.weight.device), ends


def _own_embedding(model: Any) -> list[Any]:
    """open_clip's CLIP keeps the table of its text tower on itself."""
    own = getattr(model, "token_embedding", None)
    return [own] if isinstance(own, torch.nn.Embedding) else []
