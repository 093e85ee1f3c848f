"""What is ppo_atari.py's own: choices, convolutions, lives, RAM, stacked frames, protocols."""

import json
import math
import os
from functools import partial
from types import SimpleNamespace

import envpool
import imageio.v3
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import lowered
from conftest import environment, mutate
from gymnasium import spaces
from processes import execute
from runs import result
from test_environments import KEPT, assert_next_step_resets, begin, play

B = 24
CHOICES = 5
TINY = {"num_envs": 2, "network": "mlp", "hidden_sizes": (1,), "critic_sizes": (1,)}


# --- Distribution ---
def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def test_distribution_of_choices(atari):
    rng = np.random.default_rng(0)
    old, new = rng.normal(0, 2, (2, B, CHOICES))
    action = rng.integers(CHOICES, size=B)
    with jax.enable_x64(True):
        policy = atari.Categorical(logits=jnp.asarray(new))
        log_probs = atari.log_prob(policy, action)
        entropies = atari.entropy(policy)
        divergences = atari.kl(atari.Categorical(logits=jnp.asarray(old)), policy)
    for i in range(B):
        p, q = softmax(old[i]), softmax(new[i])
        np.testing.assert_allclose(log_probs[i], math.log(q[action[i]]), rtol=1e-12)
        np.testing.assert_allclose(entropies[i], -sum(q * np.log(q)), rtol=1e-12)
        np.testing.assert_allclose(divergences[i], sum(p * np.log(p / q)), rtol=1e-11)


def test_sampled_choices_have_their_probabilities(atari):
    logits = np.array([0.5, -1.0, 2.0], np.float32)
    noise = atari.draw_noise(jax.random.PRNGKey(0), (100_000,), spaces.Discrete(3))
    policy = atari.Categorical(logits=jnp.asarray(logits))
    counts = np.bincount(atari.sample_action(policy, noise), minlength=3) / len(noise)
    np.testing.assert_allclose(counts, softmax(logits), atol=0.006)
    assert atari.sample_action(policy, 0 * noise[0]) == 2
    assert atari.env_action(jnp.int32(2), spaces.Discrete(3, start=7), None) == 9


# said and shown dtype, bound and brightest number, and what the network gets of that
PICTURES = [
    ("uint8", "uint8", 255, 255, 255),
    ("float32", "float32", 255, 255, 1),
    ("float64", "float32", 1, 0.5, 0.5),
    ("int16", "int16", 4, 2, 0.5),
]


def picture(script, vectorization, said, shown, high, brightest):
    """Returns what a network of a script gets of a picture, [S, N, ...]."""
    kwargs = {"said": said, "shown": shown, "high": high, "brightest": brightest}
    settings = {"env_kwargs": json.dumps(kwargs), "vectorization": vectorization}
    env = script.make_env(script.Args(env_id="scripted:Picture-v0", **settings), [1, 2])
    _, time_step = env.first
    return jax.tree.leaves(time_step.obs)[0]


@pytest.mark.parametrize(("said", "shown", "high", "brightest", "seen"), PICTURES)
def test_images_are_scaled_by_their_bounds(atari, icm, said, shown, high, brightest, seen):
    for script in (atari, icm):
        obs = picture(script, "sync", said, shown, high, brightest)
        assert obs.max() == seen and obs.dtype == ("uint8" if said == "uint8" else "float32")


def test_a_mask_of_a_step_is_an_error(atari):
    with pytest.raises(Exception, match=r"has an action_mask: use ppo_icm_lstm\.py"):
        play(atari, "scripted:Masked-late-v0", 16)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_images_that_are_not_of_their_space(atari, icm, vectorization):
    """Bytes that were said to be small numbers, and small numbers that were said to be bytes."""
    for script in (atari, icm):
        with pytest.raises(script.InputError, match="up to 255, and its space is"):
            picture(script, vectorization, "float32", "uint8", 1, 255)
        with pytest.raises(Exception, match="an observation has numbers that Box"):
            picture(script, vectorization, "uint8", "float32", 255, 0.9)


class Direct:
    """A network whose parameters are its outputs."""

    def __init__(self, atari):
        self.atari = atari

    def apply(self, params, obs):
        return self.atari.Categorical(logits=params["logits"]), params["value"]


