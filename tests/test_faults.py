"""What users, disks and clusters do to runs: nobody's files are deleted, nothing hangs.

No result is silently wrong, and what the user typed wrong is said in one line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from checks import small_args, start
from conftest import ROOT, SMALL, command, environment
from processes import execute
from pydantic import ValidationError
from runs import assert_same, result, start_long, steps_saved, wait_for

COUNTER = ["--env-id", "scripted:Counter-v0"]


def one_line(done, code, *words):
    """Checks that a process ended with a code and, as its last line, one that says why."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


def files(folder):
    """Returns {path: content} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def main(module, monkeypatch, *line):
    """Returns the exit code of a script's main in this process."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, line)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    return ended.value.code


# --- Nobody's files ---
@pytest.mark.costly
def test_a_run_goes_on_or_is_moved_aside(run, trained, tmp_path, script):
    """Finished, longer, of other settings, of an edited script, clobbered: no file is lost."""
    folder = trained(script)
    (folder / "notes.txt").write_text("it learns")
    before = files(folder)
    go = [*COUNTER, "--run-dir", "a"]
    assert "finished" in run(script, *go).stdout
    assert files(folder) == before
    bad = run(script, *go, "--gamma", 0.5, "--hidden-sizes", 4, check=False)
    one_line(bad, 2, "--gamma 0.5 (there: 0.99)", "--hidden-sizes (4,)", "--clobber")
    assert files(folder) == before

    mine = tmp_path / f"{script}.py"
    mine.write_text(
        (ROOT / f"{script}.py").read_text().replace("# --- Run ---", "# --- Run ---\n#")
    )
    longer = command(mine, *SMALL[script], *go, "--total-timesteps", 300)
    done = execute(longer, tmp_path, environment())
    assert done.returncode == 0 and "differs from" in done.stderr, done.stderr
    assert result(folder)["timesteps"] == 256

    before = files(folder)
    run(script, *go, "--clobber", "--seed", 5)
    (old,) = tmp_path.glob("a.old-*")
    assert files(old) == before
    assert result(folder)["seeds"] == [5] and not (folder / "notes.txt").exists()


@pytest.mark.costly
def test_folders_that_hold_something_else(trained, tmp_path, script, monkeypatch, capsys):
    """Another script's run, cut settings, no run: exit code 2, and nothing is written."""
    module = __import__(script)
    folder = trained("ppo_cma" if script == "ppo_continuous" else "ppo_continuous")
    settings = (folder / "args.json").read_text()
    for content in (settings, "", "[]"):
        (folder / "args.json").write_text(content)
        before = files(folder)
        evaluating = ["--mode", "eval", "--run-dir", folder]
        assert main(module, monkeypatch, *evaluating) == 2
        with pytest.raises(module.InputError, match="holds no run of this script"):
            module.claim_folder(module.Args(run_dir=str(folder)))
        assert files(folder) == before
    assert main(module, monkeypatch, "--mode", "eval", "--run-dir", tmp_path / "nowhere") == 2
    assert "holds no run" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.costly
def test_evaluation_says_what_contradicts_the_run(trained, script, monkeypatch, capsys):
    folder = trained(script)
    for flags in (["--env-id", "Pendulum-v1"], ["--seed", "77"], ["--gamma", "0.5"]):
        evaluating = ["--mode", "eval", "--run-dir", folder, *flags]
        assert main(__import__(script), monkeypatch, *evaluating) == 2
        assert " ".join(flags) in capsys.readouterr().err.splitlines()[-1]


