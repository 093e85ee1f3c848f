"""Environments written in JAX: the same facts as on the host, wholly on the devices."""

import re
import signal
import subprocess
import sys
from functools import partial

import imageio.v3
import jax
import jax.export
import numpy as np
import pytest
from checks import lowered
from conftest import ROOT, SMALL, command, environment
from jax.sharding import Mesh, NamedSharding
from runs import assert_same, result, run_in_two_processes, scalars, wait_for
from test_environments import assert_next_step_resets, begin, play

PENDULUM = ["--env-id", "gymnax/Pendulum-v1", "--num-envs", 4]
COUNTER = "jax:jax_tasks:Counter"


def test_ends_resets_and_sums(ppo):
    """Next-step resets to a new start; ends that are both are terminal; sums and masks."""
    t, _ = play(ppo, COUNTER, 41, num_envs=5)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 1, 0] * 10 + [0])
    np.testing.assert_array_equal(t.reward[:, 0], [1, 2, 3, 0] * 10 + [1])
    np.testing.assert_array_equal(t.obs[:, 0, 0], [0, 1, 2, 3] * 10 + [0, 1])
    start = t.obs[:, :, 1]
    fresh = t.mask == 0  # the step after it is an episode's first
    assert np.all((start[1:] != start[:-1]) == fresh)
    np.testing.assert_array_equal(t.terminated, t.done * (start[:-1] < 0.5))
    assert 0.2 < t.terminated.sum() / t.done.sum() < 0.8
    assert len(np.unique(start)) == 5 * 11  # no two episodes alike


@pytest.mark.parametrize("zero", ["0", "0.0", "false"])
def test_a_reset_that_writes_whole_numbers(ppo, zero):
    """State and observation keep the fractions that a step adds: an episode earns 9."""
    t, _ = play(ppo, "jax:jax_tasks:Drift", 18, env_kwargs=f'{{"zero": {zero}}}')
    position = [*np.arange(1, 9) / 4, 0] * 2
    np.testing.assert_array_equal(t.reward[:, 0], position)
    np.testing.assert_array_equal(t.obs[1:, 0, 0], position)
    np.testing.assert_array_equal(t.episodic_return[t.done > 0], 9)


def test_what_is_nearly_right_in_jax_is_taken(ppo):
    """Rewards and ends with an axis of length 1, an info of text."""
    plain, _ = play(ppo, COUNTER, 9)
    sloppy, _ = play(ppo, "jax:jax_tasks:Sloppy", 9)
    jax.tree.map(np.testing.assert_array_equal, sloppy, plain)


def test_a_film_shows_each_step(tmp_path, ppo):
    """Also where an environment draws all of them into the same picture."""
    shown = {"mode": "eval", "video": True, "run_dir": str(tmp_path)}
    args = ppo.Args(env_id="jax:jax_tasks:Painted", **shown)
    ppo.film(args, ppo.make_run(args).init())
    (film,) = (tmp_path / "videos").glob("*.mp4")
    brightness = imageio.v3.imread(film).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(brightness, [0, 50, 100], atol=5)


def test_whole_number_actions_and_observations_in_parts(ppo):
    t, _ = play(ppo, "jax:jax_tasks:Rounded", 9, scale_actions=False)
    wanted = np.rint(np.clip(t.action[..., 0], -3, 3))
    np.testing.assert_array_equal(t.reward, np.where(t.mask > 0, wanted, 0))
    t, _ = play(ppo, "jax:jax_tasks:Parts", 9)
    np.testing.assert_array_equal(t.obs[:4, 0, :4], np.eye(4))
    assert t.obs.shape == (10, 2, 8)


def test_env_kwargs_reach_factories_and_parameters(ppo):
    t, _ = play(ppo, COUNTER, 12, env_kwargs='{"length": 5}')
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 0, 0, 1, 0] * 2)
    t, _ = play(ppo, "gymnax/Pendulum-v1", 12, env_kwargs='{"max_steps_in_episode": 5}')
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 0, 0, 1, 0] * 2)
    assert not t.terminated.any()


BAD = [
    ("jax:jax_tasks:Wide", "a step returns shapes"),
    ("jax:jax_tasks:Narrow", "and its space is"),
    ("jax:jax_tasks:Choices", "is no Box of actions"),
    ("jax:jax_tasks:Typed", "typed key"),
    ("jax:no_such_module:make", "No module named 'no_such_module'"),
    ("gymnax/Pendulum-v9", "nearest: gymnax/Pendulum-v1"),
    ("gymnax/CartPole-v1", "is no Box of actions"),
]


@pytest.mark.parametrize(("env_id", "message"), BAD)
def test_what_cannot_be_trained_gets_one_line(ppo, env_id, message):
    with pytest.raises(ppo.InputError) as refused:
        ppo.make_run(ppo.Args(env_id=env_id))
    assert f"--env-id {env_id}" in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize("name", ["gymnax", "brax", "playground"])
def test_a_missing_package_is_named_with_its_command(ppo, name, monkeypatch):
    for module in ("gymnax", "brax", "mujoco_playground"):
        for known in [x for x in sys.modules if x.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, known)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ppo.InputError, match=f"{name}.*pip install"):
        ppo.make_run(ppo.Args(env_id=f"{name}/x"))


