# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10", "flax>=0.12", "optax>=0.2.6", "orbax-checkpoint>=0.11.30", "tyro>=0.9", "tqdm>=4.66",
#   "envpool>=1.2", "gymnasium[box2d,mujoco]>=1.2", "tensorboard>=2.19", "tensorboardX>=2.6.4", "imageio[ffmpeg]>=2.37"]
# ///
"""PPO-CMA-m, PPO-CMA and PPO for bounded continuous (Box) actions, as published. One file: run it, copy it, change it.

    python ppo_cma.py --env-id MountainCarContinuous-v0 --seed 1  # train; the same command again resumes
    python ppo_cma.py --env-id Hopper-v4 --action-repeat 2 --num-envs 8 --batch-size 512  # N = 8000, as in the paper
    python ppo_cma.py --env-id MountainCarContinuous-v0 --seed 1 --mode eval --video

PPO-CMA: Hämäläinen et al., arXiv 1810.02541, and the authors' code. GAE: 1506.02438. Axes are always [S, T, N, ...]:
seeds, steps, environments per seed; H iterations of history, minibatches of B, U action size, P processes. An iteration
has num_envs * num_steps simulation steps; one decision of the policy is held for action_repeat of them.

Differs from the authors' code:
1. Rollouts have a fixed size. Episodes go on in the next; where a return is cut, the critic's value is the rest.
2. Truncated steps bootstrap from the value of their true last observation, terminated ones do not (theirs: all do).
3. Decisions are held for 8 steps, not 2: the first policy finds MountainCarContinuous's goal five times as often.
4. --covariance full, with a Cholesky factor per state, is ours.
"""

import ctypes
import difflib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import envpool
import flax.linen as nn
import gymnasium
import imageio.v3
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax import Array
from jax.experimental import io_callback, multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from tensorboardX import SummaryWriter
from tqdm import tqdm


# --- Settings ---
@dataclass(frozen=True)  # hashable; the comments are the help texts
class Args:
    # Run
    env_id: str = "MountainCarContinuous-v0"  # of EnvPool or Gymnasium, or module:EnvId (module is imported first)
    seed: int = 1  # random seed; of several, the first
    num_seeds: int = 1  # S, independent runs in this process, with seeds seed, seed + 1, ...
    total_timesteps: int = 1_000_000  # environment steps per seed
    exp_name: str = "ppo-cma"  # name of this experiment, a part of the run folder
    run_dir: str = ""  # run folder; empty: runs/<script>/<env-id>/<exp-name>/seed<seed>
    clobber: bool = False  # delete the run folder and start afresh
    checkpoint_interval: int = 50  # iterations between checkpoints
    log_interval: int = 1  # iterations between writes to TensorBoard (histograms: every tenth write)
    mode: Literal["train", "eval"] = "train"  # eval: run the run folder's policy, deterministically
    eval_episodes: int = 100  # evaluation episodes per seed
    video: bool = False  # in eval mode, film an episode of the first seed as mp4 and GIF
    platform: Literal["auto", "cpu", "gpu"] = "auto"  # where updates run; rollouts stay on the CPU, beside environments
    distributed: bool = False  # one of P processes started by mpirun or srun; each steps num_envs / P environments
    # Rollout
    num_envs: int = 4  # N, parallel environments per seed
    num_steps: int = 1000  # T, steps per environment and rollout
    action_repeat: int = 8  # simulation steps that a decision is held for; 1 or 2 for MuJoCo
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # GAE mixing: 0 is the one-step error, 1 the Monte Carlo return
    scale_obs: bool = True  # divide observations by twice the root of the largest mean square of an iteration so far
    clip_obs: float = float("inf")  # bound on normalised observations (inf: off)
    # Update
    algorithm: Literal["ppo-cma-m", "ppo-cma", "ppo", "pg", "pg-pos"] = "ppo-cma-m"  # pg: plain policy gradients
    learning_rate: float = 5e-4  # Adam's step size
    num_updates: int = 100  # gradient steps of each network per iteration
    batch_size: int = 2048  # B, drawn with replacement for each gradient step; at most the decisions of a rollout
    history_size: int = 9  # H, iterations that the variance learns from
    clip_coef: float = 0.2  # epsilon, the bound on |ratio - 1|
    ent_coef: float = 0.0  # weight of the entropy bonus
    value_loss: Literal["l1", "l2", "soft-l1"] = "l1"  # of the critic
    time_scale: float = 1e-3  # of the critic's extra input, decisions since the episode began
    # Network
    covariance: Literal["diagonal", "full"] = "diagonal"  # of the policy; full: a Cholesky factor per state
    std_min: float = 0.01  # least standard deviation, in the environment's units (the largest is the action range)
    init_mean: float = 0.0  # mean of the first policy, in half ranges from the middle of the action range
    init_std: float = 1.0  # standard deviation of the first policy, in half ranges
    init_updates: int = 1999  # gradient steps towards that policy before the first iteration
    hidden_sizes: tuple[int, ...] = (128, 128)  # widths of the hidden layers, actor and critic alike
    dense_skips: bool = True  # layers see the input and all layers before them, as in every released version
    leak: float = 0.1  # slope of the leaky ReLU below zero

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.num_envs * self.num_steps)

    @property
    def minibatch_size(self) -> int:
        return min(self.batch_size, self.num_envs * -(-self.num_steps // max(self.action_repeat, 1)))

    @property
    def folder(self) -> Path:
        name = f"seed{self.seed}" + (f"-{self.seed + self.num_seeds - 1}" if self.num_seeds > 1 else "")
        return Path(self.run_dir or Path("runs", Path(__file__).stem, self.env_id, self.exp_name, name)).absolute()


def fail(message: str, code: int = 2) -> None:
    """Ends the program with one line on stderr. Raises: SystemExit."""
    print(f"{Path(__file__).name}: {message.splitlines()[0]}", file=sys.stderr)
    sys.exit(code)


def validate(args: Args) -> None:
    """Stops with exit code 2 at the first setting that cannot work, naming its flag and the remedy."""
    N, T, B, P, last = args.num_envs, args.num_steps, args.batch_size, jax.process_count(), 2**31 - args.num_seeds
    any_sign = "seed gamma gae_lambda ent_coef time_scale init_mean init_updates leak".split()
    for name in [k for k, v in asdict(args).items() if type(v) in (int, float) and k not in any_sign and not v > 0]:
        fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: give a number above 0")
    fine = {
        f"--num-envs {N} does not divide among {P} processes: give a multiple of that": N % P == 0,
        f"--batch-size {B} does not divide among {P} processes: give a multiple of that": B % P == 0,
        f"--total-timesteps {args.total_timesteps} is below one rollout of {N * T}: raise it": args.num_iterations > 0,
        f"--gamma {args.gamma}: give 0 to 1": 0 <= args.gamma <= 1,
        f"--gae-lambda {args.gae_lambda}: give 0 to 1": 0 <= args.gae_lambda <= 1,
        f"--seed {args.seed} is out of range: give 0 to {last}": 0 <= args.seed <= last,
        f"--num-steps {T} is below --action-repeat {args.action_repeat}: raise it": args.action_repeat <= T,
        f"--init-updates {args.init_updates}: give 0 or more": args.init_updates >= 0,
    }
    if not all(fine.values()):
        fail(min(fine, key=fine.get))


# --- State ---
class Scaler(NamedTuple):  # of one leaf of the observations
    mean_square: Array  # each iteration counts the same
    scale: Array  # never grows
    count: Array  # [], iterations


class Transition(NamedTuple):  # one step; a rollout stacks T of them: [T, N, ...]
    obs: Any  # raw; of a whole rollout [T + 1, N, K, ...]: obs[t + 1] is the true next observation
    action: Array  # [T, N, U], as sampled, before the environment's bounds
    reward: Array  # raw
    terminated: Array  # 1: no value beyond this step
    done: Array  # 1: terminated or truncated
    mask: Array  # 0: the environment reset itself on this step, which is not experience
    episodic_return: Array  # real and unclipped, so far: the whole episode's where done and mask are 1
    episodic_length: Array
    discounted_return: Array  # of raw rewards, so far: what scales rewards


class Batch(NamedTuple):  # decisions, [B, ...]
    obs: Any  # raw in history, scaled in a minibatch
    time: Array  # decisions since the episode began
    action: Array  # as the environment got it
    advantage: Array
    target: Array
    mean: Array  # of the policy before the iteration's policy updates
    log_prob: Array  # of action under that policy


class Training(NamedTuple):  # what rollouts do not need
    adam: dict[str, optax.OptState]  # per network
    history: Batch  # [H, T*N, ...], a ring of iterations; decisions first, then what nothing reads
    counts: Array  # [H], decisions


class LearnerState(NamedTuple):  # what a checkpoint holds
    params: Any
    opt_state: Training
    obs_stats: Any  # like one observation, Scaler for leaves
    key: Array  # [2], of the whole run; each iteration's keys are folded from it
    iteration: Array  # []
    episodes: Array  # [], ended so far
    returns: Array  # [100], the last training episodes', nan where there are fewer


# --- Networks ---
class Dense(nn.Module):  # each output's weights have norm 1; biases centre the batch that init sees
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal = nn.initializers.normal(1.0)
        unit = lambda *a: (w := normal(*a)) / jnp.linalg.norm(w, axis=0)  # noqa: E731
        kernel = self.param("kernel", unit, (x.shape[-1], self.size), jnp.float32)
        return x @ kernel + self.param("bias", lambda key: -jnp.mean(x @ kernel, axis=0))


class MLP(nn.Module):
    size: int
    args: Args

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.args.hidden_sizes:
            new = nn.leaky_relu(Dense(width)(x), self.args.leak)
            x = jnp.concatenate([x, new], axis=-1) if self.args.dense_skips else new
        return Dense(self.size)(x)


class ActorCritic(nn.Module):  # mean, std and critic (policy, critic); the compiler leaves out what is not used
    action_space: Any
    args: Args

    @nn.compact
    def __call__(self, obs: Any, time: Array | float = 0.0) -> tuple["Gaussian", Array]:
        x = jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(obs)], axis=-1)
        low, high = (jnp.asarray(b.ravel(), x.dtype) for b in (self.action_space.low, self.action_space.high))
        U, full, half = low.size, self.args.covariance == "full", (high - low) / 2
        std_size = U + U * (U - 1) // 2 * full
        if self.args.algorithm.startswith("ppo-cma"):
            mean, std = MLP(U, self.args, name="mean")(x), MLP(std_size, self.args, name="std")(x)
        else:
            mean, std = jnp.split(MLP(U + std_size, self.args, name="policy")(x), [U], axis=-1)
        time = jnp.broadcast_to(jnp.asarray(time, x.dtype)[..., None] * self.args.time_scale, (len(x), 1))
        value = MLP(1, self.args, name="critic")(jnp.concatenate([x, time], axis=-1))[:, 0]
        mean, smallest = low + (high - low) * nn.sigmoid(mean), np.log(self.args.std_min).item()
        log_std = smallest + (jnp.log(high - low) - smallest) * nn.sigmoid(std[:, :U])
        skew = jnp.zeros((len(x), U, U), x.dtype).at[:, *np.tril_indices(U, -1)].set(std[:, U:]) if full else None
        # A parameter that nothing trains: until the first update sets it to 1, a fixed Gaussian acts
        warm = self.param("warm", nn.initializers.zeros, ()) > 0
        first = low + half * (1 + self.args.init_mean), jnp.log(half * self.args.init_std)
        policy = Gaussian(jnp.where(warm, mean, first[0]), jnp.where(warm, log_std, first[1]), None)
        return policy._replace(skew=skew * warm if full else None), value


