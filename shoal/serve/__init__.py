"""Serving finished models: a gateway, replicas, and what lies between them."""
