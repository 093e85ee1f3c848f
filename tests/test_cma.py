"""ppo_cma.py: its losses, decisions and variance, and what it shares with ppo_continuous.py."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import lowered, schedule
from conftest import ROOT
from gymnasium.spaces import Box

sys.path.insert(0, str(ROOT / "benchmarks"))
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
B, U = 24, 3


class Direct:
    """A network whose parameters are its outputs, so that the losses alone are tested."""

    def __init__(self, module):
        self.module = module

    def apply(self, params, obs, time=0.0):
        mean, log_std, skew, value = params
        if not hasattr(self.module, "critic_loss"):
            return self.module.Gaussian(mean, log_std), value
        skew = None if skew is None else jnp.tril(skew, -1)
        return self.module.Gaussian(mean, log_std, skew), value


def case(full, seed=0):
    """Returns parameters, their covariances [B, U, U], and the data of a minibatch."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(0, 1, (B, U))
    log_std = rng.normal(0, 0.3, (B, U))
    value = rng.normal(0, 1, B)
    skew = rng.normal(0, 0.5, (B, U, U)) if full else None
    data = {
        "advantage": rng.normal(0, 1, B),
        "action": mean + rng.normal(0, 1, (B, U)),
        "target": rng.normal(0, 1, B),
        "mean": mean + rng.normal(0, 0.3, (B, U)),
        "log_prob": rng.normal(-3, 0.3, B),
    }
    return (mean, log_std, skew, value), covariances(log_std, skew), data


def covariances(log_std, skew):
    """Returns covariances [B, U, U]; skew None is 0."""
    skew = np.zeros((B, U, U)) if skew is None else skew
    return [reference.covariance(*row) for row in zip(log_std, skew, strict=True)]


def numeric(f, x, index, h=1e-6):
    """Returns the derivative of f in one element of x, by central differences."""
    ends = []
    for sign in (1, -1):
        moved = np.array(x)
        moved[index] += sign * h
        ends.append(f(moved))
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_distribution(cma, full):
    """Against matrices in NumPy; standardize undoes sample_action."""
    params, covs, d = case(full)
    mean, _, _, _ = params
    with jax.enable_x64(True):
        policy, _ = Direct(cma).apply(params, None)
        rows = zip(mean, covs, d["action"], strict=True)
        expected = [reference.log_prob_full(*row) for row in rows]
        np.testing.assert_allclose(cma.log_prob(policy, d["action"]), expected, **CLOSE)
        noise = cma.standardize(policy, d["action"])
        np.testing.assert_allclose(cma.sample_action(policy, noise), d["action"], **CLOSE)
        expected = [0.5 * np.log(np.linalg.det(2 * np.pi * np.e * c)) for c in covs]
        np.testing.assert_allclose(cma.entropy(policy), expected, **CLOSE)


@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full"])
def test_losses(cma, full):
    """Against loops in NumPy; gradients against central differences of those."""
    params, covs, d = case(full)
    mean, log_std, skew, value = params
    action = d["action"]
    advantage = d["advantage"]
    covariance = "full" if full else "diagonal"

    def std_loss(log_std):
        moved = covariances(log_std, skew)
        return reference.cma_std_loss(advantage, mean, moved, action)

    with jax.enable_x64(True):
        batch = cma.Batch(obs=None, time=None, **{k: jnp.asarray(v) for k, v in d.items()})
        rest = (batch, None, Direct(cma))
        args = cma.Args(covariance=covariance)
        loss, grad = jax.value_and_grad(cma.cma_std_loss)(params, *rest, args)
        np.testing.assert_allclose(loss, std_loss(log_std), **CLOSE)
        for index in [(0, 0), (3, 1), (7, 2)]:
            expected = numeric(std_loss, log_std, index)
            np.testing.assert_allclose(grad[1][index], expected, rtol=1e-5, atol=1e-8)

        for algorithm in ("ppo-cma-m", "ppo-cma"):
            args = cma.Args(covariance=covariance, algorithm=algorithm)
            loss, grad = jax.value_and_grad(cma.cma_mean_loss)(params, *rest, args)
            mirror = algorithm == "ppo-cma-m"

            def mean_loss(mean, mirror=mirror):
                own = (advantage, mean, covs, action, d["mean"], mirror, full)
                return reference.cma_mean_loss(*own)

            np.testing.assert_allclose(loss, mean_loss(mean), **CLOSE)
            for index in [(0, 0), (3, 1), (7, 2), (11, 0)]:
                expected = numeric(mean_loss, mean, index)
                np.testing.assert_allclose(grad[0][index], expected, rtol=1e-5, atol=1e-8)

        for kind in ("l1", "l2", "soft-l1"):
            loss = cma.critic_loss(params, *rest, cma.Args(value_loss=kind))
            expected = reference.critic_loss(value, d["target"], kind)
            np.testing.assert_allclose(loss, expected, **CLOSE)