# --- Distribution ---
class Gaussian(NamedTuple):  # leaves [..., U]
    mean: Array
    log_std: Array
    skew: Array | None  # [..., U, U], strictly lower triangular: the Cholesky factor is diag(std) (1 + skew); None: 0


def sample_action(policy: Gaussian, noise: Array) -> Array:
    """Returns actions [..., U] from standard normal noise [..., U]; noise 0 gives the deterministic action."""
    skewed = 0 if policy.skew is None else jnp.einsum("...ij,...j->...i", policy.skew, noise)
    return policy.mean + jnp.exp(policy.log_std) * (noise + skewed)


def standardize(policy: Gaussian, action: Array) -> Array:
    """Returns the noise [..., U] that actions [..., U] come from."""
    noise = (action - policy.mean) * jnp.exp(-policy.log_std)
    if policy.skew is None:
        return noise
    solve = partial(jax.scipy.linalg.solve_triangular, lower=True, unit_diagonal=True)
    return solve(policy.skew, noise[..., None])[..., 0]


def log_prob(policy: Gaussian, action: Array) -> Array:
    """Returns the log density [...] of actions [..., U]."""
    noise = standardize(policy, action)
    return jnp.sum(-0.5 * jnp.square(noise) - policy.log_std - 0.5 * np.log(2 * np.pi).item(), axis=-1)


def entropy(policy: Gaussian) -> Array:
    """Returns the differential entropy [...] in nats."""
    return jnp.sum(policy.log_std + 0.5 * np.log(2 * np.pi * np.e).item(), axis=-1)


