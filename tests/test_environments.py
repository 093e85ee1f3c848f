"""What rollouts see: EnvPool's and Gymnasium's next-step resets, float64, augmentation, any pytree."""

import envpool
import gymnasium
import jax
import numpy as np
import pytest
import scripted  # noqa: F401  (registers)

KEPT = []  # EnvPool's compiled calls hold a bare pointer: a pool must outlive them


def play(ppo, env_id, steps, num_envs=2, **settings):
    """Returns the script's own rollout of a fresh policy, leaves [T, N, ...] in NumPy, and its action space."""
    args = ppo.Args(env_id=env_id, num_envs=num_envs, num_steps=steps, **settings)
    act, runner, _, learner, env = ppo.make_run(args)
    KEPT.append(env)
    _, transition = act(runner, learner._replace(opt_state=None))
    return jax.tree.map(lambda x: np.asarray(x)[0], transition), env


def assert_next_step_resets(t):
    """Ends are followed by one step of mask 0 and reward 0, and only they; sums restart there."""
    np.testing.assert_array_equal(t.mask[1:], 1 - t.done[:-1])
    assert t.done.sum() > 0
    assert not np.any(t.done * (1 - t.mask))
    assert not np.any(t.reward[t.mask == 0])
    assert not np.any(t.episodic_length[t.mask == 0])
    np.testing.assert_allclose(t.episodic_return[0], t.reward[0])


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "gymnasium:Pendulum-v1"])
def test_pendulum_truncates_and_resets_on_the_next_step(ppo, env_id):
    """The same facts of the real EnvPool and the real Gymnasium: an end at step 200, step 201 is the reset."""
    t, _ = play(ppo, env_id, 410)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(np.flatnonzero(t.done[:, 0]), [199, 400])
    np.testing.assert_array_equal(np.flatnonzero(t.mask[:, 0] == 0), [200, 401])
    assert not t.terminated.any()
    # every reward is the known function of the observation and the action: so obs[t] is what action[t] acted on
    obs, action = t.obs[:-1, :, 0], 2 * np.clip(t.action[..., 0], -1, 1)
    angle = np.arctan2(obs[..., 1], obs[..., 0])
    cost = angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * action**2
    np.testing.assert_allclose(t.reward[t.mask > 0], -cost[t.mask > 0], rtol=1e-4, atol=1e-3)
    # and obs[t + 1] is what it led to, at the end of an episode, too (row 200 is a true last observation)
    speed = np.clip(obs[..., 2] + (15 * obs[..., 1] + 3 * action) * 0.05, -8, 8)
    real = t.mask > 0
    np.testing.assert_allclose(t.obs[1:, :, 0][..., 2][real], speed[real], rtol=1e-3, atol=2e-3)


def test_termination_is_told_from_truncation(ppo):
    t, _ = play(ppo, "InvertedPendulum-v4", 300)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.terminated, t.done)  # it falls long before 1000 steps
    assert np.abs(t.obs[1:, :, 0, 1][t.done > 0]).min() > 0.2  # the true last observation: fallen
    assert np.abs(t.obs[1:, :, 0, 1][t.mask == 0]).max() < 0.05  # the new episode's first


def test_rollout_is_what_envpool_itself_does(ppo):
    """Stepping EnvPool from Python with the rollout's actions gives the rollout's observations and rewards."""
    t, env = play(ppo, "InvertedPendulum-v4", 60, num_envs=1)
    seeds = [int(np.random.SeedSequence(1).generate_state(1)[0] >> 1)]
    pool = envpool.make("InvertedPendulum-v4", env_type="gymnasium", num_envs=1, seed=seeds)
    obs, _ = pool.reset()
    for i in range(60):
        np.testing.assert_allclose(t.obs[i, :, 0], obs, rtol=1e-6, atol=1e-6)
        action = np.asarray(ppo.bounded(t.action[i], env.action_space, ppo.Args()))
        obs, reward, terminated, truncated, _ = pool.step(action.astype(np.float64))
        np.testing.assert_allclose(t.reward[i], reward, rtol=1e-6)
        np.testing.assert_array_equal(t.done[i], terminated | truncated)


@pytest.mark.parametrize(("env_id", "terminated"), [("Counter", 0), ("Terminal", 1), ("NonTerminal", 0)])
def test_ends_of_gymnasium_environments(ppo, env_id, terminated):
    t, _ = play(ppo, f"scripted:{env_id}-v0", 24)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.done[:, 0], ([0] * 6 + [1, 0]) * 3)
    np.testing.assert_array_equal(t.terminated, terminated * t.done)
    np.testing.assert_allclose(t.obs[1:9, 0, 0, 0], [*np.arange(1, 8) / 7, 0], rtol=1e-6)


def test_augmented_observations(ppo):
    t, _ = play(ppo, "scripted:Mirrored-v0", 16)
    assert t.obs.shape == (17, 2, 2, 2)
    np.testing.assert_array_equal(t.obs[:, :, 1], -t.obs[:, :, 0])


def test_pytrees_of_any_shape(ppo):
    t, env = play(ppo, "scripted:Nested-v0", 16)
    assert t.obs["flat"].shape == (17, 2, 1, 2)
    assert t.obs["image"].shape == (17, 2, 1, 2, 3)
    assert t.action.shape == (16, 2, 6)
    assert env.action_space.shape == (2, 3)


@pytest.mark.parametrize("env_id", ["BipedalWalker-v3", "CheetahRun-v1", "HalfCheetah-v5", "MountainCarContinuous-v0"])
def test_kinds_of_environments(ppo, env_id):
    t, env = play(ppo, env_id, 8)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(t))
    assert {x.dtype for x in jax.tree.leaves(t)} == {np.dtype("float32")}
    assert isinstance(env.action_space, gymnasium.spaces.Box)


def test_float64_stays_at_the_environments_door(ppo):
    """MuJoCo speaks float64; nothing of ours does, neither the learner nor what a rollout returns."""
    args = ppo.Args(env_id="HalfCheetah-v4", num_envs=2, num_steps=4)
    _, runner, _, learner, env = ppo.make_run(args)
    KEPT.append(env)
    leaves = [*jax.tree.leaves(learner), *jax.tree.leaves(runner.time_step), *jax.tree.leaves(runner.episode)]
    assert not [x for x in leaves if x.dtype in (np.float64, np.int64)]


def test_lone_seed_and_batch_begin_alike(ppo):
    """Seed k of a batch has the lone run's parameters, keys, first observations, and first rollout."""
    one, _ = play(ppo, "Hopper-v4", 20, num_envs=2, seed=3)
    args = ppo.Args(env_id="Hopper-v4", num_envs=2, num_steps=20, seed=2, num_seeds=3)
    act, runner, _, learner, env = ppo.make_run(args)
    KEPT.append(env)
    _, batch = act(runner, learner._replace(opt_state=None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a)[1], b, rtol=1e-4, atol=1e-4), batch, one)
