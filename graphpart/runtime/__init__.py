"""Runs programs: kernels, workers, executors and parameters."""
