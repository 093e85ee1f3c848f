"""Runs as users make them: repeated, resumed, spread over seeds, cores and processes, loaded."""

import shutil
import subprocess
import sys
from functools import partial

import flax
import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, SMALL, environment
from processes import execute
from runs import events_of, result, run_in_two_processes, run_on_cores, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COUNTER = ["--env-id", "scripted:Counter-v0"]
TOOLS = (
    "pytest",
    "ruff",
    "gymnax",
    "six",
    "jumanji",
    "jaxmarl",
    "mpe2",
)  # what tests need, and scripts only for some ids


def saved(folder):
    """Returns what a run folder's newest checkpoint holds of the learner, as nested dicts."""
    newest = max((folder / "checkpoints").glob("*.msgpack"), key=lambda path: int(path.stem))
    return flax.serialization.msgpack_restore(newest.read_bytes()[32:])["learner"]


def assert_close(folder, other, **tolerance):
    compare = partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(compare, saved(folder), saved(other))


@pytest.mark.costly
def test_same_command_same_curves(run, tmp_path, script):
    """To the last bit; and the files and figures that a run leaves behind."""
    for name in ("a", "b"):
        run(script, "--env-id", "Pendulum-v1", "--total-timesteps", 640, "--run-dir", name)
    one = scalars(tmp_path / "a")
    assert one == scalars(tmp_path / "b")
    for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        assert len(one[f"losses/{name}"]) == 10
    others = {"losses/explained_variance", "charts/episodic_length", "charts/learning_rate"}
    assert others <= one.keys()
    r = result(tmp_path / "a")
    assert r["finished"] and r["timesteps"] == 640 and r["seeds"] == [1]
    if script == "ppo_atari":  # CartPole
        assert 10 < r["episodes"][0] < 60 and 10 < r["episodic_return"][0] < 60
    else:
        assert r["episodes"] == [3] and -2000 < r["episodic_return"][0] < -500
    keys = "script env_id args eval_return wall_time compile_time versions device"
    keys += " sps sps_with_compile sps_rollout sps_update"
    assert set(keys.split()) <= r.keys()


@pytest.mark.costly
def test_tensorboard_shows_settings_networks_and_histograms(run, tmp_path, script):
    run(script, *COUNTER, "--total-timesteps", 640, "--run-dir", "a")
    events = EventAccumulator(str(tmp_path / "a"), size_guidance={"tensors": 0}).Reload()
    tags = set(events.Tags()["tensors"])
    assert {"hyperparameters", "networks"} <= tags
    assert {f"rollout/{name}" for name in ("obs", "action", "reward")} <= tags
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert hparams.plugin_name == "hparams" and b"learning_rate" in hparams.content
    assert len(events_of(tmp_path / "a")) == 1


def test_resumed_equals_never_stopped(run, tmp_path, script):
    """On an environment whose episodes fill the rollouts, a stop half way leaves no trace."""
    own = [*COUNTER, "--checkpoint-interval", 1]
    own += ["--no-anneal-lr"] if script != "ppo_cma" else []
    run(script, *own, "--total-timesteps", 256, "--run-dir", "whole")
    run(script, *own, "--total-timesteps", 128, "--run-dir", "halves")
    run(script, *own, "--total-timesteps", 256, "--run-dir", "halves")
    assert_close(tmp_path / "whole", tmp_path / "halves", rtol=0, atol=0)
    assert scalars(tmp_path / "whole") == scalars(tmp_path / "halves")


@pytest.mark.costly
def test_two_processes_compute_what_one_does(run, tmp_path, script):
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 4, "--total-timesteps", 768]
    # Statistics of returns would start from different episodes' sums, to rounding
    flags += ["--no-norm-reward"] if script != "ppo_cma" else []
    run(script, *flags, "--run-dir", "one")
    run_in_two_processes(tmp_path, script, *flags, "--run-dir", "two")
    assert_close(tmp_path / "one", tmp_path / "two", rtol=2e-4, atol=2e-5)


@pytest.mark.costly
def test_idle_cores_share_large_minibatches(tmp_path, script):
    """What cores compute that seeds leave idle is what a single core does."""
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 4, "--total-timesteps", 768]
    for cores in (1, 2):
        run_on_cores(tmp_path, script, cores, *flags, "--run-dir", cores)
    assert_close(tmp_path / "1", tmp_path / "2", rtol=2e-4, atol=2e-5)


