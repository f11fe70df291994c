"""An album as tensors: on a GPU all of it at once, on a CPU row by row from its files."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tiny_llava.tower import MEAN, PATCH, STD
from torch import Tensor

from scenes_llava.album import Album
from scenes_llava.targets import ATTRIBUTES, GRIDS

Rows = np.ndarray
_NOISE = 9  # levels of pixel noise are drawn below this


class Store:
    """Rows of an album as tensors on a device.

    Args:
        album: The pages.
        device: Where they are wanted.
    """

    def __init__(self, album: Album, device: torch.device) -> None:
        self.album, self.device = album, device
        self._resident: dict[str, Tensor] = {}
        if device.type == "cuda":
            self._resident = {
                name: torch.from_numpy(np.ascontiguousarray(a)).to(device) for name, a in album.arrays.items()
            }

    def __len__(self) -> int:
        return len(self.album)

    def rows(self, name: str, rows: Rows) -> Tensor:
        """Rows of one of the album's arrays, `[B, ...]`, integers as int64."""
        if name in self._resident:
            found = self._resident[name][torch.from_numpy(rows).to(self.device)]
        else:
            order = np.argsort(rows)  # a file is read in order
            found = torch.from_numpy(self.album.arrays[name][rows[order]][np.argsort(order)]).to(self.device)
        return found.long() if found.dtype in (torch.int8, torch.int16) and name != "pixels" else found

    def pixels(self, rows: Rows, grid: int, noise: torch.Generator | None) -> Tensor:
        """Pictures as the processor hands them to the tower, `[B, 3, grid * 8, grid * 8]` floats.

        Args:
            rows: Which pages.
            grid: Patches a side: the page is shrunk where that is less than 24.
            noise: Draws pixel noise; None adds none.
        """
        pixels = self.rows("pixels", rows).permute(0, 3, 1, 2).float()
        if noise is not None:
            strength = torch.randint(0, _NOISE, (len(rows), 1, 1, 1), generator=noise, device=self.device)
            pixels = pixels + (2 * torch.rand(pixels.shape, generator=noise, device=self.device) - 1) * strength
        if grid != GRIDS[0]:
            pixels = F.interpolate(pixels, size=grid * PATCH, mode="bicubic", antialias=True)
        mean, std = (torch.tensor(value, device=self.device)[:, None, None] for value in (MEAN, STD))
        return (pixels.round().clamp(0, 255) / 255 - mean) / std

    def patches(self, rows: Rows, grid: int) -> dict[str, Tensor]:
        """What each patch shows, `[B, G * G]` each.

        Returns:
            `owner`, `step`, `center`, `fair` as in `targets.Patches`; for patches on a mark its `kind`, `color`,
            `small`, `row`, `column`, `counted`, and `char`: the digit it shows, all from 1, 0 for none.
        """
        found = {name: self.rows(f"{name}{grid}", rows) for name in ("owner", "step", "center", "fair")}
        owner = found["owner"].clamp(min=0)
        marks = self.rows("marks", rows)
        on = found["owner"] >= 0
        known = torch.gather(marks, 1, owner[..., None].expand(-1, -1, marks.shape[2])) * on[..., None]
        for i, name in enumerate(ATTRIBUTES[:6]):
            found[name] = known[..., i]
        digit = (6 + found["step"] - 1).clamp(min=6)
        found["char"] = known.gather(2, digit[..., None])[..., 0] * (found["step"] > 0)
        return found


def seeded(device: torch.device, *seed: int) -> torch.Generator:
    """A generator on a device for some whole numbers."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))