# --- Statistics ---
def masked_mean(x: Array, mask: Array) -> Array:
    """Returns the mean of x [*mask.shape, ...] over mask's axes where mask is 1; 0 where it is 1 nowhere."""
    weight = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.sum(x * weight, axis=tuple(range(mask.ndim))) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(x: Array, mask: Array) -> Array:
    """Returns the variance of x [*mask.shape, ...] over mask's axes where mask is 1."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def update_scaler(x: Array, scaler: Scaler, mask: Array) -> Scaler:
    """Returns the scaler after one more iteration's x [T, N, ...] where mask [T, N] is 1. Source: authors' utils.py."""
    count = scaler.count + 1
    mean_square = scaler.mean_square + (masked_mean(jnp.square(x), mask) - scaler.mean_square) / count
    return Scaler(mean_square, jnp.minimum(scaler.scale, 1 / (2 * jnp.sqrt(mean_square) + 0.001)), count)


def normalize(x: Array, scaler: Scaler, bound: float) -> Array:
    """Returns x [..., *scaler.scale.shape], scaled, clipped to +-bound; not centred."""
    return jnp.clip(x * scaler.scale, -bound, bound)


# --- Advantages and losses ---
def compute_gae(transition: Transition, value: Array, gamma: float, gae_lambda: float) -> tuple[Array, Array]:
    """Returns advantages and targets [T, N]; value is [T + 1, N], V(s_0) to V(s_T). Source: arXiv 1506.02438, (16)."""

    def step(next_advantage: Array, t: tuple) -> tuple[Array, Array]:
        reward, terminated, done, value, next_value = t
        delta = reward + gamma * next_value * (1 - terminated) - value  # truncated: its last observation's value counts
        advantage = delta + gamma * gae_lambda * (1 - done) * next_advantage
        return advantage, advantage

    steps = (transition.reward, transition.terminated, transition.done, value[:-1], value[1:])
    _, advantage = jax.lax.scan(step, jnp.zeros_like(value[0]), steps, reverse=True, unroll=16)
    return advantage, advantage + value[:-1]


def critic_loss(params: Any, batch: Batch, network: nn.Module, args: Args) -> Array:
    """Returns the mean error of the values of a minibatch."""
    error = jnp.abs(network.apply(params, batch.obs, batch.time)[1] - batch.target)
    losses = {"l1": error, "l2": error**2, "soft-l1": jnp.where(error <= 0.5, error**2, error - 0.25)}
    return jnp.mean(losses[args.value_loss])


def cma_std_loss(params: Any, batch: Batch, network: nn.Module, args: Args) -> Array:
    """Returns the loss of the std network, on minibatches of H iterations. Source: arXiv 1810.02541."""
    return -jnp.mean(nn.relu(batch.advantage) * log_prob(network.apply(params, batch.obs)[0], batch.action))


def cma_mean_loss(params: Any, batch: Batch, network: nn.Module, args: Args) -> Array:
    """Returns the loss of the mean network; ppo-cma-m also draws it to the mirror images of what failed.

    The kernel makes far actions count less: exp(-d^2 / 2), the mean over dimensions; of a full covariance, d^2 is the
    Mahalanobis distance over U. Source: arXiv 1810.02541 and the authors' policy.py.
    """
    policy, _ = network.apply(params, batch.obs)
    loss = -nn.relu(batch.advantage) * log_prob(policy, batch.action)
    if args.algorithm == "ppo-cma-m":
        squares = jnp.square(standardize(policy._replace(mean=batch.mean), batch.action))
        squares = squares if policy.skew is None else jnp.mean(squares, axis=-1, keepdims=True)
        kernel = jnp.mean(jnp.exp(-0.5 * squares), axis=-1)
        loss -= nn.relu(-batch.advantage) * kernel * log_prob(policy, 2 * batch.mean - batch.action)
    return jnp.mean(loss)


def policy_loss(params: Any, batch: Batch, network: nn.Module, args: Args) -> Array:
    """Returns the loss of a joint policy network: clipped surrogate (ppo, arXiv 1707.06347, eq. 7) or -A log pi."""
    policy, _ = network.apply(params, batch.obs)
    new_log_prob = log_prob(policy, batch.action)
    loss = -batch.advantage * new_log_prob
    if args.algorithm == "ppo":
        ratio = jnp.exp(new_log_prob - batch.log_prob)
        clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        loss = jnp.maximum(-batch.advantage * ratio, -batch.advantage * clipped)
    return jnp.mean(loss) - args.ent_coef * jnp.mean(entropy(policy))


# --- Update ---
def draw(key: Array, learner: LearnerState, slots: int, args: Args) -> Batch:
    """Returns B decisions with replacement, of each of the newest iterations and of each decision therein alike."""
    age_key, row_key = jax.random.split(key)
    age = jax.random.randint(age_key, (args.minibatch_size,), 0, jnp.minimum(slots, learner.iteration + 1))
    slot = (learner.iteration - age) % args.history_size
    row = jax.random.uniform(row_key, (args.minibatch_size,)) * learner.opt_state.counts[slot]
    batch = jax.tree.map(lambda x: x[slot, row.astype(jnp.int32)], learner.opt_state.history)
    return batch._replace(obs=jax.tree.map(partial(normalize, bound=args.clip_obs), batch.obs, learner.obs_stats))


def fit_step(
    carry: tuple, key: Array, learner: LearnerState, part: str, loss: Callable, network: Any, args: Args
) -> tuple:
    """Returns (parameters, Adam's state) of one network after one gradient step on a minibatch, and the loss."""
    params, adam = carry
    batch = draw(key, learner, args.history_size if part == "std" else 1, args)
    if args.distributed:  # each of P processes takes its P-th part
        processes, process = jax.lax.axis_size("process"), jax.lax.axis_index("process")
        batch = jax.tree.map(lambda x: x.reshape(processes, -1, *x.shape[1:])[process], batch)
    whole = lambda own: {"params": learner.params["params"] | {part: own}}  # noqa: E731
    value, grads = jax.value_and_grad(lambda own: loss(whole(own), batch, network, args))(params)
    if args.distributed:
        flat, unravel = ravel_pytree((value, grads))  # one collective costs as much as one of its leaves would
        value, grads = unravel(jax.lax.pmean(flat, "process"))
    direction, adam = optax.scale_by_adam().update(grads, adam)
    return (jax.tree.map(lambda p, d: p - args.learning_rate * d, params, direction), adam), value


def fit(learner: LearnerState, key: Array, part: str, loss: Callable, network: nn.Module, args: Args) -> tuple:
    """Returns the learner after num_updates gradient steps of one of its networks, and the mean loss."""
    step = partial(fit_step, learner=learner, part=part, loss=loss, network=network, args=args)
    own = learner.params["params"][part], learner.opt_state.adam[part]
    (params, adam), losses = jax.lax.scan(step, own, jax.random.split(key, args.num_updates))
    opt_state = learner.opt_state._replace(adam=learner.opt_state.adam | {part: adam})
    params = {"params": learner.params["params"] | {part: params}}
    return learner._replace(params=params, opt_state=opt_state), jnp.mean(losses)


def decisions(transition: Transition, repeat: int) -> tuple[Transition, Array]:
    """Returns transitions of decisions, and how many decisions of the episode came before [T + 1, N].

    A decision's reward and end are those of the steps it was held for. Steps that only held one come first, mask 0: so
    behind each decision stands the next one, or the true last observation of its episode.
    """
    mask, phase = transition.mask, (transition.episodic_length - 1) % repeat
    later = lambda x, k: jnp.pad((x * mask * (phase == k))[k:], ((0, k), (0, 0)))  # noqa: E731
    held = lambda x: sum(later(x, k) for k in range(repeat))  # noqa: E731
    order = jnp.argsort((phase == 0) | (mask == 0), axis=0, stable=True)
    pick = lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=0)  # noqa: E731
    before = jnp.concatenate([jnp.maximum(transition.episodic_length[:1] - 1, 0), transition.episodic_length])
    obs, before = jax.tree.map(lambda x: jnp.concatenate([pick(x[:-1]), x[-1:]]), (transition.obs, before))
    new = {name: pick(held(getattr(transition, name))) for name in ("reward", "terminated", "done")}
    new |= {"obs": obs, "action": pick(transition.action), "mask": pick(mask * (phase == 0))}
    return transition._replace(**new), before / repeat


