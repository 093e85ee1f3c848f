"""Environments written in JAX: the same facts as on the host, wholly on the devices."""

import re
import signal
import subprocess
import sys
from functools import partial

import flax
import imageio.v3
import jax
import jax.export
import numpy as np
import pytest
from checks import lowered
from conftest import ROOT, SMALL, command, environment
from jax.sharding import Mesh
from runs import result, run_in_two_processes, run_on_cores, scalars, wait_for
from test_environments import assert_next_step_resets, play

PENDULUM = ["--env-id", "gymnax/Pendulum-v1", "--num-envs", 4]
COUNTER = "jax:jax_tasks:Counter"


def state_of(folder):
    """Returns all that a run folder's newest checkpoint holds but the time it took."""
    newest = max((folder / "checkpoints").glob("*.msgpack"), key=lambda path: int(path.stem))
    content = flax.serialization.msgpack_restore(newest.read_bytes()[32:])
    content.pop("seconds")
    return content


def assert_same_state(folder, other, **tolerance):
    compare = partial(np.testing.assert_allclose, **tolerance)
    jax.tree.map(compare, state_of(folder), state_of(other))


def test_ends_resets_and_sums(ppo):
    """Next-step resets to a new start; ends that are both are terminal; sums and masks."""
    t, _ = play(ppo, COUNTER, 41, num_envs=5)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 1, 0] * 10 + [0])
    np.testing.assert_array_equal(t.reward[:, 0], [1, 2, 3, 0] * 10 + [1])
    np.testing.assert_array_equal(t.obs[:, 0, 0, 0], [0, 1, 2, 3] * 10 + [0, 1])
    start = t.obs[:, :, 0, 1]
    fresh = t.mask == 0  # the step after it is an episode's first
    assert np.all((start[1:] != start[:-1]) == fresh)
    np.testing.assert_array_equal(t.terminated, t.done * (start[:-1] < 0.5))
    assert 0.2 < t.terminated.sum() / t.done.sum() < 0.8
    assert len(np.unique(start)) == 5 * 11  # no two episodes alike


def test_a_film_shows_each_step(tmp_path, run):
    """Also where an environment draws all of them into the same picture."""
    flags = ["--env-id", "jax:jax_tasks:Painted", "--run-dir", "a"]
    run("ppo_continuous", *flags)
    run("ppo_continuous", *flags, "--mode", "eval", "--eval-episodes", 1, "--video")
    (film,) = (tmp_path / "a/videos").glob("*.mp4")
    brightness = imageio.v3.imread(film).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(brightness, [0, 50, 100], atol=5)


def test_whole_number_actions_and_observations_in_parts(ppo):
    t, _ = play(ppo, "jax:jax_tasks:Rounded", 9, scale_actions=False)
    wanted = np.rint(np.clip(t.action[..., 0], -3, 3))
    np.testing.assert_array_equal(t.reward, np.where(t.mask > 0, wanted, 0))
    t, _ = play(ppo, "jax:jax_tasks:Parts", 9)
    np.testing.assert_array_equal(t.obs["left"][:4, 0, 0], np.eye(4))
    assert t.obs["right"].shape == (10, 2, 1, 2, 2)


def test_env_kwargs_reach_factories_and_parameters(ppo):
    t, _ = play(ppo, COUNTER, 12, env_kwargs='{"length": 5}')
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 0, 0, 1, 0] * 2)
    t, _ = play(ppo, "gymnax/Pendulum-v1", 12, env_kwargs='{"max_steps_in_episode": 5}')
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 0, 0, 1, 0] * 2)
    assert not t.terminated.any()


BAD = [
    ("jax:jax_tasks:Wide", "what a step returns has shapes"),
    ("jax:jax_tasks:Narrow", "reset's observation has shapes (1,), not (2,)"),
    ("jax:jax_tasks:Choices", "Discrete actions"),
    ("jax:jax_tasks:Typed", "typed key"),
    ("jax:jax_tasks:Nobody", "no attribute 'Nobody'"),
    ("jax:no_such_module:make", "No module named 'no_such_module'"),
    ("jax:jax_tasks", "cannot be made"),
    ("gymnax/Pendulum-v9", "nearest: gymnax/Pendulum-v1"),
    ("gymnax/CartPole-v1", "Discrete actions"),
]


@pytest.mark.parametrize(("env_id", "message"), BAD)
def test_what_cannot_be_trained_gets_one_line(ppo, env_id, message):
    with pytest.raises(SystemExit) as stopped:
        ppo.make_env(ppo.Args(env_id=env_id), [1])
    assert stopped.value.code == 2
    assert f"--env-id {env_id}" in str(stopped.value) and message in str(stopped.value)


def test_unknown_env_kwargs_get_one_line(ppo):
    for env_id in (COUNTER, "gymnax/Pendulum-v1"):
        with pytest.raises(SystemExit, match="unexpected keyword argument 'size'"):
            ppo.make_env(ppo.Args(env_id=env_id, env_kwargs='{"size": 1}'), [1])


