"""What is ppo_icm_lstm.py's own: memory, curiosity, choices, masks of actions, regulators."""

import math
from functools import partial, wraps

import flax.linen as nn
import gymnasium
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scripted
from checks import (
    CHECKS,
    CLOSE,
    SPACE,
    D,
    N,
    T,
    lowered,
    rollout,
    small_args,
    to_double,
    to_single,
)
from conftest import ROOT, environment, mutate
from gymnasium import spaces
from processes import execute
from runs import result

H = 3
COPIES = 2
KEPT = []  # EnvPool's compiled calls hold a bare pointer: a pool must outlive them
MANY = spaces.MultiDiscrete([3, 2, 4])


STEPS = ("mask", "done", "terminated", "reward")


def in_double(test):
    """Returns a test in which everything is float64."""

    @wraps(test)
    def run(*given, **more):
        with jax.enable_x64(True):
            test(*given, **more)

    return run


def new_learner(icm, seed, parts, network, args):
    """Returns a learner for environments that show such parts of observations."""
    obs = jax.tree.map(lambda x: jnp.zeros_like(x)[None], parts)
    shown = icm.TimeStep(obs, np.float32(0), False, False)
    init = partial(icm.init_learner, shown=shown, network=network, args=args)
    return jax.jit(init)(np.uint32(seed))


def start(icm, args, memory=(), copies=1):
    """Returns a network, a float64 learner that is not new, and a rollout, twice.

    The rollout is once of the script's type and once a dict.
    """
    network = icm.ActorCritic(SPACE, args)
    rng = np.random.default_rng(4)
    r = rollout(rng)
    learner = new_learner(icm, 3, {"obs": np.zeros(D, np.float32)}, network, args)
    learner = jax.tree.map(to_double, learner)
    moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(0, 1, x.shape), learner.params)
    numbers = icm.RunningStats(rng.normal(0, 1, D), rng.uniform(1, 2, D), np.float64(50))
    learner = learner._replace(
        params=moved,
        iteration=jnp.int32(3),
        obs_stats={"obs": numbers},
        return_stats=icm.RunningStats(np.float64(0.3), np.float64(2), np.float64(50)),
    )
    obs = r["obs"][:, :, None] + rng.normal(0, 1, (1, 1, copies, 1)) * (copies > 1)
    fields = {name: r[name] for name in icm.Transition._fields if name in r}
    return network, learner, icm.Transition(**fields | {"obs": {"obs": obs}}, memory=memory), r


def play(icm, env_id, steps, rollouts=1, **settings):
    """Returns rollouts of a fresh policy by the script itself, leaves [T, N, ...], and its run."""
    plain = {"num_envs": 2, "num_minibatches": 1, "hidden_sizes": (4,)}
    args = icm.Args(env_id=env_id, num_steps=steps, **plain | settings)
    run = icm.make_run(args)
    KEPT.append(run)
    learner = run.init()
    runner = icm.first_runner(run)
    seen = []
    for _ in range(rollouts):
        start = runner.memory
        runner, transition = run.act(runner, learner)
        jax.tree.map(
            np.testing.assert_array_equal, start, jax.tree.map(lambda x: x[:, 0], transition.memory)
        )
        seen.append(jax.tree.map(lambda x: np.asarray(x)[0], transition))
    return seen, run, jax.tree.map(lambda x: x[0], learner)


def assert_next_step_resets(t):
    """Ends are followed by one step of mask 0 and reward 0, and only they."""
    np.testing.assert_array_equal(t.mask[1:], 1 - t.done[:-1])
    assert t.done.sum() > 0
    assert not np.any(t.reward[t.mask == 0])


# --- Without memory and curiosity it is ppo_continuous.py ---
@pytest.mark.parametrize("name", ["distribution", "loss", "env_action"])
def test_formula(icm, name):
    """Of what is not the text of ppo_continuous.py, whose formulas have these tests already."""
    next(check for check in CHECKS if check.__name__ == f"check_{name}")(icm)


@pytest.mark.parametrize("recompute", [False, True])
def test_update_is_that_of_ppo_continuous(ppo, icm, recompute):
    """Same batch, same parameters, float32: the same learner, but for rounding."""
    args = small_args(icm, recompute_advantages=recompute)
    network, learner, transition, r = start(icm, args)
    plain = small_args(ppo, recompute_advantages=recompute)
    numbers = learner.schedule._asdict()
    fields = {name: getattr(learner, name) for name in ppo.LearnerState._fields}
    fields["opt_state"] = learner.opt_state.adam
    fields["obs_stats"] = ppo.RunningStats(*learner.obs_stats["obs"])
    fields["return_stats"] = ppo.RunningStats(*learner.return_stats)
    fields["schedule"] = ppo.Schedule(**{name: numbers[name] for name in ppo.Schedule._fields})
    steps = ppo.Transition(**{name: r[name] for name in ppo.Transition._fields})
    cases = (
        (icm, network, args, learner, transition),
        (ppo, ppo.ActorCritic(SPACE, plain), plain, ppo.LearnerState(**fields), steps),
    )
    found = []
    for script, network, args, learner, transition in cases:
        inputs = jax.tree.map(to_single, (learner, transition))
        found.append(jax.jit(partial(script.update, network=network, args=args))(*inputs))
    (one, seen), (two, same) = found
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for name in ("params", "obs_stats", "return_stats", "returns"):
        leaves = (jax.tree.leaves(getattr(x, name)) for x in (one, two))
        for mine, theirs in zip(*leaves, strict=True):
            close(mine, theirs)
    assert seen.keys() == same.keys()
    jax.tree.map(close, seen, same)


def test_it_begins_as_ppo_continuous(ppo, icm):
    """The first parameters, too, are its."""
    settings = {"env_id": "Pendulum-v1", "critic_sizes": (7,), "num_minibatches": 1}
    params = [x.make_run(x.Args(**settings)).init().params for x in (ppo, icm)]
    jax.tree.map(np.testing.assert_array_equal, *params)


# --- Choices ---
def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


