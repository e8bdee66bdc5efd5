"""Runs programs: workers in threads or in processes, and the module that hides them."""
