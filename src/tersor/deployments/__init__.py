"""Deployments: one file for each way to serve an artifact, or to build it into a program."""
