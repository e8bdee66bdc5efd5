"""Splits of an operator order into stages."""