@in_double
def test_distribution_of_several_choices(icm):
    """Against sums over all actions, some of which are masked, for choices of 3, 2 and 4."""
    rng = np.random.default_rng(0)
    allowed = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1]) > 0
    shown = icm.allowed_choices(jnp.asarray(allowed)[None], MANY)[0]
    wanted = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]]
    np.testing.assert_array_equal(shown, wanted)
    every = icm.allowed_choices(None, MANY)
    np.testing.assert_array_equal(every, [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    logits = rng.normal(0, 1, (2, 3, 4))
    old, new = (icm.Categorical(jnp.where(shown, x, icm.IMPOSSIBLE)) for x in logits)
    p, q = ([softmax(np.asarray(x)) for x in policy.logits] for policy in (old, new))
    total = entropy = divergence = 0.0
    for action in np.ndindex(2, 2, 4):
        if action[2] in (1, 2):
            continue
        of_old = math.prod(p[u][a] for u, a in enumerate(action))
        of_new = math.prod(q[u][a] for u, a in enumerate(action))
        found = icm.log_prob(new, jnp.array(action))
        np.testing.assert_allclose(found, math.log(of_new), rtol=1e-12)
        total += of_new
        entropy -= of_new * math.log(of_new)
        divergence += of_old * math.log(of_old / of_new)
    np.testing.assert_allclose(total, 1, rtol=1e-12)
    np.testing.assert_allclose(icm.entropy(new), entropy, rtol=1e-12)
    np.testing.assert_allclose(icm.kl(old, new), divergence, rtol=1e-10)


def test_sampled_choices_have_their_probabilities(icm):
    logits = np.array([[0.5, -1.0, 2.0], [1.0, 0.0, icm.IMPOSSIBLE]], np.float32)
    space = spaces.MultiDiscrete([3, 2])
    noise = icm.draw_noise(jax.random.PRNGKey(0), (100_000,), space)
    action = np.asarray(icm.sample_action(icm.Categorical(jnp.asarray(logits)), noise))
    for u in range(2):
        counts = np.bincount(action[:, u], minlength=3) / len(action)
        np.testing.assert_allclose(counts, softmax(logits[u]), atol=0.006)
    assert not (action[:, 1] == 2).any()


def test_a_mask_that_leaves_nothing_leaves_all_of_the_own_choices(icm):
    shown = icm.allowed_choices(jnp.zeros((1, 5), bool), spaces.MultiDiscrete([3, 2]))
    np.testing.assert_array_equal(shown, [[[1, 1, 1], [1, 1, 0]]])


def test_actions_at_the_environments_door(icm):
    args = icm.Args()
    one = icm.env_action(jnp.array([[2]]), spaces.Discrete(3, start=7), args)
    np.testing.assert_array_equal(one, [9])
    several = spaces.MultiDiscrete([[3, 2], [4, 5]], start=[[0, 1], [0, 2]])
    found = icm.env_action(jnp.array([[2, 1, 3, 4]]), several, args)
    np.testing.assert_array_equal(found, [[[2, 2], [3, 6]]])
    bits = icm.env_action(jnp.array([[1, 0]]), spaces.MultiBinary(2), args)
    np.testing.assert_array_equal(bits, [[1, 0]])
    assert bits.dtype == np.int8


@pytest.mark.parametrize("kind", ["info", "key"])
def test_masked_actions_are_never_taken(icm, kind):
    """The environment raises at one; where nothing is masked, all are taken."""
    env_id = f"scripted:Masked-{kind}-v0"
    (t,), run, learner = play(icm, env_id, 200)
    mask = t.obs["action_mask"]
    assert mask.dtype == bool
    step = np.arange(200) % 8
    taken = [set(t.action[step == i].ravel().tolist()) for i in range(8)]
    assert taken[:7] == [{0, 1, 2} - {i % 3} for i in range(7)]
    obs = icm.prepare_obs(t.obs, learner, run.args)
    seen = icm.Sequence(jax.tree.map(lambda x: x[:, :, 0], obs), np.ones((201, 2)), ())
    policy, _ = run.network.apply(learner.params, seen)
    probability = np.asarray(jax.nn.softmax(policy.logits))[:-1, :, 0]
    assert (probability[np.arange(200), :, step % 3][step < 7] == 0).all()


# --- Memory ---
def memory_args(icm, **changes):
    settings = {"recurrence": "lstm", "memory_size": H, "num_minibatches": 2, "sequence_length": 4}
    return small_args(icm, **settings | changes)


def start_memory(icm, args, copies=1):
    """Returns a network, a float64 learner that is not new, and a rollout with resets in it."""
    leaves = {"none": 0, "gru": 1, "lstm": 2}[args.recurrence]
    memory = tuple(np.random.default_rng(7).normal(0, 1, (leaves, 1, N, H)))
    network, learner, transition, _ = start(icm, args, memory, copies)
    return network, learner, transition


def discounts(learner):
    """Returns gamma and lambda as the script has them: of float32's precision."""
    return float(learner.schedule.gamma), float(learner.schedule.gae_lambda)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def remember_by_hand(params, transition, n):
    """Returns values and means [T + 1, ...] of environment n, step by step, with an LSTM in NumPy.

    Where the environment has reset itself, everything is forgotten.
    """
    p = jax.tree.map(np.asarray, params["params"])
    h, c = (x[0, n] for x in transition.memory)
    means, values = [], []

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    for t in range(T + 1):
        x = np.tanh(dense(p["into_memory"], transition.obs["obs"][t, n, 0]))
        gates = dense(p["memory"]["input"], x) + h @ p["memory"]["recurrent"]
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        layers = [p[f"mean_{k}"] for k in range(3)]
        means.append(reference.mlp([(x["kernel"], x["bias"]) for x in layers], h)[0])
        layers = [p[f"critic_{k}"] for k in range(4)]
        values.append(reference.mlp([(x["kernel"], x["bias"]) for x in layers], h)[0][0])
        if t < T and not transition.mask[t, n]:
            h, c = 0 * h, 0 * c
    return np.array(means), np.array(values)


@in_double
def test_memory_over_resets_and_bootstraps(icm):
    """Policy, values and advantages of a rollout, against an LSTM in NumPy, one environment each.

    The value behind a truncated step is that of its true last observation, seen with the memory of
    the episode that it ended.
    """
    args = memory_args(icm)
    network, learner, transition = start_memory(icm, args)
    evaluate = jax.jit(partial(icm.evaluate_rollout, network=network, args=args))
    seen, advantage, _ = evaluate(learner, transition)
    policy, value, _ = seen
    by_hand = [remember_by_hand(learner.params, transition, n) for n in range(N)]
    for n, (means, values) in enumerate(by_hand):
        np.testing.assert_allclose(policy.mean[:, n], means, **CLOSE)
        np.testing.assert_allclose(value[:, n], values, **CLOSE)
    values = np.stack([values for _, values in by_hand], axis=1)
    t = transition
    wanted = reference.gae(t.reward, t.terminated, t.done, values, *discounts(learner))
    np.testing.assert_allclose(advantage, wanted, **CLOSE)


@pytest.mark.parametrize(("recurrence", "length"), [("lstm", 1), ("lstm", 4), ("gru", 16)])
@in_double
def test_sequences_are_the_whole(icm, recurrence, length):
    """An unchanged policy says of every sequence what it said of the whole rollout, over resets."""
    args = memory_args(icm, recurrence=recurrence, sequence_length=length)
    network, learner, transition = start_memory(icm, args, copies=COPIES)
    told = {"network": network, "args": args}
    (whole, value, _), *_ = jax.jit(partial(icm.evaluate_rollout, **told))(learner, transition)
    batch = jax.jit(partial(icm.make_batch, **told))(learner, transition)
    policy, again = jax.jit(network.apply)(learner.params, batch.obs)
    ppo_loss = jax.jit(partial(icm.ppo_loss, **told))
    _, metrics = ppo_loss(learner.params, batch, learner.schedule)
    assert batch.mask.shape == (T * N * COPIES // length, length)
    np.testing.assert_allclose(icm.log_prob(policy, batch.action), batch.log_prob, **CLOSE)
    np.testing.assert_allclose(metrics["approx_kl"], 0, atol=1e-14)
    # row by row: sequence c of environment n holds steps c L to (c + 1) L
    for c, n, k in np.ndindex(T // length, N, COPIES):
        row = (c * N + n) * COPIES + k
        steps = slice(c * length, (c + 1) * length)
        np.testing.assert_allclose(policy.mean[row], whole.mean[steps, n * COPIES + k], **CLOSE)
        np.testing.assert_allclose(again[row], value[steps, n * COPIES + k], **CLOSE)
        np.testing.assert_array_equal(batch.mask[row], transition.mask[steps, n])
        np.testing.assert_array_equal(batch.action[row], transition.action[steps, n])
        shown = transition.obs["obs"][steps, n, k]
        np.testing.assert_array_equal(batch.obs.obs["obs"][row], shown)


@in_double
def test_nothing_leaks_over_an_episodes_end(icm):
    """What a step says depends on its own episode only: its past, and neither others' nor later."""
    args = memory_args(icm)
    network, learner, transition = start_memory(icm, args)

    def said(obs):
        shown = transition._replace(obs={"obs": obs})
        (_, value, _), *_ = icm.evaluate_rollout(learner, shown, network, args)
        return value

    slopes = jax.jacobian(said)(transition.obs["obs"])  # [T + 1, N, T + 1, N, 1, D]
    reached = np.abs(np.asarray(slopes)).sum(axis=(-1, -2)) > 0
    episode = np.cumsum(np.concatenate([np.zeros((1, N)), 1 - transition.mask]), axis=0)
    for t, n, s, m in np.ndindex(reached.shape):
        same = n == m and s <= t and episode[s, m] == episode[t, n]
        assert reached[t, n, s, m] == same, (t, n, s, m)
    assert 2 <= episode[-1].min() < T


@pytest.mark.parametrize("recurrence", ["lstm", "gru"])
@in_double
def test_cells_are_those_of_flax(icm, recurrence):
    """Value and gradient of a step, with the same weights."""
    rng = np.random.default_rng(8)
    kernel = rng.normal(0, 1, (H, 4 * H if recurrence == "lstm" else 3 * H))
    into = rng.normal(0, 1, (5, kernel.shape[1]))
    bias = rng.normal(0, 1, H)
    x = rng.normal(0, 1, (2, 6, 5))  # C, L
    blocks = {"lstm": "ifgo", "gru": "rzn"}[recurrence]
    theirs = {}
    for k, name in enumerate(blocks):
        columns = slice(k * H, (k + 1) * H)
        hidden = {"kernel": kernel[:, columns]}
        if recurrence == "lstm":
            theirs[f"i{name}"] = {"kernel": into[:, columns]}
            theirs[f"h{name}"] = hidden | {"bias": np.zeros(H)}
        else:
            theirs[f"i{name}"] = {"kernel": into[:, columns], "bias": np.zeros(H)}
            theirs[f"h{name}"] = hidden | ({"bias": bias} if name == "n" else {})
    cell = nn.LSTMCell(H) if recurrence == "lstm" else nn.GRUCell(H)
    mine = {"input": {"kernel": into, "bias": np.zeros(kernel.shape[1])}, "recurrent": kernel}
    if recurrence == "gru":
        mine["candidate_bias"] = bias
    memory = icm.Memory(memory_args(icm, recurrence=recurrence))
    empty = tuple(np.zeros((2, H)) for _ in range(2 if recurrence == "lstm" else 1))

    def ours(x):
        seen = icm.Sequence(obs={}, mask=jnp.ones((2, 6)), memory=empty)
        return memory.apply({"params": mine}, x, seen)[0]

    def flaxs(x):
        carry = (empty[1], empty[0]) if recurrence == "lstm" else empty[0]
        outs = []
        for t in range(6):
            carry, out = cell.apply({"params": theirs}, carry, x[:, t])
            outs.append(out)
        return jnp.stack(outs, axis=1)

    weight = rng.normal(0, 1, (2, 6, H))
    for of in (lambda f: f(x), lambda f: jax.grad(lambda x: jnp.sum(f(x) * weight))(x)):
        np.testing.assert_allclose(of(ours), of(flaxs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recurrence", ["lstm", "gru"])
@in_double
def test_gradient_of_a_recurrence_is_that_of_its_steps(icm, recurrence):
    """Every argument's, over resets, of outputs and of the memory behind each step."""
    rng = np.random.default_rng(9)
    steps, sequences = 7, 3
    gates, leaves = {"lstm": (4 * H, 2), "gru": (3 * H, 1)}[recurrence]
    cell = {"lstm": icm.lstm_cell, "gru": icm.gru_cell}[recurrence]
    kernel = rng.normal(0, 0.5, (H, gates))
    bias = rng.normal(0, 1, (steps, sequences, gates))
    memory = tuple(rng.normal(0, 1, (sequences, H)) for _ in range(leaves))
    inputs = rng.normal(0, 1, (steps, sequences, gates))
    mask = jnp.array(rng.random((steps, sequences)) < 0.7, float)
    weight = rng.normal(0, 1, (1 + leaves, steps, sequences, H))

    def at_once(kernel, memory, inputs, bias):
        out, behind = icm.recur(kernel, memory, inputs, bias, mask)
        return jnp.sum(weight * jnp.stack([out, *behind]))

    def one_by_one(kernel, memory, inputs, bias):
        total = 0
        for t in range(steps):
            memory = cell(memory, inputs[t], memory[0] @ kernel + bias[t])
            out = memory[0]
            memory = tuple(x * mask[t][:, None] for x in memory)
            total += jnp.sum(weight[:, t] * jnp.stack([out, *memory]))
        return total

    arguments = kernel, memory, inputs, bias
    found = jax.value_and_grad(at_once, (0, 1, 2, 3))(*arguments)
    wanted = jax.value_and_grad(one_by_one, (0, 1, 2, 3))(*arguments)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.5])
def test_how_much_an_lstm_keeps_at_first(icm, bias):
    """Without input a step leaves sigmoid(forget_bias) of its cell."""
    memory = icm.Memory(memory_args(icm, recurrence="lstm", forget_bias=bias))
    before = (jnp.zeros((1, H)), jnp.ones((1, H)))
    seen = icm.Sequence(obs={}, mask=jnp.ones((1, 3)), memory=before)
    (_, (_, cell)), _ = memory.init_with_output(jax.random.PRNGKey(0), jnp.zeros((1, 3, 5)), seen)
    np.testing.assert_allclose(cell[0, 0], 1 / (1 + np.exp(-bias)), rtol=1e-6)


@pytest.mark.parametrize("recurrence", ["lstm", "gru"])
def test_rollouts_carry_memory(icm, recurrence):
    """Actions of three rollouts are what one policy, asked once over all of them, does."""
    settings = {"recurrence": recurrence, "memory_size": H}
    seen, run, learner = play(icm, "scripted:Counter-v0", 9, rollouts=3, **settings)
    first = seen[0]
    assert not any(x.any() for x in first.memory)
    joined = first._replace(
        obs={"obs": np.concatenate([t.obs["obs"][:9] for t in seen] + [seen[-1].obs["obs"][9:]])},
        **{name: np.concatenate([getattr(t, name) for t in seen]) for name in STEPS},
    )
    assert_next_step_resets(joined)
    prepared = joined._replace(obs=icm.prepare_obs(joined.obs, learner, run.args))
    (policy, _, _), *_ = icm.evaluate_rollout(learner, prepared, run.network, run.args)
    noise = icm.draw_noise(jax.random.fold_in(learner.key, 0), (9, 2), run.env.action_space)
    for i, t in enumerate(seen):
        mean, log_std = (x[9 * i : 9 * i + 9] for x in policy)
        np.testing.assert_allclose(t.action, mean + np.exp(log_std) * noise, rtol=1e-4, atol=1e-5)


def test_loaded_memory_is_carried_by_the_user(icm, tmp_path):
    """A policy that is asked step by step does what the rollout did; None begins an episode."""
    flags = "--num-envs 1 --num-steps 64 --num-minibatches 1 --total-timesteps 64 --update-epochs 1"
    memory = "--recurrence lstm --memory-size 4 --run-dir a --env-id scripted:Counter-v0"
    line = ["python", str(ROOT / "ppo_icm_lstm.py"), *flags.split(), *memory.split()]
    execute(line, tmp_path, environment()).check_returncode()
    policy = icm.load(tmp_path / "a")
    where = {"run_dir": str(tmp_path / "a")}
    trained = icm.read_args(tmp_path / "a").model_copy(update=where)
    args = trained.model_copy(update={"mode": "eval", "num_steps": 20})
    run = icm.make_run(args)
    learner = icm.read_learner(trained, run, best=False)
    _, t = run.act(icm.first_runner(run), learner)
    t = jax.tree.map(lambda x: np.asarray(x)[0, :, 0], t)
    carried = None
    for i in range(20):
        action, carried = policy(t.obs["obs"][i, 0], carried)
        np.testing.assert_allclose(action, np.clip(t.action[i], -1, 1), rtol=1e-5, atol=1e-6)
        if not t.mask[i]:
            carried = None
    batch, _ = policy(np.stack([t.obs["obs"][0, 0]] * 3))
    np.testing.assert_allclose(batch, [np.clip(t.action[0], -1, 1)] * 3, rtol=1e-5, atol=1e-6)
    assert not np.allclose(policy(t.obs["obs"][0, 0], carried)[0], batch[0])


# --- Curiosity ---
def curious_args(icm, **changes):
    settings = {"icm": True, "icm_sizes": (4,), "icm_features": 3, "intrinsic_eta": 0.5}
    return small_args(icm, **settings | changes)


def start_curious(icm, args):
    """Returns a network, a float64 learner with a curiosity that is not new, and a rollout."""
    network, learner, transition, r = start(icm, args)
    rng = np.random.default_rng(9)
    state = learner.opt_state.curiosity
    moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(0, 1, x.shape), state.params)
    state = state._replace(params=moved, discounted=rng.uniform(0, 1, N))
    learner = learner._replace(opt_state=learner.opt_state._replace(curiosity=state))
    return network, learner, transition, r


def weighed_batch(icm, learner, transition, network, args):
    """Returns the whole rollout as a minibatch, its mask as a weight of mean 1."""
    batch = icm.make_batch(learner, transition, network, args)
    return batch._replace(mask=batch.mask / jnp.mean(batch.mask))


def wonder_by_hand(params, obs, next_obs, action):
    """Returns the squared error of features, and the guess of the action, for one step."""
    p = jax.tree.map(np.asarray, params["params"])

    def net(name, x):
        layers = [p[f"{name}_{i}"] for i in range(2)]
        return reference.mlp([(y["kernel"], y["bias"]) for y in layers], x)[0]

    before = net("features", obs)
    after = net("features", next_obs)
    predicted = net("forward", np.concatenate([before, action]))
    guess = net("inverse", np.concatenate([before, after]))
    return np.sum((predicted - after) ** 2), guess


@in_double
def test_intrinsic_rewards_by_hand(icm):
    """Of true next observations; nothing where the environment reset itself."""
    args = curious_args(icm)
    network, learner, transition, r = start_curious(icm, args)
    reward = icm.intrinsic_rewards(learner, transition, network, args)
    for t, n in np.ndindex(T, N):
        seen = r["obs"][t, n], r["obs"][t + 1, n], r["action"][t, n]
        error, _ = wonder_by_hand(learner.opt_state.curiosity.params, *seen)
        np.testing.assert_allclose(reward[t, n], 0.25 * error * r["mask"][t, n], **CLOSE)


@in_double
def test_curiositys_loss_and_its_gradient(icm):
    """The loss by hand over experience, and its gradient by central differences."""
    args = curious_args(icm, icm_beta=0.3)
    network, learner, transition, r = start_curious(icm, args)
    params = learner.opt_state.curiosity.params

    def by_hand(params):
        total = 0.0
        for t, n in zip(*np.nonzero(r["mask"]), strict=True):
            action = r["action"][t, n]
            error, guess = wonder_by_hand(params, r["obs"][t, n], r["obs"][t + 1, n], action)
            unlikely = -reference.log_prob(guess, np.zeros(2), action)
            total += (0.3 * 0.5 * error + 0.7 * unlikely) / r["mask"].sum()
        return total

    batch = weighed_batch(icm, learner, transition, network, args)
    loss, _ = icm.icm_loss(params, batch, network, args)
    grad, _ = jax.grad(icm.icm_loss, has_aux=True)(params, batch, network, args)
    np.testing.assert_allclose(loss, by_hand(params), rtol=1e-10)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    slopes, _ = jax.flatten_util.ravel_pytree(grad)
    for i in range(0, len(flat), 7):
        ends = [by_hand(unravel(flat.at[i].add(d))) for d in (1e-6, -1e-6)]
        found = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(slopes[i], found, rtol=1e-5, atol=1e-7)


@in_double
def test_shares_of_a_minibatch_add_up(icm):
    """The mean over P processes' losses is the whole's, also where resets are not evenly shared."""
    args = curious_args(icm)
    network, learner, transition, _ = start_curious(icm, args)
    params = learner.opt_state.curiosity.params
    batch = weighed_batch(icm, learner, transition, network, args)
    whole, _ = icm.icm_loss(params, batch, network, args)
    half = len(batch.mask) // 2
    shares = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(half), slice(half, None))]
    assert len({float(share.mask.sum()) for share in shares}) == 2
    losses = [icm.icm_loss(params, share, network, args)[0] for share in shares]
    np.testing.assert_allclose(np.mean(losses), whole, **CLOSE)


@in_double
def test_rewards_of_curiosity_are_scaled_and_added(icm):
    """Divided by the deviation of their discounted sum, weighed, added to the others."""
    args = curious_args(icm, intrinsic_weight=0.7, extrinsic_weight=0.1)
    network, learner, transition, r = start_curious(icm, args)
    raw = icm.intrinsic_rewards(learner, transition, network, args)
    new, paid, metrics = icm.reward_curiosity(learner, transition, network, args)
    sums = []
    last = np.zeros(N)
    for n in range(N):
        total = learner.opt_state.curiosity.discounted[n]
        for t in range(T):
            if r["mask"][t, n]:
                total = args.gamma * total + raw[t, n]
                sums.append(total)
        last[n] = total
    np.testing.assert_allclose(new.opt_state.curiosity.discounted, last, rtol=1e-6)
    before = learner.opt_state.curiosity.stats
    _, var, _ = reference.moments(np.array(sums), np.ones(len(sums)), 0.0, 1.0, float(before.count))
    np.testing.assert_allclose(new.opt_state.curiosity.stats.var, var, rtol=1e-6)
    scaled = raw / np.sqrt(var + 1e-8)
    np.testing.assert_allclose(paid.reward, r["reward"] + 0.7 * scaled, rtol=1e-6)
    real = r["mask"] > 0
    np.testing.assert_allclose(metrics["icm/intrinsic_reward"], scaled[real].mean(), rtol=1e-6)


@in_double
def test_curiosity_learns_in_the_update(icm):
    """Its losses fall; the policy's own parameters are what they are without it, if it pays 0."""
    args = curious_args(icm, intrinsic_weight=0.0, icm_learning_rate=1e-2, update_epochs=20)
    network, learner, transition, _ = start_curious(icm, args)
    plain = small_args(icm, update_epochs=20, intrinsic_weight=0.0)
    new, metrics = jax.jit(partial(icm.update, network=network, args=args))(learner, transition)
    other = learner._replace(opt_state=learner.opt_state._replace(curiosity=None))
    without, _ = jax.jit(partial(icm.update, network=network, args=plain))(other, transition)
    batch = icm.make_batch(learner, transition, network, args)
    params = (x.opt_state.curiosity.params for x in (learner, new))
    losses = [icm.icm_loss(x, batch, network, args)[0] for x in params]
    jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), new.params, without.params)
    assert losses[1] < 0.8 * losses[0]
    assert np.isfinite(metrics["icm/forward_loss"]) and np.isfinite(metrics["icm/inverse_loss"])


