"""Shipped jobs on text."""
