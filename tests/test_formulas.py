"""Every formula of ppo_continuous.py against tests/reference.py, and mutants to be killed."""

import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import CHECKS, lowered, small_args, start, to_single
from conftest import mutate


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_formula(ppo, check):
    check(ppo)


# (the check that must turn red, a text of the script, what a slip would make of it)
MUTANTS = [
    ("gae", "next_value * (1 - terminated)", "next_value * (1 - done)"),
    ("gae", "next_value * (1 - terminated)", "next_value"),
    ("gae", "gae_lambda * (1 - done) * next", "gae_lambda * (1 - terminated) * next"),
    ("gae_by_hand", "gae_lambda * (1 - done) * next", "gae_lambda * next"),
    ("gae_by_hand", "reverse=True, ", ""),
    ("gae", "advantage, advantage + value[:-1]", "advantage, advantage + value[1:]"),
    ("loss", "policy_loss = jnp.maximum(policy_loss,", "policy_loss = jnp.minimum(policy_loss,"),
    ("loss", "value_loss = jnp.maximum(value_loss,", "value_loss = jnp.minimum(value_loss,"),
    ("loss", "1 - clip_coef, 1 + clip_coef", "1 - clip_coef, 1 - clip_coef"),
    ("loss", "jnp.mean(x * batch.mask)", "jnp.mean(x)"),
    ("loss", "loss -= schedule.ent_coef", "loss += schedule.ent_coef"),
    ("loss", "schedule.vf_coef * mean", "mean"),
    (
        "loss",
        "kl_divergence = kl(batch.policy, policy)",
        "kl_divergence = kl(policy, batch.policy)",
    ),
    ("loss", "policy_loss += kl_coef * kl_divergence", "policy_loss -= kl_coef * kl_divergence"),
    ("kl_barrier", "stop_gradient(2 * args.kl_barrier", "stop_gradient(args.kl_barrier"),
    ("kl_barrier", "- 2 * args.desired_kl", "- args.desired_kl"),
    ("l2", "if x.ndim > 1", "if x.ndim > 2"),
    ("stats", "jnp.sum(x * weight", "jnp.sum(x"),
    (
        "stats",
        "jnp.square(shift) * stats.count * count / total",
        "jnp.square(shift) * count / total",
    ),
    ("distribution", "jnp.exp(policy.log_std) * noise", "jnp.exp(policy.log_std)"),
    ("update", "scale_by_adam(eps=1e-5)", "scale_by_adam(eps=1e-3)"),
    ("update", "centred = x - jnp.mean(x * weight)", "centred = x"),
    ("update", "jnp.sqrt(jnp.mean(jnp.square(centred) * weight))", "jnp.std(centred)"),
    (
        "update",
        "order.reshape(args.num_minibatches, -1)",
        "order[::-1].reshape(args.num_minibatches, -1)",
    ),
    ("update", "2 * learner.iteration + 1)", "2 * learner.iteration)"),
    ("update", "learner._replace(schedule=anneal(learner, args))", "learner"),
    (
        "update",
        "partial(update_stats, mask=rollout.mask)",
        "partial(update_stats, mask=0 * rollout.mask)",
    ),
    ("update", "lambda x: x[:-1, :, 0], rollout.obs)", "lambda x: x[1:, :, 0], rollout.obs)"),
    ("update", "mean=jnp.zeros_like(return_stats.mean)", "mean=return_stats.mean"),
    (
        "update",
        "batch._replace(advantage=advantage, target=target)",
        "batch._replace(target=target)",
    ),
    ("update", "ent_coef=left(schedule.ent_coef)", "ent_coef=schedule.ent_coef"),
    ("update", "obs=obs, reward=reward)", "reward=reward)"),
    ("last_100", "size - learner.episodes", "size"),
    ("last_100", "[-size:]", "[:size]"),
    ("env_step", "1 - (last.terminated | last.truncated)", "1 - (new.terminated | new.truncated)"),
    ("env_step", "1 - (last.terminated | last.truncated)", "1 - last.terminated"),
    (
        "env_step",
        "episode.discounted + new.reward) * goes_on",
        "episode.discounted + new.reward)",
    ),
    ("env_step", "(episode.total + new.reward) * goes_on", "episode.total + new.reward"),
    ("env_step", "ended=episode_over(new) * mask", "ended=episode_over(last) * mask"),
    ("update", "in_axes=1, out_axes=1)", "in_axes=0, out_axes=0)"),
    ("env_step", "jnp.concatenate([x, y[None]])", "jnp.concatenate([y[None], x])"),
    ("env_action", "np.where(low > -1e30, low, -np.inf)", "low"),
    ("env_action", "np.rint(np.float64(action))", "np.trunc(np.float64(action))"),
]


