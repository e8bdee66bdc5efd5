"""Who runs what: strategies that turn a graph and a cluster into a placement. No torch needed."""

from graphpart.strategies.auto import Candidate, auto
from graphpart.strategies.by_hand.constraints import colocate, constraints_of, keep_whole, pin, split
from graphpart.strategies.by_hand.patterns import by_pattern
from graphpart.strategies.by_hand.place import by_hand
from graphpart.strategies.cuts.neuron_groups import Masks
from graphpart.strategies.layer import LayerPlan, StageForecast, layer, plan_layers
from graphpart.strategies.memory.fit import Strategy, fitted, recomputing, settled
from graphpart.strategies.memory.in_flight import InFlight, StepPeak
from graphpart.strategies.memory.recompute_groups import Recompute, check_recompute, groups_of
from graphpart.strategies.memory.terms import Terms
from graphpart.strategies.registry import (
    OPTIONS,
    STRATEGIES,
    check_devices,
    check_strategy,
    degrees_of,
    is_named,
    strategy_named,
)
from graphpart.strategies.single import single

__all__ = [
    "OPTIONS",
    "STRATEGIES",
    "Candidate",
    "InFlight",
    "LayerPlan",
    "Masks",
    "Recompute",
    "StageForecast",
    "StepPeak",
    "Strategy",
    "Terms",
    "auto",
    "by_hand",
    "by_pattern",
    "check_devices",
    "check_recompute",
    "check_strategy",
    "colocate",
    "constraints_of",
    "degrees_of",
    "fitted",
    "groups_of",
    "is_named",
    "keep_whole",
    "layer",
    "pin",
    "plan_layers",
    "recomputing",
    "settled",
    "single",
    "split",
    "strategy_named",
]
