"""The one tree of errors a user of graphpart can meet.

Every error derives from :class:`GraphpartError`, so ``except gp.GraphpartError`` catches all of them.
A message names the operator, device, bytes or axis at fault and says what to do about it.
"""


class GraphpartError(Exception):
    """Base of every error that graphpart raises on purpose."""


class ArgumentError(GraphpartError, ValueError):
    """An argument has a value that it cannot have; the message names the argument and says what may be given."""


class TraceError(GraphpartError):
    """The model could not be read as a dataflow graph."""


class UnsupportedOperatorError(TraceError):
    """The model uses something that cannot be split without changing its meaning."""


class ModelError(ArgumentError):
    """A model or its example arguments, named on the command line, cannot be made."""


class GraphError(GraphpartError):
    """A graph is malformed: a missing input, a duplicate name, or operators out of order."""


class ProgramError(GraphpartError):
    """A program breaks what all programs keep: a fault of what made it, found before anything runs."""


class ClusterError(ArgumentError):
    """A description of devices or links is wrong."""


class PlacementError(GraphpartError, ValueError):
    """A placement names an unknown operator, device or axis, or cuts what cannot be cut."""


class OutOfMemoryError(PlacementError):
    """No placement fits the memory of the devices, as forecast before anything ran."""


class PlanError(GraphpartError, ValueError):
    """A plan cannot be read or written, or was made for another model or other devices."""


class MicrobatchError(ArgumentError):
    """The batch cannot be cut into the wanted number of microbatches."""


class ScheduleError(GraphpartError):
    """A schedule breaks a dependency or would wait for ever; found before launch."""


class ExecutionError(GraphpartError, RuntimeError):
    """An operator failed while running on a device. The original exception is ``__cause__``."""


class DeviceOutOfMemoryError(ExecutionError):
    """A device ran out of memory in a step; the message gives forecast, peak and a sufficient ``memory_reserve``."""


class DeadlineError(ExecutionError):
    """A device waited longer than the program's deadline for a message."""


class RanksDifferError(ExecutionError):
    """Processes are about to do different things; every one of them raises it, before anything runs."""


class AutogradError(GraphpartError, RuntimeError):
    """A use of autograd that graphpart refuses: double backward or ``retain_graph`` across bridges."""


class ParameterError(GraphpartError, RuntimeError):
    """An operation on tiled parameters that has no exact meaning tile by tile."""


class StateDictError(GraphpartError, RuntimeError):
    """``load_state_dict`` met missing, unexpected or wrongly shaped entries."""


class VerificationError(GraphpartError, AssertionError):
    """``parted.verify`` found a difference from the plain model."""


class DrawError(GraphpartError, RuntimeError):
    """A picture or a trace could not be written; where Graphviz is missing, the DOT source lies there instead."""
