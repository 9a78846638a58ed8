"""From a prompt to an image: load, sample, decode."""
