"""Every claim about speed, with its peers beside it."""
