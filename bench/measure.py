"""Rounds in which variants take turns, and ratios within a round.

Whatever else the machine does hits the variants of one round alike, so a ratio of two of the
same round says something where a rate of its own says little.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one variant made in every round.

    :param section: the letter of the section of the benchmark.
    :param case: what was asked.
    :param variant: of whom.
    :param unit: of the values.
    :param values: one for each round.
    :param base: the variant that the ratios are to; None where the values say it.
    :param ratios: one for each round.
    :param floor: what the ratio is to be at least.
    """

    section: str
    case: str
    variant: str
    unit: str
    values: list[float]
    base: str | None = None
    ratios: list[float] = field(default_factory=list)
    floor: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    def as_json(self) -> dict[str, Any]:
        spread = [min(self.ratios), max(self.ratios)] if self.ratios else None
        return {**asdict(self), "median": self.median, "ratio": self.ratio, "spread": spread}

    def __str__(self) -> str:
        text = f"{self.section}  {self.case:<44} {self.variant:<34}"
        text += f"{self.median:>10,.1f} {self.unit:<14}"
        if self.ratio is None:
            return text
        text += f"{self.ratio:6.3f} of {self.base} ({min(self.ratios):.2f}-{max(self.ratios):.2f})"
        if self.floor is not None:
            text += f"  {'meets' if self.ratio >= self.floor else 'MISSES'} {self.floor:.2f}"
        return text


def interleaved(
    section: str,
    case: str,
    variants: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    unit: str,
    bases: Mapping[str, str] | None = None,
    floors: Mapping[str, float] | None = None,
) -> list[Figure]:
    """Measure each variant once a round, in an order of the round's own.

    :param variants: by name, what makes one value.
    :param bases: which variant each is to be compared with; by default the first.
    :param floors: by variant, the least that its ratio is to be.
    """
    first = next(iter(variants))
    made: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in random.Random(number).sample(list(variants), len(variants)):
            made[name].append(variants[name]())
    figures = []
    for name, values in made.items():
        base = (bases or {}).get(name, first)
        ratios = [value / of for value, of in zip(values, made[base], strict=True)]
        compared = name != base
        figures.append(
            Figure(
                section=section,
                case=case,
                variant=name,
                unit=unit,
                values=values,
                base=base if compared else None,
                ratios=ratios if compared else [],
                floor=(floors or {}).get(name),
            )
        )
    for figure in figures:
        print(figure, file=sys.stderr, flush=True)
    return figures
