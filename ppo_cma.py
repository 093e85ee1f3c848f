# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax>=0.10",
#   "flax>=0.12",
#   "optax>=0.2.6",
#   "envpool>=1.2.5",
#   "gymnasium[box2d,mujoco]>=1.2",
#   "pydantic>=2.12",
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
minibatches of B rows; D numbers an observation, U an action; P processes. An iteration has
num_envs * num_steps simulation steps; one decision of the policy is held for action_repeat of them,
but not into a new episode. So must be the actions that `load` and Agent return.

Differs from the authors' code:
1. Rollouts have a fixed size. Episodes go on in the next; where a return is cut, the critic's
   value is the rest.
2. Truncated steps bootstrap from the value of their true last observation, terminated ones do not
   (theirs: in advantages all do, with time 0 in that last observation; in the critic's targets none
   does).
3. Decisions are held for 8 steps, not 2: the first policy finds MountainCarContinuous's goal five
   times as often.
4. --covariance full, with a Cholesky factor per state, is ours.
"""

import difflib
import fcntl
import importlib.util
import io
import json
import math
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple

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
from pydantic import BaseModel, Field, model_validator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

# --- Settings ---
Count = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Bound = Annotated[float, Field(gt=0)]  # inf: off
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Args(BaseModel, frozen=True, extra="forbid", ser_json_inf_nan="strings"):
    # Run
    env_id: str = "MountainCarContinuous-v0"
    """environment of EnvPool or Gymnasium; module:EnvId (module is imported first); gymnax/...,
    brax/... or jax:module:function for environments in JAX"""
    env_kwargs: str = "{}"  # the environment's arguments, as JSON: '{"terrain": "hills"}'
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # random seed; of several, the first
    num_seeds: Count = 1  # independent runs in this process, with seeds seed, seed + 1, ...
    grid: tuple[str, ...] = ()
    """settings to vary in this process, with all seeds each: learning_rate=1e-4,1e-3 gamma=0.9,0.99
    are four; clip_coef:ent_coef=0.1:0,0.2:0.01 are two, which differ in both"""
    total_timesteps: Count = 1_000_000  # per seed; whole rollouts, so rounded down
    exp_name: str = "ppo-cma"  # name of this experiment, a part of the run folder
    run_dir: str = ""  # run folder; empty: runs/<script>/<env-id>/<exp-name>/seed<seed>
    clobber: bool = False  # start afresh; a run in the folder is moved aside
    stop_when_solved: bool = False  # end once all S means of 100 episodes passed the threshold
    checkpoint_interval: Count = 50  # iterations between checkpoints, up to the next look
    keep_best: bool = False  # also keep the checkpoint whose last 100 episodes earned the most
    use_best: bool = False  # in eval mode, run that checkpoint's policy, not the last one's
    log_interval: Count = 1  # iterations between looks of the host, which logs, saves, and stops
    mode: Literal["train", "eval"] = "train"  # eval: run the run folder's policy
    deterministic: bool = True  # in eval mode, take the most likely actions, not samples
    eval_episodes: Count = 100  # evaluation episodes per seed
    eval_steps: Count = 100_000  # after which an evaluation's episode counts as it is
    video: bool = False  # in eval mode, film an episode of the first seed as mp4 and GIF
    render: bool = False  # in eval mode, show an episode of the first seed in a window
    track: bool = False  # Weights & Biases, too (pip install wandb); WANDB_PROJECT names a project
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # of updates and environments in JAX
    distributed: bool = False  # one of P processes of mpirun or srun, each with num_envs / P
    vectorization: Literal["sync", "async"] = "sync"  # Gymnasium's, async: a process for each
    # Rollout
    num_envs: Count = 4  # N, parallel environments per seed
    num_steps: Count = 1000  # T, steps per environment and rollout
    action_repeat: Count = 8  # simulation steps that a decision is held for; 1 or 2 for MuJoCo
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # GAE mixing: 0 is the one-step error, 1 the Monte Carlo return
    scale_obs: bool = True
    """divide observations by twice the root of the largest mean square of an iteration so far"""
    clip_obs: Bound = math.inf  # bound on observations, once scaled (inf: off)
    # Update
    algorithm: Literal["ppo-cma-m", "ppo-cma", "ppo", "pg", "pg-pos"] = "ppo-cma-m"
    """PPO-CMA with and without mirroring, PPO, and plain policy gradients"""
    learning_rate: Positive = 5e-4  # Adam's step size
    num_updates: Count = 100  # gradient steps of each network per iteration
    batch_size: Count = 2048
    """B, rows drawn with replacement for a gradient step; at most the decisions of a rollout"""
    history_size: Count = 9  # H, iterations that the variance learns from
    clip_coef: Positive = 0.2  # epsilon, the bound on |ratio - 1|
    clip_advantage: Bound = math.inf
    """bound on advantages, in their standard deviations (inf: off; the authors tried 3)"""
    ent_coef: Weight = 0.0  # weight of the entropy bonus
    value_loss: Literal["l1", "l2", "soft-l1"] = "l1"  # of the critic
    time_scale: Weight = 1e-3  # of the critic's extra input, decisions since the episode began
    # Network
    covariance: Literal["diagonal", "full"] = "diagonal"  # full: a Cholesky factor per state
    std_min: Positive = 0.01
    """least standard deviation, in the environment's units (the largest is the action range)"""
    init_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """mean of the first policy, in half ranges from the middle of the action range"""
    init_std: Positive = 1.0  # standard deviation of the first policy, in half ranges
    init_updates: Annotated[int, Field(ge=0, lt=2**31)] = 1999
    """gradient steps towards that policy before the first iteration"""
    hidden_sizes: tuple[Count, ...] = (128, 128)  # widths of the hidden layers
    dense_skips: bool = True
    """layers see the input and all layers before them, as in every released version"""
    leak: Annotated[float, Field(allow_inf_nan=False)] = 0.1  # slope of leaky ReLU below zero

    @property
    def rollout_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        decisions = self.num_envs * math.ceil(self.num_steps / self.action_repeat)
        return min(self.batch_size, decisions)

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.rollout_size

    @property
    def members(self) -> list[dict[str, float]]:
        """The S runs of this process: the seed and the varied settings of each."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        points = read_grid(self.grid)
        return [{"seed": seed} | point for point in points for seed in seeds]

    @property
    def native(self) -> bool:
        return self.env_id.startswith(tuple(NATIVE))

    @property
    def folder(self) -> Path:
        last = f"-{self.seed + self.num_seeds - 1}" if self.num_seeds > 1 else ""
        name = "-".join([*self.grid, f"seed{self.seed}{last}"])
        default = Path("runs", Path(__file__).stem, self.env_id, self.exp_name, name)
        return Path(self.run_dir or default).resolve()

    @model_validator(mode="after")
    def check_grid(self) -> "Args":
        """Raises: ValueError where a lone run could not have a member's settings."""
        points = read_grid(self.grid) if self.grid else []
        for point in points:
            if points.count(point) > 1:
                raise ValueError(f"--grid has {point} twice")
            if not point.keys() <= set(Schedule._fields):
                raise ValueError(f"--grid: what can vary is {', '.join(Schedule._fields)}")
            try:
                Args(**dict(self) | {"grid": ()} | point)
            except ValueError as error:
                raise ValueError(f"--grid {point}: {error}") from error
        return self

    @model_validator(mode="after")
    def check(self) -> "Args":
        """Raises: ValueError where settings contradict each other."""
        try:
            is_object = isinstance(json.loads(self.env_kwargs), dict)
        except json.JSONDecodeError:
            is_object = False
        if not is_object:
            raise ValueError("--env-kwargs: give '{\"name\": value}'")
        if self.num_iterations < 1:
            raise ValueError("--total-timesteps is below one rollout, --num-envs x --num-steps")
        if self.num_steps < self.action_repeat:
            raise ValueError("--num-steps is below --action-repeat")
        if self.ent_coef and self.algorithm.startswith("ppo-cma"):
            raise ValueError("--ent-coef belongs to --algorithm ppo, pg or pg-pos")
        return self


def read_grid(grid: tuple[str, ...]) -> list[dict[str, float]]:
    """Returns the points of a grid, all combinations of what its axes have. Raises: ValueError."""
    points = [{}]
    for axis in grid:
        left, _, right = axis.partition("=")
        names = left.split(":")
        try:
            rows = [map(float, numbers.split(":")) for numbers in right.split(",")]
            choices = [dict(zip(names, row, strict=True)) for row in rows]
        except ValueError as error:
            raise ValueError(f"--grid {axis}: give name=number,number ({error})") from error
        if len(points[0] | choices[0]) < len(points[0]) + len(names):
            raise ValueError(f"--grid {axis}: a setting is named twice")
        points = [point | choice for point in points for choice in choices]
    return points


def member_name(member: dict[str, float]) -> str:
    """Returns a member's name in logs and folders: gamma=0.99,seed1."""
    settings = [f"{name}={value}" for name, value in member.items() if name != "seed"]
    return ",".join([*settings, f"seed{member['seed']}"])


def note(message: str) -> None:
    """Prints a line on stderr."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr, flush=True)


class InputError(ValueError):
    """What the user gave cannot work; main says why in one line and exits with code 2."""


# --- State ---
class Scaler(NamedTuple):  # of observations, [D]
    mean_square: Array  # each iteration counts the same
    scale: Array  # never grows
    count: Array  # [], iterations


class Transition(NamedTuple):  # one step; a rollout stacks T of them: [T, N, ...]
    obs: Array  # raw [D]; of a rollout [T + 1, N, D]: obs[t + 1] is the true next observation
    action: Array  # [U], as sampled, before the environment's bounds
    reward: Array  # raw
    terminated: Array  # 1: no value beyond this step
    done: Array  # 1: terminated or truncated
    mask: Array  # 0: the environment reset itself on this step, which is not experience
    episodic_return: Array  # real and unclipped, so far
    episodic_length: Array
    discounted_return: Array  # of raw rewards, so far: what scales rewards


class Batch(NamedTuple):  # decisions, [B, ...]
    obs: Array  # raw in history, scaled in a minibatch
    time: Array  # decisions since the episode began
    action: Array  # within the bounds
    advantage: Array
    target: Array
    mean: Array  # of the policy before the iteration's updates
    log_prob: Array  # of action under that policy


class Schedule(NamedTuple):  # numbers that are swept: traced, so nothing recompiles
    learning_rate: Array
    clip_coef: Array
    ent_coef: Array
    gamma: Array
    gae_lambda: Array


class Training(NamedTuple):  # what rollouts do not need
    adam: dict[str, optax.OptState]  # of each network
    history: Batch  # [H, T*N, ...], a ring of iterations; decisions first, then what nothing reads
    counts: Array  # [H], decisions


class LearnerState(NamedTuple):  # all that training changes
    params: Any
    opt_state: Training
    obs_stats: Scaler
    schedule: Schedule
    key: Array  # [2], of the whole run; each iteration's keys are folded from it
    iteration: Array  # []
    episodes: Array  # [], ended so far
    returns: Array  # [100], of the last training episodes, the newest last; before these -inf


# --- Networks ---
def unit_columns(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    """Returns random weights [in, out], those of each output with norm 1."""
    weights = jax.random.normal(key, shape, dtype)
    return weights / jnp.linalg.norm(weights, axis=0)


def centring(key: Array, x: Array) -> Array:
    """Returns biases [size] that centre x [..., size]."""
    return -jnp.mean(x, axis=tuple(range(x.ndim - 1)))


class MLP(nn.Module):
    """Leaky ReLU layers, each of which may see all that came before it.

    The first weights have norm 1, the first biases centre the batch [B, in] that init sees.
    """

    size: int
    args: Args

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns [..., size] for [..., in]."""
        for i, width in enumerate(self.args.hidden_sizes):
            new = nn.leaky_relu(self.layer(x, width, i), self.args.leak)
            x = jnp.concatenate([x, new], axis=-1) if self.args.dense_skips else new
        return self.layer(x, self.size, len(self.args.hidden_sizes))

    def layer(self, x: Array, width: int, i: int) -> Array:
        """Returns what the layer with number i makes of x [..., in]: [..., width]."""
        x = nn.Dense(width, use_bias=False, kernel_init=unit_columns, name=f"Dense_{i}")(x)
        return x + self.param(f"bias_{i}", centring, x)


