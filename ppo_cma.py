# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10",
#   "flax>=0.12",
#   "optax>=0.2.6",
#   "envpool>=1.2",
#   "gymnasium[box2d,mujoco]>=1.2",
#   "tyro>=0.9",
#   "tensorboard>=2.19",
#   "tqdm>=4.66",
#   "imageio[ffmpeg]>=2.37",
# ]
# ///
"""PPO-CMA-m, PPO-CMA and PPO for bounded continuous (Box) actions, as published. One file.

    python ppo_cma.py --env-id MountainCarContinuous-v0 --seed 1  # the same command again resumes
    python ppo_cma.py --env-id Hopper-v4 --action-repeat 1 --batch-size 512  # MuJoCo
    python ppo_cma.py --env-id MountainCarContinuous-v0 --seed 1 --mode eval --video

PPO-CMA: Hämäläinen et al., arXiv 1810.02541, and the authors' code. GAE: 1506.02438.
Axes are always [S, T, N, ...]: seeds, steps, environments per seed. H iterations of history,
minibatches of B rows, U action size, P processes. An iteration has num_envs * num_steps simulation
steps; one decision of the policy is held for action_repeat of them.

Differs from the authors' code:
1. Rollouts have a fixed size. Episodes go on in the next; where a return is cut, the critic's
   value is the rest.
2. Truncated steps bootstrap from the value of their true last observation, terminated ones do not
   (theirs: all do).
3. Decisions are held for 8 steps, not 2: the first policy finds MountainCarContinuous's goal five
   times as often.
4. --covariance full, with a Cholesky factor per state, is ours.
"""

import ast
import difflib
import fcntl
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import envpool
import flax
import flax.linen as nn
import gymnasium
import imageio.v3
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from gymnasium import spaces
from jax import Array
from jax.experimental import io_callback, multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


# --- Settings ---
@dataclass(frozen=True)  # hashable: goes into jit as a static argument
class Args:
    # Run
    env_id: str = "MountainCarContinuous-v0"
    """environment of EnvPool or Gymnasium, or module:EnvId (module is imported first)"""
    env_kwargs: str = "{}"
    """keyword arguments of the environment's constructor, as JSON: '{"terrain": "hills"}'"""
    seed: int = 1
    """random seed; of several, the first"""
    num_seeds: int = 1
    """S, independent runs in this process, with seeds seed, seed + 1, ..."""
    total_timesteps: int = 1_000_000
    """environment steps per seed; whole rollouts, so rounded down"""
    exp_name: str = "ppo-cma"
    """name of this experiment, a part of the run folder"""
    run_dir: str = ""
    """run folder; empty: runs/<script>/<env-id>/<exp-name>/seed<seed>"""
    clobber: bool = False
    """delete the run in the run folder and start afresh"""
    checkpoint_interval: int = 50
    """iterations between checkpoints"""
    keep_best: bool = False
    """also keep the checkpoint whose last 100 episodes earned the most, on average over seeds"""
    use_best: bool = False
    """in eval mode, run the policy of that checkpoint, not the last one's"""
    log_interval: int = 1
    """iterations between writes to TensorBoard (histograms: every tenth write)"""
    mode: Literal["train", "eval"] = "train"
    """eval: run the run folder's policy"""
    deterministic: bool = True
    """in eval mode, take the most likely actions, not samples"""
    eval_episodes: int = 100
    """evaluation episodes per seed"""
    eval_steps: int = 100_000
    """steps after which an evaluation episode that does not end counts as it is"""
    video: bool = False
    """in eval mode, film an episode of the first seed as mp4 and GIF"""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """where updates run, and JAX-native environments"""
    act_on: Literal["auto", "cpu", "device"] = "auto"
    """policies of other environments: beside them, or where updates run (auto: so for images)"""
    distributed: bool = False
    """one of P processes started by mpirun or srun; each steps num_envs / P environments"""
    vectorization: Literal["sync", "async"] = "sync"
    """Gymnasium's environments one after another, or each in a process of its own"""
    # Rollout
    num_envs: int = 4
    """N, parallel environments per seed"""
    num_steps: int = 1000
    """T, steps per environment and rollout"""
    hard_resets: bool = False
    """begin every rollout of training with new episodes; longer ones than it never end, then"""
    action_repeat: int = 8
    """simulation steps that a decision is held for; 1 or 2 for MuJoCo"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """GAE mixing: 0 is the one-step error, 1 the Monte Carlo return"""
    scale_obs: bool = True
    """divide observations by twice the root of the largest mean square of an iteration so far"""
    clip_obs: float = math.inf
    """bound on normalised observations (inf: off)"""
    # Update
    algorithm: Literal["ppo-cma-m", "ppo-cma", "ppo", "pg", "pg-pos"] = "ppo-cma-m"
    """PPO-CMA with and without mirroring, PPO, and plain policy gradients"""
    learning_rate: float = 5e-4
    """Adam's step size"""
    num_updates: int = 100
    """gradient steps of each network per iteration"""
    batch_size: int = 2048
    """B, rows drawn with replacement for a gradient step; at most the decisions of a rollout"""
    history_size: int = 9
    """H, iterations that the variance learns from"""
    clip_coef: float = 0.2
    """epsilon, the bound on |ratio - 1|"""
    clip_advantage: float = math.inf
    """bound on advantages, in their standard deviations (inf: off; the authors tried 3)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    value_loss: Literal["l1", "l2", "soft-l1"] = "l1"
    """of the critic"""
    time_scale: float = 1e-3
    """of the critic's extra input, decisions since the episode began"""
    # Network
    covariance: Literal["diagonal", "full"] = "diagonal"
    """of the policy; full: a Cholesky factor per state"""
    std_min: float = 0.01
    """least standard deviation, in the environment's units (the largest is the action range)"""
    init_mean: float = 0.0
    """mean of the first policy, in half ranges from the middle of the action range"""
    init_std: float = 1.0
    """standard deviation of the first policy, in half ranges"""
    init_updates: int = 1999
    """gradient steps towards that policy before the first iteration"""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """widths of the hidden layers"""
    dense_skips: bool = True
    """layers see the input and all layers before them, as in every released version"""
    leak: float = 0.1
    """slope of the leaky ReLU below zero"""

    @property
    def rollout_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        decisions = self.num_envs * math.ceil(self.num_steps / max(self.action_repeat, 1))
        return min(self.batch_size, decisions)

    @property
    def restarts(self) -> bool:
        return self.hard_resets and self.mode == "train"

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.rollout_size

    @property
    def folder(self) -> Path:
        if self.run_dir:
            return Path(self.run_dir).resolve()
        name = f"seed{self.seed}"
        if self.num_seeds > 1:
            name += f"-{self.seed + self.num_seeds - 1}"
        return Path("runs", Path(__file__).stem, self.env_id, self.exp_name, name).resolve()


def note(message: str) -> None:
    """Prints a line on stderr, if anybody still listens there."""
    with suppress(OSError, ValueError):
        print(f"{Path(__file__).name}: {' '.join(message.split())}", file=sys.stderr, flush=True)


class Failure(SystemExit):
    """What ends the program; main says why in one line, the last, when all else is closed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr. Raises: Failure."""
    raise Failure(message, code)


def flag(name: str) -> str:
    """Returns a setting's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def require_between(args: Args, names: str, low: float, high: float = math.inf) -> None:
    """Stops with exit code 2 at the first of the settings that is not in [low, high]."""
    for name in names.split():
        value = getattr(args, name)
        if not low <= value <= high:
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            fail(f"{flag(name)} is {value}: give {wanted}")


def require_positive(args: Args, names: str) -> None:
    """Stops with exit code 2 at the first of the settings that is not above 0."""
    for name in names.split():
        value = getattr(args, name)
        if not value > 0:
            fail(f"{flag(name)} is {value}: give a number above 0")


def require_finite(args: Args, names: str) -> None:
    """Stops with exit code 2 at the first of the settings that is infinite or no number."""
    for name in names.split():
        value = getattr(args, name)
        if not math.isfinite(value):
            fail(f"{flag(name)} is {value}: give a finite number")


def require_widths(args: Args, name: str) -> None:
    """Stops with exit code 2 at layers without a unit."""
    sizes = getattr(args, name)
    if not all(size >= 1 for size in sizes):
        fail(f"{flag(name)} {sizes}: give widths of 1 or more")


def validate_run(args: Args) -> None:
    """Stops with exit code 2 at a setting of the run that cannot work in any script."""
    counts = "num_seeds total_timesteps checkpoint_interval log_interval eval_episodes eval_steps"
    require_between(args, f"{counts} num_envs num_steps", 1, 2**31 - 1)
    require_between(args, "seed", 0, 2**31 - args.num_seeds)
    require_between(args, "gamma gae_lambda", 0, 1)
    if not args.exp_name or args.exp_name.startswith("/") or ".." in Path(args.exp_name).parts:
        fail(f"--exp-name {args.exp_name!r}: give a name without .. and without a leading slash")
    try:
        str(args.folder).encode()
    except UnicodeEncodeError:
        fail(f"--run-dir {str(args.folder)!a} is no UTF-8: give another, or set a UTF-8 locale")
    require_widths(args, "hidden_sizes")
    if args.num_iterations < 1:
        rollout_size = f"one rollout, --num-envs {args.num_envs} x --num-steps {args.num_steps}"
        fail(f"--total-timesteps {args.total_timesteps} is below {rollout_size}: raise it")
    read_env_kwargs(args)


def read_env_kwargs(args: Args) -> dict:
    """Returns --env-kwargs as a dict. Stops with exit code 2 if they are none."""
    try:
        found = json.loads(args.env_kwargs)
    except ValueError as error:
        fail(f"--env-kwargs {args.env_kwargs!r} is not JSON ({error}): give '{{\"name\": value}}'")
    if not isinstance(found, dict):
        fail(f"--env-kwargs {args.env_kwargs!r}: give '{{\"name\": value}}'")
    return found


def validate(args: Args) -> None:
    """Stops with exit code 2 at the first setting that cannot work, naming flag and remedy."""
    validate_run(args)
    require_between(args, "action_repeat num_updates batch_size history_size", 1, 2**31 - 1)
    require_between(args, "init_updates", 0, 2**31 - 1)
    require_positive(args, "clip_obs learning_rate clip_coef clip_advantage std_min init_std")
    require_between(args, "ent_coef time_scale", 0)
    require_finite(args, "learning_rate clip_coef ent_coef time_scale std_min init_std")
    require_finite(args, "init_mean leak")
    if args.num_steps < args.action_repeat:
        steps = f"--num-steps {args.num_steps}"
        fail(f"{steps} is below --action-repeat {args.action_repeat}: raise it")


# --- State ---
class Scaler(NamedTuple):  # of one leaf of the observations
    mean_square: Array  # each iteration counts the same
    scale: Array  # never grows
    count: Array  # [], iterations


class Transition(NamedTuple):  # one step; a rollout stacks T of them: [T, N, ...]
    obs: Any  # raw; of a rollout [T + 1, N, K, ...]: obs[t + 1] is the true next observation
    action: Array  # as sampled, before the environment's bounds
    reward: Array  # raw
    terminated: Array  # 1: no value beyond this step
    done: Array  # 1: terminated or truncated
    mask: Array  # 0: the environment reset itself on this step, which is not experience
    ended: Array  # 1: an episode is over, and its return is whole
    episodic_return: Array  # real and unclipped, so far
    episodic_length: Array
    discounted_return: Array  # of raw rewards, so far: what scales rewards
    said: Any = None  # what `keep` kept of the network's answer


class Batch(NamedTuple):  # decisions, [B, ...]
    obs: Any  # raw in history, scaled in a minibatch
    time: Array  # decisions since the episode began
    action: Array  # as the environment got it
    advantage: Array
    target: Array
    mean: Array  # of the policy before the iteration's policy updates
    log_prob: Array  # of action under that policy


class Schedule(NamedTuple):  # numbers that are swept: traced, so that nothing recompiles
    learning_rate: Array
    clip_coef: Array
    ent_coef: Array
    gamma: Array
    gae_lambda: Array


class Training(NamedTuple):  # what rollouts do not need
    adam: dict[str, optax.OptState]  # per network
    history: Batch  # [H, T*N, ...], a ring of iterations; decisions first, then what nothing reads
    counts: Array  # [H], decisions


class LearnerState(NamedTuple):  # what a checkpoint holds
    params: Any
    opt_state: Training
    obs_stats: Any  # like one observation, Scaler for leaves
    schedule: Schedule
    key: Array  # [2], of the whole run; each iteration's keys are folded from it
    iteration: Array  # []
    episodes: Array  # [], ended so far
    returns: Array  # [100], of the last training episodes, the newest last; 0 before the first


# --- Networks ---
@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """Returns x [..., I] @ kernel [I, O]: [..., O].

    Its gradient is the usual one. JAX's own comes transposed where seeds are vmapped, and to turn
    it round takes a CPU up to a sixth of an update. Forward-mode derivatives (jvp) need x @ kernel.
    """
    return x @ kernel


def product_forward(x: Array, kernel: Array) -> tuple[Array, tuple]:
    """Returns what product returns, and what its gradient needs."""
    return x @ kernel, (x, kernel)


def product_backward(kept: tuple, gradient: Array) -> tuple[Array, Array]:
    """Returns the gradients of product's arguments."""
    x, kernel = kept
    rows = x.reshape(-1, x.shape[-1])
    gradient = gradient.reshape(-1, gradient.shape[-1])
    of_rows = jnp.einsum("bo,io->bi", gradient, kernel)
    return of_rows.reshape(x.shape), jnp.einsum("bi,bo->io", rows, gradient)


product.defvjp(product_forward, product_backward)


