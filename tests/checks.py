"""The formulas of a script, or of a mutant of it, against tests/reference.py, in float64."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import reference
from gymnasium.spaces import Box

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
T, N, D, U = 16, 4, 3, 2
SPACE = Box(-1, 1, (U,), np.float32)


def flags(rng, shape):
    """Returns random terminated, done and mask, as with next-step resets."""
    terminated = np.zeros(shape)
    done = np.zeros(shape)
    mask = np.ones(shape)
    for n in range(shape[1]):
        for t in range(shape[0]):
            if t and done[t - 1, n]:
                mask[t, n] = 0  # the reset step: never an end
            elif rng.random() < 0.3:
                done[t, n] = 1
                terminated[t, n] = rng.random() < 0.5
    return terminated, done, mask


def rollout(rng, shape=(T, N)):
    """Returns a random rollout as a dict of float64 arrays."""
    terminated, done, mask = flags(rng, shape)
    return {
        "obs": rng.normal(1, 2, (shape[0] + 1, shape[1], D)),
        "action": rng.normal(0, 1, (*shape, U)),
        "reward": rng.normal(0.5, 2, shape),
        "terminated": terminated,
        "done": done,
        "mask": mask,
        "episodic_return": rng.normal(0, 5, shape),
        "episodic_length": rng.normal(0, 5, shape),
        "discounted_return": rng.normal(0, 5, shape),
    }


def check_gae(ppo):
    rng = np.random.default_rng(0)
    for _ in range(3):
        r = rollout(rng)
        value = rng.normal(0, 1, (T + 1, N))
        t = SimpleNamespace(**r)
        with jax.enable_x64(True):
            advantage, target = jax.jit(
                lambda t, v: ppo.compute_gae(SimpleNamespace(**t), v, 0.9, 0.8)
            )(vars(t), value)
        expected = reference.gae(r["reward"], r["terminated"], r["done"], value, 0.9, 0.8)
        np.testing.assert_allclose(advantage, expected, **CLOSE)
        np.testing.assert_allclose(target, expected + value[:-1], **CLOSE)


def check_gae_by_hand(ppo):
    """gamma = lambda = 1/2; environment 0 terminates at step 1, environment 1 is truncated there.

    Both reset at step 2. Step 1: deltas 2 - 1 = 1 (no bootstrap) and 2 + 4/2 - 1 = 3.
    Step 0: 1 + 1/2 - 1 + A_1/4 = 3/4 and 5/4.
    """

    def both(*x):
        return np.array([x, x], float).T

    t = SimpleNamespace(
        reward=both(1, 2, 0),
        terminated=np.array([[0, 0], [1, 0], [0, 0]], float),
        done=both(0, 1, 0),
        mask=both(1, 1, 0),
    )
    with jax.enable_x64(True):
        advantage, target = ppo.compute_gae(t, both(1, 1, 4, 9), 0.5, 0.5)
    np.testing.assert_allclose(advantage[:2], [[0.75, 1.25], [1, 3]], **CLOSE)
    np.testing.assert_allclose(target[:2], [[1.75, 2.25], [2, 4]], **CLOSE)


def check_stats(ppo):
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, (5, T, N, D))
    mask = (rng.random((5, T, N)) < 0.7).astype(float)
    with jax.enable_x64(True):
        stats = ppo.RunningStats(np.zeros(D), np.ones(D), np.array(0.0))
        for one, m in zip(x, mask, strict=True):
            stats = ppo.update_stats(one, stats, m)
        np.testing.assert_allclose(stats.mean, x[mask > 0].mean(axis=0), **CLOSE)
        np.testing.assert_allclose(stats.var, x[mask > 0].var(axis=0), **CLOSE)
        assert stats.count == mask.sum()
        same = ppo.update_stats(x[0], stats, 0 * mask[0])  # nothing new
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), same, stats)
        scaled = (x[0] - stats.mean) / np.sqrt(np.asarray(stats.var) + 1e-8)
        np.testing.assert_allclose(
            ppo.normalize(x[0], stats, 1.5), np.clip(scaled, -1.5, 1.5), **CLOSE
        )


def check_distribution(ppo):
    rng = np.random.default_rng(2)
    mean, log_std, action, mean2, log_std2 = rng.normal(0, 1, (5, 6, U))
    with jax.enable_x64(True):
        old = ppo.Gaussian(mean, log_std)
        new = ppo.Gaussian(mean2, log_std2)
        expected = [reference.log_prob(*row) for row in zip(mean, log_std, action, strict=True)]
        np.testing.assert_allclose(ppo.log_prob(old, action), expected, **CLOSE)
        np.testing.assert_allclose(
            ppo.entropy(old), [reference.entropy(x) for x in log_std], **CLOSE
        )
        expected = [reference.kl(*row) for row in zip(mean, log_std, mean2, log_std2, strict=True)]
        np.testing.assert_allclose(ppo.kl(old, new), expected, **CLOSE)
        noise = rng.normal(0, 1, (6, U))
        np.testing.assert_allclose(
            ppo.sample_action(old, noise), mean + np.exp(log_std) * noise, **CLOSE
        )
    # the reference itself, against integrals: entropy -E[log p], KL E[log p - log q]
    one = [[0.3], [-0.4], [1.1], [0.2]]
    density = np.vectorize(lambda x: reference.log_prob(one[0], one[1], [x]))
    other = np.vectorize(lambda x: reference.log_prob(one[2], one[3], [x]))
    h = reference.entropy(one[1])
    d = reference.kl(*one)

    def integral(f):
        return reference.expectation(0.3, -0.4, lambda x: f(np.clip(x, -20, 20)))

    np.testing.assert_allclose(integral(lambda x: -density(x)), h, rtol=1e-8)
    np.testing.assert_allclose(integral(lambda x: density(x) - other(x)), d, rtol=1e-8)


class Direct:
    """A network whose parameters are its outputs, so that the loss alone is tested."""

    def __init__(self, ppo):
        self.ppo = ppo

    def apply(self, params, obs):
        mean, log_std, value = params
        return self.ppo.Gaussian(mean, jnp.broadcast_to(log_std, mean.shape)), value


def loss_case(rng, B=24):
    mean = rng.normal(0, 1, (B, U))
    log_std = rng.normal(0, 0.3, U)
    value = rng.normal(0, 1, B)
    batch = {
        "action": rng.normal(0, 1, (B, U)),
        "old_mean": mean + rng.normal(0, 0.3, (B, U)),
        "old_log_std": np.tile(log_std + rng.normal(0, 0.1, U), (B, 1)),
        "value": value + rng.normal(0, 0.3, B),
        "advantage": rng.normal(0, 1, B),
        "target": rng.normal(0, 1, B),
        "mask": (rng.random(B) < 0.75).astype(float),
    }
    rows = zip(batch["old_mean"], batch["old_log_std"], batch["action"], strict=True)
    batch["log_prob"] = np.array([reference.log_prob(*row) for row in rows])
    return (mean, log_std, value), batch


SETTINGS = {"clip_coef": 0.2, "ent_coef": 0.03, "vf_coef": 0.7, "kl_coef": 1.7}
VARIANTS = [
    {"objective": "clip", "clip_vloss": True},
    {"objective": "clip", "clip_vloss": False},
    {"objective": "none", "clip_vloss": False},
    {"objective": "kl-penalty", "clip_vloss": True},
]


def schedule(ppo, **settings):
    """Returns a script's schedule in float64, with 0 for what is not given."""
    numbers = dict.fromkeys(ppo.Schedule._fields, 0.0) | settings
    return ppo.Schedule(**{name: np.float64(x) for name, x in numbers.items()})