class ActorCritic(nn.Module):
    """Networks for mean, standard deviation and value; the compiler leaves out what is dropped."""

    space: spaces.Box  # of actions
    args: Args

    @nn.compact
    def __call__(self, obs: Array, time: Array | float = 0.0) -> tuple["Gaussian", Array]:
        """Returns the policy, leaves [..., U], and values [...], for observations [..., D].

        Args:
            time: decisions since the episode began, [...], which only the critic sees.
        """
        args = self.args
        low = jnp.asarray(self.space.low.ravel(), obs.dtype)
        high = jnp.asarray(self.space.high.ravel(), obs.dtype)
        action_size = low.size
        std_size = action_size
        if args.covariance == "full":
            std_size += action_size * (action_size - 1) // 2

        if args.algorithm.startswith("ppo-cma"):
            mean = MLP(action_size, args, name="mean")(obs)
            std = MLP(std_size, args, name="std")(obs)
        else:
            joint = MLP(action_size + std_size, args, name="policy")(obs)
            mean, std = jnp.split(joint, [action_size], axis=-1)
        time = jnp.broadcast_to(jnp.asarray(time, obs.dtype), obs.shape[:-1])
        timed = jnp.concatenate([obs, args.time_scale * time[..., None]], axis=-1)
        value = MLP(1, args, name="critic")(timed)[..., 0]

        mean = low + (high - low) * nn.sigmoid(mean)
        smallest = math.log(args.std_min)
        largest = jnp.log(high - low)
        log_std = smallest + (largest - smallest) * nn.sigmoid(std[..., :action_size])

        # A parameter that nothing trains: until the first update sets it to 1, a fixed Gaussian
        # acts, as the observations' scaler knows nothing yet
        warm = self.param("warm", nn.initializers.zeros, ())
        half = (high - low) / 2
        policy = Gaussian(
            mean=jnp.where(warm > 0, mean, low + half * (1 + args.init_mean)),
            log_std=jnp.where(warm > 0, log_std, jnp.log(half * args.init_std)),
            skew=None,
        )
        if args.covariance == "full":
            below = np.tril_indices(action_size, -1)
            skew = jnp.zeros((*mean.shape, action_size), obs.dtype)
            skew = skew.at[..., *below].set(std[..., action_size:])
            policy = policy._replace(skew=skew * (warm > 0))
        return policy, value


# --- Distribution ---
LOG_2_PI = math.log(2 * math.pi)


class Gaussian(NamedTuple):  # leaves [..., U]
    mean: Array
    log_std: Array
    skew: Array | None  # [..., U, U], strictly lower: the Cholesky factor is diag(std) (1 + skew)


def draw_noise(key: Array, shape: tuple[int, ...], space: spaces.Box) -> Array:
    """Returns standard normal noise for sample_action, [*shape, U]."""
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
    """Returns the scaler after one more iteration's x [T, N, D] where mask [T, N] is 1.

    Source: the authors' utils.py.
    """
    count = scaler.count + 1
    change = masked_mean(jnp.square(x), mask) - scaler.mean_square
    mean_square = scaler.mean_square + change / count
    scale = 1 / (2 * jnp.sqrt(mean_square) + 0.001)
    return Scaler(mean_square, jnp.minimum(scaler.scale, scale), count)


def normalize(x: Array, scaler: Scaler, bound: float) -> Array:
    """Returns x [..., D], scaled, clipped to +-bound; not centred."""
    return jnp.clip(x * scaler.scale, -bound, bound)


def all_finite(tree: Any) -> Array:
    """Returns whether no leaf has an element that is infinite or no number."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


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
    return batch._replace(obs=normalize(batch.obs, learner.obs_stats, args.clip_obs))


def fit(
    learner: LearnerState, key: Array, part: str, loss: Callable, network: nn.Module, args: Args
) -> tuple[LearnerState, Array]:
    """Returns the learner after num_updates gradient steps of one network, and the mean loss."""
    slots = args.history_size if part == "std" else 1

    def loss_of_part(own: Any, batch: Batch) -> Array:
        params = with_part(learner.params, part, own)
        return loss(params, batch, learner.schedule, network, args)

    def step(carry: tuple[Any, optax.OptState], key: Array) -> tuple[tuple, Array]:
        own, adam = carry
        batch = draw(key, learner, slots, args)
        if args.distributed:  # each process takes its part of the rows
            split = (jax.lax.axis_size("process"), -1)
            process = jax.lax.axis_index("process")
            batch = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:])[process], batch)
        found = jax.value_and_grad(loss_of_part)(own, batch)
        value, grads = average_over_processes(found, args)
        direction, adam = optax.scale_by_adam().update(grads, adam)
        rate = learner.schedule.learning_rate
        return (jax.tree.map(lambda p, d: p - rate * d, own, direction), adam), value

    start = learner.params["params"][part], learner.opt_state.adam[part]
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
    earlier = jnp.pad(lengths[:-1], ((1, 0), (0, 0)))  # of an episode that a reset follows
    before = jnp.concatenate([jnp.where(mask > 0, lengths - 1, earlier), lengths[-1:]])
    decisions = rollout._replace(
        obs=keep_last(rollout.obs),
        action=reorder(rollout.action),
        reward=sum_held(rollout.reward),
        terminated=sum_held(rollout.terminated),
        done=sum_held(rollout.done),
        mask=reorder(mask * (phase == 0)),
    )
    return decisions, keep_last(before) / repeat


def remember(learner: LearnerState, batch: Batch, mask: Array, args: Args) -> LearnerState:
    """Returns the learner with an iteration's batch [T, N, ...] in its ring, experience first."""
    order = jnp.argsort(mask.ravel() == 0, stable=True)
    slot = learner.iteration % args.history_size

    def write(ring: Array, x: Array) -> Array:
        return ring.at[slot].set(x.reshape(-1, *x.shape[2:])[order])

    history = jax.tree.map(write, learner.opt_state.history, batch)
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