def unit_columns(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Returns random weights [in, out], those of each output with norm 1."""
    weights = jax.random.normal(key, shape, dtype)
    return weights / jnp.linalg.norm(weights, axis=0)


class Dense(nn.Module):
    """A layer whose first biases centre the batch that init sees."""

    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [B, size] for [B, in]."""
        kernel = self.param("kernel", unit_columns, (x.shape[-1], self.size), jnp.float32)
        bias = self.param("bias", lambda key: -jnp.mean(x @ kernel, axis=0))
        return product(x, kernel) + bias


class MLP(nn.Module):
    """Leaky ReLU layers, each of which may see all that came before it."""

    size: int
    args: Args

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [B, size] for [B, in]."""
        for width in self.args.hidden_sizes:
            new = nn.leaky_relu(Dense(width)(x), self.args.leak)
            x = jnp.concatenate([x, new], axis=-1) if self.args.dense_skips else new
        return Dense(self.size)(x)


class ActorCritic(nn.Module):
    """Networks for mean, standard deviation and value; the compiler leaves out what is dropped."""

    action_space: spaces.Box
    args: Args

    @nn.compact
    def __call__(self, obs: Any, time: Array | float = 0.0) -> tuple["Gaussian", Array]:
        """Returns the policy, leaves [B, U], and values [B], for observations [B, ...].

        Args:
            time: decisions since the episode began, [B], which only the critic sees.
        """
        args = self.args
        leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(obs)]
        x = jnp.concatenate(leaves, axis=-1)
        low = jnp.asarray(self.action_space.low.ravel(), x.dtype)
        high = jnp.asarray(self.action_space.high.ravel(), x.dtype)
        action_size = low.size
        skew_size = 0
        if args.covariance == "full":
            skew_size = action_size * (action_size - 1) // 2

        std_size = action_size + skew_size
        if args.algorithm.startswith("ppo-cma"):
            mean = MLP(action_size, args, name="mean")(x)
            std = MLP(std_size, args, name="std")(x)
        else:
            joint = MLP(action_size + std_size, args, name="policy")(x)
            mean, std = jnp.split(joint, [action_size], axis=-1)
        time = jnp.asarray(time, x.dtype)[..., None] * args.time_scale
        time = jnp.broadcast_to(time, (len(x), 1))
        value = MLP(1, args, name="critic")(jnp.concatenate([x, time], axis=-1))[:, 0]

        mean = low + (high - low) * nn.sigmoid(mean)
        smallest = math.log(args.std_min)
        largest = jnp.log(high - low)
        log_std = smallest + (largest - smallest) * nn.sigmoid(std[:, :action_size])

        # A parameter that nothing trains: until the first update sets it to 1, a fixed Gaussian
        # acts, as the observations' scaler knows nothing yet
        warm = self.param("warm", nn.initializers.zeros, ())
        half = (high - low) / 2
        first_mean = low + half * (1 + args.init_mean)
        first_log_std = jnp.log(half * args.init_std)
        policy = Gaussian(
            mean=jnp.where(warm > 0, mean, first_mean),
            log_std=jnp.where(warm > 0, log_std, first_log_std),
            skew=None,
        )
        if args.covariance == "full":
            below = np.tril_indices(action_size, -1)
            skew = jnp.zeros((len(x), action_size, action_size), x.dtype)
            skew = skew.at[:, *below].set(std[:, action_size:])
            policy = policy._replace(skew=skew * (warm > 0))
        return policy, value


# --- Distribution ---
LOG_2_PI = math.log(2 * math.pi)


class Gaussian(NamedTuple):  # leaves [..., U]
    mean: Array
    log_std: Array
    skew: Array | None  # [..., U, U], strictly lower: the Cholesky factor is diag(std) (1 + skew)


def draw_noise(key: Array, shape: tuple[int, ...], space: spaces.Box) -> Array:
    """Returns what sample_action takes for actions of a space: float32 [*shape, U]."""
    return jax.random.normal(key, (*shape, math.prod(space.shape)), jnp.float32)


def sample_action(policy: Gaussian, noise: Array) -> Array:
    """Returns actions [..., U] from standard normal noise [..., U]; noise 0 gives the mean."""
    if policy.skew is not None:
        noise = noise + jnp.einsum("...ij,...j->...i", policy.skew, noise)
    return policy.mean + jnp.exp(policy.log_std) * noise


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
    return jnp.sum(-0.5 * jnp.square(noise) - policy.log_std - 0.5 * LOG_2_PI, axis=-1)


def entropy(policy: Gaussian) -> Array:
    """Returns the differential entropy [...] in nats."""
    return jnp.sum(policy.log_std + 0.5 * (1 + LOG_2_PI), axis=-1)


# --- Statistics ---
def masked_mean(x: Array, mask: Array) -> Array:
    """Returns the mean of x [*mask.shape, ...] where mask is 1; 0 where it is 1 nowhere."""
    weight = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    axes = tuple(range(mask.ndim))
    return jnp.sum(x * weight, axis=axes) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(x: Array, mask: Array) -> Array:
    """Returns the variance of x [*mask.shape, ...] over mask's axes where mask is 1."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def update_scaler(x: Array, scaler: Scaler, mask: Array) -> Scaler:
    """Returns the scaler after one more iteration's x [T, N, ...] where mask [T, N] is 1.

    Source: the authors' utils.py.
    """
    count = scaler.count + 1
    x = x.astype(scaler.scale.dtype)
    change = masked_mean(jnp.square(x), mask) - scaler.mean_square
    mean_square = scaler.mean_square + change / count
    scale = 1 / (2 * jnp.sqrt(mean_square) + 0.001)
    return Scaler(
        mean_square=mean_square,
        scale=jnp.minimum(scaler.scale, scale),
        count=count,
    )


def normalize(x: Array, scaler: Scaler, bound: float) -> Array:
    """Returns x [..., *scaler.scale.shape], scaled, clipped to +-bound; not centred."""
    return jnp.clip(x * scaler.scale, -bound, bound)


def explained_variance(value: Array, target: Array, mask: Array) -> Array:
    """Returns 1 - Var(target - value) / Var(target) over what mask has as 1; all one shape."""
    return 1 - masked_var(target - value, mask) / jnp.maximum(masked_var(target, mask), 1e-8)


# --- Advantages and losses ---
def compute_gae(
    transition: Transition, value: Array, gamma: Array, gae_lambda: Array
) -> tuple[Array, Array]:
    """Returns advantages and value targets, both [T, N].

    Runs backwards over T: delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t),
    A_t = delta_t + gamma * gae_lambda * (1 - done_t) * A_{t+1}. A truncated step bootstraps from
    its true last observation, a terminated one does not; both end the sum. Steps with mask 0 get
    values that nothing may read.

    Args:
        transition: fields [T, N].
        value: V(s_0) to V(s_T), [T + 1, N].
        gamma, gae_lambda: in [0, 1].

    Source: arXiv 1506.02438, eq. 16.
    """

    def step(next_advantage: Array, t: tuple) -> tuple[Array, Array]:
        reward, terminated, done, value, next_value = t
        delta = reward + gamma * next_value * (1 - terminated) - value
        advantage = delta + gamma * gae_lambda * (1 - done) * next_advantage
        return advantage, advantage

    last = jnp.zeros_like(value[0])
    steps = (transition.reward, transition.terminated, transition.done, value[:-1], value[1:])
    _, advantage = jax.lax.scan(step, last, steps, reverse=True, unroll=16)
    return advantage, advantage + value[:-1]


def critic_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> Array:
    """Returns the mean error of the values of a minibatch."""
    _, value = network.apply(params, batch.obs, batch.time)
    error = jnp.abs(value - batch.target)
    if args.value_loss == "l1":
        return jnp.mean(error)
    if args.value_loss == "l2":
        return jnp.mean(error**2)
    return jnp.mean(jnp.where(error <= 0.5, error**2, error - 0.25))


def cma_std_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> Array:
    """Returns the loss of the std network, on minibatches of H iterations.

    Source: arXiv 1810.02541.
    """
    policy, _ = network.apply(params, batch.obs)
    return -jnp.mean(nn.relu(batch.advantage) * log_prob(policy, batch.action))


def cma_mean_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> Array:
    """Returns the loss of the mean network; ppo-cma-m also draws it to mirror images of failures.

    The kernel makes far actions count less: exp(-d^2 / 2), the mean over dimensions; of a full
    covariance, d^2 is the Mahalanobis distance over U.

    Source: arXiv 1810.02541 and the authors' policy.py.
    """
    policy, _ = network.apply(params, batch.obs)
    loss = -nn.relu(batch.advantage) * log_prob(policy, batch.action)
    if args.algorithm == "ppo-cma-m":
        around_old = policy._replace(mean=batch.mean)
        squares = jnp.square(standardize(around_old, batch.action))
        if policy.skew is not None:
            squares = jnp.mean(squares, axis=-1, keepdims=True)
        kernel = jnp.mean(jnp.exp(-0.5 * squares), axis=-1)
        mirrored_action = 2 * batch.mean - batch.action
        loss -= nn.relu(-batch.advantage) * kernel * log_prob(policy, mirrored_action)
    return jnp.mean(loss)


def policy_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> Array:
    """Returns the loss of a joint policy network: clipped surrogate (ppo), or -A log pi.

    Source: arXiv 1707.06347, eq. 7.
    """
    policy, _ = network.apply(params, batch.obs)
    new_log_prob = log_prob(policy, batch.action)
    loss = -batch.advantage * new_log_prob
    if args.algorithm == "ppo":
        clip_coef = schedule.clip_coef
        ratio = jnp.exp(new_log_prob - batch.log_prob)
        clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
        loss = jnp.maximum(-batch.advantage * ratio, -batch.advantage * clipped_ratio)
    return jnp.mean(loss) - schedule.ent_coef * jnp.mean(entropy(policy))


# --- Update ---
def own_share(batch: Any, args: Args) -> Any:
    """Returns the rows of a minibatch [B, ...] that are this process's: the P-th part."""
    if not args.distributed:
        return batch
    processes = jax.lax.axis_size("process")
    process = jax.lax.axis_index("process")
    return jax.tree.map(lambda x: x.reshape(processes, -1, *x.shape[1:])[process], batch)


def average_over_processes(tree: Any, args: Args) -> Any:
    """Returns a pytree whose leaves are the means over all processes."""
    if not args.distributed:
        return tree
    flat, unravel = ravel_pytree(tree)  # one collective costs as much as one of its leaves would
    return unravel(jax.lax.pmean(flat, "process"))


def with_part(params: Any, part: str, own: Any) -> Any:
    """Returns parameters in which those of one network are `own`."""
    return {"params": params["params"] | {part: own}}


def draw(key: Array, learner: LearnerState, slots: int, args: Args) -> Batch:
    """Returns B decisions, drawn with replacement, their observations scaled.

    Each of the newest `slots` iterations is as likely, and in it each decision.
    """
    age_key, row_key = jax.random.split(key)
    shape = (args.minibatch_size,)
    age = jax.random.randint(age_key, shape, 0, jnp.minimum(slots, learner.iteration + 1))
    slot = (learner.iteration - age) % args.history_size
    row = jax.random.uniform(row_key, shape) * learner.opt_state.counts[slot]
    row = row.astype(jnp.int32)
    batch = jax.tree.map(lambda x: x[slot, row], learner.opt_state.history)
    normalize_leaf = partial(normalize, bound=args.clip_obs)
    return batch._replace(obs=jax.tree.map(normalize_leaf, batch.obs, learner.obs_stats))


def fit_step(
    carry: tuple[Any, optax.OptState],
    key: Array,
    learner: LearnerState,
    part: str,
    loss: Callable,
    network: nn.Module,
    args: Args,
) -> tuple[tuple[Any, optax.OptState], Array]:
    """Returns a network's parameters and Adam's state after one gradient step, and the loss."""
    params, adam = carry
    slots = args.history_size if part == "std" else 1
    batch = own_share(draw(key, learner, slots, args), args)

    def loss_of_part(own: Any) -> Array:
        whole = with_part(learner.params, part, own)
        return loss(whole, batch, learner.schedule, network, args)

    value, grads = jax.value_and_grad(loss_of_part)(params)
    value, grads = average_over_processes((value, grads), args)
    direction, adam = optax.scale_by_adam().update(grads, adam)
    rate = learner.schedule.learning_rate
    return (jax.tree.map(lambda p, d: p - rate * d, params, direction), adam), value


def fit(
    learner: LearnerState, key: Array, part: str, loss: Callable, network: nn.Module, args: Args
) -> tuple[LearnerState, Array]:
    """Returns the learner after num_updates gradient steps of one network, and the mean loss."""
    step = partial(fit_step, learner=learner, part=part, loss=loss, network=network, args=args)
    start = (learner.params["params"][part], learner.opt_state.adam[part])
    (own, adam), losses = jax.lax.scan(step, start, jax.random.split(key, args.num_updates))
    opt_state = learner.opt_state._replace(adam=learner.opt_state.adam | {part: adam})
    params = with_part(learner.params, part, own)
    return learner._replace(params=params, opt_state=opt_state), jnp.mean(losses)


def merge_held_steps(rollout: Transition, repeat: int) -> tuple[Transition, Array]:
    """Returns transitions of decisions [T, N, ...], and the episode's decisions before [T + 1, N].

    A decision's reward and end are those of the steps it was held for. Steps that only held one
    come first, with mask 0: so behind each decision stands the next one, or the true last
    observation of its episode.
    """
    mask = rollout.mask
    phase = (rollout.episodic_length - 1) % repeat
    holds = (phase != 0) & (mask != 0)
    order = jnp.argsort(~holds, axis=0, stable=True)

    def reorder(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=0)

    def keep_last(x: Array) -> Array:  # of [T + 1, N, ...], the last row stays where it is
        return jnp.concatenate([reorder(x[:-1]), x[-1:]])

    def sum_held(x: Array) -> Array:
        total = jnp.zeros_like(x)
        for steps in range(repeat):  # of the steps that come this much later
            own = jnp.where(phase == steps, x * mask, 0)
            total += jnp.pad(own[steps:], ((0, steps), (0, 0)))
        return reorder(total)

    lengths = rollout.episodic_length
    before = jnp.concatenate([jnp.maximum(lengths[:1] - 1, 0), lengths])
    decisions = rollout._replace(
        obs=jax.tree.map(keep_last, rollout.obs),
        action=reorder(rollout.action),
        reward=sum_held(rollout.reward),
        terminated=sum_held(rollout.terminated),
        done=sum_held(rollout.done),
        mask=reorder(mask * (phase == 0)),
    )
    return decisions, keep_last(before) / repeat


def decision_advantages(
    learner: LearnerState,
    decisions: Transition,
    time: Array,
    gae_lambda: Array | float,
    network: nn.Module,
) -> tuple[Array, Array, Array]:
    """Returns advantages, targets and values [T, N] by the critic; observations are scaled."""
    flat_obs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), decisions.obs)
    _, value = network.apply(learner.params, flat_obs, time.reshape(-1))
    value = value.reshape(time.shape)  # [T + 1, N]
    gamma = learner.schedule.gamma
    advantage, target = compute_gae(decisions, value, gamma, gae_lambda)
    return advantage, target, value[:-1]


def remember(learner: LearnerState, batch: Batch, mask: Array, args: Args) -> LearnerState:
    """Returns the learner with an iteration's batch [T*N, ...] in its ring, experience first."""
    order = jnp.argsort(mask == 0, stable=True)
    slot = learner.iteration % args.history_size
    history = jax.tree.map(
        lambda ring, x: ring.at[slot].set(x[order]), learner.opt_state.history, batch
    )
    counts = learner.opt_state.counts.at[slot].set(jnp.sum(mask))
    return learner._replace(opt_state=learner.opt_state._replace(history=history, counts=counts))


def scale_advantages(advantage: Array, mask: Array, args: Args) -> Array:
    """Returns advantages [T, N] with standard deviation 1, not centred."""
    if args.algorithm in ("ppo-cma", "pg-pos"):
        advantage = nn.relu(advantage)
    advantage = advantage / (jnp.sqrt(masked_var(advantage, mask)) + 1e-10)
    return jnp.clip(advantage, -args.clip_advantage, args.clip_advantage)


def centre_critic(
    learner: LearnerState, key: Array, network: nn.Module, args: Args
) -> LearnerState:
    """Returns the learner whose critic's biases centre its very first minibatch."""
    first = draw(key, learner, 1, args)
    new = network.init(key, first.obs, first.time)["params"]["critic"]
    old = learner.params["params"]["critic"]
    critic = jax.tree.map(partial(jnp.where, learner.iteration == 0), new, old)
    return learner._replace(params=with_part(learner.params, "critic", critic))


