"""Reads the event files that TensorBoard reads."""

import struct
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event


def read(directory: Path) -> list[Any]:
    """The events of a directory's files: each has its length and two checksums around it."""
    found = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def numbers(directory: Path) -> dict[tuple[str, int], float]:
    """The scalars of a directory by (name, step)."""
    return {
        (value.tag, event.step): value.simple_value
        for event in read(directory)
        for value in event.summary.value
    }
