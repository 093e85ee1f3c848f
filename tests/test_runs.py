"""Runs as users make them: processes that are killed, resumed, moved, misused, and must learn."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, SCRIPTS, SMALL, SMALL_CMA, command, environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COUNTER = ["--env-id", "scripted:Counter-v0", *SMALL]


def result(folder):
    return json.loads((folder / "result.json").read_text())


def scalars(folder):
    """Returns {name: [(step, value), ...]} of a run folder's event files, without what measures time."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [n for n in events.Tags()["scalars"] if n != "charts/SPS"]
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in names}


def state(ppo, folder):
    """Returns the learner of a run folder's newest checkpoint."""
    saved = json.loads((folder / "args.json").read_text())
    args = ppo.Args(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        | {"run_dir": str(folder), "mode": "eval"}
    )
    _, _, _, learner, _ = ppo.make_run(args)
    return ppo.open_folder(args, learner)[1]


def saved(folder):
    """Returns what a run folder's newest checkpoint holds, as nested dicts and lists."""
    newest = max((p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    return ocp.StandardCheckpointer().restore(newest.absolute() / "default")[0]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_same_command_same_curves_then_finished_then_further(run, tmp_path):
    for name in ("a", "b"):
        run(
            "--env-id",
            "Pendulum-v1",
            *SMALL,
            "--num-envs",
            4,
            "--num-steps",
            256,
            "--total-timesteps",
            4096,
            "--run-dir",
            name,
        )
    one, two = scalars(tmp_path / "a"), scalars(tmp_path / "b")
    assert one == two  # to the last bit
    names = "policy_loss value_loss entropy approx_kl clipfrac explained_variance"
    assert {f"losses/{n}" for n in names.split()} <= one.keys()
    assert {"charts/episodic_return", "charts/episodic_length", "charts/learning_rate"} <= one.keys()
    r = result(tmp_path / "a")
    assert r["finished"] and r["timesteps"] == 4096 and r["episodes"] == [20] and r["seeds"] == [1]
    assert -2000 < r["episodic_return"][0] < -500
    keys = "script env_id args eval_return wall_time compile_time versions device"
    keys += " sps sps_with_compile sps_rollout sps_update"
    assert set(keys.split()) <= r.keys()
    settings = ["--env-id", "Pendulum-v1", *SMALL, "--num-envs", 4, "--num-steps", 256, "--run-dir", "a"]
    again = run(*settings, "--total-timesteps", 4096)
    assert "finished" in again.stdout
    run(*settings, "--total-timesteps", 6144)
    assert result(tmp_path / "a")["timesteps"] == 6144
    evaluated = run("--mode", "eval", "--run-dir", "a", "--eval-episodes", 3)
    assert "over 3 episodes" in evaluated.stdout
    assert result(tmp_path / "a")["eval_return"][0]["episodes"] == 3
    other = run(*settings, "--total-timesteps", 6144, "--gamma", 0.5, check=False)
    assert other.returncode == 2 and "--gamma 0.5" in other.stderr.splitlines()[-1]
    assert result(tmp_path / "a")["timesteps"] == 6144


@pytest.mark.parametrize("script", ["ppo_continuous", "ppo_cma"])
def test_resumed_equals_never_stopped(run, tmp_path, script):
    """On an environment whose episodes fill the rollouts exactly, a stop after half the way leaves no trace."""
    own = SMALL_CMA if script == "ppo_cma" else [*SMALL, "--no-anneal-lr"]
    settings = ["--env-id", "scripted:Counter-v0", *own, "--checkpoint-interval", 1]
    run(*settings, "--total-timesteps", 256, "--run-dir", "whole", script=script)
    run(*settings, "--total-timesteps", 128, "--run-dir", "halves", script=script)
    run(*settings, "--total-timesteps", 256, "--run-dir", "halves", script=script)
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "halves"))
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "halves")


