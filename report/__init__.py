"""What people look at: pages of ranked images, plots, and the comparison of two runs.

An `Evaluation` here is what utils_evaluation yields for one method's run over a data set. Pillow,
matplotlib and jinja2 are imported inside the functions that need them; torch is not.
"""

from report.compare import Comparison, compare_means, compare_runs
from report.page import collect_report, write_report
from report.plots import plot_sweep, write_plots
from report.thumbnails import make_thumbnails

__all__ = [
    "Comparison",
    "collect_report",
    "compare_means",
    "compare_runs",
    "make_thumbnails",
    "plot_sweep",
    "write_plots",
    "write_report",
]
