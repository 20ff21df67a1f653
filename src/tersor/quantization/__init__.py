"""Techniques that change number formats; one file each."""
