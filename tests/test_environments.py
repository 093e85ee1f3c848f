"""What rollouts see: next-step resets, float64, augmentation, observations of any space."""

from functools import partial

import envpool
import gymnasium
import jax
import numpy as np
import pytest
import scripted
from gymnasium import spaces

KEPT = []  # EnvPool's compiled calls hold a bare pointer: a pool must outlive them


def play(ppo, env_id, steps, num_envs=2, **settings):
    """Returns a fresh policy's rollout by the script itself, leaves [T, N, ...], and its run."""
    args = ppo.Args(env_id=env_id, num_envs=num_envs, num_steps=steps, **settings)
    run = ppo.make_run(args, ppo.seeds_of_envs(args))
    KEPT.append(run)
    _, transition = run.act(run.runner, run.learner._replace(opt_state=None))
    assert not run.env.failures
    return jax.tree.map(lambda x: np.asarray(x)[0], transition), run


def assert_next_step_resets(t):
    """Ends are followed by one step of mask 0 and reward 0, and only they; sums restart there."""
    np.testing.assert_array_equal(t.mask[1:], 1 - t.done[:-1])
    assert t.done.sum() > 0
    assert not np.any(t.done * (1 - t.mask))
    assert not np.any(t.reward[t.mask == 0])
    assert not np.any(t.episodic_length[t.mask == 0])
    np.testing.assert_allclose(t.episodic_return[0], t.reward[0])


PENDULUMS = [
    ("Pendulum-v1", "sync"),
    ("gymnasium:Pendulum-v1", "sync"),
    ("gymnasium:Pendulum-v1", "async"),
]


@pytest.mark.parametrize(("env_id", "vectorization"), PENDULUMS)
def test_pendulum_truncates_and_resets_on_the_next_step(ppo, env_id, vectorization):
    """The same facts of EnvPool and Gymnasium: an end at step 200, step 201 is the reset."""
    t, _ = play(ppo, env_id, 410, vectorization=vectorization)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(np.flatnonzero(t.done[:, 0]), [199, 400])
    np.testing.assert_array_equal(np.flatnonzero(t.mask[:, 0] == 0), [200, 401])
    assert not t.terminated.any()
    # every reward is the known function of observation and action: obs[t] is what action[t] met
    obs = t.obs[:-1, :, 0]
    action = 2 * np.clip(t.action[..., 0], -1, 1)
    angle = np.arctan2(obs[..., 1], obs[..., 0])
    cost = angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * action**2
    real = t.mask > 0
    np.testing.assert_allclose(t.reward[real], -cost[real], rtol=1e-4, atol=1e-3)
    # and obs[t + 1] is what it led to, at the end of an episode, too
    speed = np.clip(obs[..., 2] + (15 * obs[..., 1] + 3 * action) * 0.05, -8, 8)
    np.testing.assert_allclose(t.obs[1:, :, 0][..., 2][real], speed[real], rtol=1e-3, atol=2e-3)


def test_termination_is_told_from_truncation(ppo):
    t, _ = play(ppo, "InvertedPendulum-v4", 300)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.terminated, t.done)  # it falls long before 1000 steps
    last, first = t.obs[1:, :, 0, 1][t.done > 0], t.obs[1:, :, 0, 1][t.mask == 0]
    assert np.abs(last).min() > 0.2  # the true last observation: fallen
    assert np.abs(first).max() < 0.05  # the new episode's first


def test_rollout_is_what_envpool_itself_does(ppo):
    """Stepping EnvPool from Python with the same actions gives the same observations."""
    t, run = play(ppo, "InvertedPendulum-v4", 60, num_envs=1)
    seeds = [int(np.random.SeedSequence(1).generate_state(1)[0] >> 1)]
    assert seeds == ppo.seeds_of_envs(run.args)
    pool = envpool.make("InvertedPendulum-v4", env_type="gymnasium", num_envs=1, seed=seeds)
    obs, _ = pool.reset()
    for i in range(60):
        np.testing.assert_allclose(t.obs[i, :, 0], obs, rtol=1e-6, atol=1e-6)
        action = np.asarray(ppo.env_action(t.action[i], run.env.action_space, run.args))
        obs, reward, terminated, truncated, _ = pool.step(action.astype(np.float64))
        np.testing.assert_allclose(t.reward[i], reward, rtol=1e-6)
        np.testing.assert_array_equal(t.done[i], terminated | truncated)


ENDS = [("Counter", 0), ("Terminal", 1), ("NonTerminal", 0), ("BothEnds", 1)]


