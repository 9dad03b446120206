"""The quickstart's sharp policy by one solver or another: what decides the defaults.

Command:   infalign run experiments/solvers.py --out runs/quickstart SETTINGS
           one run after another in the directory of a finished quickstart, whose stages they
           share; the settings of each are in experiments/results/solvers/README.md
Cost:      2.5 to 7 minutes a run, one thread each, beside other work
Expected:  the table in experiments/results/solvers/README.md
"""

import runpy
from dataclasses import replace
from pathlib import Path

from infalign_jax.experiment import PolicyConfig

quickstart = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
experiment = replace(
    quickstart["experiment"],
    name="solvers",
    policies=(PolicyConfig("exponential(10)", kl=0.5),),
)
