"""Who runs what: strategies that turn a graph and a cluster into a placement. No torch needed."""

from graphpart.strategies.auto import Candidate, auto
from graphpart.strategies.carry import carry
from graphpart.strategies.constraints import colocate, constraints_of, keep_whole, pin, split
from graphpart.strategies.fitting import fitted, recomputing, settled
from graphpart.strategies.holding import Held, Holding
from graphpart.strategies.layer import LayerPlan, StageForecast, layer, plan_layers
from graphpart.strategies.manual import by_hand
from graphpart.strategies.neurons import Masks
from graphpart.strategies.patterns import by_pattern
from graphpart.strategies.recompute import Recompute, check_recompute, groups_of
from graphpart.strategies.registry import STRATEGIES, Strategy, check_options
from graphpart.strategies.single import single

__all__ = [
    "STRATEGIES",
    "Candidate",
    "Held",
    "Holding",
    "LayerPlan",
    "Masks",
    "Recompute",
    "StageForecast",
    "Strategy",
    "auto",
    "by_hand",
    "by_pattern",
    "carry",
    "check_options",
    "check_recompute",
    "colocate",
    "constraints_of",
    "fitted",
    "groups_of",
    "keep_whole",
    "layer",
    "pin",
    "plan_layers",
    "recomputing",
    "settled",
    "single",
    "split",
]
