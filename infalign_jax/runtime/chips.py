"""Published peaks of TPU chips and GPUs: what a program cannot be faster than."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip's peaks.

    >>> Chip._fields
    ('flops', 'memory', 'memory_rate', 'network_rate', 'between_rate')
    """

    flops: float  # bfloat16 operations a second
    memory: int  # bytes
    memory_rate: float  # bytes a second between memory and chip
    network_rate: float  # bytes a second that all of its links together bring in
    between_rate: float = 0.0  # bytes a second that come in from other slices, 0 if not known


# Google Cloud's tables of key specifications, cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, 2025.
# Links are given there in Gbit/s one way (v5e 1600, v5p 4800, v6e 3200) or in GB/s both ways (400,
# 1200, 800), which agree; v4's, six of 50 GB/s each, is from arXiv 2304.01433, table 4. Capacities
# are GiB: the compiler grants 15.75 of a v5e's 16. Between slices: 6.4 and 25.6 Tbit/s a pod of 256
# (v5e, v6e), 50 Gbit/s a chip (v5p); Google does not say v4's.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9, 3.125e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 12.5e9),
}
# NVIDIA's data sheets of the A100 80GB, H100 and H200 (SXM), and an eighth of a DGX B200's eight.
# Rates of products are those without sparsity, half of what the newer sheets print first. NVLink is
# given there both ways together (600, 900, 900 and 1800 GB/s).
GPUS = {
    "a100": Chip(312e12, 80 * 10**9, 2039e9, 300e9),
    "h100": Chip(989e12, 80 * 10**9, 3350e9, 450e9),
    "h200": Chip(989e12, 141 * 10**9, 4800e9, 450e9),
    "b200": Chip(2250e12, 180 * 10**9, 8000e9, 900e9),
}
MOST_GPUS = 8  # that NVLink joins in one machine
KINDS = {  # as JAX names its devices
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def of(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`, None where its peaks are not known.

    >>> of("TPU v5 lite") is CHIPS["v5e"], of("cpu")
    (True, None)
    """
    return (CHIPS | GPUS)[KINDS[device_kind]] if device_kind in KINDS else None
