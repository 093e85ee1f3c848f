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
    ("loss", "policy_loss += schedule.kl_coef *", "policy_loss -= schedule.kl_coef *"),
    ("kl_barrier", "return 2 * args.kl_barrier", "return args.kl_barrier"),
    ("kl_barrier", "- 2 * args.desired_kl", "- args.desired_kl"),
    ("update", "schedule.kl_coef + barrier", "schedule.kl_coef"),
    ("l2", "leaves(params) if x.ndim > 1", "leaves(params) if x.ndim > 2"),
    ("stats", "jnp.sum(x * weight", "jnp.sum(x"),
    (
        "stats",
        "jnp.square(shift) * stats.count * count / total",
        "jnp.square(shift) * count / total",
    ),
    ("distribution", "jnp.exp(policy.log_std) * noise", "jnp.exp(policy.log_std)"),
    ("update", "scale_by_adam(eps=1e-5)", "scale_by_adam(eps=1e-3)"),
    ("update", "- jnp.mean(batch.advantage * batch.mask)", "- jnp.mean(batch.advantage)"),
    ("update", "jnp.mean(jnp.square(centred) * batch.mask)", "jnp.var(centred)"),
    (
        "update",
        "order.reshape(args.num_minibatches, -1)",
        "order[::-1].reshape(args.num_minibatches, -1)",
    ),
    ("update", "2 * learner.iteration + 1)", "2 * learner.iteration)"),
    ("update", "learner._replace(schedule=anneal(learner, args))", "learner"),
    (
        "update",
        "update_stats(rollout.obs[:-1], obs_stats, rollout.mask)",
        "update_stats(rollout.obs[:-1], obs_stats, 0 * rollout.mask + 1)",
    ),
    ("update", "update_stats(rollout.obs[:-1]", "update_stats(rollout.obs[1:]"),
    (
        "update",
        "normalize(own_rollout.obs, learner.obs_stats",
        "normalize(own_rollout.obs, obs_stats",
    ),
    ("update", "mean=jnp.zeros_like(return_stats.mean)", "mean=return_stats.mean"),
    (
        "update",
        "_replace(advantage=advantage.ravel(), target=target.ravel())",
        "_replace(target=target.ravel())",
    ),
    ("update", "clip_coef=left(schedule.clip_coef)", "clip_coef=schedule.clip_coef"),
    ("last_100", "[-len(learner.returns) :]", "[: len(learner.returns)]"),
    ("last_100", "ended > 0, rollout", "rollout.done >= 0, rollout"),
    ("env_step", "1 - (last.terminated | last.truncated)", "1 - (new.terminated | new.truncated)"),
    ("env_step", "1 - (last.terminated | last.truncated)", "1 - last.terminated"),
    (
        "env_step",
        "runner.discounted_return + new.reward) * mask",
        "runner.discounted_return + new.reward)",
    ),
    ("env_step", "(runner.episodic_return + new.reward) * mask", "new.reward * mask"),
    ("env_step", "done=(new.terminated | new.truncated)", "done=new.terminated"),
    (
        "env_step",
        "[transition.obs, runner.time_step.obs[None]]",
        "[transition.obs[:1], transition.obs]",
    ),
    ("env_step", "obs=last.obs,", "obs=new.obs,"),
    ("env_step", "(learner.key, 2 * learner.iteration)", "(learner.key, 1 + learner.iteration)"),
    ("env_action", "np.where(space.bounded_below & (low > -1e30), low, -np.inf)", "low"),
    ("env_action", "jnp.rint(action)", "jnp.trunc(action)"),
    ("env_action", "return jnp.clip(action, least, most) if", "return action if"),
    ("env_action", "np.isfinite(low) & np.isfinite(high)", "np.isfinite(low)"),
]


@pytest.mark.parametrize(("name", "text", "slip"), MUTANTS, ids=lambda x: x[:40])
def test_mutant_is_killed(name, text, slip):
    mutant = mutate("ppo_continuous", text, slip)
    check = next(c for c in CHECKS if c.__name__ == f"check_{name}")
    with pytest.raises(AssertionError):
        check(mutant)


def updated(ppo, **changes):
    """Returns the learner before and after an update in float64, and its metrics."""
    args = small_args(ppo, **changes)
    network, learner, transition, _ = start(ppo, args)
    with jax.enable_x64(True):
        update = jax.jit(partial(ppo.update, network=network, args=args))
        return jax.tree.map(np.asarray, (learner, *update(learner, transition)))


def test_early_stop_freezes_the_learner(ppo):
    """An unreachable target changes nothing; a tiny one stops after the first epoch."""
    cases = ({}, {"target_kl": 1e9}, {"target_kl": 1e-12})
    off, far, near = (updated(ppo, **changes)[1:] for changes in cases)
    jax.tree.map(np.testing.assert_array_equal, off[0].params, far[0].params)
    assert far[1]["policy/epochs"] == 2 and near[1]["policy/epochs"] == 1
    assert int(near[0].opt_state[1].count) == 4  # minibatches of an epoch
    assert int(far[0].opt_state[1].count) == 8


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


def test_kl_coefficient_rule(ppo):
    """Heess et al.'s, in an update; its thresholds, and those of Schulman et al., on their own."""
    for desired, factor in ((1e-9, 1.5), (1e9, 1 / 1.5)):
        rule = {"kl_rule": (1.5, 2.0, 0.5), "desired_kl": desired}
        old, new, _ = updated(ppo, objective="kl-penalty", **rule)
        np.testing.assert_allclose(new.schedule.kl_coef / old.schedule.kl_coef, factor)
    divergence = 0.01 * np.array([0.4, 0.6, 0.7, 1.4, 1.6, 1.9, 2.1])
    heess = ppo.steer(divergence, 0.01, 1.5, 2.0, 0.5)
    np.testing.assert_allclose(heess, [1 / 1.5, 1, 1, 1, 1, 1, 1.5], rtol=1e-6)
    schulman = ppo.steer(divergence, 0.01, *ppo.Args().kl_rule)
    np.testing.assert_allclose(schulman, [0.5, 0.5, 1, 1, 2, 2, 2], rtol=1e-6)


def test_adaptive_learning_rate(ppo):
    """Twice, as there are two epochs; 1e-2 is the upper bound already."""
    for desired, factor in ((1e-9, 1.5**-2), (1e9, 1)):
        old, new, _ = updated(ppo, adaptive_lr=True, anneal_lr=False, desired_kl=desired)
        ratio = new.schedule.learning_rate / old.schedule.learning_rate
        np.testing.assert_allclose(ratio, factor, rtol=1e-6)


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
