"""Placements that fit: homes, checks, and what runs again."""