@pytest.mark.parametrize("name", ["gymnax", "brax", "playground"])
def test_a_missing_package_is_named_with_its_command(ppo, name, monkeypatch):
    for module in ("gymnax", "brax", "mujoco_playground"):
        for known in [x for x in sys.modules if x.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, known)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(SystemExit, match=f"pip install .*{name}") as stopped:
        ppo.make_env(ppo.Args(env_id=f"{name}/x"), [1])
    assert stopped.value.code == 2


@pytest.mark.costly
def test_resumed_equals_never_stopped_to_the_last_bit(run, tmp_path, script):
    """In the middle of episodes, and however often the host looks in between."""
    flags = [*PENDULUM, "--total-timesteps", 64 * 4 * 40]
    once = ["--checkpoint-interval", 100, "--log-interval", 100]
    run(script, *flags, *once, "--run-dir", "whole")
    assert not scalars(tmp_path / "whole")
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
    assert_same_state(tmp_path / "whole", tmp_path / "halves", rtol=0, atol=0)
    steps = [step for step, _ in scalars(tmp_path / "halves")["charts/learning_rate"]]
    assert steps == [256 * i for i in range(2, 41, 2)]


@pytest.mark.costly
def test_seeds_side_by_side_are_lone_runs(run, tmp_path, script):
    flags = [*PENDULUM, "--total-timesteps", 64 * 4 * 4]
    run(script, *flags, "--seed", 3, "--run-dir", "lone")
    run(script, *flags, "--seed", 2, "--num-seeds", 2, "--run-dir", "batch")
    lone, batch = scalars(tmp_path / "lone"), scalars(tmp_path / "batch/seed3")
    assert lone.keys() == batch.keys()
    for name in lone:
        np.testing.assert_allclose(lone[name], batch[name], rtol=5e-3, atol=1e-3, err_msg=name)
    run(script, "--mode", "eval", "--run-dir", "batch", "--eval-episodes", 3)
    assert [row["episodes"] for row in result(tmp_path / "batch")["eval_return"]] == [3, 3]


@pytest.mark.costly
def test_devices_share_environments_and_minibatches(tmp_path, script):
    """Two devices for one seed compute what one does."""
    flags = [*PENDULUM, "--total-timesteps", 64 * 4 * 3]
    for cores in (1, 2):
        run_on_cores(tmp_path, script, cores, *flags, "--run-dir", cores)
    assert_same_state(tmp_path / "1", tmp_path / "2", rtol=2e-3, atol=2e-4)


@pytest.mark.costly
def test_a_state_with_empty_parts_trains_and_resumes(run, tmp_path, script):
    flags = ["--env-id", "jax:jax_tasks:Empty", "--run-dir", "a", "--num-envs", 2]
    run(script, *flags, "--total-timesteps", 256)
    run(script, *flags, "--total-timesteps", 512)
    assert result(tmp_path / "a")["timesteps"] == 512


@pytest.mark.costly
def test_two_processes_compute_what_one_does(run, tmp_path, script):
    """The checkpoint of the first holds the environments of both."""
    flags = [*PENDULUM, "--total-timesteps", 64 * 4 * 3]
    run(script, *flags, "--run-dir", "one")
    run_in_two_processes(tmp_path, script, *flags, "--run-dir", "two")
    assert_same_state(tmp_path / "one", tmp_path / "two", rtol=2e-3, atol=2e-4)


@pytest.mark.costly
def test_what_is_not_finite_stops_at_once(run, tmp_path, script):
    """In the middle of a loop on the device, and says in which iteration."""
    flags = ["--env-id", "jax:jax_tasks:Broken", "--env-kwargs", '{"length": 150}']
    flags += ["--total-timesteps", 64 * 100, "--log-interval", 50, "--run-dir", "a"]
    done = run(script, *flags, check=False)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "iteration 3: the environment's reward is not finite" in last
    assert not list((tmp_path / "a/checkpoints").iterdir())


def lowered_loop(module, mesh):
    """Returns the texts of a script's whole loop, as StableHLO."""
    sizes = {"num_envs": 8, "num_steps": 16, "num_seeds": 2, "hidden_sizes": (8, 8)}
    args = module.Args(env_id="gymnax/Pendulum-v1", **sizes)
    run = module.make_run(args, module.seeds_of_envs(args))
    loop = module.make_loop(run, mesh, args)
    begin = module.to_devices(run.learner, module.split_by_seed(run.runner, args), 1, mesh)
    return lowered(jax.jit(loop), begin)


def test_the_whole_loop_fits_gpus_and_tpus(ppo, cma):
    mesh = Mesh(np.array(jax.devices("cpu")[:1])[None], ("process", "seed"))
    for module in (ppo, cma):
        for text in lowered_loop(module, mesh):
            assert "stablehlo.while" in text and len(text) > 10_000


def test_readme_example_runs(run, tmp_path):
    """The environment of one's own that the README shows, trained for two iterations."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    example = next(x for x in blocks if "def step(self, key, state, action)" in x)
    assert len(example.splitlines()) <= 32
    (tmp_path / "my_tasks.py").write_text(example)
    run("ppo_continuous", "--env-id", "jax:my_tasks:make", "--run-dir", "a")
    assert result(tmp_path / "a")["finished"]