def test_a_curious_run_is_evaluated_and_loaded(icm, tmp_path):
    """By other numbers of environments than it was trained with."""
    flags = "--icm --icm-sizes 4 --num-envs 2 --num-steps 64 --num-minibatches 1 --update-epochs 1"
    task = "--env-id gymnax/CartPole-v1 --total-timesteps 128 --eval-episodes 3 --run-dir a"
    line = ["python", str(ROOT / "ppo_icm_lstm.py"), *flags.split(), *task.split()]
    execute(line, tmp_path, environment()).check_returncode()
    execute([*line, "--mode", "eval"], tmp_path, environment()).check_returncode()
    assert result(tmp_path / "a")["eval_return"][0]["episodes"] == 3
    assert icm.load(tmp_path / "a")(np.zeros(4, np.float32)) in (0, 1)


# --- Regulators ---
@in_double
def test_bounds_move_over_the_run(icm):
    args = small_args(icm, reward_range=(-1.0, 10.0), reward_range_end=(-3.0, 2.0))
    _, learner, _, _ = start(icm, args)
    learner = learner._replace(progress=np.float64(0.3))
    x = np.array([-5.0, 0.0, 20.0])
    found = icm.clip_on_schedule(x, args.reward_range, args.reward_range_end, learner)
    np.testing.assert_allclose(found, [-1.6, 0, 7.6], rtol=1e-6)
    constant = icm.clip_on_schedule(x, (-1.0, 10.0), None, learner)
    np.testing.assert_allclose(constant, [-1, 0, 10])
    np.testing.assert_array_equal(icm.clip_on_schedule(x, None, None, learner), x)


