"""Runs as users make them: repeated, resumed, spread over seeds, cores and processes, loaded."""

import importlib.util
import shutil
import subprocess
import sys
from ctypes.util import find_library

import imageio.v3
import jax
import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, SMALL, command, environment, load
from gymnasium.spaces import Box
from processes import execute
from runs import (
    assert_same,
    events_of,
    result,
    run_code,
    run_in_two_processes,
    run_on_cores,
    scalars,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COUNTER = ["--env-id", "scripted:Counter-v0"]
TOOLS = (
    "pytest",
    "hypothesis",
    "ruff",
    "gymnax",
    "six",
    "jumanji",
    "jaxmarl",
    "mpe2",
)  # what tests need, and scripts only for some ids


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
    assert r["episodes"][0] > 2 and r["episodic_return"][0] is not None
    keys = "script env_id args eval_return wall_time compile_time sps versions device"
    assert set(keys.split()) <= r.keys()
    events = EventAccumulator(str(tmp_path / "a"), size_guidance={"tensors": 0}).Reload()
    tags = set(events.Tags()["tensors"])
    assert {f"rollout/{name}" for name in ("obs", "action", "reward")} <= tags
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert hparams.plugin_name == "hparams" and b"learning_rate" in hparams.content


def test_resumed_equals_never_stopped(run, trained, tmp_path, script):
    """On an environment whose episodes fill the rollouts, an end half way leaves no trace."""
    whole = trained(script)
    halves = shutil.copytree(whole, tmp_path / "halves")
    (halves / "checkpoints/0000000002.npz").unlink()
    run(script, *COUNTER, "--checkpoint-interval", 1, "--run-dir", "halves")
    assert_same(whole, halves)
    assert len(events_of(halves)) == 2 and scalars(whole) == scalars(halves)


@pytest.mark.costly
def test_seeds_devices_and_processes_compute_what_one_does(run, tmp_path, script):
    """On the host: a member of a grid, idle cores, two processes."""
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 4, "--total-timesteps", 768]
    # Statistics of returns would start from different episodes' sums, to rounding
    flags += ["--no-norm-reward"] if script != "ppo_cma" else []
    one = [*flags, "--gamma", 0.9, "--clip-coef", 0.1, "--learning-rate", 2e-3]
    grid = ["--grid", "learning_rate=2e-3,1e-3", "gamma:clip_coef=0.99:0.2,0.9:0.1"]
    run(script, *one, "--run-dir", "one")
    run(script, *flags, *grid, "--seed", 0, "--num-seeds", 2, "--run-dir", "grid")
    run_on_cores(tmp_path, script, 2, *one, "--run-dir", "cores")
    run_in_two_processes(tmp_path, script, *one, "--run-dir", "processes")
    for other in ("cores", "processes"):
        assert_same(tmp_path / "one", tmp_path / other, rtol=2e-4, atol=2e-5)
    name = "learning_rate={},gamma={},clip_coef={},seed{}".format
    others = [name(0.002, 0.9, 0.1, 0), name(0.002, 0.99, 0.2, 1), name(0.001, 0.9, 0.1, 1)]
    lone, same, *others = [
        scalars(tmp_path / folder)
        for folder in ("one", f"grid/{name(0.002, 0.9, 0.1, 1)}", *(f"grid/{x}" for x in others))
    ]
    assert lone.keys() == same.keys() and same not in others
    for tag in lone:
        np.testing.assert_allclose(lone[tag], same[tag], rtol=5e-3, atol=1e-3, err_msg=tag)
    run(script, "--mode", "eval", "--run-dir", "grid", "--eval-episodes", 2)
    found = result(tmp_path / "grid")
    assert [row["episodes"] for row in found["eval_return"]] == [2] * 8
    assert found["members"][3] == {
        "learning_rate": 0.002,
        "gamma": 0.9,
        "clip_coef": 0.1,
        "seed": 1,
    }


