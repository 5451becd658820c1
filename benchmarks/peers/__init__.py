"""The same work written without shoal."""