@in_double
def test_bounds_of_observations_are_the_trainings_in_evaluation(icm):
    """Which has other numbers of environments and steps, and counts iterations of its own."""
    args = small_args(icm, obs_range=(-1.0, 1.0), obs_range_end=(-0.5, 0.0))
    network, learner, transition, _ = start(icm, args)  # 3 of 10 iterations
    new, _ = icm.update(learner, transition, network, args)
    np.testing.assert_allclose(new.progress, 0.4, rtol=1e-6)
    other = args.model_copy(update={"num_envs": 1, "num_steps": 1})
    played = new._replace(iteration=new.iteration + 1000)
    found = icm.prepare_obs(transition.obs, played, other)["obs"]
    np.testing.assert_allclose([found.min(), found.max()], [-0.8, 0.6], rtol=1e-6)


@pytest.mark.parametrize("bootstrap", ["fixed", "dynamic"])
@in_double
def test_bootstraps_are_bounded_where_a_future_is_cut_off(icm, bootstrap):
    """Targets by hand, from values that are bounded behind truncations and the rollout only.

    Advantages are of values as they are.
    """
    args = small_args(icm, bootstrap=bootstrap, bootstrap_range=(-0.2, 0.1), norm_adv=False)
    _, learner, transition, r = start(icm, args)
    rng = np.random.default_rng(10)
    value = rng.normal(0, 1, (T + 1, N))
    bounds = (-0.3, 0.4) if bootstrap == "dynamic" else (-0.2, 0.1)
    learner = learner._replace(rewards_seen=np.array([-0.3, 0.4]))
    advantage, target = icm.estimate_advantages(learner, transition, value, args)
    wider = icm.widen_reward_range(learner, transition).rewards_seen
    real = r["reward"][r["mask"] > 0]
    np.testing.assert_allclose(wider, [real.min(), real.max()], rtol=1e-6)
    mask = r["mask"] > 0
    of_target = gae_by_hand(r, value, discounts(learner), bounds) + value[:-1]
    np.testing.assert_allclose(target[mask], of_target[mask], **CLOSE)
    of_advantage = gae_by_hand(r, value, discounts(learner), (-np.inf, np.inf))
    np.testing.assert_allclose(advantage[mask], of_advantage[mask], **CLOSE)


