"""Hosts that wait for one another in threads, and of whose errors every host hears.

They speak by way of JAX's coordinator and not by collectives, which belong to the main thread.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

PATIENCE = 7 * 24 * 3600  # seconds; a host that is lost is missed by its heartbeat, long before

_NUMBERS = itertools.count()  # of a process's meetings: every host opens the same ones, in turn


class Elsewhere(OSError):
    """What another host met."""


@dataclass
class Meeting:
    """Hosts that do one thing in steps and meet after each; every host opens it.

    >>> meeting = Meeting()
    >>> meeting.meet(), meeting.meet(OSError("disk full"))  # one host
    (None, None)
    """

    number: int = field(default_factory=_NUMBERS.__next__)
    places: Iterator[int] = field(default_factory=itertools.count)
    over: bool = False  # since one met an error, and all have heard

    def meet(self, error: BaseException | None = None) -> None:
        """Waits until all hosts have come, one perhaps with an error that ends its work.

        Raises Elsewhere on those that come without one where another has one. Then it is over.
        """
        if jax.process_count() == 1 or self.over:
            return
        from jax._src import distributed  # JAX shows no other way, Orbax takes the same

        client: Any = distributed.global_state.client
        place = f"infalign/{self.number}/{next(self.places)}"
        if error is not None:
            client.key_value_set(f"{place}/{jax.process_index()}", _told(error))
        client.wait_at_barrier(place, PATIENCE * 1000)
        told = client.key_value_dir_get(f"{place}/")
        self.over = bool(told)
        if told and error is None:
            where, what = min(told)
            raise Elsewhere(f"host {where.rsplit('/', 1)[1]}: {what}")

    def do(self, work: Callable[[], None]) -> None:
        """Does this host's work, which may meet too, and returns when all have done theirs.

        Raises what it met itself, or Elsewhere.

        >>> Meeting().do(lambda: print("done"))
        done
        """
        try:
            work()
        except BaseException as error:
            try:
                self.meet(error)
            finally:
                raise error
        self.meet()


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