def as_batch(ppo, b):
    """Returns a loss case as the script's minibatch; its mask is a weight of mean 1."""
    return ppo.Batch(
        obs=None,
        action=b["action"],
        policy=ppo.Gaussian(b["old_mean"], b["old_log_std"]),
        log_prob=b["log_prob"],
        value=b["value"],
        advantage=b["advantage"],
        target=b["target"],
        mask=b["mask"] / b["mask"].mean(),
    )


def check_loss(ppo):
    """Value, metrics and gradient of every variant; the gradient also by central differences."""
    rng = np.random.default_rng(3)
    for variant in VARIANTS:
        s = SETTINGS | variant
        params, b = loss_case(rng)
        args = ppo.Args(**variant)
        with jax.enable_x64(True):
            value_and_grad = jax.value_and_grad(ppo.ppo_loss, has_aux=True)
            numbers = schedule(ppo, **SETTINGS)
            found = value_and_grad(params, as_batch(ppo, b), numbers, Direct(ppo), args)
        (loss, metrics), grad = found
        expected, seen, by_hand = reference.loss(params[:2], params[2], b, s)
        np.testing.assert_allclose(loss, expected, **CLOSE)
        for name, value in seen.items():
            np.testing.assert_allclose(metrics[name], value, **CLOSE, err_msg=name)
        for i, (g, h) in enumerate(zip(grad, by_hand, strict=True)):
            np.testing.assert_allclose(g, h, **CLOSE)
            for index in list(np.ndindex(g.shape))[
                ::5
            ]:  # every fifth element by central differences
                ends = []
                for sign in (1, -1):
                    moved = [np.array(p) for p in params]
                    moved[i][index] += sign * 1e-6
                    ends.append(reference.loss(moved[:2], moved[2], b, s)[0])
                np.testing.assert_allclose(
                    g[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8
                )


def check_kl_barrier(ppo):
    """Heess et al.'s barrier: the gradient is that of kl_barrier * max(0, KL - 2 desired)^2."""
    rng = np.random.default_rng(5)
    params, b = loss_case(rng)
    real = b["mask"] > 0

    def penalty(mean):
        rows = zip(b["old_mean"], b["old_log_std"], mean, strict=True)
        divergence = [reference.kl(*row, params[1]) for row in rows]
        excess = np.mean(np.array(divergence)[real]) - 2 * 0.01
        return 30 * max(0.0, excess) ** 2

    assert penalty(params[0]) > 0.01
    args = ppo.Args(objective="kl-penalty", kl_barrier=30)
    batch = as_batch(ppo, b)
    grads = []
    with jax.enable_x64(True):
        for coefficient in (0.0, ppo.kl_barrier(params, batch, Direct(ppo), args)):
            numbers = schedule(ppo, **SETTINGS | {"kl_coef": coefficient})
            loss = jax.grad(ppo.ppo_loss, has_aux=True)
            grads.append(loss(params, batch, numbers, Direct(ppo), args)[0][0])
    for index in [(0, 0), (3, 1), (7, 0)]:
        moved = [np.array(params[0]), np.array(params[0])]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        expected = (penalty(moved[0]) - penalty(moved[1])) / 2e-6
        found = grads[1][index] - grads[0][index]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def check_l2(ppo):
    """Half the sum of squares of the weights, none of biases and of log_std."""
    params, b = loss_case(np.random.default_rng(6))
    losses = []
    with jax.enable_x64(True):
        for weight in (0.0, 0.1):
            numbers = schedule(ppo, **SETTINGS)
            args = ppo.Args(l2_coef=weight)
            losses.append(ppo.ppo_loss(params, as_batch(ppo, b), numbers, Direct(ppo), args)[0])
    matrix = params[0]  # of Direct's parameters, the only one with two axes
    np.testing.assert_allclose(losses[1] - losses[0], 0.05 * np.sum(matrix**2), **CLOSE)


def small_args(ppo, **changes):
    """Returns settings for updates of T x N steps; of these, those that the script has."""
    settings = {
        "num_envs": N,
        "num_steps": T,
        "num_minibatches": 4,
        "update_epochs": 2,
        "hidden_sizes": (5, 4),
        "critic_sizes": (6, 3, 4),
        "total_timesteps": 10 * N * T,
        "clip_obs": 1.5,
        "clip_reward": 0.4,
        "max_grad_norm": 0.3,
        "ent_coef": 0.03,
        "gamma": 0.9,
        "gae_lambda": 0.8,
        "learning_rate": 1e-2,
        "recompute_advantages": False,
        "norm_adv": True,
        "clip_vloss": True,
        "vf_coef": 0.5,
        "log_std_init": 0.0,
    }
    known = {name: x for name, x in settings.items() if name in ppo.Args.model_fields}
    return ppo.Args(**known | changes)


def to_double(x):
    return x.astype(jnp.float64) if x.dtype == jnp.float32 else x


def to_single(x):
    return np.asarray(x, np.float32 if x.dtype == np.float64 else x.dtype)


def new_learner(ppo, seed, obs_size, network, args):
    """Returns a learner for environments that show so many numbers."""
    shown = ppo.TimeStep(np.zeros(obs_size, np.float32), np.float32(0), False, False)
    init = partial(ppo.init_learner, shown=shown, network=network, args=args)
    return jax.jit(init)(np.uint32(seed))


def start(ppo, args):
    """Returns the network, a float64 learner with grown-up statistics, and a rollout, twice.

    The rollout is once of the script's type and once a dict.
    """
    network = ppo.ActorCritic(SPACE, args)
    rng = np.random.default_rng(4)
    r = rollout(rng)
    with jax.enable_x64(True):
        learner = new_learner(ppo, 3, D, network, args)
        learner = jax.tree.map(to_double, learner)
        moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(0, 1, x.shape), learner.params)
        learner = learner._replace(
            params=moved,
            iteration=jnp.int32(3),
            obs_stats=ppo.RunningStats(rng.normal(0, 1, D), rng.uniform(1, 2, D), np.float64(50)),
            return_stats=ppo.RunningStats(np.float64(0.3), np.float64(2), np.float64(50)),
        )
        transition = ppo.Transition(**{name: jnp.asarray(x) for name, x in r.items()})
    return network, learner, transition, r


