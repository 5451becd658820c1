"""Shipped jobs that recommend."""