@pytest.mark.parametrize(("env_id", "terminated"), ENDS)
def test_ends_of_gymnasium_environments(ppo, env_id, terminated):
    """Where an environment says both, it is a termination."""
    t, _ = play(ppo, f"scripted:{env_id}-v0", 24)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.done[:, 0], ([0] * 6 + [1, 0]) * 3)
    np.testing.assert_array_equal(t.terminated, terminated * t.done)
    np.testing.assert_allclose(t.obs[1:9, 0, 0, 0], [*np.arange(1, 8) / 7, 0], rtol=1e-6)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_augmented_observations(ppo, vectorization):
    t, _ = play(ppo, "scripted:Mirrored-v0", 16, vectorization=vectorization)
    assert t.obs.shape == (17, 2, 2, 2)
    np.testing.assert_array_equal(t.obs[:, :, 1], -t.obs[:, :, 0])


def test_observations_of_any_space(ppo):
    t, run = play(ppo, "scripted:Nested-v0", 16)
    assert t.obs["flat"].shape == (17, 2, 1, 2)
    assert t.obs["image"].shape == (17, 2, 1, 2, 3)
    assert t.action.shape == (16, 2, 6)
    assert run.env.action_space.shape == (2, 3)
    # choices are one-hot vectors: numbers 5 to 8, and pairs of 0 to 2 and 0 to 1
    t, _ = play(ppo, "scripted:Choices-v0", 8)
    np.testing.assert_array_equal(t.obs["number"][:4, 0, 0], np.eye(4))
    np.testing.assert_array_equal(t.obs["pair"][2, 0, 0], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(t.obs["bits"][1, 0, 0], [1, 0, 1])


SPACES = [
    spaces.Box(-1, np.inf, (2, 3)),
    spaces.Box(0, 255, (4,), np.uint8),
    spaces.Discrete(4, start=5),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiBinary(3),
    spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Tuple([spaces.Discrete(2)])),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_a_space_survives_a_run_folder(ppo, space):
    """What is read again encodes observations as before; boxes have the same finite bounds."""
    again = ppo.space_from_dict(ppo.space_to_dict(space, bounds=True))
    assert type(again) is type(space)
    one, two = (ppo.encode_obs(space.sample(), x) for x in (space, again))
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, two)
    if isinstance(space, spaces.Box):
        assert again.dtype == space.dtype
        for a, b in zip(ppo.action_bounds(space), ppo.action_bounds(again), strict=True):
            np.testing.assert_array_equal(a, b)


def two_rollouts(module, env_id, steps=30, stepwise=False, **settings):
    """Returns two rollouts in a row of a script's fresh policy, leaves [T, N, ...].

    Args:
        stepwise: whether policies act apart from the environments, as on an accelerator.
    """
    args = module.Args(env_id=env_id, num_envs=2, num_steps=steps, **settings)
    run = module.make_run(args, module.seeds_of_envs(args))
    KEPT.append(run)
    acting = run.learner._replace(opt_state=None)
    act = run.act
    if stepwise:
        act = module.make_stepwise(run.runner, acting, run.env, run.network, args, module.cpu())
    runner, first = act(run.runner, acting)
    _, second = act(runner, acting)
    return [jax.tree.map(lambda x: np.asarray(x)[0], t) for t in (first, second)]


def assert_begins_anew(first, second):
    """Two rollouts without an end, of which the second begins with episodes of its own."""
    for t in (first, second):
        assert not t.done.any() and t.mask.all()
        np.testing.assert_array_equal(t.episodic_length[:, 0], 1 + np.arange(len(t.mask)))
        np.testing.assert_array_equal(t.episodic_return[0], t.reward[0])


PENDULUM_IDS = ["Pendulum-v1", "gymnasium:Pendulum-v1", "gymnax/Pendulum-v1"]


@pytest.mark.parametrize("env_id", PENDULUM_IDS)
def test_hard_resets(ppo, env_id):
    first, second = two_rollouts(ppo, env_id, hard_resets=True)
    assert_begins_anew(first, second)
    begun = second.obs[0]
    assert np.all(np.abs(begun[..., 2]) <= 1)  # Pendulum's first speeds
    assert not np.any(begun == first.obs[-1])
    assert not np.any(begun == first.obs[0])


def test_hard_resets_where_policies_act_on_a_device(ppo):
    for env_id in ("Pendulum-v1", "gymnasium:Pendulum-v1"):
        first, second = two_rollouts(ppo, env_id, stepwise=True, hard_resets=True)
        assert_begins_anew(first, second)
        assert not np.any(second.obs[0] == first.obs[-1])


@pytest.mark.parametrize("env_id", PENDULUM_IDS)
def test_without_hard_resets_episodes_go_on(ppo, env_id):
    first, second = two_rollouts(ppo, env_id)
    np.testing.assert_array_equal(second.episodic_length[:, 0], 31 + np.arange(30))
    np.testing.assert_array_equal(second.obs[0], first.obs[-1])
    assert not ppo.Args(hard_resets=True, mode="eval").restarts  # evaluation plays to the end