def policy_metrics(
    policy: Gaussian, batch: Batch, mask: Array, schedule: Schedule
) -> dict[str, Array]:
    """Returns how far a new policy, leaves [T, N, U], is from the one that acted."""
    log_ratio = log_prob(policy, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    std = jnp.mean(jnp.exp(policy.log_std), axis=-1)
    return {
        "losses/approx_kl": masked_mean(ratio - 1 - log_ratio, mask),
        "losses/entropy": masked_mean(entropy(policy), mask),
        "losses/clipfrac": masked_mean(jnp.abs(ratio - 1) > schedule.clip_coef, mask),
        "cma/std": masked_mean(std, mask),
    }


def gather_envs(tree: Any, args: Args) -> Any:
    """Returns a pytree of [T, N / P, ...] with all processes' environments: [T, N, ...]."""
    if not args.distributed:
        return tree
    return jax.lax.all_gather(tree, "process", axis=1, tiled=True)


def count_episodes(
    learner: LearnerState, rollout: Transition
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner with the episodes that ended in a rollout counted, and metrics."""
    ended = rollout.done * rollout.mask  # [T, N]
    number = jnp.sum(ended)
    returns = jnp.where(ended > 0, rollout.episodic_return, -jnp.inf)
    returns = jnp.concatenate([learner.returns, returns.ravel()])
    known_last = jnp.argsort(returns > -jnp.inf)  # in their order
    returns = returns[known_last[-len(learner.returns) :]]
    known = returns > -jnp.inf
    metrics = {  # NaN where no episode has ended
        "charts/episodic_return": jnp.sum(rollout.episodic_return * ended) / number,
        "charts/episodes": learner.episodes + number,
        "charts/episodic_length": jnp.sum(rollout.episodic_length * ended) / number,
        "charts/episodic_return_100": jnp.sum(jnp.where(known, returns, 0)) / jnp.sum(known),
    }
    episodes = learner.episodes + number.astype(jnp.int32)
    return learner._replace(episodes=episodes, returns=returns), metrics


def rollout_samples(rollout: Transition) -> dict[str, Array]:
    """Returns what histograms show: of about a thousand steps [K, _]."""
    samples = {}
    for name in ("obs", "action", "reward"):
        x = getattr(rollout, name)
        rows = x.reshape(x.shape[0] * x.shape[1], -1)
        samples[f"rollout/{name}"] = rows[:: len(rows) // 1000 + 1, :: rows.shape[1] // 1000 + 1]
    return samples


def update(
    learner: LearnerState, rollout: Transition, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner after an iteration, and metrics: scalars, and samples [K, _].

    The critic learns first, then std from H iterations, then mean from this one.

    P processes compute what one does: each takes its part of each minibatch's rows; all else they
    know in common.

    Args:
        rollout: of this process's environments, leaves [T, N / P, ...], observations
            [T + 1, N / P, D], as the environment gave them.
    """
    rollout = gather_envs(rollout, args)
    decisions, time = merge_held_steps(rollout, args.action_repeat)
    mask = decisions.mask
    if args.scale_obs:
        obs_stats = update_scaler(decisions.obs[:-1], learner.obs_stats, mask)
        learner = learner._replace(obs_stats=obs_stats)
    learner = learner._replace(params=with_part(learner.params, "warm", jnp.ones(())))
    obs = normalize(decisions.obs, learner.obs_stats, args.clip_obs)

    # Targets are Monte Carlo returns; the policy is the one before this iteration's updates
    schedule = learner.schedule
    policy, value = network.apply(learner.params, obs, time)
    _, target = compute_gae(decisions, value, schedule.gamma, 1.0)
    policy = jax.tree.map(lambda x: x[:-1], policy)  # not of the last observation
    space = network.space
    action = jnp.clip(decisions.action, space.low.ravel(), space.high.ravel())
    batch = Batch(
        obs=decisions.obs[:-1],
        time=time[:-1],
        action=action,
        advantage=jnp.zeros_like(target),  # as long as the critic has not learnt
        target=target,
        mean=policy.mean,
        log_prob=log_prob(policy, action),
    )

    key = jax.random.fold_in(learner.key, 2 * learner.iteration + 1)
    centre_key, critic_key, std_key, mean_key = jax.random.split(key, 4)
    learner = remember(learner, batch, mask, args)
    learner = centre_critic(learner, centre_key, network, args)
    learner, value_loss = fit(learner, critic_key, "critic", critic_loss, network, args)

    _, new_value = network.apply(learner.params, obs, time)
    advantage, _ = compute_gae(decisions, new_value, schedule.gamma, schedule.gae_lambda)
    batch = batch._replace(advantage=scale_advantages(advantage, mask, args))
    learner = remember(learner, batch, mask, args)
    metrics = {}
    if args.algorithm.startswith("ppo-cma"):
        learner, std_loss = fit(learner, std_key, "std", cma_std_loss, network, args)
        learner, loss = fit(learner, mean_key, "mean", cma_mean_loss, network, args)
        metrics["cma/std_loss"] = std_loss
    else:
        learner, loss = fit(learner, mean_key, "policy", policy_loss, network, args)

    new_policy, _ = network.apply(learner.params, obs[:-1])
    metrics |= policy_metrics(new_policy, batch, mask, schedule)
    unexplained = masked_var(target - value[:-1], mask)
    explained = 1 - unexplained / jnp.maximum(masked_var(target, mask), 1e-8)
    metrics["losses/policy_loss"] = loss
    metrics["losses/value_loss"] = value_loss
    metrics["losses/explained_variance"] = explained
    metrics["charts/learning_rate"] = schedule.learning_rate
    metrics["policy/param_norm"] = optax.tree.norm(learner.params)
    learner = learner._replace(iteration=learner.iteration + 1)
    must_be_finite = {  # in the order in which they arise, which is that of the alphabet
        "bad/1 the environment's observation": rollout.obs,
        "bad/2 the environment's reward": rollout.reward,
        "bad/3 a running statistic": learner.obs_stats,
        "bad/4 a parameter of the network": (learner.params, learner.opt_state.adam),
    }
    for name, tree in must_be_finite.items():
        metrics[name] = jnp.where(all_finite(tree), 0, learner.iteration)
    learner, episode_metrics = count_episodes(learner, rollout)
    return learner, metrics | episode_metrics | rollout_samples(rollout)


# --- Environments ---
class TimeStep(NamedTuple):  # what environments show, leaves [S, N, ...]
    obs: Array  # float32 [S, N, D]; the step after an episode's last shows a new one's first
    reward: Array
    terminated: Array  # bool
    truncated: Array  # bool; never both


class Environment(NamedTuple):  # S*N environments behind one function
    first: tuple[Any, TimeStep]  # env_state, and what it shows after a reset
    step: Callable[[Any, Array], tuple[Any, TimeStep]]  # (env_state, action [S, N, *space.shape])
    observation_space: spaces.Space  # of one environment, as it gives observations
    action_space: spaces.Space
    threshold: float | None  # mean return from which the environment counts as solved
    render: Callable | None  # env_state to a frame [height, width, 3] of the first


def make_env(args: Args, env_seeds: list[int]) -> Environment:
    """Returns one environment per seed. Raises: InputError at unknown ids and other actions."""
    sys.path.append(os.getcwd())  # where a user's module may be, wherever this script lies
    if args.native:
        env = make_native(args, env_seeds)
    elif args.env_id in envpool.list_all_envs():
        env = make_envpool(args, env_seeds)
    else:
        if ":" not in args.env_id:
            require_known(args.env_id, [*envpool.list_all_envs(), *gymnasium.registry])
        env = make_gymnasium(args, env_seeds)
    if not isinstance(env.action_space, spaces.Box):
        raise InputError(
            f"--env-id {args.env_id}: {env.action_space} is no Box of actions; for choices there"
            " are ppo_atari.py (one) and ppo_icm_lstm.py (several), for teams ppo_multiagent.py"
        )
    widest = np.abs([env.action_space.low, env.action_space.high]).max()
    if not env.action_space.is_bounded() or widest > 1e30:
        why = "has actions without bounds: use ppo_continuous.py"
        raise InputError(f"--env-id {args.env_id} {why}")
    return hold_actions(env, args.action_repeat)


class HeldState(NamedTuple):  # of environments that hold actions, leaves [S, N, ...]
    env_state: Any
    action: Array
    count: Array  # steps of the episode; -1 at its end


def hold_actions(env: Environment, repeat: int) -> Environment:
    """Returns environments that hold an action for `repeat` steps, but not into a new episode."""

    def step(held: HeldState, action: Array) -> tuple[HeldState, TimeStep]:
        decides = held.count % repeat == 0
        decides = decides.reshape(*decides.shape, *(1,) * (action.ndim - decides.ndim))
        action = jnp.where(decides, action, held.action)
        env_state, new = env.step(held.env_state, action)
        count = jnp.where(new.terminated | new.truncated, -1, held.count + 1)
        return HeldState(env_state, action, count), new

    def render(held: HeldState) -> np.ndarray:
        return env.render(held.env_state)

    env_state, first = env.first
    count = jnp.zeros(first.reward.shape, jnp.int32)
    shape = (*count.shape, *env.action_space.shape)
    action = jnp.zeros(shape, action_dtype(env.action_space))
    return env._replace(
        first=(HeldState(env_state, action, count), first),
        step=step,
        render=render if env.render else None,
    )


def require_known(env_id: str, known: Iterable[str]) -> None:
    """Raises InputError at an id that is none of the known ones, naming the nearest."""
    known = set(known)
    if env_id not in known:
        nearest = ", ".join(difflib.get_close_matches(env_id, known)) or "none"
        raise InputError(f"--env-id {env_id} is unknown; nearest: {nearest}")


@contextmanager
def beside_environments(args: Args) -> Iterator[None]:
    """In this block JAX computes on the CPU, in the float64 that EnvPool's MuJoCo speaks.

    Environments in JAX need neither. Everything of ours is float32 in either case.
    """
    if args.native:
        yield
    else:
        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            yield


def flat(obs: Any, space: spaces.Space | dict) -> Array:
    """Returns the numbers [..., D] of observations of a space, with any leading axes.

    Choices are one-hot; one that is not of its space is no number, which stops the run. Raises:
    InputError for a space that networks cannot take.
    """
    if isinstance(space, dict | spaces.Dict):
        parts = [flat(obs[name], part) for name, part in space.items()]
    elif isinstance(space, spaces.Tuple):
        parts = [flat(x, part) for x, part in zip(obs, space, strict=True)]
    elif isinstance(space, spaces.Discrete):
        choice = jnp.asarray(obs)[..., None] - int(space.start)
        known = (choice >= 0) & (choice < int(space.n))
        parts = [jnp.where(known, choice == np.arange(space.n), jnp.nan)]
    elif isinstance(space, spaces.MultiDiscrete):
        rows = jnp.asarray(obs).reshape(*np.shape(obs)[: np.ndim(obs) - space.nvec.ndim], -1)
        choices = zip(space.nvec.ravel(), space.start.ravel(), strict=True)
        each = [spaces.Discrete(n, start=start) for n, start in choices]
        parts = [flat(rows[..., i], part) for i, part in enumerate(each)]
    elif isinstance(space, spaces.Box | spaces.MultiBinary):
        numbers = jnp.asarray(obs)
        parts = [numbers.reshape(*numbers.shape[: numbers.ndim - len(space.shape)], -1)]
    else:
        raise InputError(f"observations of space {space} are nothing that a network can take")
    return jnp.concatenate([x.astype(jnp.float32) for x in parts], axis=-1)


def split_seeds(
    obs: Any, reward: Array, terminated: Array, truncated: Array, args: Args
) -> TimeStep:
    """Returns what S*N environments show; an end that is both counts as terminated."""
    shown = TimeStep(obs, reward.astype(np.float32), terminated, truncated & ~terminated)
    return jax.tree.map(lambda x: x.reshape(len(args.members), -1, *x.shape[1:]), shown)


def make_envpool(args: Args, env_seeds: list[int]) -> Environment:
    """Returns EnvPool's environments: send and recv are XLA calls, inside of the compiled scan."""
    size = len(env_seeds)
    kwargs = json.loads(args.env_kwargs)
    pool = envpool.make_gymnasium(args.env_id, num_envs=size, seed=env_seeds, **kwargs)
    handle, recv, send, _ = pool.xla()
    space = pool.observation_space
    dtype = list(pool.spec.action_array_spec.values())[-1].dtype

    def receive(handle: Array) -> tuple[Array, TimeStep]:
        handle, (obs, reward, terminated, truncated, _) = recv(handle)
        return handle, split_seeds(flat(obs, space), reward, terminated, truncated, args)

    def step(handle: Array, action: Array) -> tuple[Array, TimeStep]:
        action = action.reshape(size, *action.shape[2:]).astype(dtype)
        return receive(send(handle, action, np.arange(size, dtype=np.int32)))

    pool.async_reset()
    return Environment(
        first=jax.block_until_ready(jax.jit(receive)(jnp.asarray(handle))),
        step=step,
        observation_space=space,
        action_space=pool.action_space,
        threshold=getattr(pool.spec.config, "reward_threshold", None),
        render=lambda _: np.asarray(pool.render()[0]),
    )


def as_number(x: np.ndarray) -> np.ndarray:
    """Returns an array of observations as float32, or as it is where it is of bytes."""
    return x if x.dtype == np.uint8 else x.astype(np.float32)


def require_exact(obs: Any, space: spaces.Space) -> None:
    """Raises: ValueError where an observation's numbers are others in its space's whole numbers."""
    if isinstance(space, spaces.Dict):
        for key, part in space.items():
            require_exact(obs[key], part)
    elif isinstance(space, spaces.Tuple):
        for x, part in zip(obs, space, strict=True):
            require_exact(x, part)
    elif getattr(obs, "dtype", None) != space.dtype and np.issubdtype(space.dtype, np.integer):
        exact = np.array_equal(np.asarray(obs).astype(space.dtype), obs)
        if not exact:
            raise ValueError(f"an observation has numbers that {space} cannot hold")


class PlainStep(gymnasium.Wrapper):
    """An environment whose rewards are numbers and whose infos are nobody's business.

    But for `info["non-terminal done"]`, PPO-and-friends' key, which makes an end a truncation.
    """

    def __init__(self, env: gymnasium.Env, trainer: int) -> None:
        super().__init__(env)
        if os.getpid() != trainer:  # which alone heeds signals
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def reset(self, **options: Any) -> tuple[Any, dict]:
        obs, info = self.env.reset(**options)
        require_exact(obs, self.observation_space)
        others = "action_mask" in info or self.env.has_wrapper_attr("augment_observation")
        return obs, {"others": others}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if "action_mask" in info:
            raise ValueError("info has an action_mask: use ppo_icm_lstm.py")
        lasting = bool(terminated and info.get("non-terminal done", False))
        reward = np.asarray(reward).item()
        require_exact(obs, self.observation_space)
        return obs, reward, terminated and not lasting, truncated or lasting, {}


@contextmanager
def called_upon(vector: gymnasium.vector.VectorEnv) -> Iterator[None]:
    """In this block of environments' own, RuntimeError says with which exit codes they died.

    What they compute with JAX has the precision that it has elsewhere.
    """
    try:
        with jax.enable_x64(False):
            yield
    except (EOFError, ConnectionError) as error:
        workers = getattr(vector, "processes", [])
        multiprocessing.connection.wait([x.sentinel for x in workers], timeout=5)
        codes = {i: x.exitcode for i, x in enumerate(workers) if x.exitcode is not None}
        raise RuntimeError(f"environments' processes died, with exit codes {codes}") from error


def make_gymnasium(args: Args, env_seeds: list[int]) -> Environment:
    """Returns Gymnasium's environments, on the host, called in order from the compiled rollout."""
    size = len(env_seeds)
    # A fork of this process could not use JAX itself. In shared memory, floats of an image that
    # is said to be of bytes become zeros, silently
    clean = {"context": "forkserver", "shared_memory": False}
    try:
        with jax.enable_x64(False):
            vector = gymnasium.make_vec(
                args.env_id,
                num_envs=size,
                vectorization_mode=args.vectorization,
                vector_kwargs=clean if args.vectorization == "async" else {},
                wrappers=[partial(PlainStep, trainer=os.getpid())],
                **json.loads(args.env_kwargs),
            )
    except (ModuleNotFoundError, gymnasium.error.UnregisteredEnv) as error:
        raise InputError(f"--env-id {args.env_id}: {error}") from error
    space = vector.single_observation_space
    actions = vector.single_action_space
    with called_upon(vector):
        obs, info = vector.reset(seed=env_seeds)
    if info["others"].any() or "action_mask" in getattr(space, "spaces", ()):
        why = "has masks of actions, or augment_observation: use ppo_icm_lstm.py"
        raise InputError(f"--env-id {args.env_id} {why}")
    no = np.zeros(size, bool)
    first = (jax.tree.map(as_number, obs), np.zeros(size, np.float32), no, no)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)

    def host_step(action: Array) -> tuple:
        # JAX calls this in threads of its own, where it knows no float64
        action = np.asarray(action).astype(actions.dtype)
        if isinstance(actions, spaces.Box):
            action = np.clip(action, actions.low, actions.high)
        with called_upon(vector):
            obs, reward, terminated, truncated, _ = vector.step(action)
        return jax.tree.map(as_number, obs), np.float32(reward), terminated, truncated

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        action = action.reshape(size, *action.shape[2:])
        obs, *rest = io_callback(host_step, shapes, action, ordered=True)
        return env_state, split_seeds(flat(obs, space), *rest, args)

    return Environment(
        first=((), split_seeds(flat(first[0], space), *first[1:], args)),
        step=step,
        observation_space=space,
        action_space=actions,
        threshold=vector.spec.reward_threshold,
        render=lambda _: np.asarray(vector.render()[0]),
    )


class Task(NamedTuple):  # one environment in JAX, as pure functions
    reset: Callable  # key to (obs, state)
    step: Callable  # (key, state, action) to (obs, state, reward, terminated, truncated, info)
    observation_space: spaces.Space
    action_space: spaces.Space
    threshold: float | None = None  # mean return from which the environment counts as solved
    render: Callable | None = None  # state to a frame [height, width, 3]


def gymnax_task(env: Any, params: Any) -> Task:
    """Returns an environment with the interface of gymnax 1.0 or later."""

    def step(key: Array, state: Any, action: Array) -> tuple:
        obs, state, reward, terminated, info = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, env.is_truncated(state, params), info

    convert = importlib.import_module("gymnax.environments.spaces").gymnax_space_to_gym_space
    return Task(
        reset=partial(env.reset_env, params=params),
        step=step,
        observation_space=convert(env.observation_space(params)),
        action_space=convert(env.action_space(params)),
    )


def brax_task(env: Any, episode_length: int, frame: Callable) -> Task:
    """Returns an environment with Brax's interface, truncated after episode_length steps.

    Args:
        frame: the environment's state to what its method `render` takes.
    """

    def policy_obs(state: Any) -> Array:  # MuJoCo Playground may have several
        return state.obs["state"] if isinstance(state.obs, dict) else state.obs

    def reset(key: Array) -> tuple:
        state = env.reset(key)
        return policy_obs(state), (state, jnp.int32(0))

    def step(key: Array, state: tuple, action: Array) -> tuple:
        inner, time = env.step(state[0], action), state[1] + 1
        truncated = time >= episode_length
        return policy_obs(inner), (inner, time), inner.reward, inner.done > 0, truncated, {}

    obs, _ = jax.eval_shape(reset, jax.random.PRNGKey(0))
    return Task(
        reset=reset,
        step=step,
        observation_space=spaces.Box(-np.inf, np.inf, obs.shape),
        action_space=spaces.Box(-1.0, 1.0, (env.action_size,)),
        render=lambda state: env.render([frame(state[0])])[0],
    )


def open_gymnax(name: str, kwargs: dict) -> Task:
    """Returns gymnax's environment of that name; kwargs change its parameters."""
    gymnax = importlib.import_module("gymnax")
    require_known(f"gymnax/{name}", [f"gymnax/{x}" for x in gymnax.registered_envs])
    env, params = gymnax.make(name)
    return gymnax_task(env, params.replace(**kwargs))


def open_brax(name: str, kwargs: dict) -> Task:
    """Returns Brax's bare environment: its wrappers throw the true last observation away."""
    envs = importlib.import_module("brax.envs")
    require_known(f"brax/{name}", [f"brax/{x}" for x in envs._envs])
    episode_length = kwargs.pop("episode_length", 1000)
    env = envs.get_environment(name, **kwargs)
    return brax_task(env, episode_length, lambda state: state.pipeline_state)


def open_own(name: str, kwargs: dict) -> Any:
    """Returns what a user's factory, "module:function", makes: a Task's like, or gymnax's."""
    module, _, function = name.partition(":")
    factory = getattr(importlib.import_module(module), function, None)
    if factory is None:
        raise InputError(f"--env-id jax:{name}: {module} has no function {function or 'named'}")
    env = factory(**kwargs)
    if hasattr(env, "step_env"):
        return gymnax_task(env, env.default_params)
    own = {name: getattr(env, name) for name in Task._fields if hasattr(env, name)}
    return Task(**own)


NATIVE = {  # by the beginning of --env-id
    "gymnax/": open_gymnax,
    "brax/": open_brax,
    "jax:": open_own,
}


class NativeState(NamedTuple):  # of environments in JAX, leaves [S, N, ...]
    key: Array
    task: Any
    over: Array  # bool, whether the episode has ended and the next step resets


def over_envs(function: Callable) -> Callable:
    """Returns a function of one environment as one of all, [S, N, ...]."""
    return jax.vmap(jax.vmap(function))


def open_task(args: Args) -> Task:
    """Returns the environment in JAX of --env-id. Raises: InputError where it is not sound.

    Its reset's state has the dtypes that a step returns, where these hold more.
    """
    prefix = next(x for x in NATIVE if args.env_id.startswith(x))
    try:
        task = NATIVE[prefix](args.env_id.removeprefix(prefix), json.loads(args.env_kwargs))
    except ModuleNotFoundError as error:
        raise InputError(f"--env-id {args.env_id}: {error}: pip install it") from error
    action = jnp.zeros(task.action_space.shape, action_dtype(task.action_space))
    task = task._replace(step=partial(uninformed_step, step=task.step))
    while True:
        obs, state = jax.eval_shape(task.reset, jax.random.PRNGKey(0))
        space = task.observation_space
        if isinstance(space, spaces.Box) and getattr(obs, "shape", None) != space.shape:
            shown = f"an observation is {obs}, and its space is {space}"
            raise InputError(f"--env-id {args.env_id}: {shown}")
        stepped = jax.eval_shape(task.step, jax.random.PRNGKey(0), state, action)
        shapes = [jax.tree.map(np.shape, x) for x in ((obs, state), stepped[:2])]
        if shapes[0] != shapes[1]:
            where = f"--env-id {args.env_id}: a step returns shapes {shapes[1]}"
            raise InputError(f"{where}, but reset {shapes[0]}")
        if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)):
            keep = "keep jax.random.key_data of it"
            raise InputError(f"--env-id {args.env_id}: its state has a typed key: {keep}")
        wide = jax.tree.map(lambda x, y: jnp.promote_types(x.dtype, y.dtype), state, stepped[1])
        if wide == jax.tree.map(lambda x: x.dtype, state):
            return task
        task = task._replace(reset=partial(widened_reset, reset=task.reset, dtypes=wide))


