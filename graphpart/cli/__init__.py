"""The command line: ``graphpart plan | explain | draw | simulate | run``."""

from graphpart.cli.main import main

__all__ = ["main"]