def start_long(tmp_path, *extra):
    """Returns a process that has trained for a while and would go on."""
    long = [*COUNTER, "--total-timesteps", 10**8, "--checkpoint-interval", 5, "--run-dir", "long", *extra]
    process = subprocess.Popen(command(*long), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (tmp_path / "long/result.json").exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.1)
    return process, long


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_ends(tmp_path, number, code):
    process, _ = start_long(tmp_path)
    process.send_signal(number)
    assert process.wait(60) == code
    steps = [int(p.name) for p in (tmp_path / "long/checkpoints").iterdir() if p.name.isdigit()]
    assert max(steps) * 64 == result(tmp_path / "long")["timesteps"]


def test_kill_while_saving_and_truncated_checkpoint(ppo, run, tmp_path):
    """kill -9 at random moments of a run that saves all the time; then damage: the last good checkpoint carries on."""
    process, long = start_long(tmp_path, "--checkpoint-interval", 1)
    rng, last = np.random.default_rng(0), 0
    for _ in range(2):
        time.sleep(rng.uniform(0.2, 1.0))
        process.kill()
        process.wait()
        now = int(state(ppo, tmp_path / "long").iteration[0])  # readable, and never further back
        assert now >= last
        last = now
        (tmp_path / "long/result.json").unlink()
        process, _ = start_long(tmp_path, "--checkpoint-interval", 1)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    steps = sorted(int(p.name) for p in (tmp_path / "long/checkpoints").iterdir() if p.name.isdigit())
    assert len(steps) == 2  # the previous is kept
    newest = tmp_path / f"long/checkpoints/{steps[-1]}"
    for file in [p for p in newest.rglob("*") if p.is_file()]:
        with open(file, "r+b") as f:
            f.truncate(file.stat().st_size // 2)
    assert int(state(ppo, tmp_path / "long").iteration[0]) == steps[0]
    for file in [p for p in (tmp_path / "long/checkpoints").rglob("*") if p.is_file()]:
        with open(file, "r+b") as f:
            f.truncate(file.stat().st_size // 2)
    failed = run(*long, check=False)
    assert failed.returncode == 2
    assert "--clobber" in failed.stderr.splitlines()[-1]


def test_full_disk_keeps_the_last_good_checkpoint(run, tmp_path):
    """A limit on file sizes makes every larger write fail, as a full disk does."""
    run(*COUNTER, "--run-dir", "a")
    before = saved(tmp_path / "a")
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-"]
    more = command(*COUNTER, "--total-timesteps", 640, "--run-dir", "a")
    failed = subprocess.run([*limited, *more], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert failed.returncode != 0
    assert_same(saved(tmp_path / "a"), before)
    run(*COUNTER, "--total-timesteps", 640, "--run-dir", "a")
    assert result(tmp_path / "a")["timesteps"] == 640


def test_not_a_number_stops_the_run(ppo, run, tmp_path):
    failed = run("--env-id", "scripted:Broken-v0", *SMALL, "--checkpoint-interval", 1, "--run-dir", "a", check=False)
    assert failed.returncode == 1
    assert any("iteration 2: losses/" in x and "not finite" in x for x in failed.stderr.splitlines())
    assert int(state(ppo, tmp_path / "a").iteration[0]) == 1


BAD = [
    (["--env-id", "HalfCheeta-v4"], "HalfCheetah-v4"),
    (["--env-id", "no_such_module:Env-v0"], "no_such_module"),
    (["--env-id", "CartPole-v1"], "ppo_icm_lstm.py"),
    (["--num-minibatches", "7"], "--num-minibatches"),
    (["--total-timesteps", "100"], "--total-timesteps"),
    (["--num-envs", "0"], "--num-envs"),
    (["--gamma", "1.5"], "--gamma"),
    (["--seed", "-1"], "--seed"),
    (["--adaptive-lr"], "--no-anneal-lr"),
    (["--mode", "eval"], "--run-dir"),
    (["--distributed"], "mpirun"),
    (["--platform", "gpu"], "--platform"),
    (["--learning-rat", "1"], "learning-rat"),
]


@pytest.mark.parametrize(("flags", "word"), BAD, ids=lambda x: str(x)[:30])
def test_bad_input_is_one_clear_line(tmp_path, flags, word):
    env = {k: v for k, v in environment().items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(command(*flags), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert word in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoints/*"))


@pytest.mark.parametrize("script", ["ppo_continuous", "ppo_cma"])
def test_two_processes_compute_what_one_does(run, tmp_path, script):
    """Under gloo, found through the environment that Open MPI's mpirun gives its processes."""
    own = SMALL_CMA if script == "ppo_cma" else [*SMALL, "--no-norm-reward"]
    settings = ["--env-id", "Pendulum-v1", *own, "--num-envs", 4, "--total-timesteps", 768]
    run(*settings, "--run-dir", "one", script=script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
    env = environment() | {"OMPI_MCA_orte_hnp_uri": f"{os.getpid() % 4000 << 12}.0;tcp://127.0.0.1:1"}
    env |= {"OMPI_COMM_WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            command(*settings, "--distributed", "--run-dir", "two", script=ROOT / f"{script}.py"),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            env=env | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


def test_idle_cores_share_minibatches(tmp_path):
    """PPO-CMA's large minibatches: what cores compute that seeds leave idle is what a single core does."""
    code = "import os, ppo_cma as cma; os.sched_getaffinity = lambda _: range({}); cma.main(); print(cma.jax.devices())"
    settings = ["--env-id", "Pendulum-v1", *SMALL_CMA, "--num-envs", 4, "--total-timesteps", 768, "--action-repeat", 1]
    for cores in (1, 2):
        line = [sys.executable, "-c", code.format(cores), *settings, "--batch-size", 256, "--run-dir", cores]
        env = environment() | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*map(str, line)], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("CpuDevice") == cores
    one, two = saved(tmp_path / "1"), saved(tmp_path / "2")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two)


def test_seeds_in_one_process_are_lone_runs(run, tmp_path):
    settings = ["--env-id", "Pendulum-v1", *SMALL, "--num-envs", 4, "--total-timesteps", 768]
    run(*settings, "--seed", 3, "--run-dir", "lone")
    run(*settings, "--seed", 2, "--num-seeds", 2, "--run-dir", "batch")
    lone, batch = scalars(tmp_path / "lone"), scalars(tmp_path / "batch/seed3")
    assert lone.keys() == batch.keys()
    for name in lone:
        np.testing.assert_allclose(lone[name], batch[name], rtol=2e-3, atol=1e-4, err_msg=name)
    assert scalars(tmp_path / "batch/seed2") != batch


def test_cma_seeds_switches_and_bad_input(run, tmp_path):
    """Seeds of a batch against the lone seed; each algorithm and switch runs; what it cannot act in, it says."""
    settings = ["--env-id", "Pendulum-v1", *SMALL_CMA, "--num-envs", 4, "--total-timesteps", 512]
    run(*settings, "--seed", 3, "--run-dir", "lone", script="ppo_cma")
    run(*settings, "--seed", 2, "--num-seeds", 2, "--run-dir", "batch", script="ppo_cma")
    lone, batch = scalars(tmp_path / "lone"), scalars(tmp_path / "batch/seed3")
    for name in lone:
        np.testing.assert_allclose(lone[name], batch[name], rtol=5e-3, atol=1e-3, err_msg=name)
    run("--mode", "eval", "--run-dir", "batch", "--eval-episodes", 2, script="ppo_cma")
    assert [r["episodes"] for r in result(tmp_path / "batch")["eval_return"]] == [2, 2]
    switches = (
        "--algorithm ppo --covariance full --action-repeat 3 --no-dense-skips --no-scale-obs --value-loss soft-l1"
    )
    run("--env-id", "scripted:Nested-v0", *SMALL_CMA, *switches.split(), "--run-dir", "switches", script="ppo_cma")
    assert result(tmp_path / "switches")["finished"]
    for flags, word in ((["--env-id", "CartPole-v1"], "ppo_icm_lstm.py"), (["--history-size", 0], "--history-size")):
        bad = run(*flags, check=False, script="ppo_cma")
        assert bad.returncode == 2 and word in bad.stderr.splitlines()[-1]


def test_learns_pendulum_and_a_delayed_reward(run, tmp_path):
    """Thresholds out of a broken agent's reach: doing nothing earns about -1200 on Pendulum."""
    fast = [
        "--num-envs",
        "16",
        "--num-steps",
        "64",
        "--update-epochs",
        "10",
        "--gamma",
        "0.9",
        "--learning-rate",
        "1e-3",
    ]
    run("--env-id", "Pendulum-v1", *fast, "--total-timesteps", 150_000, "--run-dir", "a")
    run("--mode", "eval", "--run-dir", "a", "--eval-episodes", 20)
    assert result(tmp_path / "a")["eval_return"][0]["mean"] > -600
    few = [
        "--num-envs",
        "4",
        "--num-steps",
        "64",
        "--num-minibatches",
        "4",
        "--learning-rate",
        "3e-3",
        "--total-timesteps",
        "10240",
    ]
    run("--env-id", "scripted:Corridor-v0", *few, "--run-dir", "b")
    run("--mode", "eval", "--run-dir", "b", "--eval-episodes", 1)
    assert result(tmp_path / "b")["eval_return"][0]["mean"] > 0.97  # of 1: the action is 0.5 at the end


def test_cma_learns_mountain_car(run, tmp_path):
    """The bare command, six iterations: doing nothing earns 0, the first policy 40 to 70."""
    run("--num-seeds", 2, "--total-timesteps", 24_000, "--run-dir", "a", script="ppo_cma")
    for seed in (1, 2):
        assert scalars(tmp_path / f"a/seed{seed}")["charts/episodic_return"][-1][1] > 80


def test_augmentation_nested_spaces_and_every_switch(run, tmp_path):
    """Options that no other test runs from the command line, two iterations each."""
    run("--env-id", "scripted:Mirrored-v0", *SMALL, "--run-dir", "a")
    run("--env-id", "scripted:Nested-v0", *SMALL, "--num-envs", 2, "--num-seeds", 2, "--run-dir", "b")
    switches = "--objective kl-penalty --kl-rule 1.5 2 0.5 --adaptive-lr --no-anneal-lr --anneal-clip --no-clip-vloss"
    switches += (
        " --no-norm-adv --no-norm-obs --no-norm-reward --recompute-advantages --target-kl 0.01 --activation relu"
    )
    switches += " --no-ortho-init --state-dependent-std --log-std-init -1 --no-scale-actions --max-grad-norm inf"
    run(*COUNTER, *switches.split(), "--clip-obs", "inf", "--ent-coef", 0.01, "--run-dir", "c")
    for name in "abc":
        assert result(tmp_path / name)["finished"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_copied_script_runs_alone(tmp_path, script):
    """A script needs nothing of this repository: it trains, evaluates and films from an empty folder."""
    shutil.copy(script, tmp_path / "mine.py")
    small = SMALL_CMA if script.stem == "ppo_cma" else SMALL
    flags = ["--env-id", "MountainCarContinuous-v0", *small, "--run-dir", "a"]
    for extra in ([], ["--mode", "eval", "--eval-episodes", "1", "--video"]):
        alone = [sys.executable, "-I", str(tmp_path / "mine.py"), *flags, *extra]
        done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    films = sorted(p.name for p in (tmp_path / "a/videos").iterdir())
    assert films == ["MountainCarContinuous-v0.gif", "MountainCarContinuous-v0.mp4"]
    assert (tmp_path / "a/mine.py").read_text() == script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_help_is_a_page(script):
    shown = subprocess.run(command("--help", script=script), capture_output=True, text=True, env=environment())
    assert shown.returncode == 0
    for word in ("--env-id", "discount factor", "--num-seeds", "widths"):
        assert word in shown.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_script_metadata_is_requirements_txt(script):
    header = script.read_text().split("# ///")[1]
    wanted = {line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0].isalpha()}
    named = {part for part in header.split('"') if ">=" in part and part[0].isalpha()}
    assert named == {w for w in wanted if not w.startswith(("pytest", "ruff"))}