def test_hard_resets_of_held_actions(cma):
    """A decision that a cut-off episode would still hold is not carried into the next."""
    settings = {"hard_resets": True, "action_repeat": 7, "env_kwargs": '{"length": 100}'}
    first, second = two_rollouts(cma, "scripted:Counter-v0", **settings)
    assert_begins_anew(first, second)
    for t in (first, second):
        # the reward says which action was taken: that of steps 0, 7, 14, 21 and 28
        decisions = np.arange(30) // 7 * 7
        taken = np.clip(t.action[decisions, 0, 0], -1, 1)
        np.testing.assert_allclose(t.reward[:, 0], 1 - np.square(taken - 0.5), rtol=1e-5, atol=1e-5)


def test_hard_resets_of_stacked_frames(atari):
    """A new episode's first observation stands for those before it."""
    first, second = two_rollouts(atari, "MountainCar-v0", hard_resets=True, frame_stack=3)
    assert_begins_anew(first, second)
    frames = second.obs[0].reshape(2, 3, 2)
    np.testing.assert_array_equal(frames, frames[:, :1].repeat(3, axis=1))


def test_hard_resets_empty_memory(icm):
    settings = {"recurrence": "gru", "memory_size": 4, "hidden_sizes": (4,)}
    _, kept = two_rollouts(icm, "MountainCar-v0", **settings)
    assert np.all(np.concatenate(kept.memory) != 0)
    first, second = two_rollouts(icm, "MountainCar-v0", hard_resets=True, **settings)
    assert_begins_anew(first, second)
    assert not np.any(second.memory[0])


def test_hard_resets_of_teams(team):
    small = {"hidden_sizes": (4,), "critic_sizes": (4,)}
    for env_id in ("MountainCar-v0", "jumanji/LevelBasedForaging-v0"):
        first, second = two_rollouts(team, env_id, hard_resets=True, **small)
        np.testing.assert_array_equal(second.episodic_length[:, 0], first.episodic_length[:, 0])
        ended_on = [x[-1] for x in jax.tree.leaves(first.obs)]
        begun = [x[0] for x in jax.tree.leaves(second.obs)]
        assert not all(map(np.array_equal, begun, ended_on))


KINDS = ["BipedalWalker-v3", "CheetahRun-v1", "HalfCheetah-v5", "MountainCarContinuous-v0"]


@pytest.mark.parametrize("env_id", KINDS)
def test_kinds_of_environments(ppo, env_id):
    t, run = play(ppo, env_id, 8)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(t))
    assert {x.dtype for x in jax.tree.leaves(t)} == {np.dtype("float32")}
    assert isinstance(run.env.action_space, gymnasium.spaces.Box)


def test_env_kwargs_reach_the_environment(ppo):
    t, _ = play(ppo, "scripted:Counter-v0", 12, env_kwargs='{"length": 3}')
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 1, 0] * 3)
    t, _ = play(ppo, "Pendulum-v1", 12, env_kwargs='{"max_episode_steps": 5}')
    np.testing.assert_array_equal(t.done[:, 0], [0, 0, 0, 0, 1, 0] * 2)


def test_whole_number_actions_are_rounded(ppo):
    """Of a Box of integers, an action of 1.6 is 2, not 1."""
    play(ppo, "scripted:Integers-v0", 8, scale_actions=False)
    assert {type(x) for x in scripted.Integers.seen} == {np.int64}
    t, _ = play(ppo, "scripted:Integers-v0", 8, num_envs=1, scale_actions=False)
    wanted = np.rint(np.clip(t.action[:7, 0, 0], -3, 3))
    np.testing.assert_array_equal(scripted.Integers.seen[-7:], wanted)


def test_float64_stays_at_the_environments_door(ppo):
    """MuJoCo speaks float64; nothing of ours does, neither learner nor rollout."""
    args = ppo.Args(env_id="HalfCheetah-v4", num_envs=2, num_steps=4)
    run = ppo.make_run(args, ppo.seeds_of_envs(args))
    KEPT.append(run)
    ours = (run.learner, run.runner.time_step, run.runner.episode, run.rollout_shape)
    assert not [x for x in jax.tree.leaves(ours) if x.dtype in (np.float64, np.int64)]


def test_lone_seed_and_batch_begin_alike(ppo):
    """Seed k of a batch has the lone run's parameters, keys, and first rollout."""
    one, _ = play(ppo, "Hopper-v4", 20, num_envs=2, seed=3)
    args = ppo.Args(env_id="Hopper-v4", num_envs=2, num_steps=20, seed=2, num_seeds=3)
    run = ppo.make_run(args, ppo.seeds_of_envs(args))
    KEPT.append(run)
    _, batch = run.act(run.runner, run.learner._replace(opt_state=None))
    mine = jax.tree.map(lambda x: np.asarray(x)[1], batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), mine, one)