@pytest.mark.parametrize("script", ["ppo_continuous", "ppo_cma"])
def test_a_member_begins_as_a_lone_run(script):
    """Also where the learning rate has a part in its beginning."""
    module = load(ROOT / f"{script}.py")
    settings = {"env_id": "gymnax/Pendulum-v1", "num_envs": 2, "num_steps": 8}
    settings |= {"init_updates": 9} if script == "ppo_cma" else {"num_minibatches": 1}
    settings |= {"total_timesteps": 16}
    args = module.Args(**settings, num_seeds=2, grid=("learning_rate:gamma=1e-3:0.9,1e-2:0.8",))
    lone = module.Args(**settings, seed=2, learning_rate=1e-2, gamma=0.8)
    found, expected = module.make_run(args), module.make_run(lone)
    for ours, theirs in ((found.init(), expected.init()), (found.env.first, expected.env.first)):
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x[3], y[0], rtol=1e-5, atol=1e-6)


def test_solved(run, tmp_path):
    """From the first look on at which 100 episodes have earned the threshold, also resumed."""
    flags = ["--env-id", "jax:jax_tasks:Lottery", "--run-dir", "a", "--checkpoint-interval", 1]
    flags += ["--no-anneal-lr"]  # shorter and longer runs compile to the same
    done = run("ppo_continuous", *flags, "--num-seeds", 2, "--total-timesteps", 64 * 30)
    steps = result(tmp_path / "a")["solved_at"]
    returns = scalars(tmp_path / "a/seed2")["charts/episodic_return_100"]
    episodes = dict(scalars(tmp_path / "a/seed2")["charts/episodes"])
    passed = [step for step, mean in returns if mean >= 6.5 and episodes[step] >= 100]
    assert steps[1] == passed[0] > returns[0][0]
    assert done.stderr.count("the last 100 episodes earned 6.5") == 2
    flags[3], early = "b", ["--stop-when-solved"]
    run("ppo_continuous", *flags, "--seed", 2, *early, "--total-timesteps", 64 * 5)
    assert result(tmp_path / "b")["solved_at"] == [None]
    run("ppo_continuous", *flags, "--seed", 2, *early, "--total-timesteps", 64 * 30)
    found = result(tmp_path / "b")
    assert found["finished"] and found["solved_at"] == [found["timesteps"]] == steps[1:]


def test_weights_and_biases(run, tmp_path):
    """They get what TensorBoard gets; who has them not is told in a line."""
    flags = ["--env-id", "gymnax/Pendulum-v1", "--num-seeds", 2, "--track", "--run-dir", "a"]
    if importlib.util.find_spec("wandb") is None:
        done = run("ppo_continuous", *flags, check=False)
        assert done.returncode == 2 and "--track: pip install wandb" in done.stderr
        return
    line = command("ppo_continuous", *SMALL["ppo_continuous"], *flags)
    subprocess.run(line, cwd=tmp_path, env=environment(WANDB_MODE="offline"), check=True)
    (log,) = (tmp_path / "a").glob("wandb/offline-run-*/*.wandb")
    for tag in scalars(tmp_path / "a/seed2"):
        assert f"seed2/{tag}".encode() in log.read_bytes()
    nobody = environment(WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    done = execute([*line, "--clobber"], tmp_path, nobody)
    assert done.returncode == 2 and "--track: No API key" in done.stderr.splitlines()[-1]


def test_a_window(run, tmp_path):
    """Where there is no display, a line says so."""
    flags = ["--env-id", "gymnasium:Pendulum-v1", "--run-dir", "a"]
    flags += ["--env-kwargs", '{"max_episode_steps": 20}']
    run("ppo_continuous", *flags)
    line = command("ppo_continuous", "--mode", "eval", *flags, "--eval-episodes", 1, "--render")
    shown = execute(line, tmp_path, environment(SDL_VIDEODRIVER="dummy"))
    assert shown.returncode == 0 and "an episode of 20 steps: return -" in shown.stdout
    none = execute(line, tmp_path, environment(SDL_VIDEODRIVER="x11", DISPLAY=""))
    assert none.returncode == 2 and "--render: " in none.stderr.splitlines()[-1]
    assert not (tmp_path / "a/videos").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="there is no Xvfb")
