"""What the tests share: the scripts as modules, small settings, and a way to run a script as a user does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # in this process, not in runs: half the time goes into compilation

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("ppo_*.py"))
TESTS = str(ROOT / "tests")
sys.path[:0] = [str(ROOT), TESTS]
# Two iterations that compile and run in no time; a settings list for the command line.
SMALL_CMA = "--num-envs 1 --num-steps 64 --num-updates 3 --batch-size 16 --hidden-sizes 8 8 --init-updates 9".split()
SMALL_CMA += ["--total-timesteps", "128"]
SMALL = "--num-steps 64 --num-minibatches 2 --update-epochs 2 --hidden-sizes 8 8 --total-timesteps 128".split()


def load(path, text=None):
    """Returns a script as a module, from its file or from a changed text."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for it
    exec(compile(text or path.read_text(), str(path), "exec"), module.__dict__)
    return module


def command(*args, script=ROOT / "ppo_continuous.py"):
    return [sys.executable, str(script), *map(str, args)]


def environment():
    return os.environ | {"PYTHONPATH": TESTS, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


@pytest.fixture(scope="session")
def ppo():
    return load(ROOT / "ppo_continuous.py")


@pytest.fixture(scope="session")
def cma():
    return load(ROOT / "ppo_cma.py")


@pytest.fixture
def run(tmp_path):
    """Runs a script in an empty folder; returns the finished process."""

    def run(*args, check=True, script="ppo_continuous"):
        line = command(*args, script=ROOT / f"{script}.py")
        done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