def layers(tree, name):
    """Returns a network's layers, each as (kernel, bias)."""
    names = [f"{name}_{i}" for i in range(len(tree)) if f"{name}_{i}" in tree]
    return [tuple(np.asarray(tree[x][k]) for k in ("kernel", "bias")) for x in names]


def orders(learner, args):
    """Returns the minibatches' indices [E, M, B], from the learner's key."""
    key = jax.random.fold_in(learner.key, 2 * learner.iteration + 1)
    keys = jax.random.split(key, args.update_epochs)
    return [shuffled(key, N * T).reshape(args.num_minibatches, -1) for key in keys]


def shuffled(key, rows):
    """Returns the numbers below `rows`, a power of two, sorted by a key's random bits."""
    bits = np.asarray(jax.random.bits(key, (rows,), jnp.uint32)) // rows
    return np.argsort(bits, kind="stable")


def check_update(ppo):
    """A whole update in float64 against plain NumPy loops with backpropagation by hand."""
    for changes in (
        {},
        {"recompute_advantages": True, "anneal_lr": False},
        {"norm_adv": False, "clip_vloss": False},
        {"objective": "kl-penalty", "anneal_clip": True, "kl_barrier": 30, "desired_kl": 1e-3},
    ):
        args = small_args(ppo, **changes)
        network, learner, transition, r = start(ppo, args)
        p = learner.params["params"]
        nets = layers(p, "mean"), np.asarray(p["log_std"]), layers(p, "critic")
        stats = {
            "obs": tuple(map(np.asarray, learner.obs_stats)),
            "ret": tuple(map(np.asarray, learner.return_stats)),
        }
        s = dict(args) | {name: float(x) for name, x in learner.schedule._asdict().items()}
        left = 1 - 3 / args.num_iterations
        for on, name in (
            (args.anneal_lr, "learning_rate"),
            (args.anneal_clip, "clip_coef"),
        ):
            s[name] *= left if on else 1
        with jax.enable_x64(True):
            compiled = jax.jit(partial(ppo.update, network=network, args=args))
            new, metrics = jax.tree.map(np.asarray, compiled(learner, transition))
            expected = reference.update(nets, r, stats, orders(learner, args), s)
        (actor, log_std, critic), new_stats, seen = expected
        compare_update(new, metrics, (actor, log_std, critic), new_stats, seen)
        compare_episodes(new, metrics, r)


