"""What tests share: models, oracles, checks, recorded and played hosts."""
