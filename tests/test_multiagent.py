"""What is ppo_multiagent.py's own: an axis of agents, who sees what, deaths, joint environments."""

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
from test_environments import KEPT, play

TEAM = "jax:jax_tasks:team"
SMALL = {"hidden_sizes": (4,), "critic_sizes": (4,)}


def play_native(team, steps, num_envs=2, **settings):
    """Returns a fresh team's rollout of a JAX-native environment, [T, N, ...], and its run."""
    args = team.Args(env_id=TEAM, num_envs=num_envs, num_steps=steps, **SMALL | settings)
    run = team.make_run(args, team.seeds_of_envs(args))
    KEPT.append(run)
    _, transition = run.act(run.runner, run.learner._replace(opt_state=None))
    return jax.tree.map(lambda x: np.asarray(x)[0], transition), run


# --- One agent ---
def test_update_of_one_agent_is_that_of_ppo_continuous(ppo, team):
    """Same batch, same parameters, float32: the same learner, but for rounding."""
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    learner, transition = jax.tree.map(to_single, (learner, transition))
    new, metrics = jax.jit(partial(ppo.update, network=network, args=args))(learner, transition)

    own = small_args(team, norm_value=False, activation="tanh")
    networks = team.ActorCritic(network.action_space, own)
    begin = team.init_learner(np.uint32(3), np.zeros(3, np.float32), networks, own)
    begin = begin._replace(
        params={"params": {"shared": learner.params["params"]}},
        obs_stats=team.RunningStats(*learner.obs_stats),
        return_stats=team.RunningStats(*learner.return_stats),
        iteration=learner.iteration,
    )
    fields = {name: x for name, x in transition._asdict().items() if x is not None}
    alone = {
        name: np.expand_dims(x, 2)
        for name, x in fields.items()
        if name not in ("ended", "episodic_return", "episodic_length")
    }
    rollout = team.Transition(
        **fields | alone,
        own_return=transition.episodic_return[..., None],
        measure=0 * transition.reward,
    )
    same, seen = jax.jit(partial(team.update, network=networks, args=own))(begin, rollout)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, new.params["params"], same.params["params"]["shared"])
    for name in ("obs_stats", "return_stats"):
        for mine, theirs in zip(getattr(new, name), getattr(same, name), strict=True):
            close(mine, theirs)
    close(new.returns, same.returns)
    for name, value in metrics.items():
        close(value, seen[name], err_msg=name)


# --- Agents ---
def test_rollouts_have_an_axis_of_agents(team):
    """Rewards, returns, masks and deaths of three agents, of which the second dies at step 2."""
    t, _ = play_native(team, 20)
    assert t.obs["obs"].shape == (21, 2, 3, 1, 3) and t.action.shape == (20, 2, 3, 1)
    np.testing.assert_array_equal(t.obs["obs"][0, 0, :, 0, 0], [0, 1, 2])
    np.testing.assert_array_equal(t.obs["agent"][3, 1, :, 0], np.eye(3) > 0)
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
    np.testing.assert_array_equal(t.terminated[step == 1][:, :, 1], 1)  # where it dies
    np.testing.assert_array_equal(t.done[step == 3][:, :, [0, 2]], 1)
    below = t.obs["obs"][:-1, :, 0, 0, 2][step == 3] < 0.5
    np.testing.assert_array_equal(t.terminated[step == 3][:, :, 0], below)
    assert 0 < below.mean() < 1
    np.testing.assert_array_equal(t.done[(step == 0) | (step == 4)], 0)


def test_team_reward(team):
    """Every agent learns from the sum; returns stay what they were."""
    own, _ = play_native(team, 10)
    shared, _ = play_native(team, 10, team_reward=True)
    np.testing.assert_array_equal(shared.action, own.action)
    sums = own.reward.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(shared.reward, np.broadcast_to(sums, shared.reward.shape))
    np.testing.assert_array_equal(shared.episodic_return, own.episodic_return)


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
    assert "measure" not in team.summary([team.Score(3.0, own[0], 0.0)])


