"""Reports: a run directory becomes one HTML page; several runs become one comparison."""

from rlt2i.report.charts import Series, line_chart
from rlt2i.report.compare import Comparison, compare_runs
from rlt2i.report.grids import image_grid
from rlt2i.report.maps import draw_maps
from rlt2i.report.page import write_report

__all__ = ["Comparison", "Series", "compare_runs", "draw_maps", "image_grid", "line_chart", "write_report"]
