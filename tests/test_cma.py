"""ppo_cma.py: its losses, decisions and variance, and what it shares with ppo_continuous.py."""

import sys
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from checks import lowered, schedule
from conftest import ROOT, mutate
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
    unread = dict.fromkeys(("episodic_return", "discounted_return"), np.zeros((T, N)))
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


def shown(cma, size):
    """Returns what environments show, with an observation of this many numbers."""
    return cma.TimeStep(np.zeros(size, np.float32), np.float32(0), False, False)


def small_learner(cma, **settings):
    """Returns arguments, a network and a new learner, of observations of two numbers."""
    small = {"batch_size": 16, "num_updates": 3, "init_updates": 5, "action_repeat": 1}
    small |= {"history_size": 3}
    args = cma.Args(**small | settings)
    network = cma.ActorCritic(Box(-2, 2, (U,), np.float32), args)
    init = partial(cma.init_learner, shown=shown(cma, 2), network=network, args=args)
    return args, network, jax.jit(init)(np.uint32(3))


def bandit(cma, **settings):
    """Returns these, and a rollout of one-step episodes; every third row is none."""
    args, network, learner = small_learner(cma, num_envs=30, num_steps=2, **settings)
    rng = np.random.default_rng(1)
    shape = (args.num_steps, args.num_envs)
    mask = (np.arange(60).reshape(shape) % 3 > 0).astype(np.float32)
    rollout = cma.Transition(
        obs=rng.normal(0, 1, (3, 30, 2)).astype(np.float32),
        action=rng.normal(0, 1, (*shape, U)).astype(np.float32),
        reward=rng.normal(0, 1, shape).astype(np.float32),
        terminated=mask,
        done=mask,
        mask=mask,
        episodic_return=mask,
        episodic_length=mask,
        discounted_return=mask,
    )
    return args, network, learner, rollout


def test_minibatches_hold_decisions_of_all_remembered_iterations(cma):
    args, network, learner, transition = bandit(cma)
    update = jax.jit(partial(cma.update, network=network, args=args))
    for i in range(4):
        obs = transition.obs.copy()
        seen = np.where(transition.mask > 0, i + 1, 0)  # 0: must never be drawn
        obs[:-1] = seen[..., None]
        learner, metrics = update(learner, transition._replace(obs=obs))
        assert not any(up for name, up in metrics.items() if name.startswith("bad/"))
    assert set(np.unique(learner.opt_state.history.obs[:, :40])) == {2.0, 3.0, 4.0}
    np.testing.assert_array_equal(learner.opt_state.counts, 40)
    last = learner._replace(iteration=learner.iteration - 1)  # as within the fourth update
    many = args.model_copy(update={"batch_size": 3000})
    assert len(cma.draw(jax.random.PRNGKey(0), last, 3, many).time) == 60  # at most
    wide = many.model_copy(update={"num_steps": 100})
    scale = learner.obs_stats.scale
    drawn = np.asarray(cma.draw(jax.random.PRNGKey(0), last, 3, wide).obs / scale)[:, 0].round(3)
    counts = [np.sum(drawn == i) for i in (2.0, 3.0, 4.0)]
    assert sum(counts) == 3000 and min(counts) > 850
    newest = np.asarray(cma.draw(jax.random.PRNGKey(0), last, 1, wide).obs / scale)[:, 0].round(3)
    assert set(newest) == {4.0}