def test_advantages_of_agents_end_with_them(team):
    """Against the definition, agent by agent."""
    t, run = play_native(team, 20)
    args = run.args
    rows = team.agents_as_rows(team.Transition(**t._asdict()))
    value = np.random.default_rng(0).normal(0, 1, (21, 6, 1)).astype(np.float32)
    learner = jax.tree.map(lambda x: x[0], run.learner)
    args = team.Args(norm_value=False)
    found, _ = team.estimate_advantages(learner, rows, value, args)
    found = np.asarray(found).reshape(20, 2, 3)
    value = value.reshape(21, 2, 3)
    for n, a in np.ndindex(2, 3):
        one = (x[:, n, a : a + 1] for x in (t.reward, t.terminated, t.done, value))
        wanted = reference.gae(*one, args.gamma, args.gae_lambda)[:, 0]
        real = t.mask[:, n, a] > 0
        np.testing.assert_allclose(found[real, n, a], wanted[real], rtol=1e-4, atol=1e-4)


CRITICS = {"mappo": True, "ippo": False}


@pytest.mark.parametrize("algorithm", list(CRITICS))
def test_who_sees_what(team, algorithm):
    """Actors see their own observation; the critic of MAPPO everybody's, that of IPPO not."""
    args = team.Args(env_id=TEAM, algorithm=algorithm, num_envs=1, num_steps=4, **SMALL)
    run = team.make_run(args, team.seeds_of_envs(args))
    learner = jax.tree.map(lambda x: x[0], run.learner)
    _, first = run.env.first
    parts = {
        "obs": first.obs["obs"].swapaxes(1, 2),
        "action_mask": jnp.ones((1, 1, 3, 3)),
    }

    def said(obs):
        critic_input = "joint" if CRITICS[algorithm] else "local"
        shown = team.agent_obs(parts | {"obs": obs}, critic_input, spaces.MultiDiscrete([3, 3, 3]))
        rows = jax.tree.map(lambda x: x.reshape(3, 1, -1), shown)
        seen = team.Sequence(obs=rows, mask=jnp.ones((3, 1)))
        policy, value = run.network.apply(learner.params, seen)
        return policy.logits[:, 0, 0, 0], value[:, 0]

    slopes = jax.jacobian(said)(parts["obs"])  # [3, 1, 1, 3, 3] each
    of_policy, of_value = (np.abs(x).sum(axis=(1, 2, 4)) > 0 for x in slopes)
    np.testing.assert_array_equal(of_policy, np.eye(3) > 0)
    np.testing.assert_array_equal(of_value, np.eye(3) > -float(CRITICS[algorithm]))


@pytest.mark.parametrize(("recurrence", "types"), [("none", (0, 1, 2)), ("gru", (1, 0, 1))])
def test_types_of_agents_have_parameters_of_their_own(team, recurrence, types):
    """Each row is answered by its type's networks."""
    settings = {"agent_types": types, "recurrence": recurrence, "memory_size": 3}
    t, run = play_native(team, 5, **settings)
    params = jax.tree.map(lambda x: x[0], run.learner.params)["params"]["each"]
    assert all(len(x) == len(set(types)) for x in jax.tree.leaves(params))
    rows = team.agents_as_rows(team.Transition(**t._asdict()))
    learner = jax.tree.map(lambda x: x[0], run.learner)
    rows = rows._replace(obs=team.prepare_obs(rows.obs, learner, run.args))
    policy, value = team.apply_to_rollout(learner, rows, run.network)
    for a in range(3):
        own = jax.tree.map(lambda x, a=a: x[types[a]], params)
        shared = {"params": {"shared": own}}
        alone = team.ActorCritic(
            run.network.action_space,
            team.Args(**SMALL | {"recurrence": recurrence, "memory_size": 3}),
        )
        one, its_value = team.apply_to_rollout(learner._replace(params=shared), rows, alone)
        np.testing.assert_allclose(value[:, a::3], its_value[:, a::3], rtol=1e-5, atol=1e-6)
        logits = policy.logits[:, a::3], one.logits[:, a::3]
        np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


