"""Machines, what they have, and the links between them: found, measured, or described in a file."""

from shoal.cluster.cluster import Cluster, Machine

__all__ = ["Cluster", "Machine"]