def plain_loss(logits, value, batch, s):
    """Returns the loss of a minibatch, one sample after another."""
    total = 0.0
    for i in range(B):
        p = softmax(logits[i])
        ratio = p[batch["action"][i]] / math.exp(batch["log_prob"][i])
        bounded = min(max(ratio, 1 - s["clip_coef"]), 1 + s["clip_coef"])
        advantage = batch["advantage"][i]
        error = (value[i] - batch["target"][i]) ** 2
        change = value[i] - batch["value"][i]
        near = batch["value"][i] + min(max(change, -s["clip_coef"]), s["clip_coef"])
        error = max(error, (near - batch["target"][i]) ** 2)
        loss = -min(ratio * advantage, bounded * advantage) + s["vf_coef"] * 0.5 * error
        loss += s["ent_coef"] * sum(p * np.log(p))
        total += loss * batch["mask"][i] / batch["mask"].sum()
    return total


def test_loss_of_choices_and_its_gradient(atari):
    """Against NumPy, and against central differences of NumPy."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1, (B, CHOICES))
    value = rng.normal(0, 1, B)
    mask = (rng.random(B) < 0.7).astype(float)
    action = rng.integers(CHOICES, size=B)
    old = logits + rng.normal(0, 0.3, (B, CHOICES))
    s = {"clip_coef": 0.2, "vf_coef": 0.7, "ent_coef": 0.05}
    rows = {
        "action": action,
        "log_prob": np.array([math.log(softmax(old[i])[action[i]]) for i in range(B)]),
        "value": value + rng.normal(0, 0.3, B),
        "advantage": rng.normal(0, 1, B),
        "target": rng.normal(0, 1, B),
        "mask": mask,
    }
    with jax.enable_x64(True):
        batch = {name: jnp.asarray(x) for name, x in rows.items()}
        batch["mask"] /= mask.mean()
        batch = atari.Batch(obs=None, policy=atari.Categorical(logits=jnp.asarray(old)), **batch)
        numbers = s | {"learning_rate": 1.0, "gamma": 0.9, "gae_lambda": 0.9}
        schedule = atari.Schedule(**{k: jnp.float64(x) for k, x in numbers.items()})
        params = {"logits": jnp.asarray(logits), "value": jnp.asarray(value)}
        args = atari.Args(clip_vloss=True)
        loss = partial(atari.ppo_loss, network=Direct(atari), args=args)
        (mine, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, schedule)
    np.testing.assert_allclose(mine, plain_loss(logits, value, rows, s), rtol=1e-12)
    step = 1e-6
    for i in range(B):
        for j in range(CHOICES):
            shift = np.zeros_like(logits)
            shift[i, j] = step
            up, down = (plain_loss(logits + x, value, rows, s) for x in (shift, -shift))
            np.testing.assert_allclose(grads["logits"][i, j], (up - down) / (2 * step), atol=1e-8)
        shift = np.zeros_like(value)
        shift[i] = step
        up, down = (plain_loss(logits, value + x, rows, s) for x in (shift, -shift))
        np.testing.assert_allclose(grads["value"][i], (up - down) / (2 * step), atol=1e-8)


# --- Networks ---
SIZES = [
    (84, 84, 4, 8, 4),
    (20, 20, 3, 4, 2),
    (9, 9, 5, 3, 1),
    (19, 22, 2, 4, 2),
    (23, 20, 2, 8, 4),
]


@pytest.mark.parametrize(("height", "width", "channels", "size", "stride"), SIZES)
def test_conv_is_the_librarys(atari, height, width, channels, size, stride):
    """In value and in both gradients."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, height, width, channels))
    kernel = rng.normal(0, 1, (size, size, channels, 3))

    def by_library(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=layout)

    with jax.enable_x64(True):
        found = []
        for conv in (partial(atari.conv, stride=stride), by_library):

            def loss(x, kernel, conv=conv):
                value = conv(x, kernel)
                return jnp.sum(jnp.sin(value)), value

            gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
            found.append(jax.tree.leaves(gradient(x, kernel)))
    for mine, library in zip(*found, strict=True):
        np.testing.assert_allclose(mine, library, rtol=1e-10, atol=1e-11)


def test_channels_come_last(atari):
    """Of all layouts of one image, and of stacks of images."""
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(2, 12, 10, 3), dtype=np.uint8)
    wanted = image / 255
    last = partial(atari.channels_last, args=atari.Args())
    np.testing.assert_allclose(last(jnp.asarray(image)), wanted, rtol=1e-6)
    np.testing.assert_allclose(last(jnp.asarray(image.transpose(0, 3, 1, 2))), wanted, rtol=1e-6)
    np.testing.assert_allclose(last(jnp.asarray(image[..., 0])), wanted[..., :1], rtol=1e-6)
    stack = jnp.asarray(np.stack([image, 255 - image], axis=1))
    both = np.concatenate([wanted, 1 - wanted], axis=-1)
    np.testing.assert_allclose(last(stack), both, rtol=1e-6, atol=1e-6)


