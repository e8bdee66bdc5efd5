"""Rewrites of operators that a plain cut would compute wrongly."""
