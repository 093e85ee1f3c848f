"""What is ppo_atari.py's own: choices, convolutions, lives, RAM, stacked frames, protocols."""

import math
import threading
from dataclasses import replace
from functools import partial

import envpool
import imageio.v3
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import lowered
from conftest import ROOT, environment, mutate
from gymnasium import spaces
from processes import execute
from runs import result
from test_environments import KEPT, assert_next_step_resets, play

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
        tops = atari.spread(policy)["policy/most_likely"]
    for i in range(B):
        p, q = softmax(old[i]), softmax(new[i])
        np.testing.assert_allclose(log_probs[i], math.log(q[action[i]]), rtol=1e-12)
        np.testing.assert_allclose(entropies[i], -sum(q * np.log(q)), rtol=1e-12)
        np.testing.assert_allclose(divergences[i], sum(p * np.log(p / q)), rtol=1e-11)
    np.testing.assert_allclose(tops, np.mean([softmax(x).max() for x in new]), rtol=1e-12)


def test_sampled_choices_have_their_probabilities(atari):
    logits = np.array([0.5, -1.0, 2.0], np.float32)
    noise = atari.draw_noise(jax.random.PRNGKey(0), (100_000,), spaces.Discrete(3))
    policy = atari.Categorical(logits=jnp.asarray(logits))
    counts = np.bincount(atari.sample_action(policy, noise), minlength=3) / len(noise)
    np.testing.assert_allclose(counts, softmax(logits), atol=0.006)
    assert atari.sample_action(policy, 0 * noise[0]) == 2
    assert atari.env_action(jnp.int32(2), spaces.Discrete(3, start=7), None) == 9


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
        numbers = s | {"learning_rate": 1.0, "kl_coef": 1.0, "gamma": 0.9, "gae_lambda": 0.9}
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
@pytest.mark.parametrize(
    ("height", "width", "channels", "size", "stride"),
    [(84, 84, 4, 8, 4), (20, 20, 3, 4, 2), (9, 9, 5, 3, 1), (19, 22, 2, 4, 2), (11, 9, 2, 3, 2)],
)
def test_conv_is_the_librarys(atari, height, width, channels, size, stride):
    """In value and in both gradients."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (2, height, width, channels))
    kernel = rng.normal(0, 1, (size, size, channels, 3))
    with jax.enable_x64(True):
        found = {}
        for conv in (atari.conv, atari.conv_by_products, atari.conv_by_library):

            def loss(x, kernel, conv=conv):
                return jnp.sum(jnp.sin(conv(x, kernel, stride)))

            value = conv(jnp.asarray(x), jnp.asarray(kernel), stride)
            found[conv.__name__] = (value, *jax.grad(loss, argnums=(0, 1))(x, kernel))
    library = found.pop("conv_by_library")
    for mine in found.values():
        for a, b in zip(mine, library, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


def test_channels_come_last(atari):
    """Of all layouts of one image, and of stacks of images."""
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(2, 12, 10, 3), dtype=np.uint8)
    wanted = image / 255
    np.testing.assert_allclose(atari.channels_last(jnp.asarray(image)), wanted, rtol=1e-6)
    front = jnp.asarray(image.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(atari.channels_last(front), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        atari.channels_last(jnp.asarray(image[..., 0])), wanted[..., :1], rtol=1e-6
    )
    stack = jnp.asarray(np.stack([image, 255 - image], axis=1))
    both = np.concatenate([wanted, 1 - wanted], axis=-1)
    np.testing.assert_allclose(atari.channels_last(stack), both, rtol=1e-6, atol=1e-6)


NETWORKS = [
    ("auto", (4, 84, 84), "nature"),
    ("auto", (10, 10, 4), "small"),
    ("auto", (512,), "mlp"),
    ("impala", (64, 64, 3), "impala"),
    ("ppo1", (4, 84, 84), "ppo1"),
    ("mlp", (10, 10, 4), "mlp"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "shape", "meant"), NETWORKS)
def test_networks(atari, name, shape, meant, dtype):
    """Outputs are float32 and finite, seeds side by side are lone ones, parameters as wanted."""
    args = atari.Args(network=name, dtype=dtype)
    obs = np.random.default_rng(0).integers(256, size=(3, *shape), dtype=np.uint8)
    network = atari.ActorCritic(spaces.Discrete(6), args)
    assert atari.network_of(jnp.asarray(obs), args) == meant
    params = jax.vmap(lambda key: network.init(key, obs))(jax.random.split(jax.random.PRNGKey(0)))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    policy, value = jax.vmap(network.apply, in_axes=(0, None))(params, obs)
    assert policy.logits.shape == (2, 3, 6) and value.shape == (2, 3)
    assert policy.logits.dtype == value.dtype == np.float32
    lone, alone = network.apply(jax.tree.map(lambda x: x[1], params), obs)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.1, "atol": 0.02}
    np.testing.assert_allclose(policy.logits[1], lone.logits, **tolerance)
    np.testing.assert_allclose(value[1], alone, **tolerance)
    assert np.abs(policy.logits).max() < 0.2  # nearly uniform at first
    if meant == "nature":
        sizes = {"conv_0": 8224, "conv_1": 32832, "conv_2": 36928, "dense": 1606144}
        found = {k: sum(x[0].size for x in jax.tree.leaves(v)) for k, v in params["params"].items()}
        assert found == sizes | {"policy": 3078, "critic": 513}


def test_normc(atari):
    """Units of norm 1, the policy's 0.01, as ppo1 has them."""
    network = atari.ActorCritic(spaces.Discrete(6), atari.Args(network="ppo1", init="normc"))
    params = network.init(jax.random.PRNGKey(0), np.zeros((1, 4, 84, 84), np.uint8))["params"]
    for name, norm in (("dense", 1), ("policy", 0.01), ("critic", 1)):
        norms = np.linalg.norm(params[name]["kernel"], axis=0)
        np.testing.assert_allclose(norms, norm, rtol=1e-5)


