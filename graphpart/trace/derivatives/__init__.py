"""Derivatives that a forward takes itself: marked while it is exported, and then written out by the chain rule."""