def uninformed_step(key: Array, state: Any, action: Array, step: Callable) -> tuple:
    """Returns what a step does, without its info, which may be of any kind."""
    return (*step(key, state, action)[:5], {})


def widened_reset(key: Array, reset: Callable, dtypes: Any) -> tuple:
    """Returns (obs, state) of a reset, the state in these dtypes."""
    obs, state = reset(key)
    return obs, jax.tree.map(jnp.asarray, state, dtypes)


def action_dtype(space: spaces.Space) -> np.dtype:
    """Returns the dtype of a space's actions, at most 32 bits wide but beside environments."""
    return jax.dtypes.canonicalize_dtype(space.dtype)


def make_native(args: Args, env_seeds: list[int]) -> Environment:
    """Returns environments in JAX: pure functions, to be compiled into the training loop."""
    task = open_task(args)
    keys = over_envs(jax.random.PRNGKey)(np.uint32(env_seeds).reshape(len(args.members), -1))
    keys, reset_keys = jnp.moveaxis(over_envs(jax.random.split)(keys), 2, 0)
    obs, state = jax.jit(over_envs(task.reset))(reset_keys)
    no = jnp.zeros(keys.shape[:2], bool)
    reward = jnp.zeros(keys.shape[:2], jnp.float32)
    return Environment(
        first=(
            NativeState(keys, state, no),
            TimeStep(flat(obs, task.observation_space), reward, no, no),
        ),
        step=partial(step_tasks, task=task),
        observation_space=task.observation_space,
        action_space=task.action_space,
        threshold=task.threshold,
        render=task.render and partial(render_first, task=task),
    )


