"""Axis rules by family of operators: a line of notation each."""