def test_a_window_on_a_screen(tmp_path):
    """Of X11, beside an environment that draws with OpenGL itself, as MuJoCo's do."""
    shutil.copytree(ROOT / "benchmarks/zoo/HalfCheetah-v4", tmp_path / "a")
    screen = subprocess.Popen(["Xvfb", "-displayfd", "1"], stdout=subprocess.PIPE, text=True)
    display = f":{screen.stdout.readline().strip()}"
    flags = ["--mode", "eval", "--run-dir", "a", "--eval-episodes", 1, "--eval-steps", 100]
    line = command("ppo_continuous", *flags, "--render")
    shown = execute(line, tmp_path, environment(DISPLAY=display, SDL_VIDEODRIVER="x11"))
    screen.terminate()
    assert shown.returncode == 0, shown.stderr
    assert "an episode of 100 steps" in shown.stdout


@pytest.mark.costly
def test_updates_on_another_device_than_environments(run, tmp_path, script):
    """As on a GPU machine; what comes out is the same, to the last bit."""
    code = f"""
import jax, numpy as np, {script} as m
def make_mesh(args):
    jax.config.update("jax_num_cpu_devices", 2)
    return m.Mesh(np.array(jax.devices()[1:])[None], ("process", "seed"))
m.make_mesh = make_mesh
m.main()
"""
    flags = ["--env-id", "Pendulum-v1", "--num-envs", 4, "--total-timesteps", 768]
    run(script, *flags, "--run-dir", "one")
    run_code(tmp_path, code, script, *flags, "--run-dir", "two")
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.costly
def test_async_environments_use_all_cores(run, tmp_path, script):
    """Four environments of 10 ms a step, one after another and side by side."""
    slow = ["--env-id", "scripted:Slow-v0", "--num-envs", 4]
    speed = {}
    for kind in ("sync", "async"):
        run(script, *slow, "--vectorization", kind, "--total-timesteps", 512, "--run-dir", kind)
        speed[kind] = result(tmp_path / kind)["sps"]
    assert speed["async"] > 1.8 * speed["sync"]
    assert_same(tmp_path / "sync", tmp_path / "async")


@pytest.mark.costly
def test_the_best_checkpoint_is_kept(run, tmp_path, script):
    """It is the one whose last 100 episodes earned the most; evaluation and load can take it."""
    flags = ["--checkpoint-interval", 1, "--keep-best", "--run-dir", "a"]
    wild = ["--learning-rate", 0.3, "--total-timesteps", 640]  # which soon makes it worse
    run(script, "--env-id", "scripted:Unbounded-v0", *flags, *wild)
    points = scalars(tmp_path / "a")["charts/episodic_return_100"]
    best, _ = max(points, key=lambda point: point[1])
    kept = np.load(tmp_path / "a/checkpoints/best.npz")
    assert kept[".learner.iteration"] * 64 == best < 640
    module = __import__(script)
    assert module.load(tmp_path / "a", best=True)([0.5, 1]) != module.load(tmp_path / "a")([0.5, 1])
    means = []
    for more in ([], ["--use-best"]):
        run(script, "--mode", "eval", "--run-dir", "a", "--eval-episodes", 1, *more)
        means.append(result(tmp_path / "a")["eval_return"][0]["mean"])
    assert means[1] != means[0]


def forgetful(policy):
    """Returns a policy that is always asked as at an episode's beginning, without its memory."""

    def ask(obs, **options):
        action = policy(obs, **options)
        return action[0] if isinstance(action, tuple) else action

    return ask