def estimate(params: Any, data: tuple, gae_lambda: float, network: nn.Module, args: Args) -> tuple[Array, Array, Array]:
    """Returns advantages, targets and values [T, N] by the critic; data is (transition, scaled obs, time)."""
    transition, obs, time = data
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (obs, time))
    value = network.apply(params, *flat)[1].reshape(time.shape)  # [T + 1, N]
    return *compute_gae(transition, value, args.gamma, gae_lambda), value[:-1]


def remember(learner: LearnerState, batch: Batch, mask: Array, args: Args) -> LearnerState:
    """Returns the learner with an iteration's batch [T*N, ...] in its ring, where mask is 1 first."""
    order, slot = jnp.argsort(mask == 0, stable=True), learner.iteration % args.history_size
    history = jax.tree.map(lambda ring, x: ring.at[slot].set(x[order]), learner.opt_state.history, batch)
    counts = learner.opt_state.counts.at[slot].set(jnp.sum(mask))
    return learner._replace(opt_state=learner.opt_state._replace(history=history, counts=counts))


def update(learner: LearnerState, transition: Transition, network: nn.Module, args: Args) -> tuple[LearnerState, dict]:
    """Returns the learner after an iteration (critic, then std from H iterations, then mean from one), and metrics."""
    if args.distributed:  # everybody sees the whole rollout, so that P processes compute exactly what one does
        transition = jax.lax.all_gather(transition, "process", axis=1, tiled=True)
    ended, steps = transition.done * transition.mask, transition
    original = jax.tree.map(lambda x: x[:, :, 0], transition.obs)  # of an observation's copies
    transition, time = decisions(transition._replace(obs=original), args.action_repeat)
    if args.scale_obs:
        update_one = lambda x, scaler: update_scaler(x[:-1], scaler, transition.mask)  # noqa: E731
        learner = learner._replace(obs_stats=jax.tree.map(update_one, transition.obs, learner.obs_stats))
    learner = learner._replace(params={"params": learner.params["params"] | {"warm": jnp.ones(())}})
    obs = jax.tree.map(partial(normalize, bound=args.clip_obs), transition.obs, learner.obs_stats)
    data = transition, obs, time
    keys = jax.random.split(jax.random.fold_in(learner.key, 2 * learner.iteration + 1), 4)
    _, target, value = estimate(learner.params, data, 1.0, network, args)  # Monte Carlo returns
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    raw, acted_on = jax.tree.map(lambda x: flat(x[:-1]), (transition.obs, obs))
    policy, mask = network.apply(learner.params, acted_on)[0], flat(transition.mask)
    action = jnp.clip(flat(transition.action), network.action_space.low.ravel(), network.action_space.high.ravel())
    batch = Batch(raw, flat(time[:-1]), action, 0 * mask, flat(target), policy.mean, log_prob(policy, action))
    learner = remember(learner, batch, mask, args)
    first = draw(keys[0], learner, 1, args)  # the critic's biases centre its very first minibatch
    centred = network.init(keys[0], first.obs, first.time)["params"]["critic"]
    critic = jax.tree.map(partial(jnp.where, learner.iteration == 0), centred, learner.params["params"]["critic"])
    learner = learner._replace(params={"params": learner.params["params"] | {"critic": critic}})
    learner, value_loss = fit(learner, keys[1], "critic", critic_loss, network, args)
    advantage, _, _ = estimate(learner.params, data, args.gae_lambda, network, args)
    advantage = nn.relu(advantage) if args.algorithm in ("ppo-cma", "pg-pos") else advantage
    advantage = advantage / (jnp.sqrt(masked_var(advantage, transition.mask)) + 1e-10)
    learner = remember(learner, batch._replace(advantage=flat(advantage)), mask, args)
    metrics = {"losses/value_loss": value_loss, "charts/learning_rate": jnp.float32(args.learning_rate)}
    if args.algorithm.startswith("ppo-cma"):
        learner, metrics["cma/std_loss"] = fit(learner, keys[2], "std", cma_std_loss, network, args)
        learner, metrics["losses/policy_loss"] = fit(learner, keys[3], "mean", cma_mean_loss, network, args)
    else:
        learner, metrics["losses/policy_loss"] = fit(learner, keys[3], "policy", policy_loss, network, args)
    new, _ = network.apply(learner.params, acted_on)
    log_ratio = log_prob(new, action) - batch.log_prob
    samples = {"approx_kl": jnp.exp(log_ratio) - 1 - log_ratio, "entropy": entropy(new)}
    samples |= {"clipfrac": (jnp.abs(jnp.exp(log_ratio) - 1) > args.clip_coef).astype(mask.dtype)}
    metrics |= {f"losses/{name}": masked_mean(x, mask) for name, x in samples.items()}
    unexplained = masked_var(target - value, transition.mask) / jnp.maximum(masked_var(target, transition.mask), 1e-8)
    metrics |= {"losses/explained_variance": 1 - unexplained, "policy/param_norm": optax.tree.norm(learner.params)}
    metrics |= {"cma/std": masked_mean(jnp.mean(jnp.exp(new.log_std), axis=-1), mask)}
    for name in ("episodic_return", "episodic_length"):
        metrics[f"charts/{name}"] = jnp.where(jnp.any(ended), masked_mean(getattr(steps, name), ended), jnp.nan)
    returns = jnp.concatenate([learner.returns, jnp.where(ended > 0, steps.episodic_return, jnp.nan).ravel()])
    new = {"iteration": learner.iteration + 1, "episodes": learner.episodes + jnp.sum(ended).astype(jnp.int32)}
    new |= {"returns": returns[jnp.argsort(~jnp.isnan(returns), stable=True)[-100:]]}
    metrics |= {"charts/episodic_return_100": jnp.nanmean(new["returns"])}
    return learner._replace(**new), metrics


# --- Environments ---
class TimeStep(NamedTuple):  # what S*N environments return, leaves [S*N, ...]
    obs: Any  # float32 [S*N, K, ...]; an ended episode's last observation, then on the next step a new one's first
    reward: Array
    terminated: Array  # bool, as truncated; never both
    truncated: Array


class Environment(NamedTuple):  # S*N environments behind two functions
    first: tuple[Any, TimeStep]  # env_state and what it shows after a reset
    step: Callable[[Any, Array], tuple[Any, TimeStep]]  # (env_state, action [S*N, *action_space.shape])
    action_space: Any
    threshold: float | None  # mean return at which the environment counts as solved