# --- Environments ---
def test_rollout_is_what_envpool_itself_does(atari):
    """Bytes stay bytes; rewards, frames and ends are those of EnvPool stepped from Python."""
    t, run = play(atari, "Breakout-v5", 400, **TINY)
    assert t.obs.dtype == np.uint8 and t.obs.shape == (401, 2, 1, 4, 84, 84)
    seeds = atari.seeds_of_envs(run.args)
    pool = envpool.make(
        "Breakout-v5", env_type="gymnasium", num_envs=2, seed=seeds, episodic_life=True
    )
    obs, info = pool.reset()
    over = np.zeros(2, bool)
    total = np.zeros(2)
    for i in range(400):
        np.testing.assert_array_equal(t.obs[i, :, 0], obs)
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
    one = jax.tree.map(lambda x: x[0], run.learner.return_stats)
    clipped = atari.normalize(t.reward, one, run.args.clip_reward)
    np.testing.assert_array_equal(clipped, np.sign(t.reward))


def test_ram(atari):
    """What the console's memory holds, four steps of it, the newest last."""
    t, run = play(atari, "Pong-v5", 30, num_envs=2, obs="ram")
    assert t.obs.dtype == np.uint8 and t.obs.shape == (31, 2, 1, 512)
    pool = envpool.make(
        "Pong-v5",
        env_type="gymnasium",
        num_envs=2,
        seed=atari.seeds_of_envs(run.args),
        episodic_life=True,
    )
    _, info = pool.reset()
    frames = [info["ram"]] * 4
    for i in range(30):
        np.testing.assert_array_equal(t.obs[i, :, 0], np.concatenate(frames, axis=1))
        *_, info = pool.step(t.action[i])
        frames = [*frames[1:], info["ram"]]
    assert run.env.observation_space.shape == (512,)


def test_frames_are_stacked_within_an_episode(atari):
    t, _ = play(atari, "scripted:Chooser-v0", 16, frame_stack=3)
    count = np.array([0, 1, 2, 3, 4, 5, 6, 7] * 2 + [0]) / 7
    back = [np.maximum(np.arange(17) % 8 - k, 0) for k in (2, 1, 0)]
    stacked = np.stack([count[np.arange(17) - np.arange(17) % 8 + x] for x in back], axis=-1)
    np.testing.assert_allclose(t.obs[:, 0, 0, ::2], stacked, rtol=1e-6)
    image, run = play(atari, "gymnax/Breakout-MinAtar", 4, frame_stack=2)
    assert image.obs.shape == (5, 2, 1, 2, 10, 10, 4)
    assert atari.network_of(jnp.asarray(image.obs[0, :, 0]), run.args) == "small"


