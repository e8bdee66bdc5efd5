"""The command line: ``graphpart plan | explain | draw | run``."""

from graphpart.cli.main import main

__all__ = ["main"]
