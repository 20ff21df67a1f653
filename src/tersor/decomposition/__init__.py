"""Techniques that replace a layer by several cheaper ones; one file each."""
