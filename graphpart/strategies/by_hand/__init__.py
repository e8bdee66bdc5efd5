"""Placements by hand: constraints over patterns of module paths."""
