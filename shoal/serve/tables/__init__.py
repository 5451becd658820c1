"""Data sets on their way into a model, and its answers on their way into a file."""
