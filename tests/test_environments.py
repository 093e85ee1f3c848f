"""What rollouts see: next-step resets, float64, spaces of any kind, and nothing made of them."""

from functools import partial

import envpool
import gymnasium
import jax
import numpy as np
import pytest
import scripted

KEPT = []  # EnvPool's compiled calls hold a bare pointer: a pool must outlive them


def begin(module, env_id, steps, num_envs=2, **settings):
    """Returns a run that acts, its runner and its fresh learner."""
    sizes = {"num_envs": num_envs, "num_steps": steps, "num_minibatches": 1}
    sizes = {name: x for name, x in sizes.items() if name in module.Args.model_fields}
    run = module.make_run(module.Args(env_id=env_id, **sizes | settings))
    KEPT.append(run)
    return run, module.first_runner(run), run.init()


def play(module, env_id, steps, **settings):
    """Returns a fresh policy's rollout by a script itself, leaves [T, N, ...], and its run."""
    run, runner, learner = begin(module, env_id, steps, **settings)
    _, transition = run.act(runner, learner)
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
    obs = t.obs[:-1]
    action = 2 * np.clip(t.action[..., 0], -1, 1)
    angle = np.arctan2(obs[..., 1], obs[..., 0])
    cost = angle**2 + 0.1 * obs[..., 2] ** 2 + 0.001 * action**2
    real = t.mask > 0
    np.testing.assert_allclose(t.reward[real], -cost[real], rtol=1e-4, atol=1e-3)
    # and obs[t + 1] is what it led to, at the end of an episode, too
    speed = np.clip(obs[..., 2] + (15 * obs[..., 1] + 3 * action) * 0.05, -8, 8)
    np.testing.assert_allclose(t.obs[1:, :, 2][real], speed[real], rtol=1e-3, atol=2e-3)


def test_termination_is_told_from_truncation(ppo):
    t, _ = play(ppo, "InvertedPendulum-v4", 300)
    assert_next_step_resets(t)
    np.testing.assert_array_equal(t.terminated, t.done)  # it falls long before 1000 steps
    last = t.obs[1:, :, 1][t.done > 0]
    first = t.obs[1:, :, 1][t.mask == 0]
    assert np.abs(last).min() > 0.2  # the true last observation: fallen
    assert np.abs(first).max() < 0.05  # the new episode's first


def test_rollout_is_what_envpool_itself_does(ppo):
    """Stepping EnvPool from Python with the same actions gives the same observations."""
    t, run = play(ppo, "InvertedPendulum-v4", 60, num_envs=1)
    seeds = [int(np.random.SeedSequence(1).generate_state(1)[0] >> 1)]
    pool = envpool.make("InvertedPendulum-v4", env_type="gymnasium", num_envs=1, seed=seeds)
    obs, _ = pool.reset()
    for i in range(60):
        np.testing.assert_allclose(t.obs[i], obs, rtol=1e-6, atol=1e-6)
        with jax.enable_x64(True):
            action = np.asarray(ppo.env_action(t.action[i], run.env.action_space, run.args))
        obs, reward, terminated, truncated, _ = pool.step(action)
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
    np.testing.assert_allclose(t.obs[1:9, 0, 0], [*np.arange(1, 8) / 7, 0], rtol=1e-6)


# of a space, what is seen of an environment's first two observations
SPACES = [
    ("Nested", [[0, 1, 0, 0, 0, 0, 0, 0], [1 / 7, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]]),
    ("Choices", [[1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0, 1]]),
    ("Table", [[0] * 25, [1] * 25]),
    ("Tuples", [[0, 1, 1, 0, 0], [1 / 7, 1, 0, 1, 0]]),
    ("WholeKeys", [[0, 1, 200], [1 / 7, 1, 200]]),
]


@pytest.mark.parametrize(("name", "seen"), SPACES)
def test_observations_of_any_space(ppo, name, seen):
    """Numbers behind each other, by the space's order of keys; choices as one-hot vectors."""
    for vectorization in ("sync", "async"):
        t, run = play(ppo, f"scripted:{name}-v0", 2, vectorization=vectorization)
        np.testing.assert_allclose(t.obs[:2, 0], seen, rtol=1e-6)
        np.testing.assert_array_equal(t.obs[:, 0], t.obs[:, 1])
    space = run.env.observation_space
    one = ppo.flat(space.sample(), space)  # alone, and of other leading axes, it is the same
    assert one.shape == t.obs.shape[2:] and one.dtype == np.float32


