"""Other people's updates on fixed data: sb3-contrib's RecurrentPPO, Pathak et al.'s curiosity.

Each array of tests/data/lstm_*.npz and icm_*.npz is what ppo_icm_lstm.py must compute, in float64.
"""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from conftest import ROOT
from gymnasium import spaces

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
close = partial(np.testing.assert_allclose, **CLOSE)


def read(name):
    """Returns {name: array} of a file in tests/data."""
    with np.load(ROOT / "tests/data" / f"{name}.npz") as file:
        return dict(file)


def tree(arrays, kind):
    """Returns the pytree whose leaves have the names kind/params/.../kernel."""
    found = {}
    for name, x in arrays.items():
        if name.startswith(f"{kind}/"):
            *path, last = name.split("/")[1:]
            place = found
            for key in path:
                place = place.setdefault(key, {})
            place[last] = x
    return found


def assert_trees_close(mine, theirs):
    jax.tree.map(close, dict(mine), theirs)


def to_double(tree):
    """Returns a pytree in float64; settings in it, such as epsilon, are as near as float32 is."""
    return jax.tree.map(lambda x: np.float64(x) if x.dtype == np.float32 else x, tree)


def new_learner(icm, size, network, args):
    """Returns a learner for environments that show so many numbers."""
    shown = icm.TimeStep({"obs": np.zeros((1, size), np.float32)}, np.float32(0), False, False)
    init = partial(icm.init_learner, shown=shown, network=network, args=args)
    return jax.jit(init)(np.uint32(0))


# --- Memory ---
def recurrent(icm, space, arrays, **settings):
    """Returns a network and a learner with the file's parameters, and the settings."""
    widths = {"memory_size": 16, "hidden_sizes": (24, 20), "critic_sizes": (18, 22)}
    numbers = {"vf_coef": 0.5, "ent_coef": 0.03, "max_grad_norm": 0.5, "learning_rate": 1e-2}
    args = icm.Args(recurrence="lstm", **widths, **numbers, **settings)
    network = icm.ActorCritic(space, args)
    learner = new_learner(icm, 5, network, args)
    params = tree(arrays, "p0")
    opt_state = icm.Learning(adam=icm.make_optimizer(args).init(params), curiosity=None)
    return network, to_double(learner._replace(params=params, opt_state=opt_state)), args


@pytest.mark.parametrize("name", ["lstm_discrete", "lstm_discrete_norm_adv", "lstm_box"])
def test_two_steps_of_recurrent_ppo(icm, name):
    """What networks say, loss, metrics, gradient, and parameters after one and two steps."""
    with jax.enable_x64(True):
        x = read(name)
        space = spaces.Discrete(3) if x["kind"] == "disc" else spaces.Box(-1, 1, (2,))
        network, learner, args = recurrent(icm, space, x, norm_adv=bool(x["norm_adv"]))
        seen = icm.Sequence({"obs": x["obs"]}, x["mask"], (x["h"], x["c"]))
        ask = jax.jit(partial(network.apply, remember=True))
        policy, value, (hidden, cell) = ask(learner.params, seen)
        close(icm.log_prob(policy, x["action"]), x["logp"])
        close(icm.entropy(policy), x["entropy"])
        close(value, x["value"])
        close(hidden, x["mem_h"])
        close(cell, x["mem_c"])
        batch = icm.Batch(
            obs=seen,
            action=x["action"],
            policy=policy,
            log_prob=x["old_logp"],
            value=x["old_value"],
            advantage=x["adv"],
            target=x["target"],
            mask=x["mask"],
            next_obs=None,
        )
        step = jax.jit(partial(icm.minibatch_step, network=network, args=args))
        one, metrics = step(learner, batch)
        two, _ = step(one, batch)
        for key in ("approx_kl", "clipfrac", "entropy", "kl", "policy_loss", "value_loss"):
            close(metrics[key], x[f"met/{key}"])
        assert_trees_close(one.params, tree(x, "p1"))
        assert_trees_close(two.params, tree(x, "p2"))
        check_gradient(icm, x, learner, batch, network, args)


def check_gradient(icm, x, learner, batch, network, args):
    """The loss and its gradient, of a batch whose mask and advantages a step has weighed."""
    mask = batch.mask / batch.mask.mean()
    advantage = batch.advantage
    if args.norm_adv:
        real = advantage[batch.mask > 0]
        advantage = (advantage - real.mean()) / (real.std() + 1e-8)
    batch = batch._replace(mask=mask, advantage=advantage)
    ppo_loss = partial(icm.ppo_loss, network=network, args=args)
    gradient = jax.jit(jax.value_and_grad(ppo_loss, has_aux=True))
    (loss, _), grads = gradient(learner.params, batch, learner.schedule)
    close(loss, x["loss"])
    close(optax.tree.norm(grads), x["norm"])
    assert_trees_close(grads, tree(x, "g"))


