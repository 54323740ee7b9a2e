"""Numbers as a reader wants them: bytes in decimal units, shares in per cent, differences in points, ratios."""

import math
import re

from pipeline.plumbing.byte_sizes import BYTE_UNITS

MINUS = "−"


def format_bytes(size: float) -> str:
    """``size`` bytes with three significant digits in decimal units."""
    for unit, power in BYTE_UNITS[:-1]:
        # 999.5 of a unit would round to 1000 of it.
        if size >= 0.9995 * power:
            value = size / power
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{size:.0f} B"


def format_percent(fraction: float, decimals: int = 1) -> str:
    """``fraction`` in per cent; what is positive but would be rounded to zero is shown as below the last digit."""
    if fraction > 0 and round(100 * fraction, decimals) == 0:
        return f"<{10.0**-decimals:.{decimals}f} %"
    return f"{100 * fraction:.{decimals}f} %".replace("-", MINUS)


def format_points(fraction: float, decimals: int = 1) -> str:
    """A difference of two fractions in percentage points, with its sign; the unit is left to the heading."""
    rounded = round(100 * fraction, decimals)
    return f"{rounded:+.{decimals}f}".replace("-", MINUS) if rounded else f"{0:.{decimals}f}"


def format_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_error(value: float) -> str:
    """A small positive number with two significant digits."""
    if value == 0 or value >= 1e-3:
        return f"{value:.2g}"
    return re.sub(r"e-0*", f"e{MINUS}", f"{value:.1e}")


def format_rate(value: float) -> str:
    """Things per second, with three significant digits or more."""
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def format_perplexity(perplexity: float, error: float) -> tuple[str, str]:
    """A perplexity and its standard error, both to the second digit of the error, at most to the fourth decimal."""
    if perplexity >= 1e6:
        return _exponential(perplexity), _exponential(error)
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 4) if error > 0 else 2
    return f"{perplexity:,.{decimals}f}", f"{error:,.{decimals}f}"


def format_ratio(ratio: float, error: float | None = None) -> str:
    """A ratio near 1 to the third decimal, a large one as a whole number; followed by ``±`` its standard error."""
    if ratio >= 1e6:
        return _exponential(ratio) + ("" if error is None else f" ± {_exponential(error)}")
    decimals = 3 if ratio < 9.9995 else 1 if ratio < 999.95 else 0
    text = f"{ratio:,.{decimals}f}"
    if error is None:
        return text
    smallest = 10.0**-decimals
    below = 0 < error < smallest / 2
    return f"{text} ± {'<' if below else ''}{smallest if below else error:,.{decimals}f}"


def format_tick(value: float, *, exponents: bool) -> str:
    """A round number; with ``exponents``, powers of ten from ten thousand on as ``1e4``."""
    return _exponential(value, 0) if exponents and value >= 9_999 else f"{value:,.6g}"


def _exponential(value: float, decimals: int = 1) -> str:
    return re.sub(r"e\+0*", "e", f"{value:.{decimals}e}")


def accuracy_decimals(samples: int) -> int:
    """Decimals of a percentage that tell one sample's difference without pretending to more."""
    return 1 if samples < 2000 else 2