def gae_by_hand(r, value, discounts, bounds):
    """Returns advantages [T, N], where the value of a future that is cut off is within bounds."""
    gamma, gae_lambda = discounts
    wanted = np.zeros((T, N))
    for n in range(N):
        following = 0.0
        for t in reversed(range(T)):
            future = value[t + 1, n]
            if t == T - 1 or r["done"][t, n]:
                future = np.clip(future, *bounds)
            delta = r["reward"][t, n] - value[t, n]
            delta += gamma * future * (1 - r["terminated"][t, n])
            following = delta + gamma * gae_lambda * (1 - r["done"][t, n]) * following
            wanted[t, n] = following
    return wanted


@in_double
def test_values_of_normalised_targets(icm):
    """The critic's answers are scaled back for advantages, targets are scaled for the loss."""
    args = small_args(icm, norm_value=True)
    network, learner, transition, r = start(icm, args)
    stats = icm.RunningStats(np.float64(2.0), np.float64(9.0), np.float64(50.0))
    learner = learner._replace(value_stats=stats)
    value = np.random.default_rng(11).normal(0, 1, (T + 1, N))
    advantage, target = icm.estimate_advantages(learner, transition, value, args)
    new, _ = icm.update(learner, transition, network, args)
    true = 3 * value + 2
    wanted = reference.gae(r["reward"], r["terminated"], r["done"], true, *discounts(learner))
    np.testing.assert_allclose(advantage, wanted, rtol=1e-8)
    np.testing.assert_allclose(target, (wanted + true[:-1] - 2) / 3, rtol=1e-7)
    assert new.value_stats.count == 50 + r["mask"].sum()


