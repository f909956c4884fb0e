"""
Comparisons of feedback rules: from the runs that they take to a table and figures.

* :mod:`.runs`: what output folders hold; runs that differ in their seeds alone as a group
* :mod:`.styles`, :mod:`.plots`: figures, with one look per rule
* :mod:`.plan`, :mod:`.launch`, :mod:`.compare`: a whole comparison (tools/compare_rules.py)
* :mod:`.demo`, :mod:`.visualize`: what trained models see
"""

from .compare import compare, summarise, table, write_report
from .launch import hardware, run_all
from .plan import PlannedRun, plan_runs, starting_config
from .plots import draw_figures, plot_curves, plot_layers
from .runs import Run, RunGroup, group_runs, read_metrics, read_run, read_runs
from .styles import RULE_STYLES, style_of

__all__ = [
    "RULE_STYLES",
    "PlannedRun",
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