LAYOUTS = [
    ((4, 84, 84), True),
    ((84, 84, 4), False),
    ((3, 210, 160), True),
    ((3, 3, 20), None),
    ((2, 3, 4), False),
    ((8, 84, 100), True),
    ((84, 100, 8), False),
    ((9, 2, 9), None),
    ((7, 7, 20), False),
    ((20, 7, 7), True),
    ((10, 10, 4), False),
    ((12, 10, 8), None),
    ((60, 90, 64), None),
]


@pytest.mark.parametrize(("shape", "first"), LAYOUTS)
def test_which_axis_has_the_channels(atari, shape, first):
    """What nobody can know is said, and a flag decides."""
    assert atari.channels_first(shape, atari.Args()) is first
    for name in ("first", "last"):
        assert atari.channels_first(shape, atari.Args(channels=name)) == (name == "first")


def test_a_guess_at_channels_is_said(atari, capsys):
    space = spaces.Box(0, 1, (8, 10, 12), np.float32)
    shown = atari.TimeStep(np.zeros((1, 1, 8, 10, 12), np.float32), *[None] * 4)
    env = atari.Environment((None, shown), None, space, spaces.Discrete(2), None, None)
    for channels, said in (("auto", True), ("first", False), ("last", False)):
        atari.require_network(env, atari.Args(channels=channels))
        assert ("--channels" in capsys.readouterr().err) == said


NETWORKS = [
    ("auto", (4, 36, 36), "nature"),
    ("auto", (10, 10, 4), "small"),
    ("auto", (512,), "mlp"),
    ("impala", (36, 36, 3), "impala"),
    ("ppo1", (4, 36, 36), "ppo1"),
    ("mlp", (10, 10, 4), "mlp"),
]


@pytest.mark.parametrize(("name", "shape", "meant"), NETWORKS)
def test_networks(atari, name, shape, meant):
    """Outputs are float32 and finite, seeds side by side are lone ones."""
    args = atari.Args(network=name)
    obs = np.random.default_rng(0).integers(256, size=(3, *shape), dtype=np.uint8)
    network = atari.ActorCritic(spaces.Discrete(6), args)
    assert atari.network_of(jnp.asarray(obs), args) == meant
    init = jax.jit(lambda keys, obs: jax.lax.map(lambda key: network.init(key, obs), keys))
    params = init(jax.random.split(jax.random.PRNGKey(0)), obs)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    policy, value = jax.jit(jax.vmap(network.apply, (0, None)))(params, obs)
    assert policy.logits.shape == (2, 3, 6) and value.shape == (2, 3)
    assert policy.logits.dtype == value.dtype == np.float32
    lone, alone = jax.jit(network.apply)(jax.tree.map(lambda x: x[1], params), obs)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(policy.logits[1], lone.logits, **tolerance)
    np.testing.assert_allclose(value[1], alone, **tolerance)
    assert np.abs(policy.logits).max() < 0.2  # nearly uniform at first


def test_the_nature_network_has_its_parameters(atari):
    network = atari.ActorCritic(spaces.Discrete(6), atari.Args())
    image = np.zeros((1, 4, 84, 84), np.uint8)
    params = jax.eval_shape(network.init, jax.random.PRNGKey(0), image)["params"]
    found = {name: sum(x.size for x in jax.tree.leaves(layer)) for name, layer in params.items()}
    sizes = {"conv_0": 8224, "conv_1": 32832, "conv_2": 36928, "dense": 1606144}
    assert found == sizes | {"policy": 3078, "critic": 513}


def test_normc(atari):
    """Units of norm 1, the policy's 0.01, as ppo1 has them."""
    network = atari.ActorCritic(spaces.Discrete(6), atari.Args(network="ppo1", init="normc"))
    images = np.zeros((1, 4, 36, 36), np.uint8)
    params = jax.jit(network.init)(jax.random.PRNGKey(0), images)["params"]
    for name, norm in (("dense", 1), ("policy", 0.01), ("critic", 1)):
        norms = np.linalg.norm(params[name]["kernel"], axis=0)
        np.testing.assert_allclose(norms, norm, rtol=1e-5)


# --- Environments ---
def first_seeds(seed, count):
    """Returns the seeds of a seed's environments."""
    return (np.random.SeedSequence([seed]).generate_state(count) >> 1).tolist()