def test_minatar_is_native_and_counts_from_zero(atari):
    t, run = play(atari, "gymnax/Breakout-MinAtar", 300)
    assert run.env.native and t.obs.shape == (301, 2, 1, 10, 10, 4)
    assert_next_step_resets(t)
    assert set(np.unique(t.action)) == {0, 1, 2}


def test_protocols_give_other_flags_their_defaults(atari):
    args = atari.parse(["--protocol", "machado"], default=atari.Args())
    found = (args.episodic_life, args.fire_reset, args.noop_max, args.sticky_actions)
    assert (*found, args.full_action_space) == (False, False, 1, 0.25, True)
    given = ["--protocol", "machado", "--sticky-actions", "0.5"]
    assert atari.parse(given, default=atari.Args()).sticky_actions == 0.5
    plain = atari.Args()
    for name, value in atari.PROTOCOLS["openai"].items():
        assert getattr(plain, name) == value
    _, run = play(atari, "Pong-v5", 2, full_action_space=True)
    assert run.env.action_space.n == 18


BAD = [
    ({"env_id": "Pendulum-v1"}, "Box actions"),
    ({"env_id": "CartPole-v1", "obs": "ram"}, "--obs ram is for EnvPool's Atari"),
    ({"env_id": "CartPole-v1", "network": "nature"}, "--network mlp"),
    ({"env_id": "gymnax/Breakout-MinAtar", "network": "nature"}, "try small"),
    ({"env_id": "scripted:Labels-v0", "frame_stack": 2}, "--frame-stack"),
    ({"env_id": "Brekout-v5"}, "nearest: Breakout-v5"),
    ({"env_id": "gymnax/Breakout-MinAtar", "overlap": True}, "--overlap is for environments on"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: str(x)[:30])
def test_what_cannot_be_trained_gets_one_line(atari, settings, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        args = atari.Args(**settings)
        atari.validate(args)
        atari.make_env(args, [1])
    assert stopped.value.code == 2


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
    obs = rng.integers(256, size=(shape[0] + 1, shape[1], 1, 4, 84, 84), dtype=np.uint8)
    network = atari.ActorCritic(spaces.Discrete(6), args)
    learner = atari.init_learner(np.uint32(0), obs[0, 0, 0], network, args)
    zeros = np.zeros(shape, np.float32)
    transition = atari.Transition(
        obs=obs,
        action=rng.integers(6, size=shape).astype(np.int32),
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


def test_what_was_said_is_what_the_network_says(atari):
    """What a rollout kept of the network's answers equals asking again, also for the last row."""
    args = atari.Args(env_id="Pong-v5", num_envs=2, num_steps=5)
    run = atari.make_run(args, atari.seeds_of_envs(args))
    KEPT.append(run)
    _, transition = run.act(run.runner, run.learner._replace(opt_state=None))
    learner, rollout = jax.tree.map(lambda x: x[0], (run.learner, transition))
    kept = atari.apply_to_rollout(learner, rollout, run.network)
    anew = atari.apply_to_rollout(learner, rollout._replace(said=None), run.network)
    for mine, again in zip(jax.tree.leaves(kept), jax.tree.leaves(anew), strict=True):
        assert mine.shape[:3] == (6, 2, 1)
        assert np.ptp(again) > 0
        np.testing.assert_allclose(mine, again, rtol=1e-4, atol=1e-5)


def test_epochs_ask_again(atari):
    """Updates are the same without what the rollout kept, also where advantages are recomputed."""
    small = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "learning_rate": 0.01}
    args = atari.Args(env_id="CartPole-v1", recompute_advantages=True, **small)
    run = atari.make_run(args, atari.seeds_of_envs(args))
    KEPT.append(run)
    _, transition = run.act(run.runner, run.learner._replace(opt_state=None))
    learner, rollout = jax.tree.map(lambda x: x[0], (run.learner, transition))
    update = jax.jit(partial(atari.update, network=run.network, args=args))
    once = jax.jit(
        partial(atari.update, network=run.network, args=replace(args, recompute_advantages=False))
    )
    kept, _ = update(learner, rollout)
    anew, _ = update(learner, rollout._replace(said=None))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, kept.params, anew.params)
    other, _ = once(learner, rollout)
    change = jax.tree.map(lambda x, y: np.abs(x - y).max(), kept.params, other.params)
    assert max(jax.tree.leaves(change)) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_update_lowers_for_accelerators(atari, dtype):
    """With the library's convolutions."""
    args = small_pixels(atari, dtype=dtype)
    network, learner, transition = pixel_rollout(atari, args)
    update = jax.jit(partial(atari.update, network=network, args=args))
    for text in lowered(update, (learner, transition)):
        assert "stablehlo.convolution" in text
        assert ("bf16" in text) == (dtype == "bfloat16")


def test_images_have_no_statistics(atari):
    """They cost nothing, and the frames that the loss sees are the bytes of the rollout."""
    args = small_pixels(atari)
    network, learner, transition = pixel_rollout(atari, args)
    obs_stats, return_stats = atari.update_statistics(learner, transition, args)
    jax.tree.map(np.testing.assert_array_equal, obs_stats, learner.obs_stats)
    assert return_stats.count == learner.return_stats.count
    scaled = atari.normalize(transition.obs, obs_stats, args.clip_obs)
    batch = atari.make_batch(learner, transition._replace(obs=scaled), network, args)
    assert batch.obs.dtype == np.uint8
    np.testing.assert_array_equal(batch.obs, transition.obs[:-1].reshape(8, 4, 84, 84))


def seconds():
    return {"acting": 0.0, "learning": 0.0}


def test_overlapped_policies_are_one_update_older(atari):
    """Four iterations equal rollouts and updates in turn, of learners that are remembered."""
    small = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2}
    args = atari.Args(env_id="CartPole-v1", total_timesteps=64, overlap=True, **small)
    run, again = [atari.make_run(args, atari.seeds_of_envs(args)) for _ in range(2)]
    KEPT.extend([run, again])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("process", "seed"))
    advance, runner = atari.make_advance(run, mesh)
    learner = run.learner
    for _ in range(args.num_iterations):
        learner, runner, *_ = advance(learner, runner, 1, seconds())

    update = jax.jit(jax.vmap(partial(atari.update, network=again.network, args=args)))
    learners = [again.learner]
    runner = again.runner
    for k in range(args.num_iterations):
        acting = learners[max(k - 1, 0)]._replace(opt_state=None, iteration=learners[k].iteration)
        runner, transition = again.act(runner, acting)
        learners.append(jax.device_get(update(learners[k], transition)[0]))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, learner.params, learners[-1].params)
    assert learner.iteration == 4
    np.testing.assert_array_equal(learner.episodes, learners[-1].episodes)


