"""Makes the embedded CLIP from nothing: `python examples/scenes_clip/make.py --device cuda`.

Draws the pictures, trains the model, trains CrossGET's cross tokens on it, exports both for transformers and open_clip,
examines, and writes the model card. A run that was stopped goes on where it was; what is done is not done again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scenes_llava.store import Store
from tiny_llava.training import logger

from scenes_clip.album import GROUP, draw_album
from scenes_clip.card import examine, write_card
from scenes_clip.cross import SPEC, train_cross
from scenes_clip.export import export, save_cross_tokens
from scenes_clip.model import train_clip

DATA = Path(__file__).resolve().parents[2] / "vlmtok" / "data"


def make(args: argparse.Namespace) -> None:
    """Makes the checkpoint; see the command line's options."""
    work, device, start = args.work, args.device, time.time()
    work.mkdir(parents=True, exist_ok=True)
    pages = args.pages // GROUP * GROUP
    album = draw_album(work / "train", "train", args.seed, pages, args.workers)
    held_out = draw_album(work / "test", "held-out", args.seed, min(2000, pages), args.workers)
    store, test = Store(album, device), Store(held_out, device)
    logger.info("pictures: %.0f s", time.time() - start)
    clip = train_clip(work, store, test, args.seed, round(1800 * args.length), args.batch)
    folder = args.out / "scenes-clip"
    export(clip, folder)
    state = train_cross(clip, work, store, args.seed, round(300 * args.length), args.batch // 2)
    save_cross_tokens(state, folder, SPEC)
    write_card(folder, examine(folder, work, device, args.galleries))
    logger.info("all: %.0f s", time.time() - start)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/scenes-clip"), help="state of the training (8 GB)")
    parser.add_argument("--out", type=Path, default=DATA, help="gets scenes-clip/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw the pictures")
    parser.add_argument("--pages", type=int, default=160_000, help="training pictures, 50 KB each")
    parser.add_argument("--batch", type=int, default=1024, help="pictures a step")
    parser.add_argument("--galleries", type=int, default=10, help="of the exam, a hundred pictures each")
    parser.add_argument("--length", type=float, default=1.0, help="of every training, for a trial")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    make(args)


if __name__ == "__main__":
    main()
