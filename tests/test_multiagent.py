"""What is ppo_multiagent.py's own: an axis of agents, who sees what, deaths, memory, its runs."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import lowered, small_args, start, to_single
from conftest import ROOT, environment, mutate
from gymnasium import spaces
from processes import execute
from runs import result

TEAM = "jax:jax_tasks:team"
SMALL = {"hidden_sizes": (4,), "critic_sizes": (4,), "num_minibatches": 1}


def make(team, env_id, num_steps, num_envs=2, **settings):
    """Returns a fresh team's run, and its learner of the first seed, [...]."""
    args = team.Args(env_id=env_id, num_envs=num_envs, num_steps=num_steps, **SMALL | settings)
    run = team.make_run(args)
    return run, jax.device_get(run.init())


def play(team, env_id, num_steps, num_envs=2, **settings):
    """Returns a fresh team's rollout, [T, N, ...], its run, and its learner."""
    run, learner = make(team, env_id, num_steps, num_envs, **settings)
    _, transition = run.act(team.first_runner(run), learner)
    first = partial(jax.tree.map, lambda x: np.asarray(x)[0])
    return first(transition), run, first(learner)


# --- One agent ---
def test_update_of_one_agent_is_that_of_ppo_continuous(ppo, team):
    """Same batch, same parameters, float32: the same learner, but for rounding."""
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    learner, transition = jax.tree.map(to_single, (learner, transition))
    new, metrics = jax.jit(partial(ppo.update, network=network, args=args))(learner, transition)

    own = small_args(team, norm_value=False, activation="tanh")
    space = spaces.Box(-1, 1, (1, transition.action.shape[-1]))
    networks = team.ActorCritic(space, own)
    numbers = jnp.zeros((1, transition.obs.shape[-1]))
    there = np.ones((1, *space.shape[1:], 1), bool)
    zero = jnp.zeros(1)
    shown = team.TimeStep(numbers, there, zero > 0, zero, zero, zero, 0.0, jnp.zeros(0), 0.0)
    init = partial(team.init_learner, shown=shown, network=networks, args=own)
    begin = jax.jit(init)(np.uint32(3))
    begin = begin._replace(
        params={"params": {"shared": learner.params["params"]}},
        obs_stats=team.RunningStats(*learner.obs_stats),
        critic_stats=team.RunningStats(*learner.obs_stats),
        return_stats=team.RunningStats(*learner.return_stats),
        iteration=learner.iteration,
        returns=learner.returns,
        episodes=learner.episodes,
    )
    fields = transition._asdict()
    alone = {name: np.expand_dims(x, 2) for name, x in fields.items()}
    of_team = {name: fields[name] for name in ("episodic_return", "episodic_length")}
    obs = alone["obs"]
    steps = obs.shape[:3]
    views = team.Views(obs, obs, None, np.ones((*steps, *there.shape[1:]), bool))
    rollout = team.Transition(
        **alone | of_team | {"obs": views},
        own_return=alone["episodic_return"],
        ended=transition.done * transition.mask,
        measure=0 * transition.reward,
        memory=(),
    )
    same, seen = jax.jit(partial(team.update, network=networks, args=own))(begin, rollout)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, new.params["params"], same.params["params"]["shared"])
    for name in ("obs_stats", "return_stats"):
        for mine, theirs in zip(getattr(new, name), getattr(same, name), strict=True):
            close(mine, theirs)
    close(new.returns, same.returns)
    for name, value in metrics.items():
        if name != "policy/kl_coef":
            close(value, seen[name], err_msg=name)