def test_older_policies_are_corrected_for(atari):
    """Steps weigh by how much likelier their actions have become, and the rest is asked anew."""
    small = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "learning_rate": 0.01}
    args = atari.Args(env_id="CartPole-v1", overlap=True, norm_obs=False, **small)
    run = atari.make_run(args, atari.seeds_of_envs(args))
    KEPT.append(run)
    _, transition = run.act(run.runner, run.learner._replace(opt_state=None))
    older, rollout = jax.tree.map(lambda x: x[0], (run.learner, transition))
    update = jax.jit(partial(atari.update, network=run.network, args=args))
    learner, _ = update(older, rollout)
    found = atari.correct_for_age(learner, rollout, run.network)

    weight = np.zeros((32, 4))
    value = np.zeros((32, 4))
    for t in range(32):
        before, _ = run.network.apply(older.params, rollout.obs[t, :, 0])
        now, value[t] = run.network.apply(learner.params, rollout.obs[t, :, 0])
        for n in range(4):
            action = rollout.action[t, n]
            likelier = softmax(now.logits[n])[action] / softmax(before.logits[n])[action]
            weight[t, n] = likelier * rollout.mask[t, n]
    assert np.min(rollout.mask) == 0
    assert np.ptp(weight[rollout.mask > 0]) > 0.1
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(found.mask, weight)
    close(found.said[1], value)
    own = atari.correct_for_age(older, rollout, run.network)
    close(own.mask, rollout.mask)
    jax.tree.map(close, own.said, rollout.said)

    plain = partial(atari.update, network=run.network, args=replace(args, overlap=False))
    by_hand, _ = jax.jit(plain)(learner, found)
    corrected, _ = update(learner, rollout)
    jax.tree.map(close, corrected.params, by_hand.params)


