"""Packing on other people's executors: Dask's, MPI's, and Ray by the shim that README shows. Skipped without them."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

import tallstore
from tallstore.packing import job
from tests.packing_cases import base_model, contents, experts_of

ROOT = Path(__file__).parents[2]
MPI_SCRIPT = """\
import sys
from mpi4py.futures import MPIPoolExecutor
import tallstore

if __name__ == "__main__":
    base, *experts, out = sys.argv[1:]
    with MPIPoolExecutor() as executor:
        tallstore.pack(base, dict(zip("abc", experts)), out, executor=executor)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_dask(tmp_path, files):
    distributed = pytest.importorskip("distributed")
    base, experts = files
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        tallstore.pack(base, experts, tmp_path / "there", executor=client.get_executor(pure=False))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")
def test_mpi(tmp_path, files):
    base, experts = files
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    script = tmp_path / "script.py"
    script.write_text(MPI_SCRIPT)
    paths = [base, *experts.values(), tmp_path / "there"]
    command = [mpiexec, "-n", "3", sys.executable, "-m", "mpi4py.futures", script, *paths]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of its own
def test_ray(tmp_path, files):
    ray = pytest.importorskip("ray")
    base, experts = files
    (shim,) = re.findall(
        r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    shown = {"concurrent": concurrent, "ray": ray}
    exec(compile(shim, "README.md", "exec"), shown)  # noqa: S102 - that is what the test is for
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        tallstore.pack(base, experts, tmp_path / "there", executor=shown["RayExecutor"]())
    finally:
        ray.shutdown()
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