def test_rollout_is_what_envpool_itself_does(atari):
    """Bytes stay bytes; rewards, frames and ends are those of EnvPool stepped from Python."""
    t, run = play(atari, "Breakout-v5", 400, **TINY)
    assert t.obs.dtype == np.uint8 and t.obs.shape == (401, 2, 4, 84, 84)
    assert run.args.seed == 1
    seeds = first_seeds(1, 2)
    pool = envpool.make(
        "Breakout-v5", env_type="gymnasium", num_envs=2, seed=seeds, episodic_life=True
    )
    obs, info = pool.reset()
    over = np.zeros(2, bool)
    total = np.zeros(2)
    for i in range(400):
        np.testing.assert_array_equal(t.obs[i], obs)
        lives = info["lives"]
        obs, reward, terminated, truncated, info = pool.step(t.action[i])
        np.testing.assert_array_equal(t.reward[i], reward)
        np.testing.assert_array_equal(t.terminated[i], terminated)
        np.testing.assert_array_equal(t.done[i], terminated | truncated)
        total = np.where(over, 0, total + reward)
        np.testing.assert_array_equal(t.episodic_return[i], total)
        over = (lives > 0) & (info["lives"] == 0)  # a game of five lives goes on when one is lost
        np.testing.assert_array_equal(t.ended[i] > 0, over)
    assert t.terminated.sum() > t.ended.sum() > 0


def test_lives_are_ends_for_learning_only(atari):
    """Each life's end terminates, and its no-op is no experience; scores are of whole games."""
    t, _ = play(atari, "Breakout-v5", 600, **TINY)
    assert_lives(t)
    whole, _ = play(atari, "Breakout-v5", 600, **TINY, episodic_life=False)
    assert_next_step_resets(whole)
    np.testing.assert_array_equal(whole.ended, whole.done)
    shown, _ = play(atari, "Breakout-v5", 600, **TINY, mode="eval")
    assert_lives(shown)  # else nobody would serve the next ball of a policy trained so


def assert_lives(t):
    np.testing.assert_array_equal(t.mask[1:], 1 - t.done[:-1])
    games = np.cumsum(t.ended[:-1], axis=0)
    for n in range(t.done.shape[1]):
        ends = np.flatnonzero(t.ended[:, n])
        assert len(ends) and np.all(np.diff(np.flatnonzero(t.done[:, n])) > 1)
        for game in range(int(games[-1, n])):
            end = ends[game]
            begin = ends[game - 1] + 2 if game else 0
            assert t.done[begin : end + 1, n].sum() == 5  # lives
            assert t.episodic_length[end, n] == t.mask[begin : end + 1, n].sum()
            rewards = t.reward[begin : end + 1, n]
            assert t.episodic_return[end, n] == rewards.sum()


def test_rewards_are_clipped_for_learning_only(atari):
    """MsPacman's are tens; learning sees signs, and the score is the game's."""
    t, run = play(atari, "MsPacman-v5", 200, **TINY)
    assert t.reward.max() >= 10 and t.episodic_return.max() >= 10
    zero = atari.RunningStats(np.float32(0), np.float32(1), np.float32(1))
    clipped = atari.normalize(t.reward, zero, run.args.clip_reward)
    np.testing.assert_array_equal(clipped, np.sign(t.reward))


def test_ram(atari):
    """What the console's memory holds, four steps of it, the newest last."""
    t, run = play(atari, "Pong-v5", 30, num_envs=2, obs="ram")
    assert t.obs.dtype == np.float32 and t.obs.shape == (31, 2, 512)
    pool = envpool.make(
        "Pong-v5",
        env_type="gymnasium",
        num_envs=2,
        seed=first_seeds(1, 2),
        episodic_life=True,
    )
    _, info = pool.reset()
    frames = [info["ram"]] * 4
    for i in range(30):
        np.testing.assert_array_equal(t.obs[i], np.concatenate(frames, axis=1))
        *_, info = pool.step(t.action[i])
        frames = [*frames[1:], info["ram"]]
    assert run.env.observation_space.shape == (512,)


