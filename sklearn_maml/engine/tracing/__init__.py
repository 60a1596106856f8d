"""Traced steps: recorded once, and run as flat graphs from then on."""
