"""Reading run folders, and processes that run for long."""

import json
import os
import subprocess
import sys
import time

import numpy as np
from conftest import SMALL, command, environment
from processes import execute
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def result(folder):
    return json.loads((folder / "result.json").read_text())


def events_of(folder):
    """Returns the event files of a run folder."""
    return sorted(folder.glob("events.out.tfevents.*"))


def scalars(folder):
    """Returns {name: [(step, value), ...]} of a folder's event files, but for measured speeds."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if name != "charts/SPS"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def saved(folder):
    """Returns {name: array} of all that a run's newest checkpoint has of learner and runner."""
    with np.load(max((folder / "checkpoints").glob("[0-9]*.npz"))) as file:
        return {name: file[name] for name in file if name not in (".timing", ".best")}


def assert_same(folder, other, **tolerance):
    """Checks that two runs ended with the same state; without a tolerance, to the last bit."""
    mine, theirs = saved(folder), saved(other)
    assert mine.keys() == theirs.keys() and len(mine) > 30
    for name, x in mine.items():
        tolerance = tolerance or {"rtol": 0, "atol": 0}
        np.testing.assert_allclose(x, theirs[name], err_msg=name, **tolerance)


def steps_saved(folder):
    """Returns the iterations of which a run folder has checkpoints."""
    return sorted(int(path.stem) for path in (folder / "checkpoints").glob("[0-9]*.npz"))


def wait_for(path, process):
    """Returns when a file exists that a process is to write."""
    deadline = time.time() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.time() < deadline
        time.sleep(0.1)


def start_long(tmp_path, script, *flags):
    """Returns a process that has trained for a while and would go on."""
    long = ["--total-timesteps", 10**8, "--checkpoint-interval", 5, "--run-dir", "long"]
    line = command(script, *SMALL[script], *long, *flags)
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "long/result.json", process)
    return process


def run_on_cores(tmp_path, script, cores, *flags):
    """Runs a script whose minibatches of 64 rows are worth as many cores as there are."""
    code = (
        f"import os, {script} as m; m.ROWS_PER_CORE = 32\n"
        f"os.sched_getaffinity = lambda _: range({cores})\n"
        "try:\n m.main()\nfinally:\n print(m.jax.devices())"
    )
    more = ["--batch-size", 256, "--action-repeat", 1] if script == "ppo_cma" else []
    done = run_code(tmp_path, code, script, *flags, *more)
    assert done.stdout.count("CpuDevice") == cores


def run_code(tmp_path, code, script, *flags):
    """Returns the finished process of a few lines of Python with a script's command line."""
    path = tmp_path / "program.py"  # a name that no module has
    path.write_text(code)
    _, _, *rest = command(script, *SMALL[script], *flags)
    done = execute([sys.executable, str(path), *rest], tmp_path, environment())
    assert done.returncode == 0, done.stderr
    return done


def run_in_two_processes(tmp_path, script, *flags):
    """Runs a script under gloo, found through what Open MPI's mpirun tells its processes."""
    both = []
    for rank in range(2):
        env = environment(
            OMPI_MCA_orte_hnp_uri=f"{os.getpid() % 4000 << 12}.0;tcp://127.0.0.1:1",
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
        )
        line = command(script, *SMALL[script], *flags, "--distributed")
        process = subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        both.append(process)
    for process in both:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