# --- Agents ---
def test_rollouts_have_an_axis_of_agents(team):
    """Rewards, returns, masks and deaths of three agents, of which the second dies at step 2."""
    t, _, _ = play(team, TEAM, 20, death="ends")
    assert t.obs.actor.shape == (21, 2, 3, 3) and t.action.shape == (20, 2, 3, 1)
    np.testing.assert_array_equal(t.obs.actor[0, 0, :, 0], [0, 1, 2])
    np.testing.assert_array_equal(t.obs.agent[3, 1], np.eye(3))
    step = np.arange(20) % 5  # four steps and a reset
    mask = np.ones((20, 3))
    mask[step == 4] = 0
    mask[(step == 2) | (step == 3), 1] = 0
    for n in range(2):
        np.testing.assert_array_equal(t.mask[:, n], mask)
        np.testing.assert_array_equal(t.ended[:, n], step == 3)
        np.testing.assert_array_equal(t.episodic_length[:, n], (step + 1) * (step < 4))
        np.testing.assert_array_equal(t.measure[:, n], np.where(step < 4, (step + 1) / 4, 0))
    earned = (t.action[..., 0] == 1) * 10.0 ** np.arange(3) * t.mask
    np.testing.assert_array_equal(t.reward, earned)
    assert not (t.action[:, :, 0] == 2).any()  # masked
    assert (t.action[:, :, 2] == 2).any()
    for first in range(0, 20, 5):
        sums = np.cumsum(earned[first : first + 4], axis=0)
        np.testing.assert_array_equal(t.own_return[first : first + 4], sums)
        np.testing.assert_array_equal(t.episodic_return[first : first + 4], sums.sum(axis=-1))
    discounted = 0
    for i in range(20):
        discounted = (0.99 * discounted + t.reward[i]) * (step[i] < 4)
        np.testing.assert_allclose(t.discounted_return[i], discounted, rtol=1e-6)
    np.testing.assert_array_equal(t.terminated[step == 1][:, :, 1], 1)  # where it dies
    np.testing.assert_array_equal(t.done[step == 3][:, :, [0, 2]], 1)
    below = t.obs.actor[:-1, :, 0, 2][step == 3] < 0.5
    np.testing.assert_array_equal(t.terminated[step == 3][:, :, 0], below)
    assert 0 < below.mean() < 1
    np.testing.assert_array_equal(t.done[(step == 0) | (step == 4)], 0)
    assert team.agent_metrics(t)["agents/episodic_measure"] == 1


def test_a_death_is_not_the_teams_end(team):
    """What a team earns after an agent's death counts in its returns, to the team's own end.

    That is a time limit where it is for somebody; the dead still train nothing.
    """
    t, run, learner = play(team, TEAM, 20, team_reward=True, norm_value=False, gae_lambda=1.0)
    ends, _, _ = play(team, TEAM, 20, team_reward=True, death="ends")
    np.testing.assert_array_equal(t.mask, ends.mask)
    np.testing.assert_array_equal(t.done, np.repeat(t.ended[..., None], 3, axis=-1))
    cut = (ends.done - ends.terminated).any(axis=-1)
    assert 0 < (t.ended * cut).sum() < t.ended.sum()
    np.testing.assert_array_equal(t.terminated, t.done * ~cut[..., None])
    value = np.random.default_rng(0).normal(0, 1, (21, 6)).astype(np.float32)
    rows = team.agents_as_rows(t)
    _, _, target = team.evaluate_rollout(learner, rows, Known(value), run.args)
    target = np.asarray(target).reshape(20, 2, 3)
    value = value.reshape(21, 2, 3)
    for n, a in np.ndindex(2, 3):  # four steps to an episode's end, the second agent's last but two
        for first in range(0, 20, 5):
            earned = 0.99 ** np.arange(4) @ t.reward[first : first + 4, n, a]
            earned += 0.99**4 * value[first + 4, n, a] * cut[first + 3, n]
            np.testing.assert_allclose(target[first, n, a], earned, rtol=1e-4, atol=1e-4)


def test_team_reward(team):
    """Every agent learns from the sum; returns stay what they were."""
    own, _, _ = play(team, TEAM, 10)
    shared, _, _ = play(team, TEAM, 10, team_reward=True)
    np.testing.assert_array_equal(shared.action, own.action)
    sums = own.reward.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(shared.reward, np.broadcast_to(sums, shared.reward.shape))
    np.testing.assert_array_equal(shared.episodic_return, own.episodic_return)
    np.testing.assert_array_equal(shared.own_return, own.own_return)


