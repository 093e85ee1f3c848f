"""What the tests share: the scripts as modules, small settings, and runs as users make them."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from processes import execute

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX starts
# Half of the time goes into compilation; what one process has compiled is there for all others
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:
    SHARED = tempfile.TemporaryDirectory(prefix="ppo_tests")
    os.environ["SHARED_BY_TESTS"] = SHARED.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{SHARED.name}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("ppo_*.py"))
TESTS = str(ROOT / "tests")
sys.path[:0] = [str(ROOT), TESTS]


def words(line):
    return line.split()


# For each script, two iterations that compile and run in no time
SMALL = {
    "ppo_continuous": words(
        "--num-envs 1 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 8 --critic-sizes 8 8 --total-timesteps 128"
    ),
    "ppo_atari": words(
        "--num-envs 1 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 8 --critic-sizes 8 8 --total-timesteps 128"
    ),
    "ppo_icm_lstm": words(
        "--num-envs 1 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 --critic-sizes 8 --total-timesteps 128"
        " --recurrence gru --memory-size 4 --sequence-length 16"
        " --icm --icm-sizes 4 --icm-features 3"
    ),
    "ppo_multiagent": words(
        "--num-envs 1 --num-steps 64 --num-minibatches 2 --update-epochs 2"
        " --hidden-sizes 8 --critic-sizes 8 --total-timesteps 128 --deterministic"
    ),
    "ppo_cma": words(
        "--num-envs 1 --num-steps 64 --num-updates 3 --batch-size 16 --init-updates 9"
        " --hidden-sizes 8 8 --total-timesteps 128"
    ),
}


def load(path, text=None):
    """Returns a script as a module, from its file or from a changed text."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where pydantic looks for its types
    exec(compile(text or path.read_text(), str(path), "exec"), module.__dict__)
    return module


def mutate(script, text, slip):
    """Returns a script's module as a slip would have it, in the one place where `text` stands."""
    path = ROOT / f"{script}.py"
    source = path.read_text()
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in {script}"
    return load(path, source.replace(text, slip))


# What scripts that act otherwise train on in tests of what they share with the others
TASKS = {
    "ppo_atari": {
        "Pendulum-v1": "CartPole-v1",
        "gymnax/Pendulum-v1": "gymnax/CartPole-v1",
        "scripted:Counter-v0": "scripted:Chooser-v0",
    },
    "ppo_multiagent": {
        "Pendulum-v1": "scripted:Pair-v0",
        "gymnax/Pendulum-v1": "jax:jax_tasks:team",
        "scripted:Counter-v0": "scripted:Pair-v0",
    },
}


def command(script, *args):
    """Returns the command line of a script, which is a stem or a path."""
    path = script if isinstance(script, Path) else ROOT / f"{script}.py"
    tasks = TASKS.get(script, {})
    return [sys.executable, str(path), *(tasks.get(str(x), str(x)) for x in args)]


def environment(**more):
    return os.environ | {"PYTHONPATH": TESTS, "JAX_PLATFORMS": "cpu"} | more


@pytest.fixture(scope="session")
def ppo():
    return load(ROOT / "ppo_continuous.py")


@pytest.fixture(scope="session")
def atari():
    return load(ROOT / "ppo_atari.py")


@pytest.fixture(scope="session")
def icm():
    return load(ROOT / "ppo_icm_lstm.py")


@pytest.fixture(scope="session")
def team():
    return load(ROOT / "ppo_multiagent.py")


@pytest.fixture(scope="session")
def cma():
    return load(ROOT / "ppo_cma.py")


def pytest_addoption(parser):
    every = "run costly tests on every script, not on the reference only"
    parser.addoption("--every-script", action="store_true", help=every)
    slips = "also put slips into the scripts, one by one, which the tests have to notice"
    parser.addoption("--mutants", action="store_true", help=slips)


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests of tests, and the slow ones, unless they are asked for."""
    left_out = []
    if not config.getoption("--mutants"):
        left_out += [x for x in items if x.originalname == "test_mutant_is_killed"]
    if "slow" not in config.option.markexpr:
        left_out += [x for x in items if x.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [x for x in items if x not in left_out]


def pytest_xdist_auto_num_workers(config):
    """Returns two more than there are cores: tests wait for processes a third of the time."""
    return os.cpu_count() + 2


def pytest_configure(config):
    line = "costly: run on the reference script only, as the others share the text that it tests"
    config.addinivalue_line("markers", line)
    config.addinivalue_line("markers", "slow: left out unless -m slow asks for it")


def pytest_generate_tests(metafunc):
    """Gives a test's argument `script` every script's name; if it is costly, the reference's."""
    given = [x for mark in metafunc.definition.iter_markers("parametrize") for x in mark.args[:1]]
    if "script" not in metafunc.fixturenames or any("script" in names for names in given):
        return
    names = [path.stem for path in SCRIPTS]
    costly = metafunc.definition.get_closest_marker("costly")
    if costly and not metafunc.config.getoption("--every-script"):
        names = ["ppo_continuous"]
    metafunc.parametrize("script", names)


@pytest.fixture
def run(tmp_path):
    """Runs a script in an empty folder; returns the finished process.

    Training has settings that take no time, and is not optimised.

    learns: it is, and has the script's own settings.
    """

    def run(script, *args, check=True, learns=False):
        if learns:
            line = command(script, *args)
            env = environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
            done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        else:
            settings = [] if "eval" in args else SMALL[script]
            done = execute(command(script, *settings, *args), tmp_path, environment())
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def train_once(script):
    """Returns the folder of a run on a counter, of two iterations with a checkpoint each.

    One of the tests' processes trains it, and the others wait for it.
    """
    shared = Path(os.environ["SHARED_BY_TESTS"], script)
    shared.mkdir(exist_ok=True)
    folder = shared / "a"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            flags = [*SMALL[script], "--env-id", "scripted:Counter-v0", "--run-dir", folder]
            line = command(script, *flags, "--checkpoint-interval", 1)
            execute(line, shared, environment()).check_returncode()
    return folder


@pytest.fixture
def trained(tmp_path):
    """Lays a finished run of a script into the empty folder, as `a`; returns its folder."""

    def lay(script):
        return Path(shutil.copytree(train_once(script), tmp_path / "a"))

    return lay