def compare_update(new, metrics, nets, new_stats, seen):
    """The script's learner and metrics against the reference's."""
    actor, log_std, critic = nets
    p = new.params["params"]
    close = {"rtol": 1e-11, "atol": 1e-11}
    for mine, theirs in zip(layers(p, "mean") + layers(p, "critic"), actor + critic, strict=True):
        np.testing.assert_allclose(mine[0], theirs[0], **close)
        np.testing.assert_allclose(mine[1], theirs[1], **close)
    np.testing.assert_allclose(p["log_std"], log_std, **close)
    for mine, theirs in ((new.obs_stats, new_stats["obs"]), (new.return_stats, new_stats["ret"])):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, **close)
    for name, value in seen.items():
        np.testing.assert_allclose(metrics[f"losses/{name}"], value, **close, err_msg=name)
    assert new.iteration == 4


def compare_episodes(new, metrics, r):
    """What is counted of the episodes that ended, time first, as in the rollout."""
    ended = r["done"] * r["mask"] > 0
    returns = r["episodic_return"][ended]
    lengths = r["episodic_length"][ended]
    assert new.episodes == len(returns)
    np.testing.assert_allclose(new.returns[-len(returns) :], returns, **CLOSE)
    assert np.all(new.returns[: -len(returns)] == -np.inf)
    np.testing.assert_allclose(metrics["charts/episodic_length"], lengths.mean(), **CLOSE)
    np.testing.assert_allclose(metrics["charts/episodic_return"], returns.mean(), **CLOSE)
    np.testing.assert_allclose(metrics["charts/episodic_return_100"], returns.mean(), **CLOSE)


