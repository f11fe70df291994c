"""Methods that can only drop tokens, one file each."""