def render_first(env_state: NativeState, task: Task) -> np.ndarray:
    """Returns a frame of the first environment in JAX."""
    return task.render(jax.tree.map(lambda x: x[0, 0], env_state.task))


def step_tasks(env_state: NativeState, action: Array, task: Task) -> tuple[NativeState, TimeStep]:
    """Returns environments in JAX after a step, which resets those whose episode is over.

    As all others are; their libraries' own resets hide the true last observation.
    """
    over = env_state.over
    keys = over_envs(partial(jax.random.split, num=3))(env_state.key)
    keys, step_keys, reset_keys = jnp.moveaxis(keys, 2, 0)
    stepped = over_envs(task.step)(step_keys, env_state.task, action)
    obs, state, *rest, _ = stepped
    reward, terminated, truncated = (x.reshape(over.shape) for x in rest)
    numbers = partial(flat, space=task.observation_space)

    def choose(fresh: Array, old: Array) -> Array:
        return jnp.where(over.reshape(*over.shape, *(1,) * (old.ndim - 2)), fresh, old)

    def reset(old: tuple) -> tuple:
        obs, state = over_envs(task.reset)(reset_keys)
        return jax.tree.map(choose, (numbers(obs), state), old)

    state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, env_state.task)
    obs, state = jax.lax.cond(jnp.any(over), reset, lambda old: old, (numbers(obs), state))
    terminated = (terminated > 0) & ~over
    truncated = (truncated > 0) & ~over & ~terminated
    reward = jnp.where(over, 0, reward).astype(jnp.float32)
    env_state = NativeState(keys, state, over=terminated | truncated)
    return env_state, TimeStep(obs, reward, terminated, truncated)


def env_action(action: Array, space: spaces.Box, args: Args) -> Array:
    """Returns what the environment gets for a policy's actions [..., U]: [..., *space.shape].

    It is in the space's dtype, and inside of its bounds in that dtype.
    """
    action = action.reshape(*action.shape[:-1], *space.shape)
    if np.issubdtype(space.dtype, np.integer):
        action = jnp.rint(action)
    return jnp.clip(action, space.low, space.high).astype(action_dtype(space))


# --- Rollout ---
class RunnerState(NamedTuple):  # the carry of the rollout, leaves [S, N, ...]
    env_state: Any
    time_step: TimeStep
    episodic_return: Array
    episodic_length: Array
    discounted_return: Array


def first_runner(run: "Run") -> RunnerState:
    """Returns the runner before the first step."""
    env_state, time_step = run.env.first
    zeros = jnp.zeros(time_step.reward.shape, jnp.float32)
    return RunnerState(env_state, time_step, zeros, zeros, zeros)


def env_step(
    runner: RunnerState,
    noise: Array,
    learner: LearnerState,
    env: Environment,
    network: nn.Module,
    args: Args,
) -> tuple[RunnerState, Transition]:
    """Returns the runner and the transition, leaves [S, N, ...], after a step of environments.

    Args:
        noise: for sample_action, [S, N, U].
        learner: leaves [S, ...].
    """
    last = runner.time_step
    obs = jax.vmap(partial(normalize, bound=args.clip_obs))(last.obs, learner.obs_stats)
    policy, _ = jax.vmap(network.apply)(learner.params, obs)
    action = sample_action(policy, noise)
    env_state, new = env.step(runner.env_state, env_action(action, env.action_space, args))

    # After an episode's end the environment has only reset itself
    mask = 1 - (last.terminated | last.truncated).astype(jnp.float32)
    gamma = learner.schedule.gamma[:, None]
    runner = RunnerState(
        env_state=env_state,
        time_step=new,
        episodic_return=(runner.episodic_return + new.reward) * mask,
        episodic_length=(runner.episodic_length + 1) * mask,
        discounted_return=(gamma * runner.discounted_return + new.reward) * mask,
    )
    transition = Transition(
        obs=last.obs,
        action=action,
        reward=new.reward,
        terminated=new.terminated.astype(jnp.float32),
        done=(new.terminated | new.truncated).astype(jnp.float32),
        mask=mask,
        episodic_return=runner.episodic_return,
        episodic_length=runner.episodic_length,
        discounted_return=runner.discounted_return,
    )
    return runner, transition


def rollout(
    runner: RunnerState,
    learner: LearnerState,
    first_env: Array | int,
    env: Environment,
    network: nn.Module,
    args: Args,
) -> tuple[RunnerState, Transition]:
    """Returns the runner and the transitions [S, T, N, ...] of T steps of environments.

    Observations are [S, T + 1, N, ...]: the last are those that the rollout ended on.

    Args:
        first_env: of a seed's num_envs environments, which one the runner's begin with. Noise is
            the same for an environment, however many processes or devices share them out.
    """
    envs = runner.time_step.reward.shape[1]

    def draw(key: Array) -> Array:
        noise = draw_noise(key, (args.num_steps, args.num_envs), env.action_space)
        if args.mode == "eval" and args.deterministic:
            noise = jnp.zeros_like(noise)
        return jax.lax.dynamic_slice_in_dim(noise, first_env, envs, axis=1)

    # Even numbers are folded in for rollouts, odd ones for updates
    keys = jax.vmap(jax.random.fold_in)(learner.key, 2 * learner.iteration)
    noise = jax.vmap(draw, out_axes=1)(keys)  # [T, S, N, U]
    step = partial(env_step, learner=learner, env=env, network=network, args=args)
    runner, transition = jax.lax.scan(step, runner, noise)
    obs = jnp.concatenate([transition.obs, runner.time_step.obs[None]])
    by_seed = partial(jnp.swapaxes, axis1=0, axis2=1)
    return runner, jax.tree.map(by_seed, transition._replace(obs=obs))


# --- Run ---
ROWS_PER_CORE = 100  # of a minibatch; for fewer, another core costs more than it saves
ROWS_PER_ACCELERATOR = 8192  # the same for GPUs and TPUs: a guess, never measured
BY_SEED = PartitionSpec("seed")
BY_ENV = PartitionSpec("seed", "process")
ROLLOUT = PartitionSpec("seed", None, "process")


def largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most `most`."""
    return max(d for d in range(1, max(most, 1) + 1) if number % d == 0)


def make_mesh(args: Args) -> Mesh:
    """Sets JAX up and returns the devices of updates: [shares of a minibatch, seeds].

    On a CPU the cores are as many devices. Those that seeds leave idle share minibatches, as do
    P processes, each with one device.
    """
    for name in ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit"):
        if getattr(jax.config, name):  # what is unknown yet is NaN or infinite
            raise InputError(f"{name.upper()} is set, with which nothing trains here: unset it")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    jax.config.update("jax_transfer_guard", "allow")
    cache = jax.config.jax_compilation_cache_dir or os.path.expanduser("~/.cache/ppo_jax")
    if os.path.isabs(cache):  # a "~" stays where there is no home
        jax.config.update("jax_compilation_cache_dir", cache)
    if args.platform != "auto":  # environments of other libraries are on the CPU
        platforms = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
        jax.config.update("jax_platforms", platforms[args.platform])
    if args.distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise InputError(f"--distributed: start it with mpirun or srun ({error})") from error
        processes = jax.process_count()
        if args.num_envs % processes or args.minibatch_size % processes:
            raise InputError(f"{processes} processes do not divide --num-envs and minibatches")
        devices = np.reshape(jax.devices(), (processes, -1))
        return Mesh(devices[:, :1], ("process", "seed"))
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise InputError(f"--platform {args.platform}: {error}") from error
    rows = ROWS_PER_CORE if devices[0].platform == "cpu" else ROWS_PER_ACCELERATOR
    seeds = largest_divisor(len(args.members), len(devices))
    idle = min(len(devices) // seeds, args.minibatch_size // rows)
    shares = largest_divisor(math.gcd(args.num_envs, args.minibatch_size), idle)
    return Mesh(np.reshape(devices[: shares * seeds], (shares, seeds)), ("process", "seed"))


# Training
def first_params(
    key: Array, init_key: Array, obs_size: int, rate: Array | float, network: nn.Module, args: Args
) -> Any:
    """Returns parameters whose policy has learnt the first Gaussian, on standard normal states."""

    def states(key: Array) -> Array:
        return jax.random.normal(key, (256, obs_size), jnp.float32)

    def loss(params: Any, key: Array) -> Array:
        policy, _ = network.apply({"params": params}, states(key))
        error = jnp.mean(jnp.square(policy.mean - goal.mean))
        error += jnp.mean(jnp.square(jnp.exp(policy.log_std) - jnp.exp(goal.log_std)))
        if policy.skew is not None:
            error += jnp.mean(jnp.square(policy.skew))
        return error

    def step(carry: tuple[Any, optax.OptState], key: Array) -> tuple[tuple, None]:
        params, state = carry
        direction, state = adam.update(jax.grad(loss)(params, key), state)
        return (jax.tree.map(lambda p, d: p - rate * d, params, direction), state), None

    params = network.init(init_key, states(init_key))["params"]
    goal, _ = network.apply({"params": params}, states(init_key))  # as warm is 0
    adam = optax.scale_by_adam()
    start = params | {"warm": jnp.float32(1)}
    keys = jax.random.split(key, args.init_updates)
    (fitted, _), _ = jax.lax.scan(step, (start, adam.init(start)), keys)
    return fitted | {"warm": jnp.float32(0), "critic": params["critic"]}


def init_learner(
    seed: Array, shown: TimeStep, network: nn.Module, args: Args, **varied: Array
) -> LearnerState:
    """Returns a member's new learner, for environments that show what `shown` is like, [...].

    Args:
        varied: the settings in which a grid's members differ.
    """
    obs_size = len(shown.obs)
    key, init_key, run_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    given = dict(args) | varied
    rate = given["learning_rate"]
    params = first_params(key, init_key, obs_size, rate, network, args)
    action_size = math.prod(network.space.shape)
    adam = optax.scale_by_adam()

    def zeros(*shape: int) -> Array:
        return jnp.zeros((args.history_size, args.rollout_size, *shape), jnp.float32)

    history = Batch(
        obs=zeros(obs_size),
        time=zeros(),
        action=zeros(action_size),
        advantage=zeros(),
        target=zeros(),
        mean=zeros(action_size),
        log_prob=zeros(),
    )
    training = Training(
        adam={part: adam.init(own) for part, own in params.items() if part != "warm"},
        history=history,
        counts=jnp.zeros(args.history_size, jnp.float32),
    )
    none = jnp.zeros(obs_size, jnp.float32)
    return LearnerState(
        params={"params": params},
        opt_state=training,
        obs_stats=Scaler(mean_square=none, scale=none + 1, count=jnp.float32(0)),
        schedule=Schedule(*(jnp.float32(given[name]) for name in Schedule._fields)),
        key=run_key,
        iteration=jnp.int32(0),
        episodes=jnp.int32(0),
        returns=jnp.full(100, -jnp.inf, jnp.float32),
    )


class Run(NamedTuple):  # everything that acts
    args: Args
    env: Environment
    network: nn.Module
    init: Callable  # () to new learners, one per seed, each as a lone run's: [S, ...]
    act: Callable  # (runner, learner) to the runner and transitions, all on the host


def make_run(args: Args, *more: int) -> Run:
    """Returns environments, networks and the rollout; `more` makes environments' seeds others.

    Environments in JAX are all of them, others are this process's share.
    """
    share = args.num_envs if args.native else args.num_envs // jax.process_count()
    first_env = 0 if args.native else jax.process_index() * share
    drawn = [
        np.random.SeedSequence([x["seed"], *more]).generate_state(args.num_envs)
        for x in args.members
    ]
    env_seeds = np.array(drawn)[:, first_env : first_env + share] >> 1
    with beside_environments(args):
        env = make_env(args, env_seeds.ravel().tolist())
    network = ActorCritic(env.action_space, args)
    shown = jax.tree.map(lambda x: x[0, 0], env.first[1])
    init_one = partial(init_learner, shown=shown, network=network, args=args)
    step = jax.jit(partial(rollout, first_env=first_env, env=env, network=network, args=args))

    def init() -> LearnerState:
        # One by one: jaxlib 0.10 can lock up where two batches of matrices are decomposed at once
        members = jax.tree.map(lambda *x: jnp.array(x), *args.members)
        return jax.lax.map(lambda member: init_one(**member), members)

    def act(runner: RunnerState, learner: LearnerState) -> tuple[RunnerState, Transition]:
        learner = jax.device_get(learner._replace(opt_state=None))
        with beside_environments(args):
            runner, transition = step(runner, learner)
        return runner, jax.device_get(transition)

    return Run(args, env, network, jax.jit(init), act)


def update_seeds(
    learner: LearnerState, transition: Transition, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns learners [S, ...] after an update, and metrics [S, ...].

    A lone seed goes without vmap, under which gradients come transposed: on a CPU that costs it
    a sixth of an update.
    """
    update_one = partial(update, network=network, args=args)
    if len(learner.iteration) > 1:
        return jax.vmap(update_one)(learner, transition)
    found = update_one(*jax.tree.map(lambda x: x[0], (learner, transition)))
    return jax.tree.map(lambda x: x[None], found)


