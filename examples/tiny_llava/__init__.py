"""How the checkpoint in `vlmtok/data/tiny-llava` is made: pictures, questions, training, figures."""
