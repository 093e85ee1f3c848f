"""The formulas of a script, or of a mutant of it, against tests/reference.py."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import reference
from gymnasium.spaces import Box

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
T, N, D, U = 16, 4, 3, 2
SPACE = Box(-1, 1, (U,), np.float32)


def flags(rng, shape):
    """Returns random terminated, done and mask as an environment with next-step resets gives them."""
    terminated, done, mask = np.zeros(shape), np.zeros(shape), np.ones(shape)
    for n in range(shape[1]):
        for t in range(shape[0]):
            if t and done[t - 1, n]:
                mask[t, n] = 0  # the reset step: never an end
            elif rng.random() < 0.3:
                done[t, n], terminated[t, n] = 1, rng.random() < 0.5
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
        r, value = rollout(rng), rng.normal(0, 1, (T + 1, N))
        t = SimpleNamespace(**r)
        with jax.enable_x64(True):
            advantage, target = jax.jit(lambda t, v: ppo.compute_gae(SimpleNamespace(**t), v, 0.9, 0.8))(vars(t), value)
        expected = reference.gae(r["reward"], r["terminated"], r["done"], value, 0.9, 0.8)
        np.testing.assert_allclose(advantage, expected, **CLOSE)
        np.testing.assert_allclose(target, expected + value[:-1], **CLOSE)


def check_gae_by_hand(ppo):
    """gamma = lambda = 1/2. Environment 0 terminates at step 1, environment 1 is truncated there; both reset at step 2.

    Step 1: deltas 2 - 1 = 1 (no bootstrap) and 2 + 4/2 - 1 = 3. Step 0: 1 + 1/2 - 1 + A_1/4 = 3/4 and 5/4.
    """
    both = lambda *x: np.array([x, x], float).T  # noqa: E731
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
    x, mask = rng.normal(3, 2, (5, T, N, D)), (rng.random((5, T, N)) < 0.7).astype(float)
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
        np.testing.assert_allclose(ppo.normalize(x[0], stats, 1.5), np.clip(scaled, -1.5, 1.5), **CLOSE)


def check_distribution(ppo):
    rng = np.random.default_rng(2)
    mean, log_std, action, mean2, log_std2 = rng.normal(0, 1, (5, 6, U))
    with jax.enable_x64(True):
        old, new = ppo.Gaussian(mean, log_std), ppo.Gaussian(mean2, log_std2)
        expected = [reference.log_prob(*row) for row in zip(mean, log_std, action, strict=True)]
        np.testing.assert_allclose(ppo.log_prob(old, action), expected, **CLOSE)
        np.testing.assert_allclose(ppo.entropy(old), [reference.entropy(x) for x in log_std], **CLOSE)
        expected = [reference.kl(*row) for row in zip(mean, log_std, mean2, log_std2, strict=True)]
        np.testing.assert_allclose(ppo.kl(old, new), expected, **CLOSE)
        noise = rng.normal(0, 1, (6, U))
        np.testing.assert_allclose(ppo.sample_action(old, noise), mean + np.exp(log_std) * noise, **CLOSE)
    # the reference itself, against integrals: entropy -E[log p], KL E[log p - log q]
    one = [[0.3], [-0.4], [1.1], [0.2]]
    density = np.vectorize(lambda x: reference.log_prob(one[0], one[1], [x]))
    other = np.vectorize(lambda x: reference.log_prob(one[2], one[3], [x]))
    h, d = reference.entropy(one[1]), reference.kl(*one)
    grid = lambda f: reference.expectation(0.3, -0.4, lambda x: f(np.clip(x, -20, 20)))  # noqa: E731
    np.testing.assert_allclose([grid(lambda x: -density(x)), grid(lambda x: density(x) - other(x))], [h, d], rtol=1e-8)


class Direct:
    """A network whose parameters are its outputs, so that the loss alone is tested."""

    def __init__(self, ppo):
        self.ppo = ppo

    def apply(self, params, obs):
        mean, log_std, value = params
        return self.ppo.Gaussian(mean, jnp.broadcast_to(log_std, mean.shape)), value


def loss_case(rng, B=24):
    mean, log_std, value = rng.normal(0, 1, (B, U)), rng.normal(0, 0.3, U), rng.normal(0, 1, B)
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
    {"objective": "kl-penalty", "clip_vloss": True},
]


def check_loss(ppo):
    """Value, metrics and gradient of every variant; the gradient also by central differences of the NumPy loss."""
    rng = np.random.default_rng(3)
    for variant in VARIANTS:
        s = SETTINGS | variant
        params, b = loss_case(rng)
        args = ppo.Args(vf_coef=s["vf_coef"], **variant)
        policy = ppo.Gaussian(b["old_mean"], b["old_log_std"])
        weight = b["mask"] / b["mask"].mean()
        with jax.enable_x64(True):
            batch = ppo.Batch(
                *(None, b["action"], policy, b["log_prob"], b["value"], b["advantage"], b["target"], weight)
            )
            schedule = ppo.Schedule(*map(np.float64, (1e-3, s["clip_coef"], s["ent_coef"], s["kl_coef"])))
            value_and_grad = jax.value_and_grad(ppo.ppo_loss, has_aux=True)
            (loss, metrics), grad = value_and_grad(params, batch, schedule, Direct(ppo), args)
        expected, seen, by_hand = reference.loss(params[:2], params[2], b, s)
        np.testing.assert_allclose(loss, expected, **CLOSE)
        for name, value in seen.items():
            np.testing.assert_allclose(metrics[name], value, **CLOSE, err_msg=name)
        for i, (g, h) in enumerate(zip(grad, by_hand, strict=True)):
            np.testing.assert_allclose(g, h, **CLOSE)
            for index in list(np.ndindex(g.shape))[::5]:  # every fifth element by central differences
                ends = []
                for sign in (1, -1):
                    moved = [np.array(p) for p in params]
                    moved[i][index] += sign * 1e-6
                    ends.append(reference.loss(moved[:2], moved[2], b, s)[0])
                np.testing.assert_allclose(g[index], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def small_args(ppo, **changes):
    settings = {"num_envs": N, "num_steps": T, "num_minibatches": 4, "update_epochs": 2, "hidden_sizes": (5, 4)}
    settings |= {"total_timesteps": 10 * N * T, "clip_obs": 1.5, "clip_reward": 0.4, "max_grad_norm": 0.3}
    settings |= {"ent_coef": 0.03, "gamma": 0.9, "gae_lambda": 0.8, "learning_rate": 1e-2}
    return ppo.Args(**settings | changes)


def start(ppo, args):
    """Returns the network, a learner in float64 with grown-up statistics, and a rollout of the script's type."""
    network = ppo.ActorCritic(SPACE, args)
    rng = np.random.default_rng(4)
    r = rollout(rng)
    with jax.enable_x64(True):
        learner = ppo.init_learner(np.uint32(3), np.zeros(D, np.float32), network, args)
        double = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x  # noqa: E731
        learner = jax.tree.map(double, learner)
        moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(0, 1, x.shape), learner.params)
        learner = learner._replace(
            params=moved,
            iteration=jnp.int32(3),
            obs_stats=ppo.RunningStats(rng.normal(0, 1, D), rng.uniform(1, 2, D), np.float64(50)),
            return_stats=ppo.RunningStats(np.float64(0.3), np.float64(2), np.float64(50)),
        )
    return network, learner, ppo.Transition(**r | {"obs": r["obs"][:, :, None]}), r


