"""Measured insertion and deletion curves as paths of a drawing inside a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shapadapter.metrics import Interval
from shapadapter.visual.styles import styles

WIDTH, HEIGHT = 300, 160
_PANELS = {
    "insertion": ("Insertion, most relevant first", "share of patches present"),
    "deletion": ("Deletion, most relevant first", "share of patches removed"),
}
_FEW = 8  # images, whose interval is not worth a band


@dataclass(frozen=True)
class Line:
    """One curve: the method, the area below it as text, the path of the curve and that of its band, and how it is drawn."""

    method: str
    area: str
    path: str
    band: str
    colour: str
    width: float
    dashes: str


@dataclass(frozen=True)
class Chart:
    """One drawing, `WIDTH` x `HEIGHT`: heading, what is below, its curves, and what its lowest and highest number are."""

    title: str
    below: str
    lines: Sequence[Line]
    low: str
    high: str
    width: int = WIDTH
    height: int = HEIGHT


def charts(curves: Mapping[str, Mapping[str, Sequence[Interval]]]) -> list[Chart]:
    """The insertion and the deletion curves of an evaluation.

    Args:
        curves: By method and kind, `Evaluation.curves`, N + 1 points each.

    Returns:
        A chart for each kind that there is.
    """
    return [_chart(kind, curves) for kind in _PANELS if any(kind in lines for lines in curves.values())]


def _chart(kind: str, curves: Mapping[str, Mapping[str, Sequence[Interval]]]) -> Chart:
    found = {method: lines[kind] for method, lines in curves.items() if kind in lines}
    ends = [end for points in found.values() for point in points for end in _ends(point)]
    low, high = min(*ends, 0.0), max(ends)
    spread = (high - low) or 1.0
    looks = styles(list(curves))
    lines: list[Line] = []
    for method, points in found.items():
        lows, means, highs = (
            [1 - (value - low) / spread for value in side] for side in zip(*map(_ends, points), strict=True)
        )
        enough = all(point.count >= _FEW for point in points)
        width = 1.6 if lines else 2.4  # the first one is the one that the page is about
        dashes = " ".join(f"{width * length:.1f}" for length in looks[method].dashes) or "none"
        area = (sum(point.mean for point in points) - (points[0].mean + points[-1].mean) / 2) / (len(points) - 1)
        band = _path(lows) + _path(highs, back=True) + "Z" if enough else ""
        lines.append(Line(method, f"{area:.2f}", _path(means), band, looks[method].colour, width, dashes))
    return Chart(*_PANELS[kind], lines=lines, low=f"{low:.2g}", high=f"{high:.2g}")


def _ends(point: Interval) -> tuple[float, float, float]:
    """Low, mean and high; the mean where no interval is known."""
    known = point.low == point.low and point.high == point.high
    return (point.low, point.mean, point.high) if known else (point.mean,) * 3


def _path(heights: Sequence[float], back: bool = False) -> str:
    """A path through heights from 0, the top, to 1; the second half of a band goes back."""
    last = max(len(heights) - 1, 1)
    points = [f"{place / last * WIDTH:.1f} {height * HEIGHT:.1f}" for place, height in enumerate(heights)]
    return f"{'L' if back else 'M'}{'L'.join(reversed(points) if back else points)}"