def test_copies_weigh_as_their_originals(atari):
    """A mirror image counts as its original has become likelier, and has its own probability."""
    small = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "learning_rate": 0.01}
    env_id = "scripted:MirroredChooser-v0"
    args = atari.Args(env_id=env_id, overlap=True, norm_obs=False, **small)
    run = atari.make_run(args, atari.seeds_of_envs(args))
    KEPT.append(run)
    _, transition = run.act(run.runner, run.learner._replace(opt_state=None))
    older, rollout = jax.tree.map(lambda x: x[0], (run.learner, transition))
    learner, _ = jax.jit(partial(atari.update, network=run.network, args=args))(older, rollout)
    found = atari.correct_for_age(learner, rollout, run.network)
    batch = atari.make_batch(learner, found, run.network, args)

    row = 0
    weights = []
    for t in range(16):
        for n in range(2):
            before, _ = run.network.apply(older.params, rollout.obs[t, n])  # of both copies
            now, _ = run.network.apply(learner.params, rollout.obs[t, n])
            action = rollout.action[t, n]
            weight = softmax(now.logits[0])[action] / softmax(before.logits[0])[action]
            weights.append(weight * rollout.mask[t, n])
            for copy in range(2):
                np.testing.assert_allclose(batch.mask[row], weights[-1], rtol=1e-4)
                mine = math.log(softmax(now.logits[copy])[action])
                np.testing.assert_allclose(batch.log_prob[row], mine, rtol=1e-3, atol=1e-5)
                row += 1
    assert len(batch.mask) == row
    assert np.ptp(weights) > 0.01


def test_overlapped_rollouts_run_beside_the_update(atari):
    """Each waits for the other, but the first rollout and the last update, which are alone."""
    args = atari.Args(num_envs=1, num_steps=1, num_minibatches=1, total_timesteps=3, overlap=True)
    meeting = threading.Barrier(2, timeout=20)
    called = []

    def act(runner, learner, seconds):
        if runner > 0:
            meeting.wait()
        called.append(("rollout", runner, learner.obs_stats))
        return runner + 1, runner

    def improve(learner, transition, seconds):
        if transition < 2:
            meeting.wait()
        called.append(("update", transition))
        found = learner._replace(obs_stats=transition + 1, iteration=learner.iteration + 1)
        return found, {}, 0

    learner = atari.LearnerState(*[None] * len(atari.LearnerState._fields))
    learner = learner._replace(obs_stats=0, iteration=np.array([0]))
    advance = atari.overlapped(act, improve, args)
    runner = 0
    for _ in range(3):
        learner, runner, *_ = advance(learner, runner, 1, seconds())
    rollouts = [x for x in called if x[0] == "rollout"]
    assert rollouts == [("rollout", 0, 0), ("rollout", 1, 0), ("rollout", 2, 1)]
    assert [x for x in called if x[0] == "update"] == [("update", x) for x in range(3)]


# --- Runs ---
def test_pixels_train_resume_and_play(tmp_path, atari):
    """Two iterations of Pong, a third, an evaluation with a film in the game's colours."""
    line = ["--env-id", "Pong-v5", "--num-envs", "2", "--num-steps", "8", "--num-minibatches", "2"]
    run = partial(execute, cwd=tmp_path, env=environment())
    script = ["python", atari.__spec__.origin]
    for steps in (32, 48):
        train = [*script, *line, "--total-timesteps", str(steps), "--run-dir", "a"]
        done = run(train)
        assert done.returncode == 0, done.stderr
        assert result(tmp_path / "a")["timesteps"] == steps
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


def recorded(run, taken):
    """Returns a run that appends the actions of each rollout to a list."""
    KEPT.append(run)

    def act(runner, learner):
        runner, transition = run.act(runner, learner)
        taken.append(np.asarray(transition.action).ravel())
        return runner, transition

    return run._replace(act=act)


