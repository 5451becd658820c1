"""Exact changes of a model for the machine that it runs on: one file a rewrite, found by being there.

The author's module stays what is saved and exported. What changes is the ``forward`` of instances in a process that computes:
see ``install.py`` for how, ``registry.py`` for what a rewrite is.
"""
