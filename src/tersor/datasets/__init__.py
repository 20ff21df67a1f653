"""Where batches come from; one file each."""
