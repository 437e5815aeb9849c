"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

from bench import client, growth, in_process, store, whole
from bench.chart import chart
from bench.measure import Figure
from bench.rows import measured_server

SECTIONS = {
    "a": "in process: CPU and function calls, with a store that answers at once",
    "b": "the store against pgbench with the same statements; a request's CPU against references",
    "c": "gunicorn: bare, wrapped, and two minimal references",
    "d": "growth: rows, bodies, scopes",
    "e": "contention: 50 claims of one key",
    "f": "distance: 2 ms each way to the database",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench",
        description="Measure, every figure a ratio within one interleaved run.",
        epilog=" ".join(f"{letter}: {what}." for letter, what in SECTIONS.items()),
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, such as a,c")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each single measurement")
    parser.add_argument("--rounds", type=int, default=5, help="in which the variants take turns")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of a large table")
    parser.add_argument("--json", type=Path, help="write every value there")
    parser.add_argument("--chart", type=Path, help="draw the ratios there, as SVG")
    options = parser.parse_args()
    chosen = set(options.only.split(","))
    if unknown := chosen - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    if "c" in chosen:
        whole.require_wrk()

    started = time.monotonic()
    figures = _measure(chosen, options)
    print(f"\n{platform.python_implementation()} {platform.python_version()},"
          f" {os.cpu_count()} cores, {time.monotonic() - started:.0f} s")  # fmt: skip
    for figure in figures:
        print(figure)
    if options.json is not None:
        options.json.write_text(json.dumps(_results(figures, options), indent=1) + "\n")
    if options.chart is not None:
        options.chart.write_text(chart(figures))
    missed = [f for f in figures if f.floor is not None and (f.ratio or 0) < f.floor]
    print(f"{len(missed)} of the floors are missed", file=sys.stderr)
    return 0


def _measure(chosen: set[str], options: argparse.Namespace) -> list[Figure]:
    rounds, seconds = options.rounds, options.seconds
    figures: list[Figure] = []
    if "a" in chosen:
        figures += in_process.measure(rounds=rounds)
    if chosen <= {"a"}:
        return figures
    with measured_server() as server:
        if "b" in chosen:
            figures += store.measure(server, rounds=rounds, seconds=seconds)
            figures += client.measure(server, rounds=rounds)
        if "c" in chosen:
            figures += whole.measure(server, rounds=rounds, seconds=seconds)
        if "e" in chosen:
            figures += growth.contention(server, rounds=rounds)
        if "f" in chosen:
            figures += growth.distance(server, rounds=rounds)
        if "d" in chosen:  # last: its large table leaves a busy disk behind
            figures += growth.growth(server, rounds=rounds, seconds=seconds, rows=options.rows)
    return figures


def _results(figures: list[Figure], options: argparse.Namespace) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "seconds": options.seconds,
        "rounds": options.rounds,
        "figures": [figure.as_json() for figure in figures],
    }
