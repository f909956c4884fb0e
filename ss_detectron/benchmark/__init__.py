"""
What the rules cost beside stock backpropagation (tools/benchmark.py).

* :mod:`.timing`: steps that take turns, and the ratios of their times
* :mod:`.memory`: what is kept between steps, and a step's peak
* :mod:`.contestants`: the networks
* :mod:`.measure`: one case with all its contestants
"""

from .contestants import BIOTORCH_MODES, MODES, NETWORKS, Case, Contestant, Network
from .measure import CONTROL, STOCK, measure, operation_times
from .memory import peak_bytes, state_bytes
from .timing import Ratio, alternate, is_noisy, ratio

__all__ = [
    "BIOTORCH_MODES",
    "CONTROL",
    "MODES",
    "NETWORKS",
    "STOCK",
    "Case",
    "Contestant",
    "Network",
    "Ratio",
    "alternate",
    "is_noisy",
    "measure",
    "operation_times",
    "peak_bytes",
    "ratio",
    "state_bytes",
]
