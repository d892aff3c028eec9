"""The plot of a sweep: validation UA against the cluster count, and against the size of the set.

Colours of Okabe and Ito; shapes and lines differ too. The same summary gives the same bytes.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.statistics import mean
from jobs.sweeps.report.summary import Group, PointSummary, SweepSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
SIZE = (7.2, 3.4)  # inches: the width of a page of text
DPI = 200
VARYING = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}  # metadata that would change the bytes
MANY = 8  # with more cluster counts, tick labels are vertical
INTERVAL_POINTS = 3  # minimum size of a group with an interval: that of two points is wider than the plot
ROOM = 0.08  # margin of the y axis, as a share of the range of values
SPREAD = 0.4  # width of the horizontal spread of points of one size
BESIDE = 0.32  # distance of their mean to the left
GOLDEN = 0.618034  # steps of this length fill an interval evenly
LABEL_LENGTH = 32


@dataclass(frozen=True)
class Dot:
    """A point of the sweep and its placed UA."""

    point: PointSummary
    ua: float

    @property
    def size(self) -> int:
        return len(self.point.point.counts)

    @property
    def sd(self) -> float:
        return self.point.ua.sd or 0.0

    def style(self, colour: str) -> dict[str, Any]:
        face = colour if self.point.complete else "white"
        return {"marker": "o", "markersize": 5, "color": colour, "markerfacecolor": face, "linestyle": "none"}


def plot(summary: SweepSummary, kind: str) -> bytes:
    """The plot as a file of one kind: `png`, `pdf` or `svg`."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dots = [Dot(point, point.placed_ua) for point in summary.points if point.placed_ua is not None]
    data = io.BytesIO()
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}):
        figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        counts, sizes = figure.subplots(1, 2, sharey=True)
        counts.set_xlabel("k, number of clusters (log scale)")
        sizes.set_xlabel("ensemble size (numbers of clusters in a set)")
        counts.set_ylabel("Validation UA (%)")
        if dots:
            _draw_counts(counts, summary.by_count, dots)
            _draw_sizes(sizes, summary.by_size, dots, summary.best)
            counts.set_ylim(*_range(dots))
        else:
            for axes in (counts, sizes):
                axes.text(0.5, 0.5, "no fold is done yet", ha="center", va="center", transform=axes.transAxes, color=GREY)
                axes.set_xticks([])
                axes.set_yticks([])
        figure.savefig(data, format=kind, metadata={VARYING[kind]: None})
    return data.getvalue()


def _draw_counts(axes: Axes, groups: Sequence[Group], dots: Sequence[Dot]) -> None:
    """Sets of a single k, and the mean of all sets that contain it."""
    axes.set_xscale("log", base=2)
    means = _means(groups)
    axes.plot(list(means), list(means.values()), linestyle="--", marker="s", color=GREY, label="mean of all sets with this k", zorder=1)
    alone: dict[int, list[Dot]] = {}
    for dot in dots:
        if dot.size == 1:
            alone.setdefault(dot.point.point.counts[0], []).append(dot)
    for k, found in alone.items():
        for dot in found:
            axes.errorbar([k], [dot.ua], yerr=dot.sd or None, **dot.style(BLUE), ecolor=BLUE, capsize=2, zorder=3)
    if alone:
        line = [(k, mean([dot.ua for dot in alone[k]]) or 0.0) for k in sorted(alone)]
        axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.2, zorder=2)
        spread = " (± sd over seeds)" if any(dot.sd for found in alone.values() for dot in found) else ""
        axes.plot([], [], color=BLUE, marker="o", markersize=5, linewidth=1.2, label=f"this k alone{spread}")
    axes.set_xticks(list(means), list(map(str, means)), rotation=90 if len(means) > MANY else 0)
    axes.minorticks_off()
    axes.set_xlim(min(means) / 1.5, max(means) * 1.5)
    _explain(axes, [dot for found in alone.values() for dot in found])


def _draw_sizes(axes: Axes, groups: Sequence[Group], dots: Sequence[Dot], best: PointSummary | None) -> None:
    """Every set by its size, and the mean for each size."""
    means = _means(groups)
    reach = [_reach(group) for group in groups if group.value in means]
    interval = " (95 % interval over sets)" if any(reach) else ""
    style: dict[str, Any] = {"linestyle": "none", "marker": "s", "markersize": 5, "color": "black"}
    axes.errorbar([size - BESIDE for size in means], list(means.values()), yerr=reach, **style, elinewidth=1, capsize=3, zorder=1)
    axes.plot([], [], **style, label=f"mean of a size{interval}")
    axes.plot([], [], color=BLUE, marker="o", markersize=5, linestyle="none", label="a set")
    for dot, place in zip(dots, _spread(dots), strict=True):
        if dot.point is best:
            axes.plot([place], [dot.ua], color=ORANGE, marker="D", markersize=6, linestyle="none", label="the best", zorder=4)
            _name(axes, dot, place)
        else:
            axes.plot([place], [dot.ua], **dot.style(BLUE), zorder=3)
    axes.set_xticks(list(means), list(map(str, means)))
    axes.set_xlim(min(means) - 0.6, max(means) + 0.6)
    _explain(axes, dots)


def _name(axes: Axes, dot: Dot, place: float) -> None:
    label = dot.point.point.label
    axes.annotate(
        label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…",
        (place, dot.ua),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        parse_math=False,
        zorder=5,
    )


def _means(groups: Sequence[Group]) -> dict[int, float]:
    return {group.value: group.mean_ua for group in groups if group.mean_ua is not None}


def _spread(dots: Sequence[Dot]) -> list[float]:
    """Horizontal positions of points of the same size: deterministic, a single one in the middle."""
    seen: Counter[int] = Counter()
    found = []
    for dot in dots:
        found.append(dot.size + ((0.5 + seen[dot.size] * GOLDEN) % 1 - 0.5) * SPREAD)
        seen[dot.size] += 1
    return found


def _reach(group: Group) -> float:
    """Half the width of an interval; 0 for a group of too few points."""
    return (group.interval.high - group.interval.low) / 2 if group.interval and group.points >= INTERVAL_POINTS else 0.0


def _range(dots: Sequence[Dot]) -> tuple[float, float]:
    """Limits of the y axis, from the points and their sd; intervals of few sets may reach further."""
    spread = [(dot.ua, dot.sd if dot.size == 1 else 0.0) for dot in dots]
    low, high = min(ua - sd for ua, sd in spread), max(ua + sd for ua, sd in spread)
    room = max(ROOM * (high - low), 0.5)
    return low - room, high + 1.5 * room


def _explain(axes: Axes, dots: Sequence[Dot]) -> None:
    if any(not dot.point.complete for dot in dots):
        axes.plot([], [], marker="o", markersize=5, color=BLUE, markerfacecolor="white", linestyle="none", label="not every fold done")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=7, ncols=2, columnspacing=1.0, handletextpad=0.4)
    axes.grid(axis="y", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