def test_ppo_mode_is_ppo_continuous(cma, ppo):
    """The same loss of the policy, and the same gradient."""
    params, _, d = case(full=False)
    _, log_std, _, value = params
    rows = zip(d["mean"], log_std, d["action"], strict=True)
    d["log_prob"] = np.array([reference.log_prob(*row) for row in rows])
    numbers = {"clip_coef": 0.2, "ent_coef": 0.03}
    with jax.enable_x64(True):
        batch = cma.Batch(obs=None, time=None, **d)
        rest = (batch, schedule(cma, **numbers), Direct(cma), cma.Args(algorithm="ppo"))
        mine, grad = jax.value_and_grad(cma.policy_loss)(params, *rest)
        batch = ppo.Batch(
            obs=None,
            action=d["action"],
            policy=ppo.Gaussian(d["mean"], log_std),
            log_prob=d["log_prob"],
            value=value,
            advantage=d["advantage"],
            target=d["target"],
            mask=np.ones(B),
        )
        loss = jax.value_and_grad(ppo.ppo_loss, has_aux=True)
        rest = (batch, schedule(ppo, **numbers), Direct(ppo), ppo.Args())
        (theirs, _), their_grad = loss(params, *rest)
    np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    for a, b in zip(grad[:2], their_grad[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def scripted_steps(rng, T=41, N=3):
    """Returns a dict of [T, N]: steps of episodes of all lengths that end in both ways."""
    t = {k: np.zeros((T, N)) for k in ("reward", "terminated", "done", "mask", "episodic_length")}
    for n in range(N):
        length = n  # the first episodes began before
        end = 7 + n
        resetting = False
        for step in range(T):
            if resetting:
                length = 0
                end = rng.integers(2, 9)
                resetting = False
                continue
            length += 1
            t["mask"][step, n] = 1
            t["episodic_length"][step, n] = length
            t["reward"][step, n] = rng.normal()
            if length == end:
                resetting = True
                t["done"][step, n] = 1
                t["terminated"][step, n] = rng.random() < 0.5
    return t


@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_decisions_and_their_advantages(cma, repeat):
    """Each decision's reward, end, time and next observation, and its advantage, against a loop."""
    rng = np.random.default_rng(repeat)
    t = scripted_steps(rng)
    T, N = t["mask"].shape
    index = np.broadcast_to(
        np.arange(T + 1.0)[:, None], (T + 1, N)
    )  # observations that tell their row
    unread = dict.fromkeys(("ended", "episodic_return", "discounted_return"), np.zeros((T, N)))
    steps = cma.Transition(obs=index, action=index[:-1, :, None], **t, **unread)
    with jax.enable_x64(True):
        new, time = jax.tree.map(np.asarray, cma.merge_held_steps(steps, repeat))
        value = rng.normal(0, 1, T + 1)[np.asarray(new.obs, int)]
        advantage, _ = cma.compute_gae(new, value, 0.9, 0.8)
    seen = 0
    for n, mine in enumerate(reference.decisions(t, repeat)):
        rows = np.flatnonzero(new.mask[:, n])
        assert len(rows) == len(mine)
        for row, (first, reward, terminated, done, after) in zip(rows, mine, strict=True):
            assert new.obs[row, n] == first and new.action[row, n, 0] == first
            assert new.obs[row + 1, n] == after  # the true next observation
            np.testing.assert_allclose(new.reward[row, n], reward)
            assert (new.terminated[row, n], new.done[row, n]) == (terminated, done)
            assert time[row, n] == (t["episodic_length"][first, n] - 1) / repeat
            seen += 1
        total = 0.0
        for row in rows[::-1]:  # backwards, by hand
            delta = (
                new.reward[row, n]
                + 0.9 * value[row + 1, n] * (1 - new.terminated[row, n])
                - value[row, n]
            )
            total = delta + 0.72 * (1 - new.done[row, n]) * total
            np.testing.assert_allclose(advantage[row, n], total, rtol=1e-10)
    assert seen > 20


def test_scaler_is_the_mean_over_iterations_and_never_grows(cma):
    rng = np.random.default_rng(0)
    scaler = cma.Scaler(np.zeros(2), np.ones(2), np.float64(0))
    squares = []
    scale = np.ones(2)
    with jax.enable_x64(True):
        for size in (3.0, 0.1, 5.0):
            x = size * rng.normal(0, 1, (6, 4, 2))
            mask = (rng.random((6, 4)) < 0.7).astype(float)
            scaler = cma.update_scaler(x, scaler, mask)
            squares.append(np.square(x[mask > 0]).mean(axis=0))
            scale = np.minimum(scale, 1 / (2 * np.sqrt(np.mean(squares, axis=0)) + 0.001))
            np.testing.assert_allclose(scaler.scale, scale, **CLOSE)
            np.testing.assert_allclose(cma.normalize(x, scaler, np.inf), x * scale, **CLOSE)


def bandit(cma, **settings):
    """Returns a network, a learner and a rollout of one-step episodes; every third row is none."""
    small = {"batch_size": 16, "num_updates": 3, "init_updates": 5}
    args = cma.Args(num_envs=30, num_steps=2, action_repeat=1, **small, **settings)
    network = cma.ActorCritic(Box(-2, 2, (U,), np.float32), args)
    learner = cma.init_learner(np.uint32(3), np.zeros(2, np.float32), network, args)
    rng = np.random.default_rng(1)
    shape = (args.num_steps, args.num_envs)
    mask = (np.arange(60).reshape(shape) % 3 > 0).astype(np.float32)
    rollout = cma.Transition(
        obs=rng.normal(0, 1, (3, 30, 1, 2)).astype(np.float32),
        action=rng.normal(0, 1, (*shape, U)).astype(np.float32),
        reward=rng.normal(0, 1, shape).astype(np.float32),
        terminated=mask,
        done=mask,
        mask=mask,
        ended=mask,
        episodic_return=mask,
        episodic_length=mask,
        discounted_return=mask,
    )
    return args, network, learner, rollout


def test_minibatches_hold_decisions_of_all_remembered_iterations(cma):
    args, network, learner, transition = bandit(cma, history_size=3)
    update = jax.jit(partial(cma.update, network=network, args=args))
    for i in range(4):
        obs = transition.obs.copy()
        obs[:-1] = np.where(transition.mask > 0, i + 1, 0)[
            ..., None, None
        ]  # 0: must never be drawn
        learner, metrics = update(learner, transition._replace(obs=obs))
        assert all(np.isfinite(v) for k, v in metrics.items() if "charts" not in k)
    assert set(np.unique(learner.opt_state.history.obs[:, :40])) == {2.0, 3.0, 4.0}
    np.testing.assert_array_equal(learner.opt_state.counts, 40)
    last = learner._replace(iteration=learner.iteration - 1)  # as within the fourth update
    assert (
        len(cma.draw(jax.random.PRNGKey(0), last, 3, replace(args, batch_size=3000)).time) == 60
    )  # at most
    wide = replace(args, batch_size=3000, num_steps=100)
    scale = learner.obs_stats.scale
    drawn = np.asarray(cma.draw(jax.random.PRNGKey(0), last, 3, wide).obs / scale)[:, 0].round(3)
    counts = [np.sum(drawn == i) for i in (2.0, 3.0, 4.0)]
    assert sum(counts) == 3000 and min(counts) > 850
    newest = np.asarray(cma.draw(jax.random.PRNGKey(0), last, 1, wide).obs / scale)[:, 0].round(3)
    assert set(newest) == {4.0}


def test_update_is_a_plain_loop(cma):
    """One update against Python loops over the same minibatches, with Adam by hand."""
    args, network, learner, transition = bandit(cma)
    new, _ = jax.jit(partial(cma.update, network=network, args=args))(learner, transition)
    keys = jax.random.split(jax.random.fold_in(learner.key, 2 * learner.iteration + 1), 4)
    # as of the update: its history, statistics and critic, but the policy of before
    params = dict(learner.params["params"]) | {
        "critic": new.params["params"]["critic"],
        "warm": jnp.float32(1),
    }
    start = new._replace(params={"params": params}, iteration=learner.iteration)
    for key, part, loss, slots in (
        (keys[2], "std", cma.cma_std_loss, 9),
        (keys[3], "mean", cma.cma_mean_loss, 1),
    ):
        own = params[part]
        first = second = jax.tree.map(jnp.zeros_like, own)
        for i, step_key in enumerate(jax.random.split(key, args.num_updates), start=1):
            batch = cma.draw(step_key, start, slots, args)

            def loss_of_part(own, params=params, part=part, loss=loss, batch=batch):
                whole = {"params": params | {part: own}}
                return loss(whole, batch, start.schedule, network, args)

            grads = jax.grad(loss_of_part)(own)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)

            def adam(p, m, v, i=i):
                root = jnp.sqrt(v / (1 - 0.999**i)) + 1e-8
                return p - args.learning_rate * (m / (1 - 0.9**i)) / root

            own = jax.tree.map(adam, own, first, second)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
        jax.tree.map(close, own, new.params["params"][part])
        params = params | {part: own}


def test_advantages_are_scaled_not_centred(cma):
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (6, 4))
    mask = (rng.random((6, 4)) < 0.7).astype(float)
    with jax.enable_x64(True):
        for algorithm, kept in (("ppo-cma-m", x), ("ppo-cma", np.maximum(x, 0))):
            scaled = kept / kept[mask > 0].std()
            args = cma.Args(algorithm=algorithm)
            np.testing.assert_allclose(cma.scale_advantages(x, mask, args), scaled, rtol=1e-8)
            args = cma.Args(algorithm=algorithm, clip_advantage=0.5)
            clipped = np.clip(scaled, -0.5, 0.5)
            np.testing.assert_allclose(cma.scale_advantages(x, mask, args), clipped, rtol=1e-8)