def layers(tree, name):
    return [tuple(np.asarray(tree[f"{name}_{i}"][k]) for k in ("kernel", "bias")) for i in range(3)]


def orders(learner, args):
    """Returns the minibatches' indices [E, M, B], from the learner's key as the script's docstrings say."""
    key = jax.random.fold_in(learner.key, 2 * learner.iteration + 1)
    keys = jax.random.split(key, args.update_epochs)
    return [np.asarray(jax.random.permutation(k, N * T)).reshape(args.num_minibatches, -1) for k in keys]


def check_update(ppo):
    """A whole update in float64 against plain NumPy loops with backpropagation by hand."""
    for changes in (
        {},
        {"recompute_advantages": True, "anneal_lr": False},
        {"objective": "kl-penalty", "anneal_clip": True},
    ):
        args = small_args(ppo, **changes)
        network, learner, transition, r = start(ppo, args)
        p = learner.params["params"]
        nets = layers(p, "mean"), np.asarray(p["log_std"]), layers(p, "critic")
        stats = {"obs": tuple(map(np.asarray, learner.obs_stats)), "ret": tuple(map(np.asarray, learner.return_stats))}
        left = 1 - 3 / args.num_iterations
        s = vars(args) | {
            "kl_coef": 1.0,
            "clip_coef": float(learner.schedule.clip_coef) * (left if args.anneal_clip else 1),
        }
        s["ent_coef"] = float(learner.schedule.ent_coef)
        rate = float(learner.schedule.learning_rate) * (left if args.anneal_lr else 1)
        with jax.enable_x64(True):
            new, metrics = jax.jit(lambda a, b: ppo.update(a, b, network, args))(learner, transition)  # noqa: B023
            (actor, log_std, critic), new_stats, seen = reference.update(nets, r, stats, orders(learner, args), rate, s)
        p, close = new.params["params"], {"rtol": 1e-11, "atol": 1e-11}
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
        ended = (r["done"] * r["mask"]) > 0  # time first, as in the rollout
        np.testing.assert_allclose(new.returns[-ended.sum() :], r["episodic_return"][ended], **CLOSE)
        assert np.isnan(new.returns[: -ended.sum()]).all() and new.episodes == ended.sum()
        np.testing.assert_allclose(metrics["charts/episodic_length"], r["episodic_length"][ended].mean(), **CLOSE)
        np.testing.assert_allclose(metrics["charts/episodic_return_100"], r["episodic_return"][ended].mean(), **CLOSE)