def test_frames_are_stacked_within_an_episode(atari):
    t, _ = play(atari, "scripted:Chooser-v0", 16, frame_stack=3)
    count = np.array([0, 1, 2, 3, 4, 5, 6, 7] * 2 + [0]) / 7
    back = [np.maximum(np.arange(17) % 8 - k, 0) for k in (2, 1, 0)]
    stacked = np.stack([count[np.arange(17) - np.arange(17) % 8 + x] for x in back], axis=-1)
    np.testing.assert_allclose(t.obs[:, 0, ::2], stacked, rtol=1e-6)
    image, run = play(atari, "gymnax/Breakout-MinAtar", 4, frame_stack=2)
    assert image.obs.shape == (5, 2, 2, 10, 10, 4)
    assert atari.network_of(jnp.asarray(image.obs[0]), run.args) == "small"


def test_minatar_is_native_and_counts_from_zero(atari):
    t, run = play(atari, "gymnax/Breakout-MinAtar", 300)
    assert run.args.native and t.obs.shape == (301, 2, 10, 10, 4)
    assert_next_step_resets(t)
    assert set(np.unique(t.action)) == {0, 1, 2}


def test_protocols_give_other_flags_their_defaults(atari):
    args = atari.parse(["--protocol", "machado"])
    found = (args.episodic_life, args.fire_reset, args.noop_max, args.sticky_actions)
    assert (*found, args.full_action_space) == (False, False, 1, 0.25, True)
    given = ["--protocol", "machado", "--sticky-actions", "0.5"]
    assert atari.parse(given).sticky_actions == 0.5
    assert atari.parse([]) == atari.Args()
    _, run = play(atari, "Pong-v5", 2, full_action_space=True)
    assert run.env.action_space.n == 18


