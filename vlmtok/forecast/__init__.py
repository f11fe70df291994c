"""What a compression would cost, without running it: `estimate`, `budget`, presets of known models."""