# --- Kills, locks and signals ---
@pytest.mark.costly
def test_killed_at_any_moment(tmp_path, run, script):
    """kill -9 of a run that saves all the time: it never goes back, and its lock dies with it.

    Nor does it pin itself to a core, and SIGTERM saves: a requeued job goes on.
    """
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(2):
        process = start_long(tmp_path, script, *COUNTER, "--checkpoint-interval", 1)
        time.sleep(rng.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        saved = steps_saved(tmp_path / "long")
        assert max(saved) >= last
        last = max(saved)
        (tmp_path / "long/result.json").unlink()
    process = start_long(tmp_path, script, *COUNTER, "--checkpoint-interval", 1)
    threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
    assert len(threads) > 1
    assert all(os.sched_getaffinity(x) == os.sched_getaffinity(0) for x in threads)
    flags = [*COUNTER, "--run-dir", "long", "--total-timesteps", 10**8, "--clobber"]
    one_line(run(script, *flags, check=False), 2, "trained in by another process")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors
    saved = steps_saved(tmp_path / "long")
    assert len(saved) == 2 and max(saved) * 64 == result(tmp_path / "long")["timesteps"]
    run(script, "--mode", "eval", "--run-dir", "long", "--eval-episodes", 1)


def descendants(pid):
    """Returns the ids of a process's children, their children, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [x for child in map(int, children) for x in (child, *descendants(child))]


def runs(pid):
    """Returns whether a process is neither gone nor waits to be."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


@pytest.mark.costly
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_interrupted(tmp_path, script, vectorization):
    """SIGINT saves and ends with 130, and no worker stays behind."""
    flags = [*COUNTER, "--vectorization", vectorization]
    process = start_long(tmp_path, script, *flags)
    others = descendants(process.pid)
    assert len(others) == (3 if vectorization == "async" else 0)  # two are multiprocessing's own
    for pid in (*others, process.pid):  # as Ctrl-C in a terminal
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert max(steps_saved(tmp_path / "long")) * 64 == result(tmp_path / "long")["timesteps"]
    deadline = time.time() + 10
    while any(map(runs, others)):
        assert time.time() < deadline
        time.sleep(0.1)


@pytest.mark.costly
def test_a_hanging_environment_can_be_interrupted(tmp_path, script):
    """By a second signal."""
    hanging = ["--env-id", "scripted:Slow-v0", "--env-kwargs", '{"seconds": 999, "begin": 90}']
    line = [*SMALL[script], *hanging, "--run-dir", "long", "--checkpoint-interval", 1]
    process = subprocess.Popen(
        command(script, *line), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "long/result.json", process)
    time.sleep(1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait(5) in (130, -signal.SIGINT)
    assert steps_saved(tmp_path / "long") == [1]


# --- Disks ---
@pytest.mark.costly
def test_full_disk_keeps_the_last_good_checkpoint(run, trained, tmp_path, script):
    """A limit on file sizes makes every larger write fail, as a full disk does."""
    folder = trained(script)
    before = steps_saved(folder)
    more = ["--total-timesteps", 640, "--run-dir", "a"]
    line = command(script, *SMALL[script], *COUNTER, *more)
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *line]
    failed = subprocess.run(
        limited, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert failed.returncode == 1
    assert "File too large" in failed.stderr.strip().splitlines()[-1]
    assert steps_saved(folder) == before
    run(script, *COUNTER, *more)
    assert result(folder)["timesteps"] == 640
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.costly
def test_a_flipped_bit_or_a_cut_is_noticed(run, trained, script):
    """The checkpoint before carries on; with all damaged, nothing is trained or overwritten."""
    module = __import__(script)
    folder = trained(script)
    newest, older = module.checkpoints(folder)
    whole = newest.read_bytes()
    with np.load(newest) as file:
        like = dict(file)
    plain = partial(module.read_checkpoint, newest)
    rng = np.random.default_rng(0)
    unseen = 0
    for place in rng.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        newest.write_bytes(damaged)
        try:
            with np.load(newest) as file:
                found = dict(file)
        except Exception:  # of many kinds
            continue
        unseen += 1  # of a date in the archive, say
        assert found.keys() == like.keys()
        assert all(np.array_equal(found[name], x) for name, x in like.items())
    assert unseen < 20
    newest.write_bytes(whole)
    with pytest.raises(KeyError):
        plain({"stranger": 0})
    newest.write_bytes(whole[: len(whole) // 2])
    evaluated = run(script, "--mode", "eval", "--run-dir", "a", "--eval-episodes", 1)
    assert "damaged" in evaluated.stderr and "over 1 episodes" in evaluated.stdout
    older.write_bytes(b"")
    before = files(folder / "checkpoints")
    more = ["--total-timesteps", 256, "--run-dir", "a"]
    one_line(run(script, *COUNTER, *more, check=False), 2, "no checkpoint", "--clobber")
    assert files(folder / "checkpoints") == before


# --- What goes wrong in environments ---
@pytest.mark.costly
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_environment_that_raises_is_shown(run, tmp_path, script, vectorization):
    """Its own traceback, exit code 1, no hang; the checkpoint before is good, and stays."""
    broken = ["--env-id", "scripted:Broken-v0", "--env-kwargs", '{"what": "raise"}']
    flags = [*broken, "--vectorization", vectorization, "--checkpoint-interval", 1]
    bad = run(script, *flags, "--run-dir", "a", check=False)
    assert bad.returncode == 1
    assert "RuntimeError: the gripper" in bad.stderr and "scripted.py" in bad.stderr
    assert steps_saved(tmp_path / "a") == [1]
    assert result(tmp_path / "a")["finished"] is False


def test_a_dead_process_of_an_environment_is_named(run, tmp_path):
    """With its exit code, in every script that has such processes of its own."""
    broken = ["--env-id", "scripted:Broken-v0", "--env-kwargs", '{"what": "exit"}']
    for script in ("ppo_continuous", "ppo_multiagent"):
        env_id = {"ppo_multiagent": "scripted:Leaving-v0"}.get(script, broken[1])
        flags = [broken[0], env_id, *broken[2:], "--vectorization", "async"]
        bad = run(script, *flags, "--run-dir", script, check=False)
        assert bad.returncode == 1
        assert "died, with exit codes {0: 7}" in bad.stderr


@pytest.mark.costly
def test_environments_may_use_jax(run, tmp_path, script):
    """In processes of their own, too, to which threads of this one's JAX do not come along."""
    flags = ["--env-id", "scripted:Computed-v0", "--num-envs", 2]
    for kind in ("sync", "async"):
        run(script, *flags, "--vectorization", kind, "--run-dir", kind)
    assert_same(tmp_path / "sync", tmp_path / "async")


@pytest.mark.costly
def test_what_is_not_finite_stops_the_run(run, tmp_path, script):
    """In the second of two iterations, its last; a run that is begun again goes on."""
    broken = ["--env-id", "scripted:Broken-v0", "--env-kwargs", '{"what": "reward"}']
    flags = [*broken, "--checkpoint-interval", 1, "--run-dir", "a"]
    bad = run(script, *flags, check=False)
    assert bad.returncode == 1
    last = bad.stderr.strip().splitlines()[-1]
    assert "iteration 2: the environment's reward is not finite" in last
    assert steps_saved(tmp_path / "a") == [1]
    run(script, *flags)  # the environment is new, and breaks after the end of the run
    assert result(tmp_path / "a")["finished"] is True


BAD = [
    ("obs", np.inf, "the environment's observation"),
    ("reward", np.nan, "the environment's reward"),
    ("discounted_return", np.inf, "the discounted return"),
    ("action", np.nan, "a parameter of the network"),
]


@pytest.mark.parametrize(("field", "value", "named"), BAD)
def test_the_first_bad_quantity_is_named(ppo, field, value, named):
    """In the order in which they arise, though what follows from it is bad as well."""
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    with jax.enable_x64(True):
        spoilt = transition._replace(**{field: getattr(transition, field).at[3, 1].set(value)})
        _, metrics = jax.jit(partial(ppo.update, network=network, args=args))(learner, spoilt)
    metrics = {name: np.asarray(x)[None] for name, x in metrics.items()}
    number = learner.iteration + 1
    with pytest.raises(FloatingPointError, match=f"iteration {number}: {named} is not finite"):
        ppo.require_finite(metrics)


UNMAKEABLE = [
    ("HalfCheeta-v4", "nearest: HalfCheetah-v"),
    ("Humanoid", "nearest: Humanoid"),
    ("", "unknown"),
    ("gymnasium:Hoper-v4", "Hopper"),
    ("no_such_module:Hopper-v4", "No module named 'no_such_module'"),
    ("jax:jax_tasks:Lotery", "jax_tasks has no function Lotery"),
    ("scripted:Talking-v0", "Text"),
    ("scripted:Discrete-v0", "ppo_icm_lstm.py"),
    ("CartPole-v1", "ppo_atari.py"),
]


@pytest.mark.parametrize(("env_id", "said"), UNMAKEABLE, ids=lambda x: x[:20])
def test_what_cannot_be_made_is_said(ppo, tmp_path, env_id, said):
    with pytest.raises(ppo.InputError) as refused:
        ppo.make_run(ppo.Args(env_id=env_id))
    assert said in str(refused.value)


OTHERS = [
    ("ppo_continuous", "Mirrored"),
    ("ppo_cma", "Mirrored"),
    ("ppo_atari", "MirroredChooser"),
    ("ppo_atari", "Masked-info"),
    ("ppo_atari", "Masked-key"),
    ("ppo_multiagent", "MirroredPair"),
]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("script", "name"), OTHERS)
def test_what_another_script_has_is_said(script, name, vectorization):
    module = __import__(script)
    args = module.Args(env_id=f"scripted:{name}-v0", vectorization=vectorization)
    with pytest.raises(module.InputError, match=r"ppo_icm_lstm\.py"):
        module.make_env(args, [1])


def test_ppo_cma_needs_bounds(cma):
    with pytest.raises(cma.InputError, match=r"without bounds: .*ppo_continuous\.py"):
        cma.make_env(cma.Args(env_id="scripted:Unbounded-v0"), [1])


@pytest.mark.costly
def test_a_module_of_the_current_directory(run, tmp_path, script):
    """What cannot be opened leaves no litter."""
    shutil.copy(ROOT / "tests/scripted.py", tmp_path / "my_envs.py")
    bad = run(script, "--env-id", "my_envs:Failing-v0", "--run-dir", "a", check=False)
    assert bad.returncode in (1, 2) and "no licence" in bad.stderr
    assert not (tmp_path / "a").exists()
    run(script, "--env-id", "my_envs:Needy-v0", "--env-kwargs", '{"size": 3}', "--run-dir", "a")
    assert result(tmp_path / "a")["episodes"][0] >= 30


# --- Flags ---
BAD_FLAGS = [
    "--num-envs 0",
    "--num-envs -3",
    "--num-steps 0",
    "--num-seeds 0",
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
    "--env-kwargs {",
    "--checkpoint-interval 0",
    "--eval-episodes 0",
    "--grid gamma=0.9,2",
    "--grid gamma",
    "--grid num_envs=1,2",
    "--grid gamma=0.9,0.9",
    "--grid gamma=0.9 gamma=0.8",
    "--grid gamma:gae_lambda=0.9:0.9,0.8",
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
        "--kl-rule nan 1 1",
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
        "--memory-size 0",
    ],
    "ppo_icm_lstm": [
        "--num-minibatches 7",
        "--num-minibatches 2048 --norm-adv",
        "--sequence-length 16",
        "--sequence-length 48 --recurrence gru",
        "--num-minibatches 32 --recurrence gru",
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


def as_settings(flags):
    """Returns {field: words} of a command line's flags, which pydantic makes values of."""
    settings = {}
    for flag in flags.split(" --"):
        name, *words = flag.removeprefix("--").split()
        many = name.endswith(("sizes", "rule", "range", "range-end", "grid"))
        settings[name.replace("-", "_")] = words if many else words[0] if words else True
    return settings


def test_a_bad_setting_is_named(script):
    module = __import__(script)
    for flags in BAD_FLAGS + OWN_BAD_FLAGS[script]:
        settings = as_settings(flags)
        with pytest.raises(ValidationError) as refused:
            module.Args(**settings)
        said = str(refused.value.errors(include_input=False)).replace("_", "-")
        assert flags.split()[0].removeprefix("--") in said, flags


@pytest.mark.parametrize(("flags", "said"), [("--gamma 2", "gamma"), ("--learning-rat 1", "-rate")])
def test_bad_flags_end_with_two(script, monkeypatch, capsys, flags, said):
    """Of a wrong value and of an unknown name."""
    module = __import__(script)
    assert main(module, monkeypatch, *flags.split()) == 2
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_help_is_help(script, monkeypatch, capsys):
    module = __import__(script)
    assert main(module, monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for word in ("--env-id", "discount factor", "--num-seeds", "widths"):
        assert word in shown


# --- Surroundings ---
def without_a_user(line):
    """Returns a command line as a user whom nobody knows would run it, where that is possible."""
    unknown = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    try:
        possible = not subprocess.run([*unknown, "true"], capture_output=True).returncode
    except OSError:
        possible = False
    return [*unknown, *line] if possible else line


@pytest.mark.costly
def test_a_daemon_of_nobody(tmp_path, script):
    """No input, output or errors, no home, an unknown user, as in containers: it trains."""
    line = command(script, *SMALL[script], *COUNTER, "--run-dir", "a")
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "-", *without_a_user(line)]
    own = environment()
    own.pop("HOME", None)
    done = subprocess.run(closed, cwd=tmp_path, env=own, timeout=120)
    assert done.returncode == 0 and result(tmp_path / "a")["finished"]


@pytest.mark.costly
def test_settings_of_jax_that_are_lived_with(tmp_path, script):
    strict = {
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_TRANSFER_GUARD": "disallow",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "HOME": "/proc",
    }
    line = command(script, *SMALL[script], "--env-id", "Pendulum-v1", "--run-dir", "a")
    env = environment(**strict)
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "a")["finished"]


@pytest.mark.parametrize("name", ["jax_debug_nans", "jax_disable_jit"])
def test_settings_of_jax_that_cannot_work(script, monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    jax.config.update(name, True)  # as JAX does where the environment has it in capitals
    try:
        assert main(__import__(script), monkeypatch, "--env-id", "Pendulum-v1") == 2
    finally:
        jax.config.update(name, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert name.upper() in line
    assert not list(tmp_path.iterdir())


@pytest.mark.costly
def test_json_is_strict_and_endless_episodes_count(run, tmp_path, script):
    """Also before the first episode's end, and with infinite settings."""
    flags = ["--env-id", "scripted:Endless-v0", "--clip-obs", "inf", "--run-dir", "a"]
    run(script, *flags)

    def refuse(word):
        raise ValueError(word)

    for path in (tmp_path / "a").glob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    assert result(tmp_path / "a")["episodic_return"] == [None]
    assert "finished" in run(script, *flags).stdout
    evaluating = ["--mode", "eval", "--run-dir", "a", "--eval-steps", 200, "--eval-episodes", 1]
    done = run(script, *evaluating)
    assert "over 1 episodes" in done.stdout and "--eval-steps 200" in done.stderr
