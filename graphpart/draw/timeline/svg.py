"""A sheet to draw on: SVG text with rounded boxes, dots, lines and words, the same bytes every time."""

from __future__ import annotations

from graphpart.draw.picture.markup import FONT
from graphpart.draw.words.text import escape_xml


class Sheet:
    """Collects shapes; what is drawn later lies on top.

    Attributes:
        width: in pixels.
        height: in pixels.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._shapes: list[str] = []

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        border: str,
        *,
        corner: float = 8,
        tip: str = "",
        **more: str,
    ) -> None:
        """A rectangle with its upper left corner at (x, y), rounded; ``tip`` shows when the mouse is on it."""
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        rounded = f' rx="{corner:g}"' if corner else ""
        end = f"><title>{escape_xml(tip)}</title></rect>" if tip else "/>"
        self._shapes.append(f'<rect {place}{rounded} fill="{fill}" stroke="{border}"{_more(more)}{end}')

    def dot(self, x: float, y: float, radius: float, fill: str, border: str, tip: str = "") -> None:
        """A circle; ``tip`` shows when the mouse is on it."""
        title = f"<title>{escape_xml(tip)}</title>" if tip else ""
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
        self._shapes.append(f'<circle {place} fill="{fill}" stroke="{border}" stroke-width="1.5">{title}</circle>')

    def line(self, x1: float, y1: float, x2: float, y2: float, color: str, width: float, **more: str) -> None:
        """A straight line; ``css_class`` tells kinds of lines apart."""
        place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self._shapes.append(f'<line {place} stroke="{color}" stroke-width="{width:.1f}"{_more(more)}/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, color: str, width: float, **more: str) -> None:
        """A line with a head at (x2, y2); it has to be upright or level."""
        length = 3.0 + 2.0 * width
        dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
        back = (x2 - dx * length, y2 - dy * length)
        self.line(x1, y1, back[0], back[1], color, width, **more)
        left = (back[0] - dy * length / 2, back[1] + dx * length / 2)
        right = (back[0] + dy * length / 2, back[1] - dx * length / 2)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x2, y2), left, right))
        self._shapes.append(f'<polygon points="{points}" fill="{color}"/>')

    def text(self, x: float, y: float, words: str, size: float = 11, color: str = "black", **more: str) -> None:
        """Words whose base line starts at (x, y)."""
        place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{color}"'
        self._shapes.append(f"<text {place}{_more(more)}>{escape_xml(words)}</text>")

    def __str__(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}" height="{self.height:.0f}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" font-family="{FONT}">'
        )
        paper = '<rect width="100%" height="100%" fill="white"/>'
        return "\n".join([head, paper, *self._shapes, "</svg>"]) + "\n"


def _more(attributes: dict[str, str]) -> str:
    names = {"css_class": "class"}
    return "".join(f' {names.get(k, k.replace("_", "-"))}="{escape_xml(v)}"' for k, v in attributes.items())
