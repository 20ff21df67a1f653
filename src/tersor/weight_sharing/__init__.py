"""Techniques that let weights share values, and store what that saves; one file each."""