def fit_policy(
    learner: LearnerState, keys: Array, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner after std (from H iterations), then mean (from one) have learnt."""
    metrics = {}
    if args.algorithm.startswith("ppo-cma"):
        learner, loss = fit(learner, keys[0], "std", cma_std_loss, network, args)
        metrics["cma/std_loss"] = loss
        learner, loss = fit(learner, keys[1], "mean", cma_mean_loss, network, args)
    else:
        learner, loss = fit(learner, keys[1], "policy", policy_loss, network, args)
    return learner, metrics | {"losses/policy_loss": loss}


def policy_metrics(
    policy: Gaussian, batch: Batch, mask: Array, schedule: Schedule
) -> dict[str, Array]:
    """Returns how far a new policy, leaves [T*N, U], is from the one that acted."""
    log_ratio = log_prob(policy, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.abs(ratio - 1) > schedule.clip_coef
    std = jnp.mean(jnp.exp(policy.log_std), axis=-1)
    return {
        "losses/approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
        "losses/entropy": masked_mean(entropy(policy), mask),
        "losses/clipfrac": masked_mean(clipped.astype(mask.dtype), mask),
        "cma/std": masked_mean(std, mask),
    }


def count_episodes(
    learner: LearnerState, rollout: Transition
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner with the episodes that ended in a rollout counted, and metrics."""
    ended = rollout.ended  # [T, N]
    any_ended = jnp.any(ended)
    mean_return = masked_mean(rollout.episodic_return, ended)
    mean_length = masked_mean(rollout.episodic_length, ended)

    size = len(learner.returns)
    known = jnp.arange(size) >= size - learner.episodes
    known = jnp.concatenate([known, ended.ravel() > 0])
    returns = jnp.concatenate([learner.returns, rollout.episodic_return.ravel()])
    place = jnp.where(known, jnp.arange(len(known)), -1)
    last = jnp.sort(place)[-size:]  # -1 where fewer are known
    known = (last >= 0).astype(returns.dtype)
    returns = jnp.where(known > 0, returns[last], 0)
    episodes = learner.episodes + jnp.sum(ended).astype(learner.episodes.dtype)

    metrics = {
        "charts/episodic_return": jnp.where(any_ended, mean_return, jnp.nan),
        "charts/episodic_length": jnp.where(any_ended, mean_length, jnp.nan),
        "charts/episodic_return_100": jnp.where(episodes, masked_mean(returns, known), jnp.nan),
    }
    return learner._replace(episodes=episodes, returns=returns), metrics


def update(
    learner: LearnerState, rollout: Transition, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner after an iteration, and metrics, scalars: critic first, then policy.

    Args:
        rollout: leaves [T, N, ...], observations [T + 1, N, K, ...], as the environment gave them.
    """
    if args.distributed:  # everybody sees the whole rollout: P processes compute what one does
        rollout = jax.lax.all_gather(rollout, "process", axis=1, tiled=True)

    original = jax.tree.map(lambda x: x[:, :, 0], rollout.obs)  # of an observation's copies
    raw, time = merge_held_steps(rollout._replace(obs=original), args.action_repeat)
    if args.scale_obs:
        update_leaf = partial(update_scaler, mask=raw.mask)
        acted_on = jax.tree.map(lambda x: x[:-1], raw.obs)
        learner = learner._replace(obs_stats=jax.tree.map(update_leaf, acted_on, learner.obs_stats))
    learner = learner._replace(params=with_part(learner.params, "warm", jnp.ones(())))
    normalize_leaf = partial(normalize, bound=args.clip_obs)
    scaled = raw._replace(obs=jax.tree.map(normalize_leaf, raw.obs, learner.obs_stats))

    def flat(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    # Targets are Monte Carlo returns; the policy is the one before this iteration's updates
    _, target, value = decision_advantages(learner, scaled, time, 1.0, network)
    obs = jax.tree.map(lambda x: flat(x[:-1]), scaled.obs)
    policy, _ = network.apply(learner.params, obs)
    space = network.action_space
    action = jnp.clip(flat(raw.action), space.low.ravel(), space.high.ravel())
    mask = flat(raw.mask)
    batch = Batch(
        obs=jax.tree.map(lambda x: flat(x[:-1]), raw.obs),
        time=flat(time[:-1]),
        action=action,
        advantage=jnp.zeros_like(mask),  # as long as the critic has not learnt
        target=flat(target),
        mean=policy.mean,
        log_prob=log_prob(policy, action),
    )

    key = jax.random.fold_in(learner.key, 2 * learner.iteration + 1)
    centre_key, critic_key, *policy_keys = jax.random.split(key, 4)
    learner = remember(learner, batch, mask, args)
    learner = centre_critic(learner, centre_key, network, args)
    learner, value_loss = fit(learner, critic_key, "critic", critic_loss, network, args)

    gae_lambda = learner.schedule.gae_lambda
    advantage, _, _ = decision_advantages(learner, scaled, time, gae_lambda, network)
    advantage = scale_advantages(advantage, raw.mask, args)
    learner = remember(learner, batch._replace(advantage=flat(advantage)), mask, args)
    learner, metrics = fit_policy(learner, policy_keys, network, args)

    policy, _ = network.apply(learner.params, obs)
    metrics |= policy_metrics(policy, batch, mask, learner.schedule)
    metrics["losses/value_loss"] = value_loss
    metrics["losses/explained_variance"] = explained_variance(value, target, raw.mask)
    metrics["charts/learning_rate"] = learner.schedule.learning_rate
    metrics["policy/param_norm"] = optax.tree.norm(learner.params)
    learner = learner._replace(iteration=learner.iteration + 1)
    learner, episode_metrics = count_episodes(learner, rollout)
    return learner, metrics | episode_metrics


# --- Environments ---
class TimeStep(NamedTuple):  # what S*N environments return, leaves [S*N, ...]
    obs: Any  # float32 [S*N, K, ...]; after an episode's last, the next step has a new one's first
    reward: Array
    terminated: Array  # bool
    truncated: Array  # bool; never both


def make_time_step(obs: Any, reward: Array, terminated: Array, truncated: Array) -> TimeStep:
    """Returns what an environment shows; an end that is both counts as terminated."""
    return TimeStep(
        obs=obs,
        reward=reward.astype("float32"),
        terminated=terminated,
        truncated=truncated & ~terminated,
    )


class Environment(NamedTuple):  # S*N environments behind one function
    native: bool  # pure JAX: rollouts run where updates do
    first: tuple[Any, TimeStep]  # env_state, and what it shows after a reset
    restart: Callable[[Any], tuple[Any, TimeStep]]  # env_state to the same, after another reset
    step: Callable[[Any, Array], tuple[Any, TimeStep]]  # (env_state, action [S*N, *space.shape])
    observation_space: spaces.Space  # of one environment, as it gives observations
    action_space: spaces.Space
    threshold: float | None  # mean return from which the environment counts as solved
    failures: list[str]  # what went wrong on the host, first things first; its steps are void
    render: Callable[[Any], np.ndarray]  # env_state to a frame [height, width, 3] of the first


def make_env(args: Args, env_seeds: list[int], render: bool = False) -> Environment:
    """Returns environments that hold actions, one per seed.

    Stops (2) at actions that are no Box or have no bounds, and as open_env does.
    """
    env = open_env(args, env_seeds, render)
    if not isinstance(env.action_space, spaces.Box):
        kind = type(env.action_space).__name__
        fail(f"--env-id {args.env_id} has {kind} actions: this script is for Box actions")
    if not np.isfinite(action_bounds(env.action_space)).all():
        fail(f"--env-id {args.env_id} has actions without bounds: use ppo_continuous.py")
    return hold_actions(env, args.action_repeat)


def hold_actions(env: Environment, repeat: int) -> Environment:
    """Returns environments that hold an action for `repeat` steps, but not into a new episode."""

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        inner, held, count = env_state  # count: steps of the episode, -1 at its end
        decides = (count % repeat == 0).reshape(-1, *(1,) * (action.ndim - 1))
        action = jnp.where(decides, action, held)
        inner, new = env.step(inner, action)
        count = jnp.where(new.terminated | new.truncated, -1, count + 1)
        return (inner, action, count), new

    def begin(env_state: Any, first: TimeStep) -> tuple[tuple, TimeStep]:
        envs = len(first.reward)
        held = jnp.zeros((envs, *env.action_space.shape), jnp.float32)
        count = jnp.zeros(envs, jnp.int32)
        return (env_state, held, count), first

    return env._replace(
        first=begin(*env.first),
        restart=lambda env_state: begin(*env.restart(env_state[0])),
        step=step,
        render=lambda env_state: env.render(env_state[0]),
    )


def open_env(args: Args, env_seeds: list[int], render: bool = False) -> Environment:
    """Returns one environment per seed.

    Args:
        render: whether it can be filmed.

    Stops with exit code 2, in one line, if the id is unknown, the environment cannot be made, or
    it has a space that networks cannot take.
    """
    env_id = args.env_id
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's module may be, wherever this script lies
    make = make_gymnasium
    if env_id in envpool.list_all_envs():
        make = make_envpool
    elif is_native(args):
        make = make_native
    elif ":" not in env_id:
        require_known(env_id, [*envpool.list_all_envs(), *gymnasium.registry])
    try:
        env = make(args, env_seeds, render)
        encoded_size(env.observation_space)
    except Exception as error:  # whatever other people's constructors raise
        fail(f"--env-id {env_id} cannot be made (see also --env-kwargs): {describe(error)}")
    if env.action_space.shape is not None and math.prod(env.action_space.shape) == 0:
        fail(f"--env-id {env_id} has an empty action space: {env.action_space}")
    return env


def acting_device(space: spaces.Space | dict, args: Args) -> jax.Device:
    """Returns where policies of host-side environments act.

    Small networks are done before an accelerator has been asked; for images it is worth the way.
    """
    images = any(x.ndim > 1 for x in jax.tree.leaves(empty_obs(space)))
    if args.act_on == "device" or (args.act_on == "auto" and images):
        return jax.local_devices()[0]
    return cpu()


def cpu() -> jax.Device:
    """Returns the device beside host-side environments."""
    return jax.local_devices(backend="cpu")[0]


def require_known(env_id: str, known: list[str]) -> None:
    """Stops with exit code 2 at an id that is none of the known ones, naming the nearest."""
    if env_id not in known:
        nearest = ", ".join(difflib.get_close_matches(env_id, sorted(set(known)))) or "none"
        fail(f"--env-id {env_id} is unknown; nearest: {nearest}")


def describe(error: BaseException) -> str:
    """Returns an error in one line: type, message, and the line of the user's code that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [x for x in frames if x.filename != __file__]
    own = [x for x in foreign if "site-packages" not in x.filename and "<" not in x.filename]
    place = ""
    if foreign:
        frame = (own or foreign)[-1]
        place = f" ({Path(frame.filename).name}, line {frame.lineno}, in {frame.name})"
    return f"{type(error).__name__}: {error}{place}"


def make_envpool(args: Args, env_seeds: list[int], render: bool) -> Environment:
    """Returns EnvPool's environments: send and recv are XLA calls, inside of the compiled scan.

    MuJoCo speaks float64 there; nothing beyond these functions does.
    """
    settings = read_env_kwargs(args)
    if render:
        settings["render_mode"] = "rgb_array"
    size = len(env_seeds)
    pool = envpool.make(
        args.env_id, env_type="gymnasium", num_envs=size, seed=env_seeds, **settings
    )
    handle, recv, send, _ = pool.xla()
    ids = np.arange(size, dtype=np.int32)
    action_dtype = list(pool.spec.action_array_spec.values())[-1].dtype

    def receive(handle: Array) -> tuple[Array, TimeStep]:
        handle, (obs, reward, terminated, truncated, _) = recv(handle)
        obs = jax.tree.map(lambda x: x[:, None], obs)  # K = 1
        obs = encode_obs(obs, pool.observation_space)
        return handle, make_time_step(obs, reward, terminated, truncated)

    def step(handle: Array, action: Array) -> tuple[Array, TimeStep]:
        return receive(send(handle, action.astype(action_dtype), ids))

    def host_reset(handle: Array) -> Array:
        pool.async_reset()
        return handle

    def restart(handle: Array) -> tuple[Array, TimeStep]:
        return receive(io_callback(host_reset, handle, handle, ordered=True))

    first = jax.block_until_ready(jax.jit(restart)(jnp.asarray(handle)))
    return Environment(
        native=False,
        first=first,
        restart=restart,
        step=step,
        observation_space=pool.observation_space,
        action_space=pool.action_space,
        threshold=getattr(pool.spec.config, "reward_threshold", None),
        failures=[],
        render=lambda _: np.asarray(pool.render()[0]),
    )


class ObservationCopies(gymnasium.ObservationWrapper):
    """An environment that shows each observation as K copies: [K, ...].

    K is 1, but for environments with a method augment_observation(obs), which returns K
    observations, the original first. Raises: ValueError if K changes.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        encoded_size(env.observation_space)
        self.augment = partial(jax.tree.map, lambda x: np.asarray(x)[None])
        if env.has_wrapper_attr("augment_observation"):
            self.augment = env.get_wrapper_attr("augment_observation")
        self.copies = self.count(self.augment(env.observation_space.sample()))
        self.single_space = env.observation_space
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_space, self.copies)

    def count(self, copies: Any) -> int:
        return len(jax.tree.leaves(copies)[0])

    def observation(self, obs: Any) -> Any:
        copies = self.augment(obs)
        if self.count(copies) != self.copies:
            before = f"augment_observation returned {self.copies} observations"
            raise ValueError(f"{before}, and now {self.count(copies)}")
        return copies


WRAPPERS = [ObservationCopies]  # of each Gymnasium environment


@contextmanager
def children_ignore_signals() -> Iterator[None]:
    """Processes started in this block leave SIGINT and SIGTERM to this one, which ends them."""
    before = [(x, signal.signal(x, signal.SIG_IGN)) for x in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def make_vector(args: Args, size: int, render: bool) -> gymnasium.vector.VectorEnv:
    """Returns a Gymnasium vector environment that resets on the step after an episode's end."""
    settings = read_env_kwargs(args)
    if render:
        settings["render_mode"] = "rgb_array"
    make = partial(
        gymnasium.make_vec,
        args.env_id,
        num_envs=size,
        vectorization_mode=args.vectorization,
        wrappers=WRAPPERS,
        **settings,
    )
    if args.vectorization == "sync":
        return make()
    with children_ignore_signals(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX's: but children run no JAX
        return make(vector_kwargs={"context": "fork"})


def host_time_step(
    obs: Any, reward: Any, terminated: np.ndarray, truncated: np.ndarray, info: dict
) -> TimeStep:
    """Returns what Gymnasium's environments show.

    `info["non-terminal done"]` makes an end a truncation.
    """
    nonterminal = np.asarray(info.get("non-terminal done", False), bool)
    truncated = truncated | (terminated & nonterminal)
    terminated = terminated & ~nonterminal
    with np.errstate(over="ignore"):  # infinite then, which stops the run
        obs = jax.tree.map(as_number, obs)
        return make_time_step(obs, np.asarray(reward), terminated, truncated)


def make_gymnasium(args: Args, env_seeds: list[int], render: bool) -> Environment:
    """Returns Gymnasium's environments, on the host, called in order from the compiled rollout.

    An exception of the environment's code is written to `failures`; from then on steps do nothing.
    """
    vector = make_vector(args, len(env_seeds), render)
    space = vector.single_action_space
    single_space = vector.single_observation_space
    if args.vectorization == "sync":
        single_space = vector.envs[0].get_wrapper_attr("single_space")
    else:
        single_space = vector.get_attr("single_space")[0]
    failures: list[str] = []

    def host_reset(seeds: list[int] | None = None) -> TimeStep:
        obs, _ = vector.reset(seed=seeds)
        zeros = np.zeros(len(env_seeds))
        return host_time_step(obs, zeros, zeros > 0, zeros > 0, {})

    def host_step(action: Array) -> TimeStep:
        return host_time_step(*vector.step(as_space_dtype(np.asarray(action), space)))

    def guarded(function: Callable, *inputs: Array) -> TimeStep:
        if failures:
            return void
        try:
            return function(*inputs)
        except Exception as error:  # whatever other people's environments raise
            failures.append(f"--env-id {args.env_id} failed in a step: {describe(error)}")
            return void

    def encode(raw: TimeStep) -> TimeStep:
        return raw._replace(obs=encode_obs(raw.obs, single_space))

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        new = io_callback(partial(guarded, host_step), shapes, action, ordered=True)
        return env_state, encode(new)

    def restart(env_state: tuple) -> tuple[tuple, TimeStep]:
        new = io_callback(partial(guarded, host_reset), shapes, ordered=True)
        return env_state, encode(new)

    raw = host_reset(env_seeds)
    void = jax.tree.map(np.zeros_like, raw)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), raw)
    return Environment(
        native=False,
        first=((), jax.tree.map(jnp.asarray, encode(raw))),
        restart=restart,
        step=step,
        observation_space=single_space,
        action_space=space,
        threshold=vector.spec.reward_threshold,
        failures=failures,
        render=lambda _: np.asarray(vector.render()[0]),
    )


class Task(NamedTuple):  # one JAX-native environment, as pure functions
    reset: Callable  # key to (obs, state)
    step: Callable  # (key, state, action) to (obs, state, reward, terminated, truncated, info)
    observation_space: spaces.Space
    action_space: spaces.Space
    threshold: float | None = None
    render: Callable | None = None  # state to a frame [height, width, 3]


def need(args: Args, module: str, package: str) -> Any:
    """Returns an imported module. Stops with exit code 2 where its package is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's dependencies
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        fail(f"--env-id {args.env_id} needs the package {package}: pip install {package}")


def gymnax_task(env: Any, params: Any, settings: dict) -> Task:
    """Returns an environment of gymnax 1.0 or later, whose parameters `settings` changes."""
    params = params.replace(**settings)

    def step(key: Array, state: Any, action: Array) -> tuple:
        obs, state, reward, terminated, info = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, env.is_truncated(state, params), info

    convert = importlib.import_module("gymnax.environments.spaces").gymnax_space_to_gym_space
    return Task(
        reset=lambda key: env.reset_env(key, params),
        step=step,
        observation_space=convert(env.observation_space(params)),
        action_space=convert(env.action_space(params)),
    )


def brax_task(env: Any, episode_length: int, render: Callable) -> Task:
    """Returns an environment with Brax's interface, truncated after episode_length steps.

    Of several observations, as MuJoCo Playground has them, the policy's is "state".

    Args:
        render: the environment's state to a frame.
    """

    def policy_obs(state: Any) -> Array:
        return state.obs["state"] if isinstance(state.obs, dict) else state.obs

    def reset(key: Array) -> tuple:
        state = env.reset(key)
        return policy_obs(state), (state, jnp.int32(0))

    def step(key: Array, state: tuple, action: Array) -> tuple:
        inner, time = state
        inner = env.step(inner, action)
        time += 1
        truncated = time >= episode_length
        return policy_obs(inner), (inner, time), inner.reward, inner.done > 0, truncated, {}

    obs, _ = jax.eval_shape(reset, jax.random.PRNGKey(0))
    return Task(
        reset=reset,
        step=step,
        observation_space=spaces.Box(-np.inf, np.inf, obs.shape),
        action_space=spaces.Box(-1.0, 1.0, (env.action_size,)),
        render=lambda state: render(state[0]),
    )


def open_gymnax(args: Args, name: str, settings: dict) -> Task:
    """Returns gymnax's environment of that name."""
    gymnax = need(args, "gymnax", "gymnax>=1.0")
    require_known(args.env_id, [f"gymnax/{x}" for x in gymnax.registered_envs])
    return gymnax_task(*gymnax.make(name), settings)


def open_brax(args: Args, name: str, settings: dict) -> Task:
    """Returns Brax's bare environment: its wrappers throw the true last observation away."""
    envs = need(args, "brax.envs", "brax")
    require_known(args.env_id, [f"brax/{x}" for x in envs._envs])
    episode_length = settings.pop("episode_length", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that Brax is no longer developed
        env = envs.get_environment(name, **settings)
    camera = first_camera(env.sys.mj_model)

    def render(state: Any) -> np.ndarray:
        return env.render([state.pipeline_state], camera=camera)[0]

    return brax_task(env, episode_length, render)


def first_camera(model: Any) -> str | None:
    """Returns the name of a MuJoCo model's first camera, None where it has none."""
    return model.camera(0).name if model.ncam else None


def open_playground(args: Args, name: str, settings: dict) -> Task:
    """Returns MuJoCo Playground's environment; `settings` changes its configuration."""
    registry = need(args, "mujoco_playground", "playground").registry
    require_known(args.env_id, [f"playground/{x}" for x in registry.ALL_ENVS])
    config = registry.get_default_config(name)
    if "impl" in config:
        settings.setdefault("impl", "jax")  # Warp's state has no axis of environments
    env = registry.load(name, config=config, config_overrides=settings)
    episode_length = settings.get("episode_length", config.episode_length)
    camera = first_camera(env.mj_model)
    return brax_task(env, episode_length, lambda x: env.render([x], camera=camera)[0])


def open_own(args: Args, name: str, settings: dict) -> Task:
    """Returns what a user's factory, "module:function", makes: a Task's like, or gymnax's."""
    module, _, function = name.partition(":")
    env = getattr(importlib.import_module(module), function)(**settings)
    if hasattr(env, "step_env"):
        return gymnax_task(env, env.default_params, {})
    return Task(
        reset=env.reset,
        step=env.step,
        observation_space=env.observation_space,
        action_space=env.action_space,
        threshold=getattr(env, "threshold", None),
        render=getattr(env, "render", None),
    )


NATIVE = {  # by the beginning of --env-id
    "gymnax/": open_gymnax,
    "brax/": open_brax,
    "playground/": open_playground,
    "jax:": open_own,
}


def is_native(args: Args) -> bool:
    """Returns whether the environment is written in JAX."""
    return args.env_id.startswith(tuple(NATIVE))


class NativeState(NamedTuple):  # of JAX-native environments, leaves [S*N, ...]
    key: Array
    task: Any
    over: Array  # bool, whether the episode has ended and the next step resets


def open_task(args: Args) -> Task:
    """Returns the JAX-native environment of --env-id. Raises: ValueError where it is not sound."""
    prefix = next(x for x in NATIVE if args.env_id.startswith(x))
    task = NATIVE[prefix](args, args.env_id.removeprefix(prefix), read_env_kwargs(args))
    obs, state = jax.eval_shape(task.reset, jax.random.PRNGKey(0))
    require_shapes(empty_obs(task.observation_space), obs, "reset's observation")
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)):
        raise ValueError("its state has a typed key: keep jax.random.key_data of it")
    action = jnp.zeros(task.action_space.shape, action_dtype(task))
    stepped = jax.eval_shape(task.step, jax.random.PRNGKey(0), state, action)
    require_shapes((obs, state, 0.0, True, True), stepped[:5], "what a step returns")
    return task