@pytest.mark.costly
@pytest.mark.parametrize("acting", [0, 1])
def test_updates_on_another_device_than_environments(run, tmp_path, script, acting):
    """As on a GPU machine, policies here or there: what comes out is the same, to the last bit."""
    code = f"""
import jax, numpy as np, {script} as m
def configure(args):
    jax.config.update("jax_num_cpu_devices", 2)
    return m.Mesh(np.array(jax.devices()[1:])[None], ("process", "seed"))
m.configure = configure
m.acting_device = lambda *_: jax.devices()[{acting}]
m.main()
"""
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 4, "--total-timesteps", 768]
    run(script, *flags, "--run-dir", "one")
    line = [sys.executable, "-c", code, *SMALL[script], *flags, "--run-dir", "two"]
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [str(x) for x in line], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "one", tmp_path / "two", rtol=0, atol=0)


@pytest.mark.costly
def test_seeds_in_one_process_are_lone_runs(run, tmp_path, script):
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 4, "--total-timesteps", 768]
    run(script, *flags, "--seed", 3, "--run-dir", "lone")
    run(script, *flags, "--seed", 2, "--num-seeds", 2, "--run-dir", "batch")
    lone = scalars(tmp_path / "lone")
    batch = scalars(tmp_path / "batch/seed3")
    assert lone.keys() == batch.keys()
    for name in lone:
        np.testing.assert_allclose(lone[name], batch[name], rtol=5e-3, atol=1e-3, err_msg=name)
    assert scalars(tmp_path / "batch/seed2") != batch
    evaluating = ["--mode", "eval", "--run-dir", "batch", "--eval-episodes", 2]
    run(script, *evaluating)
    rows = result(tmp_path / "batch")["eval_return"]
    assert [row["episodes"] for row in rows] == [2, 2]


@pytest.mark.costly
def test_async_environments_use_all_cores(run, tmp_path, script):
    """Four environments of 10 ms a step, one after another and side by side."""
    slow = ["--env-id", "scripted:Slow-v0", "--num-envs", 4]
    speed = {}
    for kind in ("sync", "async"):
        run(script, *slow, "--vectorization", kind, "--total-timesteps", 256, "--run-dir", kind)
        speed[kind] = result(tmp_path / kind)["sps_rollout"]
    assert speed["async"] > 1.8 * speed["sync"]
    assert_close(tmp_path / "sync", tmp_path / "async", rtol=0, atol=0)


@pytest.mark.costly
def test_the_best_checkpoint_is_kept(run, tmp_path, script):
    """It is the one whose last 100 episodes earned the most; evaluation and load can take it."""
    flags = ["--checkpoint-interval", 1, "--keep-best", "--run-dir", "a"]
    wild = ["--learning-rate", 0.3, "--total-timesteps", 640]  # which soon makes it worse
    run(script, "--env-id", "scripted:Unbounded-v0", *flags, *wild)
    points = scalars(tmp_path / "a")["charts/episodic_return_100"]
    best, _ = max(points, key=lambda point: point[1])
    (kept,) = (tmp_path / "a/best").glob("*.msgpack")
    assert int(kept.stem) * 64 == best < 640
    module = __import__(script)
    good = module.load(tmp_path / "a", best=True)
    last = module.load(tmp_path / "a")
    assert good.learner.iteration == int(kept.stem) and last.learner.iteration == 10
    means = []
    for more in ([], ["--use-best"]):
        run(script, "--mode", "eval", "--run-dir", "a", "--eval-episodes", 1, *more)
        means.append(result(tmp_path / "a")["eval_return"][0]["mean"])
    assert means[1] != means[0]
    shutil.rmtree(tmp_path / "a/best")
    bad = run(script, "--mode", "eval", "--run-dir", "a", "--use-best", check=False)
    assert bad.returncode == 2 and "train with --keep-best" in bad.stderr.splitlines()[-1]


def forgetful(policy):
    """Returns a policy that is always asked as at an episode's beginning, without its memory."""

    def ask(obs, **options):
        action = policy(obs, **options)
        return action[0] if isinstance(action, tuple) else action

    return ask


