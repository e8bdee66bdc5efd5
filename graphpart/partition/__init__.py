"""Who runs what: strategies that turn a graph and a cluster into a placement. No torch needed."""

from graphpart.partition.auto import Candidate, auto
from graphpart.partition.carry import carry
from graphpart.partition.layer import LayerPlan, StageForecast, layer, plan_layers
from graphpart.partition.manual import by_pattern
from graphpart.partition.registry import STRATEGIES, Strategy
from graphpart.partition.single import single

__all__ = [
    "STRATEGIES",
    "Candidate",
    "LayerPlan",
    "StageForecast",
    "Strategy",
    "auto",
    "by_pattern",
    "carry",
    "layer",
    "plan_layers",
    "single",
]
