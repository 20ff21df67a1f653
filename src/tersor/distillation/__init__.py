"""Techniques that train: recovery and teaching; one file each."""
