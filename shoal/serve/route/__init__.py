"""``shoal route``: a front that spreads requests over several services."""
