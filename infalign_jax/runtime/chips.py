"""Published peaks of TPU chips: what a program cannot be faster than."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip's peaks.

    >>> Chip._fields
    ('flops', 'memory', 'memory_rate', 'network_rate')
    """

    flops: float  # bfloat16 operations a second
    memory: int  # bytes of HBM
    memory_rate: float  # bytes a second between HBM and chip
    network_rate: float  # bytes a second that all of its links together bring in


# Google Cloud's tables of key specifications, cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, 2025.
# Links are given there in Gbit/s one way (v5e 1600, v5p 4800, v6e 3200) or in GB/s both ways (400,
# 1200, 800), which agree; v4's, six of 50 GB/s each, is from arXiv 2304.01433, table 4. Capacities
# are GiB: the compiler grants 15.75 of a v5e's 16.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 400e9),
}

KINDS = {  # as JAX names its devices
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def of(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`, None where its peaks are not known.

    >>> of("TPU v5 lite") is CHIPS["v5e"], of("cpu")
    (True, None)
    """
    return CHIPS[KINDS[device_kind]] if device_kind in KINDS else None