BAD = [
    ({"env_id": "Pendulum-v1"}, "is not one choice; for numbers there is ppo_continuous.py"),
    ({"env_id": "CartPole-v1", "obs": "ram"}, "--obs is for EnvPool's Atari"),
    ({"env_id": "CartPole-v1", "network": "nature"}, "take mlp"),
    ({"env_id": "gymnax/Breakout-MinAtar", "network": "nature"}, "try small"),
    ({"env_id": "CartPole-v1", "protocol": "machado"}, "--protocol is for EnvPool's Atari"),
    ({"env_id": "CartPole-v1", "noop_max": 1}, "--noop-max is for EnvPool's Atari"),
    ({"env_id": "Pong-v5", "obs": "ram", "norm_obs": False}, "--obs ram needs --norm-obs"),
    ({"norm_adv_once": True}, "add --no-norm-adv"),
    ({"env_id": "scripted:Labels-v0", "frame_stack": 2}, "--frame-stack"),
    ({"env_id": "Brekout-v5"}, "nearest: Breakout-v5"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: str(x)[:30])
def test_what_cannot_be_trained_gets_one_line(atari, settings, message):
    with pytest.raises(ValueError, match=message):  # InputError, or pydantic's
        atari.make_run(atari.Args(num_envs=1, **settings))


def test_human_normalised_scores(atari):
    """0 for a random policy, 1 for a human; of all 57 games that EnvPool has."""
    assert len(atari.RANDOM_AND_HUMAN) == 57
    known = {x.removesuffix("-v5") for x in envpool.list_all_envs() if atari.is_atari(x)}
    assert atari.RANDOM_AND_HUMAN.keys() <= known
    args = atari.Args(env_id="Breakout-v5")
    assert atari.judgement(30.5, None, args) == "; human-normalised 1.000"
    assert atari.judgement(1.7, None, args) == "; human-normalised 0.000"


# --- Update ---
def small_pixels(atari, **changes):
    settings = {"num_envs": 2, "num_steps": 4, "num_minibatches": 2, "update_epochs": 2}
    return atari.Args(total_timesteps=64, **settings | changes)


def pixel_rollout(atari, args):
    """Returns network, learner and a rollout of noise."""
    rng = np.random.default_rng(0)
    shape = (args.num_steps, args.num_envs)
    obs = rng.integers(256, size=(shape[0] + 1, shape[1], 4, 36, 36), dtype=np.uint8)
    network = atari.ActorCritic(spaces.Discrete(6), args)
    shown = atari.TimeStep(obs[0, 0], *[None] * 3)
    init = partial(atari.init_learner, shown=shown, network=network, args=args)
    learner = jax.jit(init)(np.uint32(0))
    policy, value = jax.jit(jax.vmap(network.apply, (None, 0)))(learner.params, obs[:-1])
    zeros = np.zeros(shape, np.float32)
    transition = atari.Transition(
        obs=obs,
        action=rng.integers(6, size=shape).astype(np.int32),
        policy=policy,
        value=value,
        reward=rng.normal(0, 1, shape).astype(np.float32),
        terminated=zeros,
        done=zeros,
        mask=zeros + 1,
        ended=zeros,
        episodic_return=zeros,
        episodic_length=zeros,
        discounted_return=zeros,
    )
    return network, learner, transition


def test_batch_has_what_the_network_said_in_the_rollout(atari):
    """Which is what it says when asked again, of the last observation as well."""
    for env_id in ("gymnax/Breakout-MinAtar", "CartPole-v1"):
        run, runner, learner = begin(atari, env_id, 6, num_minibatches=1)
        _, rollout = run.act(runner, learner)
        learner, rollout = jax.tree.map(lambda x: x[0], (learner, rollout))
        assert rollout.policy.logits.dtype == rollout.value.dtype == np.float32
        scaled = atari.normalize(rollout.obs, learner.obs_stats, run.args.clip_obs)
        rollout = rollout._replace(obs=scaled)
        ask = jax.jit(jax.vmap(run.network.apply, (None, 0)))
        policy, value = ask(learner.params, scaled)
        make_batch = jax.jit(partial(atari.make_batch, network=run.network, args=run.args))
        batch = make_batch(learner, rollout)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(batch.policy.logits, policy.logits[:-1].reshape(12, -1))
        close(batch.value, value[:-1].ravel())
        _, target = atari.rollout_advantages(learner, rollout, value, run.args)
        close(batch.target, target.ravel())
        other = rollout._replace(value=rollout.value + 1)  # nobody asks again
        again = make_batch(learner, other)
        close(again.value, batch.value + 1)


def test_rollouts_are_evaluated_piece_by_piece(atari, monkeypatch):
    """Whatever the number of rows at once, also where it does not divide the rollout."""
    network, learner, transition = pixel_rollout(atari, small_pixels(atari, network="ppo1"))
    for rows in (1, 4, 1000):
        monkeypatch.setattr(atari, "ROWS_AT_ONCE", rows)
        value = jax.jit(partial(atari.evaluate_rollout, network=network))(learner, transition)
        assert value.shape == (5, 2)
        np.testing.assert_allclose(value[:-1], transition.value, rtol=1e-4, atol=1e-5)


def test_advantages_normalised_once(atari):
    """Over each environment's own experience, also where recomputed; with a mask, in NumPy."""
    args = small_pixels(atari, network="ppo1", norm_adv=False, norm_adv_once=True)
    network, learner, transition = pixel_rollout(atari, args)
    mask = np.float32([[1, 1], [0, 1], [1, 1], [1, 0]])
    transition = transition._replace(mask=mask)
    batch = atari.make_batch(learner, transition, network, args)
    plain = args.model_copy(update={"norm_adv_once": False})
    raw = atari.make_batch(learner, transition, network, plain)
    np.testing.assert_allclose(batch.target, raw.target, rtol=1e-6)
    for n in range(2):
        advantage = raw.advantage.reshape(4, 2)[:, n]
        known = np.asarray(advantage)[mask[:, n] > 0]
        wanted = (advantage - known.mean()) / known.std()
        np.testing.assert_allclose(
            batch.advantage.reshape(4, 2)[:, n], wanted, rtol=1e-4, atol=1e-5
        )
    found = []
    for again in (False, True):
        settings = {"recompute_advantages": again, "update_epochs": 1}
        one = args.model_copy(update=settings)
        learnt, _ = jax.jit(partial(atari.update, network=network, args=one))(learner, transition)
        found.append(learnt.params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *found)


def test_update_lowers_for_accelerators(atari):
    args = small_pixels(atari)
    network, learner, transition = pixel_rollout(atari, args)
    update = jax.jit(partial(atari.update, network=network, args=args))
    assert all("stablehlo.dot_general" in text for text in lowered(update, (learner, transition)))


def test_images_have_no_statistics(atari):
    """They cost nothing, and the frames that the loss sees are the bytes of the rollout."""
    args = small_pixels(atari)
    network, learner, transition = pixel_rollout(atari, args)
    assert learner.obs_stats is None
    scaled = atari.normalize(transition.obs, None, args.clip_obs)
    batch = atari.make_batch(learner, transition._replace(obs=scaled), network, args)
    assert batch.obs.dtype == np.uint8
    np.testing.assert_array_equal(batch.obs, transition.obs[:-1].reshape(8, 4, 36, 36))
    _, metrics = jax.jit(partial(atari.update, network=network, args=args))(learner, transition)
    assert metrics["rollout/obs"].size <= 10 * 1000


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one thread would wait for itself")
@pytest.mark.parametrize("env_id", ["gymnasium:CartPole-v1", "Pong-v5"])
def test_policies_act_on_an_accelerator(atari, env_id, monkeypatch):
    """They do there what they do beside the environments; of two seeds, two learners in a row."""
    small = {"num_envs": 2, "num_seeds": 2, "num_steps": 6}
    found = []
    for place in (None, jax.local_devices()[0]):
        monkeypatch.setattr(atari, "accelerator_of_policies", lambda *_, place=place: place)
        run = atari.make_run(atari.Args(env_id=env_id, num_minibatches=1, **small))
        KEPT.append(run)
        runner = atari.first_runner(run)
        learner = run.init()
        runner, first = run.act(runner, learner)
        changed = jax.tree.map(lambda x: 100 * x, learner.params)
        _, second = run.act(
            runner, learner._replace(params=changed, iteration=learner.iteration + 1)
        )
        found.append((first, second))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert found[0][0].action.shape == (2, 6, 2) and np.ptp(found[0][0].action) > 0


def test_where_policies_act(atari, monkeypatch):
    """Beside the environments, but for images where there is an accelerator, or if told so."""
    image = SimpleNamespace(observation_space=spaces.Box(0, 255, (4, 84, 84), np.uint8))
    vector = SimpleNamespace(observation_space=spaces.Box(-1, 1, (4,)))
    place = partial(atari.accelerator_of_policies, image)
    assert place(atari.Args(act_on="device")) is None  # here is none
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(atari.jax, "local_devices", lambda: [gpu])
    assert place(atari.Args()) is place(atari.Args(act_on="device")) is gpu
    assert place(atari.Args(act_on="cpu")) is None
    assert place(atari.Args(env_id="gymnax/Breakout-MinAtar")) is None
    assert atari.accelerator_of_policies(vector, atari.Args()) is None
    assert atari.accelerator_of_policies(vector, atari.Args(act_on="device")) is gpu


# --- Runs ---
def test_pixels_train_and_play(tmp_path, atari):
    """Two iterations of Pong, an evaluation with a film in the game's colours, a policy."""
    line = ["--env-id", "Pong-v5", "--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2"]
    run = partial(execute, cwd=tmp_path, env=environment())
    script = ["python", atari.__spec__.origin]
    done = run([*script, *line, "--total-timesteps", "32", "--run-dir", "a"])
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "a")["timesteps"] == 32
    played = ["--mode", "eval", "--run-dir", "a", "--eval-episodes", "1", "--eval-steps", "20"]
    done = run([*script, *played, "--video"])
    assert done.returncode == 0, done.stderr
    assert "human-normalised" in done.stdout
    assert (tmp_path / "a/videos/Pong-v5.mp4").exists()
    frame = imageio.v3.imread(tmp_path / "a/videos/Pong-v5.mp4", index=5)
    assert np.ptp(frame.astype(int), axis=-1).max() > 50  # no grey
    policy = atari.load(tmp_path / "a")
    frames = np.zeros((4, 84, 84), np.uint8)
    assert policy(frames) in range(6)
    assert policy(np.stack([frames] * 3), deterministic=False).shape == (3,)


