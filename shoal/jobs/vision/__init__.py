"""Shipped jobs on pictures."""