def make_env(args: Args, env_seeds: list[int]) -> Environment:
    """Returns one environment per seed. Stops with exit code 2 if the id is unknown, or its actions no bounded Box."""
    known, env_id = [*envpool.list_all_envs(), *gymnasium.registry], args.env_id
    if env_id not in known and ":" not in env_id:
        fail(f"--env-id {env_id} is unknown; nearest: {', '.join(difflib.get_close_matches(env_id, known)) or 'none'}")
    try:
        env = (make_envpool if env_id in envpool.list_all_envs() else make_gymnasium)(env_id, env_seeds)
    except (ImportError, gymnasium.error.Error) as error:
        fail(f"--env-id {env_id} cannot be made, install or import what it needs: {error}")
    if not isinstance(env.action_space, gymnasium.spaces.Box):
        other = "this script needs Box: use ppo_atari.py for Atari games, else ppo_icm_lstm.py"
        fail(f"--env-id {env_id} has {type(env.action_space).__name__} actions, {other}")
    if not env.action_space.is_bounded():
        fail(f"--env-id {env_id} has actions without bounds, which PPO-CMA's networks need: use ppo_continuous.py")
    return repeated(env, args.action_repeat)


def repeated(env: Environment, repeat: int) -> Environment:
    """Returns environments that hold an action for `repeat` steps; a new episode begins with a new action."""
    shape = (len(env.first[1].reward), *env.action_space.shape)

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        inner, held, count = env_state  # count: steps of the episode, -1 at its end
        action = jnp.where(count.reshape(-1, *(1,) * (action.ndim - 1)) % repeat == 0, action, held)
        inner, new = env.step(inner, action)
        return (inner, action, jnp.where(new.terminated | new.truncated, -1, count + 1)), new

    state = env.first[0], jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32)
    return env._replace(first=(state, env.first[1]), step=step)


def make_envpool(env_id: str, env_seeds: list[int]) -> Environment:
    """EnvPool: send and recv are XLA calls, so that a rollout is one compiled scan. MuJoCo there speaks float64."""
    pool = envpool.make(env_id, env_type="gymnasium", num_envs=len(env_seeds), seed=env_seeds)
    handle, recv, send, _ = pool.xla()
    ids, dtype = np.arange(len(env_seeds), dtype=np.int32), list(pool.spec.action_array_spec.values())[-1].dtype

    def receive(handle: Array) -> tuple[Array, TimeStep]:
        handle, (obs, reward, terminated, truncated, _) = recv(handle)
        obs = jax.tree.map(lambda x: x[:, None].astype(jnp.float32), obs)
        return handle, TimeStep(obs, reward.astype(jnp.float32), terminated, truncated)

    def step(handle: Array, action: Array) -> tuple[Array, TimeStep]:
        return receive(send(handle, action.astype(dtype), ids))

    pool.async_reset()
    first, threshold = jax.jit(receive)(jnp.asarray(handle)), getattr(pool.spec.config, "reward_threshold", None)
    return Environment(jax.block_until_ready(first), step, pool.action_space, threshold)


def make_gymnasium(env_id: str, env_seeds: list[int]) -> Environment:
    """Gymnasium: a vector environment on the host, called in order from the compiled rollout.

    `info["non-terminal done"]` makes an end a truncation; a method `augment_observation` of the environment (one
    observation in, K out, the original first) has all K trained on. Raises: ValueError if K changes."""
    vector = gymnasium.make_vec(env_id, num_envs=len(env_seeds), vectorization_mode="sync")
    space, copies = vector.single_action_space, partial(jax.tree.map, lambda x: x[None])
    if vector.envs[0].has_wrapper_attr("augment_observation"):
        copies = vector.envs[0].get_wrapper_attr("augment_observation")

    def time_step(obs: Any, reward: Any, terminated: np.ndarray, truncated: np.ndarray, info: dict) -> TimeStep:
        each = [copies(jax.tree.map(lambda x, i=i: x[i], obs)) for i in range(len(env_seeds))]
        obs = jax.tree.map(lambda *x: np.stack(x).astype(np.float32), *each)
        terminated, ended = terminated & ~truncated, np.asarray(info.get("non-terminal done", False), bool)
        return TimeStep(obs, np.float32(reward), terminated & ~ended, truncated | (terminated & ended))

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        host_step = lambda action: time_step(*vector.step(np.asarray(action, space.dtype)))  # noqa: E731
        return env_state, io_callback(host_step, like, action, ordered=True)

    first = time_step(vector.reset(seed=env_seeds)[0], *np.zeros((3, len(env_seeds)), bool), {})
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
    return Environment(((), jax.tree.map(jnp.asarray, first)), step, space, vector.spec.reward_threshold)


def bounded(action: Array, space: Any, args: Args) -> Array:
    """Returns what the environment gets for actions [..., U]: [..., *space.shape] inside its bounds."""
    return jnp.clip(action.reshape(*action.shape[:-1], *space.shape), space.low, space.high).astype(action.dtype)


# --- Rollout ---
class RunnerState(NamedTuple):  # the carry of the rollout
    env_state: Any
    time_step: TimeStep
    episode: tuple[Array, Array, Array]  # Transition's episodic return, episodic length and discounted return so far


def env_step(runner: RunnerState, noise: Array, learner: Any, env: Environment, network: Any, args: Args) -> tuple:
    """Returns (RunnerState, Transition) after one step with noise [S, N, U]; leaves are [S*N, ...]."""
    last = runner.time_step
    obs = jax.tree.map(lambda x: x[:, 0].reshape(*noise.shape[:2], *x.shape[2:]), last.obs)  # [S, N, ...]
    obs = jax.tree.map(jax.vmap(partial(normalize, bound=args.clip_obs)), obs, learner.obs_stats)
    policy, _ = jax.vmap(network.apply)(learner.params, obs)
    action = sample_action(policy, noise).reshape(-1, noise.shape[-1])
    env_state, new = env.step(runner.env_state, bounded(action, env.action_space, args))
    mask = 1 - (last.terminated | last.truncated).astype(jnp.float32)
    done, terminated = (x.astype(jnp.float32) for x in (new.terminated | new.truncated, new.terminated))
    (total, length, discounted), reward = runner.episode, new.reward
    episode = (total + reward) * mask, (length + 1) * mask, (args.gamma * discounted + reward) * mask
    return RunnerState(env_state, new, episode), Transition(last.obs, action, reward, terminated, done, mask, *episode)


def rollout(runner: RunnerState, learner: LearnerState, env: Environment, network: nn.Module, args: Args) -> tuple:
    """Returns (RunnerState, Transition [S, T, N, ...]) after T steps of S*N environments; obs is [S, T + 1, N, ...]."""
    local, size = args.num_envs // jax.process_count(), int(np.prod(env.action_space.shape))
    keys = jax.vmap(jax.random.fold_in)(learner.key, 2 * learner.iteration)  # 2 * iteration + 1: shuffles
    noise = partial(jax.random.normal, shape=(args.num_steps, args.num_envs, size), dtype=jnp.float32)
    noise = jax.vmap(noise, out_axes=1)(keys)[:, :, jax.process_index() * local :][:, :, :local]  # [T, S, N / P, U]
    step = partial(env_step, learner=learner, env=env, network=network, args=args)
    runner, transition = jax.lax.scan(step, runner, noise * (args.mode == "train"))
    obs = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), transition.obs, runner.time_step.obs)
    by_seed = lambda x: jnp.moveaxis(x.reshape(len(x), -1, local, *x.shape[2:]), 1, 0)  # noqa: E731
    return runner, jax.tree.map(by_seed, transition._replace(obs=obs))


