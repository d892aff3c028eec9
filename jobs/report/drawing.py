"""Line and mark drawings as SVG elements of an HTML page. Pure: the same numbers give the same bytes with every version of every library.

Written here rather than by matplotlib: its drawings of the same runs took 50 times as long, were more than twice as large, depend on its
version, and have no tooltips. Colours and widths are classes of `templates/report.css`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from jobs.report.page import ALWAYS, Figure, Table, View

WIDTH = 800.0  # units of the drawing; the page scales it
LETTER = 6.6  # mean width of a letter of 12 units
LONGEST = 34  # letters of a label; the rest is cut
COLOURS = 7  # classes m0 to m6 of the style sheet
SHAPES = ("circle", "square", "up", "diamond", "down", "plus", "star")  # of the marks of a method, by its place
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # of ticks, times a power of ten
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """The range of an axis with its ticks."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str = ""


@dataclass(frozen=True)
class Box:
    """Where a panel lies in its drawing, without the labels of its axes."""

    left: float
    top: float
    width: float
    height: float


def linear(values: Iterable[float], label: str, *, room: float = 0.06, wanted: int = 6) -> Axis:
    """An axis that holds all values and some room, with round ticks."""
    given = list(values) or [0.0, 1.0]
    low, high = min(given), max(given)
    margin = (high - low) * room or max(abs(high) * room, 0.5)
    low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(each * power for each in STEPS if (high - low) / (each * power) <= wanted)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (step / power == 2.5))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Axis(low, high, tuple((place * step, _text(place * step, digits)) for place in range(first, last + 1)), label)


def named(names: Sequence[str], label: str = "") -> Axis:
    """An axis with one place for each name, at 0, 1, ..."""
    return Axis(-0.5, len(names) - 0.5, tuple((float(place), name) for place, name in enumerate(names)), label)


def colour(place: int) -> str:
    """The class of the method at a place of the table."""
    return f"m{place % COLOURS}"


def shape(place: int) -> str:
    """The shape of its marks."""
    return SHAPES[place % len(SHAPES)]


def spread(count: int, width: float) -> list[float]:
    """Offsets of marks beside one another, around zero, `width` from the first to the last."""
    return [0.0] if count < 2 else [width * (place / (count - 1) - 0.5) for place in range(count)]


def left_margin(names: Iterable[str]) -> float:
    """Width of the labels of a vertical axis."""
    return 26 + LETTER * max((min(len(name), LONGEST) for name in names), default=3)


@dataclass
class Panel:
    """One pair of axes: values become positions. Later elements cover earlier ones."""

    x: Axis
    y: Axis
    box: Box
    title: str = ""
    turned: bool = False  # long labels of the horizontal axis are vertical
    elements: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> Point:
        """The position of a point; y grows upwards."""
        right = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        return self.box.left + right * self.box.width, self.box.top + (1 - up) * self.box.height

    def mark(self, x: float, y: float, kind: str, style: str, tip: str = "", size: float = 4.5) -> None:
        """A mark at a point. `kind`: one of `SHAPES`, or `cross`; `style`: classes."""
        self.elements.append(symbol(kind, *self.at(x, y), size, style, tip))

    def line(self, points: Sequence[Point], style: str, tip: str = "") -> None:
        """A line through points."""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in (self.at(*point) for point in points))
        self.elements.append(_element("polyline", f'points="{path}"', f"line {style}", tip))

    def field(self, x: float, y: float, opacity: float, style: str, text: str, tip: str = "") -> None:
        """A cell of a matrix around a point, filled with a colour of this opacity, with a text."""
        (left, top), (right, bottom) = self.at(x - 0.5, y + 0.5), self.at(x + 0.5, y - 0.5)
        size = f'x="{_n(left)}" y="{_n(top)}" width="{_n(right - left)}" height="{_n(bottom - top)}" fill-opacity="{opacity:.3f}"'
        self.elements.append(_element("rect", size, style, tip))
        centre = self.at(x, y)
        self.elements.append(write(centre[0], centre[1] + 4, text, "middle"))

    def svg(self) -> str:
        """Grid, axes and all elements."""
        left, top, right, bottom = self.box.left, self.box.top, self.box.left + self.box.width, self.box.top + self.box.height
        found = []
        for value, text in self.y.ticks:
            _, y = self.at(self.x.low, value)
            found.append(f'<path class="grid" d="M{_n(left)} {_n(y)}H{_n(right)}"/>')
            found.append(write(left - 6, y + 4, text, "end"))
        for value, text in self.x.ticks:
            x, _ = self.at(value, self.y.low)
            found.append(f'<path class="grid" d="M{_n(x)} {_n(top)}V{_n(bottom)}"/>')
            found.append(write(x + 4, bottom + 8, text, "end", turn=-90) if self.turned else write(x, bottom + 16, text, "middle"))
        found.append(f'<path class="axis" d="M{_n(left)} {_n(top)}V{_n(bottom)}H{_n(right)}"/>')
        if self.x.label:
            found.append(write((left + right) / 2, bottom + 34, self.x.label, "middle"))
        if self.y.label:
            found.append(write(13, (top + bottom) / 2, self.y.label, "middle", turn=-90, from_left=left - self.box.left))
        if self.title:
            found.append(write((left + right) / 2, top - 8, self.title, "middle strong"))
        return "\n".join((*found, *self.elements))