def test_update_is_a_plain_loop(cma):
    """A second update against Python loops over the same minibatches, with Adam by hand."""
    args, network, learner, transition = bandit(cma)
    update = jax.jit(partial(cma.update, network=network, args=args))
    learner, _ = update(learner, transition)
    learner = learner._replace(params=moved(learner.params))
    rewards = np.random.default_rng(2).normal(0, 1, transition.reward.shape)
    new, _ = update(learner, transition._replace(reward=rewards.astype(np.float32)))
    keys = jax.random.split(jax.random.fold_in(learner.key, 2 * learner.iteration + 1), 4)
    # as of the update: its history, statistics and critic, but the policy of before
    critic = new.params["params"]["critic"]
    params = learner.params["params"] | {"critic": critic, "warm": jnp.float32(1)}
    start = new._replace(params={"params": params}, iteration=learner.iteration)
    for key, part, loss, slots in (
        (keys[2], "std", cma.cma_std_loss, 3),
        (keys[3], "mean", cma.cma_mean_loss, 1),
    ):
        own = params[part]
        adam = learner.opt_state.adam[part]
        first, second = adam.mu, adam.nu

        def loss_of_part(own, batch, params=params, part=part, loss=loss):
            whole = {"params": params | {part: own}}
            return loss(whole, batch, start.schedule, network, args)

        gradient = jax.jit(jax.grad(loss_of_part))
        for i, step_key in enumerate(jax.random.split(key, args.num_updates), start=1):
            grads = gradient(own, cma.draw(step_key, start, slots, args))
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)

            def step(p, m, v, i=args.num_updates + i):
                root = jnp.sqrt(v / (1 - 0.999**i)) + 1e-8
                return p - args.learning_rate * (m / (1 - 0.9**i)) / root

            own = jax.tree.map(step, own, first, second)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
        jax.tree.map(close, own, new.params["params"][part])
        params = params | {part: own}