def test_huber_loss_of_values(team):
    """Huber 1964, eq. 4.1, and its slope, which delta bounds; none: half the square."""
    error = np.linspace(-3, 3, 13).astype(np.float32)
    inside = np.abs(error) <= 1.25
    args = team.Args(huber_delta=1.25)
    cost = np.where(inside, 0.5 * error**2, 1.25 * (np.abs(error) - 0.625))
    np.testing.assert_allclose(team.value_cost(error, args), cost, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(team.value_cost(x, args)))(error)
    np.testing.assert_allclose(slope, np.clip(error, -1.25, 1.25), rtol=1e-6)
    np.testing.assert_array_equal(team.value_cost(error, team.Args()), 0.5 * error**2)


def test_summary_of_episodes(team):
    """Means over episodes of the team, of each agent, of the best; a figure where one is."""
    own = [np.array([1.0, 4.0, -2.0]), np.array([3.0, 0.0, 8.0])]
    found = team.summary([team.Score(3.0, own[0], 0.25), team.Score(11.0, own[1], 0.75)])
    of_agents = {"agents": [2, 2, 3], "agents_mean": 7 / 3, "agents_max": 6}
    assert found == {"mean": 7, "std": 4, "episodes": 2, **of_agents, "measure": 0.5}
    assert team.summary([team.Score(3.0, own[0], 0.0)])["measure"] == 0
    assert "measure" not in team.summary([team.Score(3.0, own[0], np.nan)])


def test_spread_is_that_of_experience(team):
    """Rows with mask 0 do not count."""
    mask = np.array([[1.0], [0.0]])
    logits = np.log([[[[0.7, 0.3]]], [[[0.9, 0.1]]]])
    found = team.spread(team.Categorical(logits), mask)
    np.testing.assert_allclose(found["policy/most_likely"], 0.7, rtol=1e-6)
    numbers = team.Gaussian(np.zeros((2, 1, 1)), np.log([[[2.0]], [[8.0]]]))
    np.testing.assert_allclose(team.spread(numbers, mask)["policy/std"], 2, rtol=1e-6)


class Known:
    """A network whose values are given, [T + 1, R]."""

    def __init__(self, value):
        self.value = value

    def apply(self, params, seen):
        return self.value.T, self.value.T, ()


def test_advantages_of_agents_end_with_them(team):
    """Against the definition, agent by agent."""
    t, run, learner = play(team, TEAM, 20, norm_value=False, death="ends")
    rows = team.agents_as_rows(t)
    value = np.random.default_rng(0).normal(0, 1, (21, 6)).astype(np.float32)
    _, found, _ = team.evaluate_rollout(learner, rows, Known(value), run.args)
    found = np.asarray(found).reshape(20, 2, 3)
    value = value.reshape(21, 2, 3)
    for n, a in np.ndindex(2, 3):
        one = (x[:, n, a : a + 1] for x in (t.reward, t.terminated, t.done, value))
        wanted = reference.gae(*one, run.args.gamma, run.args.gae_lambda)[:, 0]
        real = t.mask[:, n, a] > 0
        np.testing.assert_allclose(found[real, n, a], wanted[real], rtol=1e-4, atol=1e-4)


CRITICS = {"mappo": True, "ippo": False}


@pytest.mark.parametrize("algorithm", list(CRITICS))
def test_who_sees_what(team, algorithm):
    """Actors see their own observation; the critic of MAPPO everybody's, that of IPPO not."""
    run, learner = make(team, TEAM, 4, algorithm=algorithm, num_envs=1)
    params = jax.tree.map(lambda x: x[0], learner.params)
    shown = jax.tree.map(lambda x: x[0, 0], run.env.first[1])

    def said(obs):
        views = team.make_views(shown._replace(obs=obs), run.args)
        views = jax.tree.map(lambda x: x[:, None], views)
        policy, value, _ = run.network.apply(params, team.Sequence(views, jnp.ones((3, 1)), ()))
        return policy.logits[:, 0, 0, 0], value[:, 0]

    slopes = jax.jit(jax.jacobian(said))(shown.obs)  # [3, 3, 3] each
    of_policy, of_value = (np.abs(x).sum(axis=2) > 0 for x in slopes)
    np.testing.assert_array_equal(of_policy, np.eye(3) > 0)
    np.testing.assert_array_equal(of_value, np.eye(3) > -float(CRITICS[algorithm]))


