"""Job + Plan -> Run."""
