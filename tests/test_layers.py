"""Who may import whom, and who may touch the disk: the picture of the house against the house.

Every check is a function of sources, so that a planted fault shows that it bites.
"""

import ast
import re
import tomllib

import pytest
from sources import (
    PACKAGE,
    ROOT,
    Sources,
    imported,
    inside_package,
    outsiders_imported,
    python_files,
)

MATHEMATICS = {
    "procedures",
    "transformations",
    "frontier",
    "quadrature",
    "objective",
    "optimum",
    "shared",
    "shooting",
    "collocation",
    "panels",
    "subsets",
    "levels",
    "climbing",
    "calibration",
    "ranking",
    "posterior",
    "evaluation",
    "divergence",
    "prediction",
    "notation",
    "sample_size",
}
PLUMBING = {"batches", "lm", "runtime"}
CONFIGURED = {
    "notation",
    "hh",
    "learner",
    "drawing",
    "sampling",
    "synthetic",
    "training",
    "lm",
    "runtime",
}
EVERYTHING = None

# Room -> the rooms it may import beside itself. `lm`, `runtime` and `report*` are one room each.
MAY_IMPORT: dict[str, set[str] | None] = {
    "__init__": set(),
    "batches": set(),
    **dict.fromkeys(MATHEMATICS, MATHEMATICS),
    "columns": set(),
    "tables": {"runtime"},
    "reward_files": {"columns", "tables"},
    "calibrated_reward": {"calibration", "tables", "transformations"},
    "lm": PLUMBING,
    "runtime": PLUMBING,
    "config": {"runtime"},
    "data": PLUMBING,
    "hh": PLUMBING | {"data"},
    "store": PLUMBING | {"data"},
    "synthetic": PLUMBING | {"data"},
    "drawing": PLUMBING,
    "sampling": PLUMBING | {"drawing"},
    "programs": PLUMBING | {"drawing", "sampling", "reward"},
    "training": PLUMBING,
    "reward": PLUMBING,
    "foresight": PLUMBING,
    "learner": PLUMBING | {"training"},
    "rollout": PLUMBING | {"calibration", "learner", "programs", "transformations"},
    "report": {"frontier", "notation", "runtime"},
    "experiment": CONFIGURED,
    "phases": PLUMBING | {"experiment", "programs"},
    "stages": EVERYTHING,
    "pipeline": EVERYTHING,
    "commands": EVERYTHING,
    "cli": EVERYTHING,
}
MATHEMATICS_NEEDS = {"jax", "numpy"}  # from outside the package and Python
TOUCH_THE_DISK = {
    "runtime/agreement.py",  # reads the package's own sources
    "runtime/arrays.py",
    "runtime/checkpoint.py",
    "runtime/doctor.py",  # a file without a name, to see how fast the disk is
    "runtime/events.py",
    "runtime/files.py",
    "runtime/metrics.py",
    "runtime/progress.py",
    "runtime/profile.py",  # through JAX's profiler alone
    "columns.py",
    "tables.py",  # writes through runtime/files.py alone
    "hh.py",
    "store.py",
    "lm/tokenizer.py",
    "lm/pretrained.py",
    "report.py",
    "report_data.py",
    "pipeline.py",  # through runtime/files.py alone
    "stages/text.py",
    "commands/bench.py",  # reads what an earlier run wrote
    "commands/printing.py",  # through runtime/files.py alone
}

DISK_MODULES = re.compile(
    "array_record|fcntl|fileinput|gzip|orbax|shutil|sqlite3|tarfile|tempfile|tensorflow_datasets"
    "|tensorboardX|zipfile"
)
DISK_CALLS = re.compile(
    r"(.+\.)?(open|(write|read)_(text|bytes)|mkdir|makedirs|unlink|rmdir|rename|touch"
    r"|(sym|hard)link_to|save(fig|txt|z|z_compressed)|loadtxt|genfromtxt|fromfile|tofile|memmap)"
    r"|(np|numpy|jnp)\.(load|save)|os\.(replace|remove|truncate|symlink|link)",
    re.DOTALL,
)

DISTRIBUTION = {  # where the name one imports is not the name one installs
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "tunix": "google-tunix",
}
IMPORTED_BY_OTHERS = {"importlib_resources"}  # by tensorflow-datasets, which does not ask for it


def room_of(path: str) -> str:
    """`lm/tokenizer.py` is in the room `lm`, `data.py` in `data`, `report_plots.py` in `report`."""
    room = inside_package(path).split("/")[0].removesuffix(".py")
    return "report" if room.startswith("report_") else room


def rooms_imported(path: str, source: str) -> set[str]:
    names = [name.split(".") for name in imported(path, source)]
    inside = {name[1] for name in names if name[0] == PACKAGE and len(name) > 1}
    return {room_of(room) for room in inside if not room.startswith("__")} - {room_of(path)}