@pytest.mark.costly
def test_a_trained_policy_is_three_lines_away(trained, script):
    """In a new process, whose JAX is set as before."""
    folder = trained(script)
    code = (
        f"import jax, {script} as m\n"
        "before = dict(jax.config.values)\n"
        f"policy = m.load({str(folder)!r})\n"
        "print(policy([0.5, 1.0]), dict(jax.config.values) == before)"
    )
    env = environment(PYTHONPATH=str(ROOT))
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("True\n")


def test_a_trained_policy_acts_as_in_an_evaluation(trained, run, tmp_path, script):
    """Without environments."""
    folder = trained(script)
    module = __import__(script)
    loaded = module.load(folder)
    policy = forgetful(loaded)
    one = policy(np.array([0.5, 1.0]))
    if script == "ppo_atari":
        assert one in (0, 1) and one.dtype == np.int64
    else:
        assert one.shape == (1,) and one.dtype == np.float32
    batch = policy(np.array([[0.5, 1.0], [0.2, 1.0], [0.5, 1.0]]))
    np.testing.assert_allclose(batch[[0, 2]], [one, one], rtol=1e-6)
    samples = {policy(np.array([0.5, 1.0]), deterministic=False).item() for _ in range(20)}
    assert samples == {0, 1} if script == "ppo_atari" else len(samples) > 2
    with pytest.raises(ValueError, match="no seed 9"):
        module.load(folder, seed=9)
    with pytest.raises(ValueError, match="holds no run"):
        module.load(tmp_path / "nowhere")

    if script == "ppo_icm_lstm":  # tests/test_icm_lstm.py has it with memory
        return
    playing = ["--mode", "eval", "--run-dir", "a", "--eval-episodes", 1, "--deterministic"]
    run(script, *playing)
    total = 0.0
    for step in range(7):
        held = step - step % getattr(loaded.args, "action_repeat", 1)
        action = policy(np.array([held / 7, 1.0], np.float32))
        total += 1 - float(np.square(action - 0.5).sum())
    evaluated = result(folder)["eval_return"][0]["mean"]
    np.testing.assert_allclose(total, evaluated, rtol=1e-5)


def test_an_agent_goes_on_from_a_run(trained, cma):
    folder = trained("ppo_cma")
    agent = cma.Agent.from_run(folder)
    policy = cma.load(folder)
    obs = np.array([0.5, 1.0], np.float32)
    np.testing.assert_allclose(agent.act(obs, deterministic=True), policy(obs), rtol=1e-6)
    np.testing.assert_array_equal(
        agent.act([0.5, 1.0], deterministic=True), agent.act(obs, deterministic=True)
    )
    counts = np.asarray(agent.learner.opt_state.counts)
    assert agent.learner.iteration == 2 and (counts[:2] > 0).all() and not counts[2:].any()
    for step in range(20):
        agent.memorize(obs, agent.act(obs), 1.0, obs, False, step % 5 == 4)
    assert agent.update_with_memorized() == 5
    assert agent.learner.iteration == 3 and agent.learner.opt_state.counts[2] == 20


def evaluated(run, tmp_path, script, folder, episodes):
    """Returns the mean return of a run's policy."""
    evaluating = ["--mode", "eval", "--run-dir", folder, "--eval-episodes", episodes]
    run(script, *evaluating)
    return result(tmp_path / folder)["eval_return"][0]["mean"]


def test_learns_pendulum(run, tmp_path):
    """Out of a broken agent's reach: doing nothing earns about -1200."""
    flags = "--num-envs 16 --num-steps 64 --gamma 0.9 --learning-rate 1e-3 --critic-sizes 64 64"
    train = ["--env-id", "Pendulum-v1", *flags.split(), "--total-timesteps", 150_000]
    run("ppo_continuous", *train, "--run-dir", "a", learns=True)
    assert evaluated(run, tmp_path, "ppo_continuous", "a", 20) > -600


def test_learns_a_delayed_reward(run, tmp_path):
    """Of 1, where the action is 0.5 at the end, whatever came before."""
    flags = "--num-envs 4 --num-steps 64 --num-minibatches 4 --learning-rate 3e-3"
    train = ["--env-id", "scripted:Corridor-v0", *flags.split(), "--total-timesteps", 10240]
    run("ppo_continuous", *train, "--run-dir", "a", learns=True)
    assert evaluated(run, tmp_path, "ppo_continuous", "a", 1) > 0.97