def moved(params, size=0.02):
    """Returns parameters a little off, so that no gradient is that of a perfect fit."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + np.float32(size * rng.normal(size=x.shape)), params)


def several_steps(cma, **settings):
    """Returns arguments, a network, a learner and a rollout of episodes of several steps."""
    args, network, learner = small_learner(cma, num_envs=3, num_steps=41, **settings)
    rng = np.random.default_rng(4)
    steps = scripted_steps(rng)
    unread = np.zeros((41, 3))
    rollout = cma.Transition(
        obs=rng.normal(0, 1, (42, 3, 2)),
        action=rng.normal(0, 2, (41, 3, U)),
        episodic_return=unread,
        discounted_return=unread,
        **steps,
    )
    return args, network, learner, jax.tree.map(np.float32, rollout)


def test_history_holds_returns_of_the_old_and_advantages_of_the_new_critic(cma):
    args, network, learner, t = several_steps(cma, history_size=2, gamma=0.9, gae_lambda=0.5)
    learner = learner._replace(params=moved(learner.params, 0.1))
    new, _ = jax.jit(partial(cma.update, network=network, args=args))(learner, t)
    obs = t.obs * np.asarray(new.obs_stats.scale)
    time = np.concatenate([np.maximum(t.episodic_length[:1] - 1, 0), t.episodic_length])
    old = {"params": learner.params["params"] | {"warm": 1.0}}
    policy, value = network.apply(old, obs, time)
    assert np.ptp(value - network.apply(old, obs)[1]) > 1e-5  # only the critic sees the time
    _, new_value = network.apply(new.params, obs, time)
    ends = (t.reward, t.terminated, t.done)
    target = reference.gae(*ends, np.asarray(value), 0.9, 1.0) + value[:-1]
    advantage = reference.gae(*ends, np.asarray(new_value), 0.9, 0.5)
    kept = t.mask > 0
    action = np.clip(t.action, -2, 2)
    expected = {
        "obs": t.obs[:-1][kept],
        "time": time[:-1][kept],
        "action": action[kept],
        "advantage": advantage[kept] / advantage[kept].std(),
        "target": np.asarray(target)[kept],
        "mean": policy.mean[:-1][kept],
        "log_prob": cma.log_prob(policy, np.pad(action, ((0, 1), (0, 0), (0, 0))))[:-1][kept],
    }
    rows = kept.sum()
    assert new.opt_state.counts[0] == rows and new.opt_state.counts[1] == 0
    for name, x in expected.items():
        found = getattr(new.opt_state.history, name)[0, :rows]
        np.testing.assert_allclose(found, x, rtol=2e-4, atol=2e-4, err_msg=name)


def test_critic_is_centred_on_its_first_minibatch_only(cma):
    args, network, learner, transition = bandit(cma, learning_rate=1e-30)
    update = jax.jit(partial(cma.update, network=network, args=args))
    first, _ = update(learner, transition)
    key = jax.random.split(jax.random.fold_in(learner.key, 1), 4)[0]
    last = first._replace(iteration=learner.iteration)  # as within the update
    batch = cma.draw(key, last, 1, args)
    x = np.concatenate([batch.obs, args.time_scale * batch.time[:, None]], axis=1)
    critic = first.params["params"]["critic"]
    centred = x @ np.asarray(critic["Dense_0"]["kernel"]) + np.asarray(critic["bias_0"])
    np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-6)
    second, _ = update(first, transition._replace(obs=2 * transition.obs))
    jax.tree.map(np.testing.assert_array_equal, second.params["params"]["critic"], critic)


def test_a_decision_is_held_but_not_into_a_new_episode(cma):
    """The reward says which action was taken: that of the steps 0, 7 and 14 of an episode."""
    task = {"env_id": "scripted:Counter-v0", "env_kwargs": '{"length": 16}'}
    args = cma.Args(num_envs=2, num_steps=40, action_repeat=7, init_updates=0, **task)
    run = cma.make_run(args)
    _, t = run.act(cma.first_runner(run), run.init())
    step = np.arange(40)
    decided = step // 17 * 17 + step % 17 // 7 * 7
    taken = np.clip(t.action[0, decided, :, 0], -1, 1)
    reward = np.where(step % 17 == 16, 0, 1 - np.square(taken.T - 0.5)).T
    np.testing.assert_allclose(t.reward[0], reward, rtol=1e-5, atol=1e-5)


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
    init = partial(cma.init_learner, shown=shown(cma, 4), network=network, args=args)
    learner = jax.jit(init)(np.uint32(1))
    kernel = learner.params["params"]["critic"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    kernel = learner.params["params"]["critic"]["Dense_1"]["kernel"]
    assert kernel.shape == (5 + 32, 32)  # dense skips: input and layer
    states = np.random.default_rng(0).normal(0, 1, (50, 4)).astype(np.float32)
    for warm in (0.0, 1.0):
        params = {"params": learner.params["params"] | {"warm": warm}}
        policy, _ = network.apply(params, states)
        np.testing.assert_allclose(policy.mean, -1, atol=0.12 * warm + 1e-6)
        np.testing.assert_allclose(np.exp(policy.log_std), 0.25, atol=0.12 * warm + 1e-6)


@pytest.mark.slow
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


@pytest.mark.slow
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
    """The loop of benchmarks' README, but shorter; it learns from what it memorized."""
    blocks = (ROOT / "benchmarks/README.md").read_text().split("```python\n")[1:]
    code = next(x.split("```")[0] for x in blocks if "ppo_cma.Agent(" in x)
    short = code.replace("range(20)", "range(2)").replace("range(500)", "range(150)")
    assert short.count("range(2)") == short.count("range(150)") == 1
    names = {}
    exec(
        short.replace(
            "batch_size=512", "batch_size=64, num_updates=5, init_updates=20, capacity=170"
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
    for _ in range(171):
        agent.memorize(names["obs"], first, 0.0, names["obs"], False, False)
    with pytest.raises(ValueError, match="capacity"):
        agent.update_with_memorized()


def test_an_episode_goes_on_over_an_agents_updates(cma):
    """The critic knows how long it has lasted, although the rows that fill up the memory do not."""
    space = Box(-1, 1, (1,), np.float32)
    small = {"num_updates": 2, "init_updates": 2, "hidden_sizes": (4,)}
    agent = cma.Agent(space, space, capacity=9, **small)
    agent.init()
    obs = np.zeros(1, np.float32)
    for ends in ([False] * 3, [False, True, False], [False] * 2):
        for end in ends:
            agent.memorize(obs, obs, 0.0, obs, end, False)
        agent.update_with_memorized()
    time = agent.learner.opt_state.history.time
    for i, expected in enumerate(([0, 1, 2], [3, 4, 0], [1, 2])):
        np.testing.assert_array_equal(time[i, : len(expected)], expected)


def test_an_agent_of_a_run_that_was_distributed(cma, tmp_path):
    """It works alone; a seed that is not the run's is refused."""
    small = {"num_steps": 40, "batch_size": 8, "num_updates": 2, "init_updates": 2}
    task = {"env_id": "Pendulum-v1", "hidden_sizes": (4,), "num_envs": 2, "seed": 7}
    args = cma.Args(run_dir=str(tmp_path), **small, **task)
    learner = jax.device_get(cma.make_run(args).init())
    (tmp_path / "checkpoints").mkdir()
    state = cma.Checkpoint(learner, None, np.zeros(3), 0.0)
    cma.write_checkpoint(tmp_path / "checkpoints/0000000001.npz", state)
    given = args.model_copy(update={"distributed": True, "vectorization": "async"})
    (tmp_path / "args.json").write_text(given.model_dump_json())
    agent = cma.Agent.from_run(tmp_path, seed=7)
    obs = np.zeros(3, np.float32)
    agent.memorize(obs, agent.act(obs), 1.0, obs, True, False)
    assert agent.update_with_memorized() == 1
    for seed in (6, 8):
        with pytest.raises(cma.InputError, match=rf"has no {{'seed': {seed}}}, but"):
            cma.Agent.from_run(tmp_path, seed=seed)


def test_an_entropy_bonus_that_nothing_reads_is_refused(cma):
    assert cma.Args(algorithm="pg-pos", ent_coef=0.1).ent_coef == 0.1
    with pytest.raises(ValueError, match="--ent-coef"):
        cma.Args(algorithm="ppo-cma", ent_coef=0.1)


# --- Mutants: (the test that must turn red, a text of the script, what a slip would make of it) ---
MUTANTS = [
    (test_distribution, "lower=True, unit_diagonal=True", "lower=True"),
    (test_distribution, "- policy.log_std - 0.5 * LOG_2_PI", "- 0.5 * LOG_2_PI"),
    (test_losses, "-jnp.mean(nn.relu(batch.advantage)", "-jnp.mean(batch.advantage"),
    (test_losses, "around_old = policy._replace(mean=batch.mean)", "around_old = policy"),
    (test_losses, "2 * batch.mean - batch.action", "batch.action"),
    (test_losses, "loss -= nn.relu(-batch.advantage)", "loss += nn.relu(-batch.advantage)"),
    (test_losses, "nn.relu(-batch.advantage) * kernel", "nn.relu(-batch.advantage)"),
    (test_losses, "error - 0.25)", "error)"),
    (test_losses, "squares = jnp.mean(squares, axis=-1, keepdims=True)", "pass"),
    (
        test_ppo_mode_is_ppo_continuous,
        "jnp.maximum(-batch.advantage",
        "jnp.minimum(-batch.advantage",
    ),
    (test_ppo_mode_is_ppo_continuous, "jnp.clip(ratio, 1 - clip_coef", "jnp.clip(ratio, 1"),
    (test_ppo_mode_is_ppo_continuous, "- schedule.ent_coef *", "+ schedule.ent_coef *"),
    (
        test_decisions_and_their_advantages,
        "(rollout.episodic_length - 1) %",
        "rollout.episodic_length %",
    ),
    (test_decisions_and_their_advantages, "argsort(~holds", "argsort(holds"),
    (
        test_decisions_and_their_advantages,
        "mask=reorder(mask * (phase == 0))",
        "mask=reorder(mask)",
    ),
    (test_decisions_and_their_advantages, "keep_last(before) / repeat", "keep_last(before)"),
    (
        test_an_episode_goes_on_over_an_agents_updates,
        "jnp.where(mask > 0, lengths - 1, earlier)",
        "earlier",
    ),
    (
        test_decisions_and_their_advantages,
        "next_value * (1 - terminated)",
        "next_value * (1 - done)",
    ),
    (test_decisions_and_their_advantages, "* (1 - done) * next_advantage", "* next_advantage"),
    (
        test_scaler_is_the_mean_over_iterations_and_never_grows,
        "jnp.minimum(scaler.scale, scale)",
        "scale",
    ),
    (test_scaler_is_the_mean_over_iterations_and_never_grows, "change / count", "change"),
    (
        test_minibatches_hold_decisions_of_all_remembered_iterations,
        "jnp.minimum(slots, ",
        "jnp.maximum(slots, ",
    ),
    (
        test_minibatches_hold_decisions_of_all_remembered_iterations,
        "learner.opt_state.counts[slot]",
        "args.rollout_size",
    ),
    (
        test_minibatches_hold_decisions_of_all_remembered_iterations,
        "mask.ravel() == 0",
        "mask.ravel() != 0",
    ),
    (test_update_is_a_plain_loop, 'if part == "std" else 1', 'if part == "mean" else 1'),
    (
        test_update_is_a_plain_loop,
        "adam=learner.opt_state.adam | {part: adam}",
        "adam=learner.opt_state.adam",
    ),
    (test_update_is_a_plain_loop, '"warm", jnp.ones(())', '"warm", jnp.zeros(())'),
    (
        test_update_is_a_plain_loop,
        'fit(learner, mean_key, "mean", cma_mean',
        'fit(learner, std_key, "mean", cma_mean',
    ),
    (test_advantages_are_scaled_not_centred, 'in ("ppo-cma", "pg-pos")', 'in ("pg-pos",)'),
    (
        test_first_policy_and_first_weights,
        "jnp.linalg.norm(weights, axis=0)",
        "jnp.linalg.norm(weights)",
    ),
    (test_first_policy_and_first_weights, "policy.mean - goal.mean", "policy.mean"),
    (
        test_history_holds_returns_of_the_old_and_advantages_of_the_new_critic,
        "schedule.gamma, 1.0)",
        "schedule.gamma, 0.5)",
    ),
    (
        test_history_holds_returns_of_the_old_and_advantages_of_the_new_critic,
        "compute_gae(decisions, new_value",
        "compute_gae(decisions, value",
    ),
    (
        test_history_holds_returns_of_the_old_and_advantages_of_the_new_critic,
        "args.time_scale * time[..., None]",
        "0 * time[..., None]",
    ),
    (
        test_history_holds_returns_of_the_old_and_advantages_of_the_new_critic,
        "log_prob=log_prob(policy, action)",
        "log_prob=log_prob(policy, decisions.action)",
    ),
    (
        test_critic_is_centred_on_its_first_minibatch_only,
        "learner.iteration == 0",
        "learner.iteration >= 0",
    ),
    (
        test_a_decision_is_held_but_not_into_a_new_episode,
        "jnp.where(decides, action, held.action)",
        "action",
    ),
    (
        test_a_decision_is_held_but_not_into_a_new_episode,
        "new.truncated, -1, held.count",
        "new.truncated, held.count, held.count",
    ),
]


@pytest.mark.parametrize(
    ("test", "text", "slip"), MUTANTS, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
def test_mutant_is_killed(ppo, test, text, slip):
    """Every case of a test is run on the mutant; one is enough."""
    mutant = mutate("ppo_cma", text, slip)
    more = {
        test_distribution: [(False,), (True,)],
        test_losses: [(False,), (True,)],
        test_decisions_and_their_advantages: [(1,), (3,)],
        test_ppo_mode_is_ppo_continuous: [(ppo,)],
    }
    with pytest.raises(AssertionError):
        for case in more.get(test, [()]):
            test(mutant, *case)
