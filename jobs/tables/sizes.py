"""How many parameters a run trains and how many its model has, as its result states them, and their text in tables. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.statistics import round_half_up

TRAINED, ALL = "trained_parameters", "parameters"  # metrics of a run's last stage; results of versions before them have neither
UNITS = ((1e9, " G"), (1e6, " M"), (1e3, " k"), (1.0, ""))


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters (single values, not tensors)."""

    trained: int
    parameters: int  # trained and frozen

    @property
    def text(self) -> str:
        """`1.19 M (1.2 %)`: trained parameters, and their share of all."""
        return f"{count_text(self.trained)} ({self.share} %)"

    @property
    def share(self) -> str:
        """Trained parameters in percent of all."""
        return _significant(100 * self.trained / self.parameters)

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def size_of(metrics: Mapping[str, Any]) -> ModelSize | None:
    """The size that the metrics of a result state; None if they do not."""
    trained, parameters = metrics.get(TRAINED), metrics.get(ALL)
    if not isinstance(trained, int | float) or not isinstance(parameters, int | float) or not 0 <= trained <= parameters > 0:
        return None
    return ModelSize(int(trained), int(parameters))


def common_size(sizes: Iterable[ModelSize | None]) -> ModelSize | None:
    """The size that runs of one method have; None if none states it, or if they differ."""
    found = {size for size in sizes if size is not None}
    return found.pop() if len(found) == 1 else None


def differ(sizes: Iterable[ModelSize | None]) -> bool:
    """Whether methods train different numbers of parameters: then a table has a column for them."""
    return len({size for size in sizes if size is not None}) > 1


def size_sentences(sizes: Iterable[ModelSize | None]) -> tuple[str, ...]:
    """Sentences of a caption on the trained parameters of the methods of a table; none where no run states them."""
    found = list(dict.fromkeys(size for size in sizes if size is not None))
    if len(found) == 1:
        return (f"Every run trains {count_text(found[0].trained)} of {count_text(found[0].parameters)} parameters ({found[0].share} %).",)
    if found:
        return ("Trained: parameters that a run trains, the head included, and their share of all parameters of its model.",)
    return ()


def count_text(count: int) -> str:
    """Three significant digits with k, M or G for 10^3, 10^6 or 10^9; below 1000 the number itself."""
    unit, letter = next(((unit, letter) for unit, letter in UNITS if count >= unit), UNITS[-1])
    return f"{_significant(count / unit, 3) if letter else count}{letter}"


def _significant(value: float, digits: int = 2) -> str:
    """A number from 0 with at least so many significant digits, but all digits before the point."""
    if value == 0:
        return "0"
    places = 0
    while value * 10**places < 10 ** (digits - 1) and places < 12:
        places += 1
    return round_half_up(value, places)