@pytest.mark.parametrize("length", [12, 4])
def test_pieces_of_a_rollout(icm, length):
    """The memory that enters each piece, advantages and targets, and what pieces say again."""
    with jax.enable_x64(True):
        x = read("lstm_pieces")
        settings = {"num_envs": 4, "num_steps": 12, "num_minibatches": 1, "total_timesteps": 48}
        space = spaces.Discrete(3)
        network, learner, args = recurrent(icm, space, x, sequence_length=length, **settings)
        zero = np.zeros((12, 4))
        rollout = icm.Transition(
            obs={"obs": x["T_obs"][:, :, None]},
            action=x["T_act"][..., None],
            reward=x["rew"],
            terminated=x["term"],
            done=x["d"],
            mask=x["mk"],
            episodic_return=zero,
            episodic_length=zero,
            discounted_return=zero,
            memory=(x["mem_h"][None], x["mem_c"][None]),
        )
        make_batch = jax.jit(partial(icm.make_batch, network=network, args=args))
        batch = make_batch(learner, rollout)
        policy, value = jax.jit(network.apply)(learner.params, batch.obs)
        found = {
            "h": batch.obs.memory[0],
            "c": batch.obs.memory[1],
            "logp": batch.log_prob,
            "value": batch.value,
            "adv": batch.advantage,
            "target": batch.target,
            "mask": batch.mask,
            "obs": batch.obs.obs["obs"],
            "act": batch.action,
            "logp2": icm.log_prob(policy, batch.action),
            "value2": value,
        }
        for name, mine in found.items():
            np.testing.assert_allclose(mine, x[f"L{length}/{name}"], err_msg=name, **CLOSE)


# --- Curiosity ---
@pytest.mark.parametrize("name", ["icm_discrete", "icm_box"])
def test_a_step_of_curiosity(icm, name):
    """Intrinsic rewards, raw and scaled, the loss, its gradient, and a step of Adam."""
    with jax.enable_x64(True):
        x = read(name)
        space = spaces.Discrete(3) if x["kind"] == "disc" else spaces.Box(-1, 1, (2,))
        sizes = {"icm_sizes": (10, 10, 10), "icm_features": 6, "activation": "relu"}
        shape = {"num_envs": 4, "num_steps": 6, "num_minibatches": 1, "total_timesteps": 24}
        args = icm.Args(icm=True, max_grad_norm=0.5, icm_learning_rate=3e-4, **sizes, **shape)
        network = icm.ActorCritic(space, args)
        learner = new_learner(icm, 4, network, args)
        params = tree(x, "p0")
        curiosity = learner.opt_state.curiosity._replace(
            params=params,
            opt_state=icm.make_optimizer(args).init(params),
        )
        learner = to_double(learner._replace(opt_state=icm.Learning(None, curiosity)))
        zero = np.zeros((6, 4))
        fields = dict.fromkeys(icm.Transition._fields[2:-1], zero)
        rollout = icm.Transition(
            **fields | {"obs": {"obs": x["obs"]}, "action": x["act"], "mask": x["mk"]}
        )

        def compiled(function):
            return jax.jit(partial(function, network=network, args=args))

        close(compiled(icm.intrinsic_rewards)(learner, rollout), x["raw"])
        new, paid, _ = compiled(icm.reward_curiosity)(learner, rollout)
        close(new.opt_state.curiosity.stats.var, x["stats_var"])
        close(paid.reward, x["norm_reward"])

        batch = compiled(icm.make_batch)(learner, rollout)
        batch = batch._replace(mask=batch.mask / batch.mask.mean())
        icm_loss = partial(icm.icm_loss, network=network, args=args)
        gradient = jax.jit(jax.value_and_grad(icm_loss, has_aux=True))
        (loss, metrics), grads = gradient(params, batch)
        close(loss, x["loss"])
        close(metrics["icm/forward_loss"], x["fwd"])
        close(metrics["icm/inverse_loss"], x["inv"])
        close(optax.tree.norm(grads), x["gnorm"])
        assert_trees_close(grads, tree(x, "g"))
        stepped, _ = compiled(icm.curiosity_step)(learner.opt_state.curiosity, batch)
        assert_trees_close(stepped.params, tree(x, "p1"))
