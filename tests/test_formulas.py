"""Every formula of ppo_continuous.py against tests/reference.py, and the mutants that these checks must kill."""

import re

import jax
import numpy as np
import pytest
from checks import CHECKS, small_args, start
from conftest import ROOT, load


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_formula(ppo, check):
    check(ppo)


# (the check that must turn red, a text of the script, what a slip would make of it)
MUTANTS = [
    ("gae", "next_value * (1 - terminated)", "next_value * (1 - done)"),
    ("gae", "next_value * (1 - terminated)", "next_value"),
    ("gae", "gae_lambda * (1 - done)", "gae_lambda * (1 - terminated)"),
    ("gae_by_hand", "gae_lambda * (1 - done) * next", "gae_lambda * next"),
    ("gae_by_hand", "reverse=True, ", ""),
    ("gae", "advantage, advantage + value[:-1]", "advantage, advantage + value[1:]"),
    ("loss", "policy_loss = jnp.maximum(policy_loss,", "policy_loss = jnp.minimum(policy_loss,"),
    ("loss", "value_loss = jnp.maximum(value_loss,", "value_loss = jnp.minimum(value_loss,"),
    ("loss", "1 - clip_coef, 1 + clip_coef", "1 - clip_coef, 1 - clip_coef"),
    ("loss", "jnp.mean(x * batch.mask)", "jnp.mean(x)"),
    ("loss", "- schedule.ent_coef * mean", "+ schedule.ent_coef * mean"),
    ("loss", "kl(batch.policy, policy)", "kl(policy, batch.policy)"),
    ("stats", "jnp.sum(x * weight", "jnp.sum(x"),
    ("stats", "jnp.square(shift) * stats.count * count / total", "jnp.square(shift) * count / total"),
    ("distribution", "jnp.exp(policy.log_std) * noise", "jnp.exp(policy.log_std)"),
    ("update", "scale_by_adam(eps=1e-5)", "scale_by_adam(eps=1e-3)"),
    ("update", "centred = batch.advantage - jnp.mean(batch.advantage * batch.mask)", "centred = batch.advantage"),
    ("update", "std = jnp.sqrt(jnp.mean(jnp.square(centred) * batch.mask))", "std = jnp.std(centred)"),
    ("update", "jax.tree.map(lambda x: x[order], batch)", "jax.tree.map(lambda x: x[order[::-1]], batch)"),
    ("update", "2 * learner.iteration + 1)", "2 * learner.iteration)"),
    ("update", "(learner._replace(schedule=schedule)", "(learner"),
    ("update", "s, transition.mask), transition.obs", "s, 0 * transition.mask), transition.obs"),
    ("update", "update_stats(x[:-1, :, 0]", "update_stats(x[1:, :, 0]"),
    ("update", "mean=jnp.zeros_like(return_stats.mean)", "mean=return_stats.mean"),
    (
        "update",
        "batch = batch._replace(advantage=advantage, target=target)",
        "batch = batch._replace(target=target)",
    ),
    ("env_step", "mask = 1 - (last.terminated", "mask = 1 - (new.terminated"),
    ("env_step", "mask = 1 - (last.terminated | last.truncated)", "mask = 1 - (last.terminated)"),
    ("env_step", "(args.gamma * discounted + reward) * mask", "(args.gamma * discounted + reward)"),
    ("env_step", "(total + reward) * mask", "total + reward"),
    ("env_step", "jnp.concatenate([x, last[None]])", "jnp.concatenate([last[None], x])"),
]


@pytest.mark.parametrize(("name", "text", "slip"), MUTANTS, ids=lambda x: x[:40])
def test_mutant_is_killed(name, text, slip):
    source = (ROOT / "ppo_continuous.py").read_text()
    assert source.count(text) == 1, f"{text!r} stands {source.count(text)} times in the script"
    mutant = load(ROOT / "ppo_continuous.py", source.replace(text, slip))
    check = next(c for c in CHECKS if c.__name__ == f"check_{name}")
    with pytest.raises(AssertionError):
        check(mutant)