# --- Environments ---
def test_tuples_of_agents_are_joined(team):
    """Different sizes are filled up and masked; rewards are each one's own."""
    t, run = play(team, "scripted:Pair-v0", 16, num_envs=2, **SMALL)
    np.testing.assert_array_equal(t.obs["obs"][3, 0, :, 0], [[3, 1, 0], [3, 2, 5]])
    joint = t.obs["critic"][3, 0, 0, 0]
    np.testing.assert_array_equal(joint, [3, 1, 0, 3, 2, 5])
    np.testing.assert_array_equal(t.obs["action_mask"][3, 0, :, 0], [[1, 1, 0], [1, 1, 1]])
    assert set(t.action[..., 0, 0].ravel()) == {0, 1}
    highest = t.action[..., 0] == [1, 2]
    np.testing.assert_array_equal(t.reward, highest * t.mask)
    assert run.env.action_space == spaces.Discrete(3)


def test_a_constructor_keeps_its_own_step_limit(team):
    """As lbforaging's, which has it among its registered arguments."""
    t, _ = play(team, "scripted:Limited-v0", 12, num_envs=1, **SMALL)
    np.testing.assert_array_equal(np.flatnonzero(t.ended[:, 0]), [4, 10])


def test_pettingzoo(team):
    """A parallel environment by its module, with its state for the critic."""
    t, _ = play(team, "pettingzoo/mpe2.simple_spread_v3", 30, num_envs=2, **SMALL)
    assert t.obs["critic"].shape[-1] == 54 and t.obs["obs"].shape[2] == 3
    np.testing.assert_array_equal(np.flatnonzero(t.ended[:, 0]), [24])
    assert not t.terminated.any() and t.done[24].all()  # a time limit
    np.testing.assert_array_equal(t.mask[25], 0)
    assert (t.reward[~np.isin(np.arange(30), [25])] != 0).all()


def test_jumanji(team):
    """Scenarios, rewards, and which ends are time limits."""
    args = team.Args(scenario="2s-8x8-2p-2f-coop", num_envs=4, num_steps=120, **SMALL)
    run = team.make_run(args, team.seeds_of_envs(args))
    KEPT.append(run)
    _, t = run.act(run.runner, run.learner._replace(opt_state=None))
    t = jax.tree.map(lambda x: np.asarray(x)[0], t)
    assert t.obs["obs"].shape[2:] == (2, 1, 12)
    last = t.ended > 0
    limit = t.episodic_length[last] == 100
    np.testing.assert_array_equal(t.terminated[last][:, 0], ~limit)
    np.testing.assert_allclose(t.measure[last] == 1, ~limit)
    assert limit.any()
    chosen = np.take_along_axis(t.obs["action_mask"][:-1, :, :, 0], t.action, axis=-1)
    assert chosen.all()
    sizes = team.robot_warehouse("small-4ag-easy")
    assert sizes["shelf_rows"] == 2 and sizes["request_queue_size"] == 8
    assert team.foraging("15x15-4p-3f")["fov"] == 15
    assert not team.foraging("15x15-4p-3f")["force_coop"]
    with pytest.raises(team.Failure, match="--scenario huge"):
        team.open_env(team.Args(scenario="huge"), [1])


