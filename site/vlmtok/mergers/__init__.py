"""Methods that can merge tokens, one file each."""
