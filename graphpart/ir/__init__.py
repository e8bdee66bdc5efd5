"""Nouns: frozen, comparable, printable values. Nothing here imports torch."""