def test_early_stop_freezes_the_learner(ppo):
    """An unreachable target changes nothing; a tiny one stops after the first epoch, which is the one-epoch update."""
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
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, runs[a][0].params, runs[b][0].params)  # noqa: E731
    same("off", "far")
    assert runs["near"][1]["policy/epochs"] == 1
    assert runs["far"][1]["policy/epochs"] == 2
    first = jax.tree.leaves(runs["near"][0].params)[0]
    assert not np.array_equal(first, jax.tree.leaves(runs["off"][0].params)[0])


@pytest.mark.parametrize("rule", [(2.0, 1.5, 0.667), (1.5, 2.0, 0.5)], ids=["ppo", "heess"])
def test_kl_coefficient_rule(ppo, rule):
    for desired, factor in ((1e-9, rule[0]), (1e9, 1 / rule[0])):
        args = small_args(ppo, objective="kl-penalty", kl_rule=rule, desired_kl=desired)
        network, learner, transition, _ = start(ppo, args)
        with jax.enable_x64(True):
            new, _ = ppo.update(learner, transition, network, args)
        np.testing.assert_allclose(new.schedule.kl_coef / learner.schedule.kl_coef, factor)


def test_adaptive_learning_rate(ppo):
    for desired, factor in ((1e-9, 1.5**-2), (1e9, 1)):  # two epochs; 1e-2 is the upper bound already
        args = small_args(ppo, adaptive_lr=True, anneal_lr=False, desired_kl=desired)
        network, learner, transition, _ = start(ppo, args)
        with jax.enable_x64(True):
            new, _ = ppo.update(learner, transition, network, args)
        np.testing.assert_allclose(new.schedule.learning_rate, learner.schedule.learning_rate * factor, rtol=1e-6)


def test_copies_share_advantage_and_have_their_own_value(ppo):
    """K identical copies change nothing; other copies change the update, but not the statistics."""
    args = small_args(ppo, num_minibatches=1, update_epochs=1)
    network, learner, transition, _ = start(ppo, args)
    with jax.enable_x64(True):
        one, _ = ppo.update(learner, transition, network, args)
        double = transition._replace(obs=np.repeat(transition.obs, 2, axis=2))
        two, _ = ppo.update(learner, double, network, args)
        other = transition._replace(obs=np.concatenate([transition.obs, transition.obs + 1], axis=2))
        three, metrics = ppo.update(learner, other, network, args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), one, two)
    assert np.isfinite(metrics["losses/policy_loss"])
    assert not np.allclose(jax.tree.leaves(one.params)[0], jax.tree.leaves(three.params)[0])
    jax.tree.map(np.testing.assert_array_equal, one.obs_stats, three.obs_stats)  # statistics are the original's


def test_seed_of_a_batch_is_the_lone_seed(ppo):
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    single = lambda x: jax.tree.map(lambda y: np.asarray(y, np.float32) if y.dtype == np.float64 else np.asarray(y), x)  # noqa: E731
    learner, transition = single(learner), single(transition)
    other = learner._replace(key=learner.key + 1)
    batch = jax.tree.map(lambda a, b: np.stack([a, b]), (learner, transition), (other, transition))
    together, _ = jax.jit(jax.vmap(lambda a, b: ppo.update(a, b, network, args)))(*batch)
    for s, one in enumerate((learner, other)):
        alone, _ = jax.jit(lambda a, b: ppo.update(a, b, network, args))(one, transition)
        jax.tree.map(lambda a, b, s=s: np.testing.assert_allclose(a[s], b, rtol=2e-5, atol=1e-6), together, alone)


def test_update_has_no_float64_even_where_rollouts_have(ppo):
    """Under x64, too, where rollouts are compiled: float32 goes in, no array of float64 is computed or comes out."""
    args = small_args(ppo)
    network, learner, transition, _ = start(ppo, args)
    single = lambda x: jax.ShapeDtypeStruct(x.shape, np.float32 if x.dtype == np.float64 else x.dtype)  # noqa: E731
    with jax.enable_x64(True):
        inputs = jax.tree.map(single, (learner, transition))
        jaxpr, out = jax.make_jaxpr(lambda a, b: ppo.update(a, b, network, args), return_shape=True)(*inputs)
    assert "f32[" in str(jaxpr)
    assert not re.search(r"f64\[\d", str(jaxpr))  # Python's constants and optax's bias correction are weak scalars
    assert not [x for x in jax.tree.leaves(out) if x.dtype == np.float64]
