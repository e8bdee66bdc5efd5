"""What vendors' data sheets say about devices and links.

Rates are dense (without structured sparsity), per device. ``float32`` is the rate outside tensor cores,
because PyTorch's default (``torch.set_float32_matmul_precision("highest")``) keeps TF32 off for products.
A bandwidth is per direction: half of the bidirectional figure that data sheets give. Memory sizes are
read as powers of ten, which leaves out about what the driver's context and fragmentation take.

Latencies are on no data sheet. The figures here are round numbers for one message between two devices as PyTorch
sends it, launch included; measured ones should replace them where there are any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from graphpart.errors import ClusterError
from graphpart.ir.cluster import Device, Link

# PCI-SIG: 16 lanes at 8/16/32 GT/s with 128b/130b coding give 15.75/31.5/63 GB/s per direction.
PCIE3 = Link(10e-6, 15.75e9)
PCIE4 = Link(10e-6, 31.5e9)
PCIE5 = Link(10e-6, 63.0e9)
# NVIDIA ConnectX-7 data sheet: InfiniBand NDR, 400 Gb/s per port and direction; one port for each device.
INFINIBAND_NDR = Link(10e-6, 50e9)
_NVLINK_LATENCY_S = 5e-6


@dataclass(frozen=True, slots=True)
class DataSheet:
    """One kind of device.

    Attributes:
        kind: the name it has in a cluster.
        pattern: regular expression for names that mean it, without spaces and dashes, in upper case.
        flops_per_s: peak rate by dtype, FLOP/s.
        memory_bytes: memory.
        memory_bandwidth_bytes_per_s: rate of that memory.
        host: link to the host and, where there is no ``peer``, to the host's other devices.
        peer: link to devices of its kind in one node (NVLink and the like), or None.
        source: where the figures come from.
        peer_ports: links that it has to its peers altogether; each message takes one.
    """

    kind: str
    pattern: str
    flops_per_s: Mapping[str, float]
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    host: Link
    peer: Link | None
    source: str
    peer_ports: int = 1


def _tera(float64: float, float32: float, half: float, float8: float | None = None) -> dict[str, float]:
    """Rates by dtype from TFLOP/s."""
    rates = {"float64": float64, "float32": float32, "float16": half, "bfloat16": half}
    if float8 is not None:
        rates |= {"float8_e4m3fn": float8, "float8_e5m2": float8}
    return {dtype: tera * 1e12 for dtype, tera in rates.items()}


def _nvlink(bidirectional_bytes_per_s: float) -> Link:
    return Link(_NVLINK_LATENCY_S, bidirectional_bytes_per_s / 2)


DATA_SHEETS: tuple[DataSheet, ...] = (
    DataSheet(
        "B200", r"B200.*", _tera(37, 75, 2250, 4500), 180_000_000_000, 7.7e12, PCIE5, _nvlink(1800e9),
        "NVIDIA HGX B200 data sheet (2025), per GPU, sparse figures halved",
    ),
    DataSheet(
        "H200-SXM", r"H200(SXM\d?)?(141GB)?(HBM3E)?", _tera(34, 67, 989.4, 1978.9), 141_000_000_000, 4.8e12, PCIE5,
        _nvlink(900e9), "NVIDIA H200 Tensor Core GPU data sheet (2024), sparse figures halved",
    ),
    DataSheet(
        "H100-PCIe", r"H100(80GB)?PCIE.*", _tera(26, 51, 756, 1513), 80_000_000_000, 2.0e12, PCIE5, None,
        "NVIDIA H100 Tensor Core GPU data sheet (2022), PCIe column, sparse figures halved",
    ),
    DataSheet(
        "H100-SXM", r"H100(SXM\d?)?(80GB)?(HBM3)?", _tera(34, 67, 989.4, 1978.9), 80_000_000_000, 3.35e12, PCIE5,
        _nvlink(900e9), "NVIDIA H100 Tensor Core GPU data sheet (2022), SXM column, sparse figures halved",
    ),
    DataSheet(
        "A100-PCIe-80GB", r"A100(80GBPCIE|PCIE80GB)", _tera(9.7, 19.5, 312), 80_000_000_000, 1.935e12, PCIE4, None,
        "NVIDIA A100 Tensor Core GPU data sheet (2021), 80GB PCIe column",
    ),
    DataSheet(
        "A100-PCIe-40GB", r"A100PCIE(40GB)?", _tera(9.7, 19.5, 312), 40_000_000_000, 1.555e12, PCIE4, None,
        "NVIDIA A100 Tensor Core GPU data sheet (2020), 40GB PCIe column",
    ),
    DataSheet(
        "A100-SXM-80GB", r"A100(SXM\d?)?80GB", _tera(9.7, 19.5, 312), 80_000_000_000, 2.039e12, PCIE4,
        _nvlink(600e9), "NVIDIA A100 Tensor Core GPU data sheet (2021), 80GB SXM column",
    ),
    DataSheet(
        "A100-SXM-40GB", r"A100(SXM\d?)?(40GB)?", _tera(9.7, 19.5, 312), 40_000_000_000, 1.555e12, PCIE4,
        _nvlink(600e9), "NVIDIA A100 Tensor Core GPU data sheet (2020), 40GB SXM column",
    ),
    # Volta has no bfloat16 tensor cores: PyTorch computes it at about the float32 rate.
    DataSheet(
        "V100-SXM2-32GB", r"V100(SXM\d?)?32GB", {**_tera(7.8, 15.7, 125), "bfloat16": 15.7e12}, 32_000_000_000, 900e9,
        PCIE3, _nvlink(300e9), "NVIDIA V100 Tensor Core GPU data sheet (2018), SXM2 column",
    ),
    DataSheet(
        "V100-SXM2-16GB", r"V100(SXM\d?)?(16GB)?", {**_tera(7.8, 15.7, 125), "bfloat16": 15.7e12}, 16_000_000_000,
        900e9, PCIE3, _nvlink(300e9), "NVIDIA V100 Tensor Core GPU data sheet (2018), SXM2 column",
    ),
    DataSheet(
        "T4", r"T4", {**_tera(0.254, 8.1, 65), "bfloat16": 8.1e12}, 16_000_000_000, 320e9, PCIE3, None,
        "NVIDIA T4 data sheet (2019); float64 at 1/32 of float32, Turing white paper",
    ),
    DataSheet(
        "L40S", r"L40S", _tera(1.43, 91.6, 362.05, 733), 48_000_000_000, 864e9, PCIE4, None,
        "NVIDIA L40S data sheet (2023), dense column; float64 at 1/64 of float32",
    ),
    DataSheet(
        "L4", r"L4", _tera(0.473, 30.3, 121, 242.5), 24_000_000_000, 300e9, PCIE4, None,
        "NVIDIA L4 data sheet (2023), sparse figures halved; float64 at 1/64 of float32",
    ),
    DataSheet(
        "A10", r"A10G?", _tera(0.4875, 31.2, 125), 24_000_000_000, 600e9, PCIE4, None,
        "NVIDIA A10 data sheet (2021); float64 at 1/64 of float32",
    ),
    DataSheet(
        "RTX4090", r"RTX4090", _tera(1.29, 82.6, 165.2, 330.3), 24_000_000_000, 1008e9, PCIE4, None,
        "NVIDIA Ada GPU architecture white paper (2022), appendix A, float32 accumulation, dense",
    ),
    DataSheet(
        "RTX3090", r"RTX3090", _tera(0.556, 35.6, 71), 24_000_000_000, 936e9, PCIE4, None,
        "NVIDIA Ampere GA102 white paper (2021), table 2, float32 accumulation, dense",
    ),
    DataSheet(
        "MI300X", r"MI300X.*", _tera(81.7, 163.4, 1307.4, 2614.9), 192_000_000_000, 5.3e12, PCIE5,
        Link(_NVLINK_LATENCY_S, 64e9), "AMD Instinct MI300X data sheet (2023); one Infinity Fabric link to each peer",
        peer_ports=7,
    ),
)  # fmt: skip

GENERIC_CUDA = DataSheet(
    "CUDA", r"CUDA", {**_tera(0.3, 10, 40), "bfloat16": 10e12}, 16_000_000_000, 400e9, PCIE3, None,
    "no data sheet: round figures for a CUDA device of unknown kind; give the kind or a measured cluster",
)  # fmt: skip

# Intel 64 and IA-32 Optimization Reference Manual, Haswell and later: two 8-wide float32 FMA per cycle and core
# = 2 units x 8 lanes x 2 FLOP = 32 FLOP a cycle. 2 GHz is what server cores hold under AVX2 load at the least.
CPU_FLOP_PER_CYCLE = 32.0
CPU_CLOCK_HZ = 2.0e9
# JEDEC JESD79-4: DDR4-3200 gives 25.6 GB/s a channel; two channels are the least that hosts have.
CPU_MEMORY_BANDWIDTH_BYTES_PER_S = 2 * 25.6e9
# Handing a reference to another thread wakes that thread: tens of microseconds.
CPU_LINK_LATENCY_S = 20e-6

_VENDOR_WORDS = re.compile(r"NVIDIA|TESLA|GEFORCE|AMD|INSTINCT")


def find_sheet(name: str) -> DataSheet | None:
    """The data sheet that a kind's name means, or None.

    Where a name leaves the memory open (``A100``), the smaller variant is taken: what fits there fits both.

    Args:
        name: such as ``H100``, ``A100-80GB`` or, as CUDA reports it, ``NVIDIA A100-SXM4-80GB``.
    """
    plain = re.sub(r"[^A-Z0-9]", "", _VENDOR_WORDS.sub("", name.upper()))
    return next((sheet for sheet in DATA_SHEETS if re.fullmatch(sheet.pattern, plain)), None)


def device_from_sheet(name: str, sheet: DataSheet, memory_bytes: int | None = None) -> Device:
    """A device as its data sheet describes it.

    Args:
        name: ``cuda:0`` and the like.
        sheet: its data sheet.
        memory_bytes: memory as measured, in place of the data sheet's.
    """
    return Device(
        name,
        sheet.kind,
        dict(sheet.flops_per_s),
        sheet.memory_bytes if memory_bytes is None else int(memory_bytes),
        sheet.memory_bandwidth_bytes_per_s,
    )


def cpu_worker(index: int, num_workers: int, *, num_cores: int, host_memory_bytes: int) -> Device:
    """One of several equal CPU workers that share a host.

    The peak is ``cores / workers * clock * FLOP per cycle`` with the conservative figures of this module;
    memory and its bandwidth are shared evenly.

    Args:
        index: which worker; it is called ``cpu:<index>``.
        num_workers: how many share the host.
        num_cores: cores of the host.
        host_memory_bytes: memory of the host.
    """
    if num_workers < 1:
        raise ClusterError(f"{num_workers} CPU workers were asked for; at least one is needed")
    rate = max(num_cores / num_workers, 1.0) * CPU_CLOCK_HZ * CPU_FLOP_PER_CYCLE
    return Device(
        f"cpu:{index}",
        "CPU",
        {"float32": rate, "float64": rate / 2},
        max(host_memory_bytes // num_workers, 1),
        CPU_MEMORY_BANDWIDTH_BYTES_PER_S / num_workers,
    )