@pytest.mark.parametrize(("name", "text", "slip"), MUTANTS, ids=lambda x: x[:40])
def test_mutant_is_killed(name, text, slip):
    mutant = mutate("ppo_continuous", text, slip)
    check = next(c for c in CHECKS if c.__name__ == f"check_{name}")
    with pytest.raises(AssertionError):
        check(mutant)


def test_early_stop_freezes_the_learner(ppo):
    """An unreachable target changes nothing; a tiny one stops after the first epoch."""
    runs = {}
    for name, changes in {
        "off": {},
        "far": {"target_kl": 1e9},
        "near": {"target_kl": 1e-12},
        "one": {"update_epochs": 1},
    }.items():
        args = small_args(ppo, **changes)
        network, learner, transition, _ = start(ppo, args)
        with jax.enable_x64(True):
            runs[name] = ppo.update(learner, transition, network, args)
    jax.tree.map(np.testing.assert_array_equal, runs["off"][0].params, runs["far"][0].params)
    assert runs["near"][1]["policy/epochs"] == 1
    assert runs["far"][1]["policy/epochs"] == 2
    first = jax.tree.leaves(runs["near"][0].params)[0]
    assert not np.array_equal(first, jax.tree.leaves(runs["off"][0].params)[0])


def test_product_has_the_usual_gradient_and_does_not_turn_it(ppo):
    """Of several seeds, of sequences, in float64; JAX's own gradient is the one that is turned."""
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(2, 5, 3, 4)), random.normal(size=(2, 4, 6))  # [S, C, L, I]
    of_product = random.normal(size=(2, 5, 3, 6))

    def gradients(product, x, kernel, of_product):
        value, back = jax.vjp(product, x, kernel)
        return value, *back(of_product)

    with jax.enable_x64(True):
        ours = jax.vmap(partial(gradients, ppo.product))
        value, of_x, of_kernel = ours(x, kernel, of_product)
        turns = str(jax.make_jaxpr(ours)(x, kernel, of_product)).count("transpose[")
        jaxs = jax.vmap(partial(gradients, jnp.matmul))
        assert str(jax.make_jaxpr(jaxs)(x, kernel, of_product)).count("transpose[") > turns == 0
    for seed in range(2):
        rows = x[seed].reshape(15, 4)
        of_rows = of_product[seed].reshape(15, 6)
        close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
        close(value[seed].reshape(15, 6), rows @ kernel[seed])
        close(of_x[seed].reshape(15, 4), of_rows @ kernel[seed].T)
        close(of_kernel[seed], rows.T @ of_rows)


def test_random_order(ppo):
    """Every number once, for whatever number of rows, and each as often in every place."""
    for rows in (1, 2, 96, 1000, 4096):
        order = ppo.random_order(jax.random.PRNGKey(rows), rows)
        np.testing.assert_array_equal(np.sort(order), np.arange(rows))
    rows, draws = 5, 4000
    keys = jax.random.split(jax.random.PRNGKey(0), draws)
    orders = np.asarray(jax.vmap(lambda key: ppo.random_order(key, rows))(keys))
    counts = np.array([np.bincount(place, minlength=rows) for place in orders.T])
    expected = draws / rows
    chi_squared = np.sum((counts - expected) ** 2 / expected)
    assert chi_squared < 39.3  # one in a thousand with (rows - 1)^2 = 16 degrees of freedom
    assert len(np.unique(orders, axis=0)) == 120


@pytest.mark.parametrize("rule", [(2.0, 1.5, 0.667), (1.5, 2.0, 0.5)], ids=["ppo", "heess"])
def test_kl_coefficient_rule(ppo, rule):
    for desired, factor in ((1e-9, rule[0]), (1e9, 1 / rule[0])):
        args = small_args(ppo, objective="kl-penalty", kl_rule=rule, desired_kl=desired)
        network, learner, transition, _ = start(ppo, args)
        with jax.enable_x64(True):
            new, _ = ppo.update(learner, transition, network, args)
        np.testing.assert_allclose(new.schedule.kl_coef / learner.schedule.kl_coef, factor)


