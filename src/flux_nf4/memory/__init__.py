"""Memory: plans made before anything is loaded, and what carries them out."""
