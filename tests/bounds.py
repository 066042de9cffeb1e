"""How long a test waits for what has no bound of its own."""

BOUND_S = 900.0  # for a command that takes a minute here at most; pytest's own bound for a test mostly comes first