@in_double
def test_values_stay_when_their_statistics_move(icm):
    """In the unit of rewards; so does the policy."""
    args = small_args(icm, norm_value=True)
    network, learner, transition, _ = start(icm, args)
    batch = icm.make_batch(learner, transition, network, args)
    moved = icm.update_value_stats(learner, batch, args)

    def said(learner):
        policy, value = network.apply(learner.params, batch.obs)
        stats = learner.value_stats
        return jax.tree.leaves(policy), value * np.sqrt(stats.var + 1e-8) + stats.mean

    policy, value = said(learner)
    same_policy, same_value = said(moved)
    assert abs(moved.value_stats.mean) > 0.1
    assert abs(moved.value_stats.var - 1) > 0.1
    np.testing.assert_allclose(same_value, value, rtol=1e-6, atol=1e-8)
    for x, y in zip(policy, same_policy, strict=True):
        np.testing.assert_array_equal(x, y)


def test_annealed_numbers_end_at_their_least(icm):
    floors = {"min_learning_rate": 4e-3, "min_ent_coef": 0.01}
    args = small_args(icm, anneal_ent=True, anneal_intrinsic=True, intrinsic_weight=2.0, **floors)
    _, learner, _, _ = start(icm, args)
    found = icm.anneal(learner, args)
    np.testing.assert_allclose(found.learning_rate, 1e-2 - 0.3 * 6e-3, rtol=1e-6)
    np.testing.assert_allclose(found.ent_coef, 0.03 - 0.3 * 0.02, rtol=1e-6)
    np.testing.assert_allclose(found.intrinsic_weight, 1.4, rtol=1e-6)


# --- Encoders ---
def test_parts_have_encoders_of_their_own(icm):
    """Each sees its part only, by name or by range; what is not named goes in as it is."""
    obs = np.random.default_rng(12).normal(0, 1, (5, 1, 6)).astype(np.float32)
    near = spaces.Box(-1, 1, (4,))
    far = spaces.Box(-1, 1, (2,))
    for split, space, shown in (
        (("0:4", "4:6"), spaces.Box(-1, 1, (6,)), obs),
        (
            ("near", "far"),
            spaces.Dict(near=near, far=far),
            {"near": obs[..., :4], "far": obs[..., 4:]},
        ),
    ):
        args = icm.Args(split_obs=split, part_sizes=(7, 3), hidden_sizes=(4,))
        network = icm.ActorCritic(spaces.Discrete(3), args)
        parts = icm.observation_parts(shown, space, args)
        np.testing.assert_array_equal(parts[split[1]], obs[..., 4:])
        seen = icm.Sequence(parts, jnp.ones((5, 1)), ())
        params = network.init(jax.random.PRNGKey(0), seen)["params"]
        widths = sorted(p["dense_0"]["kernel"].shape for n, p in params.items() if "part_" in n)
        assert widths == [(2, 7), (4, 7)]
        assert params["policy_0"]["kernel"].shape == (6, 4)
    args = icm.Args(split_obs=("far",), part_sizes=(7, 3))
    params = icm.ActorCritic(SPACE, args).init(jax.random.PRNGKey(0), seen)["params"]
    assert params["mean_0"]["kernel"].shape == (4 + 3, 64)


def test_encoders_of_images(icm):
    """Large ones and bytes go into networks as they are, small tables of numbers normalised."""
    space = spaces.Dict(
        grid=spaces.Box(0, 255, (7, 7, 3), np.uint8),
        large=spaces.Box(0, 255, (3, 40, 50), np.uint8),
        table=spaces.Box(0, 255, (7, 7, 3), np.float32),
        thin=spaces.Box(0, 255, (2, 2, 3), np.uint8),
    )
    args = icm.Args(activation="relu")
    network = icm.ActorCritic(spaces.Discrete(7), args)
    obs = {name: np.zeros(x.shape, x.dtype) for name, x in space.items()}
    parts = icm.observation_parts(obs, space, args)
    learner = new_learner(icm, 0, parts, network, args)
    params = learner.params["params"]
    assert params["part_grid"]["conv_0"]["kernel"].shape == (3, 3, 24, 16)  # 8 bits each
    assert params["part_large"]["conv_0"]["kernel"].shape == (8, 8, 3, 32)
    assert params["part_table"]["conv_0"]["kernel"].shape == (3, 3, 3, 16)
    assert params["policy_0"]["kernel"].shape == (128 + 512 + 128 + 12, 64)
    assert learner.obs_stats.keys() == {"table", "thin"}

    shown = jax.tree.map(lambda x: x[None] + 9, parts)
    found = icm.prepare_obs(shown, learner, args)
    for name in ("grid", "large"):
        np.testing.assert_array_equal(found[name], shown[name])
    np.testing.assert_allclose(found["table"], 9, rtol=1e-6)