def test_a_checkpoint_comes_back_to_the_last_bit(ppo, tmp_path):
    """Arrays without elements, too, as in MuJoCo's states where nothing touches."""
    run, runner, learner = begin(ppo, "jax:jax_tasks:Empty", 4)
    state = jax.device_get(ppo.Checkpoint(learner, runner, np.arange(3.0), -np.inf))
    ppo.write_checkpoint(tmp_path / "x.npz", state)
    found = ppo.read_checkpoint(tmp_path / "x.npz", state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert [x.dtype for x in jax.tree.leaves(found.learner)] == [
        x.dtype for x in jax.tree.leaves(state.learner)
    ]
    jax.tree.map(np.testing.assert_array_equal, *(run.act(x, learner) for x in (runner, found[1])))


@pytest.mark.costly
def test_resumed_equals_never_stopped_to_the_last_bit(run, tmp_path, script):
    """In the middle of episodes, and however often the host looks in between."""
    flags = [*PENDULUM, "--total-timesteps", 64 * 4 * 40]
    once = ["--checkpoint-interval", 100, "--log-interval", 100]
    run(script, *flags, *once, "--run-dir", "whole")
    often = ["--checkpoint-interval", 4, "--log-interval", 2, "--run-dir", "halves"]
    line = command(script, *SMALL[script], *flags, *often)
    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "halves/result.json", process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert result(tmp_path / "halves")["timesteps"] < result(tmp_path / "whole")["timesteps"]
    run(script, *flags, *often)
    assert_same(tmp_path / "whole", tmp_path / "halves")
    steps = [step for step, _ in scalars(tmp_path / "halves")["charts/learning_rate"]]
    assert steps == [256 * i for i in range(2, 41, 2)]


@pytest.mark.costly
def test_seeds_and_processes_compute_what_one_does(run, tmp_path, script):
    """Seed k of S and two processes; tests/test_runs.py has them on the host."""
    flags = [*PENDULUM, "--total-timesteps", 64 * 4 * 3]
    run(script, *flags, "--run-dir", "one")
    run(script, *flags, "--seed", 0, "--num-seeds", 2, "--run-dir", "batch")
    run_in_two_processes(tmp_path, script, *flags, "--run-dir", "processes")
    assert_same(tmp_path / "one", tmp_path / "processes", rtol=2e-3, atol=2e-4)
    lone, batch = scalars(tmp_path / "one"), scalars(tmp_path / "batch/seed1")
    assert lone.keys() == batch.keys()
    for name in lone:
        np.testing.assert_allclose(lone[name], batch[name], rtol=5e-3, atol=1e-3, err_msg=name)


@pytest.mark.costly
def test_what_is_not_finite_stops_at_once(run, tmp_path, script):
    """Between two looks of the host, and says in which iteration."""
    flags = ["--env-id", "jax:jax_tasks:Broken", "--env-kwargs", '{"length": 150}']
    flags += ["--total-timesteps", 64 * 100, "--log-interval", 50, "--run-dir", "a"]
    done = run(script, *flags, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "iteration 3: the environment's reward is not finite" in last
    assert not (tmp_path / "a/checkpoints").exists()


@pytest.mark.parametrize("name", ["ppo", "cma"])
def test_the_whole_loop_fits_gpus_and_tpus(request, name):
    module = request.getfixturevalue(name)
    sizes = {"num_envs": 8, "num_seeds": 2, "hidden_sizes": (8, 8)}
    run, runner, learner = begin(module, "gymnax/Pendulum-v1", 16, **sizes)
    parts = {"network": run.network, "args": run.args}
    act = jax.jit(partial(module.rollout, first_env=0, env=run.env, **parts))
    _, transition = jax.eval_shape(act, runner, learner)
    learn = jax.jit(partial(module.update_seeds, **parts))
    texts = lowered(act, (runner, learner)) + lowered(learn, (learner, transition))
    for text in texts:
        assert "stablehlo.while" in text and len(text) > 10_000


COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("env_id", ["gymnax/Pendulum-v1", "Pendulum-v1"])
def test_nothing_is_compiled_after_the_first_iteration(ppo, env_id):
    settings = {"total_timesteps": 8 * 16 * 10, "num_envs": 8}
    run, runner, learner = begin(ppo, env_id, 16, **settings)
    mesh = Mesh(np.array(jax.devices()[:1])[None], ("process", "seed"))
    advance = ppo.make_advance(run, mesh)
    learner = jax.device_put(jax.device_get(learner), NamedSharding(mesh, ppo.BY_SEED))
    if run.args.native:
        runner = jax.device_put(jax.device_get(runner), NamedSharding(mesh, ppo.BY_ENV))
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: seen.append(name))
    learner, runner, *_ = advance(learner, runner, 2)
    assert COMPILED in seen
    seen.clear()
    learner, runner, *_ = advance(learner, runner, 3)
    assert COMPILED not in seen and learner.iteration[0] == 5


def test_readme_example_runs(run, tmp_path):
    """The environment of one's own that the README shows, trained for two iterations."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(x for x in blocks if "def step(self, key, state, action)" in x)
    assert len(example.splitlines()) <= 32
    (tmp_path / "my_tasks.py").write_text(example)
    run("ppo_continuous", "--env-id", "jax:my_tasks:make", "--run-dir", "a")
    assert result(tmp_path / "a")["finished"]
