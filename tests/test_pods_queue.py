"""How long a TPU is waited for, asked for again and given back, by a cloud that answers as told."""

from collections.abc import Sequence

import pytest
from launchers import tpu_vm

THOSE = tpu_vm.Commands(("state",), ("create",), ("delete",), ("run",))


def carried_out(
    states: list[str | None], codes: list[int], keep: bool = False
) -> tuple[int, list[str]]:
    """The exit code and what was done, of a cloud that answers so, each time that it is asked."""
    said: list[str] = []

    def call(those: Sequence[str]) -> int:
        said.append(those[0])
        return codes.pop(0) if those == THOSE.run else 0

    shell = tpu_vm.Shell(call, lambda _: states.pop(0), lambda seconds: said.append(f"{seconds}"))
    code = tpu_vm.carry_out(THOSE, 2, keep, shell)
    assert states == []
    return code, said


@pytest.mark.parametrize(
    ("states", "codes", "expected"),
    [
        (["", "PROVISIONING", "ACTIVE"], [0], (0, "create 30 30 run delete")),
        (["ACTIVE"], [0], (0, "run delete")),
        (["SUSPENDED", "ACTIVE"], [0], (0, "delete create 30 run delete")),
        (["", "FAILED"], [], (1, "create 30")),
        (["", ""], [], (1, "create 30")),
        ([None], [], (1, "")),
        (["", *[None] * 10], [], (1, "create" + " 30" * 10)),
        (["PROVISIONING", *[None] * 9, "ACTIVE"], [0], (0, "30 " * 10 + "run delete")),
        (["ACTIVE", None, "ACTIVE"], [255, 0], (0, "run 30 30 run delete")),
        (["ACTIVE", None, "ACTIVE"], [1, 0], (0, "run 30 run delete")),
        (["ACTIVE"] * 2, [143, 0], (0, "run 30 run delete")),
        (["ACTIVE"] * 2, [75, 0], (0, "run 30 run delete")),
        (["ACTIVE"] * 2, [255, 0], (0, "run 30 run delete")),
        (["ACTIVE"] * 3, [143, 143, 143], (143, "run 30 run 30 run 30")),
        (["ACTIVE"] * 2, [1], (1, "run")),
        (["ACTIVE"] * 2, [2], (2, "run")),
        (["ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"], [1, 0],
         (0, "run 30 delete create 30 run delete")),
    ],
)  # fmt: skip
def test_a_tpu_is_had_and_had_again(
    states: list[str | None], codes: list[int], expected: tuple[int, str]
) -> None:
    code, said = carried_out(states, codes)
    assert (code, " ".join(said)) == expected


def test_a_tpu_that_is_refused_is_not_waited_for() -> None:
    said: list[str] = []
    shell = tpu_vm.Shell(lambda _: 1, lambda _: "", lambda seconds: said.append(f"{seconds}"))
    assert (tpu_vm.carry_out(THOSE, 2, False, shell), said) == (1, [])


def test_a_tpu_is_kept_where_asked() -> None:
    assert carried_out(["ACTIVE"], [0], keep=True) == (0, ["run"])
