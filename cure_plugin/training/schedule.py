"""How large the sets are at a point of the training."""

from __future__ import annotations

import math

from cure_plugin.checks import check_count, check_number
from cure_plugin.errors import SpecError


def smooth_ramp(progress: float, start_share: float = 0.25, power: int = 4) -> float:
    """Relative size in [0, 1]: grows like t^4 over the first quarter, then linearly, with matching slope.

    Args:
        progress: elapsed share of the ramp; clipped to [0, 1].
        start_share: of the ramp that grows like t^power, in (0, 1]. power: at least 1.

    Raises:
        SpecError: NaN, or another share or power.
    """
    check_number("start_share", start_share, 1, zero=False)
    check_count("power", power, 1)
    if math.isnan(progress):
        raise SpecError("progress must not be NaN, the elapsed share of the ramp")
    t = min(max(progress, 0.0), 1.0)
    slope = power / start_share  # of t^power at the joint, relative to its value there
    joint_value = 1 / (1 + slope * (1 - start_share))
    if t < start_share:
        return joint_value * (t / start_share) ** power
    return joint_value * (1 + slope * (t - start_share))
