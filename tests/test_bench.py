"""The benchmark runs, says what it needs, and keeps what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

BENCH = Path(__file__).parent.parent / "bench"


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_a_section_is_measured_printed_and_kept(tmp_path: Path) -> None:
    kept, chart = tmp_path / "bench.json", tmp_path / "bench.svg"
    done = run("--only", "a", "--rounds", "1", "--json", kept, "--chart", chart)
    assert done.returncode == 0, done.stderr
    figures = json.loads(kept.read_text())["figures"]
    assert {figure["case"] for figure in figures} == {
        "GET passing through",
        "POST without a key",
        "replay",
        "fresh",
    }
    assert all(f"{figure['case']} " in done.stdout for figure in figures)
    assert ElementTree.fromstring(chart.read_text()).tag.endswith("svg")


def test_a_machine_without_wrk_is_told_how_to_get_it() -> None:
    done = run("--only", "c", PATH="")
    assert done.returncode == 1
    assert "apt-get install wrk" in done.stderr


def test_a_section_that_there_is_not_is_refused() -> None:
    done = run("--only", "a,z")
    assert done.returncode == 2
    assert "there is no section z" in done.stderr
