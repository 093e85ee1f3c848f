"""What users, disks and clusters do to runs: real processes, every script alike.

Nobody's files are deleted, nothing hangs, no result is silently wrong, and what goes wrong is said
in one line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, command, environment
from processes import execute
from runs import events_of, result, scalars, start_long, steps_saved, wait_for

COUNTER = ["--env-id", "scripted:Counter-v0"]


def one_line(done, code, *words):
    """Checks that a process ended with a code and, as its last line, one that says why."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last
    return last


def files(folder):
    """Returns {path: content} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths}


# --- Nobody's files ---
@pytest.mark.costly
def test_clobber_deletes_nothing_but_runs(run, trained, tmp_path, script):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("ten years")
    one_line(run(script, *COUNTER, "--run-dir", "mine", "--clobber", check=False), 2, "thesis.tex")
    one_line(run(script, *COUNTER, "--run-dir", ".", "--clobber", check=False), 2, "mine")
    (tmp_path / "a_file").write_text("")
    one_line(run(script, *COUNTER, "--run-dir", "a_file", check=False), 2, "is a file")
    # a run that holds a stranger's file
    trained(script)
    (tmp_path / "a/notes.txt").write_text("it learns")
    before = files(tmp_path)
    one_line(run(script, *COUNTER, "--run-dir", "a", "--clobber", check=False), 2, "notes.txt")
    assert files(tmp_path) == before
    (tmp_path / "a/notes.txt").unlink()
    # now it is only a run's, and goes; through a link, too, which stays
    os.symlink(tmp_path / "a", tmp_path / "link")
    run(script, *COUNTER, "--run-dir", "link", "--clobber", "--seed", 5)
    assert result(tmp_path / "a")["seeds"] == [5]
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a_file", "link", "mine"]
    # a bad environment deletes nothing
    one_line(run(script, "--env-id", "Hopper-v9", "--run-dir", "a", "--clobber", check=False), 2)
    assert result(tmp_path / "a")["seeds"] == [5]


@pytest.mark.costly
def test_a_folder_of_another_script_is_left_alone(run, trained, tmp_path, script):
    other = "ppo_cma" if script == "ppo_continuous" else "ppo_continuous"
    trained(other)
    before = files(tmp_path)
    for extra in ([], ["--clobber"], ["--mode", "eval"]):
        bad = run(script, *COUNTER, "--run-dir", "a", *extra, check=False)
        one_line(bad, 2, f"{other}.py")
    assert files(tmp_path) == before


@pytest.mark.costly
def test_one_process_writes_a_folder(run, tmp_path, script):
    process = start_long(tmp_path, script, *COUNTER)
    for extra in ([], ["--clobber"]):
        long = ["--total-timesteps", 10**8, "--run-dir", "long"]
        bad = run(script, *COUNTER, *long, *extra, check=False)
        one_line(bad, 2, f"process {process.pid}")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    run(script, *COUNTER, "--run-dir", "long", "--clobber")  # the lock died with its owner


@pytest.mark.costly
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux says where it runs")
def test_no_process_pins_itself_to_a_core(tmp_path, script):
    """With one environment, too, every thread may run wherever this process may."""
    process = start_long(tmp_path, script, *COUNTER, "--num-envs", 1)
    threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
    allowed = [os.sched_getaffinity(thread) for thread in threads]
    process.kill()
    process.wait()
    assert len(allowed) > 1
    assert all(cores == os.sched_getaffinity(0) for cores in allowed)


@pytest.fixture
def open_folder():
    """An empty folder that everybody may enter and write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def everybodys(folder):
    """Returns the environment of a process that anybody may start in a folder."""
    return environment(
        PYTHONPATH=str(ROOT),
        HOME=str(folder),
        PYTHONDONTWRITEBYTECODE="1",
        MPLCONFIGDIR="/tmp",
    )


def train_in(folder, script):
    """Trains a small run in folder/a."""
    flags = ["--env-id", "MountainCarContinuous-v0", "--run-dir", "a"]
    line = command(script, *SMALL[script], *flags)
    execute(line, folder, everybodys(folder)).check_returncode()


