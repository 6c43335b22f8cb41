"""Pictures of explanations: colour maps, matplotlib figures and self-contained HTML pages."""

from shapadapter.visual.alt import alt_text
from shapadapter.visual.class_means import draw_class_means
from shapadapter.visual.curves import draw_curves
from shapadapter.visual.figure import draw_comparison, draw_contrast, draw_explanation, gallery
from shapadapter.visual.history import draw_history
from shapadapter.visual.maps import overlay, signed_colors, symmetric_limit
from shapadapter.visual.means import MeanMaps, mean_maps
from shapadapter.visual.page import write_page
from shapadapter.visual.samples import sample_pictures
from shapadapter.visual.scatter import draw_scatter
from shapadapter.visual.strip import draw_strip

__all__ = [
    "MeanMaps",
    "alt_text",
    "draw_class_means",
    "draw_comparison",
    "draw_contrast",
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
