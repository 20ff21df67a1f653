"""Techniques that remove weights, channels or layers; one file each."""