def test_update_lowers_for_accelerators(cma):
    args, network, learner, transition = bandit(cma)
    update = jax.jit(partial(cma.update, network=network, args=args))
    lowered(update, (learner, transition))


def test_first_policy_and_first_weights(cma):
    """Weights of norm 1, and a network that regression has brought to the first Gaussian."""
    args = cma.Args(init_mean=-0.5, init_std=0.125, hidden_sizes=(32, 32))
    network = cma.ActorCritic(Box(-2, 2, (U,), np.float32), args)
    init = partial(cma.init_learner, obs=np.zeros(4, np.float32), network=network, args=args)
    learner = jax.jit(init)(np.uint32(1))
    kernel = learner.params["params"]["critic"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    assert (
        learner.params["params"]["critic"]["Dense_1"]["kernel"].shape[0] == 5 + 32
    )  # dense skips: input and layer
    states = np.random.default_rng(0).normal(0, 1, (50, 4)).astype(np.float32)
    for warm in (0.0, 1.0):
        params = {"params": learner.params["params"] | {"warm": warm}}
        policy, _ = network.apply(params, states)
        np.testing.assert_allclose(policy.mean, -1, atol=0.12 * warm + 1e-6)
        np.testing.assert_allclose(np.exp(policy.log_std), 0.25, atol=0.12 * warm + 1e-6)


def test_std_grows_far_from_the_optimum_and_shrinks_around_it():
    """The paper's point: PPO-CMA-m's variance grows while there is progress, PPO's only shrinks."""
    from cma_didactic import optimize, quadratic

    def stds(algorithm):  # but of the first actions, which are not yet the network's
        run = optimize(quadratic, algorithm, 16, hidden_sizes=(32, 32), init_updates=1000)
        return np.sqrt(np.trace(run["covariance"], axis1=1, axis2=2) / 2)[1:]

    cma_m = stds("ppo-cma-m")
    ppo = stds("ppo")
    assert cma_m.max() > 1.3 * cma_m[0]
    assert cma_m[-1] < 0.5 * cma_m[0]
    assert ppo.max() < 1.05 * ppo[0]


def test_full_covariance_follows_a_rotated_valley():
    from cma_didactic import optimize, valley

    small = {"hidden_sizes": (32, 32), "init_updates": 1000}
    full = optimize(valley, "ppo-cma-m", 16, covariance="full", **small)
    diagonal = optimize(valley, "ppo-cma-m", 16, **small)
    cost = {
        name: -valley(run["action"][-1]).mean()
        for name, run in (("full", full), ("diagonal", diagonal))
    }
    assert cost["full"] < 0.2 * cost["diagonal"]
    correlation = full["covariance"][8, 0, 1] / np.sqrt(np.prod(np.diagonal(full["covariance"][8])))
    assert correlation > 0.7


def test_agent_of_the_readme():
    """The README's loop, but shorter; what it memorized is what the agent learns from."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    code = next(x.split("```")[0] for x in blocks if "ppo_cma.Agent(" in x)
    short = code.replace("range(20)", "range(2)").replace("range(500)", "range(150)")
    assert short.count("range(2)") == short.count("range(150)") == 1
    names = {}
    exec(
        short.replace(
            "batch_size=512", "batch_size=64, num_updates=5, init_updates=20, capacity=1300"
        ),
        names,
    )
    agent = names["agent"]
    assert agent.learner.iteration == 2 and agent.memory == []
    np.testing.assert_array_equal(agent.learner.opt_state.counts[:3], [150, 150, 0])
    assert agent.learner.episodes >= 2  # 999 steps at most
    first = agent.act(names["obs"], deterministic=True)
    np.testing.assert_array_equal(first, agent.act(names["obs"], deterministic=True))
    assert first.shape == (1,) and abs(first[0]) <= 1
    for _ in range(1400):
        agent.memorize(names["obs"], first, 0.0, names["obs"], False, False)
    with pytest.raises(ValueError, match="capacity"):
        agent.update_with_memorized()
