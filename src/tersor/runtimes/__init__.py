"""Where a network runs; one file each."""