def check_last_100(ppo):
    """The last hundred returns, whatever the number of episodes so far."""
    args = small_args(ppo)
    _, learner, transition, _ = start(ppo, args)
    seen = []
    with jax.enable_x64(True):
        count = jax.jit(ppo.count_episodes)
        for i in range(20):
            returns = 1000.0 * i + np.arange(T * N).reshape(T, N)
            learner, metrics = count(learner, transition._replace(episodic_return=returns))
            seen += returns[transition.done * transition.mask > 0].tolist()
            last = seen[-100:]
            np.testing.assert_array_equal(learner.returns[-len(last) :], last)
            np.testing.assert_allclose(metrics["charts/episodic_return_100"], np.mean(last))
            assert learner.episodes == len(seen)
    assert len(seen) > 150


def check_env_step(ppo):
    """Masks, episode sums and the observations' order, on scripted next-step resets."""
    settings = {"num_envs": 1, "num_steps": 8, "num_minibatches": 1}
    args = small_args(ppo, norm_obs=False, clip_obs=np.inf, **settings)

    def step(state, action):  # counts to 3, terminates, resets; the second episode is truncated
        n, episode = state
        ended = n == 3
        n = jnp.where(ended, 0, n + 1)
        episode = episode + ended
        end = n == 3
        new = ppo.TimeStep(
            obs=jnp.stack([n, episode]).astype(jnp.float32)[None, None],
            reward=jnp.where(ended, 0.0, 10.0 * n)[None, None].astype(jnp.float32),
            terminated=(end & (episode % 2 == 0))[None, None],
            truncated=(end & (episode % 2 == 1))[None, None],
        )
        return (n, episode), new

    none = jnp.zeros((1, 1), bool)
    first = ppo.TimeStep(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1)), none, none)
    parts = dict.fromkeys(ppo.Environment._fields)
    parts |= {"first": ((0, 0), first), "step": step, "action_space": SPACE}
    env = ppo.Environment(**parts)
    runner = ppo.first_runner(SimpleNamespace(env=env))
    network = ppo.ActorCritic(SPACE, args)
    learner = new_learner(ppo, 0, 2, network, args)
    learner = jax.tree.map(lambda x: x[None], learner)
    act = jax.jit(partial(ppo.rollout, first_env=0, env=env, network=network, args=args))
    _, t = act(runner, learner)
    t = jax.tree.map(lambda x: np.asarray(x[0, :, 0]), t)
    np.testing.assert_array_equal(t.obs[:, 0], [0, 1, 2, 3, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(t.reward, [10, 20, 30, 0, 10, 20, 30, 0])
    np.testing.assert_array_equal(t.mask, [1, 1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(t.terminated, [0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(t.done, [0, 0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(t.episodic_return, [10, 30, 60, 0, 10, 30, 60, 0])
    np.testing.assert_array_equal(t.episodic_length, [1, 2, 3, 0, 1, 2, 3, 0])
    discounted = [10, 29, 56.1, 0, 10, 29, 56.1, 0]
    np.testing.assert_allclose(t.discounted_return, discounted, rtol=1e-6)
    # the action is what the policy's mean and the keyed noise make of the observation
    key = jax.random.fold_in(learner.key[0], 0)
    noise = np.asarray(jax.random.normal(key, (8, 1, U), jnp.float32))[:, 0]
    one = jax.tree.map(lambda x: x[0], learner)
    mean = network.apply(one.params, t.obs[:8])[0].mean
    np.testing.assert_allclose(t.action, mean + noise, rtol=1e-5, atol=1e-6)


def check_env_action(ppo):
    """Scaled to bounds where there are two, squashed, clipped, reshaped; huge bounds are none."""
    action = np.array([[-2, -1, 0, 0.5, 3]], np.float32)
    low = np.float32([-1, 0, 2, 0, -np.inf])
    high = np.float32([1, 4, 6, 2, np.inf])
    space = Box(low, high, dtype=np.float32)
    tanh = np.tanh(action[0])
    for changes, wanted in (
        ({}, [-1, 0, 4, 1.5, 3]),
        ({"scale_actions": False}, [-1, 0, 2, 0.5, 3]),
        ({"squash_actions": True}, [tanh[0], 2 + 2 * tanh[1], 4, 1 + tanh[3], tanh[4]]),
    ):
        if changes.keys() <= ppo.Args.model_fields.keys():
            found = ppo.env_action(action, space, ppo.Args(**changes))
            np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-6)
            assert found.dtype == np.float32
    flat = np.zeros((3, 4), np.float32)
    assert ppo.env_action(flat, Box(-1, 1, (2, 2)), ppo.Args()).shape == (3, 2, 2)
    most = float(np.finfo(np.float32).max)
    for lower, upper in ((-most, most), (-most, 1), (-1, most)):
        found = ppo.env_action(np.float32([[0.5]]), Box(lower, upper, (1,)), ppo.Args())
        np.testing.assert_allclose(found, [[0.5]])
    # whole numbers: to the nearest, not towards 0
    whole = np.float32([[-2.6, -0.4, 0.6, 1.6]])
    found = ppo.env_action(whole, Box(-2, 2, (4,), np.int32), ppo.Args(scale_actions=False))
    np.testing.assert_array_equal(found, [[-2, 0, 1, 2]])
    assert found.dtype == np.int32
    # inside of bounds that no float32 is
    tight = Box(-0.1, 0.1, (2,), np.float64)
    with jax.enable_x64(True):
        found = np.asarray(ppo.env_action(np.float32([[-9, 9]]), tight, ppo.Args()))
    assert found.dtype == np.float64 and tight.contains(found[0])


def lowered(function, inputs):
    """Returns the texts of a jitted function for GPUs and for TPUs, which it is fit for.

    No call of the host, no float64 and nothing that leaves the device stands in them.
    """
    texts = []
    for device in ("cuda", "tpu"):
        text = jax.export.export(function, platforms=[device])(*inputs).mlir_module()
        targets = set(re.findall(r"custom_call @(\w+)", text))
        assert not [x for x in targets if "callback" in x], targets
        assert "f64" not in text
        assert not re.findall(r"infeed|outfeed|stablehlo\.(?:send|recv)", text)
        texts.append(text)
    return texts


CHECKS = [v for k, v in dict(globals()).items() if k.startswith("check_")]
