"""Vision-language families of transformers as tiny random models, and an oracle that knows none of our code."""