@pytest.mark.parametrize("script", [x.stem for x in SCRIPTS if x.stem != "ppo_multiagent"])
def test_a_trained_policy_acts_as_in_an_evaluation(trained, run, tmp_path, script):
    """On one observation or a batch of them; JAX is set as before."""
    folder = trained(script)
    module = __import__(script)
    before = dict(jax.config.values)
    policy = forgetful(module.load(folder))
    one = policy(np.array([0.5, 1.0]))
    assert dict(jax.config.values) == before
    if script == "ppo_atari":
        assert one in (0, 1)
    else:
        assert one.shape == (1,) and one.dtype == np.float32
    batch = policy(np.array([[0.5, 1.0], [0.2, 1.0], [0.5, 1.0]]))
    np.testing.assert_allclose(batch[[0, 2]], [one, one], rtol=1e-6)
    samples = {policy(np.array([0.5, 1.0]), deterministic=False).item() for _ in range(20)}
    assert samples == {0, 1} if script == "ppo_atari" else len(samples) > 2
    with pytest.raises(ValueError, match=r"has no \{'seed': 9\}"):
        module.load(folder, seed=9)
    with pytest.raises(ValueError, match="holds no run"):
        module.load(tmp_path / "nowhere")

    if script == "ppo_icm_lstm":  # tests/test_icm_lstm.py has it with memory
        return
    run(script, "--mode", "eval", "--run-dir", "a", "--eval-episodes", 1, "--deterministic")
    total = 0.0
    repeat = getattr(module.read_args(folder), "action_repeat", 1)
    for step in range(7):
        action = policy(np.array([(step - step % repeat) / 7, 1.0], np.float32))
        total += 1 - float(np.square(action - 0.5).sum())
    evaluated = result(folder)["eval_return"][0]["mean"]
    np.testing.assert_allclose(total, evaluated, rtol=1e-5)


@pytest.mark.costly
def test_a_loaded_action_is_inside_of_its_space(run, tmp_path, script):
    """Of bounds that are no float32, and in their dtype."""
    run(script, "--env-id", "scripted:Strict-v0", "--log-std-init", 3, "--run-dir", "a")
    policy = __import__(script).load(tmp_path / "a")
    space = Box(-0.1, 0.1, (2,), np.float64)
    for _ in range(10):
        action = policy([0.5, 1], deterministic=False)
        assert action.dtype == np.float64 and space.contains(action)
    with pytest.raises(ValueError, match="an observation is not finite"):
        policy([0.5, np.nan])


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_cma_learns_mountain_car(run, tmp_path):
    """The bare command, six iterations: doing nothing earns 0, the first policy 40 to 70."""
    run("ppo_cma", "--total-timesteps", 24_000, "--run-dir", "a", learns=True)
    assert scalars(tmp_path / "a")["charts/episodic_return"][-1][1] > 80


SWITCHES = [
    (
        "ppo_continuous",
        "Nested",
        "--objective kl-penalty --kl-rule 1.5 2 0.5 --kl-barrier 10 --adaptive-lr --no-anneal-lr"
        " --anneal-clip --ent-coef 0.01 --clip-vloss --norm-adv --no-norm-obs"
        " --no-norm-reward --no-recompute-advantages --target-kl 0.01 --activation relu"
        " --no-ortho-init --state-dependent-std --log-std-init -1 --no-scale-actions"
        " --max-grad-norm inf --clip-obs inf --l2-coef 0.001",
    ),
    (
        "ppo_continuous",
        "Choices",
        "--objective none --gae-lambda 1 --num-seeds 2 --num-envs 2 --squash-actions",
    ),
    (
        "ppo_cma",
        "Nested",
        "--algorithm ppo --covariance full --action-repeat 3 --no-dense-skips --no-scale-obs"
        " --value-loss soft-l1 --clip-advantage 3",
    ),
    ("ppo_cma", "Choices", "--algorithm pg-pos"),
    (
        "ppo_icm_lstm",
        "Nested",
        "--recurrence lstm --norm-value --bootstrap dynamic --reward-range -1 10"
        " --reward-range-end -1 1 --obs-range -5 5 --anneal-intrinsic"
        " --split-obs flat --min-learning-rate 1e-4 --anneal-ent --recompute-advantages",
    ),
    (
        "ppo_multiagent",
        "Pair",
        "--recurrence lstm --memory-size 4 --algorithm ippo --agent-types 0 1"
        " --num-seeds 2 --team-reward --no-norm-value --sequence-length 16 --anneal-ent",
    ),
    (
        "ppo_icm_lstm",
        "Masked-key",
        "--recurrence none --no-icm --sequence-length None --no-ortho-init --bootstrap fixed"
        " --target-kl 0.01 --objective kl-penalty",
    ),
]


