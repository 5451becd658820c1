"""Protocols: what clients say, as values, and back. One file each; no server and no torch here."""
