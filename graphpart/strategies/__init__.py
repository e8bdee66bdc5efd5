"""Who runs what: strategies that turn a graph and a cluster into a placement. No torch needed."""

from graphpart.strategies.auto import Candidate, auto
from graphpart.strategies.carry import carry
from graphpart.strategies.constraints import colocate, constraints_of, keep_whole, pin, split
from graphpart.strategies.layer import LayerPlan, StageForecast, layer, plan_layers
from graphpart.strategies.manual import by_hand
from graphpart.strategies.neurons import Masks
from graphpart.strategies.patterns import by_pattern
from graphpart.strategies.recompute import Recompute, groups_of
from graphpart.strategies.registry import STRATEGIES, Strategy
from graphpart.strategies.single import single

__all__ = [
    "STRATEGIES",
    "Candidate",
    "LayerPlan",
    "Masks",
    "Recompute",
    "StageForecast",
    "Strategy",
    "auto",
    "by_hand",
    "by_pattern",
    "carry",
    "colocate",
    "constraints_of",
    "groups_of",
    "keep_whole",
    "layer",
    "pin",
    "plan_layers",
    "single",
    "split",
]
