"""Packing on other people's executors: Dask's, MPI's, and Ray by the shim that README shows. Skipped without them.

Each of them loses a worker too, killed in the middle of its work: Dask and Ray give that to another one, with MPI and
process pools the pack fails, and leaves nothing that the next one minds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import tallstore
from tallstore.errors import WorkerError
from tallstore.packing import job
from tests.fatal_checkpoint import FatalCheckpoint
from tests.packing_cases import base_model, contents, experts_of

ROOT = Path(__file__).parents[2]
MPI_SCRIPT = """\
import sys
from pathlib import Path
from mpi4py.futures import MPIPoolExecutor
import tallstore
from tests.fatal_checkpoint import FatalCheckpoint

if __name__ == "__main__":
    base, *paths, out, deaths = sys.argv[1:]
    experts = dict(zip("abc", paths))
    if deaths:
        experts["a"] = FatalCheckpoint(Path(experts["a"]), "norm.weight", Path(deaths), 1)
    with MPIPoolExecutor() as executor:
        tallstore.pack(base, experts, out, executor=executor)
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The base and its experts in files, and the bundle that is packed without an executor."""
    monkeypatch.setattr(job, "_UNIT_NUMEL", 5000)
    base = base_model()
    for name, state in {"base": base, **experts_of(base)}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    experts = {name: tmp_path / f"{name}.safetensors" for name in "abc"}
    tallstore.pack(tmp_path / "base.safetensors", experts, tmp_path / "here")
    return tmp_path / "base.safetensors", experts


@pytest.fixture
def deaths(tmp_path, monkeypatch):
    """Where workers leave a trace that die; and one unit of work has all tensors, most of them written by then."""
    monkeypatch.setattr(job, "_UNIT_NUMEL", 1 << 22)
    place = tmp_path / "deaths"
    place.mkdir()
    return place


def fatal(experts, deaths, count):
    """The experts, one of which kills so many workers."""
    return {**experts, "a": FatalCheckpoint(experts["a"], "norm.weight", deaths, count)}


def died(deaths):
    return len(list(deaths.iterdir()))


def is_clean(tmp_path):
    """There is no bundle, nor anything that was to become one."""
    return not [path for path in tmp_path.iterdir() if "there" in path.name]


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_process_that_is_killed(tmp_path, files, deaths):
    base, experts = files
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.raises(WorkerError, match=r"\Aexecutor: a unit of work did not come back \(BrokenProcessPool[^\n]*\Z"),
    ):
        tallstore.pack(base, fatal(experts, deaths, 1), tmp_path / "there", executor=pool)
    assert died(deaths) == 1
    assert is_clean(tmp_path)


# --- Dask -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dask_executor():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor(pure=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_dask(tmp_path, files):
    base, experts = files
    with dask_executor() as executor:
        tallstore.pack(base, experts, tmp_path / "there", executor=executor)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_what_a_killed_worker_of_dask_began_is_done_by_another(tmp_path, files, deaths):
    base, experts = files
    with dask_executor() as executor:
        tallstore.pack(base, fatal(experts, deaths, 1), tmp_path / "there", executor=executor)
    assert died(deaths) == 1
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_what_kills_every_worker_of_dask_is_given_up(tmp_path, files, deaths):
    base, experts = files
    with (
        dask_executor() as executor,
        pytest.raises(WorkerError, match=r"\Aexecutor: a unit of work did not come back \(KilledWorker[^\n]*\Z"),
    ):
        tallstore.pack(base, fatal(experts, deaths, 99), tmp_path / "there", executor=executor)
    assert died(deaths) > 1
    assert is_clean(tmp_path)


# --- MPI --------------------------------------------------------------------------------------------------------------


def run_mpi(tmp_path, files, deaths=""):
    """Pack on two workers beside the driver; mpiexec's exit status."""
    base, experts = files
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    script = tmp_path / "script.py"
    script.write_text(MPI_SCRIPT)
    paths = [base, *experts.values(), tmp_path / "there", deaths]
    command = [mpiexec, "-n", "3", sys.executable, "-m", "mpi4py.futures", script, *paths]
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300).returncode


@pytest.mark.slow
def test_mpi(tmp_path, files):
    assert run_mpi(tmp_path, files) == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_rank_of_mpi_that_is_killed_ends_all_and_the_next_pack_succeeds(tmp_path, files, deaths):
    assert run_mpi(tmp_path, files, deaths) != 0
    assert died(deaths) == 1
    assert not (tmp_path / "there").exists()
    assert run_mpi(tmp_path, files) == 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir() if "there" in path.name] == ["there"]


# --- Ray --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_executor():
    """README's."""
    ray = pytest.importorskip("ray")
    blocks = re.findall(
        r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (shim,) = [block for block in blocks if "ray.remote" in block]
    shown = {"concurrent": concurrent, "ray": ray}
    exec(compile(shim, "README.md", "exec"), shown)  # noqa: S102 - that is what the test is for
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        yield shown["RayExecutor"]()
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_ray(tmp_path, files, deaths):
    """With small units, and then with a worker that is killed."""
    base, experts = files
    with ray_executor() as executor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "_UNIT_NUMEL", 5000)
            tallstore.pack(base, experts, tmp_path / "there", executor=executor)
        assert contents(tmp_path / "there") == contents(tmp_path / "here")
        tallstore.pack(base, fatal(experts, deaths, 1), tmp_path / "there again", executor=executor)
    assert died(deaths) == 1
    assert contents(tmp_path / "there again") == contents(tmp_path / "here")
