"""How the checkpoint in `vlmtok/data/scenes-llava` is made: pages, questions, training, figures."""
