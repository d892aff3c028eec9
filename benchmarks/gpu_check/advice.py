"""What the measurements recommend, and which goals are reached. Pure functions of the tables in the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Tables = Mapping[str, Sequence[Row]]

NEAR = 0.03  # a setting that is this much slower than the best counts as equal, and the one that needs less memory is taken
WORTH = 0.10  # least gain that justifies another way
PRETRAINING_STEPS = 20_000
ALLOWED_DIFFERENCE = 0.02  # of the outputs of attention kernels, in 16 bits
GOALS = {"share of the matrix peak": 0.5, "epochs, reference to ours": 10.0, "wait for data": 0.05}


@dataclass(frozen=True)
class Advice:
    """A default, what it should be by these figures, and why."""

    setting: str
    recommended: str
    reason: str


@dataclass(frozen=True)
class Goal:
    """A goal of the project for the GPU. Missing one does not fail the check."""

    name: str
    reached: bool
    text: str


def advice(tables: Tables) -> list[Advice]:
    """Return one recommendation for each choice that was measured."""
    found = [part_seconds(tables), attention(tables), compiled(tables), adam(tables), k_means(tables), features(tables), together(tables)]
    return [each for each in found if each is not None]


def part_seconds(tables: Tables) -> Advice | None:
    """The shortest parts with which every stage is within NEAR of its best."""
    rows = tables.get("part_seconds", ())
    best: dict[str, float] = {}
    for row in rows:
        best[row["stage"]] = min(best.get(row["stage"], float("inf")), row["step_seconds"])
    slowdown: dict[float, dict[str, float]] = {}
    for row in rows:
        slowdown.setdefault(row["part_seconds"], {})[row["stage"]] = row["step_seconds"] / best[row["stage"]]
    whole = {length: max(each.values()) for length, each in slowdown.items() if len(each) == len(best)}
    if len(whole) < 2:
        return None
    fastest = min(whole.values())
    chosen = min(length for length, slow in whole.items() if slow <= fastest + NEAR)
    shown = ", ".join(f"{length:g} s: {slow:.2f}" for length, slow in sorted(whole.items()))
    memory = max(row["peak_reserved_gib"] for row in rows if row["part_seconds"] == chosen)
    reason = f"slowest stage, relative to its best ({shown}); {memory:.1f} GiB"
    return Advice('AUTO_PART_SECONDS["cuda"] (ser_core/training/device.py)', f"{chosen:g}", reason)


def attention(tables: Tables) -> Advice | None:
    """The fastest kernel over all lengths of parts, if it gains WORTH."""
    rows = [row for row in tables.get("attention", ()) if row["difference"] is not None and row["difference"] <= ALLOWED_DIFFERENCE]
    if not rows:
        return None
    present = {row["part_seconds"]: row["seconds"] for row in rows if row["kernel"] == rows[0]["kernel"]}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["part_seconds"] in present:
            ratios.setdefault(row["kernel"], []).append(present[row["part_seconds"]] / row["seconds"])
    gains = {kernel: min(each) for kernel, each in ratios.items() if len(each) == len(present)}
    best = max(gains, key=lambda kernel: gains[kernel])
    shown = ", ".join(f"{kernel} {gain:.2f}" for kernel, gain in gains.items())
    return Advice("attention on a GPU", best if gains[best] > 1 + WORTH else rows[0]["kernel"], f"least gain, attention alone: {shown}")


def compiled(tables: Tables) -> Advice | None:
    """Compilation or graphs if they gain WORTH and have paid for their warm-up within a pretraining."""
    rows = {row["way"]: row for row in tables.get("compile", ())}
    plain = rows.pop("as it is", None)
    if plain is None or not rows:
        return None
    chosen, told = "as it is", []
    for way, row in rows.items():
        gain = plain["pass_seconds"] / row["pass_seconds"]
        warm_up = row["warm_up_seconds"] + row["new_shapes_seconds"] - plain["warm_up_seconds"]
        saved = plain["pass_seconds"] - row["pass_seconds"]
        passes = warm_up / saved if saved > 0 else float("inf")
        told.append(f"{way}: {gain:.2f} times as fast, warm-up {warm_up:.1f} s, paid for after {passes:.3g} passes")
        if gain > 1 + WORTH and passes < PRETRAINING_STEPS:
            chosen = way
    return Advice("the transformer's layers", chosen, "; ".join(told))


def adam(tables: Tables) -> Advice | None:
    """The fastest implementation."""
    rows = tables.get("adam", ())
    if not rows:
        return None
    best = min(rows, key=lambda row: float(row["step_seconds"]))
    return Advice("Adam", best["implementation"], ", ".join(f"{row['implementation']} {1e3 * row['step_seconds']:.2f} ms" for row in rows))


def k_means(tables: Tables) -> Advice | None:
    """GPU or CPU for the stage `cluster`, by the largest k measured on both."""
    by_k: dict[int, dict[str, float]] = {}
    for row in tables.get("k_means", ()):
        by_k.setdefault(row["k"], {})[row["device"]] = row["pass_seconds"]
    both = {k: each for k, each in by_k.items() if len(each) == 2}
    if not both:
        return None
    shown = ", ".join(f"k = {k}: CPU {each['cpu']:.2f} s, GPU {each['cuda']:.2f} s a pass" for k, each in both.items())
    largest = both[max(both)]
    return Advice("device of `cluster`", "cuda" if largest["cuda"] < largest["cpu"] else "cpu", shown)


def features(tables: Tables) -> Advice | None:
    """Whether the features of a corpus should stay on the GPU: if laying out and copying a batch takes a noticeable part of a step."""
    seconds = {row["way"]: row["seconds"] for row in tables.get("batch", ())}
    steps = [row["step_seconds"] for row in tables.get("steps", ()) if row["stage"] == "finetune" and row["setting"] == "ours"]
    if not seconds or not steps:
        return None
    share = (seconds["laid out, pinned"] + seconds["copied, pinned"]) / steps[0]
    pinned = seconds["copied, pageable"] / seconds["copied, pinned"]
    reason = f"laying out and copying take {100 * share:.0f} % of a step, a copy from pinned memory is {pinned:.1f} times as fast"
    return Advice("features of fine-tuning", "on the GPU" if share > GOALS["wait for data"] else "in pinned memory", reason)


def together(tables: Tables) -> Advice | None:
    """How many fine-tunings at once: the fewest whose gain is within NEAR of the best."""
    rows = tables.get("together", ())
    if len(rows) < 2:
        return None
    best = max(row["gain"] for row in rows)
    chosen = min(row["at_once"] for row in rows if row["gain"] >= best * (1 - NEAR))
    shown = ", ".join(f"{row['at_once']}: {row['gain']:.2f} times the steps a second" for row in rows)
    return Advice("resources.finetune.at_once", str(chosen if best > 1 + WORTH else 1), shown)


def goals(tables: Tables) -> list[Goal]:
    """Return the goals that could be judged."""
    found = []
    for row in tables.get("steps", ()):
        if row["stage"] == "finetune" and row["setting"] == "ours":
            least = GOALS["share of the matrix peak"]
            share = row["share_of_matrix_peak"]
            text = f"{100 * share:.0f} % (at least {100 * least:.0f} %)"
            found.append(Goal("fine-tuning step, share of the measured matrix peak", share >= least, text))
            most = GOALS["wait for data"]
            text = f"{100 * row['data_wait_share']:.1f} % (at most {100 * most:.0f} %)"
            found.append(Goal("fine-tuning, host waits for data", row["data_wait_share"] <= most, text))
    for row in tables.get("ratios", ()):
        if row["stage"] == "finetune":
            least = GOALS["epochs, reference to ours"]
            found.append(
                Goal("fine-tuning epoch against the reference", row["epoch"] >= least, f"{row['epoch']:.1f} times (at least {least:g})")
            )
    return found
