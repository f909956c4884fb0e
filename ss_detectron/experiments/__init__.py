"""
Comparisons of feedback rules: from the runs that they take to a table and figures.

* :mod:`.metrics`, :mod:`.runs`: what output folders hold; runs of one rule as a group
* :mod:`.styles`, :mod:`.plots`: figures, with one look per rule
* :mod:`.summary`: the table
* :mod:`.plan`, :mod:`.launch`, :mod:`.compare`: a whole comparison (tools/compare_rules.py)
"""

from .compare import compare, write_report
from .launch import hardware, run_all
from .metrics import read_metrics
from .plan import PlannedRun, plan_runs, starting_config
from .plots import draw_figures, plot_curves, plot_layers
from .runs import Run, RunGroup, group_runs, read_run, read_runs
from .styles import RULE_STYLES, style_of
from .summary import RuleSummary, summarise, table

__all__ = [
    "RULE_STYLES",
    "PlannedRun",
    "RuleSummary",
    "Run",
    "RunGroup",
    "compare",
    "draw_figures",
    "group_runs",
    "hardware",
    "plan_runs",
    "plot_curves",
    "plot_layers",
    "read_metrics",
    "read_run",
    "read_runs",
    "run_all",
    "starting_config",
    "style_of",
    "summarise",
    "table",
    "write_report",
]
