"""Measurements: each script is one command, and writes what it found under `results/`."""
