"""What things cost: clusters and data sheets, time of an operator, memory of a placement. No torch needed."""

from graphpart.cost.devices.cluster_files import cluster_from_dict, cluster_to_dict, dump_toml, load_toml
from graphpart.cost.devices.clusters import make_cluster, preset
from graphpart.cost.memory.forecast import DeviceMemory, MemoryForecast, forecast_memory, forecast_together
from graphpart.cost.time.roofline import OperatorTime, OperatorWork, operator_time, operator_works, step_time

__all__ = [
    "DeviceMemory",
    "MemoryForecast",
    "OperatorTime",
    "OperatorWork",
    "cluster_from_dict",
    "cluster_to_dict",
    "dump_toml",
    "forecast_memory",
    "forecast_together",
    "load_toml",
    "make_cluster",
    "operator_time",
    "operator_works",
    "preset",
    "step_time",
]
