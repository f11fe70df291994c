"""Vision and text towers: where their blocks are hooked, and what rides on the hooks."""