def make_advance(run: Run, mesh: Mesh) -> Callable:
    """Returns (learner, runner, count) to these after `count` iterations, and metrics.

    Learners and metrics are on the mesh, and so are runners of environments in JAX, whose
    iterations are compiled as one loop. Others are on the host, as are their rollouts. Metrics are
    the last iteration's, but for flags: the number of the first one in which they were up, or 0.
    """
    # From here on it says whether devices share rows, processes or cores of this one
    args = run.args.model_copy(update={"distributed": mesh.shape["process"] > 1})
    on_mesh = partial(jax.shard_map, mesh=mesh, check_vma=False)
    learn = on_mesh(
        partial(update_seeds, network=run.network, args=args),
        in_specs=(BY_SEED, ROLLOUT),
        out_specs=(BY_SEED, BY_SEED),
    )
    learn = jax.jit(learn, donate_argnums=0)

    def act_on_mesh(runner: RunnerState, learner: LearnerState) -> tuple:
        first_env = jax.lax.axis_index("process") * runner.time_step.reward.shape[1]
        return rollout(runner, learner, first_env, run.env, run.network, args)

    def act_on_host(runner: RunnerState, learner: LearnerState) -> tuple:
        runner, transition = run.act(runner, learner)
        return runner, multihost_utils.host_local_array_to_global_array(transition, mesh, ROLLOUT)

    act_on_mesh = on_mesh(act_on_mesh, in_specs=(BY_ENV, BY_SEED), out_specs=(BY_ENV, ROLLOUT))
    act = act_on_mesh if args.native else act_on_host

    def iterate(learner: LearnerState, runner: RunnerState, before: dict) -> tuple:
        runner, transition = act(runner, learner)
        learner, metrics = learn(learner, transition)
        for name in before:
            if name.startswith("bad/"):
                metrics[name] = jnp.where(before[name] > 0, before[name], metrics[name])
        return learner, runner, metrics

    def advance(learner: LearnerState, runner: RunnerState, count: int) -> tuple:
        metrics = {}
        for _ in range(count):
            learner, runner, metrics = iterate(learner, runner, metrics)
        return learner, runner, metrics

    def advance_native(learner: LearnerState, runner: RunnerState, count: int) -> tuple:
        _, _, metrics = jax.eval_shape(iterate, learner, runner, {})
        metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
        state = learner, runner, metrics
        return jax.lax.fori_loop(0, count, lambda _, state: iterate(*state), state)

    return jax.jit(advance_native, donate_argnums=(0, 1)) if args.native else advance


def require_finite(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns metrics without flags. Raises: FloatingPointError at the first flag that was up."""
    flags = {name: x for name, x in metrics.items() if name.startswith("bad/")}
    up = [(number, name[6:]) for name, x in sorted(flags.items()) for number in x if number]
    if up:
        number, name = min(up, key=lambda x: x[0])
        raise FloatingPointError(f"iteration {number}: {name} is not finite")
    return {name: x for name, x in metrics.items() if name not in flags}


def catch_signals() -> list[int]:
    """Returns a list to which SIGINT or SIGTERM will be added; a second one ends the process.

    A thread of its own waits for them, as this one may be in a rollout that hangs.
    """
    received = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        received.append(os.read(reader, 1)[0])
        os._exit(128 + os.read(reader, 1)[0])

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # left to the thread
    signal.set_wakeup_fd(writer)
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))  # of environments
    threading.Thread(target=wait, daemon=True).start()
    return received


def train(args: Args) -> int:
    """Trains to the end, from the newest checkpoint if there is one; returns the exit code."""
    before = time.perf_counter()
    mesh = make_mesh(args)
    signals = catch_signals()  # jax.distributed has a handler of its own
    chief = jax.process_index() == 0
    run = make_run(args)
    if args.track and importlib.util.find_spec("wandb") is None:
        raise InputError("--track: pip install wandb")
    if args.stop_when_solved and run.env.threshold is None:
        raise InputError(f"--stop-when-solved: --env-id {args.env_id} has no threshold")
    lock = claim_folder(args) if chief else None
    multihost_utils.sync_global_devices("run folder")
    runner = first_runner(run)
    kept = jax.device_get(runner) if args.native else None
    unsolved = np.zeros(len(args.members), int)
    state = Checkpoint(jax.device_get(run.init()), kept, np.zeros(3), -math.inf, unsolved)
    state = newest_checkpoint(args.folder, state) or state
    first = iteration = int(state.learner.iteration[0])
    multihost_utils.assert_equal(iteration, "processes see different run folders: share --run-dir")
    if is_finished(args, state, iteration):
        print(f"{args.folder} is finished: raise --total-timesteps, or --clobber")
        return 0

    advance = make_advance(run, mesh)
    learner = jax.device_put(state.learner, NamedSharding(mesh, BY_SEED))
    if args.native:
        runner = jax.device_put(state.runner, NamedSharding(mesh, BY_ENV))
    writers = []
    if chief:
        settings = args.model_dump_json(indent=2)
        write_atomically(args.folder / "args.json", settings.encode())
        writers = open_logs(args, iteration)
    stop = 0
    with progress_bar(args, iteration, chief) as bar:
        while not (stop or is_finished(args, state, iteration)):
            count = min(args.log_interval, args.num_iterations - iteration)
            learner, runner, metrics = advance(learner, runner, count)
            metrics = require_finite(jax.device_get(metrics))
            now = time.perf_counter()
            steps = len(args.members) * count * args.rollout_size
            spent = [0, now - before, steps] if iteration > first else [now - before, 0, 0]
            state = state._replace(timing=state.timing + spent)
            metrics["charts/SPS"] = np.full(len(args.members), steps / (now - before))
            before = now
            iteration += count
            log(writers, metrics, iteration, args)
            mean_return = metrics["charts/episodic_return_100"].mean()
            if np.isnan(mean_return) and 0 <= iteration - first - 20 < count:
                note("no episode has ended in 20 rollouts: returns are unknown")
            bar.set_postfix_str(f"return {mean_return:.1f}", refresh=False)
            bar.update(count * args.rollout_size)
            state = note_solved(state, metrics, iteration, run)

            stop = multihost_utils.process_allgather(np.array(max(signals, default=0))).max()
            due = iteration % args.checkpoint_interval < count
            if due or stop or is_finished(args, state, iteration):
                kept = learner, runner if args.native else None
                kept = multihost_utils.process_allgather(kept, tiled=True)
                state = state._replace(learner=kept[0], runner=kept[1])
                if chief:
                    state = save(args, state, writers)
    del lock  # held until here
    return 128 + int(stop) if stop else 0


# Run folder
FREE = {  # settings that may differ when a run goes on; a new length also stretches annealing
    *("run_dir", "total_timesteps", "clobber", "checkpoint_interval", "keep_best", "use_best"),
    *("log_interval", "mode", "deterministic", "eval_episodes", "eval_steps", "video", "render"),
    *("stop_when_solved", "track"),
    *("platform", "distributed", "vectorization"),
}


def read_args(folder: Path) -> Args:
    """Returns the settings of a run folder. Raises: InputError."""
    try:
        return Args.model_validate_json((folder / "args.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no run of this script: {error}") from error


def refuse_differences(args: Args, before: Args) -> None:
    """Raises InputError where settings differ from those that a run was begun with."""
    differ = [
        f"--{name.replace('_', '-')} {value} (there: {getattr(before, name)})"
        for name, value in args
        if value != getattr(before, name) and name not in FREE
    ]
    if differ:
        raise InputError(
            f"{args.folder} holds a run with other settings: {', '.join(differ)}; choose another"
            " --exp-name or --run-dir, or start afresh with --clobber"
        )


def claim_folder(args: Args) -> IO:
    """Returns the locked file of a run folder, which begins or goes on with these settings.

    Raises: InputError where another process trains in it, or its run has other settings.
    """
    folder = args.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"--run-dir: {error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
    except BlockingIOError as error:
        raise InputError(f"{folder} is being trained in by another process") from error
    script = Path(__file__)
    copy = folder / script.name
    if not (folder / "args.json").exists():
        write_atomically(copy, script.read_bytes())
    elif args.clobber:
        folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
        return claim_folder(args)
    else:
        refuse_differences(args, read_args(folder))
        if not copy.exists() or copy.read_text() != script.read_text():
            note(f"this script differs from {copy}, with which the run was begun")
    return lock


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file such that it is either whole or not there."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{os.getpid()}.tmp")  # the next one overwrites it
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# Checkpoints
class Checkpoint(NamedTuple):  # all that a run goes on from
    learner: LearnerState  # [S, ...]
    runner: RunnerState | None  # of environments in JAX; others begin new episodes
    timing: Array  # seconds of first iterations, which compile, and of others; steps of these
    best: float  # the highest mean return over 100 episodes that a checkpoint has had
    solved_at: Array | None = None  # [S], the steps after which a member was solved, 0: it is not


def write_checkpoint(path: Path, state: Checkpoint) -> None:
    """Writes a file of arrays, named by their place; a zip file has a checksum of each."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    content = io.BytesIO()
    np.savez(content, **{jax.tree_util.keystr(place): np.asarray(x) for place, x in leaves})
    write_atomically(path, content.getvalue())


def read_checkpoint(path: Path, like: Checkpoint) -> Checkpoint:
    """Returns a file's arrays in the structure of `like`. Raises: an error if a byte changed."""
    places, structure = jax.tree_util.tree_flatten_with_path(like)
    with np.load(path) as file:
        leaves = [file[jax.tree_util.keystr(place)] for place, _ in places]
    if [x.shape for x in leaves] != [np.shape(x) for _, x in places]:
        raise ValueError("its arrays have other shapes")
    return jax.tree.unflatten(structure, leaves)


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run folder, the newest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*.npz"), reverse=True)


def newest_checkpoint(folder: Path, like: Checkpoint) -> Checkpoint | None:
    """Returns the newest checkpoint that is whole. Raises: InputError where none of some is."""
    for path in checkpoints(folder):
        try:
            return read_checkpoint(path, like)
        except Exception as error:  # zipfile and NumPy raise many kinds
            note(f"{path} is damaged, or another script's ({error}): trying the one before")
    if checkpoints(folder):
        raise InputError(f"{folder} has no checkpoint for this: restore a backup, or --clobber")
    return None


def note_solved(state: Checkpoint, metrics: dict, iteration: int, run: Run) -> Checkpoint:
    """Returns the state with the steps after which the last 100 episodes pass the threshold."""
    if run.env.threshold is None:
        return state
    passed = metrics["charts/episodic_return_100"] >= run.env.threshold
    new = passed & (metrics["charts/episodes"] >= 100) & (state.solved_at == 0)
    steps = iteration * run.args.rollout_size
    for i in np.flatnonzero(new):
        member = member_name(run.args.members[i])
        note(f"{member}: the last 100 episodes earned {run.env.threshold:g} after {steps} steps")
    return state._replace(solved_at=np.where(new, steps, state.solved_at))


def is_finished(args: Args, state: Checkpoint, iteration: int) -> bool:
    """Returns whether a run has trained for as long as its settings say."""
    solved = args.stop_when_solved and state.solved_at.all()
    return bool(solved) or iteration >= args.num_iterations


def save(args: Args, state: Checkpoint, writers: list[EventFileWriter]) -> Checkpoint:
    """Writes a checkpoint, result.json and logs, keeps the checkpoint before; returns the state."""
    folder = args.folder
    iteration = int(state.learner.iteration[0])
    known = [x[x > -np.inf] for x in state.learner.returns]
    returns = [float(x.mean()) if len(x) else None for x in known]
    if None not in returns and np.mean(returns) > state.best:  # of several seeds the mean
        state = state._replace(best=np.mean(returns))
        if args.keep_best:
            write_checkpoint(folder / "checkpoints/best.npz", state)
    write_checkpoint(folder / f"checkpoints/{iteration:010}.npz", state)
    for old in checkpoints(folder)[2:]:
        old.unlink()
    for writer in writers:
        writer.flush()
    starting, running, steps = state.timing.tolist()
    result = {
        "script": Path(__file__).name,
        "env_id": args.env_id,
        "args": json.loads(args.model_dump_json()),
        "seeds": [x["seed"] for x in args.members],
        "members": args.members,
        "finished": is_finished(args, state, iteration),
        "timesteps": iteration * args.rollout_size,
        "episodes": state.learner.episodes.tolist(),
        "episodic_return": returns,
        "solved_at": [int(x) or None for x in state.solved_at],
        "eval_return": None,
        "wall_time": starting + running,
        "compile_time": starting,
        "sps": steps / running if running else None,
        "versions": {x.__name__: x.__version__ for x in (jax, flax, optax, envpool, gymnasium)},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=2).encode())
    return state