def action_dtype(task: Task) -> np.dtype:
    """Returns the dtype of a JAX-native environment's actions, at most 32 bits wide."""
    return jax.dtypes.canonicalize_dtype(task.action_space.dtype)


def require_shapes(wanted: Any, found: Any, name: str) -> None:
    """Raises: ValueError where a pytree has not the structure and the shapes that are wanted."""
    wanted, found = (jax.tree.map(np.shape, x) for x in (wanted, found))
    if wanted != found:
        raise ValueError(f"{name} has shapes {found}, not {wanted}")


def make_native(args: Args, env_seeds: list[int], render: bool) -> Environment:
    """Returns JAX-native environments: pure functions, to be compiled into the training loop."""
    task = open_task(args)
    if render and task.render is None:
        raise ValueError("it has no method render(state)")
    keys = jax.vmap(jax.random.PRNGKey)(np.array(env_seeds, np.uint32))
    first = jax.jit(partial(begin_tasks, task=task))(keys)
    if any(x.shape[:1] != (len(env_seeds),) for x in jax.tree.leaves(first)):
        raise ValueError("its state has leaves to which jax.vmap gives no axis of environments")
    return Environment(
        native=True,
        first=first,
        restart=lambda env_state: begin_tasks(env_state.key, task),
        step=partial(step_tasks, task=task),
        observation_space=task.observation_space,
        action_space=task.action_space,
        threshold=task.threshold,
        failures=[],
        render=lambda env_state: np.asarray(task.render(task_state(env_state, 0))),
    )


def task_state(env_state: NativeState, index: int) -> Any:
    """Returns one environment's own state."""
    return jax.tree.map(lambda x: x[index], env_state.task)


def begin_tasks(keys: Array, task: Task) -> tuple[NativeState, TimeStep]:
    """Returns JAX-native environments, one for each key, after a reset of all."""
    keys, reset_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    obs, state = jax.vmap(task.reset)(reset_keys)
    nothing = jnp.zeros(len(keys), bool)
    env_state = NativeState(key=keys, task=state, over=nothing)
    return env_state, native_time_step(obs, nothing, nothing, nothing, task)


def native_time_step(
    obs: Any, reward: Array, terminated: Array, truncated: Array, task: Task
) -> TimeStep:
    """Returns what JAX-native environments show, observations as a single copy."""
    obs = jax.tree.map(lambda x: x[:, None], encode_obs(obs, task.observation_space))
    return make_time_step(obs, reward, terminated, truncated)


def step_tasks(env_state: NativeState, action: Array, task: Task) -> tuple[NativeState, TimeStep]:
    """Returns JAX-native environments after a step, which resets those whose episode is over.

    As all others are; their libraries' own resets hide the true last observation.
    """
    over = env_state.over
    keys, step_keys, reset_keys = jnp.moveaxis(
        jax.vmap(partial(jax.random.split, num=3))(env_state.key), 1, 0
    )
    if np.issubdtype(task.action_space.dtype, np.integer):
        action = jnp.rint(action)
    action = action.astype(action_dtype(task))
    stepping = jax.vmap(task.step)(step_keys, env_state.task, action)
    obs, state, reward, terminated, truncated, _ = stepping

    def choose(fresh: Array, old: Array) -> Array:
        return jnp.where(over.reshape(-1, *(1,) * (old.ndim - 1)), fresh, old.astype(fresh.dtype))

    def reset(old: tuple) -> tuple:
        return jax.tree.map(choose, jax.vmap(task.reset)(reset_keys), old)

    def keep(old: tuple) -> tuple:
        return jax.tree.map(lambda x, y: x.astype(y.dtype), old, jax.eval_shape(reset, old))

    obs, state = jax.lax.cond(jnp.any(over), reset, keep, (obs, state))
    terminated = (terminated > 0) & ~over
    truncated = (truncated > 0) & ~over
    new = native_time_step(obs, jnp.where(over, 0, reward), terminated, truncated, task)
    return NativeState(key=keys, task=state, over=terminated | truncated), new


def as_number(x: Any) -> np.ndarray | Array:
    """Returns an array as float32, or as it is where it is of bytes."""
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    return x if x.dtype == np.uint8 else x.astype(np.float32)


