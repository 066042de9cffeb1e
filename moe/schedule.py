"""Learning rate and router-bias rate as functions of the step alone, so that a resumed run needs no state for them.

In: step (counted from 0), the run's steps, an `OptimConfig`. Out: a float. Muon's momentum has no schedule: see
`moe/muon.py`.
"""

import math

from moe.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of update `step`.

    Linear warm-up to `lr`; then it stays (constant), falls in a cosine that reaches lr * min_lr_fraction at the last
    step, or (wsd) stays and falls to that in a straight line over the run's last `decay_fraction`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * (config.min_lr_fraction + (1 - config.min_lr_fraction) * _height(step, steps, config))


def bias_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Step size of the routers' biases after update `step`: 0 in the last `bias_stop_fraction`, or when frozen.

    The last updates then train on the routing that evaluation and generation will see.
    """
    stopped = steps - step <= config.bias_stop_fraction * steps
    return 0.0 if stopped or config.freeze_router else config.bias_rate


def _height(step: int, steps: int, config: OptimConfig) -> float:
    """1 at the peak, 0 at the end of the decay."""
    last = steps - 1
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.schedule == "wsd":
        start = max(config.warmup_steps, steps - round(config.decay_fraction * steps))
        return min(1.0, (last - step) / (steps - start)) if steps > start else 1.0
    return 1.0
