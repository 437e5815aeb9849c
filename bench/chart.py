"""A bar for each ratio, as SVG that a page can include."""

from __future__ import annotations

from html import escape

from bench.measure import Figure

_ROW, _LABEL, _BAR, _RIGHT = 22, 550, 420, 60  # pixels


def chart(figures: list[Figure]) -> str:
    """Median ratios as bars, their spread as lines, what they are to be at least as ticks."""
    shown = [figure for figure in figures if figure.section == "c" and figure.base == "bare"]
    width, height = _LABEL + _BAR + _RIGHT, _ROW * (len(shown) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12" role="img">',
        "<title>Throughput, as a ratio to the bare application of the same round</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for line in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(line)
        parts.append(f'<path d="M{x} {_ROW}V{height - _ROW}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{_ROW - 6}" text-anchor="middle">{line:g}</text>')
    for number, figure in enumerate(shown):
        parts += _bar(figure, _ROW * (number + 1) + 4)
    parts.append("</svg>\n")
    return "\n".join(parts)


def _bar(figure: Figure, y: int) -> list[str]:
    assert figure.ratio is not None
    middle, low, high = y + 7, min(figure.ratios), max(figure.ratios)
    ours = "bare" not in figure.variant and "reference" not in figure.variant
    label = escape(f"{figure.case}: {figure.variant}")
    made = [
        f'<text x="{_LABEL - 8}" y="{y + 11}" text-anchor="end">{label}</text>',
        f'<rect x="{_LABEL}" y="{y}" width="{_x(figure.ratio) - _LABEL:.1f}" height="14"'
        f' fill="{"#3b7dd8" if ours else "#b8c4d4"}"/>',
        f'<path d="M{_x(low):.1f} {middle}H{_x(high):.1f}" stroke="#222"/>',
        f'<text x="{_LABEL + _BAR + 10}" y="{y + 11}">{figure.ratio:.2f}</text>',
    ]
    if figure.floor is not None:
        made.append(f'<path d="M{_x(figure.floor):.1f} {y - 2}v18" stroke="#c33"/>')
    return made


def _x(ratio: float) -> float:
    return _LABEL + min(ratio, 1.1) / 1.1 * _BAR
