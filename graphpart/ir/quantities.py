"""Numbers with units, for people: bytes, operations, counts and times in messages, tables and pictures."""

from __future__ import annotations

_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def format_bytes(size_bytes: float) -> str:
    """Bytes in decimal units, three digits: ``1.57 MB``."""
    return _scaled(size_bytes, "B")


def format_flops(work_flops: float) -> str:
    """Floating-point operations in decimal units, three digits: ``3.4 GFLOP``."""
    return _scaled(work_flops, "FLOP")


def format_count(count: float) -> str:
    """A count in decimal units, three digits: ``124 M``."""
    return _scaled(count, "").rstrip()


def format_time(time_s: float) -> str:
    """Seconds in a unit that keeps three digits before or after the point: ``1.23 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(time_s) >= 0.9995 * scale:
            return f"{_digits(time_s / scale)} {unit}"
    return f"{_digits(time_s * 1e9)} ns" if time_s else "0 s"


def _scaled(amount: float, unit: str) -> str:
    power = 0
    while abs(amount) >= 999.5 and power < len(_DECIMAL) - 1:
        amount /= 1000
        power += 1
    return f"{_digits(amount)} {_DECIMAL[power]}{unit}"


def _digits(amount: float) -> str:
    if amount == int(amount) and abs(amount) < 1000:
        return str(int(amount))
    places = 2 if abs(amount) < 9.995 else 1 if abs(amount) < 99.95 else 0
    text = f"{amount:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
