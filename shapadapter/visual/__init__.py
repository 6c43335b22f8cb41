"""Pictures of explanations: color maps, matplotlib figures and self-contained HTML pages."""

from shapadapter.visual.charts import draw_curves, draw_history, draw_scatter
from shapadapter.visual.class_means import MeanMaps, draw_class_means, mean_maps
from shapadapter.visual.costs import draw_cost_curve
from shapadapter.visual.figures import (
    draw_comparison,
    draw_contrast,
    draw_explanation,
    draw_strip,
    gallery,
    sample_pictures,
)
from shapadapter.visual.maps import overlay, signed_colors, symmetric_limit
from shapadapter.visual.page import write_page
from shapadapter.visual.wording import alt_text

__all__ = [
    "MeanMaps",
    "alt_text",
    "draw_class_means",
    "draw_comparison",
    "draw_contrast",
    "draw_cost_curve",
    "draw_curves",
    "draw_explanation",
    "draw_history",
    "draw_scatter",
    "draw_strip",
    "gallery",
    "mean_maps",
    "overlay",
    "sample_pictures",
    "signed_colors",
    "symmetric_limit",
    "write_page",
]