def test_bit_planes(icm):
    image = np.random.default_rng(3).integers(0, 256, (2, 5, 4, 3), np.uint8)
    bits = np.unpackbits(image[..., None], axis=-1, bitorder="little")
    args = icm.Args(channels="last")
    np.testing.assert_array_equal(icm.bit_planes(image, args), bits.reshape(2, 5, 4, 24))


# --- Accelerators ---
def test_update_with_everything_lowers_for_accelerators(icm):
    settings = {"recurrence": "lstm", "memory_size": H, "sequence_length": 4, "num_minibatches": 2}
    args = curious_args(icm, **settings, norm_value=True)
    network, learner, transition, _ = start(icm, args)
    memory = tuple(np.zeros((1, N, H), np.float32) for _ in range(2))
    inputs = jax.tree.map(to_single, (learner, transition._replace(memory=memory)))
    update = jax.jit(partial(icm.update, network=network, args=args))
    lowered(update, inputs)


# --- Runs ---
RECALL = (
    "--env-id jax:jax_tasks:recall --num-envs 16 --num-steps 32 --num-minibatches 4"
    " --total-timesteps 40000 --hidden-sizes 16 --critic-sizes 16 --learning-rate 3e-3"
    " --log-interval 20 --gamma 0.9"
)


WITHOUT = pytest.param("none", marks=pytest.mark.slow)


@pytest.mark.parametrize("recurrence", ["lstm", WITHOUT])
def test_memory_learns_to_recall(tmp_path, recurrence):
    """What it was shown five steps ago: 1 a hit, half of them by chance."""
    line = ["python", str(ROOT / "ppo_icm_lstm.py"), *RECALL.split(), "--run-dir", "a"]
    memory = ["--recurrence", recurrence, "--memory-size", "16"]
    env = environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    done = execute([*line, *memory], tmp_path, env)
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "a")["episodic_return"][0]
    assert found > 0.95 if recurrence == "lstm" else found < 0.75


WRONG = [
    ("--split-obs 0:2 --env-id CartPole-v1", "--split-obs ends at 2: give ranges up to 4"),
    ("--image-encoder nature --env-id MiniGrid-DoorKey-5x5-v0", "is for larger images than image"),
    ("--image-encoder grid --env-id scripted:Table-v0", "grid takes bytes, not obs's float32"),
    ("--split-obs 1:4 --env-id CartPole-v1", "follow each other, 0 to 4"),
    ("--split-obs legs --env-id CartPole-v1", "--split-obs legs: observations have obs"),
    ("--split-obs 0:2 --env-id scripted:Nested-v0", "of a Dict give keys"),
    ("--env-id scripted:Masked-box-v0", "has an action_mask, but a Box of actions"),
    ("--env-id scripted:Masked-short-v0", "its action_mask has 2 places, not 3"),
    ("--env-id scripted:Pair-v0", "for teams there is ppo_multiagent.py"),
]


@pytest.mark.parametrize(("flags", "said"), WRONG)
def test_what_an_environment_lacks_ends_in_one_line(icm, flags, said):
    args = icm.tyro.cli(icm.Args, args=flags.split())
    with pytest.raises(icm.InputError) as failure:
        icm.make_env(args, [1])
    assert said in str(failure.value)


CONTRADICTIONS = [
    ("--num-minibatches 7", "--num-minibatches"),
    ("--num-minibatches 2048 --norm-adv", "--norm-adv"),
    ("--sequence-length 16", "--recurrence"),
    ("--sequence-length 48 --recurrence gru", "--sequence-length"),
    ("--num-minibatches 32 --recurrence gru", "--num-minibatches"),
    ("--memory-size 0", "--memory-size"),
    ("--reward-range 3 1", "--reward-range"),
    ("--bootstrap-range nan 1", "--bootstrap-range"),
    ("--obs-range-end -1 1", "--obs-range"),
    ("--forget-bias 1 --recurrence gru", "--forget-bias"),
    ("--min-learning-rate 1e-4 --no-anneal-lr", "--min-learning-rate"),
    ("--min-ent-coef 0.001", "--min-ent-coef"),
    ("--icm-beta 2", "--icm-beta"),
    ("--icm-sizes 0", "--icm-sizes"),
    ("--intrinsic-weight inf", "--intrinsic-weight"),
]


@pytest.mark.parametrize(("flags", "said"), CONTRADICTIONS)
def test_a_bad_flag_is_named(icm, capsys, flags, said):
    """With exit code 2."""
    with pytest.raises(SystemExit) as failure:
        icm.tyro.cli(icm.Args, args=flags.split())
    assert failure.value.code == 2
    seen = capsys.readouterr().err
    assert said in seen or said.removeprefix("--").replace("-", "_") in seen


@pytest.mark.parametrize("kind", ["late", "once"])
def test_a_mask_that_is_not_always_there_is_an_error(icm, kind):
    with pytest.raises(Exception, match="has an action_mask"):
        play(icm, f"scripted:Masked-{kind}-v0", 16)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_augmented_observations(icm, vectorization):
    """The original and its mirror image: both are rows, with the original's advantage."""
    (t,), run, learner = play(icm, "scripted:Mirrored-v0", 16, vectorization=vectorization)
    obs = t.obs["obs"]
    assert obs.shape == (17, 2, 2, 2)
    np.testing.assert_array_equal(obs[:, :, 1], -obs[:, :, 0])
    batch = icm.make_batch(learner, t, run.network, run.args)
    shown = batch.obs.obs["obs"].reshape(16, 2, 2, 2)
    np.testing.assert_array_equal(shown, obs[:-1])
    advantage, value = (x.reshape(16, 2, 2) for x in (batch.advantage, batch.value))
    np.testing.assert_array_equal(advantage[..., 0], advantage[..., 1])
    (_, values, _), *_ = icm.evaluate_rollout(learner, t, run.network, run.args)
    of_originals = values.reshape(17, 2, 2)[..., 0]
    wanted, _ = icm.estimate_advantages(learner, t, of_originals, run.args)
    np.testing.assert_allclose(advantage[..., 0], wanted, rtol=1e-5, atol=1e-6)
    assert np.all(value[..., 0] != value[..., 1])