def wrong_imports(files: Sources) -> list[str]:
    found = []
    for path, source in files.items():
        room = room_of(path)
        if room not in MAY_IMPORT:
            found.append(f"{path}: a room the table does not know; enter whom it may import")
            continue
        allowed = MAY_IMPORT[room]
        if allowed is not None and (wrong := rooms_imported(path, source) - allowed):
            found.append(f"{path}: imports {sorted(wrong)}")
        outside = outsiders_imported(path, source)
        if room in MATHEMATICS and (wrong := outside - MATHEMATICS_NEEDS):
            found.append(f"{path}: the mathematics imports {sorted(wrong)}")
    return found


def touches_disk(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if call.args and ast.unparse(call.args[0]) == "buffer":  # a figure drawn into memory
        return False
    own_data = name.startswith("resources.files(")  # a template installed with the package
    return DISK_CALLS.fullmatch(name) is not None and not own_data


def disk_users(files: Sources) -> list[str]:
    found = []
    for path, source in files.items():
        if inside_package(path) in TOUCH_THE_DISK:
            continue
        modules = {name.split(".")[0] for name in imported(path, source)}
        if wrong := sorted(name for name in modules if DISK_MODULES.fullmatch(name)):
            found.append(f"{path}: imports {wrong}")
        calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        hands = (call for call in calls if touches_disk(call))
        found += [f"{path}:{call.lineno}: {ast.unparse(call.func)}" for call in hands]
    return found


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0] for requirement in requirements}


def distributions_imported(files: Sources) -> set[str]:
    names = {name for path, source in files.items() for name in outsiders_imported(path, source)}
    return {DISTRIBUTION.get(name, name) for name in names}


PACKAGE_FILES = python_files(PACKAGE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDS = requirement_names(PROJECT["dependencies"])
EXTRAS = {
    extra: requirement_names(listed) for extra, listed in PROJECT["optional-dependencies"].items()
}


def test_imports_follow_the_table() -> None:
    assert f"{PACKAGE}/batches.py" in PACKAGE_FILES
    assert wrong_imports(PACKAGE_FILES) == []


def test_only_the_listed_files_touch_the_disk() -> None:
    assert disk_users(PACKAGE_FILES) == []


def test_what_is_imported_is_declared() -> None:
    assert distributions_imported(PACKAGE_FILES) - NEEDS == set()
    for folder, extras in (("tests", ["test"]), ("experiments", EXTRAS)):
        declared = NEEDS.union(*(EXTRAS[extra] for extra in extras))
        assert distributions_imported(python_files(folder)) - declared == set()


def test_what_is_declared_is_imported() -> None:
    assert NEEDS - distributions_imported(PACKAGE_FILES) == IMPORTED_BY_OTHERS


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("frontier.py", "from infalign_jax.lm import transformer"),
        ("frontier.py", "from infalign_jax import batches"),
        ("calibration.py", "def f():\n    from .sampling import sample"),
        ("evaluation.py", "import scipy.stats"),
        ("notation.py", "import flax.linen as nn"),
        ("lm/transformer.py", "from ..learner import step"),
        ("lm/transformer.py", "from .. import reward"),
        ("runtime/mesh.py", "import infalign_jax.data"),
        ("runtime/mesh.py", "import infalign_jax.pipeline as p"),
        ("learner.py", "from infalign_jax import reward"),
        ("learner.py", "from infalign_jax.transformations import identity"),
        ("report_plots.py", "from infalign_jax.evaluation import win_rate"),
        ("sampling.py", "from infalign_jax import cli"),
        ("oddments.py", ""),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert len(wrong_imports({f"{PACKAGE}/{path}": source})) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("frontier.py", "import jax.numpy as jnp, numpy, math\nfrom .procedures import Procedure"),
        ("lm/transformer.py", "from ..batches import Array\nfrom .tokenizer import PAD"),
        ("learner.py", "import optax\nfrom infalign_jax.lm import transformer"),
        ("report.py", "from infalign_jax import __version__, frontier, report_plots"),
        ("pipeline.py", "from infalign_jax import reward, transformations, learner"),
    ],
)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert wrong_imports({f"{PACKAGE}/{path}": source}) == []


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "path.read_text()",
        "Path('a.b').parent.mkdir()",
        "np.save('x', y)",
        "os.replace(a, b)",
        "figure.savefig(path)",
        "import shutil",
        "def f():\n    import orbax.checkpoint as ocp",
    ],
)
def test_a_hand_on_the_disk_is_found(source: str) -> None:
    assert len(disk_users({f"{PACKAGE}/learner.py": source})) == 1
    assert disk_users({f"{PACKAGE}/runtime/checkpoint.py": source}) == []


def test_memory_and_package_data_are_not_the_disk() -> None:
    source = "f.savefig(buffer); a.replace(b); json.loads(s); resources.files('p').read_text()"
    assert disk_users({f"{PACKAGE}/x.py": source}) == []


def test_requirements_are_read_by_name() -> None:
    listed = ["jax[tpu]>=0.10,<0.12", "orbax-checkpoint", "rich ~= 15"]
    assert requirement_names(listed) == {"jax", "orbax-checkpoint", "rich"}
    planted = {f"{PACKAGE}/x.py": "import orbax.checkpoint\nimport torch\nimport json"}
    assert distributions_imported(planted) == {"orbax-checkpoint", "torch"}
