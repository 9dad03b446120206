"""The launchers of experiments/pods, and what they are told in tests."""

import importlib
import shlex
import sys
from types import ModuleType

import pytest
from sources import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "pods"))
launch, tpu_vm, gke_xpk, slurm = map(
    importlib.import_module, ("launch", "tpu_vm", "gke_xpk", "slurm")
)

COMMON = ["experiments/quickstart.py", "--name", "quick", "--repository", "https://h/a.git"]
COMMON += ["--revision", "v1", "--dry-run"]
CLOUD = ["--accelerator", "v5litepod-16", "--zone", "us-west4-a", "--out", "gs://b/my runs"]
OWN: dict[str, tuple[ModuleType, list[str]]] = {
    "tpu": (tpu_vm, [*CLOUD, "--project", "p"]),
    "gke": (gke_xpk, [*CLOUD, "--cluster", "c"]),
    "slurm": (slurm, ["--nodes", "2", "--gpus-per-node", "8", "--out", "gs://b/my runs"]),
}
FURTHER = ["--", "--set", "policies.0.transformation=exponential(10)", "--seed", "1"]


def printed(capsys: pytest.CaptureFixture[str], which: str, *more: str) -> list[list[str]]:
    """The commands of a dry run, as a shell would take them apart."""
    module, own = OWN[which]
    assert module.main([*COMMON, *own, *more, *FURTHER]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]