class Fickle(scripted.Counter):
    """With observation augmentation that changes its number of copies."""

    def augment_observation(self, obs):
        return np.stack([obs] * (3 if self.count == 5 else 2))


def test_a_number_of_copies_that_changes_is_refused(icm):
    gymnasium.register("Fickle-v0", Fickle, disable_env_checker=True)
    with pytest.raises(Exception, match="augment_observation returned 2 observations, and now 3"):
        play(icm, "Fickle-v0", 16)


PENDULUM_IDS = ["Pendulum-v1", "gymnasium:Pendulum-v1", "gymnax/Pendulum-v1"]


@pytest.mark.parametrize("env_id", PENDULUM_IDS)
def test_hard_resets(icm, env_id):
    """The second rollout begins with episodes of its own."""
    (first, second), _, _ = play(icm, env_id, 30, rollouts=2, hard_resets=True)
    for t in (first, second):
        assert not t.done.any() and t.mask.all()
        np.testing.assert_array_equal(t.episodic_length[:, 0], 1 + np.arange(30))
    begun = second.obs["obs"][0]
    assert np.all(np.abs(begun[..., 2]) <= 1)  # Pendulum's first speeds
    assert not np.any(begun == first.obs["obs"][-1])
    assert not np.any(begun == first.obs["obs"][0])


def test_parts_of_observations(icm):
    """Of a Dict its values, choices as one-hot vectors; keys may be whole numbers."""
    (t,), _, _ = play(icm, "scripted:Nested-v0", 16)
    assert t.obs["flat"].shape == (17, 2, 1, 2)
    assert t.obs["image"].shape == (17, 2, 1, 6)
    assert t.action.shape == (16, 2, 6)
    (t,), _, _ = play(icm, "scripted:Choices-v0", 8)
    np.testing.assert_array_equal(t.obs["number"][:4, 0, 0], np.eye(4))
    np.testing.assert_array_equal(t.obs["pair"][2, 0, 0], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(t.obs["bits"][1, 0, 0], [1, 0, 1])
    box = spaces.Box(-1, 1, (2,))
    parts = icm.named_parts({0: 1, 1: (2, 3)}, spaces.Dict({0: box, 1: spaces.Tuple([box, box])}))
    assert {name: x for name, (x, _) in parts.items()} == {"0": 1, "1_0": 2, "1_1": 3}


# --- Mutants: (the test that must turn red, a text of the script, what a slip would make of it) ---
MUTANTS = [
    (
        test_bootstraps_are_bounded_where_a_future_is_cut_off,
        "_, target = compute_gae(rollout, bounded",
        "advantage, target = compute_gae(rollout, bounded",
    ),
    (
        test_values_stay_when_their_statistics_move,
        "x = x * old_std / new_std",
        "pass",
    ),
    (test_values_stay_when_their_statistics_move, "old.mean - new.mean) / new", "old.mean) / new"),
    (
        test_memory_over_resets_and_bootstraps,
        "memory = jax.tree.map(lambda x: x * mask[:, None], memory)\n        return memory",
        "return memory",
    ),
    (
        test_memory_over_resets_and_bootstraps,
        "gates = from_input + from_memory",
        "gates = from_memory",
    ),
    (test_sequences_are_the_whole, "*x.shape[1:]).swapaxes(1, 2)", "*x.shape[1:])"),
    (test_sequences_are_the_whole, "lambda x: x[:, 0], batch.obs", "lambda x: x[:, -1], batch.obs"),
    (test_sequences_are_the_whole, "[repeat(x), y[:-1]]", "[y[:1], y[:-1]]"),
    (test_cells_are_those_of_flax, "reset * h_new", "h_new"),
    (
        test_gradient_of_a_recurrence_is_that_of_its_steps,
        "[memory[0][None], behind[0][:-1]]",
        "[behind[0][:1], behind[0][:-1]]",
    ),
    (
        test_gradient_of_a_recurrence_is_that_of_its_steps,
        "hidden, of_product)",
        "hidden, of_inputs)",
    ),
    (
        test_rollouts_carry_memory,
        "memory=jax.tree.map(lambda x: x * mask[..., None], memory)",
        "memory=memory",
    ),
    (test_intrinsic_rewards_by_hand, "guess.error * rollout.mask", "guess.error"),
    (test_intrinsic_rewards_by_hand, "x[1:, :, 0], rollout.obs", "x[:-1, :, 0], rollout.obs"),
    (
        test_curiositys_loss_and_its_gradient,
        "jnp.mean(x * batch.mask), samples)\n    loss = args.icm_beta",
        "jnp.mean(x), samples)\n    loss = args.icm_beta",
    ),
    (
        test_curiositys_loss_and_its_gradient,
        "jnp.square(predicted - after)",
        "jnp.square(predicted - jax.lax.stop_gradient(after))",
    ),
    (
        test_rewards_of_curiosity_are_scaled_and_added,
        "jnp.where(mask > 0, gamma * total + reward, total)",
        "gamma * total + reward",
    ),
    (
        test_bounds_of_observations_are_the_trainings_in_evaluation,
        "learner.progress.astype",
        "(learner.iteration / 10).astype",
    ),
    (test_distribution_of_several_choices, "first[:, None] + column", "column"),
    (
        test_bootstraps_are_bounded_where_a_future_is_cut_off,
        "rollout.mask == 0, jnp",
        "rollout.mask == 1, jnp",
    ),
    (test_augmented_observations, "value[:, ::copies]", "value[:, copies - 1 :: copies]"),
    (
        test_augmented_observations,
        "return seen, repeat(advantage)",
        "return seen, jnp.tile(advantage, (1, copies))",
    ),
    (test_hard_resets, "if args.hard_resets and", "if not args.hard_resets and"),
]
CASES = {
    test_sequences_are_the_whole: {"recurrence": "lstm", "length": 4},
    test_cells_are_those_of_flax: {"recurrence": "gru"},
    test_gradient_of_a_recurrence_is_that_of_its_steps: {"recurrence": "gru"},
    test_rollouts_carry_memory: {"recurrence": "lstm"},
    test_bootstraps_are_bounded_where_a_future_is_cut_off: {"bootstrap": "fixed"},
    test_augmented_observations: {"vectorization": "sync"},
    test_hard_resets: {"env_id": "gymnasium:Pendulum-v1"},
}


@pytest.mark.parametrize(
    ("test", "text", "slip"), MUTANTS, ids=lambda x: getattr(x, "__name__", str(x))[:40]
)
def test_mutant_is_killed(test, text, slip):
    mutant = mutate("ppo_icm_lstm", text, slip)
    with pytest.raises(AssertionError):
        test(mutant, **CASES.get(test, {}))
