"""Where networks come from; one file each."""