def encode_obs(obs: Any, space: spaces.Space | dict) -> Any:
    """Returns observations as networks take them: numbers of choices as one-hot vectors.

    Everything is float32, but for bytes, which cost a quarter of that.

    Args:
        obs: of `space`, with any leading axes.

    Raises: ValueError for a space that networks cannot take.
    """
    one_hot = partial(jax.nn.one_hot, dtype=jnp.float32)
    if isinstance(space, dict | spaces.Dict):
        return {name: encode_obs(obs[name], part) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(encode_obs(x, part) for x, part in zip(obs, space, strict=True))
    if isinstance(space, spaces.Discrete):
        return one_hot(jnp.asarray(obs, jnp.int32) - int(space.start), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        choices = zip(space.nvec.ravel(), space.start.ravel(), strict=True)
        flat = jnp.asarray(obs, jnp.int32).reshape(*np.shape(obs)[: -space.nvec.ndim], -1)
        columns = [one_hot(flat[..., i] - a, int(n)) for i, (n, a) in enumerate(choices)]
        return jnp.concatenate(columns, axis=-1)
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return jnp.asarray(as_number(obs))
    raise ValueError(f"observations of space {space} are nothing that a network can take")


def encoded_size(space: spaces.Space | dict) -> int:
    """Returns how many numbers an encoded observation has. Raises: ValueError if there are none."""
    encoded = jax.eval_shape(lambda: encode_obs(empty_obs(space), space))
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(encoded))
    if size == 0:
        raise ValueError(f"observations of space {space} are empty")
    return size


def empty_obs(space: spaces.Space | dict) -> Any:
    """Returns an observation of zeros. Raises: ValueError for a space without a fixed shape."""
    if isinstance(space, dict | spaces.Dict):
        return {name: empty_obs(part) for name, part in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(empty_obs(part) for part in space)
    if space.shape is None:
        raise ValueError(f"observations of space {space} are nothing that a network can take")
    return as_number(np.zeros(space.shape, space.dtype))


def action_bounds(space: spaces.Box) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and the largest action, float32, infinite where there is no bound."""
    low, high = np.float64(space.low), np.float64(space.high)
    low = np.where(low > -1e30, low, -np.inf)
    high = np.where(high < 1e30, high, np.inf)
    return low.astype(np.float32), high.astype(np.float32)


def as_space_dtype(action: np.ndarray, space: spaces.Box) -> np.ndarray:
    """Returns actions in the dtype of their space, to the nearest of whole numbers."""
    if np.issubdtype(space.dtype, np.integer):
        action = np.clip(np.rint(np.float64(action)), space.low, space.high)
    return action.astype(space.dtype)


def env_action(action: Array, space: spaces.Box, args: Args) -> Array:
    """Returns what the environment gets for a policy's actions [..., U]: [..., *space.shape]."""
    low, high = action_bounds(space)
    action = action.reshape(*action.shape[:-1], *space.shape)
    return jnp.clip(action, low, high).astype(jnp.float32)


# --- Rollout ---
class Episode(NamedTuple):  # of each environment so far, [S*N]
    total: Array
    length: Array
    discounted: Array


class RunnerState(NamedTuple):  # the carry of the rollout
    env_state: Any
    time_step: TimeStep
    episode: Episode


def first_runner(env: Environment, args: Args) -> RunnerState:
    """Returns the runner before the first step."""
    env_state, time_step = env.first
    zeros = jnp.zeros(len(time_step.reward), jnp.float32)
    episode = Episode(total=zeros, length=zeros, discounted=zeros)
    return RunnerState(env_state=env_state, time_step=time_step, episode=episode)


def network_input(runner: RunnerState) -> Any:
    """Returns what a network takes, for the first environment, not normalised."""
    return jax.tree.map(lambda x: x[:1, 0], runner.time_step.obs)


def episode_over(time_step: TimeStep) -> Array:
    """Returns 1 where an episode has ended, [S*N]."""
    return (time_step.terminated | time_step.truncated).astype(jnp.float32)


def go_on(episode: Episode, last: TimeStep, new: TimeStep, gamma: Array) -> Episode:
    """Returns episodes after a step from `last` to `new`; where that was a reset, they begin."""
    goes_on = 1 - episode_over(last)
    return Episode(
        total=(episode.total + new.reward) * goes_on,
        length=(episode.length + 1) * goes_on,
        discounted=(gamma * episode.discounted + new.reward) * goes_on,
    )


def draw_rollout_noise(
    learner: LearnerState, first_env: Array | int, envs: int, env: Environment, args: Args
) -> Array:
    """Returns the noise of a rollout's actions, [T, S, N, ...], N = envs.

    It is the same for an environment, however many processes or devices share them out.
    """

    def draw(key: Array) -> Array:
        noise = draw_noise(key, (args.num_steps, args.num_envs), env.action_space)
        return jax.lax.dynamic_slice_in_dim(noise, first_env, envs, axis=1)

    # Even numbers are folded in for rollouts, odd ones for updates
    keys = jax.vmap(jax.random.fold_in)(learner.key, 2 * learner.iteration)
    noise = jax.vmap(draw, out_axes=1)(keys)
    if args.mode == "eval" and args.deterministic:
        noise = 0 * noise
    return noise


def keep(policy: Gaussian, value: Array) -> None:
    """Keeps nothing of what a network said: the update asks again, in one batch."""


def choose_action(
    obs: Any, noise: Array, learner: LearnerState, network: nn.Module, args: Args
) -> tuple[Array, Any]:
    """Returns sampled actions, and what is kept of the network's answer, leaves [S*N, ...].

    Args:
        obs: leaves [S*N, K, ...].
        noise: for sample_action, [S, N, ...].
        learner: leaves [S, ...].
    """
    seeds, envs = noise.shape[:2]
    obs = jax.tree.map(lambda x: x[:, 0].reshape(seeds, envs, *x.shape[2:]), obs)
    normalize_leaf = jax.vmap(partial(normalize, bound=args.clip_obs))
    obs = jax.tree.map(normalize_leaf, obs, learner.obs_stats)
    policy, value = jax.vmap(network.apply)(learner.params, obs)
    found = sample_action(policy, noise), keep(policy, value)
    return jax.tree.map(lambda x: x.reshape(seeds * envs, *x.shape[2:]), found)


def take_step(
    runner: RunnerState, chosen: tuple, gamma: Array, env: Environment, args: Args
) -> tuple[RunnerState, Transition]:
    """Returns the runner and the transition, leaves [S*N, ...], after a step of environments.

    Args:
        chosen: what choose_action returned.
        gamma: of the seeds, [S].
    """
    action, said = chosen
    last = runner.time_step
    env_state, new = env.step(runner.env_state, env_action(action, env.action_space, args))

    # After an episode's end the environment has only reset itself
    mask = 1 - (last.terminated | last.truncated).astype(jnp.float32)
    gamma = jnp.repeat(gamma, len(mask) // len(gamma))
    episode = go_on(runner.episode, last, new, gamma)
    transition = Transition(
        obs=last.obs,
        action=action,
        reward=new.reward,
        terminated=new.terminated.astype(jnp.float32),
        done=(new.terminated | new.truncated).astype(jnp.float32),
        mask=mask,
        ended=episode_over(new) * mask,
        episodic_return=episode.total,
        episodic_length=episode.length,
        discounted_return=episode.discounted,
        said=said,
    )
    return RunnerState(env_state=env_state, time_step=new, episode=episode), transition


def env_step(
    runner: RunnerState,
    noise: Array,
    learner: LearnerState,
    env: Environment,
    network: nn.Module,
    args: Args,
) -> tuple[RunnerState, Transition]:
    """Returns the runner and the transition, leaves [S*N, ...], after a choice and a step."""
    chosen = choose_action(runner.time_step.obs, noise, learner, network, args)
    return take_step(runner, chosen, learner.schedule.gamma, env, args)


def restarted(runner: RunnerState, env: Environment, args: Args) -> RunnerState:
    """Returns the runner at the beginning of new episodes, in all environments."""
    return first_runner(env._replace(first=env.restart(runner.env_state)), args)


def by_seed(x: Array, envs: int) -> Array:
    """Returns a leaf [T, S*N, ...] as [S, T, N, ...]."""
    x = x.reshape(len(x), -1, envs, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def rollout(
    runner: RunnerState,
    learner: LearnerState,
    first_env: Array | int,
    env: Environment,
    network: nn.Module,
    args: Args,
) -> tuple[RunnerState, Transition]:
    """Returns the runner and the transitions [S, T, N, ...] of T steps of S*N environments.

    Observations are [S, T + 1, N, K, ...]: the last are those that the rollout ended on.

    Args:
        first_env: of a seed's num_envs environments, which one the runner's begin with.
    """
    if args.restarts:
        runner = restarted(runner, env, args)
    envs = len(runner.time_step.reward) // len(learner.iteration)
    noise = draw_rollout_noise(learner, first_env, envs, env, args)
    step = partial(env_step, learner=learner, env=env, network=network, args=args)
    runner, transition = jax.lax.scan(step, runner, noise)
    last = runner.time_step.obs
    obs = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), transition.obs, last)
    return runner, jax.tree.map(partial(by_seed, envs=envs), transition._replace(obs=obs))


def make_stepwise(
    runner: RunnerState,
    learner: LearnerState,
    env: Environment,
    network: nn.Module,
    args: Args,
    device: jax.Device,
) -> Callable:
    """Returns `rollout` of host-side environments, whose policies act on an accelerator.

    Programs there cannot call environments (EnvPool 1.2.5 returns zeros, XLA does not compile
    callbacks in loops): each step's observations go there, and stay, and its actions come back.
    """
    host = cpu()
    envs = len(runner.time_step.reward) // args.num_seeds
    first = first_env(args)
    draw = jax.jit(partial(draw_rollout_noise, first_env=first, envs=envs, env=env, args=args))
    choose = jax.jit(partial(choose_action, network=network, args=args))

    def first_choice(learner: LearnerState) -> tuple:
        return choose(runner.time_step.obs, draw(learner)[0], learner)

    @jax.jit
    def join(parts: list[Any]) -> Any:
        return jax.tree.map(lambda *x: by_seed(jnp.stack(x), envs), *parts)

    chosen = jax.eval_shape(first_choice, learner)
    step = jax.jit(partial(take_step, env=env, args=args))
    step = step.lower(runner, chosen, learner.schedule.gamma).compile()
    restart = jax.jit(partial(restarted, env=env, args=args))

    def act(runner: RunnerState, learner: LearnerState) -> tuple[RunnerState, Transition]:
        gamma = learner.schedule.gamma
        seen = []
        steps = []
        with jax.enable_x64(True), jax.default_device(host):
            if args.restarts:
                runner = restart(runner)
            noise = np.asarray(draw(learner))
            learner = jax.device_put(learner, device)
            for t in range(args.num_steps):
                seen.append(jax.device_put(runner.time_step.obs, device))
                chosen = jax.device_put(choose(seen[t], noise[t], learner), host)
                runner, transition = step(runner, chosen, gamma)
                steps.append(transition._replace(obs=None))
            seen.append(jax.device_put(runner.time_step.obs, device))
            transitions = jax.device_get(join(steps))
            return runner, transitions._replace(obs=join(seen))

    return act


# --- Run ---
ROWS_PER_CORE = 100  # of a minibatch; for fewer, another core costs more than it saves
ROWS_PER_ACCELERATOR = 8192  # the same for GPUs and TPUs: a guess, never measured
GRACE = 10  # seconds that an iteration has to end in after a signal; clusters give 30
LOCK = ".lock"
RUN_FILES = (  # what a run folder holds, all of it
    Path(__file__).name,
    LOCK,
    "args.json",
    "result.json",
    "spaces.json",
    "*.tmp",
    "checkpoints/*.msgpack",
    "checkpoints/*.tmp",
    "best/*.msgpack",
    "best/*.tmp",
    "events.out.tfevents.*",
    "seed*/events.out.tfevents.*",
    "videos/*.mp4",
    "videos/*.gif",
)


def largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most `most`."""
    return max(d for d in range(1, max(most, 1) + 1) if number % d == 0)


def configure(args: Args) -> Mesh:
    """Sets JAX up and returns the devices of updates: [shares of a minibatch, seeds].

    On a CPU the cores are as many devices. Stops with exit code 2 where there is no such platform
    or cluster.
    """
    for name in ("jax_disable_jit", "jax_debug_nans"):
        if getattr(jax.config, name):
            fail(f"{name.upper()} is set: scripts need jit, and have NaN where no episode ended")
    cache = jax.config.jax_compilation_cache_dir or str(Path.home() / ".cache" / "ppo_jax")
    jax.config.update("jax_compilation_cache_dir", cache)
    platforms = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu", "auto": jax.config.jax_platforms}
    first, *others = (platforms[args.platform] or "").split(",")
    if first and "cpu" not in (first, *others):
        others.append("cpu")  # where host-side environments are
    jax.config.update("jax_platforms", ",".join([first, *others]) or None)

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    shape = share_out(args, cores, ROWS_PER_CORE)
    if args.distributed:
        try:
            jax.distributed.initialize()
        except (RuntimeError, ValueError):
            fail("--distributed is for processes that mpirun or srun starts: leave it out")
        check_shares(args)
    else:
        jax.config.update("jax_num_cpu_devices", math.prod(shape))
    try:
        devices = np.array(jax.devices(first or None))
    except RuntimeError:
        package = {"cuda": "jax[cuda13]", "tpu": "jax[tpu]"}.get(first, "its plugin")
        asked = f"--platform {args.platform} ({first})"
        fail(f"{asked} finds no device: it needs one, and {package}")

    if args.distributed:
        shape = (jax.process_count(), 1)
        devices = devices.reshape(jax.process_count(), -1)[:, 0]
    elif devices[0].platform != "cpu":
        shape = share_out(args, len(devices), ROWS_PER_ACCELERATOR)
    return Mesh(devices[: math.prod(shape)].reshape(shape), ("process", "seed"))


def share_out(args: Args, devices: int, rows: int) -> tuple[int, int]:
    """Returns over how many devices each seed's minibatches, and the seeds, are spread.

    Devices that seeds leave idle share minibatches, as P processes do, from `rows` a device.
    """
    seeds = largest_divisor(args.num_seeds, devices)
    idle = min(devices // seeds, args.minibatch_size // rows)
    return largest_divisor(math.gcd(args.num_envs, args.minibatch_size), idle), seeds


def check_shares(args: Args) -> None:
    """Stops with exit code 2 where P processes cannot share environments and minibatches."""
    processes = jax.process_count()
    if args.num_envs % processes:
        fail(f"--num-envs {args.num_envs} does not divide among {processes} processes")
    if args.minibatch_size % processes:
        rows = f"minibatches of {args.minibatch_size} rows"
        fail(f"{rows} do not divide among {processes} processes: change the minibatches' flags")


def init_learner(seed: Array, obs: Any, network: nn.Module, args: Args) -> LearnerState:
    """Returns one seed's new learner, whose policy has learnt the first Gaussian.

    Args:
        obs: one encoded observation.
    """
    key, init_key, run_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    params = network.init(init_key, random_states(init_key, obs))["params"]
    goal, _ = network.apply({"params": params}, random_states(init_key, obs))  # as warm is 0
    goal = jax.tree.map(lambda x: x[:1], goal)
    step = partial(init_step, goal=goal, obs=obs, network=network, args=args)
    start = params | {"warm": jnp.float32(1)}
    keys = jax.random.split(key, args.init_updates)
    (fitted, _), _ = jax.lax.scan(step, (start, optax.scale_by_adam().init(start)), keys)
    params = fitted | {"warm": jnp.float32(0), "critic": params["critic"]}

    def zeros(*shape: int) -> Array:
        return jnp.zeros((args.history_size, args.rollout_size, *shape), jnp.float32)

    history = Batch(
        obs=jax.tree.map(lambda x: zeros(*x.shape), obs),
        time=zeros(),
        action=zeros(goal.mean.size),
        advantage=zeros(),
        target=zeros(),
        mean=zeros(goal.mean.size),
        log_prob=zeros(),
    )
    networks = [part for part in params if part != "warm"]
    training = Training(
        adam={part: optax.scale_by_adam().init(params[part]) for part in networks},
        history=history,
        counts=jnp.zeros(args.history_size, jnp.float32),
    )

    def no_scaler(x: Array) -> Scaler:
        scale = jnp.ones(x.shape, jnp.result_type(x, jnp.float32))  # float32 of bytes
        return Scaler(mean_square=jnp.zeros_like(scale), scale=scale, count=jnp.float32(0))

    return LearnerState(
        params={"params": params},
        opt_state=training,
        obs_stats=jax.tree.map(no_scaler, obs),
        schedule=Schedule(*(jnp.float32(getattr(args, name)) for name in Schedule._fields)),
        key=run_key,
        iteration=jnp.int32(0),
        episodes=jnp.int32(0),
        returns=jnp.zeros(100, jnp.float32),
    )


def random_states(key: Array, obs: Any) -> Any:
    """Returns 256 standard normal observations like `obs`: [256, ...]."""
    return jax.tree.map(lambda x: jax.random.normal(key, (256, *x.shape), jnp.float32), obs)


def init_step(
    carry: tuple[Any, optax.OptState],
    key: Array,
    goal: Gaussian,
    obs: Any,
    network: nn.Module,
    args: Args,
) -> tuple[tuple[Any, optax.OptState], None]:
    """Returns parameters and Adam's state after one step of regression to the Gaussian goal."""

    def loss(params: Any) -> Array:
        policy, _ = network.apply({"params": params}, random_states(key, obs))
        mean_error = jnp.mean(jnp.square(policy.mean - goal.mean))
        std_error = jnp.mean(jnp.square(jnp.exp(policy.log_std) - jnp.exp(goal.log_std)))
        if policy.skew is None:
            return mean_error + std_error
        return mean_error + std_error + jnp.mean(jnp.square(policy.skew))

    params, adam = carry
    direction, adam = optax.scale_by_adam().update(jax.grad(loss)(params), adam)
    rate = args.learning_rate
    return (jax.tree.map(lambda p, d: p - rate * d, params, direction), adam), None


def init_learners(observation_space: spaces.Space, network: nn.Module, args: Args) -> LearnerState:
    """Returns new learners, one per seed, each as a lone run's: [S, ...]."""
    obs = encode_obs(empty_obs(observation_space), observation_space)
    init = partial(init_learner, obs=obs, network=network, args=args)
    # One by one: jaxlib 0.10 can lock up where two batches of matrices are decomposed at once
    return jax.lax.map(init, jnp.arange(args.num_seeds, dtype=jnp.uint32) + args.seed)


def seeds_of_envs(args: Args, *more: int) -> list[int]:
    """Returns the seeds of the S*N environments; `more` makes them others.

    Those of host-side environments are this process's share.
    """
    envs = args.num_envs if is_native(args) else args.num_envs // jax.process_count()
    first = first_env(args)
    found = []
    for seed in range(args.seed, args.seed + args.num_seeds):
        entropy = [seed, *more] if more else seed
        drawn = np.random.SeedSequence(entropy).generate_state(args.num_envs) >> 1
        found += drawn[first : first + envs].tolist()
    return found


def first_env(args: Args) -> int:
    """Returns which of a seed's N environments this process's runner begins with."""
    if is_native(args):
        return 0
    return jax.process_index() * (args.num_envs // jax.process_count())


class Run(NamedTuple):  # everything that acts
    args: Args
    env: Environment  # EnvPool's compiled calls hold bare pointers: it must outlive `act`
    network: nn.Module
    learner: LearnerState  # new, [S, ...], on the host
    runner: RunnerState
    act: Callable  # (runner, learner without opt_state) to runner and Transition [S, T, N, ...]
    rollout_shape: Transition | None  # what act returns, as shapes; None: of JAX-native ones


def make_run(args: Args, env_seeds: list[int], new: bool = True, render: bool = False) -> Run:
    """Returns environments, networks, and the compiled rollout.

    Args:
        new: whether to initialise learners; without, `learner` holds only shapes.
        render: whether the environment can be filmed.
    """
    on_host = not is_native(args)
    host = cpu() if on_host else None
    # EnvPool's MuJoCo speaks float64, which nothing outside of rollouts may
    with jax.enable_x64(on_host), jax.default_device(host):
        env = make_env(args, env_seeds, render)
        runner = first_runner(env, args)
        network = ActorCritic(env.action_space, args)
        init = jax.jit(partial(init_learners, env.observation_space, network, args))
        learner = jax.device_get(init()) if new else jax.eval_shape(init)
        act = partial(rollout, first_env=first_env(args), env=env, network=network, args=args)
        act = jax.jit(act)
        rollout_shape = None
        if on_host:
            # It holds a pointer, and so is of no use to other processes
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
            given = runner, learner._replace(opt_state=None)
            _, rollout_shape = jax.eval_shape(act, *given)
            device = acting_device(env.observation_space, args)
            if device == host:
                act = act.lower(*given).compile()
            else:
                act = make_stepwise(*given, env, network, args, device)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Run(args, env, network, learner, runner, act, rollout_shape)


class Iteration(NamedTuple):  # what a rollout and its update leave behind
    learner: LearnerState  # [S, ...]
    runner: RunnerState  # [S*N, ...], of JAX-native environments [S, N, ...]
    transition: Transition  # [S, T, N, ...]
    metrics: dict[str, Array]  # [S]
    bad: Array  # [], place in `checked` of the first that is not finite; their number: all are


def checked(
    learner: LearnerState, transition: Transition, metrics: dict[str, Array]
) -> dict[str, Any]:
    """Returns {name: pytree} of what must be finite, in the order in which it arises."""
    return {
        "the environment's observation": transition.obs,
        "the environment's reward": transition.reward,
        "the discounted return": transition.discounted_return,
        "the action": transition.action,
        **{name: x for name, x in learner._asdict().items() if name.endswith("stats")},
        **{name: x for name, x in sorted(metrics.items()) if "episodic" not in name},
        "a network's parameter": learner.params,
    }


def all_finite(tree: Any) -> Array:
    """Returns whether no leaf has an element that is infinite or no number."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def learn(
    learner: LearnerState, transition: Transition, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array], Array]:
    """Returns learners [S, ...] after an update, metrics [S], and Iteration's `bad` [].

    It runs on every device of the mesh, and `bad` is the same on all of them.
    """
    learner, metrics = jax.vmap(partial(update, network=network, args=args))(learner, transition)
    finite = [all_finite(tree) for tree in checked(learner, transition, metrics).values()]
    bad = jnp.argmin(jnp.stack([*finite, jnp.array(False)]))
    return learner, metrics, jax.lax.pmin(bad, ("process", "seed"))


# On the mesh of updates, seeds lie on the second axis, a seed's environments on the first
BY_SEED = PartitionSpec("seed")
BY_ENV = PartitionSpec("seed", "process")
ROLLOUT = PartitionSpec("seed", None, "process")
EVERYWHERE = PartitionSpec()


def make_advance(run: Run, mesh: Mesh) -> tuple[Callable, RunnerState]:
    """Returns compiled iterations, and the runner that the first of them takes.

    (learner, runner, count, seconds) gives the last Iteration of `count`, or the first with
    something not finite. Its metrics and `bad` are on the host.
    """
    args = replace(run.args, distributed=mesh.shape["process"] > 1)  # cores share as processes do
    return (compile_loop if is_native(args) else compile_update)(run, mesh, args)


def compile_update(run: Run, mesh: Mesh, args: Args) -> tuple[Callable, RunnerState]:
    """Returns, as make_advance, a rollout on the host and an update of all seeds; count is 1."""
    update_all = jax.shard_map(
        partial(learn, network=run.network, args=args),
        mesh=mesh,
        in_specs=(BY_SEED, ROLLOUT),
        out_specs=(BY_SEED, BY_SEED, EVERYWHERE),
        check_vma=False,
    )
    put = partial(multihost_utils.host_local_array_to_global_array, global_mesh=mesh)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), run.rollout_shape)
    update_all = jax.jit(update_all, donate_argnums=0)
    given = put(run.learner, pspecs=BY_SEED), put(zeros, pspecs=ROLLOUT)
    update_all = update_all.lower(*given).compile()
    collect = jax.device_get
    if acting_device(run.env.observation_space, args) != cpu():
        collect = jax.block_until_ready  # what an accelerator has seen stays there

    def advance(learner: LearnerState, runner: RunnerState, count: int, seconds: dict) -> Iteration:
        with timed(seconds, "acting"):
            runner, transition = run.act(runner, learner._replace(opt_state=None))
            transition = collect(transition)
        with timed(seconds, "learning"):
            given = put(learner, pspecs=BY_SEED), put(transition, pspecs=ROLLOUT)
            learner, metrics, bad = jax.device_get(update_all(*given))
        return Iteration(learner, runner, transition, metrics, bad)

    return advance, run.runner


def iterate(last: Iteration, env: Environment, network: nn.Module, args: Args) -> Iteration:
    """Returns the next iteration of JAX-native environments, on one device of the mesh.

    The runner's leaves are [S, N, ...], of the seeds and environments that are this device's.
    """
    seeds, envs = last.runner.time_step.terminated.shape
    first = jax.lax.axis_index("process") * envs
    runner = jax.tree.map(lambda x: x.reshape(seeds * envs, *x.shape[2:]), last.runner)
    acting = last.learner._replace(opt_state=None)
    runner, transition = rollout(runner, acting, first, env, network, args)
    runner = jax.tree.map(lambda x: x.reshape(seeds, envs, *x.shape[1:]), runner)
    learner, metrics, bad = learn(last.learner, transition, network, args)
    return Iteration(learner, runner, transition, metrics, bad)


def iterate_often(
    learner: LearnerState,
    runner: RunnerState,
    count: Array,
    env: Environment,
    network: nn.Module,
    args: Args,
) -> Iteration:
    """Returns the last of `count` iterations, or the first with something not finite."""
    step = partial(iterate, env=env, network=network, args=args)
    unknown = Iteration(learner, runner, None, None, None)
    shapes = jax.eval_shape(step, unknown)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    all_good = len(checked(shapes.learner, shapes.transition, shapes.metrics))
    begin = zeros._replace(learner=learner, runner=runner, bad=zeros.bad + all_good)

    def goes_on(carry: tuple[Array, Iteration]) -> Array:
        done, last = carry
        return (done < count) & (last.bad == all_good)

    def body(carry: tuple[Array, Iteration]) -> tuple[Array, Iteration]:
        done, last = carry
        return done + 1, step(last)

    _, last = jax.lax.while_loop(goes_on, body, (jnp.int32(0), begin))
    return last


def make_loop(run: Run, mesh: Mesh, args: Args) -> Callable:
    """Returns iterate_often on a mesh: (learner, runner [S, N, ...], count []) to Iteration."""
    return jax.shard_map(
        partial(iterate_often, env=run.env, network=run.network, args=args),
        mesh=mesh,
        in_specs=(BY_SEED, BY_ENV, EVERYWHERE),
        out_specs=Iteration(BY_SEED, BY_ENV, ROLLOUT, BY_SEED, EVERYWHERE),
        check_vma=False,
    )


def to_devices(learner: LearnerState, runner: RunnerState, count: int, mesh: Mesh) -> tuple:
    """Returns what make_loop's function takes, where it takes it."""
    given = (learner, BY_SEED), (runner, BY_ENV), (np.int32(count), EVERYWHERE)
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in given)


def split_by_seed(runner: RunnerState, args: Args) -> RunnerState:
    """Returns a runner [S*N, ...] as [S, N, ...], on the host."""

    def split(x: Array) -> np.ndarray:
        return np.asarray(x).reshape(args.num_seeds, args.num_envs, *x.shape[1:])

    return jax.tree.map(split, runner)


def compile_loop(run: Run, mesh: Mesh, args: Args) -> tuple[Callable, RunnerState]:
    """Returns, as make_advance, iterations of JAX-native environments: one loop on the devices.

    Nothing is donated: a loop that outlasts a signal's grace leaves what it began with.
    """
    begin = to_devices(run.learner, split_by_seed(run.runner, args), 1, mesh)
    loop = jax.jit(make_loop(run, mesh, args)).lower(*begin).compile()

    def advance(learner: LearnerState, runner: RunnerState, count: int, seconds: dict) -> Iteration:
        last = loop(*to_devices(learner, runner, count, mesh))
        metrics, bad = jax.device_get((last.metrics, last.bad))
        mine = multihost_utils.global_array_to_host_local_array(last.transition, mesh, ROLLOUT)
        return last._replace(transition=mine, metrics=metrics, bad=bad)

    _, runner, _ = begin
    return advance, runner


def check_finite(last: Iteration) -> None:
    """Stops with exit code 1 at the first bad quantity, in the order in which they arise."""
    names = list(checked(last.learner, last.transition, last.metrics))
    if last.bad < len(names):
        iteration = int(last.learner.iteration[0])
        bad = names[last.bad]
        fail(f"iteration {iteration}: {bad} is not finite; earlier checkpoints are good", code=1)


def first_not_finite(quantities: dict[str, Any]) -> str | None:
    """Returns the name of the first pytree with a leaf that is infinite or no number."""
    for name, tree in quantities.items():
        for leaf in jax.tree.leaves(tree):
            if not np.isfinite(leaf).all():
                return name
    return None


# Run folder
def to_json(content: Any) -> str:
    """Returns strict JSON; infinity is written as a string."""
    if isinstance(content, dict):
        content = {k: str(v) if v in (math.inf, -math.inf) else v for k, v in content.items()}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file such that it is either whole or not there. Raises: OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict:
    """Returns the content of a file that holds a JSON object. Raises: ValueError, OSError."""
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def args_to_dict(args: Args) -> dict:
    """Returns settings as JSON can hold them."""
    return json.loads(to_json(asdict(args)))


def args_from_dict(content: dict) -> Args:
    """Returns settings that were JSON. Raises: ValueError where they are another script's."""
    known = {field.name: field.default for field in fields(Args)}
    odd = sorted(content.keys() ^ known.keys())
    if odd:
        names = ", ".join(flag(name) for name in odd)
        raise ValueError(f"its settings and this script's differ in {names}")
    settings = {}
    for name, value in content.items():
        if isinstance(value, list):
            value = tuple(value)
        if value == "inf" and isinstance(known[name], float):
            value = math.inf
        if known[name] is not None and not isinstance(value, type(known[name]) | int):
            raise ValueError(f"{flag(name)} is {value!r}")
        settings[name] = value
    return Args(**settings)


def space_to_dict(space: spaces.Space | dict, bounds: bool) -> dict:
    """Returns a space as JSON can hold it; bounds: of boxes, whether to keep theirs."""
    if isinstance(space, dict | spaces.Dict):
        parts = {name: space_to_dict(part, bounds) for name, part in space.items()}
        return {"type": "Dict", "spaces": parts}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [space_to_dict(part, bounds) for part in space]}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        choices = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
        return {"type": "MultiDiscrete"} | choices
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": list(space.shape)}
    content = {"type": "Box", "shape": list(space.shape)}
    if bounds:
        content["dtype"] = str(space.dtype)
        content["low"] = np.nan_to_num(space.low).tolist()  # strict JSON has no infinity
        content["high"] = np.nan_to_num(space.high).tolist()
    return content


def space_from_dict(content: dict) -> spaces.Space:
    """Returns the space that space_to_dict wrote; its boxes' bounds may be huge, not infinite."""
    content = dict(content)
    kind = content.pop("type")
    if kind == "Dict":
        return spaces.Dict({k: space_from_dict(v) for k, v in content["spaces"].items()})
    if kind == "Tuple":
        return spaces.Tuple([space_from_dict(v) for v in content["spaces"]])
    if kind == "Discrete":
        return spaces.Discrete(**content)
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(content["nvec"], start=content["start"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(content["n"])
    shape = tuple(content["shape"])
    if "low" not in content:
        return spaces.Box(-np.inf, np.inf, shape)
    dtype = np.dtype(content["dtype"])
    low = np.array(content["low"], dtype)
    high = np.array(content["high"], dtype)
    return spaces.Box(low, high, shape, dtype)


def definitions(text: str) -> dict[str, str]:
    """Returns {name: code} of a script's top level, without comments and layout."""
    found = {}
    for number, node in enumerate(ast.parse(text).body):
        target = getattr(node, "targets", [None])[0]
        name = getattr(node, "name", None) or getattr(target, "id", None)
        found[name or f"{type(node).__name__.lower()} {number}"] = ast.dump(node)
    return found


def changed_definitions(folder: Path) -> str:
    """Returns the names of what differs between this script and the one that began a run."""
    try:
        before = definitions((folder / Path(__file__).name).read_text())
    except (OSError, SyntaxError, ValueError):
        return "all of it (the copy there is not readable)"
    now = definitions(Path(__file__).read_text())
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    return ", ".join(names)


def strangers(folder: Path) -> list[str]:
    """Returns the files in a folder that no run has written."""
    own = {path for pattern in RUN_FILES for path in folder.glob(pattern)}
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return [str(path.relative_to(folder)) for path in files if path not in own]


def holds_run(folder: Path) -> bool:
    """Returns whether a folder holds a run of this script, of whatever settings."""
    return (folder / "args.json").exists() and (folder / Path(__file__).name).exists()


def other_script(folder: Path) -> str:
    """Returns the name of the script whose run a folder holds, or an empty string."""
    names = [path.name for path in folder.glob("*.py")] if (folder / "args.json").exists() else []
    return names[0] if names and Path(__file__).name not in names else ""


# Settings that may differ when a run goes on: they change no result
FREE = {
    "run_dir",
    "total_timesteps",
    "clobber",
    "checkpoint_interval",
    "keep_best",
    "use_best",
    "log_interval",
    "mode",
    "deterministic",
    "eval_episodes",
    "eval_steps",
    "video",
    "platform",
    "act_on",
    "distributed",
    "vectorization",
}


def check_folder(args: Args) -> None:
    """Stops with exit code 2 where a run folder is somebody else's, or its run is another."""
    folder = args.folder
    if not folder.exists():
        return
    if not folder.is_dir():
        fail(f"--run-dir {folder} is a file: give a folder")
    remedy = "choose another --exp-name or --run-dir"
    if not holds_run(folder):
        found = ["args.json"] if (folder / "args.json").exists() else strangers(folder)
        if other_script(folder):
            fail(f"--run-dir {folder} holds a run of {other_script(folder)}: {remedy}")
        if found:
            fail(f"--run-dir {folder} holds files that are no run's ({found[0]}): {remedy}")
        return
    if args.clobber:
        return
    remedy += ", or start afresh with --clobber"
    if changed := changed_definitions(folder):
        name = Path(__file__).name
        fail(
            f"{folder} holds a run of another version of {name}, differing in: {changed}; {remedy}"
        )
    try:
        before = read_json(folder / "args.json")
    except ValueError:
        fail(f"{folder}/args.json is not readable: restore it (result.json has it), or {remedy}")
    now = args_to_dict(args)
    differ = [name for name in now if now[name] != before.get(name) and name not in FREE]
    if differ:
        flags = ", ".join(f"{flag(x)} {now[x]} (there: {before.get(x)})" for x in differ)
        fail(f"{folder} holds a run with other settings: {flags}; {remedy}")


def lock_folder(folder: Path) -> int:
    """Returns the descriptor of a run folder's locked file; the lock ends with this process.

    Stops with exit code 2, naming the owner, where another process trains in the folder.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(lock, 1000).decode() or "another process"
        fail(f"{folder} is being trained in by {owner}: wait for it, or end it")
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {platform.node()}".encode())
    return lock


def clobber(folder: Path) -> None:
    """Deletes the run in a folder. Stops with exit code 2 where anything there is not a run's.

    The folder is moved aside first, so that it is never half a run. Raises: OSError.
    """
    if not folder.exists() or not holds_run(folder):
        return
    if found := strangers(folder):
        fail(f"--clobber: {folder} also holds {', '.join(found[:3])}: move that away first")
    if Path.cwd().is_relative_to(folder):
        fail(f"--clobber: {folder} is the current directory: start from another one")
    lock = lock_folder(folder)
    aside = folder.with_name(f".{folder.name}.clobbered-{os.getpid()}")
    folder.rename(aside)
    os.close(lock)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        note(f"--clobber: the old run could not be deleted whole; what is left lies in {aside}")


def create_folder(args: Args, run: Run) -> None:
    """Writes what a run folder begins with; the script first and args.json last."""
    folder = args.folder
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for temporary in [*folder.glob("*.tmp"), *folder.glob("*/*.msgpack.tmp")]:
        temporary.unlink()  # of a process that was killed while it wrote
    write_atomically(folder / Path(__file__).name, Path(__file__).read_bytes())
    described = {
        "observation": space_to_dict(run.env.observation_space, bounds=False),
        "action": space_to_dict(run.env.action_space, bounds=True),
    }
    path = folder / "spaces.json"
    if path.exists() and read_json(path) != described:
        fail(f"--env-id {args.env_id} has other spaces than when {folder} was begun: --clobber")
    write_atomically(path, to_json(described).encode())
    write_atomically(folder / "args.json", to_json(asdict(args)).encode())


# Checkpoints
class Seconds(NamedTuple):  # spent by all processes that have worked on a run
    starting: float = 0.0  # compilation, and everything else before the first iteration
    wall: float = 0.0  # iterations, all in all
    acting: float = 0.0
    learning: float = 0.0


def checkpoint_paths(folder: Path, kind: str = "checkpoints") -> list[Path]:
    """Returns the checkpoints of a run folder, or those of kind "best", the newest first."""
    paths = (folder / kind).glob("*.msgpack")
    return sorted(paths, key=lambda path: int(path.stem), reverse=True)


class Checkpoint(NamedTuple):  # what a file of a run folder holds
    learner: LearnerState  # [S, ...]
    runner: dict  # of JAX-native environments, {place: leaf of a RunnerState}; others go on anew
    seconds: Seconds


def write_checkpoint(folder: Path, found: Checkpoint) -> None:
    """Writes a checkpoint, named by its iteration, and keeps the one before. Raises: OSError.

    The file is a SHA-256 digest of 32 bytes, and then what flax.serialization makes of the state.
    """
    write_state(folder / "checkpoints" / f"{int(found.learner.iteration[0])}.msgpack", found)
    for old in checkpoint_paths(folder)[2:]:
        old.unlink()


def write_state(path: Path, found: Checkpoint) -> None:
    """Writes a file that holds a checkpoint. Raises: OSError."""
    content = flax.serialization.to_bytes(found)
    write_atomically(path, hashlib.sha256(content).digest() + content)


def write_best(folder: Path, found: Checkpoint) -> None:
    """Writes a checkpoint as the best one, if its last 100 episodes earned more. Raises: OSError.

    Several seeds are judged by their mean.
    """
    returns = last_100(found.learner)
    if None in returns:
        return
    best = None
    with suppress(ValueError):  # one that is not readable is replaced
        best = newest_checkpoint(folder, found.learner, "best")
    if best is not None and np.mean(last_100(best.learner)) >= np.mean(returns):
        return
    (folder / "best").mkdir(exist_ok=True)
    path = folder / "best" / f"{int(found.learner.iteration[0])}.msgpack"
    write_state(path, found)
    for old in checkpoint_paths(folder, "best"):
        if old != path:
            old.unlink()


def read_checkpoint(path: Path, like: LearnerState) -> Checkpoint:
    """Returns a file's content; `like` has the learner's structure. Raises: ValueError, OSError."""
    content = flax.serialization.msgpack_restore(checked_content(path))
    return Checkpoint(
        learner=flax.serialization.from_state_dict(like, content["learner"]),
        runner=content.get("runner", {}),  # not in older files
        seconds=flax.serialization.from_state_dict(Seconds(), content["seconds"]),
    )


def checked_content(path: Path) -> bytes:
    """Returns a checkpoint's bytes behind its digest. Raises: ValueError if any has changed."""
    data = path.read_bytes()
    digest, content = data[:32], data[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its bytes have changed")
    return content


def last_iteration(folder: Path) -> int:
    """Returns the iteration of the newest whole checkpoint of a run folder, 0 if there is none."""
    for path in checkpoint_paths(folder):
        with suppress(ValueError, OSError):
            checked_content(path)
            return int(path.stem)
    return 0


def newest_checkpoint(
    folder: Path, like: LearnerState, kind: str = "checkpoints"
) -> Checkpoint | None:
    """Returns what the newest readable checkpoint of a kind holds, None where there are none.

    Raises: ValueError where there are some, but none readable.
    """
    paths = checkpoint_paths(folder, kind)
    for path in paths:
        try:
            return read_checkpoint(path, like)
        except (ValueError, OSError, KeyError) as error:
            note(f"{path} is damaged ({error}), trying the one before")
    if paths:
        raise ValueError(f"{folder} has no readable checkpoint: restore a backup, or --clobber")
    return None


def runner_to_dict(runner: RunnerState) -> dict:
    """Returns {place: leaf}: what a checkpoint holds of a runner, of whatever structure."""
    return {str(i): x for i, x in enumerate(jax.tree.leaves(runner))}


def runner_from_dict(found: dict, like: RunnerState) -> RunnerState:
    """Returns the inverse of runner_to_dict. Raises: ValueError where it is another task's."""
    leaves, structure = jax.tree.flatten(like)
    kinds = [(x.shape, x.dtype) for x in leaves]
    if kinds != [(found[str(i)].shape, found[str(i)].dtype) for i in range(len(found))]:
        raise ValueError("holds environments of another kind: --clobber starts afresh")
    return jax.tree.unflatten(structure, [found[str(i)] for i in range(len(found))])


def last_100(learner: LearnerState) -> list[float | None]:
    """Returns each seed's mean return of the last 100 training episodes, None before the first."""
    means = []
    for returns, episodes in zip(learner.returns, learner.episodes, strict=True):
        known = returns[len(returns) - min(int(episodes), len(returns)) :]
        means.append(float(np.mean(known)) if len(known) else None)
    return means


def make_result(args: Args, learner: LearnerState, seconds: Seconds) -> dict:
    """Returns the content of result.json."""
    iteration = int(learner.iteration[0])
    steps = iteration * args.rollout_size * args.num_seeds
    versions = {x.__name__: x.__version__ for x in (jax, flax, optax, envpool, gymnasium, np)}
    cores = f"{os.cpu_count()} cores"
    processes = f"{jax.process_count()} process(es)"
    return {
        "script": Path(__file__).name,
        "env_id": args.env_id,
        "args": args_to_dict(args),
        "seeds": list(range(args.seed, args.seed + args.num_seeds)),
        "finished": iteration >= args.num_iterations,
        "timesteps": iteration * args.rollout_size,
        "episodes": [int(x) for x in learner.episodes],
        "episodic_return": last_100(learner),
        "eval_return": None,
        "wall_time": seconds.starting + seconds.wall,
        "compile_time": seconds.starting,
        "sps": steps / max(seconds.wall, 1e-9),
        "sps_with_compile": steps / (seconds.starting + max(seconds.wall, 1e-9)),
        "sps_rollout": steps / seconds.acting if seconds.acting else None,
        "sps_update": steps / seconds.learning if seconds.learning else None,
        "versions": versions,
        "device": f"{jax.devices()[0].device_kind}, {cores}, {processes}",
    }


def save(args: Args, found: Checkpoint) -> None:
    """Writes a checkpoint and result.json.

    Stops with exit code 1 where the disk takes none, or the state is not finite.
    """
    folder = args.folder
    learner = found.learner
    if bad := first_not_finite(learner._asdict()):
        fail(f"{bad} is not finite after {args.env_id}'s last rollout; no checkpoint", code=1)
    try:
        write_checkpoint(folder, found)
        if args.keep_best:
            write_best(folder, found)
        result = make_result(args, learner, found.seconds)
        write_atomically(folder / "result.json", to_json(result).encode())
    except OSError as error:
        kept = checkpoint_paths(folder)
        last = f"checkpoint {kept[0].stem} stays" if kept else "there is no earlier one"
        fail(
            f"--run-dir {folder} takes no checkpoint ({error.strerror}), {last}: make room", code=1
        )


# Logs
class EventFile:
    """A TensorBoard event file whose writer neither blocks nor fails.

    What a full disk does not take is kept and written when there is room again.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begins a file in a folder; what earlier files have from first_step on is void."""
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}.{os.getpid()}"
        self.path = folder / name
        self.pending = b""
        self.add(Event(file_version="brain.Event:2"))
        self.add(Event(session_log=SessionLog(status=SessionLog.START), step=first_step))

    def add(self, event: Event) -> None:
        """Takes an event, to be written with the next flush."""
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.pending += record.getvalue()

    def add_summary(self, step: int, summary: Summary) -> None:
        """Takes a summary, to be written with the next flush."""
        self.add(Event(step=step, summary=summary))

    def flush(self) -> None:
        """Writes what is pending, as far as the disk takes it."""
        with suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                while self.pending:
                    written = file.write(self.pending)
                    self.pending = self.pending[written:]


def open_event_files(args: Args, run: Run, step: int) -> list[EventFile]:
    """Returns an event file per seed, in the run folder or its sub-folders, from `step` on.

    They begin with the settings, as a table and for the HParams tab, and the networks' layers.
    """
    settings = args_to_dict(args)
    table = ["|setting|value|", "|-|-|", *(f"|{name}|{value}|" for name, value in settings.items())]
    plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in settings.items()}
    options = {"width": 120, "force_terminal": False}
    seen = network_input(run.runner)
    layers = run.network.tabulate(jax.random.PRNGKey(0), seen, console_kwargs=options)
    files = []
    for seed in range(args.seed, args.seed + args.num_seeds):
        folder = args.folder / f"seed{seed}" if args.num_seeds > 1 else args.folder
        file = EventFile(folder, first_step=step + 1)
        file.add_summary(step, text_pb("hyperparameters", "\n".join(table)))
        file.add_summary(step, hparams_pb(plain | {"seed": seed}, trial_id=str(folder)))
        file.add_summary(step, text_pb("networks", f"```\n{layers}\n```"))
        files.append(file)
    return files


def log(files: list[EventFile], iteration: int, last: Iteration, speed: float, args: Args) -> None:
    """Writes an iteration's metrics [S], and sometimes histograms of its rollout.

    Args:
        speed: of all seeds, steps per second.
    """
    if iteration % args.log_interval:
        return
    step = iteration * args.rollout_size
    for seed, file in enumerate(files):
        known = {name: float(x[seed]) for name, x in last.metrics.items() if np.isfinite(x[seed])}
        known["charts/SPS"] = speed
        values = [Summary.Value(tag=name, simple_value=x) for name, x in known.items()]
        file.add_summary(step, Summary(value=values))
        if iteration % (10 * args.log_interval) == 0:
            for name in ("obs", "action", "reward"):
                leaves = jax.tree.leaves(getattr(last.transition, name))
                values = np.concatenate([np.ravel(np.asarray(leaf)[seed]) for leaf in leaves])
                some = values[:: len(values) // 100_000 + 1]  # of images there are millions
                file.add_summary(step, histogram_pb(f"rollout/{name}", some))
        file.flush()


# Training
class Signals:
    """SIGINT and SIGTERM: the first is noted, a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.first = 0  # the signal's number; 0: none yet
        signal.signal(signal.SIGINT, self.receive)
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        """Handles a signal, in the main thread, which never waits for an environment."""
        name = signal.Signals(number).name
        if not self.first:
            self.first = number
            note(f"{name}: ending after this iteration, or in {GRACE} s as the last one left it")
        elif number == signal.SIGINT:
            note(f"{name} again: ending at once, the last checkpoint stays")
            leave(128 + number)


def leave(code: int) -> NoReturn:
    """Ends this process and its children at once, also where a thread hangs in an environment."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def wait(future: Future, signals: Signals) -> Any:
    """Returns the result of work in another thread, None if it takes GRACE s after a signal."""
    while not signals.first:
        with suppress(TimeoutError):
            return future.result(timeout=0.5)
    with suppress(TimeoutError):
        return future.result(timeout=GRACE)
    return None


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the time that a block takes to seconds[name]."""
    began = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - began


def train(args: Args, mesh: Mesh) -> None:
    """Trains to the end, from the newest checkpoint if there is one."""
    began = time.perf_counter()
    chief = jax.process_index() == 0
    if chief:
        check_folder(args)
        if not args.clobber and report_finished(args):
            return
    run = make_run(args, seeds_of_envs(args))
    advance, runner = make_advance(run, mesh)
    learner, runner, seconds, _lock = open_folder(args, run, runner)
    first = int(learner.iteration[0])
    seconds = seconds._asdict()
    seconds["starting"] += time.perf_counter() - began

    signals = Signals()
    worker = ThreadPoolExecutor(max_workers=1)
    files = open_event_files(args, run, first * args.rollout_size) if chief else []
    iteration = first
    with progress_bar(args, first, chief) as bar:
        while iteration < args.num_iterations:
            count = next_stop(iteration, args) - iteration
            began = time.perf_counter()
            with timed(seconds, "wall"):
                future = worker.submit(advance, learner, runner, count, seconds)
                last = wait(future, signals)
                if last is None:  # it takes longer than a cluster gives
                    save_and_leave(args, learner, runner, seconds, signals.first)
                if run.env.failures:
                    fail(f"iteration {iteration + 1}: {run.env.failures[0]}", code=1)
                check_finite(last)
                learner, runner = last.learner, last.runner
                iteration += count
                if chief:
                    steps = count * args.rollout_size
                    speed = args.num_seeds * steps / (time.perf_counter() - began)
                    log(files, iteration, last, speed, args)
                    show_progress(bar, steps, last.metrics)
            stopping = agree_on_signal(signals, args)
            due = iteration % args.checkpoint_interval == 0 or iteration == args.num_iterations
            if due or stopping:
                with timed(seconds, "wall"):
                    found = to_checkpoint(learner, runner, seconds, args)
                    if chief:
                        save(args, found)
            if stopping:
                sys.exit(128 + stopping)


def next_stop(iteration: int, args: Args) -> int:
    """Returns the iteration after which the host looks in: the next, on the device the next due."""
    if not is_native(args):
        return iteration + 1
    due = [x * (iteration // x + 1) for x in (args.log_interval, args.checkpoint_interval)]
    return min(*due, args.num_iterations)


def to_checkpoint(
    learner: LearnerState, runner: RunnerState, seconds: dict, args: Args
) -> Checkpoint:
    """Returns what a checkpoint holds, on the host. All processes must call it together."""
    if not is_native(args):
        return Checkpoint(learner, {}, Seconds(**seconds))
    learner, runner = multihost_utils.process_allgather((learner, runner), tiled=True)
    return Checkpoint(learner, runner_to_dict(runner), Seconds(**seconds))


def save_and_leave(
    args: Args, learner: LearnerState, runner: RunnerState, seconds: dict, number: int
) -> NoReturn:
    """Ends the process at a signal while iterations go on, as the last ones left the learner."""
    shared = args.distributed and is_native(args)  # the others need not come to a common save
    try:
        if jax.process_index() == 0 and not shared:
            save(args, to_checkpoint(learner, runner, seconds, args))
    except Failure as failure:
        note(str(failure))
        leave(failure.code)
    leave(128 + number)


def agree_on_signal(signals: Signals, args: Args) -> int:
    """Returns the number of a signal that any of the processes has had, or 0."""
    if not args.distributed:
        return signals.first
    received = multihost_utils.process_allgather(np.array(signals.first))
    return int(received.max())


def report_finished(args: Args) -> bool:
    """Returns whether the run in the folder is finished, and says so; mends its result.json."""
    iteration = last_iteration(args.folder)
    if iteration < args.num_iterations:
        return False
    steps = iteration * args.rollout_size
    print(f"{args.folder} is finished, {steps} steps: raise --total-timesteps, or --clobber")
    with suppress(OSError, ValueError):
        if read_result(args.folder) is None:
            saved = read_run(args.folder)
            result = make_result(saved.args, saved.learner, saved.seconds)
            write_atomically(args.folder / "result.json", to_json(result).encode())
    return True


def open_folder(
    args: Args, run: Run, runner: RunnerState
) -> tuple[LearnerState, RunnerState, Seconds, Any]:
    """Returns the newest learner and runner, the seconds spent before, and the folder's lock.

    Stops with exit code 2 at a folder that is another run's, locked, unreadable or unwritable.
    """
    folder = args.folder
    lock = None
    try:
        if jax.process_index() == 0:
            if args.clobber:
                clobber(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            check_folder(replace(args, clobber=False))
            say_what_changes(args)
            create_folder(args, run)
        multihost_utils.sync_global_devices("run folder")
        found = newest_checkpoint(folder, run.learner)
        if found is None:
            return run.learner, runner, Seconds(), lock
        if found.runner:
            runner = runner_from_dict(found.runner, runner)
        return found.learner, runner, found.seconds, lock
    except OSError as error:
        fail(f"--run-dir {folder} cannot be written ({error.strerror}): give another, or make room")
    except ValueError as error:
        fail(f"--run-dir {error}")


def say_what_changes(args: Args) -> None:
    """Says where a run will end, and what a raised --total-timesteps does to what is annealed."""
    steps = args.num_iterations * args.rollout_size
    if steps != args.total_timesteps:
        note(
            f"ends after {steps} steps, {args.num_iterations} whole rollouts of {args.rollout_size}"
        )
    iteration = last_iteration(args.folder)
    if not iteration:
        return
    before = read_json(args.folder / "args.json")["total_timesteps"]
    annealed = [x for x in vars(args) if x.startswith("anneal_") and getattr(args, x)]
    if before != args.total_timesteps and annealed:
        was = 1 - min(iteration / max(before // args.rollout_size, 1), 1)
        now = 1 - iteration / args.num_iterations
        names = ", ".join(flag(x) for x in annealed)
        change = f"goes on from {now:.3f} of its first value; it had come down to {was:.3f}"
        note(f"--total-timesteps {args.total_timesteps} (before: {before}): {names} {change}")


def progress_bar(args: Args, first: int, visible: bool) -> tqdm:
    """Returns a live line in a terminal; elsewhere it prints plain lines, every ten seconds."""
    form = {}
    if not sys.stderr.isatty():
        line = "{n_fmt} of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}\n"
        form = {"mininterval": 10, "bar_format": line}
    return tqdm(
        disable=not visible,
        initial=first * args.rollout_size,
        total=args.num_iterations * args.rollout_size,
        unit="step",
        unit_scale=args.num_seeds,
        **form,
    )


def show_progress(bar: tqdm, steps: int, metrics: dict) -> None:
    """Moves the progress line on by steps of a seed; nobody need be listening."""
    mean = np.mean(metrics["charts/episodic_return_100"])
    with suppress(OSError, ValueError):
        bar.set_postfix_str("" if np.isnan(mean) else f"return {mean:.1f}", refresh=False)
        bar.update(steps)


# Evaluation
class SavedRun(NamedTuple):  # what a run folder holds
    args: Args
    observation_space: spaces.Space
    action_space: spaces.Space
    learner: LearnerState  # [S, ...], on the host
    seconds: Seconds


def read_run(folder: Path, best: bool = False) -> SavedRun:
    """Returns what a run folder holds, without environments. Raises: ValueError, OSError.

    Args:
        best: whether of its checkpoints the best one is wanted, not the last.
    """
    name = Path(__file__).name
    if other_script(folder):
        raise ValueError(f"{folder} holds a run of {other_script(folder)}, not of {name}")
    if not holds_run(folder):
        raise ValueError(f"{folder} holds no run of {name}: train first, or name its folder")
    if changed := changed_definitions(folder):
        note(f"{folder} was trained by another version of this script, differing in: {changed}")
    try:
        args = args_from_dict(read_json(folder / "args.json"))
        described = read_json(folder / "spaces.json")
        observation_space = space_from_dict(described["observation"])
        action_space = space_from_dict(described["action"])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is not readable ({error}): use its own {name}") from error
    args = replace(args, run_dir=str(folder))
    network = ActorCritic(action_space, args)
    like = jax.eval_shape(partial(init_learners, observation_space, network, args))
    found = newest_checkpoint(folder, like, "best" if best else "checkpoints")
    if found is None and best:
        raise ValueError(f"{folder} has no best checkpoint: train with --keep-best")
    if found is None:
        raise ValueError(f"{folder} has no checkpoint yet: wait for the first, or train on")
    return SavedRun(args, observation_space, action_space, found.learner, found.seconds)


def read_result(folder: Path) -> dict | None:
    """Returns the content of result.json, None where it is missing or damaged."""
    try:
        return read_json(folder / "result.json")
    except (OSError, ValueError):
        return None


class Policy:
    """A trained policy: `action = policy(obs)`, for one observation or a batch of them."""

    def __init__(self, saved: SavedRun, index: int) -> None:
        """Takes a run and which of its seeds acts."""
        self.args = saved.args
        self.observation_space = saved.observation_space
        self.action_space = saved.action_space
        self.network = ActorCritic(saved.action_space, saved.args)
        learner = jax.tree.map(lambda x: x[index], saved.learner._replace(opt_state=None))
        self.learner = learner
        self.random = np.random.default_rng()
        self.compiled = jax.jit(self.act)

    def act(self, learner: LearnerState, obs: Any, noise: Array) -> Array:
        """Returns the environment's actions [B, ...] for encoded observations [B, ...]."""
        normalize_leaf = partial(normalize, bound=self.args.clip_obs)
        obs = jax.tree.map(normalize_leaf, obs, learner.obs_stats)
        policy, _ = self.network.apply(learner.params, obs)
        return env_action(sample_action(policy, noise), self.action_space, self.args)

    def __call__(self, obs: Any, deterministic: bool = True) -> np.ndarray:
        """Returns the action of one observation, or actions [B, ...] of a batch.

        Args:
            obs: as the environment gives it: an array, or dicts and tuples of arrays.
            deterministic: the most likely action; otherwise a sample.
        """
        encoded = encode_obs(obs, self.observation_space)
        one = encode_obs(empty_obs(self.observation_space), self.observation_space)
        single = jax.tree.leaves(encoded)[0].ndim == jax.tree.leaves(one)[0].ndim
        if single:
            encoded = jax.tree.map(lambda x: x[None], encoded)
        batch = len(jax.tree.leaves(encoded)[0])
        key = jax.random.PRNGKey(self.random.integers(2**31))
        noise = draw_noise(key, (batch,), self.action_space)
        if deterministic:
            noise = 0 * noise
        action = self.compiled(self.learner, encoded, noise)
        action = as_space_dtype(np.asarray(action), self.action_space)
        return action[0] if single else action


def load(run_folder: str | Path, seed: int | None = None, best: bool = False) -> Policy:
    """Returns the trained policy of a run folder; no environment is started.

    Args:
        seed: which of a folder's seeds; the first where none is given.
        best: whether that of the best checkpoint (--keep-best) is wanted, not the last one's.

    Raises: ValueError where the folder holds no readable run of this script, or not that seed.
    """
    saved = read_run(Path(run_folder).resolve(), best)
    index = 0 if seed is None else seed - saved.args.seed
    if not 0 <= index < saved.args.num_seeds:
        raise ValueError(f"{run_folder} has no seed {seed}")
    return Policy(saved, index)


def asked_of(folder: Path, command_line: list[str], best: bool) -> tuple[Args, SavedRun]:
    """Returns what the command line asks of a run's evaluation, and the run.

    Stops with exit code 2 at a flag that contradicts the run. Raises: ValueError, OSError.
    """
    saved = read_run(folder, best)
    trained = saved.args
    plain = replace(trained, mode="eval", video=False, distributed=False, platform="auto")
    asked = parse(command_line, default=plain)
    for name in vars(asked):
        value = getattr(trained, name)
        if getattr(asked, name) != value and name not in FREE:
            fail(f"{folder} was trained with {flag(name)} {value}: leave {flag(name)} out")
    return asked, saved


class Played(NamedTuple):  # evaluation episodes
    returns: list[list[float]]  # of each seed
    left: np.ndarray  # [S, N], how many each environment has still to play
    endless: int  # how many were cut after eval_steps


def with_fresh_noise(learner: LearnerState) -> LearnerState:
    """Returns a learner that acts on other noise: rollouts draw theirs from its iteration."""
    return learner._replace(iteration=learner.iteration + 1)


def play(run: Run, learner: LearnerState, episodes: int) -> Played:
    """Returns the returns of `episodes` episodes for each seed.

    Every environment plays its share, so that short episodes weigh no more than long ones.
    Stops with exit code 1 where an environment fails, or returns what is not finite.
    """
    args = run.args
    left = np.full((args.num_seeds, args.num_envs), episodes // args.num_envs)
    left[:, : episodes % args.num_envs] += 1
    played = Played(returns=[[] for _ in range(args.num_seeds)], left=left, endless=0)
    runner = run.runner
    acting = learner._replace(opt_state=None)
    worker = ThreadPoolExecutor(max_workers=1)  # another thread acts, so that Ctrl-C is heard
    with tqdm(total=int(left.sum()), unit="episode") as bar:
        while played.left.any():
            runner, transition = worker.submit(run.act, runner, acting).result()
            acting = with_fresh_noise(acting)
            transition = jax.device_get(transition)
            if run.env.failures:
                fail(run.env.failures[0], code=1)
            bad = first_not_finite({"observation": transition.obs, "reward": transition.reward})
            if bad:
                fail(f"--env-id {args.env_id}: the environment's {bad} is not finite", code=1)
            played = add_episodes(played, transition, args.eval_steps)
            with suppress(OSError, ValueError):
                bar.update(bar.total - int(played.left.sum()) - bar.n)
    return played


def add_episodes(played: Played, transition: Transition, eval_steps: int) -> Played:
    """Returns what was played, with the episodes that ended in a rollout [S, T, N, ...].

    An environment whose episode is longer than eval_steps plays no further one.
    """
    returns = [list(x) for x in played.returns]
    left = played.left.copy()
    endless = played.endless
    for seed, step, env in np.argwhere(transition.ended > 0):
        if left[seed, env] > 0:
            left[seed, env] -= 1
            returns[seed].append(float(transition.episodic_return[seed, step, env]))
    for seed, env in np.argwhere(transition.episodic_length[:, -1] >= eval_steps):
        if left[seed, env] > 0:
            left[seed, env] = 0
            returns[seed].append(float(transition.episodic_return[seed, -1, env]))
            endless += 1
    return Played(returns=returns, left=left, endless=endless)


def judgement(mean: float, env: Environment, args: Args) -> str:
    """Returns what a mean return is worth, to be printed behind it; empty if nobody knows."""
    if env.threshold is None:
        return ""
    return f"; solved from {env.threshold:g}: {mean >= env.threshold}"


def evaluate(args: Args, saved: SavedRun) -> None:
    """Runs a saved run's policies, says how they did, and writes it to result.json."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # before anything imports MuJoCo, for the film
    size = min(args.num_envs, args.eval_episodes)  # no more environments than training had
    playing = replace(args, num_envs=size, num_steps=100)
    run = make_run(playing, seeds_of_envs(playing, 1), new=False)
    played = play(run, saved.learner, args.eval_episodes)
    rows = []
    for seed, found in enumerate(played.returns, args.seed):
        row = {"mean": float(np.mean(found)), "std": float(np.std(found)), "episodes": len(found)}
        line = f"seed {seed}: return {row['mean']:.2f} +- {row['std']:.2f}"
        line += f" over {len(found)} episodes, {min(found):.2f} to {max(found):.2f}"
        line += judgement(row["mean"], run.env, args)
        rows.append(row)
        print(line, flush=True)
    if played.endless:
        note(f"{played.endless} episodes had not ended after --eval-steps {args.eval_steps}")
    result = read_result(args.folder) or make_result(saved.args, saved.learner, saved.seconds)
    result["eval_return"] = rows
    try:
        write_atomically(args.folder / "result.json", to_json(result).encode())
    except OSError as error:
        note(f"{args.folder}/result.json is left as it was: {error.strerror}")
    if args.video:
        film(args, saved)


def film(args: Args, saved: SavedRun) -> None:
    """Films an episode of the first seed as videos/<env-id>.mp4 and .gif.

    MuJoCo is filmed by Gymnasium's own environment of that name. In a run folder that cannot be
    written, the films go to the current directory.
    """
    env_id = args.env_id
    if "mujoco" in str(envpool.registration.registry.specs.get(env_id, "")):
        env_id = f"gymnasium:{env_id}"
    one = replace(args, env_id=env_id, num_envs=1, num_seeds=1, num_steps=1, vectorization="sync")
    learner = jax.tree.map(lambda x: x[:1], saved.learner._replace(opt_state=None))
    frames = []
    try:
        run = make_run(one, seeds_of_envs(one, 1), new=False, render=True)
        runner = run.runner
        ended = False
        while not ended and len(frames) < args.eval_steps:
            frame = run.env.render(runner.env_state)
            frames.append(frame.copy())  # viewers may draw all into one buffer
            runner, transition = run.act(runner, learner)
            learner = with_fresh_noise(learner)
            ended = bool(transition.ended.any()) or bool(run.env.failures)
        folder = args.folder if os.access(args.folder, os.W_OK) else Path.cwd()
        path = folder / "videos" / args.env_id.replace("/", "_").replace(":", "_")
        path.parent.mkdir(exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, of ffmpeg's process
            film = {"plugin": "FFMPEG", "fps": 30, "macro_block_size": 2}  # even sizes are needed
            imageio.v3.imwrite(f"{path}.mp4", np.stack(frames), **film)
        small = np.stack(frames)[:300:3, ::2, ::2]
        imageio.v3.imwrite(f"{path}.gif", small, duration=100, loop=0)
    except Failure as failure:
        note(f"--video: {failure}")
    except Exception as error:  # no OpenGL, no ffmpeg, no room: whatever keeps one from filming
        note(f"--video: {args.env_id} cannot be filmed, see README: {describe(error)}")
    else:
        print(f"filmed {len(frames)} steps: {path}.mp4, {path}.gif")


class Agent:
    """PPO-CMA by hand, from a loop of one's own. Its methods' order is that of the authors' Agent.

    agent = Agent(obs, action_space, **settings); agent.init(seed); action = agent.act(obs);
    agent.memorize(obs, action, reward, next_obs, terminated, truncated);
    agent.update_with_memorized(). Or agent = Agent.from_run(run_folder), and on from there.
    """

    def __init__(
        self, obs: Any, action_space: spaces.Box, capacity: int = 8000, **settings: Any
    ) -> None:
        """Makes networks and functions; `init` makes a learner.

        Args:
            obs: one observation.
            action_space: with bounds.
            capacity: the most decisions and episode ends between two updates.
            settings: flags of Args.
        """
        rows = {"num_envs": 1, "num_steps": capacity}
        self.args = Args(**{"action_repeat": 1} | settings | rows)
        self.space = action_space
        self.network = ActorCritic(action_space, self.args)
        self.obs = jax.tree.map(np.float32, obs)
        self.memory = []
        learn = partial(update, network=self.network, args=self.args)
        self.update = jax.jit(learn, donate_argnums=0)
        self.policy = jax.jit(self.sample)

    @classmethod
    def from_run(cls, run_folder: str | Path, seed: int | None = None) -> "Agent":
        """Returns an agent that goes on from a run's newest checkpoint, history included.

        Args:
            seed: which of a folder's seeds; the first where none is given.

        Raises: ValueError where the folder holds no readable run of this script.
        """
        policy = load(run_folder, seed)
        saved = read_run(Path(run_folder).resolve())
        index = 0 if seed is None else seed - saved.args.seed
        space = saved.observation_space
        obs = jax.device_get(encode_obs(empty_obs(space), space))
        settings = asdict(saved.args) | {"action_repeat": 1}
        for name in ("num_envs", "num_steps"):
            settings.pop(name)
        agent = cls(obs, policy.action_space, saved.args.rollout_size, **settings)
        agent.learner = jax.tree.map(lambda x: jnp.asarray(x[index]), saved.learner)
        agent.random = np.random.default_rng()
        return agent

    def sample(self, learner: LearnerState, obs: Any, noise: Array) -> Array:
        """Returns an action [U] from one observation and noise [1, U]."""
        normalize_leaf = partial(normalize, bound=self.args.clip_obs)
        batch = jax.tree.map(lambda x: x[None], obs)
        batch = jax.tree.map(normalize_leaf, batch, learner.obs_stats)
        policy, _ = self.network.apply(learner.params, batch)
        return sample_action(policy, noise)[0]

    def init(self, seed: int = 1) -> None:
        """Makes a new learner."""
        make = partial(init_learner, obs=self.obs, network=self.network, args=self.args)
        self.learner = jax.jit(make)(np.uint32(seed))
        self.random = np.random.default_rng(seed)

    def act(self, obs: Any, deterministic: bool = False) -> np.ndarray:
        """Returns an action of the space for one observation."""
        shape = (1, math.prod(self.space.shape))
        noise = np.zeros(shape) if deterministic else self.random.standard_normal(shape)
        obs = jax.tree.map(lambda like, x: np.float32(x), self.obs, obs)  # a list is an array
        action = self.policy(self.learner._replace(opt_state=None), obs, np.float32(noise))
        return np.asarray(env_action(action, self.space, self.args))

    def memorize(
        self,
        obs: Any,
        action: Any,
        reward: float,
        next_obs: Any,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Remembers one decision for the next update."""
        self.memory.append((obs, action, reward, next_obs, terminated, truncated))

    def update_with_memorized(self) -> float:
        """Returns the mean return of the episodes that ended in what was memorized, and learns it.

        What was memorized is forgotten. An unfinished episode's rest is worth what the critic
        says. Raises: ValueError where there is more than the capacity.
        """
        rows, last = self.rows_of_memory()
        missing = self.args.num_steps - len(rows)
        if missing < 0:
            capacity = self.args.num_steps
            found = f"{len(rows)} decisions and episode ends memorized"
            raise ValueError(f"{found}: raise capacity={capacity}")
        rows = [self.no_experience(self.obs)] * missing + rows
        steps = jax.tree.map(lambda *x: np.stack(x).astype(np.float32)[:, None], *rows)
        obs = jax.tree.map(
            lambda x, y: np.concatenate([x, np.float32(y)[None, None]])[:, :, None], steps.obs, last
        )
        self.learner, metrics = self.update(self.learner, steps._replace(obs=obs))
        self.memory = []
        return float(metrics["charts/episodic_return"])

    def no_experience(self, obs: Any) -> Transition:
        """Returns a step with mask 0, as environments have when they reset."""
        zero = np.float32(0)
        numbers = dict.fromkeys(Transition._fields, zero)
        action = np.zeros(math.prod(self.space.shape))
        return Transition(**numbers | {"obs": obs, "action": action})

    def rows_of_memory(self) -> tuple[list[Transition], Any]:
        """Returns what was memorized as steps of one environment, and the last observation."""
        rows = []
        last = self.obs
        length = 0
        total = 0.0
        for obs, action, reward, next_obs, terminated, truncated in self.memory:
            if rows and rows[-1].done:
                rows.append(self.no_experience(last))  # the true last observation
                length = 0
                total = 0.0
            length += 1
            total += reward
            last = next_obs
            step = Transition(
                obs=obs,
                action=np.ravel(action),
                reward=reward,
                terminated=terminated,
                done=terminated or truncated,
                mask=1.0,
                ended=terminated or truncated,
                episodic_return=total,
                episodic_length=length,
                discounted_return=0.0,
            )
            rows.append(step)
        return rows, last


def parse(command_line: list[str], default: Args) -> Args:
    """Returns the settings of a command line. Exits at --help (0) and at an unknown flag (2)."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    args = tyro.cli(Args, args=command_line, default=default, description=__doc__)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return args


def interrupt(number: int, frame: Any) -> NoReturn:
    """Handles a signal while there is nothing to save: before training, and in evaluation."""
    note(f"{signal.Signals(number).name}: nothing more is written")
    leave(128 + number)


def main() -> None:
    """Trains or evaluates, as the command line says."""
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    args = parse(sys.argv[1:], default=Args())
    try:
        validate(args)
        mesh = configure(args)
        if args.mode == "train":
            train(args, mesh)
        else:
            try:
                args, saved = asked_of(args.folder, sys.argv[1:], args.use_best)
            except (ValueError, OSError) as error:
                fail(f"--run-dir {error}")
            validate(args)
            evaluate(args, saved)
    except Failure as failure:
        note(str(failure))
        if args.distributed:
            leave(failure.code)  # the others wait for this process; mpirun and srun end them
        raise
    finally:
        for child in multiprocessing.active_children():
            child.kill()


if __name__ == "__main__":
    main()