def test_play_and_film_draw_fresh_noise(atari, tmp_path, monkeypatch):
    """An untrained policy that samples does not do the same in each rollout."""
    small = "--num-envs 1 --num-steps 8 --num-minibatches 2 --total-timesteps 16 --run-dir a"
    line = ["python", str(ROOT / "ppo_atari.py"), "--env-id", "CartPole-v1", *small.split()]
    execute(line, tmp_path, environment()).check_returncode()
    saved = atari.read_run(tmp_path / "a")
    args = replace(saved.args, mode="eval", num_steps=4)
    original = atari.make_run
    taken = []

    def make_run(*given, **more):
        return recorded(original(*given, **more), taken)

    monkeypatch.setattr(atari, "make_run", make_run)
    atari.play(atari.make_run(args, atari.seeds_of_envs(args)), saved.learner, 3)
    assert len(np.unique(np.stack(taken), axis=0)) > 1
    taken.clear()
    atari.film(args, saved)
    assert len(np.unique(taken)) > 1
    assert (tmp_path / "a/videos/CartPole-v1.mp4").exists()


def test_learns_a_choice(tmp_path, atari):
    """CartPole from 20 to over 100 within 30k steps."""
    flags = "--env-id CartPole-v1 --num-envs 8 --num-steps 64 --learning-rate 1e-3 --frame-stack 1"
    more = "--hidden-sizes 32 32 --critic-sizes 32 32 --total-timesteps 30000 --clip-reward inf"
    line = ["python", atari.__spec__.origin, *flags.split(), *more.split(), "--run-dir", "a"]
    done = execute(line, tmp_path, environment())
    assert done.returncode == 0, done.stderr
    assert result(tmp_path / "a")["episodic_return"][0] > 100


# --- Mutants: (the test that must turn red, a text of the script, what a slip would make of it) ---
MUTANTS = [
    (test_distribution_of_choices, "return -jnp.sum(jnp.exp(log", "return jnp.sum(jnp.exp(log"),
    (
        test_distribution_of_choices,
        "old_log_probs - new_log_probs",
        "new_log_probs - old_log_probs",
    ),
    (test_sampled_choices_have_their_probabilities, "random.gumbel(", "random.normal("),
    (test_conv_is_the_librarys, "product(row, kernel[i]", "product(row, kernel[0]"),
    (test_conv_is_the_librarys, "transpose(0, 2, 1, 3, 4, 5)", "transpose(2, 0, 1, 3, 4, 5)"),
    (test_lives_are_ends_for_learning_only, 'truncated | (info["terminated"] > 0)', "None"),
    (test_lives_are_ends_for_learning_only, "episode.length + mask)", "episode.length + 1)"),
    (
        test_lives_are_ends_for_learning_only,
        '"episodic_life": args.episodic_life,',
        '"episodic_life": args.episodic_life and args.mode == "train",',
    ),
    (test_ram, "[old[:, 1:], x[:, None]]", "[x[:, None], old[:, 1:]]"),
    (test_frames_are_stacked_within_an_episode, "repeated(x), moved)", "moved, moved)"),
    (test_epochs_ask_again, "scaled._replace(said=None)", "scaled"),
    (test_older_policies_are_corrected_for, "mask=rollout.mask * weight)", "mask=rollout.mask)"),
    (test_older_policies_are_corrected_for, "- log_prob(older_policy", "+ log_prob(older_policy"),
    (test_older_policies_are_corrected_for, "scaled = correct_for_age(", "_ = correct_for_age("),
    (
        test_overlapped_policies_are_one_update_older,
        "runner, with_fresh_noise(learner),",
        "runner, learner,",
    ),
    (
        test_images_have_no_statistics,
        "if is_image(stats):\n        return x",
        "if False:\n        return x",
    ),
]


@pytest.mark.parametrize(
    ("test", "text", "slip"), MUTANTS, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
def test_mutant_is_killed(test, text, slip):
    mutant = mutate("ppo_atari", text, slip)
    cases = [(20, 20, 3, 4, 2), (9, 9, 5, 3, 1)] if test is test_conv_is_the_librarys else [()]
    with pytest.raises(AssertionError):
        for case in cases:
            test(mutant, *case)