@pytest.mark.parametrize(("recurrence", "types"), [("none", (0, 1, 2)), ("gru", (1, 0, 1))])
def test_types_of_agents_have_parameters_of_their_own(team, recurrence, types):
    """Each row is answered by its type's networks."""
    settings = {"agent_types": types, "recurrence": recurrence, "memory_size": 3}
    t, run, learner = play(team, TEAM, 5, **settings)
    params = learner.params["params"]
    assert len(params) == len(set(types))
    rows = team.agents_as_rows(t)
    rows = rows._replace(obs=team.prepare(rows.obs, learner, run.args))

    def answers(params, network):
        (policy, value, _), _, _ = jax.jit(
            lambda x: team.evaluate_rollout(x, rows, network, run.args)
        )(learner._replace(params=params))
        return policy.logits, value

    logits, value = answers(learner.params, run.network)
    alone = team.ActorCritic(run.env.action_space, run.args.model_copy(update={"agent_types": ()}))
    for a in range(3):
        own = params[f"type_{types[a]}"]
        one, its_value = answers({"params": {"shared": own}}, alone)
        np.testing.assert_allclose(value[:, a::3], its_value[:, a::3], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits[:, a::3], one[:, a::3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recurrence", ["lstm", "gru"])
def test_memory_in_the_update_is_that_of_the_rollout(team, recurrence):
    """Step by step or in one sequence, and from what entered each piece of one, across ends."""
    settings = {"recurrence": recurrence, "memory_size": 3, "sequence_length": 4}
    run, learner = make(team, TEAM, 8, **settings)
    runner, _ = run.act(team.first_runner(run), learner)  # from the middle of an episode on
    entering = runner.memory
    runner, t = run.act(runner, learner)
    left = runner.memory
    learner, t, entering, left = jax.tree.map(
        lambda x: np.asarray(x)[0], (learner, t, entering, left)
    )
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[0], t.memory), entering)
    rows = team.agents_as_rows(t)
    rows = rows._replace(obs=team.prepare(rows.obs, learner, run.args))
    batch = jax.jit(partial(team.make_batch, network=run.network, args=run.args))(learner, rows)
    policy, value, _ = jax.jit(run.network.apply)(learner.params, batch.obs)  # pieces of 4 steps
    np.testing.assert_allclose(value, batch.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy.logits, batch.policy.logits, rtol=1e-5, atol=1e-6)
    assert batch.mask.shape == (12, 4)
    memory = jax.tree.map(lambda x: x.reshape(6, -1), entering)
    apply = jax.jit(run.network.apply)
    for i in range(8):  # step by step, as policies act
        views = jax.tree.map(lambda x, i=i: x[i][:, None], rows.obs)
        _, value, behind = apply(learner.params, team.Sequence(views, np.ones((6, 1)), memory))
        wanted = batch.value.reshape(2, 6, 4)[i // 4, :, i % 4]
        np.testing.assert_allclose(value[:, 0], wanted, rtol=1e-5, atol=1e-6)
        memory = jax.tree.map(lambda x, i=i: x[:, 0] * rows.mask[i][:, None], behind)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda x, y: close(x, y.reshape(6, -1)), memory, left)  # as policies left it