def act_and_record(runner, learner, run, taken):
    runner, transition = run.act(runner, learner)
    taken.append(np.asarray(transition.action).ravel())
    return runner, transition


def test_play_and_film_draw_fresh_noise(atari, tmp_path, monkeypatch):
    """An untrained policy that samples does not do the same in each rollout."""
    small = {"num_envs": 1, "num_steps": 4, "num_minibatches": 1, "eval_episodes": 3}
    shown = {"mode": "eval", "video": True, "run_dir": str(tmp_path)}
    args = atari.Args(env_id="CartPole-v1", **shown, **small)
    make_run = atari.make_run
    taken = []

    def recording(*given):
        run = make_run(*given)
        KEPT.append(run)
        return run._replace(act=partial(act_and_record, run=run, taken=taken))

    run = recording(args)
    learner = run.init()
    assert len(atari.play(run, learner)[0]) == 3
    assert len(np.unique(np.stack(taken), axis=0)) > 1
    taken.clear()
    monkeypatch.setattr(atari, "make_run", recording)
    atari.film(args, learner)
    assert len(np.unique(taken)) > 1
    assert (tmp_path / "videos/CartPole-v1.mp4").exists()


def test_play_scores_whole_games(atari):
    """A lost life ends no game."""
    settings = {"mode": "eval", "eval_episodes": 2, "network": "mlp", "hidden_sizes": (1,)}
    run, _, learner = begin(atari, "Breakout-v5", 100, num_envs=1, **settings)
    games = []

    def act(runner, learner):
        runner, t = run.act(runner, learner)
        games.extend(t.episodic_return[t.ended > 0])
        return runner, t

    assert atari.play(run._replace(act=act), learner)[0] == games[:2]
    assert len(games) >= 2


