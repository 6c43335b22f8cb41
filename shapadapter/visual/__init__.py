"""Pictures of explanations: colour maps, matplotlib figures and self-contained HTML pages."""

from shapadapter.visual.curves import draw_curves
from shapadapter.visual.figure import draw_comparison, draw_explanation, gallery
from shapadapter.visual.maps import overlay, signed_colors, symmetric_limit
from shapadapter.visual.page import write_page
from shapadapter.visual.samples import sample_pictures
from shapadapter.visual.strip import draw_strip

__all__ = [
    "draw_comparison",
    "draw_curves",
    "draw_explanation",
    "draw_strip",
    "gallery",
    "overlay",
    "sample_pictures",
    "signed_colors",
    "symmetric_limit",
    "write_page",
]