def test_jaxmarl(team):
    """SMAX has a state, masks and deaths; of a dead unit nothing is learnt; a bonus is a win."""
    env = {"env_id": "jaxmarl/HeuristicEnemySMAX", "scenario": "3m"}
    kwargs = '{"won_battle_bonus": 0.05}'  # a policy by chance never wins, but comes so far
    args = team.Args(**env, env_kwargs=kwargs, num_envs=8, num_steps=100)
    run = team.make_run(args, team.seeds_of_envs(args))
    KEPT.append(run)
    _, t = run.act(run.runner, run.learner._replace(opt_state=None))
    t = jax.tree.map(lambda x: np.asarray(x)[0], t)
    dead = t.mask.sum(axis=-1) % 3 > 0
    assert dead.any() and t.ended.any()
    chosen = np.take_along_axis(t.obs["action_mask"][:-1, :, :, 0], t.action, axis=-1)
    assert chosen[t.mask > 0].all()
    died = (t.terminated > 0) & ~(t.ended > 0)[..., None]
    assert died.any() and (t.mask[1:][died[:-1]] == 0).all()
    won = (t.reward.max(axis=-1) >= 0.05) & (t.ended > 0)
    np.testing.assert_array_equal(t.measure[t.ended > 0], won[t.ended > 0])
    assert 0 < won.sum() < t.ended.sum()


def test_the_whole_iteration_lowers_for_accelerators(team):
    settings = {"recurrence": "gru", "memory_size": 3, "agent_types": (0, 1, 0)}
    args = team.Args(env_id=TEAM, num_envs=2, num_steps=4, num_minibatches=2, **SMALL | settings)
    run = team.make_run(args, team.seeds_of_envs(args))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1])[None], ("process", "seed"))
    given = run.learner, team.split_by_seed(run.runner, args), np.int32(1)
    loop = jax.jit(team.make_loop(run, mesh, args))
    lowered(loop, given)


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
    done = run([*line[:2], "--mode", "eval", "--run-dir", "a", "--deterministic"])
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
    forbidden = {"obs": obs, "action_mask": np.array([[1, 0, 0], [1, 0, 1], [0, 1, 0]])}
    assert policy(forbidden)[0] == 0 and policy(forbidden)[1] != 1


def test_wrong_teams_end_in_one_line(team):
    for settings, said in (
        ({"env_id": TEAM, "critic_input": "state"}, "--critic-input state: .* has none"),
        ({"env_id": "CartPole-v1", "critic_input": "state"}, "--critic-input state"),
        ({"env_id": "jumanji/Snake-v1"}, "is unknown; nearest"),
        ({"env_id": TEAM, "algorithm": "ippo", "critic_input": "joint"}, "joint is mappo's"),
        ({"env_id": TEAM, "agent_types": (0, 2, 2)}, "count them from 0"),
        ({"env_id": TEAM, "agent_types": (0, 1)}, "has 3 agents"),
        ({"env_id": "CartPole-v1", "agent_types": (0,)}, "has one agent"),
    ):
        args = team.Args(**settings)
        with pytest.raises(team.Failure, match=said):
            team.validate(args)
            team.make_env(args, [1])


# --- Mutants: (the test that must turn red, a text of the script, what a slip would make of it) ---
MUTANTS = [
    (test_rollouts_have_an_axis_of_agents, "goes_on[:, None] * last.alive", "goes_on[:, None]"),
    (
        test_rollouts_have_an_axis_of_agents,
        "new.terminated[:, None] | died",
        "new.terminated[:, None] | False & died",
    ),
    (
        test_rollouts_have_an_axis_of_agents,
        "(episode.total + new.score)",
        "(episode.total + new.reward[:, 0])",
    ),
    (test_rollouts_have_an_axis_of_agents, 'mask &= parts["action_mask"] > 0', "pass"),
    (test_team_reward, "if args.team_reward:", "if False:"),
    (test_huber_loss_of_values, "0.5 * jnp.square(error)", "jnp.square(error)"),
    (test_huber_loss_of_values, "delta=args.huber_delta", "delta=1"),
    (test_summary_of_episodes, "agents.max(axis=1).mean()", "agents.mean(axis=0).max()"),
    (
        test_tuples_of_agents_are_joined,
        "np.arange(most) < space.nvec[:, None]",
        "np.arange(most) < most",
    ),
]


@pytest.mark.parametrize(
    ("test", "text", "slip"), MUTANTS, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
def test_mutant_is_killed(test, text, slip):
    mutant = mutate("ppo_multiagent", text, slip)
    with pytest.raises(AssertionError):
        test(mutant)
