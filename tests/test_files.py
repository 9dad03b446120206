"""Whatever ends the process or fills the disk, nothing is half-written under its final name."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infalign_jax.runtime import checkpoint, files, progress

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from infalign_jax.runtime import checkpoint, files, progress
def keep(step, tree):
    with progress.saving(root, "d") as saver:
        saver.save(step, tree, {"step": step})
seen = 0
def hook(event, arguments):  # die at the n-th change of the file system
    global seen
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        seen += 1
        if seen == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
root = Path(sys.argv[1])
old, new = {"w": np.zeros(9)}, {"w": np.ones(9)}
keep(1, old)
keep(2, old)
files.write_text(root / "results.json", "old " * 999)
import orbax.checkpoint
sys.addaudithook(hook)
keep(3, new)
files.write_text(root / "results.json", "new " * 999)
print(seen)
"""


def run_python(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source, *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def check_after_death(root: Path) -> int:
    resumed = progress.resumed(root, {"w": np.zeros(9)}, "d")
    assert resumed
    step, tree, info = resumed
    assert step in (2, 3)
    assert info == {"step": step}
    assert set(tree["w"].tolist()) == {float(step == 3)}
    for path in root.glob("step-*"):  # nothing half-written under a final name
        checkpoint.whole_header(path)
    assert (root / "results.json").read_text() in ("old " * 999, "new " * 999)
    return step


def test_killed_while_saving_nothing_is_half_written(tmp_path: Path) -> None:
    changes = int(run_python(KILLED, tmp_path / "whole", 0).stdout)
    assert check_after_death(tmp_path / "whole") == 3
    assert changes > 10
    for moment in (1, changes // 2, changes - 4):
        died = run_python(KILLED, tmp_path / str(moment), moment)
        assert died.returncode == -9, died.stderr
        check_after_death(tmp_path / str(moment))


@pytest.mark.slow
def test_killed_at_every_moment_nothing_is_half_written(tmp_path: Path) -> None:
    changes = int(run_python(KILLED, tmp_path / "whole", 0).stdout)
    ends = set()
    for moment in range(1, changes + 1):
        run_python(KILLED, tmp_path / str(moment), moment)
        ends.add(check_after_death(tmp_path / str(moment)))
    assert ends == {2, 3}


def test_a_full_disk_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).normal(size=100_000)
    checkpoint.save(tmp_path / "sft", {"x": np.zeros(3)}, digest="d", info={})
    files.write_text(tmp_path / "results.json", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(tmp_path / "sft", {"x": noise}, digest="d", info={})
        with pytest.raises(OSError, match="File too large"):
            files.write_text(tmp_path / "results.json", "new" * 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "sft"]
    assert checkpoint.whole_header(tmp_path / "sft")["digest"] == "d"
    assert (tmp_path / "results.json").read_text() == "old"
    assert caplog.text == ""


def test_a_directory_in_use_is_refused_until_its_holder_dies(tmp_path: Path) -> None:
    source = (
        "import sys, time; from infalign_jax.runtime.files import exclusive\n"
        "with exclusive(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=rf"in use by another run \(process {holder.pid}\)"),
            files.exclusive(tmp_path / "out"),
        ):
            pass
        holder.kill()
    with files.exclusive(tmp_path / "out"):
        pass


def test_a_bucket_is_refused_before_a_directory_of_its_name_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(
            ValueError, match=r"^--out: expected a directory, got the bucket gs://b/run; "
        ),
        files.exclusive(Path("gs://b/run")),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