@pytest.mark.parametrize(("script", "env_id", "switches"), SWITCHES, ids=lambda x: x[:30])
def test_every_switch_runs(run, tmp_path, script, env_id, switches):
    """Options that no other test runs from the command line, on observations of many kinds."""
    run(script, "--env-id", f"scripted:{env_id}-v0", *switches.split(), "--run-dir", "a")
    assert result(tmp_path / "a")["finished"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_copied_script_runs_alone(tmp_path, path):
    """It needs nothing of this repository: trains, evaluates and films from an empty folder."""
    shutil.copy(path, tmp_path / "mine.py")
    shutil.copy(ROOT / "tests/scripted.py", tmp_path / "my_envs.py")
    tasks = {
        "ppo_continuous": "MountainCarContinuous-v0",
        "ppo_cma": "MountainCarContinuous-v0",
        "ppo_atari": "MountainCar-v0",
        "ppo_icm_lstm": "FrozenLake-v1",
        "ppo_multiagent": "my_envs:Pair-v0",
    }
    task = tasks[path.stem]
    kwargs = "{}" if ":" in task else '{"max_episode_steps": 50}'
    flags = ["--env-id", task, "--env-kwargs", kwargs, "--run-dir", "a"]
    alone = [sys.executable, "-I", str(tmp_path / "mine.py"), *flags, *SMALL[path.stem]]
    trained = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    line = [sys.executable, str(tmp_path / "mine.py"), *flags, "--mode", "eval", "--video"]
    played = execute([*line, "--eval-episodes", "1"], tmp_path, environment())
    for done in (trained, played):
        assert done.returncode == 0, done.stderr
        assert "RuntimeWarning" not in done.stderr
    films = sorted(film.name for film in (tmp_path / "a/videos").iterdir())
    name = task.replace(":", "_")
    assert films == [f"{name}.gif", f"{name}.mp4"]
    assert (tmp_path / "a/mine.py").read_text() == path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_script_metadata_is_requirements_txt(path):
    header = path.read_text().split("# ///")[1]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.strip() for line in lines if line[:1].isalpha()}
    named = {part for part in header.split('"') if ">=" in part and part[0].isalpha()}
    assert named == {x for x in wanted if not x.startswith(TOOLS)}


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks/zoo").glob("*/")), ids=lambda x: x.name
)
def test_a_policy_of_the_zoo_plays(run, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "a")
    script = result(folder)["script"].removesuffix(".py")
    short = ["--eval-episodes", 1, "--eval-steps", 100]
    assert "return" in run(script, "--mode", "eval", "--run-dir", "a", *short).stdout


@pytest.mark.skipif(find_library("EGL") is None, reason="nothing to draw with")
def test_a_film_is_of_the_environment_that_was_trained_in(run, tmp_path):
    """In Gymnasium's Humanoid, which shows contact forces, this policy falls at once."""
    shutil.copytree(ROOT / "benchmarks/zoo/Humanoid-v4", tmp_path / "a")
    short = ["--eval-episodes", 1, "--eval-steps", 100]
    played = run("ppo_continuous", "--mode", "eval", "--run-dir", "a", "--video", *short).stdout
    assert "an episode of 100 steps" in played
    film = imageio.v3.imread(tmp_path / "a/videos/Humanoid-v4.mp4", plugin="FFMPEG")
    assert film.shape == (100, 480, 480, 3)
    assert film.std() > 10  # not black
