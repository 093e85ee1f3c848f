"""The loss, its gradient, Adam's step, PopArt and GAE on fixed data, equal to MAPPO's own code.

data/mappo.npz holds what on-policy's R_MAPPO.ppo_update and PopArt.update computed, in float64:
120 rows, of which the dead are masked. Where agents die, advantages are by our rule, not theirs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from gymnasium import spaces

DATA = np.load(ROOT / "tests/data/mappo.npz")
SETTINGS = {
    "hidden_sizes": (20, 16),
    "critic_sizes": (18, 22),
    "max_grad_norm": np.inf,
    "learning_rate": 3e-3,
    "ent_coef": 0.02,
    "vf_coef": 0.5,
}
CLOSE = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


def params_of(prefix):
    """Returns the arrays below a prefix as the network's parameters."""
    found = {}
    for name in DATA.files:
        if name.startswith(f"{prefix}/params/"):
            *path, last = name.removeprefix(f"{prefix}/").split("/")
            place = found
            for part in path:
                place = place.setdefault(part, {})
            place[last] = jnp.asarray(DATA[name])
    return found


def assert_params(params, prefix):
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    assert len(leaves) == 12
    for path, x in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        CLOSE(x, DATA[f"{prefix}/{name}"], err_msg=name)


def learner_of(team, args, params):
    """Returns a learner with these parameters, who has seen 700 targets."""
    stats = team.RunningStats(np.float64(1.3), np.float64(2.5), np.float64(700))
    # Theirs were computed with our schedule's float32
    numbers = {name: np.float64(np.float32(getattr(args, name))) for name in team.Schedule._fields}
    return team.LearnerState(
        params=params,
        opt_state=team.make_optimizer(args).init(params),
        obs_stats=stats,
        critic_stats=stats,
        return_stats=stats,
        value_stats=stats,
        schedule=team.Schedule(**numbers),
        key=jax.random.PRNGKey(0),
        iteration=0,
        episodes=0,
        returns=np.zeros(100),
    )


def batch_of(team, name):
    """Returns the rows as a minibatch."""
    views = team.Views(
        actor=DATA["obs_obs"],
        critic=DATA["obs_critic"],
        agent=DATA["obs_agent"].astype(float),
        action_mask=DATA["obs_action_mask"][..., None, :] > 0,
    )
    seen = team.Sequence(views, DATA["mask"], ())
    return team.Batch(
        obs=seen,
        action=DATA["act"],
        policy=team.Categorical(DATA[f"{name}/logits"]),
        log_prob=DATA["old_logp"],
        value=DATA["old_value"],
        advantage=DATA["raw_adv"],
        target=DATA["target"],
        mask=DATA["mask"],
    )


CASES = [f"h{h}_c{c}_n{n}" for h in (None, 1.0) for c in (0, 1) for n in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_update_is_that_of_mappo(team, name):
    """Huber loss or squares, values clipped or not, advantages normalised over the living."""
    huber, clipped, normalised = name.split("_")
    args = team.Args(
        **SETTINGS,
        huber_delta=None if huber == "hNone" else float(huber[1:]),
        clip_vloss=clipped == "c1",
        norm_adv=normalised == "n1",  # the epsilon is ours, theirs 1e-5
    )
    with jax.enable_x64(True):
        network = team.ActorCritic(spaces.MultiDiscrete([[5]] * 3), args)
        learner = learner_of(team, args, params_of("p0"))
        batch = batch_of(team, name)
        policy, value, _ = jax.jit(network.apply)(learner.params, batch.obs)
        CLOSE(value, DATA["value"])
        CLOSE(team.log_prob(policy, batch.action), DATA["logp"])
        weighed = batch._replace(mask=batch.mask / batch.mask.mean(), advantage=DATA[f"{name}/adv"])
        loss = partial(team.ppo_loss, network=network, args=args)
        gradient = jax.jit(jax.grad(loss, has_aux=True))
        grads, _ = gradient(learner.params, weighed, learner.schedule)
        assert_params(grads, f"{name}/g")
        step = jax.jit(partial(team.minibatch_step, network=network, args=args))
        new, metrics = step(learner, batch)
        assert_params(new.params, f"{name}/p1")
    for metric in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"):
        CLOSE(metrics[metric], DATA[f"{name}/{metric}"], err_msg=metric)


def test_statistics_of_values_are_those_of_popart(team):
    """700 targets seen, and 100 more: the critic's last layer follows, its values stay."""
    args = team.Args(**SETTINGS)
    with jax.enable_x64(True):
        network = team.ActorCritic(spaces.MultiDiscrete([[5]] * 3), args)
        learner = learner_of(team, args, params_of("pa0"))
        old = learner.value_stats
        target = (DATA["pa_raw"] - old.mean) / np.sqrt(old.var + 1e-8)
        batch = batch_of(team, CASES[0])._replace(target=target)
        new = team.update_value_stats(learner, batch, args)
        values = []
        for one in (learner, new):
            _, value, _ = network.apply(one.params, batch.obs)
            stats = one.value_stats
            values.append(value * np.sqrt(stats.var + 1e-8) + stats.mean)
    assert_params(new.params, "pa")
    for name in ("mean", "var", "count"):
        CLOSE(getattr(new.value_stats, name), DATA[f"pa_{name}"])
    CLOSE(values[0], DATA["pa_v0"])
    CLOSE(values[1], DATA["pa_v1"])


class Known:
    """A network whose values are those of the data."""

    def apply(self, params, seen):
        value = jnp.asarray(DATA["gae_v"].reshape(11, 12).T)
        return value, value, ()


def test_advantages_where_agents_die(team):
    """An agent's own episode ends where it dies; the team's ends and resets are everybody's."""
    alive = DATA["gae_alive"] > 0
    term, trunc = (DATA[f"gae_{name}"][..., None] > 0 for name in ("term", "trunc"))
    terminated = term | (alive[:-1] & ~alive[1:])
    rows = {
        "reward": DATA["gae_rew"],
        "terminated": terminated.astype(float),
        "done": (terminated | trunc).astype(float),
        "mask": DATA["gae_mk"],
    }
    rows = {name: x.reshape(10, 12) for name, x in rows.items()}
    rollout = team.Transition(**dict.fromkeys(team.Transition._fields, ()) | rows)
    args = team.Args(**SETTINGS)
    with jax.enable_x64(True):
        learner = learner_of(team, args, {})
        _, *found = team.evaluate_rollout(learner, rollout, Known(), args)
    found = [x.reshape(10, 4, 3) for x in found]
    real = DATA["gae_mk"] > 0
    for mine, name in zip(found, ("adv", "target"), strict=True):
        CLOSE(mine[real], DATA[f"gae_{name}"][real])
