"""Makes the second embedded checkpoint from nothing: `python examples/scenes_llava/make.py --device cuda`.

Draws the pages, trains the tower, aligns the projector, trains a shallow decoder, deepens it, goes on training,
exports, examines, and writes the model card. A run that was stopped goes on where it was; what is done is not done
again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_llava.alignment import initialise_words
from tiny_llava.export import export
from tiny_llava.language import Stage, build_llava, deepen, initialise_attention, llava_config

from scenes_llava.album import draw_album
from scenes_llava.card import examine, write_card
from scenes_llava.language import train_stage
from scenes_llava.processor import POSITIONS, build_processor, index, vocabulary
from scenes_llava.store import Store
from scenes_llava.tower import train_tower
from scenes_llava.words import align

DATA = Path(__file__).resolve().parents[2] / "vlmtok" / "data"
SHALLOW = Stage("shallow", steps=3000, batch=64, guided=(1, 2), guidance=0.2)
ORDER = (0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3)
DEEP = Stage("deep", steps=2000, batch=64, muon_rate=5e-3, adam_rate=1e-3, decay=0.7, guided=(2, 4, 6, 8, 10, 12))


def make(args: argparse.Namespace) -> None:
    """Makes the checkpoint; see the command line's options."""
    work, device = args.work, args.device
    work.mkdir(parents=True, exist_ok=True)
    album = draw_album(work / "train", "train", args.seed, args.pages, args.workers)
    held_out = draw_album(work / "test", "held-out", args.seed, min(800, args.pages), args.workers)
    store, test = Store(album, device), Store(held_out, device)
    tower = train_tower(work, store, test, args.seed, round(4000 * args.length), args.tower_batch)
    torch.manual_seed(args.seed)
    llava = build_llava(tower, llava_config(tower, ORDER[-1] + 1, vocabulary(), POSITIONS)).to(device)
    llava.model.vision_tower.set_attn_implementation("matmul")
    initialise_words(llava, index())
    initialise_attention(llava)
    align(llava, store, work / "words.pt", args.seed, round(1500 * args.length), args.batch)
    for stage in (SHALLOW, DEEP):
        stage = Stage(**{**vars(stage), "steps": round(stage.steps * args.length), "batch": args.batch})
        if stage.name == DEEP.name:
            llava = deepen(llava, ORDER)
        llava = train_stage(llava, store, test, work, stage, args.seed)
    folder = args.out / "scenes-llava"
    export(llava.cpu(), folder, build_processor())
    write_card(folder, examine(folder, work, device, args.questions))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/scenes-llava"), help="state of the training (11 GB)")
    parser.add_argument("--out", type=Path, default=DATA, help="gets scenes-llava/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw the pages")
    parser.add_argument("--pages", type=int, default=80_000, help="training pages, 140 KB each")
    parser.add_argument("--batch", type=int, default=64, help="pages a step of the language model")
    parser.add_argument("--tower-batch", type=int, default=256, help="pages a step of the tower")
    parser.add_argument("--questions", type=int, default=2400, help="of the exam")
    parser.add_argument("--length", type=float, default=1.0, help="of every training, for a trial")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    make(args)


if __name__ == "__main__":
    main()