# Logs
def open_logs(args: Args, iteration: int) -> list[EventFileWriter]:
    """Returns a TensorBoard file per seed, with the settings for the HParams tab.

    What a run's earlier files have after this iteration is void.
    """
    step = iteration * args.rollout_size
    settings = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in args}
    if args.track:
        follow_logs(args, settings)
    writers = []
    for member in args.members:
        folder = args.folder / member_name(member) if len(args.members) > 1 else args.folder
        # Not the imported class: --track replaces the module's by one that it can follow
        writer = event_file_writer.EventFileWriter(str(folder), flush_secs=10)
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        add_summary(writer, step, hparams_pb(settings | member, str(folder)))
        writers.append(writer)
    return writers


def follow_logs(args: Args, settings: dict[str, Any]) -> None:
    """Has Weights & Biases copy what TensorBoard's files get from here on. Raises: InputError."""
    wandb = importlib.import_module("wandb")
    wandb.tensorboard.patch(root_logdir=str(args.folder))
    name = f"{args.env_id} {args.exp_name}"
    try:
        wandb.init(name=name, config=settings, dir=args.folder, resume="auto")
    except wandb.Error as error:  # as where nobody has logged in
        raise InputError(f"--track: {error}") from error


def add_summary(writer: EventFileWriter, step: int, summary: Summary) -> None:
    """Writes to a TensorBoard file."""
    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def log(writers: list[EventFileWriter], metrics: dict, iteration: int, args: Args) -> None:
    """Writes an iteration's metrics: [S], and every tenth time, for histograms, [S, K, ...]."""
    step = iteration * args.rollout_size
    histograms = iteration % (10 * args.log_interval) < args.log_interval
    for seed, writer in enumerate(writers):
        values = []
        for name, x in metrics.items():
            if x.ndim == 1 and np.isfinite(x[seed]):
                values.append(Summary.Value(tag=name, simple_value=x[seed]))
            elif x.ndim > 1 and histograms:
                add_summary(writer, step, histogram_pb(name, x[seed]))
        add_summary(writer, step, Summary(value=values))


def progress_bar(args: Args, iteration: int, visible: bool) -> tqdm:
    """Returns a live line in a terminal; elsewhere it prints plain lines, every ten seconds."""
    line = "{n_fmt} of {total_fmt} steps, {rate_fmt}, {remaining} left{postfix}\n"
    return tqdm(
        disable=not visible,
        initial=iteration * args.rollout_size,
        total=args.num_iterations * args.rollout_size,
        unit="step",
        unit_scale=len(args.members),
        **({} if sys.stderr.isatty() else {"mininterval": 10, "bar_format": line}),
    )


# Evaluation
def read_learner(args: Args, run: Run, best: bool) -> LearnerState:
    """Returns the newest or best learner [S, ...] of a run folder. Raises: InputError."""
    learner = jax.eval_shape(run.init)._replace(opt_state=None)  # of which nothing acts
    like = Checkpoint(learner, None, np.zeros(3), 0.0)
    path = args.folder / "checkpoints/best.npz"
    if best and not path.exists():
        raise InputError(f"{args.folder} has no best checkpoint: train with --keep-best")
    found = read_checkpoint(path, like) if best else newest_checkpoint(args.folder, like)
    if found is None:
        raise InputError(f"{args.folder} has no checkpoint yet: wait for the first, or train on")
    return found.learner


def find_member(args: Args, wanted: dict[str, float]) -> int:
    """Returns the number of the first run with this seed and settings. Raises: InputError."""
    found = [i for i, x in enumerate(args.members) if wanted.items() <= x.items()]
    if not found:
        raise InputError(f"{args.folder} has no {wanted}, but {args.members}")
    return found[0]


def load(run_folder: str | Path, *, best: bool = False, **member: float) -> Callable:
    """Returns the trained policy of a run folder: `action = policy(obs)`.

    Takes one observation, as the environment gives it, or a batch of them, and returns as many
    actions: the most likely ones, or samples, with deterministic=False. The environment is
    opened, for its spaces.

    Args:
        best: whether that of the best checkpoint (--keep-best) is wanted, not the last one's.
        member: of several runs, which one: seed=2, gamma=0.99; the first that has these.

    Raises: InputError, a ValueError, where the folder holds no run of this script.
    """
    folder = Path(run_folder).resolve()
    args = read_args(folder).model_copy(update={"run_dir": str(folder), "vectorization": "sync"})
    index = find_member(args, member)
    run = make_run(args.model_copy(update={"num_envs": 1}))
    learner = jax.tree.map(lambda x: x[index], read_learner(args, run, best))
    space = run.env.action_space
    random = np.random.default_rng()

    @partial(jax.jit, static_argnames="deterministic")
    def act(obs: Array, key: Array, deterministic: bool) -> Array:
        obs = normalize(obs, learner.obs_stats, args.clip_obs)
        policy, value = run.network.apply(learner.params, obs)
        noise = draw_noise(key, value.shape, space) * (not deterministic)
        return env_action(sample_action(policy, noise), space, args)

    def policy(obs: Any, deterministic: bool = True) -> np.ndarray:
        with beside_environments(args):
            key = jax.random.PRNGKey(random.integers(2**31))
            numbers = flat(obs, run.env.observation_space)
            if not all_finite(numbers):
                raise InputError("an observation is not finite, or not of its space")
            return np.asarray(act(numbers, key, deterministic))

    return policy