def as_somebody_else(folder, script, flags):
    """Returns a finished process of the script by another user than root, who may write anywhere.

    Everything is imported before, as that user may not read it; where not even that helps, skips.
    """
    imports = "import os, jax, scipy.linalg"  # JAX imports the latter when it first needs LAPACK
    become = f"{imports}; os.getuid() or os.setuid(65534)"
    probe = [sys.executable, "-c", f"{become}; open(jax.__file__).close()"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("somebody else cannot read this Python")
    line = [sys.executable, "-c", f"import {script} as m; {become}; m.main()", *map(str, flags)]
    own = everybodys(folder)
    return subprocess.run(line, cwd=folder, env=own, capture_output=True, text=True)


def allow(folder, of_folders, of_files):
    """Sets the permissions of a folder and of all that is in it."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(of_folders if path.is_dir() else of_files)


@pytest.mark.costly
def test_a_readonly_run_is_evaluated(open_folder, script):
    """A colleague's folder: nothing is written there, films go to the current directory."""
    train_in(open_folder, script)
    before = files(open_folder / "a")
    allow(open_folder / "a", 0o555, 0o444)
    flags = ["--mode", "eval", "--run-dir", "a", "--eval-episodes", "1", "--video"]
    flags += ["--eval-steps", "100"]
    done = as_somebody_else(open_folder, script, flags)
    assert done.returncode == 0, done.stderr
    assert "over 1 episodes" in done.stdout
    assert "left as it was" in done.stderr
    assert files(open_folder / "a") == before
    assert len(list((open_folder / "videos").iterdir())) == 2, done.stderr


@pytest.mark.costly
def test_clobber_where_not_all_can_be_deleted(open_folder, script):
    """What cannot be deleted lies whole beside the new run, and a line says where."""
    train_in(open_folder, script)
    old = files(open_folder / "a/checkpoints")
    allow(open_folder / "a", 0o777, 0o666)
    (open_folder / "a/checkpoints").chmod(0o555)
    flags = ["--env-id", "MountainCarContinuous-v0", "--run-dir", "a", "--clobber", "--seed", 5]
    done = as_somebody_else(open_folder, script, [*SMALL[script], *flags])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert result(open_folder / "a")["seeds"] == [5]
    (left,) = open_folder.glob(".a.clobbered-*")
    assert str(left) in done.stderr
    assert sorted(files(left / "checkpoints").values()) == sorted(old.values())


# --- Disks ---
@pytest.mark.costly
def test_full_disk_keeps_the_last_good_checkpoint(run, trained, tmp_path, script):
    """A limit on file sizes makes every larger write fail, as a full disk does."""
    trained(script)
    before = steps_saved(tmp_path / "a")
    more = ["--total-timesteps", 640, "--run-dir", "a"]
    line = command(script, *SMALL[script], *COUNTER, *more)
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *line]
    failed = subprocess.run(
        limited, cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    one_line(failed, failed.returncode, "make room")
    assert failed.returncode in (1, 2)
    assert steps_saved(tmp_path / "a") == before
    assert not list(tmp_path.rglob("*.tmp"))
    run(script, *COUNTER, *more)
    assert result(tmp_path / "a")["timesteps"] == 640


@pytest.mark.costly
def test_a_folder_that_cannot_be_made(run, tmp_path, script):
    (tmp_path / "a_file").write_text("")
    one_line(run(script, *COUNTER, "--run-dir", "a_file/b", check=False), 2, "--run-dir")
    one_line(run(script, *COUNTER, "--exp-name", "x" * 300, check=False), 2, "--run-dir")
    if os.path.exists("/proc/sys"):  # nobody can write there, not even root
        one_line(run(script, *COUNTER, "--run-dir", "/proc/sys/a", check=False), 2, "--run-dir")


def test_an_event_file_waits_for_room(tmp_path, ppo):
    """What a disk does not take is written when it does again; the file stays whole."""
    code = """
import resource, sys
from pathlib import Path
import ppo_continuous as ppo

file = ppo.EventFile(Path(sys.argv[1]), first_step=0)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a full disk, in the middle of a record
for step in range(100):
    value = ppo.Summary.Value(tag="x", simple_value=step)
    file.add_summary(step, ppo.Summary(value=[value]))
    file.flush()
assert file.path.stat().st_size == 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
file.flush()
assert file.pending == b""
"""
    own = environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=own, check=True)
    assert [step for step, _ in scalars(tmp_path)["x"]] == list(range(100))