# --- Run ---
def configure(args: Args) -> Mesh:
    """Sets JAX up and returns the updates' devices, [P, seeds]; a CPU's cores are as many devices."""
    cache = jax.config.jax_compilation_cache_dir or str(Path.home() / ".cache" / "ppo_jax")
    jax.config.update("jax_compilation_cache_dir", cache)
    if sys.platform == "linux" and args.mode == "train" and args.num_envs * args.num_seeds == 1:
        os.sched_setaffinity(0, {ctypes.CDLL(None).sched_getcpu()})  # waking another core takes longer than a step
    divisor = lambda n, most: max(d for d in range(1, most + 1) if n % d == 0)  # noqa: E731
    cores, rows = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(), args.minibatch_size
    seeds = divisor(args.num_seeds, cores)
    # Cores that seeds leave idle share minibatches, as P processes do; fewer rows for each are not worth it
    parts = divisor(np.gcd(args.num_envs, rows), max(1, min(cores // seeds, rows // 100)))
    if args.platform != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu"}[args.platform])
    try:
        one_process = partial(jax.config.update, "jax_num_cpu_devices", seeds * parts)
        (jax.distributed.initialize if args.distributed else one_process)()
        devices = np.array(jax.devices("gpu" if args.platform == "gpu" else None)).reshape(jax.process_count(), -1)
    except (RuntimeError, ValueError) as error:
        fail(f"--platform gpu needs jax[cuda13], --distributed a start by mpirun or srun: {error}")
    fit = 1 if args.distributed else divisor(args.num_seeds, devices.size)
    alone = devices[0, 0].platform == "cpu" and not args.distributed
    return Mesh(devices.reshape(parts, seeds) if alone else devices[:, :fit], ("process", "seed"))


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file atomically."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2))
    path.with_suffix(".tmp").replace(path)


def open_folder(args: Args, learner: LearnerState) -> tuple[ocp.CheckpointManager, LearnerState, np.ndarray]:
    """Returns checkpoints, newest learner, seconds [4]. Stops (2) at a run that has other settings or is unreadable."""
    free = "run_dir total_timesteps clobber checkpoint_interval log_interval mode eval_episodes video platform".split()
    path, settings = args.folder / "args.json", json.loads(json.dumps(asdict(args)))
    if jax.process_index() == 0 and args.mode == "train":
        if args.clobber:
            shutil.rmtree(args.folder, ignore_errors=True)
        old = json.loads(path.read_text()) if path.exists() else settings
        differ = [k for k, v in settings.items() if old.get(k) != v and k not in [*free, "distributed"]]
        if flags := ", ".join(f"--{k.replace('_', '-')} {settings[k]} (there: {old.get(k)})" for k in differ):
            fail(f"{args.folder} holds a run with other settings: {flags}; choose another --exp-name, or --clobber")
        (args.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        shutil.copy(__file__, args.folder)
    multihost_utils.sync_global_devices("run folder")
    mine = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, multiprocessing_options=mine)
    manager, state = ocp.CheckpointManager(args.folder / "checkpoints", options=options), (learner, np.zeros(4))
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            return manager, *manager.restore(step, args=ocp.args.StandardRestore(state))
        except Exception as error:  # whatever a damaged file makes of itself
            print(f"checkpoint {step} is damaged, trying the one before: {str(error)[:100]}", file=sys.stderr)
    if manager.all_steps() or args.mode == "eval":
        fail(f"--run-dir {args.folder} has no readable checkpoint: train, restore a backup, or start with --clobber")
    return manager, *state


def make_run(args: Args) -> tuple[Callable, RunnerState, nn.Module, LearnerState, Environment]:
    """Returns the compiled rollout, the runner, the network, new learners [S, ...] on the host, the environments."""
    seeds, local = range(args.seed, args.seed + args.num_seeds), args.num_envs // jax.process_count()
    env_seeds = np.stack([np.random.SeedSequence(seed).generate_state(args.num_envs) >> 1 for seed in seeds])
    env_seeds = env_seeds[:, jax.process_index() * local :][:, :local].ravel().tolist()
    # On the CPU beside the environments; EnvPool's MuJoCo speaks float64, which nothing outside of here may
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        env = make_env(args, env_seeds)
        runner = RunnerState(*env.first, episode=(jnp.zeros(len(env_seeds), jnp.float32),) * 3)
        network = ActorCritic(env.action_space, args)
        obs = jax.tree.map(lambda x: np.asarray(x[0, 0]), runner.time_step.obs)
        init = jax.jit(partial(init_learner, obs=obs, network=network, args=args))
        learner = jax.tree.map(lambda *x: np.stack(x), *[init(np.uint32(seed)) for seed in seeds])  # [S, ...]
        act = jax.jit(partial(rollout, env=env, network=network, args=args))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # holds a pointer: of no use to others
        act = act.lower(runner, learner._replace(opt_state=None)).compile()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return act, runner, network, learner, env


def init_learner(seed: Array, obs: Any, network: nn.Module, args: Args) -> LearnerState:
    """Returns one seed's new learner, whose policy network has learnt the first Gaussian; obs is one observation."""
    key, init_key, run_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    states = lambda key: jax.tree.map(lambda x: jax.random.normal(key, (256, *x.shape), jnp.float32), obs)  # noqa: E731
    params = network.init(init_key, states(init_key))["params"]
    goal, _ = network.apply({"params": params}, states(init_key))  # as long as warm is 0
    goal = jax.tree.map(lambda x: x[:1], goal)
    step = partial(init_step, goal=goal, states=states, network=network, args=args)
    start = params | {"warm": jnp.float32(1)}
    keys = jax.random.split(key, args.init_updates)
    (start, _), _ = jax.lax.scan(step, (start, optax.scale_by_adam().init(start)), keys)
    params = start | {"warm": jnp.float32(0), "critic": params["critic"]}
    rows = (args.history_size, args.num_envs * args.num_steps)
    zeros = lambda *shape: jnp.zeros((*rows, *shape), jnp.float32)  # noqa: E731
    action = zeros(goal.mean.size)
    history = Batch(jax.tree.map(lambda x: zeros(*x.shape), obs), zeros(), action, zeros(), zeros(), action, zeros())
    adam = {part: optax.scale_by_adam().init(params[part]) for part in params if part != "warm"}
    opt_state = Training(adam, history, counts=jnp.zeros(args.history_size, jnp.float32))
    scaler = lambda x: Scaler(jnp.zeros_like(x), jnp.ones_like(x), jnp.float32(0))  # noqa: E731
    counts = {"iteration": jnp.int32(0), "episodes": jnp.int32(0), "returns": jnp.full(100, jnp.nan, jnp.float32)}
    return LearnerState({"params": params}, opt_state, jax.tree.map(scaler, obs), key=run_key, **counts)


def init_step(carry: tuple, key: Array, goal: Gaussian, states: Callable, network: nn.Module, args: Args) -> tuple:
    """Returns (parameters, Adam's state) after one step of regression to the Gaussian goal on random states."""

    def loss(params: Any) -> Array:
        policy, _ = network.apply({"params": params}, states(key))
        skew = 0 if policy.skew is None else jnp.mean(jnp.square(policy.skew))
        std = jnp.mean(jnp.square(jnp.exp(policy.log_std) - jnp.exp(goal.log_std)))
        return jnp.mean(jnp.square(policy.mean - goal.mean)) + std + skew

    params, adam = carry
    direction, adam = optax.scale_by_adam().update(jax.grad(loss)(params), adam)
    return (jax.tree.map(lambda p, d: p - args.learning_rate * d, params, direction), adam), None


def open_writers(args: Args, network: nn.Module, runner: RunnerState, step: int) -> list[SummaryWriter]:
    """Returns one event file per seed, in the run folder or its sub-folders, that begins with settings and networks."""
    names = [f"seed{args.seed + s}" if args.num_seeds > 1 else "" for s in range(args.num_seeds)]
    writers = [SummaryWriter(str(args.folder / name), purge_step=step + 1) for name in names]
    obs = jax.tree.map(lambda x: np.asarray(x[:1, 0]), runner.time_step.obs)
    layers = network.tabulate(jax.random.PRNGKey(0), obs, console_kwargs={"width": 120, "force_terminal": False})
    settings = ["|setting|value|", "|-|-|", *(f"|{k}|{v}|" for k, v in asdict(args).items())]
    for writer in writers:
        writer.add_text("hyperparameters", "\n".join(settings), step)
        writer.add_text("networks", f"```\n{layers}\n```", step)
    return writers


def log(writers: list, step: int, metrics: dict, transition: Transition, histograms: bool) -> None:
    """Writes an iteration's metrics [S], and histograms of its rollout, to event files."""
    for s, writer in enumerate(writers):
        for name in [name for name in metrics if np.isfinite(metrics[name][s])]:
            writer.add_scalar(name, metrics[name][s], step)
        for name in ("obs", "action", "reward") if histograms else ():
            values = [np.ravel(x[s]) for x in jax.tree.leaves(getattr(transition, name))]
            writer.add_histogram(f"rollout/{name}", np.concatenate(values), step)


def save(args: Args, manager: ocp.CheckpointManager, learner: LearnerState, seconds: np.ndarray) -> None:
    """Writes a checkpoint and result.json. Stops with exit code 1 where that fails, the last good checkpoint kept."""
    iteration, seeds = int(learner.iteration[0]), [args.seed + s for s in range(args.num_seeds)]
    timesteps, (_, acting, compiling, learning) = iteration * args.num_envs * args.num_steps, seconds.tolist()
    total = float(sum(seconds))
    spent = {"sps": total - compiling, "sps_with_compile": total, "sps_rollout": acting, "sps_update": learning}
    returns = [float(np.nanmean(x)) if np.isfinite(x).any() else None for x in learner.returns]
    content = {"script": Path(__file__).name, "env_id": args.env_id, "args": asdict(args), "seeds": seeds}
    content |= {"finished": iteration >= args.num_iterations, "timesteps": timesteps, "episodic_return": returns}
    content |= {"wall_time": total, "compile_time": compiling, "episodes": learner.episodes.tolist()}
    content |= {"eval_return": None} | {name: timesteps * len(seeds) / x for name, x in spent.items()}
    content |= {"versions": {x: sys.modules[x].__version__ for x in "jax flax optax envpool gymnasium numpy".split()}}
    content |= {"device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {jax.process_count()} process(es)"}
    try:
        manager.save(iteration, args=ocp.args.StandardSave((learner, seconds)))
        manager.wait_until_finished()
        write_json(args.folder / "result.json", content)
    except (OSError, ValueError) as error:
        fail(f"--run-dir {args.folder} takes no checkpoint, the last good one stays; make room: {error}", code=1)


def train(args: Args, mesh: Mesh) -> None:
    """Trains to the end, from the newest checkpoint if there is one; SIGINT and SIGTERM end it after the iteration."""
    clock, began, chief, signals, writers = time.perf_counter, time.perf_counter(), jax.process_index() == 0, [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    act, runner, network, learner, _env = make_run(args)  # a pool freed too early takes the process with it
    manager, learner, seconds = open_folder(args, learner)
    first, total, batch_size = int(learner.iteration[0]), args.num_iterations, args.num_envs * args.num_steps
    if first >= total:
        return print(f"{args.folder} is finished, {first * batch_size} steps: raise --total-timesteps, or --clobber")
    specs = PartitionSpec("seed"), PartitionSpec("seed", None, "process")  # of leaves [S, ...] and [S, T, N, ...]
    learn = jax.vmap(partial(update, network=network, args=replace(args, distributed=mesh.shape["process"] > 1)))
    learn = jax.shard_map(learn, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    learn, put = jax.jit(learn, donate_argnums=0), multihost_utils.host_local_array_to_global_array
    learner = put(learner, mesh, specs[0])
    plain = {"mininterval": 10, "bar_format": "{n_fmt} of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}\n"}
    steps = {"total": total * batch_size, "initial": first * batch_size, "unit": "step", "unit_scale": args.num_seeds}
    marks, bar = [clock()], tqdm(disable=not chief, **steps, **({} if sys.stderr.isatty() else plain))
    seconds = seconds + np.array([0, 0, marks[0] - began, 0])
    for iteration in range(first + 1, total + 1):
        marks = [marks[-1], clock()]
        runner, transition = jax.block_until_ready(act(runner, jax.device_get(learner._replace(opt_state=None))))
        marks.append(clock())
        data = put(jax.device_get(transition), mesh, specs[1])
        learn = learn.lower(learner, data).compile() if iteration == first + 1 else learn
        marks.append(clock())
        learner, metrics = learn(learner, data)
        metrics = jax.device_get(metrics)
        marks.append(clock())
        seconds = seconds + np.diff(marks)
        if bad := [name for name in metrics if "charts" not in name and not np.isfinite(metrics[name]).all()]:
            bar.close()
            fail(f"iteration {iteration}: {bad[0]} is not finite; checkpoint {manager.latest_step()} stays", code=1)
        if chief and iteration % args.log_interval == 0:
            writers = writers or open_writers(args, network, runner, first * batch_size)
            metrics["charts/SPS"] = np.full(args.num_seeds, args.num_seeds * batch_size / (marks[-1] - marks[0]))
            log(writers, iteration * batch_size, metrics, transition, iteration % (10 * args.log_interval) == 0)
        bar.set_postfix_str(f"return {metrics['charts/episodic_return_100'].mean():.1f}", refresh=False)
        bar.update(batch_size)
        if args.distributed:
            signals = [int(multihost_utils.process_allgather(np.array([*signals, 0])[0]).max())]
        if chief and (any(signals) or iteration == total or iteration % args.checkpoint_interval == 0):
            save(args, manager, jax.device_get(learner), seconds)
        if any(signals):
            sys.exit(128 + signals[0])


def evaluate(asked: Args) -> None:
    """Runs the newest checkpoint's policies, one episode in each of many environments, and says how they did."""
    if not ((folder := asked.folder) / "args.json").exists():
        fail(f"--run-dir {folder} holds no run: train first, or name its folder")
    saved = json.loads((folder / "args.json").read_text()) | {"mode": "eval", "run_dir": str(folder), "num_steps": 100}
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()} | {"num_envs": asked.eval_episodes}
    act, runner, network, learner, env = make_run(args := Args(**args))
    _, learner, _ = open_folder(args, learner)
    returns = np.full((args.num_seeds, args.num_envs), np.nan)
    while np.isnan(returns).any():
        runner, transition = act(runner, learner._replace(opt_state=None))
        ended = np.asarray(transition.done * transition.mask) > 0  # [S, T, N]
        ends = np.take_along_axis(np.asarray(transition.episodic_return), ended.argmax(1)[:, None], axis=1)[:, 0]
        returns = np.where(np.isnan(returns) & ended.any(1), ends, returns)
    rows = [{"mean": float(x.mean()), "std": float(x.std()), "episodes": len(x)} for x in returns]
    for seed, row in enumerate(rows, args.seed):
        solved = "" if env.threshold is None else f"; solved from {env.threshold:g}: {row['mean'] >= env.threshold}"
        print(f"seed {seed}: return {row['mean']:.2f} +- {row['std']:.2f} over {row['episodes']} episodes{solved}")
    write_json(folder / "result.json", json.loads((folder / "result.json").read_text()) | {"eval_return": rows})
    if asked.video:
        film(args, env, network, jax.tree.map(lambda x: x[0], learner))


def film(args: Args, env: Environment, network: nn.Module, learner: LearnerState) -> None:
    """Films one deterministic episode as videos/<env-id>.mp4 and .gif, MuJoCo through Gymnasium's own environment."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    native = "mujoco" not in str(envpool.registration.registry.specs.get(args.env_id, "mujoco"))
    make, apply = partial(envpool.make, env_type="gymnasium") if native else gymnasium.make_vec, jax.jit(network.apply)
    try:
        vector, frames, done = make(args.env_id, num_envs=1, render_mode="rgb_array"), [], False
        obs, _ = vector.reset()
        while not np.any(done):
            frames.append(np.asarray(vector.render()[0]))
            obs = jax.tree.map(lambda x, s: normalize(np.float32(x), s, args.clip_obs), obs, learner.obs_stats)
            if (len(frames) - 1) % args.action_repeat == 0:
                action = bounded(apply(learner.params, obs)[0].mean, env.action_space, args)
            obs, _, *done, _ = vector.step(np.asarray(action))
    except Exception as error:  # no OpenGL, no such environment in Gymnasium: whatever keeps a renderer from working
        return print(f"--video: {args.env_id} cannot be filmed, see README: {str(error)[:99]}", file=sys.stderr)
    path = args.folder / "videos" / args.env_id.replace("/", "_").replace(":", "_")
    path.parent.mkdir(exist_ok=True)
    imageio.v3.imwrite(f"{path}.mp4", np.stack(frames), fps=30)
    imageio.v3.imwrite(f"{path}.gif", np.stack(frames)[:300:3, ::2, ::2], duration=100, loop=0)
    print(f"filmed {len(frames)} steps: {path}.mp4, {path}.gif")


class Agent:
    """PPO-CMA by hand, from a loop of one's own. Its methods and their order are those of the authors' Agent.

    agent = Agent(obs, action_space, **settings); agent.init(seed); action = agent.act(obs);
    agent.memorize(obs, action, reward, next_obs, terminated, truncated); agent.update_with_memorized().
    """

    def __init__(self, obs: Any, action_space: Any, capacity: int = 8000, **settings: Any) -> None:
        """Takes one observation, the bounded Box of actions, the most decisions between two updates, flags of Args."""
        self.args = Args(num_envs=1, num_steps=capacity, **{"action_repeat": 1} | settings)
        self.space, self.network = action_space, ActorCritic(action_space, self.args)
        self.obs, self.memory = jax.tree.map(np.float32, obs), []
        self.update = jax.jit(partial(update, network=self.network, args=self.args), donate_argnums=0)
        self.policy = jax.jit(self._policy)

    def _policy(self, learner: LearnerState, obs: Any, noise: Array) -> Array:
        obs = jax.tree.map(lambda x, s: normalize(x[None], s, self.args.clip_obs), obs, learner.obs_stats)
        return sample_action(self.network.apply(learner.params, obs)[0], noise)[0]

    def init(self, seed: int = 1) -> None:
        """Makes a new learner."""
        make = jax.jit(partial(init_learner, obs=self.obs, network=self.network, args=self.args))
        self.learner = make(np.uint32(seed))
        self.random = np.random.default_rng(seed)

    def act(self, obs: Any, deterministic: bool = False) -> np.ndarray:
        """Returns an action of the space for one observation."""
        noise = self.random.standard_normal((1, int(np.prod(self.space.shape)))) * (not deterministic)
        action = self.policy(self.learner._replace(opt_state=None), obs, np.float32(noise))
        return np.asarray(bounded(action, self.space, self.args))

    def memorize(self, obs: Any, action: Any, reward: float, next_obs: Any, terminated: bool, truncated: bool) -> None:
        """Remembers one decision for the next update."""
        self.memory.append((obs, action, reward, next_obs, terminated, truncated))

    def update_with_memorized(self) -> float:
        """Returns the mean return of the episodes that ended in what was memorized, learns from it and forgets it.

        An unfinished episode's rest is worth what the critic says. Raises: ValueError where it exceeds the capacity.
        """
        nothing = jax.tree.map(np.zeros_like, self.obs), np.zeros(self.space.shape).ravel()
        none = Transition(*nothing, *(np.float32(0),) * 7)
        rows, length, total, last = [], 0, 0.0, self.obs
        for obs, action, reward, next_obs, terminated, truncated in self.memory:
            if rows and rows[-1].done:
                rows.append(none._replace(obs=last))  # the true last observation, as environments show it
                length, total = 0, 0.0
            length, total, last = length + 1, total + reward, next_obs
            ends = terminated, terminated or truncated
            rows.append(Transition(obs, np.ravel(action), reward, *ends, 1.0, total, length, 0.0))
        if len(rows) > self.args.num_steps:
            raise ValueError(f"{len(rows)} decisions and episode ends memorized: raise capacity={self.args.num_steps}")
        rows = [none] * (self.args.num_steps - len(rows)) + rows
        data = jax.tree.map(lambda *x: np.stack(x).astype(np.float32)[:, None], *rows)  # [T, 1, ...]
        obs = jax.tree.map(lambda x, y: np.concatenate([x, np.float32(y)[None, None]])[:, :, None], data.obs, last)
        self.learner, metrics = self.update(self.learner, data._replace(obs=obs))
        self.memory = []
        return float(metrics["charts/episodic_return"])


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    mesh = configure(args)
    validate(args)
    train(args, mesh) if args.mode == "train" else evaluate(args)


if __name__ == "__main__":
    main()
