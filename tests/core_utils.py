"""What the core's tests share; needs torch alone."""

import pytest
import torch

from ss_detectron import FEEDBACK_REGISTRY

RULES = [rule.short_name for _, rule in FEEDBACK_REGISTRY]
each_rule = pytest.mark.parametrize("rule", RULES)


def assert_same(actual, expected) -> None:
    """Equal bit for bit, with the same names."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