def test_cma_learns_mountain_car(run, tmp_path):
    """The bare command, six iterations: doing nothing earns 0, the first policy 40 to 70."""
    flags = ["--num-seeds", 2, "--total-timesteps", 24_000, "--run-dir", "a"]
    run("ppo_cma", *flags, learns=True)
    for seed in (1, 2):
        assert scalars(tmp_path / f"a/seed{seed}")["charts/episodic_return"][-1][1] > 80


SWITCHES = [
    (
        "ppo_continuous",
        "Nested",
        "--objective kl-penalty --kl-rule 1.5 2 0.5 --kl-barrier 10 --adaptive-lr --no-anneal-lr"
        " --anneal-clip --anneal-ent --ent-coef 0.01 --no-clip-vloss --no-norm-adv --no-norm-obs"
        " --no-norm-reward --recompute-advantages --target-kl 0.01 --activation relu"
        " --no-ortho-init --state-dependent-std --log-std-init -1 --no-scale-actions"
        " --max-grad-norm inf --clip-obs inf --l2-coef 0.001",
    ),
    ("ppo_continuous", "Mirrored", "--objective none --gae-lambda 1 --num-seeds 2 --num-envs 2"),
    (
        "ppo_cma",
        "Nested",
        "--algorithm ppo --covariance full --action-repeat 3 --no-dense-skips --no-scale-obs"
        " --value-loss soft-l1 --clip-advantage 3",
    ),
    ("ppo_cma", "Mirrored", "--algorithm pg-pos"),
    (
        "ppo_icm_lstm",
        "Nested",
        "--recurrence lstm --burn-in 2 --norm-value --bootstrap dynamic --reward-range -1 10"
        " --reward-range-end -1 1 --obs-range -5 5 --intrinsic-critic --anneal-intrinsic"
        " --split-obs flat --min-learning-rate 1e-4 --anneal-ent --recompute-advantages",
    ),
    (
        "ppo_multiagent",
        "Pair",
        "--recurrence lstm --memory-size 4 --burn-in 2 --algorithm ippo --agent-types 0 1"
        " --num-seeds 2 --team-reward --no-norm-value --sequence-length 16",
    ),
    ("ppo_multiagent", "Nested", "--objective kl-penalty --anneal-ent --recompute-advantages"),
    (
        "ppo_icm_lstm",
        "Masked-key",
        "--recurrence none --no-icm --sequence-length None --init normc --bootstrap fixed"
        " --target-kl 0.01 --objective kl-penalty",
    ),
]


@pytest.mark.parametrize(("script", "env_id", "switches"), SWITCHES, ids=lambda x: x[:30])
def test_every_switch_runs(run, tmp_path, script, env_id, switches):
    """Options that no other test runs from the command line, on nested and copied observations."""
    run(script, "--env-id", f"scripted:{env_id}-v0", *switches.split(), "--run-dir", "a")
    assert result(tmp_path / "a")["finished"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_copied_script_runs_alone(tmp_path, path):
    """It needs nothing of this repository: trains, evaluates and films from an empty folder."""
    shutil.copy(path, tmp_path / "mine.py")
    task = "MountainCar-v0" if path.stem == "ppo_atari" else "MountainCarContinuous-v0"
    flags = ["--env-id", task, "--env-kwargs", '{"max_episode_steps": 50}', "--run-dir", "a"]
    alone = [sys.executable, "-I", str(tmp_path / "mine.py"), *flags, *SMALL[path.stem]]
    trained = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    line = [sys.executable, str(tmp_path / "mine.py"), *flags, "--mode", "eval", "--video"]
    played = execute([*line, "--eval-episodes", "1"], tmp_path, environment())
    for done in (trained, played):
        assert done.returncode == 0, done.stderr
        assert "RuntimeWarning" not in done.stderr
    films = sorted(film.name for film in (tmp_path / "a/videos").iterdir())
    assert films == [f"{task}.gif", f"{task}.mp4"]
    assert (tmp_path / "a/mine.py").read_text() == path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script_metadata_is_requirements_txt(path):
    header = path.read_text().split("# ///")[1]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.strip() for line in lines if line[:1].isalpha()}
    named = {part for part in header.split('"') if ">=" in part and part[0].isalpha()}
    assert named == {x for x in wanted if not x.startswith(TOOLS)}
