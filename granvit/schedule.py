"""Schedules as arrays, computed once for the whole run."""
import numpy as np

from granvit.config import DistillSection, OptimizerSection


def learning_rates(c: OptimizerSection, steps: int) -> np.ndarray:
    """Learning rate of every step, float64 `[steps]`; element `step - 1` belongs to step number `step`.

    It rises linearly over the warm-up, whose last step has `lr` itself. With `cosine` it then follows half a cosine towards 0,
    which the step after the last one would reach. With `constant` it stays at `lr` and falls linearly to 0 in the cool-down.
    """
    warmup = round(c.warmup * steps)
    step = np.arange(steps, dtype=np.float64)
    rising = (step + 1) / max(warmup, 1)
    after = np.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
    staying = np.clip((steps - step) / max(c.cooldown * steps, 1), 0, 1)
    falling = staying if c.schedule == "constant" else 0.5 * (1 + np.cos(np.pi * after))
    return c.lr * np.where(step < warmup, rising, falling)


def alphas(c: DistillSection, steps: int) -> np.ndarray:
    """The teacher's EMA rate at every update (steps that were left out do not count), float64 `[steps]`: linear from 0 over
    `alpha_warmup` updates, then `alpha`."""
    step = np.arange(steps, dtype=np.float64)
    return c.alpha * np.minimum(1.0, step / max(c.alpha_warmup, 1) if c.alpha_warmup else 1.0) * np.ones(steps)
