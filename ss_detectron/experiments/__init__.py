"""
Comparisons of feedback rules: from the runs that they take to a table and figures.

* :mod:`.runs`: what output folders hold; runs that differ in their seeds alone as a group
* :mod:`.styles`, :mod:`.plots`: figures, with one look per rule
* :mod:`.plan`, :mod:`.launch`, :mod:`.compare`: a whole comparison (tools/compare_rules.py)
* :mod:`.demo`, :mod:`.visualize`: what trained models see
"""

from .. import _detectron2  # noqa: F401
