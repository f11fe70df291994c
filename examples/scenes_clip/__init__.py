"""How the checkpoint in `vlmtok/data/scenes-clip` is made: pictures, captions, training, cross tokens, figures."""