def panel(x: Axis, y: Axis, *, height: float = 260, top: float = 34) -> tuple[Panel, float]:
    """One panel as wide as the drawing, and the height of the drawing."""
    left = left_margin(text for _, text in y.ticks) + (14 if y.label else 0)
    longest = max((len(text) for _, text in x.ticks), default=0)
    turned = longest * LETTER > (WIDTH - left) / max(len(x.ticks), 1)
    below = (16 + LETTER * min(longest, LONGEST) if turned else 22) + (20 if x.label else 0)
    return Panel(x, y, Box(left, top, WIDTH - left - 12, height), turned=turned), top + height + below


def legend(entries: Sequence[tuple[str, str, str]], at: float = 16) -> str:
    """Shapes with their names in one row above the axes. `entries`: shape (or `line`), classes, name."""
    found, x = [], 12.0
    for kind, style, name in entries:
        if kind == "line":
            found.append(_element("polyline", f'points="{_n(x - 8)},{_n(at - 4)} {_n(x + 8)},{_n(at - 4)}"', f"line {style}", ""))
        else:
            found.append(symbol(kind, x, at - 4, 4.5, style, ""))
        found.append(write(x + 12, at, name, ""))
        x += 36 + LETTER * min(len(name), LONGEST)
    return "\n".join(found)


def figure(
    name: str, title: str, description: str, height: float, parts: Iterable[str], *, tables: Sequence[Table] = (), view: View = ALWAYS
) -> Figure:
    """A figure of drawn parts."""
    head = f'<svg viewBox="0 0 {_n(WIDTH)} {_n(height)}" role="img" aria-labelledby="{name}-title {name}-about">'
    words = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-about">{escape(description)}</desc>'
    return Figure(name, title, description, "\n".join((head + words, *parts, "</svg>")), tuple(tables), view)


def picture(name: str, title: str, description: str, png: bytes) -> Figure:
    """A figure of a PNG file, embedded."""
    address = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return Figure(name, title, description, f'<img alt="{escape(title)}" src="{address}">')


def symbol(kind: str, x: float, y: float, size: float, style: str, tip: str) -> str:
    """One mark around a position."""
    if kind == "circle":
        return _element("circle", f'cx="{_n(x)}" cy="{_n(y)}" r="{_n(size)}"', style, tip)
    return _element("path", f'd="{_PATHS[kind](x, y, size)}"', style, tip)


def write(x: float, y: float, text: str, style: str, *, turn: int = 0, from_left: float = 0.0) -> str:
    """A label, cut if it is too long for the drawing; the whole text is its tooltip then."""
    shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    x += from_left
    turned = f' transform="rotate({turn} {_n(x)} {_n(y)})"' if turn else ""
    tip = f"<title>{escape(text)}</title>" if shown != text else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" class="{style}"{turned}>{tip}{escape(shown)}</text>'


def _element(name: str, geometry: str, style: str, tip: str) -> str:
    inside = f"><title>{escape(tip)}</title></{name}>" if tip else "/>"
    return f'<{name} {geometry} class="{style}"{inside}'


def _polygon(*corners: Point) -> Callable[[float, float, float], str]:
    """The path of a polygon whose corners are in units of the size of a mark."""
    return lambda x, y, size: "M" + "L".join(f"{_n(x + right * size)} {_n(y + down * size)}" for right, down in corners) + "Z"


def _star(corners: int) -> list[Point]:
    radii = [1.3 if corner % 2 == 0 else 0.55 for corner in range(2 * corners)]
    return [(radius * math.sin(k * math.pi / corners), -radius * math.cos(k * math.pi / corners)) for k, radius in enumerate(radii)]


def _cross(x: float, y: float, size: float) -> str:
    left, top, right, bottom = (_n(value) for value in (x - size, y - size, x + size, y + size))
    return f"M{left} {top}L{right} {bottom}M{left} {bottom}L{right} {top}"


_QUARTER = ((0.4, -1.1), (0.4, -0.4), (1.1, -0.4))  # of a plus
_PATHS: dict[str, Callable[[float, float, float], str]] = {
    "square": _polygon((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "up": _polygon((0, -1.15), (1.1, 0.85), (-1.1, 0.85)),
    "down": _polygon((0, 1.15), (1.1, -0.85), (-1.1, -0.85)),
    "diamond": _polygon((0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)),
    "plus": _polygon(
        *_QUARTER, *((x, -y) for x, y in reversed(_QUARTER)), *((-x, -y) for x, y in _QUARTER), *((-x, y) for x, y in reversed(_QUARTER))
    ),
    "star": _polygon(*_star(5)),
    "cross": _cross,
}


def _n(value: float) -> str:
    """A coordinate: one decimal is a tenth of what can be seen."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def _text(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}".replace("-", "−")
    return text if float(f"{value:.{digits}f}") else text.lstrip("−")