def play(run: Run, learner: LearnerState) -> list[list[float]]:
    """Returns the returns of eval_episodes episodes for each seed.

    Every environment plays as many, so that short episodes weigh no more than long ones; one whose
    episode does not end plays no further one.
    """
    args = run.args
    returns = [[] for _ in args.members]
    left = np.full((len(args.members), args.num_envs), args.eval_episodes // args.num_envs)
    runner = first_runner(run)
    while left.any():
        runner, transition = run.act(runner, learner)
        learner = learner._replace(iteration=learner.iteration + 1)  # of other noise
        ended = transition.done * transition.mask > 0
        for seed, step, env in np.argwhere(ended):
            if left[seed, env]:
                left[seed, env] -= 1
                returns[seed].append(float(transition.episodic_return[seed, step, env]))
        endless = (transition.episodic_length[:, -1] >= args.eval_steps) & ~ended[:, -1]
        for seed, env in np.argwhere(endless & (left > 0)):
            left[seed, env] = 0
            returns[seed].append(float(transition.episodic_return[seed, -1, env]))
            note(f"an episode has not ended after --eval-steps {args.eval_steps}: it counts so far")
    return returns


def evaluate(args: Args) -> int:
    """Runs a run folder's policies, says how they did, and writes it to result.json."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # before anything imports MuJoCo, for the film
    trained = read_args(args.folder)
    plain = {"mode": "eval", "run_dir": str(args.folder), "platform": "auto", "distributed": False}
    args = tyro.cli(Args, default=trained.model_copy(update=plain), description=__doc__)
    refuse_differences(args, trained)
    make_mesh(args)  # sets JAX up
    size = largest_divisor(args.eval_episodes, args.num_envs)
    run = make_run(args.model_copy(update={"num_envs": size, "num_steps": 100}), 1)
    if (args.video or args.render) and run.env.render is None:
        raise InputError(f"--video, --render: --env-id {args.env_id} has no method render")
    learner = read_learner(args, run, args.use_best)
    rows = []
    width = max(len(member_name(member)) for member in args.members)
    for member, found in zip(args.members, play(run, learner), strict=True):
        mean, std = float(np.mean(found)), float(np.std(found))
        line = f"{member_name(member):{width}}: return {mean:.2f} +- {std:.2f}"
        line += f" over {len(found)} episodes, {min(found):.2f} to {max(found):.2f}"
        if run.env.threshold is not None:
            line += f"; solved from {run.env.threshold:g}: {mean >= run.env.threshold}"
        print(line, flush=True)
        rows.append({"mean": mean, "std": std, "episodes": len(found)})
    path = args.folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result["eval_return"] = rows
    write_atomically(path, json.dumps(result, indent=2).encode())
    if args.video or args.render:
        film(args, learner)
    return 0


def film(args: Args, learner: LearnerState) -> None:
    """Shows an episode of the first seed, or films it as videos/<env-id>.mp4 and .gif."""
    one = {"num_envs": 1, "num_seeds": 1, "grid": (), "num_steps": 1, "vectorization": "sync"}
    if not args.native:
        kwargs = json.loads(args.env_kwargs) | {"render_mode": "rgb_array"}
        one["env_kwargs"] = json.dumps(kwargs)
    module, *_ = envpool.registration.registry.specs.get(args.env_id, [""])
    if "mujoco" in module:  # EnvPool draws these in a context of OpenGL that it does not make
        context = importlib.import_module("mujoco").GLContext(1, 1)
        context.make_current()
    if "toy_text" in module:  # EnvPool does not draw these
        one["env_id"] = f"gymnasium:{args.env_id}"
    run = make_run(args.model_copy(update=one), 1)
    learner = jax.tree.map(lambda x: x[:1], learner)
    runner = first_runner(run)
    frames = []
    over = False
    while not over and len(frames) < args.eval_steps:
        frames.append(np.array(run.env.render(runner.env_state)))  # a copy, as some draw into it
        if args.render:
            show_frame(frames[-1])
        runner, transition = run.act(runner, learner)
        learner = learner._replace(iteration=learner.iteration + 1)  # of other noise
        over = transition.done.any()
    print(f"an episode of {len(frames)} steps: return {transition.episodic_return.item():.2f}")
    if not args.video:
        return
    path = args.folder / "videos" / args.env_id.replace("/", "_").replace(":", "_")
    path.parent.mkdir(exist_ok=True)
    frames = np.stack(frames)
    imageio.v3.imwrite(f"{path}.mp4", frames, plugin="FFMPEG", fps=30, macro_block_size=2)
    imageio.v3.imwrite(f"{path}.gif", frames[:300:3, ::2, ::2], duration=100, loop=0)
    print(f"filmed: {path}.mp4, {path}.gif")


def show_frame(frame: np.ndarray) -> None:
    """Shows a frame in a window, 30 a second. Raises: InputError where there is no display."""
    # Or SDL draws with OpenGL, as MuJoCo does, which X ends with an error
    os.environ["SDL_FRAMEBUFFER_ACCELERATION"] = "0"
    pygame = importlib.import_module("pygame")
    try:
        window = pygame.display.set_mode((frame.shape[1], frame.shape[0]))
    except pygame.error as error:
        raise InputError(f"--render: {error}") from error
    pygame.surfarray.blit_array(window, frame.swapaxes(0, 1))
    pygame.display.flip()
    pygame.event.pump()  # the window stays alive
    pygame.time.wait(33)


# By hand
class Agent:
    """PPO-CMA from a loop of one's own. Its methods are those of the authors' Agent.

    agent = Agent(observation_space, action_space, **settings); agent.init(seed);
    action = agent.act(obs); agent.memorize(obs, action, reward, next_obs, terminated, truncated);
    agent.update_with_memorized(). Or agent = Agent.from_run(run_folder), and on from there.
    An action is a decision: an agent of a run is to hold it for the run's --action-repeat steps,
    but not into a new episode, and to memorize it once, with the sum of their rewards.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        capacity: int = 8000,
        **settings: Any,
    ) -> None:
        """Makes networks and functions; `init` makes a learner.

        Args:
            action_space: with bounds.
            capacity: the most decisions and episode ends between two updates.
            settings: flags of Args.
        """
        rows = {"num_envs": 1, "num_steps": capacity, "total_timesteps": capacity}
        self.args = Args(**{"action_repeat": 1} | settings | rows)
        self.network = ActorCritic(action_space, self.args)
        self.flat = partial(flat, space=observation_space)
        obs = np.asarray(self.flat(observation_space.sample()))
        action = np.zeros(math.prod(action_space.shape))
        self.no_experience = Transition(obs, action, *np.zeros(7))  # as when environments reset
        self.episode = self.no_experience  # its last step
        self.memory = []
        shown = TimeStep(obs, 0.0, False, False)
        bound = {"network": self.network, "args": self.args}
        self.new_learner = jax.jit(partial(init_learner, shown=shown, **bound))
        self.update = jax.jit(partial(update, **bound))
        self.choose = jax.jit(self.choice)

    @classmethod
    def from_run(cls, run_folder: str | Path, **member: float) -> "Agent":
        """Returns an agent that goes on from a run's newest checkpoint, history included.

        Args:
            member: of several runs, which one: seed=2, gamma=0.99; the first that has these.

        Raises: InputError, a ValueError, where the folder holds no run of this script.
        """
        folder = Path(run_folder).resolve()
        alone = {"distributed": False, "vectorization": "sync"}
        args = read_args(folder).model_copy(update=alone)
        index = find_member(args, member)
        run = make_run(args)
        like = Checkpoint(jax.eval_shape(run.init), None, np.zeros(3), 0.0)
        found = newest_checkpoint(folder, like)
        if found is None:
            raise InputError(f"{folder} has no checkpoint yet")
        agent = cls(
            run.env.observation_space,
            run.env.action_space,
            args.rollout_size,
            **dict(args) | {"action_repeat": 1},
        )
        agent.learner = jax.tree.map(lambda x: x[index], found.learner)
        agent.random = np.random.default_rng()
        return agent

    def init(self, seed: int = 1) -> None:
        """Makes a new learner."""
        self.learner = self.new_learner(np.uint32(seed))
        self.random = np.random.default_rng(seed)

    def choice(self, learner: LearnerState, obs: Array, noise: Array) -> Array:
        """Returns actions of the space for observations [..., D] and noise [..., U]."""
        obs = normalize(obs, learner.obs_stats, self.args.clip_obs)
        policy, _ = self.network.apply(learner.params, obs)
        return env_action(sample_action(policy, noise), self.network.space, self.args)

    def act(self, obs: Any, deterministic: bool = False) -> np.ndarray:
        """Returns an action of the space for one observation, or as many as there are."""
        with beside_environments(self.args):
            obs = self.flat(obs)
            shape = (*obs.shape[:-1], *self.no_experience.action.shape)
            noise = np.float32(self.random.standard_normal(shape) * (not deterministic))
            return np.asarray(self.choose(self.learner._replace(opt_state=None), obs, noise))

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
        self.next_obs = np.asarray(self.flat(next_obs))
        self.episode = Transition(
            obs=np.asarray(self.flat(obs)),
            action=np.ravel(action),
            reward=reward,
            terminated=terminated,
            done=terminated or truncated,
            mask=1.0,
            episodic_return=self.episode.episodic_return + reward,
            episodic_length=self.episode.episodic_length + 1,
            discounted_return=0.0,
        )
        self.memory.append(self.episode)
        if self.episode.done:
            self.episode = self.no_experience._replace(obs=self.next_obs)
            self.memory.append(self.episode)

    def update_with_memorized(self) -> float:
        """Returns the mean return of the episodes that ended in what was memorized, and learns it.

        What was memorized is forgotten. An unfinished episode's rest is worth what the critic
        says. Raises: ValueError where there is more than the capacity.
        """
        missing = self.args.num_steps - len(self.memory)
        if missing < 0:
            found = f"{len(self.memory)} decisions and episode ends memorized"
            raise ValueError(f"{found}: raise capacity={self.args.num_steps}")
        rows = [self.no_experience] * missing + self.memory
        steps = jax.tree.map(lambda *x: np.float32(x)[:, None], *rows)
        obs = np.concatenate([steps.obs, self.next_obs[None, None]])
        self.learner, metrics = self.update(self.learner, steps._replace(obs=obs))
        self.memory = []
        return float(metrics["charts/episodic_return"])


def main() -> None:
    """Trains or evaluates, as the command line says."""
    for name in ("stdout", "stderr"):  # daemons may have neither
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    args = tyro.cli(Args, description=__doc__)
    warnings.filterwarnings("ignore", message=r"os\.fork")  # JAX's: the children run no JAX
    warnings.filterwarnings("ignore", message=".*precision lowered")  # of EnvPool's own spaces
    try:
        code = train(args) if args.mode == "train" else evaluate(args)
    except InputError as error:
        note(str(error))
        _kept, code = error, 2  # with its environments, until their processes are gone
    except Exception as error:
        traceback.print_exc()
        _kept, code = error, 1
    for child in multiprocessing.active_children():
        child.kill()
    if args.distributed and code in (1, 2):
        os._exit(code)  # an ordinary exit waits for the other processes, which wait for this one
    sys.exit(code)


if __name__ == "__main__":
    main()