def test_numbers_that_an_agent_does_not_have_do_not_count(team):
    """Their entropy is 0, and so are their KL and their part in a ratio."""
    args = team.Args(**SMALL)
    network = team.ActorCritic(spaces.Box(-1, 1, (2, 3)), args)
    there = np.array([[[True] * 3], [[True, False, False]]])[..., None]  # [2, 1, 3, 1]
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(2, 1, 4)).astype(np.float32)
    views = team.Views(obs, obs, np.eye(2, dtype=np.float32)[:, None], there)
    seen = team.Sequence(views, np.ones((2, 1)), ())
    policies = []
    for seed in (0, 1):
        policy, _, _ = network.apply(network.init(jax.random.PRNGKey(seed), seen), seen)
        policies.append(policy)
    old, new = policies
    one = jax.tree.map(lambda x: x[1, :, :1], old), jax.tree.map(lambda x: x[1, :, :1], new)
    np.testing.assert_allclose(team.entropy(old)[1], team.entropy(one[0]), rtol=1e-5)
    np.testing.assert_allclose(team.kl(old, new)[1], team.kl(*one), rtol=1e-4, atol=1e-9)
    action = rng.normal(size=(2, 1, 3)).astype(np.float32)
    ratio = team.log_prob(new, action) - team.log_prob(old, action)
    of_one = team.log_prob(one[1], action[1, :, :1]) - team.log_prob(one[0], action[1, :, :1])
    np.testing.assert_allclose(ratio[1], of_one, rtol=1e-4, atol=1e-6)


# --- Environments ---
def test_tuples_of_agents_are_joined(team):
    """Different sizes are filled up and masked; rewards are each one's own."""
    t, run, _ = play(team, "scripted:Pair-v0", 16)
    np.testing.assert_array_equal(t.obs.actor[3, 0], [[3, 1, 0], [3, 2, 5]])
    np.testing.assert_array_equal(t.obs.critic[3, 0, 0], [3, 1, 0, 3, 2, 5])
    np.testing.assert_array_equal(t.obs.action_mask[3, 0, :, 0], [[1, 1, 0], [1, 1, 1]])
    assert set(t.action[..., 0, 0].ravel()) == {0, 1}
    highest = t.action[..., 0] == [1, 2]
    np.testing.assert_array_equal(t.reward, highest * t.mask)
    assert run.env.action_space == spaces.MultiDiscrete([[2], [3]])
    metrics = team.agent_metrics(t)
    assert metrics["agents/episodic_return_mean"] > 0
    assert np.isnan(metrics["agents/episodic_measure"])  # there is none


def test_a_constructor_keeps_its_own_step_limit(team):
    """As lbforaging's, which has it among its registered arguments."""
    t, _, _ = play(team, "scripted:Limited-v0", 12, num_envs=1)
    np.testing.assert_array_equal(np.flatnonzero(t.ended[:, 0]), [4, 10])


def test_actions_are_scaled_to_each_agents_bounds(team):
    """Where there are two; choices stay; each agent's part is clipped at its own door."""
    low = np.array([[0, -np.inf], [-2, 0.1]])
    space = spaces.Box(low, np.array([[10, 1.0], [2, 0.3]]), dtype=np.float64)
    action = np.array([[[0.5, 3], [-1, 0]]], np.float32)
    scaled = team.env_action(action, space, team.Args())
    np.testing.assert_allclose(scaled, [[[7.5, 3], [-2, 0.2]]], rtol=1e-6)
    np.testing.assert_array_equal(
        team.env_action(action, space, team.Args(scale_actions=False)), action
    )
    own = spaces.Box(0.1, 0.3, (2,), np.float64)
    got = team.own_action(own, np.float32([0.1, 7]), np)
    assert got.dtype == np.float64 and own.contains(got)


def test_pettingzoo(team):
    """A parallel environment by its module, with its state for the critic."""
    t, _, _ = play(team, "pettingzoo/mpe2.simple_spread_v3", 30)
    assert t.obs.critic.shape[-1] == 54 and t.obs.actor.shape[2] == 3
    np.testing.assert_array_equal(np.flatnonzero(t.ended[:, 0]), [24])
    assert not t.terminated.any() and t.done[24].all()  # a time limit
    np.testing.assert_array_equal(t.mask[25], 0)
    assert (t.reward[~np.isin(np.arange(30), [25])] != 0).all()