def test_a_choice_that_is_none_is_no_number(ppo):
    """Which stops a run; a choice beyond the end would else have been seen as none at all."""
    t, _ = play(ppo, "scripted:Tuples-v0", 6, env_kwargs='{"leaves": 4}')
    assert np.isnan(t.obs[4, :, 2:]).all() and np.isfinite(t.obs[:4]).all()


def test_whole_numbers_are_not_wrapped(ppo):
    """Those of 64 bits that fit are taken, others end the run; NumPy would make 300 a 44."""
    t, _ = play(ppo, "scripted:Narrow-v0", 6, env_kwargs='{"shown": -7}')
    assert t.obs[3, 0, -1] == -7
    for vectorization in ("sync", "async"):
        with pytest.raises(Exception, match="an observation has numbers that Box"):
            play(ppo, "scripted:Narrow-v0", 6, vectorization=vectorization)


STRICT = ["Strict", "StrictSides", "StrictHalf", "StrictWhole"]


@pytest.mark.parametrize("name", STRICT)
def test_an_action_is_of_its_space(ppo, name):
    """Of its dtype and shape, and inside of each bound in that dtype, however wild the policy."""
    for settings in ({}, {"scale_actions": False}):
        t, _ = play(ppo, f"scripted:{name}-v0", 40, log_std_init=2.0, **settings)
        assert t.action.min() < -3 and t.action.max() > 3


def test_an_open_end_of_whole_numbers_is_no_bound(ppo, icm, team):
    """Its number is the largest of the dtype, to which nothing is scaled."""
    space = gymnasium.spaces.Box(0, np.inf, (1,), np.int64)
    action = np.array([[3.4], [-2.0]], np.float32)
    for script in (ppo, icm):
        found = script.env_action(action, space, script.Args())
        np.testing.assert_array_equal(found, [[3], [0]])
    joint = team.joint_action_space([space, space])
    np.testing.assert_array_equal(team.env_action(action, joint, team.Args()), action)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("shape", ["[]", "[1]", "[1, 1]"])
def test_what_is_nearly_right_is_taken(ppo, icm, vectorization, shape):
    """Observations in lists, a reward of one number in whatever shape, ends that are no bool.

    And infos that do not match.
    """
    kwargs = f'{{"shape": {shape}, "kind": "int16"}}'
    settings = {"env_kwargs": kwargs, "vectorization": vectorization}
    t, _ = play(ppo, "scripted:Odd-v0", 20, **settings)
    np.testing.assert_array_equal(t.reward, 3 * t.mask)
    assert_next_step_resets(t)
    mine, _ = play(icm, "scripted:Odd-v0", 20, **settings)
    np.testing.assert_array_equal(mine.obs["obs"][:, :, 0], t.obs)


def two_rollouts(module, env_id, steps=30, **settings):
    """Returns two rollouts in a row of a script's fresh policy, leaves [T, N, ...]."""
    run, runner, learner = begin(module, env_id, steps, **settings)
    runner, first = run.act(runner, learner)
    _, second = run.act(runner, learner)
    return [jax.tree.map(lambda x: np.asarray(x)[0], t) for t in (first, second)]


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "gymnasium:Pendulum-v1", "gymnax/Pendulum-v1"])
def test_episodes_go_on_in_the_next_rollout(ppo, env_id):
    first, second = two_rollouts(ppo, env_id)
    np.testing.assert_array_equal(second.episodic_length[:, 0], 31 + np.arange(30))
    np.testing.assert_array_equal(second.obs[0], first.obs[-1])


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
    run, runner, learner = begin(ppo, "HalfCheetah-v4", 4)
    ours = (learner, runner._replace(env_state=None), run.act(runner, learner)[1])
    assert not [x for x in jax.tree.leaves(ours) if x.dtype in (np.float64, np.int64)]


def test_lone_seed_and_batch_begin_alike(ppo):
    """Seed k of a batch has the lone run's parameters, keys, and first rollout."""
    one, _ = play(ppo, "Hopper-v4", 20, seed=3)
    run, runner, learner = begin(ppo, "Hopper-v4", 20, seed=2, num_seeds=3)
    _, batch = run.act(runner, learner)
    mine = jax.tree.map(lambda x: np.asarray(x)[1], batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), mine, one)
