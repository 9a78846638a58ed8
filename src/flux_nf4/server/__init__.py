"""The HTTP server: one parent that speaks to clients, one worker process a device."""
