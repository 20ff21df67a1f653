"""Techniques that merge operators; one file each."""