def test_scenarios(team):
    """Of Jumanji's two, by the names of their papers."""
    run, _ = make(team, "jumanji/LevelBasedForaging-v0", 4, scenario="2s-8x8-2p-2f-coop")
    assert run.env.first[1].obs.shape[2:] == (2, 12)
    sizes = team.robot_warehouse("small-4ag-easy")
    assert sizes["shelf_rows"] == 2 and sizes["request_queue_size"] == 8
    assert team.foraging("15x15-4p-3f")["fov"] == 15
    assert not team.foraging("15x15-4p-3f")["force_coop"]
    for name in ("huge", "8x8-2p-2f-cop", "8x10-2p-2f", "8x8-2p-2f-coop-easy"):
        with pytest.raises(team.InputError, match=f"--scenario {name}"):
            team.make_env(team.Args(scenario=name), [1])
    for name in ("vast-2ag", "tiny-2ag-simple", "tiny-2ag-easy-hard"):
        with pytest.raises((KeyError, ValueError)):
            team.robot_warehouse(name)


def test_an_iteration_lowers_for_accelerators(team):
    """Rollout and update: no call of the host, no float64, nothing that leaves the device."""
    settings = {"recurrence": "gru", "memory_size": 3, "agent_types": (0, 1, 0)}
    run, learner = make(team, TEAM, 4, **settings)
    runner = team.first_runner(run)
    parts = {"env": run.env, "network": run.network, "args": run.args}
    lowered(jax.jit(partial(team.rollout, first_env=0, **parts)), (runner, learner))
    _, transition = run.act(runner, learner)
    update = partial(team.update_seeds, network=run.network, args=run.args)
    lowered(jax.jit(update), (learner, transition))


# --- Runs ---
def test_a_team_learns_resumes_and_plays(tmp_path, team):
    """Each to press the first button, two at once resumed, evaluated, loaded."""
    flags = "--num-envs 8 --num-steps 20 --num-minibatches 4 --learning-rate 3e-3 --log-interval 20"
    line = ["python", str(ROOT / "ppo_multiagent.py"), "--env-id", TEAM, *flags.split()]
    run = partial(execute, cwd=tmp_path, env=environment())
    for steps in (8000, 16000):
        done = run([*line, "--total-timesteps", str(steps), "--run-dir", "a", "--no-anneal-lr"])
        assert done.returncode == 0, done.stderr
    best = 2 * 10 + 4 * 101
    assert result(tmp_path / "a")["episodic_return"][0] > 0.95 * best
    (tmp_path / "a/result.json").unlink()
    line = [*line[:2], "--mode", "eval", "--run-dir", "a", "--deterministic"]
    done = run([*line, "--video"])
    assert done.returncode == 2 and "no pictures" in done.stderr
    assert not done.stdout  # before it plays
    done = run(line)
    assert done.returncode == 0, done.stderr
    row = result(tmp_path / "a")["eval_return"][0]
    np.testing.assert_allclose(row["mean"], best)
    np.testing.assert_allclose(row["agents"], [4, 20, 400])
    np.testing.assert_allclose([row["agents_max"], row["measure"]], [400, 1])
    said = "agents 4.00 20.00 400.00, mean 141.33, best 400.00; measure 1.00"
    assert said in done.stdout
    policy = team.load(tmp_path / "a")
    obs = np.array([[0, 1, 0.3], [1, 1, 0.3], [2, 1, 0.3]])
    np.testing.assert_array_equal(policy(obs), [1, 1, 1])
    np.testing.assert_array_equal(policy([obs, obs]), [[1, 1, 1]] * 2)
    forbidden = policy(obs, action_mask=np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]]))
    assert forbidden[0] == 0 and forbidden[1] != 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"env_id": TEAM, "critic_input": "state"}, "--critic-input state: .* has none"),
        ({"env_id": "jumanji/Snake-v1"}, "is unknown; nearest"),
        ({"env_id": "Pair-v9"}, "is unknown; nearest"),
        ({"env_id": TEAM, "algorithm": "ippo", "critic_input": "joint"}, "joint is mappo's"),
        ({"env_id": TEAM, "agent_types": (0, 2, 2)}, "count them from 0"),
        ({"env_id": TEAM, "agent_types": (0, 1)}, "has 3 agents"),
        ({"env_id": "CartPole-v1"}, r"of one agent: see ppo_continuous\.py"),
        ({"env_id": "Pong-v5"}, r"of one agent: see ppo_continuous\.py"),
        ({"env_id": "gymnax/CartPole-v1"}, r"of one agent: see ppo_continuous\.py"),
        ({"env_id": TEAM, "scenario": "3m"}, "--scenario is jumanji's and jaxmarl's"),
        ({"env_id": "scripted:Pair-v0", "scenario": "3m"}, "--scenario is jumanji's"),
        ({"env_id": "pettingzoo/none", "scenario": "3m"}, "--scenario is jumanji's"),
    ],
)
def test_wrong_teams_end_in_one_line(team, settings, said):
    with pytest.raises(ValueError, match=said):
        team.make_env(team.Args(**settings), [1])