@pytest.mark.costly
def test_a_flipped_bit_or_a_cut_is_noticed(run, trained, tmp_path, script):
    """The checkpoint before carries on; with all damaged, nothing is trained or overwritten."""
    trained(script)
    older, newest = (tmp_path / f"a/checkpoints/{i}.msgpack" for i in (1, 2))
    whole = newest.read_bytes()
    rng = np.random.default_rng(0)
    module = __import__(script)
    for place in rng.integers(0, len(whole), 30):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        newest.write_bytes(damaged)
        with pytest.raises(ValueError, match="bytes have changed"):
            module.read_checkpoint(newest, None)
    evaluated = run(script, "--mode", "eval", "--run-dir", "a", "--eval-episodes", 1)
    assert "damaged" in evaluated.stderr and "over 1 episodes" in evaluated.stdout
    for path in (older, newest):
        path.write_bytes(whole[: len(whole) // 2])
    before = files(tmp_path / "a/checkpoints")
    more = ["--total-timesteps", 256, "--run-dir", "a"]
    one_line(run(script, *COUNTER, *more, check=False), 2, "--clobber")
    assert files(tmp_path / "a/checkpoints") == before


@pytest.mark.costly
def test_lost_and_cut_files_of_a_folder(run, trained, tmp_path, script):
    trained(script)
    path = tmp_path / "a/result.json"
    path.write_text('{"script": "ppo')
    assert "finished" in run(script, *COUNTER, "--run-dir", "a").stdout
    assert result(tmp_path / "a")["finished"]
    path.unlink()
    run(script, "--mode", "eval", "--run-dir", "a", "--eval-episodes", 1)
    assert result(tmp_path / "a")["eval_return"][0]["episodes"] == 1
    settings = (tmp_path / "a/args.json").read_text()
    for content in ("", "[]", settings.replace('"gamma"', '"no_such_flag"')):
        (tmp_path / "a/args.json").write_text(content)
        evaluating = ["--mode", "eval", "--run-dir", "a"]
        one_line(run(script, *evaluating, check=False), 2, "--run-dir")
    one_line(run(script, *COUNTER, "--run-dir", "a", check=False), 2, "--clobber")
    assert (tmp_path / "a/args.json").read_text() == content


@pytest.mark.costly
def test_kill_while_saving(tmp_path, run, script):
    """kill -9 at random moments of a run that saves all the time: it never goes back."""
    process = start_long(tmp_path, script, *COUNTER, "--checkpoint-interval", 1)
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(2):
        time.sleep(rng.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        assert max(steps_saved(tmp_path / "long")) >= last
        last = max(steps_saved(tmp_path / "long"))
        (tmp_path / "long/checkpoints/99.msgpack.tmp").write_text("of a killed process")
        (tmp_path / "long/result.json").unlink()
        process = start_long(tmp_path, script, *COUNTER, "--checkpoint-interval", 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert len(steps_saved(tmp_path / "long")) == 2  # the previous is kept
    assert not list(tmp_path.rglob("*.tmp"))
    run(script, "--mode", "eval", "--run-dir", "long", "--eval-episodes", 1)


# --- Signals ---
@pytest.mark.costly
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_ends(tmp_path, script, number, code):
    process = start_long(tmp_path, script, *COUNTER)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert number.name in errors and "Traceback" not in errors
    assert max(steps_saved(tmp_path / "long")) * 64 == result(tmp_path / "long")["timesteps"]


def start_hanging(tmp_path, script):
    """Returns a process whose environment hangs in its second iteration."""
    hanging = ["--env-id", "scripted:Slow-v0", "--env-kwargs", '{"seconds": 999, "begin": 90}']
    line = [*SMALL[script], *hanging, "--run-dir", "long", "--checkpoint-interval", 1]
    process = subprocess.Popen(
        command(script, *line), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "long/checkpoints/1.msgpack", process)
    time.sleep(1)
    return process


@pytest.mark.costly
def test_a_hanging_environment_can_be_interrupted(tmp_path, script):
    process = start_hanging(tmp_path, script)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    began = time.time()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.time() - began < 3
    assert process.returncode == 130 and "Traceback" not in errors


@pytest.mark.costly
def test_a_long_iteration_ends_in_its_grace(tmp_path, script):
    """Clusters give 30 s; the last finished iteration's state is saved, and is a whole one."""
    process = start_hanging(tmp_path, script)
    (tmp_path / "long/checkpoints/1.msgpack").unlink()
    began = time.time()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert time.time() - began < 20
    assert process.returncode == 143 and "Traceback" not in errors
    assert steps_saved(tmp_path / "long") == [1]


@pytest.mark.costly
def test_interrupted_evaluation(tmp_path, run, script):
    run(script, "--env-id", "scripted:Endless-v0", "--run-dir", "a")
    evaluating = ["--mode", "eval", "--run-dir", "a", "--eval-steps", 10**9]
    process = subprocess.Popen(
        command(script, *evaluating),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("episode/s" in line for line in process.stderr)  # it plays
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors


# --- Environments that go wrong ---
WRONG = [
    ("reward", "reward is not finite"),
    ("obs", "observation is not finite"),
    ("raise", "RuntimeError: the gripper is stuck (scripted.py, line"),
    ("shape", "ValueError"),
    ("text", "ValueError"),
]


@pytest.mark.costly
@pytest.mark.parametrize(("what", "said"), WRONG, ids=lambda x: x[:6])
def test_what_goes_wrong_in_a_step_is_named(run, tmp_path, script, what, said):
    """In the second of two iterations, its last; the checkpoint of the first is good, and stays."""
    broken = ["--env-id", "scripted:Broken-v0", "--env-kwargs", json.dumps({"what": what})]
    flags = [*broken, "--checkpoint-interval", 1, "--run-dir", "a"]
    one_line(run(script, *flags, check=False), 1, "iteration 2", said)
    assert steps_saved(tmp_path / "a") == [1]
    assert result(tmp_path / "a")["finished"] is False
    if what == "obs":  # the environment is new, and breaks after the end of the run
        run(script, *flags)
        assert result(tmp_path / "a")["finished"] is True


@pytest.mark.costly
def test_what_goes_wrong_in_another_process_is_named(run, script):
    broken = ["--env-id", "scripted:Broken-v0", "--env-kwargs", '{"what": "raise"}']
    bad = run(script, *broken, "--vectorization", "async", "--total-timesteps", 256, check=False)
    assert bad.returncode == 1
    assert "the gripper is stuck" in bad.stderr.strip().splitlines()[-1]


@pytest.mark.costly
def test_copies_that_change_their_number(run, script):
    bad = run(script, "--env-id", "scripted:Fickle-v0", check=False)
    one_line(bad, 1, "augment_observation returned 2 observations, and now 3")


UNMAKEABLE = [
    ("HalfCheeta-v4", "HalfCheetah-v4"),
    ("no_such_module:Env-v0", "no_such_module"),
    ("broken_module:Env-v0", "broken_module"),
    ("scripted:NoSuch-v0", "NoSuch"),
    ("a:b:c", "a:b:c"),
    (":", "cannot be made"),
    ("", "unknown"),
    ("scripted:Needy-v0", "--env-kwargs"),
    ("scripted:Failing-v0", "OSError: no licence found"),
    ("scripted:Talking-v0", "Text"),
    ("scripted:Empty-v0", "empty"),
    ("scripted:NoActions-v0", "empty action space"),
    ("scripted:Discrete-v0", "Box"),
    ("CartPole-v1", "Box"),
]


@pytest.mark.parametrize(("env_id", "said"), UNMAKEABLE, ids=lambda x: x[:20])
def test_what_cannot_be_made_is_said(ppo, tmp_path, monkeypatch, env_id, said):
    (tmp_path / "broken_module.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ppo.Failure) as failure:
        ppo.make_env(ppo.Args(env_id=env_id), [1])
    assert failure.value.code == 2
    assert "--env-id" in str(failure.value) and said in " ".join(str(failure.value).split())


@pytest.mark.costly
def test_what_cannot_be_made_is_one_line(run, tmp_path, script):
    bad = run(script, "--env-id", "scripted:Failing-v0", check=False)
    one_line(bad, 2, "--env-id", "OSError: no licence found (scripted.py, line")
    bad = run(script, "--env-id", "Humanoid", check=False)
    one_line(bad, 2, "--env-id Humanoid is unknown; nearest: Humanoid")
    assert not list(tmp_path.iterdir())


def test_ppo_cma_needs_bounds(cma):
    with pytest.raises(cma.Failure, match=r"without bounds: use ppo_continuous\.py"):
        cma.make_env(cma.Args(env_id="scripted:Unbounded-v0"), [1])


@pytest.mark.costly
def test_a_module_of_the_current_directory(run, tmp_path, script):
    shutil.copy(ROOT / "tests/scripted.py", tmp_path / "my_envs.py")
    run(script, "--env-id", "my_envs:Needy-v0", "--env-kwargs", '{"size": 3}', "--run-dir", "a")
    assert result(tmp_path / "a")["episodes"][0] >= 30
    bad = run(script, "--env-id", "my_envs:Needy-v0", "--run-dir", "a", check=False)
    one_line(bad, 2, "--env-kwargs")


# --- Flags ---
BAD_FLAGS = [
    "--num-envs 0",
    "--num-envs -3",
    "--num-steps 0",
    "--num-seeds 0",
    "--num-seeds -1",
    "--gamma 1.5",
    "--gamma nan",
    "--gae-lambda -0.1",
    "--seed -1",
    "--seed 2147483648",
    "--total-timesteps 1",
    "--learning-rate 0",
    "--learning-rate inf",
    "--learning-rate nan",
    "--clip-coef inf",
    "--clip-obs -1",
    "--ent-coef -1",
    "--ent-coef inf",
    "--hidden-sizes 0",
    "--hidden-sizes 8 -8",
    "--env-kwargs [1]",
    "--env-kwargs {size:3}",
    "--checkpoint-interval 0",
    "--eval-episodes 0",
    "--exp-name ../..",
    "--exp-name /etc/mine",
    "--exp-name a/../../b",
]
OWN_BAD_FLAGS = {
    "ppo_continuous": [
        "--num-minibatches 7",
        "--num-minibatches 2048 --norm-adv",
        "--critic-sizes 8 0",
        "--vf-coef -1",
        "--max-grad-norm nan",
        "--target-kl 0",
        "--desired-kl inf",
        "--kl-rule 0.5 2 1",
        "--kl-rule 2 1 2",
        "--kl-rule nan 1 1",
        "--kl-barrier 3",
        "--log-std-init nan",
        "--adaptive-lr",
    ],
    "ppo_atari": [
        "--num-minibatches 1024",
        "--noop-max 0",
        "--sticky-actions 1.5",
        "--frame-stack 0",
        "--critic-sizes 0",
    ],
    "ppo_multiagent": [
        "--num-minibatches 7",
        "--sequence-length 16",
        "--critic-sizes 8 0",
        "--critic-input joint --algorithm ippo",
        "--agent-types 0 2",
        "--memory-size 0",
    ],
    "ppo_icm_lstm": [
        "--num-minibatches 7",
        "--num-minibatches 2048 --norm-adv",
        "--sequence-length 16",
        "--sequence-length 48 --recurrence gru",
        "--num-minibatches 32 --recurrence gru",
        "--burn-in 8 --recurrence gru --sequence-length 8",
        "--burn-in 8",
        "--memory-size 0",
        "--reward-range 3 1",
        "--bootstrap-range nan 1",
        "--obs-range-end -1 1",
        "--icm-beta 2",
        "--icm-sizes 0",
        "--intrinsic-weight inf",
        "--intrinsic-gamma -0.1",
    ],
    "ppo_cma": [
        "--history-size 0",
        "--action-repeat 1001",
        "--std-min 0",
        "--init-std inf",
        "--init-mean nan",
        "--clip-advantage 0",
    ],
}


def test_a_bad_flag_is_named(script):
    """With exit code 2, and the flag in the line that says why."""
    module = __import__(script)
    for flags in BAD_FLAGS + OWN_BAD_FLAGS[script]:
        args = module.parse(flags.split(), default=module.Args())
        with pytest.raises(module.Failure) as failure:
            module.validate(args)
        assert failure.value.code == 2
        assert flags.split()[0] in str(failure.value), flags


@pytest.mark.costly
@pytest.mark.parametrize("flags", ["--gamma 2", "--distributed", "--platform tpu", "--mode eval"])
def test_a_bad_flag_is_one_line(run, tmp_path, script, flags):
    """And nothing is written."""
    bad = run(script, *flags.split(), check=False)
    one_line(bad, 2, flags.split()[0].replace("--mode", "--run-dir"))
    assert not list(tmp_path.iterdir())


JAX_SETTINGS = [
    ({"JAX_DISABLE_JIT": "1"}, "JAX_DISABLE_JIT is set"),
    ({"JAX_DEBUG_NANS": "1"}, "JAX_DEBUG_NANS is set"),
    ({"JAX_PLATFORMS": "cuda"}, "(cuda) finds no device"),
    ({"JAX_PLATFORMS": "nothing"}, "(nothing) finds no device"),
]


@pytest.mark.costly
@pytest.mark.parametrize(("settings", "said"), JAX_SETTINGS)
def test_settings_of_jax_that_cannot_work(tmp_path, script, settings, said):
    line = command(script, *SMALL[script], "--env-id", "Pendulum-v1")
    env = environment(**settings)
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    one_line(done, 2, said)


@pytest.mark.costly
def test_a_name_that_is_no_utf8(run, script):
    name = os.fsdecode(b"bad\xff")
    done = run(script, "--env-id", "Pendulum-v1", "--exp-name", name, check=False)
    one_line(done, 2, "--run-dir", "is no UTF-8")


def test_an_unknown_flag(run, tmp_path, script):
    bad = run(script, "--learning-rat", "1", check=False)
    assert bad.returncode == 2 and "--learning-rate" in bad.stdout + bad.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.costly
def test_help_and_its_head(script):
    shown = subprocess.run(
        command(script, "--help"), capture_output=True, text=True, env=environment(), check=True
    )
    for word in ("--env-id", "discount factor", "--num-seeds", "widths"):
        assert word in shown.stdout
    line = " ".join(command(script, "--help"))
    head = subprocess.run(
        ["bash", "-c", f"{line} | head -1"], capture_output=True, text=True, env=environment()
    )
    assert head.stderr == "" and head.stdout.count("\n") == 1


# --- Runs that are another ---
@pytest.mark.costly
def test_an_edited_script_is_another_run(tmp_path, script):
    """Comments and layout aside. What did not run never replaces the copy in the folder."""
    mine = tmp_path / "mine.py"
    source = (ROOT / f"{script}.py").read_text()

    def train():
        line = [sys.executable, str(mine), *SMALL[script], *COUNTER, "--run-dir", "a"]
        return execute(line, tmp_path, environment())

    mine.write_text(source)
    assert train().returncode == 0
    mine.write_text(source.replace("# --- Update ---", "# --- Update ---\n# mine, mine, mine"))
    assert train().returncode == 0
    mine.write_text(source.replace("reverse=True, unroll=16", "reverse=True, unroll=8"))
    one_line(train(), 2, "compute_gae", "--clobber")
    assert (tmp_path / "a/mine.py").read_text() == source


@pytest.mark.costly
def test_other_settings_and_other_lengths(run, trained, tmp_path, script):
    go = [*COUNTER, "--run-dir", "a"]
    trained(script)
    before = files(tmp_path)
    bad = run(script, *go, "--gamma", 0.5, "--hidden-sizes", 4, check=False)
    one_line(bad, 2, "--gamma 0.5 (there: 0.99)", "--hidden-sizes [4]")
    assert "finished" in run(script, *go).stdout
    assert "finished" in run(script, *go, "--total-timesteps", 64).stdout
    assert files(tmp_path) == before
    done = run(script, *go, "--total-timesteps", 300)
    assert "ends after 256 steps" in done.stderr
    if script == "ppo_continuous":
        assert "--anneal-lr goes on from 0.500 of its first value; it had come down to 0.000" in (
            " ".join(done.stderr.split())
        )
    assert result(tmp_path / "a")["timesteps"] == 256


@pytest.mark.costly
def test_evaluation_says_what_contradicts_the_run(run, trained, script):
    trained(script)
    for flags in (["--env-id", "Pendulum-v1"], ["--seed", "77"], ["--gamma", "0.5"]):
        evaluating = ["--mode", "eval", "--run-dir", "a", *flags]
        one_line(run(script, *evaluating, check=False), 2, flags[0], "leave")
    one_line(run(script, "--mode", "eval", "--run-dir", "b", check=False), 2, "--run-dir")


@pytest.mark.costly
def test_evaluation_of_endless_and_broken_environments(run, tmp_path, script):
    run(script, "--env-id", "scripted:Endless-v0", "--run-dir", "a")
    flags = ["--mode", "eval", "--run-dir", "a", "--eval-steps", 250, "--eval-episodes", 3]
    done = run(script, *flags)
    assert "over 1 episodes" in done.stdout
    assert "1 episodes had not ended after --eval-steps 250" in done.stderr
    settings = json.loads((tmp_path / "a/args.json").read_text())
    settings["env_id"] = "scripted:Broken-v0"
    for what, said in (("reward", "reward is not finite"), ("raise", "the gripper is stuck")):
        settings["env_kwargs"] = json.dumps({"what": what})
        (tmp_path / "a/args.json").write_text(json.dumps(settings))
        evaluating = ["--mode", "eval", "--run-dir", "a"]
        one_line(run(script, *evaluating, check=False), 1, said)


@pytest.mark.costly
def test_other_observations_than_before(run, tmp_path, script):
    """The environment has changed under a run: it is said, not trained on."""
    code = (ROOT / "tests/scripted.py").read_text()
    (tmp_path / "my_envs.py").write_text(code)
    flags = ["--env-id", "my_envs:Counter-v0", "--run-dir", "a"]
    run(script, *flags)
    code = code.replace("np.inf, (2,))", "np.inf, (3,))").replace(", 1.0]", ", 1.0, 2.0]")
    (tmp_path / "my_envs.py").write_text(code)
    bad = run(script, *flags, "--total-timesteps", 256, check=False)
    one_line(bad, 2, "other spaces", "--clobber")


@pytest.mark.costly
def test_json_is_strict(run, tmp_path, script):
    """Also before the first episode's end, and with infinite settings."""
    flags = ["--env-id", "scripted:Endless-v0", "--clip-obs", "inf", "--run-dir", "a"]
    run(script, *flags)

    def refuse(word):
        raise ValueError(word)

    for path in (tmp_path / "a").glob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    assert result(tmp_path / "a")["episodic_return"] == [None]
    assert result(tmp_path / "a")["args"]["clip_obs"] == "inf"
    evaluating = ["--mode", "eval", "--run-dir", "a", "--eval-steps", 100, "--eval-episodes", 1]
    run(script, *evaluating)
    assert len(events_of(tmp_path / "a")) == 1
