"""Kernels of what lowering adds, of tiles, and of gradients in two parts."""
