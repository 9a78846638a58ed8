"""Checkpoint files: checked reading, atomic writing, and the names of tensors as data."""
