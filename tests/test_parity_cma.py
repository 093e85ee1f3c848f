"""ppo_cma.py against its authors' TensorFlow code, on fixed data: tests/data/cma.npz, float64.

64 rows, D 5, U 3, hidden layers of 16 and 12. Of each algorithm the file has parameters before,
p0, and what the authors' classes make of them: policies, values, log-probabilities, losses, and
gradients, *_g. Five steps of Adam on minibatches fs_* lead from f0 to f1 (std), five on fm_* to f2
(mean). Each line of the tests below names the arrays that it reads.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.spaces import Box

DATA = np.load(ROOT / "tests/data/cma.npz")
ALGORITHMS = ["ppo-cma-m", "ppo-cma", "ppo", "pg", "pg-pos"]
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
ADAM = {"rtol": 4e-8, "atol": 4e-10}  # TensorFlow's first Adam adds eps elsewhere


def numbers(prefix):
    """Returns {name: array} of those under a prefix that are no network's."""
    names = [name for name in DATA if name.startswith(prefix) and "params" not in name]
    return {name.removeprefix(prefix): DATA[name] for name in names}


def parameters(prefix):
    """Returns parameters as the script has them: each layer's biases lie beside the layers."""
    parts = {}
    for name in DATA:
        if name.startswith(f"{prefix}/params/"):
            part, *rest = name.removeprefix(f"{prefix}/params/").split("/")
            if not rest:
                parts[part] = DATA[name]
            elif rest[1] == "bias":
                parts.setdefault(part, {})[f"bias_{rest[0].removeprefix('Dense_')}"] = DATA[name]
            else:
                parts.setdefault(part, {})[rest[0]] = {"kernel": DATA[name]}
    return {"params": parts}


def assert_close(mine, theirs, **tolerance):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerance or CLOSE), mine, theirs)


def make_network(cma, algorithm, **settings):
    args = cma.Args(algorithm=algorithm, hidden_sizes=(16, 12), **settings)
    return cma.ActorCritic(Box(DATA["low"], DATA["high"]), args), args


def make_schedule(cma):
    """Returns the settings of the file; epsilon was a float32 there."""
    numbers = {"learning_rate": 5e-4, "clip_coef": np.float32(0.2), "ent_coef": 0.0}
    numbers |= {"gamma": 0.99, "gae_lambda": 0.95}
    return cma.Schedule(**{name: np.float64(x) for name, x in numbers.items()})


def make_batch(cma, d):
    """Returns decisions of these arrays; where none is given, 0."""
    zeros = dict.fromkeys(cma.Batch._fields, jnp.zeros(d["advantage"].shape))
    return cma.Batch(**zeros | {name: jnp.asarray(d[name]) for name in zeros if name in d})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_networks(cma, algorithm):
    with jax.enable_x64(True):
        d = numbers(f"{algorithm}/")
        network, _ = make_network(cma, algorithm)
        policy, value = network.apply(parameters(f"{algorithm}/p0"), d["obs"])
        assert_close((policy.mean, policy.log_std), (d["pmean"], d["plogstd"]))
        assert_close(value, d["value"])
        assert_close(cma.log_prob(policy, d["action"]), d["lp"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_and_gradients(cma, algorithm):
    with jax.enable_x64(True):
        d = numbers(f"{algorithm}/")
        network, args = make_network(cma, algorithm)
        losses = {"critic": cma.critic_loss, "policy": cma.policy_loss}
        losses |= {"std": cma.cma_std_loss, "mean": cma.cma_mean_loss}
        parts = {"critic", "std", "mean"} if "cma" in algorithm else {"critic", "policy"}
        assert parts == {name.removesuffix("_loss") for name in d if name.endswith("_loss")}
        for part in parts:
            rest = make_batch(cma, d), make_schedule(cma), network, args
            loss = jax.value_and_grad(losses[part])
            value, gradient = loss(parameters(f"{algorithm}/p0"), *rest)
            assert_close(value, d[f"{part}_loss"])
            theirs = parameters(f"{algorithm}/{part}_g")["params"]
            # The others' parameters are constants to them
            assert_close(gradient["params"][part], theirs[part])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scaled_advantages(cma, algorithm):
    """Not centred; theirs were divided by the deviation of rows that the file does not name."""
    with jax.enable_x64(True):
        d = numbers(f"{algorithm}/")
        advantage = d["advantage"].reshape(32, 2)
        _, args = make_network(cma, algorithm)
        mine = cma.scale_advantages(advantage, np.ones((32, 2)), args)
        factor = np.abs(mine).sum() / np.abs(d["scaled_adv"]).sum()
        assert 0.9 < factor < 1.1
        assert_close(mine / factor, d["scaled_adv"])


def test_scaler(cma):
    """Three iterations, sc_x to sc_scale."""
    with jax.enable_x64(True):
        scaler = cma.Scaler(np.zeros(5), np.ones(5), np.float64(0))
        for x, scale in zip(DATA["sc_x"], DATA["sc_scale"], strict=True):
            scaler = cma.update_scaler(x, scaler, np.ones(x.shape[:2]))
            assert_close(scaler.scale, scale)


def test_ten_steps_of_adam(cma, monkeypatch):
    """`fit` from f0 to f1 on fs_*, and on to f2 on fm_*; the minibatches are given to it."""
    with jax.enable_x64(True):
        network, args = make_network(cma, "ppo-cma-m", num_updates=5)
        key = jax.random.PRNGKey(0)
        keys = jax.random.split(key, 5)
        begin = parameters("f0")
        learner = dict.fromkeys(cma.LearnerState._fields)
        adam = {part: cma.optax.scale_by_adam().init(begin["params"][part]) for part in PARTS}
        learner |= {"params": begin, "schedule": make_schedule(cma)}
        learner |= {"opt_state": cma.Training(adam=adam, history=None, counts=None)}
        learner = cma.LearnerState(**learner)
        for part, (loss, prefix, after) in PARTS.items():
            batches = make_batch(cma, numbers(prefix))

            def draw(key, *_, batches=batches):
                step = jnp.argmax((keys == key).all(axis=1))
                return jax.tree.map(lambda x: x[step], batches)

            monkeypatch.setattr(cma, "draw", draw)
            learner, _ = cma.fit(learner, key, part, getattr(cma, loss), network, args)
            assert_close(learner.params, parameters(after), **ADAM)


PARTS = {"std": ("cma_std_loss", "fs_", "f1"), "mean": ("cma_mean_loss", "fm_", "f2")}
