"""Training by parameter servers whose processes share no memory: a lead, servers and workers that speak over sockets.

``lead``: plays the supervisor; hands out units of the global order and hears what was done. ``worker``, ``server``: what the
others do. ``words``: what they say to the lead. ``state``: between servers' pieces and the run's checkpoints.
"""