def test_learns_a_choice(tmp_path, atari):
    """CartPole from 20 to over 100 within 30k steps."""
    flags = "--env-id CartPole-v1 --num-envs 8 --num-steps 64 --learning-rate 1e-3 --frame-stack 1"
    more = "--hidden-sizes 32 32 --critic-sizes 32 32 --total-timesteps 30000 --clip-reward inf"
    line = ["python", atari.__spec__.origin, *flags.split(), *more.split(), "--run-dir", "a"]
    done = execute(line, tmp_path, environment())
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "a")["episodic_return"][0] > 100


# --- Mutants: (the test that must turn red, a text of the script, what a slip would make of it) ---
NEXT_NOISE = (
    "learner = learner._replace(iteration=learner.iteration + 1)  # of other noise\n        "
)
MUTANTS = [
    (test_distribution_of_choices, "return -jnp.sum(jnp.exp(log", "return jnp.sum(jnp.exp(log"),
    (
        test_distribution_of_choices,
        "old_log_probs - new_log_probs",
        "new_log_probs - old_log_probs",
    ),
    (test_sampled_choices_have_their_probabilities, "random.gumbel(", "random.normal("),
    (test_conv_is_the_librarys, "row @ kernel[i]", "row @ kernel[0]"),
    (test_conv_is_the_librarys, "transpose(0, 2, 1, 3, 4, 5)", "transpose(2, 0, 1, 3, 4, 5)"),
    (
        test_lives_are_ends_for_learning_only,
        'truncated | (info["terminated"] > 0)',
        "truncated | terminated",
    ),
    (test_lives_are_ends_for_learning_only, "episodic_length + mask)", "episodic_length + 1)"),
    (
        test_lives_are_ends_for_learning_only,
        '"episodic_life": args.episodic_life,',
        '"episodic_life": args.episodic_life and args.mode == "train",',
    ),
    (test_ram, "[frames[:, :, 1:], newest]", "[newest, frames[:, :, 1:]]"),
    (test_frames_are_stacked_within_an_episode, "newest, moved)", "moved, moved)"),
    (test_play_and_film_draw_fresh_noise, NEXT_NOISE + "ended", "ended"),
    (test_play_and_film_draw_fresh_noise, NEXT_NOISE + "over", "over"),
    (
        test_advantages_normalised_once,
        "jnp.mean(advantage * weight, axis=0)",
        "jnp.mean(advantage, axis=0)",
    ),
    (
        test_advantages_normalised_once,
        "rollout_advantages(learner, rollout, value, args)\n        advantage",
        "compute_gae(rollout, value, 0.99, 0.95)\n        advantage",
    ),
    (
        test_batch_has_what_the_network_said_in_the_rollout,
        "learner.params, rollout.obs[-1])",
        "learner.params, rollout.obs[-2])",
    ),
    (
        test_policies_act_on_an_accelerator,
        "            actor.take(learner.params)",
        "            actor.params or actor.take(learner.params)",
    ),
    (test_play_scores_whole_games, "ended = transition.ended > 0", "ended = transition.done > 0"),
    (test_which_axis_has_the_channels, "signs.add(middle == last)", "signs.add(first == middle)"),
    (
        test_images_have_no_statistics,
        "if stats is None:\n        return x",
        "if stats is None:\n        return x / 255",
    ),
]


CASES = {
    "test_conv_is_the_librarys": [(20, 20, 3, 4, 2), (9, 9, 5, 3, 1)],
    "test_which_axis_has_the_channels": [((20, 7, 7), True)],
}


@pytest.mark.parametrize(
    ("test", "text", "slip"), MUTANTS, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
def test_mutant_is_killed(test, text, slip, tmp_path, monkeypatch):
    mutant = mutate("ppo_atari", text, slip)
    cases = CASES.get(test.__name__, [()])
    if test is test_policies_act_on_an_accelerator:
        cases = [("CartPole-v1", monkeypatch)]
    if test is test_play_and_film_draw_fresh_noise:
        cases = [(tmp_path, monkeypatch)]
    with pytest.raises(AssertionError):
        for case in cases:
            test(mutant, *case)