# --- Mutants: (the test that must turn red, a text of the script, what a slip would make of it) ---
MUTANTS = [
    (test_a_death_is_not_the_teams_end, "(ended & ~cut)[..., None]", "ended[..., None]"),
    (test_a_death_is_not_the_teams_end, 'args.death == "continues"', 'args.death == "ends"'),
    (
        test_rollouts_have_an_axis_of_agents,
        "mask = last.alive.astype(jnp.float32)",
        "mask = jnp.ones_like(last.reward) * jnp.any(last.alive, axis=-1, keepdims=True)",
    ),
    (
        test_rollouts_have_an_axis_of_agents,
        "terminated = acted & ~alive & ~truncated",
        "terminated = said_terminated",
    ),
    (
        test_rollouts_have_an_axis_of_agents,
        "(runner.episodic_return + new.score)",
        "(runner.episodic_return + new.reward[..., 0])",
    ),
    (
        test_rollouts_have_an_axis_of_agents,
        "given = flat[np.minimum(place, size - 1)] & there",
        "given = xp.asarray(there)",
    ),
    (test_team_reward, "if args.team_reward:", "if False:"),
    (test_team_reward, "(runner.own_return + new.reward)", "(runner.own_return + reward)"),
    (test_huber_loss_of_values, "0.5 * jnp.square(error)", "jnp.square(error)"),
    (test_huber_loss_of_values, "delta=args.huber_delta", "delta=1"),
    (test_spread_is_that_of_experience, "masked_mean(most_likely, mask)", "most_likely"),
    (test_summary_of_episodes, "agents.max(axis=1).mean()", "agents.mean(axis=0).max()"),
    (
        test_tuples_of_agents_are_joined,
        "np.arange(joint.nvec.max()) < joint.nvec[..., None]",
        "np.arange(joint.nvec.max()) < 0 * joint.nvec[..., None] + joint.nvec.max()",
    ),
    (
        partial(test_memory_in_the_update_is_that_of_the_rollout, recurrence="gru"),
        "jax.tree.map(lambda x: x * mask[:, None], memory)",
        "memory",
    ),
    (
        partial(test_memory_in_the_update_is_that_of_the_rollout, recurrence="gru"),
        "jax.tree.map(lambda x: x * mask[..., None], memory)",
        "memory",
    ),
    (
        partial(test_memory_in_the_update_is_that_of_the_rollout, recurrence="gru"),
        "jnp.concatenate([x, y[:-1]])",
        "y",
    ),
    (
        test_numbers_that_an_agent_does_not_have_do_not_count,
        "jnp.where(there, log_std, ENTROPY_0)",
        "log_std",
    ),
    (
        test_numbers_that_an_agent_does_not_have_do_not_count,
        "jnp.where(there, mean, 0)",
        "mean",
    ),
    (
        test_actions_are_scaled_to_each_agents_bounds,
        "np.float32(low / 2 + high / 2) + ",
        "",
    ),
]


@pytest.mark.parametrize(
    ("test", "text", "slip"), MUTANTS, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
def test_mutant_is_killed(test, text, slip):
    mutant = mutate("ppo_multiagent", text, slip)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):  # also in a callback
        test(mutant)