def test_adaptive_learning_rate(ppo):
    for desired, factor in (
        (1e-9, 1.5**-2),
        (1e9, 1),
    ):  # two epochs; 1e-2 is the upper bound already
        args = small_args(ppo, adaptive_lr=True, anneal_lr=False, desired_kl=desired)
        network, learner, transition, _ = start(ppo, args)
        with jax.enable_x64(True):
            new, _ = ppo.update(learner, transition, network, args)
        np.testing.assert_allclose(
            new.schedule.learning_rate, learner.schedule.learning_rate * factor, rtol=1e-6
        )


def test_copies_share_advantage_and_have_their_own_value(ppo):
    """K identical copies change nothing; other copies change the update, but not the statistics."""
    args = small_args(ppo, num_minibatches=1, update_epochs=1)
    network, learner, transition, _ = start(ppo, args)
    with jax.enable_x64(True):
        one, _ = ppo.update(learner, transition, network, args)
        double = transition._replace(obs=np.repeat(transition.obs, 2, axis=2))
        two, _ = ppo.update(learner, double, network, args)
        other = transition._replace(
            obs=np.concatenate([transition.obs, transition.obs + 1], axis=2)
        )
        three, metrics = ppo.update(learner, other, network, args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), one, two)
    assert np.isfinite(metrics["losses/policy_loss"])
    assert not np.allclose(jax.tree.leaves(one.params)[0], jax.tree.leaves(three.params)[0])
    jax.tree.map(
        np.testing.assert_array_equal, one.obs_stats, three.obs_stats
    )  # statistics are the original's


def test_seed_of_a_batch_is_the_lone_seed(ppo):
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    learner, transition = jax.tree.map(to_single, (learner, transition))
    other = learner._replace(key=learner.key + 1)
    learners = jax.tree.map(lambda a, b: np.stack([a, b]), learner, other)
    rollouts = jax.tree.map(lambda a: np.stack([a, a]), transition)
    update = partial(ppo.update, network=network, args=args)
    together, _ = jax.jit(jax.vmap(update))(learners, rollouts)
    for seed, one in enumerate((learner, other)):
        alone, _ = jax.jit(update)(one, transition)
        mine = jax.tree.map(lambda x, seed=seed: x[seed], together)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), mine, alone)


def test_update_has_no_float64_even_where_rollouts_have(ppo):
    """Under x64, too: float32 goes in, no array of float64 is computed or comes out."""
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, np.float32 if x.dtype == np.float64 else x.dtype)

    with jax.enable_x64(True):
        inputs = jax.tree.map(shape, (learner, transition))
        trace = jax.make_jaxpr(partial(ppo.update, network=network, args=args), return_shape=True)
        jaxpr, out = trace(*inputs)
    assert "f32[" in str(jaxpr)
    # Python's constants and optax's bias correction are weak scalars
    assert not re.search(r"f64\[\d", str(jaxpr))
    assert not [x for x in jax.tree.leaves(out) if x.dtype == np.float64]


def test_update_lowers_for_accelerators(ppo):
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    inputs = jax.tree.map(to_single, (learner, transition))
    update = jax.jit(partial(ppo.update, network=network, args=args))
    lowered(update, inputs)


def test_update_compiles_once(ppo):
    """Three iterations with annealing and other coefficients: one compilation."""
    args = small_args(ppo, anneal_clip=True)
    network, learner, transition, _ = start(ppo, args)
    learner, transition = jax.device_put(jax.tree.map(to_single, (learner, transition)))
    update = jax.jit(partial(ppo.update, network=network, args=args))
    seen = []
    for gamma in (0.9, 0.99, 0.999):
        schedule = learner.schedule._replace(gamma=jnp.float32(gamma))
        learner, metrics = update(learner._replace(schedule=schedule), transition)
        seen.append(float(metrics["charts/learning_rate"]))
    assert update._cache_size() == 1
    assert seen[0] > seen[1] > seen[2]