def check_env_step(ppo):
    """Masks, episode sums and the observations' order of a rollout on a scripted environment with next-step resets."""
    args = small_args(ppo, num_envs=1, num_steps=8, norm_obs=False, clip_obs=np.inf, num_minibatches=1)

    def step(state, action):  # counts to 3, terminates; the next step resets; the second episode is truncated
        n, episode = state
        ended = n == 3
        n, episode = jnp.where(ended, 0, n + 1), episode + ended
        end = n == 3
        terminated, truncated = end & (episode % 2 == 0), end & (episode % 2 == 1)
        reward = jnp.where(ended, 0.0, 10.0 * n)
        one = lambda x, dtype: jnp.asarray(x, dtype)[None]  # noqa: E731
        obs = jnp.stack([n, episode]).astype(jnp.float32)[None, None]
        return (n, episode), ppo.TimeStep(obs, one(reward, jnp.float32), one(terminated, bool), one(truncated, bool))

    env = ppo.Environment(None, step, SPACE, None)
    none, zero = jnp.zeros(1, bool), jnp.zeros(1)
    runner = ppo.RunnerState((0, 0), ppo.TimeStep(jnp.zeros((1, 1, 2)), zero, none, none), (zero, zero, zero))
    network = ppo.ActorCritic(SPACE, args)
    learner = ppo.init_learner(np.uint32(0), np.zeros(2, np.float32), network, args)
    learner = jax.tree.map(lambda x: x[None], learner)
    _, t = ppo.rollout(runner, learner, env, network, args)
    t = jax.tree.map(lambda x: np.asarray(x[0, :, 0]), t)
    np.testing.assert_array_equal(t.obs[:, 0, 0], [0, 1, 2, 3, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(t.reward, [10, 20, 30, 0, 10, 20, 30, 0])
    np.testing.assert_array_equal(t.mask, [1, 1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(t.terminated, [0, 0, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(t.done, [0, 0, 1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(t.episodic_return, [10, 30, 60, 0, 10, 30, 60, 0])
    np.testing.assert_array_equal(t.episodic_length, [1, 2, 3, 0, 1, 2, 3, 0])
    np.testing.assert_allclose(t.discounted_return, [10, 29, 56.1, 0, 10, 29, 56.1, 0], rtol=1e-6)
    # the action is what the policy's mean and the keyed noise make of the observation
    key = jax.random.fold_in(learner.key[0], 0)
    noise = np.asarray(jax.random.normal(key, (8, 1, U), jnp.float32))[:, 0]
    one = jax.tree.map(lambda x: x[0], learner)
    mean = network.apply(one.params, t.obs[:8, 0])[0].mean
    np.testing.assert_allclose(t.action, mean + noise, rtol=1e-5, atol=1e-6)


def check_bounds(ppo):
    action = np.array([[-2, -1, 0, 0.5, 3]], np.float32)
    space = Box(np.float32([-1, 0, 2, 0, -np.inf]), np.float32([1, 4, 6, 2, np.inf]), dtype=np.float32)
    np.testing.assert_allclose(ppo.bounded(action, space, ppo.Args()), [[-1, 0, 4, 1.5, 3]])
    np.testing.assert_allclose(ppo.bounded(action, space, ppo.Args(scale_actions=False)), [[-1, 0, 2, 0.5, 3]])
    assert ppo.bounded(np.zeros((3, 4), np.float32), Box(-1, 1, (2, 2)), ppo.Args()).shape == (3, 2, 2)


CHECKS = [v for k, v in dict(globals()).items() if k.startswith("check_")]
