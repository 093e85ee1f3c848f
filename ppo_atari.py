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
"""PPO for images with Discrete actions: Atari from pixels or RAM, MinAtar, Procgen, ViZDoom, yours.

    python ppo_atari.py --env-id Breakout-v5 --seed 1  # the same command again resumes
    python ppo_atari.py --env-id gymnax/Breakout-MinAtar --seed 1 --num-seeds 8  # in one process
    python ppo_atari.py --env-id Breakout-v5 --seed 1 --mode eval --video

PPO: arXiv 1707.06347; GAE: 1506.02438; protocols: 1312.5602 and 1709.06009 (Machado et al.).
Axes are always [S, T, N, ...]: seeds, steps, environments per seed. E epochs of M minibatches of
B rows; D numbers an observation, U choices; P processes. A step of Atari is four frames.

Differs from the papers and from CleanRL's ppo_atari_envpool.py:
1. Time limits are not ends: a truncated step bootstraps from the value of its true last
   observation.
2. The step on which an environment resets itself, ignoring its action, has mask 0 and trains
   nothing. After a lost life that is EnvPool's no-op.
3. Returns are the game's own scores, over all lives; only learning sees clipped rewards, and lost
   lives as ends.
4. RAM and other vectors are normalised by running statistics, images are not.
5. --norm-adv divides by the population's standard deviation (code in torch: the sample's).
6. --clip-vloss takes the larger error, as CleanRL does (Stable-Baselines3: the clipped one).

The defaults are those of baselines' ppo2 and CleanRL for Atari. Baselines' ppo1, as its PyTorch
port has it (8 actors): --anneal-clip --update-epochs 3 --no-norm-adv --norm-adv-once
--no-clip-vloss --vf-coef 2 --max-grad-norm inf --init normc --network ppo1
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
    env_id: str = "Breakout-v5"
    """environment of EnvPool or Gymnasium; module:EnvId (module is imported first); gymnax/...
    or jax:module:function for environments in JAX"""
    env_kwargs: str = "{}"  # the environment's arguments, as JSON: '{"terrain": "hills"}'
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # random seed; of several, the first
    num_seeds: Count = 1  # independent runs in this process, with seeds seed, seed + 1, ...
    grid: tuple[str, ...] = ()
    """settings to vary in this process, with all seeds each: learning_rate=1e-4,1e-3 gamma=0.9,0.99
    are four; clip_coef:ent_coef=0.1:0,0.2:0.01 are two, which differ in both"""
    total_timesteps: Count = 10_000_000  # per seed; whole rollouts, so rounded down
    exp_name: str = "ppo"  # name of this experiment, a part of the run folder
    run_dir: str = ""  # run folder; empty: runs/<script>/<env-id>/<exp-name>/seed<seed>
    clobber: bool = False  # start afresh; a run in the folder is moved aside
    stop_when_solved: bool = False  # end once all S means of 100 episodes passed the threshold
    checkpoint_interval: Count = 50  # iterations between checkpoints, up to the next look
    keep_best: bool = False  # also keep the checkpoint whose last 100 episodes earned the most
    use_best: bool = False  # in eval mode, run that checkpoint's policy, not the last one's
    log_interval: Count = 1  # iterations between looks of the host, which logs, saves, and stops
    mode: Literal["train", "eval"] = "train"  # eval: run the run folder's policy
    deterministic: bool = False  # in eval mode, take the most likely actions, not samples
    eval_episodes: Count = 100  # evaluation episodes per seed
    eval_steps: Count = 100_000  # after which an evaluation's episode counts as it is
    video: bool = False  # in eval mode, film an episode of the first seed as mp4 and GIF
    render: bool = False  # in eval mode, show an episode of the first seed in a window
    track: bool = False  # Weights & Biases, too (pip install wandb); WANDB_PROJECT names a project
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"  # of updates and environments in JAX
    act_on: Literal["auto", "cpu", "device"] = "auto"
    """policies of other environments: beside them, or where updates run (auto: so for images)"""
    distributed: bool = False  # one of P processes of mpirun or srun, each with num_envs / P
    vectorization: Literal["sync", "async"] = "sync"  # Gymnasium's, async: a process for each
    # Rollout
    num_envs: Count = 8  # N, parallel environments per seed
    num_steps: Count = 128  # T, steps per environment and rollout
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # GAE mixing: 0 is the one-step error, 1 the Monte Carlo return
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = False  # divide rewards by the running deviation of the discounted return
    clip_obs: Bound = 10.0  # bound on observations, once scaled (inf: off)
    clip_reward: Bound = 1.0  # bound on rewards, once scaled (inf: off)
    # Observations
    protocol: Literal["openai", "machado"] = "openai"  # of Atari: defaults of the next five flags
    episodic_life: bool = True  # a lost life is an end for learning, not for scores
    fire_reset: bool = True  # press FIRE where a game waits for it
    noop_max: Count = 30  # most no-ops that an episode begins with
    sticky_actions: Fraction = 0.0  # probability that the action before is repeated
    full_action_space: bool = False  # all 18 actions, not only those that the game knows
    obs: Literal["pixels", "ram"] = "pixels"  # of Atari: 84 x 84 grey pixels, or 128 bytes of RAM
    frame_stack: Annotated[int, Field(ge=1, le=64)] | None = None
    """observations that are shown at once; by default 4 of Atari, 1 of all others"""
    channels: Literal["auto", "first", "last"] = "auto"  # axis of an image's channels
    # Update
    learning_rate: Positive = 2.5e-4  # Adam's step size
    anneal_lr: bool = True  # learning rate linearly to zero over the run
    num_minibatches: Count = 4  # M, minibatches per epoch
    update_epochs: Count = 4  # E, passes over the rollout
    clip_coef: Positive = 0.1  # epsilon, the bound on |ratio - 1|
    anneal_clip: bool = False  # clip range linearly to zero over the run
    clip_vloss: bool = True  # bound changes of the value by epsilon, too
    norm_adv: bool = True  # normalise advantages in each minibatch
    norm_adv_once: bool = False  # over each environment's part of a rollout, as ppo1 does
    recompute_advantages: bool = False  # and targets before each epoch, not once per rollout
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    vf_coef: Weight = 0.5  # weight of the value loss
    max_grad_norm: Bound = 0.5  # bound on the global gradient norm (inf: off)
    target_kl: Positive | None = None  # no further epochs once one's approx_kl passes 1.5 times it
    # Network
    network: Literal["auto", "nature", "impala", "ppo1", "small", "mlp"] = "auto"
    """auto: nature for images, small for those of less than 36 pixels, mlp for vectors; only mlp
    has the next two flags' sizes"""
    hidden_sizes: tuple[Count, ...] = (256, 256)  # widths of the hidden layers
    critic_sizes: tuple[Count, ...] = (256, 256)  # widths of the critic's hidden layers
    activation: Literal["tanh", "relu", "elu", "silu"] = "relu"  # of the hidden layers
    init: Literal["orthogonal", "normc"] = "orthogonal"
    """gains sqrt 2 hidden, 0.01 policy, 1 value; or units of norm 1 (policy 0.01), as ppo1"""

    @property
    def rollout_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.rollout_size // self.num_minibatches

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
        if self.rollout_size % self.num_minibatches:
            raise ValueError("--num-minibatches does not divide --num-envs x --num-steps")
        if self.norm_adv and self.minibatch_size == 1:
            raise ValueError("--norm-adv needs more than one row in each of --num-minibatches")
        if self.norm_adv and self.norm_adv_once:
            raise ValueError("--norm-adv-once is instead of --norm-adv: add --no-norm-adv")
        if self.obs == "ram" and not self.norm_obs:
            raise ValueError("--obs ram needs --norm-obs: --clip-obs is for scaled bytes")
        for name in ("obs", *MACHADO):
            given = getattr(self, name) != Args.model_fields[name].default
            if given and not is_atari(self.env_id):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for EnvPool's Atari games: leave it out")
        return self


MACHADO = {  # defaults of that protocol, arXiv 1709.06009
    "protocol": "machado",
    "episodic_life": False,
    "fire_reset": False,
    "noop_max": 1,
    "sticky_actions": 0.25,
    "full_action_space": True,
}


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
class RunningStats(NamedTuple):  # of observations [D], or of the discounted return []
    mean: Array
    var: Array
    count: Array  # []


class Transition(NamedTuple):  # one step; a rollout stacks T of them: [T, N, ...]
    obs: Array  # raw; of a rollout [T + 1, N, ...]: obs[t + 1] is the true next observation
    action: Array  # choices, which count from 0
    policy: "Categorical"  # that acted
    value: Array  # of obs, as the network said then
    reward: Array  # raw
    terminated: Array  # 1: no value beyond this step
    done: Array  # 1: terminated or truncated
    mask: Array  # 0: the environment reset itself on this step, which is not experience
    ended: Array  # 1: a game is over, and its return is whole
    episodic_return: Array  # real and unclipped, so far
    episodic_length: Array
    discounted_return: Array  # of raw rewards, so far: what scales rewards


class Batch(NamedTuple):  # what the loss sees, [T*N, ...]; a minibatch is [B, ...]
    obs: Array  # normalised
    action: Array
    policy: "Categorical"  # that acted
    log_prob: Array  # of action under it
    value: Array  # before the update
    advantage: Array
    target: Array
    mask: Array  # in a minibatch a weight of mean 1


class Schedule(NamedTuple):  # numbers that change, or are swept: traced, so nothing recompiles
    learning_rate: Array
    clip_coef: Array
    ent_coef: Array
    vf_coef: Array
    gamma: Array
    gae_lambda: Array


class LearnerState(NamedTuple):  # all that training changes
    params: Any
    opt_state: Any
    obs_stats: RunningStats | None  # none of images
    return_stats: RunningStats
    schedule: Schedule  # as given; annealing leaves it alone
    key: Array  # [2], of the whole run; each iteration's keys are folded from it
    iteration: Array  # []
    episodes: Array  # [], ended so far
    returns: Array  # [100], of the last training episodes, the newest last; before these -inf


# --- Networks ---
def mlp(
    x: Array, sizes: tuple[int, ...], out_size: int, out_gain: float, name: str, args: Args
) -> Array:
    """Returns what dense layers name_0, name_1, ... make of x [..., D]: [..., out_size]."""
    activation = getattr(nn, args.activation)
    for i, size in enumerate(sizes):
        init = kernel_init(2**0.5, args)
        x = activation(nn.Dense(size, kernel_init=init, name=f"{name}_{i}")(x))
    init = kernel_init(out_gain, args)
    return nn.Dense(out_size, kernel_init=init, name=f"{name}_{len(sizes)}")(x)


def kernel_init(gain: float, args: Args) -> nn.initializers.Initializer:
    """Returns the initialiser of a layer's weights."""
    if args.init == "orthogonal":
        return nn.initializers.orthogonal(gain)
    return partial(normc, norm=min(gain, 1.0))


def normc(key: Array, shape: tuple[int, int], dtype: Any, norm: float) -> Array:
    """Returns random weights [in, out], those of each output with one norm. Source: ppo1."""
    weights = jax.random.normal(key, shape, dtype)
    return norm * weights / jnp.linalg.norm(weights, axis=0, keepdims=True)


def is_image(space: spaces.Space) -> bool:
    """Returns whether observations of a space are images, or stacks of images."""
    return isinstance(space, spaces.Box | spaces.MultiBinary) and len(space.shape) in (2, 3, 4)


def channels_first(shape: tuple[int, int, int], args: Args) -> bool | None:
    """Returns whether an image's first axis has its channels, not its last; None: nobody knows.

    Channels are 1, 3 or 4, or beside two axes of one length, or else less than half of these.
    """
    if args.channels != "auto":
        return args.channels == "first"
    signs = set()
    first, middle, last = shape
    if (first in (1, 3, 4)) != (last in (1, 3, 4)):
        signs.add(first in (1, 3, 4))
    if (first == middle) != (middle == last):
        signs.add(middle == last)
    if not signs and 2 * min(first, last) < sorted(shape)[1]:
        signs.add(first < last)
    return signs.pop() if len(signs) == 1 else None


def channels_last(image: Array, args: Args) -> Array:
    """Returns images [B, height, width, channels] of whatever layout, bytes in [0, 1].

    Args:
        image: [B, height, width], with channels behind or in front; or a stack of such images,
            whose first axis becomes channels.
    """
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 255
    if image.ndim == 3:
        return image[..., None]
    if image.ndim == 5:
        one = partial(channels_last, args=args)
        frames = jax.vmap(one, in_axes=1, out_axes=-2)(image)
        return frames.reshape(*frames.shape[:3], -1)
    if channels_first(image.shape[1:], args):
        return jnp.moveaxis(image, 1, -1)
    return image


def conv(x: Array, kernel: Array, stride: int) -> Array:
    """Returns a convolution without padding: [B, height, width, features].

    As a sum over the kernel's rows of matrix products, once blocks of stride x stride pixels have
    become channels. On a CPU XLA's own gradient of a convolution, inside of a scan, takes over ten
    times as long.

    Args:
        x: [B, height, width, channels].
        kernel: [rows, columns, channels, features]; the stride divides rows and columns.
    """
    batch, height, width, channels = x.shape
    rows, columns, _, features = kernel.shape
    out_height = (height - rows) // stride + 1
    out_width = (width - columns) // stride + 1
    rows //= stride
    columns //= stride
    down = out_height + rows - 1  # blocks that the kernel reaches
    right = out_width + columns - 1
    x = x[:, : down * stride, : right * stride]
    x = x.reshape(batch, down, stride, right, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, down, right, -1)
    kernel = kernel.reshape(rows, stride, columns, stride, channels, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(rows, -1, features)

    patches = jnp.concatenate([x[:, :, j : j + out_width] for j in range(columns)], axis=-1)
    out = 0
    for i in range(rows):
        row = patches[:, i : i + out_height].reshape(-1, kernel.shape[1])
        out += row @ kernel[i]
    return out.reshape(batch, out_height, out_width, features)


class Conv(nn.Module):
    """A convolution with bias.

    pad: rows and columns of zeros on each side; gain: of orthogonal weights.
    """

    features: int
    size: int
    stride: int
    args: Args
    pad: int = 0
    gain: float = 2**0.5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.orthogonal(self.gain)
        if self.args.init == "normc":
            init = nn.initializers.xavier_uniform()
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        sides = (self.pad, self.pad)
        return conv(jnp.pad(x, ((0, 0), sides, sides, (0, 0))), kernel, self.stride) + bias


# (features, size, stride) of convolutions, and the width of the layer behind them
PLAIN = {
    "nature": (((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),
    "ppo1": (((16, 8, 4), (32, 4, 2)), 256),
    "small": (((16, 3, 1),), 128),  # MinAtar's
}
LEAST_SIZE = {"nature": 36, "ppo1": 20, "small": 3}  # pixels of an image's shorter side


def impala_features(x: Array, args: Args) -> Array:
    """Returns what IMPALA's residual network makes of images: [B, height, width, 32].

    Source: arXiv 1802.01561, figure 3, the deep one.
    """
    activation = getattr(nn, args.activation)
    same = partial(Conv, size=3, stride=1, args=args, pad=1, gain=1.0)  # sums grow as it is
    for section, features in enumerate((16, 32, 32)):
        x = same(features, name=f"conv_{section}")(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in range(2):
            y = x
            for layer in range(2):
                name = f"conv_{section}_{block}_{layer}"
                y = same(features, name=name)(activation(y))
            x += y
    return activation(x)


def network_of(obs: Array, args: Args) -> str:
    """Returns which network --network means for observations [B, ...], or is."""
    if args.network != "auto":
        return args.network
    if obs.ndim < 3:
        return "mlp"
    _, height, width, _ = jax.eval_shape(partial(channels_last, args=args), obs).shape
    return "small" if min(height, width) < LEAST_SIZE["nature"] else "nature"


class ActorCritic(nn.Module):
    """Images: common convolutions below policy and value. Vectors: two separate networks."""

    space: spaces.Discrete  # of actions
    args: Args

    @nn.compact
    def __call__(self, obs: Array) -> tuple["Categorical", Array]:
        """Returns the policy, leaves [B, U], and values [B], for observations [B, ...]."""
        args = self.args
        choices = int(self.space.n)
        name = network_of(obs, args)
        if name == "mlp":
            x = obs / 255 if obs.dtype == jnp.uint8 else obs
            x = x.reshape(len(x), -1)
            logits = mlp(x, args.hidden_sizes, choices, 0.01, "policy", args)
            value = mlp(x, args.critic_sizes, 1, 1.0, "critic", args)[:, 0]
            return Categorical(logits=logits), value

        activation = getattr(nn, args.activation)
        x = channels_last(obs, args)
        if name == "impala":
            x = impala_features(x, args)
            width = 256
        else:
            layers, width = PLAIN[name]
            for i, (features, size, stride) in enumerate(layers):
                x = activation(Conv(features, size, stride, args, name=f"conv_{i}")(x))
        x = x.reshape(len(x), -1)
        hidden = nn.Dense(width, kernel_init=kernel_init(2**0.5, args), name="dense")
        x = activation(hidden(x))
        logits = nn.Dense(choices, kernel_init=kernel_init(0.01, args), name="policy")(x)
        value = nn.Dense(1, kernel_init=kernel_init(1.0, args), name="critic")(x)
        return Categorical(logits=logits), value[:, 0]


# --- Distribution ---
class Categorical(NamedTuple):  # over U choices
    logits: Array  # [..., U]


def draw_noise(key: Array, shape: tuple[int, ...], space: spaces.Discrete) -> Array:
    """Returns Gumbel noise for sample_action, [*shape, U]."""
    return jax.random.gumbel(key, (*shape, int(space.n)), jnp.float32)


def sample_action(policy: Categorical, noise: Array) -> Array:
    """Returns choices [...] from Gumbel noise [..., U]; noise 0 gives the most likely."""
    return jnp.argmax(policy.logits + noise, axis=-1).astype(jnp.int32)


def log_prob(policy: Categorical, action: Array) -> Array:
    """Returns the log probability [...] of choices [...]."""
    log_probs = jax.nn.log_softmax(policy.logits)
    return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


def entropy(policy: Categorical) -> Array:
    """Returns the entropy [...] in nats."""
    log_probs = jax.nn.log_softmax(policy.logits)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def kl(old: Categorical, new: Categorical) -> Array:
    """Returns KL(old || new) [...] in nats, exactly."""
    old_log_probs = jax.nn.log_softmax(old.logits)
    new_log_probs = jax.nn.log_softmax(new.logits)
    return jnp.sum(jnp.exp(old_log_probs) * (old_log_probs - new_log_probs), axis=-1)


# --- Statistics ---
def masked_mean(x: Array, mask: Array) -> Array:
    """Returns the mean of x [*mask.shape, ...] where mask is 1; 0 where it is 1 nowhere."""
    weight = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    axes = tuple(range(mask.ndim))
    return jnp.sum(x * weight, axis=axes) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(x: Array, mask: Array) -> Array:
    """Returns the variance of x [*mask.shape, ...] over mask's axes where mask is 1."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def update_stats(x: Array, stats: RunningStats, mask: Array) -> RunningStats:
    """Returns statistics that also hold x [T, N, ...] where mask [T, N] is 1.

    Source: Chan et al. 1979, eq. 2.1.
    """
    count = jnp.sum(mask)
    total = stats.count + count
    shift = masked_mean(x, mask) - stats.mean
    between = jnp.square(shift) * stats.count * count / total
    squares = stats.var * stats.count + masked_var(x, mask) * count + between
    return RunningStats(
        mean=stats.mean + shift * count / total,
        var=squares / total,
        count=total,
    )


def normalize(x: Array, stats: RunningStats | None, bound: float) -> Array:
    """Returns x [..., *stats.mean.shape], centred, scaled to variance 1, clipped to +-bound.

    Images, which have no statistics, are left as they are.
    """
    if stats is None:
        return x
    return jnp.clip((x - stats.mean) / jnp.sqrt(stats.var + 1e-8), -bound, bound)


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


def ppo_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a minibatch [B, ...], a scalar, and metrics, scalars.

    Source: arXiv 1707.06347, eq. 7 and 8; value clipping: baselines' ppo2.
    """
    policy, value = network.apply(params, batch.obs)
    log_ratio = log_prob(policy, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clip_coef = schedule.clip_coef

    clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
    policy_loss = jnp.maximum(-batch.advantage * ratio, -batch.advantage * clipped_ratio)

    value_loss = jnp.square(value - batch.target)
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -clip_coef, clip_coef)
        value_loss = jnp.maximum(value_loss, jnp.square(clipped_value - batch.target))

    samples = {
        "policy_loss": policy_loss,
        "value_loss": 0.5 * value_loss,
        "entropy": entropy(policy),
        "approx_kl": ratio - 1 - log_ratio,
        "kl": kl(batch.policy, policy),
        "clipfrac": jnp.abs(ratio - 1) > clip_coef,
    }
    mean = jax.tree.map(lambda x: jnp.mean(x * batch.mask), samples)
    loss = mean["policy_loss"] + schedule.vf_coef * mean["value_loss"]
    loss -= schedule.ent_coef * mean["entropy"]
    return loss, mean


# --- Update ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam behind a bound on the global gradient norm; its step size is traced."""
    return optax.chain(
        optax.clip_by_global_norm(args.max_grad_norm),
        optax.scale_by_adam(eps=1e-5),
    )


def average_over_processes(tree: Any, args: Args) -> Any:
    """Returns a pytree whose leaves are the means over all processes."""
    if not args.distributed:
        return tree
    flat, unravel = ravel_pytree(tree)  # one collective costs as much as one of its leaves would
    return unravel(jax.lax.pmean(flat, "process"))


def gather_envs(tree: Any, args: Args) -> Any:
    """Returns a pytree of [T, N / P, ...] with all processes' environments: [T, N, ...]."""
    if not args.distributed:
        return tree
    return jax.lax.all_gather(tree, "process", axis=1, tiled=True)


IMAGES_AT_ONCE = 32  # whose gradient a CPU takes, as its caches hold them


def loss_gradient(
    learner: LearnerState, batch: Batch, network: nn.Module, args: Args
) -> tuple[Any, dict[str, Array]]:
    """Returns the gradient of the loss of a minibatch [B, ...], and metrics."""
    gradient = jax.grad(ppo_loss, has_aux=True)
    whole = partial(gradient, learner.params, schedule=learner.schedule, network=network, args=args)
    small = network_of(batch.obs, args) in ("mlp", "small")
    if small or len(batch.mask) % IMAGES_AT_ONCE:
        return whole(batch)
    in_pieces = partial(sum_of_pieces, gradient=whole)
    return jax.lax.platform_dependent(batch, cpu=in_pieces, default=whole)


def sum_of_pieces(batch: Batch, gradient: Callable) -> tuple[Any, dict[str, Array]]:
    """Returns a mean over a minibatch [B, ...] as that of a few rows after others.

    On a CPU updates from pixels are 1.09 times as fast by it.
    """
    pieces = jax.tree.map(lambda x: x.reshape(-1, IMAGES_AT_ONCE, *x.shape[1:]), batch)

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(piece)), None

    zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, batch))
    total, _ = jax.lax.scan(add, zero, pieces)
    return jax.tree.map(lambda x: x / len(pieces.mask), total)


def minibatch_step(
    learner: LearnerState, batch: Batch, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner after one gradient step on a minibatch [B, ...], and metrics."""
    # As a weight of mean 1, the mask makes means over all rows means over experience
    batch = batch._replace(mask=batch.mask / jnp.maximum(jnp.mean(batch.mask), 1e-8))
    if args.norm_adv:
        centred = batch.advantage - jnp.mean(batch.advantage * batch.mask)
        deviation = jnp.sqrt(jnp.mean(jnp.square(centred) * batch.mask))
        batch = batch._replace(advantage=centred / (deviation + 1e-8))
    if args.distributed:  # each process takes its part of the rows
        split = (jax.lax.axis_size("process"), -1)
        process = jax.lax.axis_index("process")
        batch = jax.tree.map(lambda x: x.reshape(*split, *x.shape[1:])[process], batch)
    grads, metrics = loss_gradient(learner, batch, network, args)
    grads, metrics = average_over_processes((grads, metrics), args)
    direction, opt_state = make_optimizer(args).update(grads, learner.opt_state)
    rate = learner.schedule.learning_rate
    params = jax.tree.map(lambda p, d: p - rate * d, learner.params, direction)
    return learner._replace(params=params, opt_state=opt_state), metrics


def random_order(key: Array, rows: int) -> Array:
    """Returns the numbers below `rows` in random order, uint32 [rows].

    Each is the end of a random number, and these are sorted: on a CPU that is 5 to 10 times as
    fast as jax.random.permutation, which sorts pairs. Numbers whose random bits are the same, of
    which there are 32 - log2(rows), stay in order.
    """
    largest = jnp.uint32(2 ** (rows - 1).bit_length() - 1)
    numbers = jax.random.bits(key, (rows,), jnp.uint32) & ~largest
    return jnp.sort(numbers | jnp.arange(rows, dtype=jnp.uint32)) & largest


class Epochs(NamedTuple):  # the carry of the scan over epochs
    learner: LearnerState
    stopped: Array  # [], whether target_kl has ended this iteration's epochs


def epoch_step(
    epochs: Epochs,
    shuffle_key: Array,
    batch: Batch,
    rollout: Transition,
    network: nn.Module,
    args: Args,
) -> tuple[Epochs, dict[str, Array]]:
    """Returns the carry after one pass over the rollout in M random minibatches, and metrics.

    Args:
        batch: of the whole rollout, [T*N, ...].
        rollout: of this process's environments, normalised, for advantages that are recomputed.
    """
    learner = epochs.learner
    if args.recompute_advantages:
        value = evaluate_rollout(learner, rollout, network)
        estimated = rollout_advantages(learner, rollout, value, args)
        advantage, target = gather_envs(estimated, args)
        batch = batch._replace(advantage=advantage.ravel(), target=target.ravel())

    def step(learner: LearnerState, rows: Array) -> tuple[LearnerState, dict[str, Array]]:
        minibatch = jax.tree.map(lambda x: x[rows], batch)  # [B, ...]
        return minibatch_step(learner, minibatch, network, args)

    order = random_order(shuffle_key, len(batch.mask))
    new, metrics = jax.lax.scan(step, learner, order.reshape(args.num_minibatches, -1))
    metrics = jax.tree.map(jnp.mean, metrics)
    metrics["ran"] = 1 - epochs.stopped.astype(batch.mask.dtype)

    stopped = epochs.stopped
    if args.target_kl is not None:
        new = jax.tree.map(partial(jnp.where, stopped), learner, new)
        stopped |= metrics["approx_kl"] > 1.5 * args.target_kl
    return Epochs(learner=new, stopped=stopped), metrics


ROWS_AT_ONCE = 256  # for which a network is asked, which bounds the memory of its activations


def evaluate_rollout(learner: LearnerState, rollout: Transition, network: nn.Module) -> Array:
    """Returns what the network says now of a rollout's observations: values [T + 1, N]."""
    steps = max(ROWS_AT_ONCE // rollout.mask.shape[1], 1)
    ask = partial(network.apply, learner.params)
    _, value = jax.lax.map(ask, rollout.obs, batch_size=steps)
    return value


def rollout_advantages(
    learner: LearnerState, rollout: Transition, value: Array, args: Args
) -> tuple[Array, Array]:
    """Returns advantages and targets, [T, N], from a critic's values [T + 1, N]."""
    schedule = learner.schedule
    advantage, target = compute_gae(rollout, value, schedule.gamma, schedule.gae_lambda)
    if args.norm_adv_once:
        weight = rollout.mask / jnp.maximum(jnp.mean(rollout.mask, axis=0), 1e-8)
        advantage -= jnp.mean(advantage * weight, axis=0)
        advantage /= jnp.sqrt(jnp.mean(jnp.square(advantage) * weight, axis=0)) + 1e-8
    return advantage, target


def make_batch(learner: LearnerState, rollout: Transition, network: nn.Module, args: Args) -> Batch:
    """Returns what the losses see of a normalised rollout of [T, N / P, ...]: leaves [T*N, ...].

    Policies and values are those of the rollout; only the last observation's value is asked for.
    """
    _, last_value = network.apply(learner.params, rollout.obs[-1])
    value = jnp.concatenate([rollout.value, last_value[None]])
    advantage, target = rollout_advantages(learner, rollout, value, args)
    batch = Batch(
        obs=rollout.obs[:-1],
        action=rollout.action,
        policy=rollout.policy,
        log_prob=log_prob(rollout.policy, rollout.action),
        value=rollout.value,
        advantage=advantage,
        target=target,
        mask=rollout.mask,
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), gather_envs(batch, args))


def anneal(learner: LearnerState, args: Args) -> Schedule:
    """Returns this iteration's schedule: what is annealed goes linearly to 0 over the run."""

    def left(x: Array) -> Array:
        return x - x * learner.iteration / args.num_iterations

    schedule = learner.schedule
    if args.anneal_lr:
        schedule = schedule._replace(learning_rate=left(schedule.learning_rate))
    if args.anneal_clip:
        schedule = schedule._replace(clip_coef=left(schedule.clip_coef))
    return schedule


def count_episodes(
    learner: LearnerState, rollout: Transition
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner with the episodes that ended in a rollout counted, and metrics."""
    ended = rollout.ended  # [T, N]
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
    """Returns the learner after E epochs over a rollout, and metrics: scalars, and samples [K, _].

    P processes compute what one does: each asks the network about its own environments, and
    takes its part of each minibatch's rows; all else they know in common.

    Args:
        rollout: of this process's environments, leaves [T, N / P, ...], observations
            [T + 1, N / P, ...], as the environment gave them.
    """
    own_rollout = rollout
    rollout = gather_envs(own_rollout, args)

    # The policy acted on observations scaled by the old statistics; rewards take the new ones
    obs_stats, return_stats = learner.obs_stats, learner.return_stats
    if args.norm_obs and obs_stats is not None:  # not of images
        obs_stats = update_stats(rollout.obs[:-1], obs_stats, rollout.mask)
    if args.norm_reward:
        return_stats = update_stats(rollout.discounted_return, return_stats, rollout.mask)
    scale = return_stats._replace(mean=jnp.zeros_like(return_stats.mean))
    scaled = own_rollout._replace(
        obs=normalize(own_rollout.obs, learner.obs_stats, args.clip_obs),
        reward=normalize(own_rollout.reward, scale, args.clip_reward),
    )

    given = learner.schedule  # which annealing leaves alone
    learner = learner._replace(schedule=anneal(learner, args))
    batch = make_batch(learner, scaled, network, args)

    key = jax.random.fold_in(learner.key, 2 * learner.iteration + 1)
    shuffle_keys = jax.random.split(key, args.update_epochs)
    step = partial(epoch_step, batch=batch, rollout=scaled, network=network, args=args)
    epochs = Epochs(learner=learner, stopped=jnp.array(False))
    (learner, _), seen = jax.lax.scan(step, epochs, shuffle_keys)

    ran = seen.pop("ran")  # [E], 0 after an early stop
    metrics = {f"losses/{name}": masked_mean(x, ran) for name, x in seen.items()}
    unexplained = masked_var(batch.target - batch.value, batch.mask)
    explained = 1 - unexplained / jnp.maximum(masked_var(batch.target, batch.mask), 1e-8)
    metrics["losses/explained_variance"] = explained
    metrics["charts/learning_rate"] = learner.schedule.learning_rate
    probability = jax.nn.softmax(batch.policy.logits)
    metrics["policy/most_likely"] = masked_mean(jnp.max(probability, axis=-1), batch.mask)
    metrics["policy/param_norm"] = optax.tree.norm(learner.params)
    metrics["policy/epochs"] = jnp.sum(ran)
    learner = learner._replace(
        obs_stats=obs_stats,
        return_stats=return_stats,
        schedule=given,
        iteration=learner.iteration + 1,
    )
    must_be_finite = {  # in the order in which they arise, which is that of the alphabet
        "bad/1 the environment's observation": rollout.obs,
        "bad/2 the environment's reward": rollout.reward,
        "bad/3 the discounted return": rollout.discounted_return,
        "bad/4 a running statistic": (obs_stats, return_stats),
        "bad/5 a parameter of the network": (learner.params, learner.opt_state),
    }
    for name, tree in must_be_finite.items():
        metrics[name] = jnp.where(all_finite(tree), 0, learner.iteration)
    learner, episode_metrics = count_episodes(learner, rollout)
    return learner, metrics | episode_metrics | rollout_samples(rollout)


# --- Environments ---
class TimeStep(NamedTuple):  # what environments show, leaves [S, N, ...]
    obs: Array  # float32 [S, N, D], or images; the step after an episode's last shows a new one's
    reward: Array
    terminated: Array  # bool
    truncated: Array  # bool; never both
    over: Array | None = None  # bool, whether a game is over: lost lives only count as terminated


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
    if not isinstance(env.action_space, spaces.Discrete):
        raise InputError(
            f"--env-id {args.env_id}: {env.action_space} is not one choice; for numbers there is"
            " ppo_continuous.py, for several choices ppo_icm_lstm.py, for teams ppo_multiagent.py"
        )
    frames = args.frame_stack or 1
    if is_atari(args.env_id) and args.obs == "pixels":
        frames = 1  # EnvPool stacks pixels itself
    elif is_atari(args.env_id):
        frames = args.frame_stack or 4
    if frames > 1:
        env = stack_frames(env, frames)
    require_network(env, args)
    return env


def require_network(env: Environment, args: Args) -> None:
    """Raises InputError where --network cannot take the environment's observations."""
    obs = env.first[1].obs[0, :1]
    shape = obs.shape[1:]
    name = network_of(obs, args)
    if name == "mlp":
        return
    if obs.ndim < 3:
        raise InputError(f"--network {name} is for images, {args.env_id} shows {shape}: take mlp")
    if obs.ndim > 3 and channels_first(shape[-3:], args) is None:
        note(f"channels of images {shape} are read as the last axis; if not: --channels first")
    height, width = jax.eval_shape(partial(channels_last, args=args), obs).shape[1:3]
    if min(height, width) < LEAST_SIZE.get(name, 1):
        raise InputError(f"--network {name} is for larger images than {shape}: try small")


def stack_frames(env: Environment, count: int) -> Environment:
    """Returns environments that show their last `count` observations, the oldest first.

    Images are stacked on a new first axis, vectors joined. An episode's first observation stands
    for those before it. Raises: InputError where observations are not numbers.
    """
    space = env.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) > 3:
        raise InputError(f"--frame-stack is for numbers and images, not {space}: leave it out")
    low = np.stack([space.low] * count)
    high = np.stack([space.high] * count)
    if not is_image(space):
        low = low.ravel()
        high = high.ravel()

    def show(new: TimeStep, frames: Array) -> TimeStep:  # frames [S, N, count, ...]
        if is_image(space):
            return new._replace(obs=frames)
        return new._replace(obs=frames.reshape(*frames.shape[:2], -1))

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        inner, frames, over = env_state
        inner, new = env.step(inner, action)
        newest = new.obs[:, :, None]
        moved = jnp.concatenate([frames[:, :, 1:], newest], axis=2)
        frames = jnp.where(over.reshape(*over.shape, *(1,) * (frames.ndim - 2)), newest, moved)
        return (inner, frames, game_over(new)), show(new, frames)

    inner, first = env.first
    frames = jnp.repeat(first.obs[:, :, None], count, axis=2)
    return env._replace(
        first=((inner, frames, game_over(first)), show(first, frames)),
        step=step,
        observation_space=spaces.Box(low, high, dtype=space.dtype),
        render=env.render and (lambda env_state: env.render(env_state[0])),
    )


def game_over(time_step: TimeStep) -> Array:
    """Returns whether a game is over, bool [S, N]; of all but Atari, whether an episode is."""
    if time_step.over is None:
        return time_step.terminated | time_step.truncated
    return time_step.over


def is_atari(env_id: str) -> bool:
    """Returns whether an environment is one of EnvPool's Atari games."""
    return "atari" in str(envpool.registration.registry.specs.get(env_id, ""))


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


def as_image(obs: Any, space: spaces.Box | spaces.MultiBinary) -> Array:
    """Returns images of bytes as they are, others as float32, in [0, 1] if their bounds exceed 1.

    Raises: InputError where images at hand are beyond their space.
    """
    low = float(np.min(getattr(space, "low", 0)))
    high = float(np.max(getattr(space, "high", 1)))
    if isinstance(obs, np.ndarray) and obs.max() > high:
        raise InputError(f"an image has numbers up to {obs.max():g}, and its space is {space}")
    image = jnp.asarray(obs)
    if image.dtype == jnp.uint8:
        return image
    image = image.astype(jnp.float32)
    return (image - low) / (high - low) if low > -1e30 and 1 < high < 1e30 else image


def flat(obs: Any, space: spaces.Space | dict) -> Array:
    """Returns observations as networks take them: images, or else numbers [..., D]."""
    return as_image(obs, space) if is_image(space) else as_vector(obs, space)


def as_vector(obs: Any, space: spaces.Space | dict) -> Array:
    """Returns the numbers [..., D] of observations of a space, with any leading axes.

    Choices are one-hot; one that is not of its space is no number, which stops the run. Raises:
    InputError for a space that networks cannot take.
    """
    if isinstance(space, dict | spaces.Dict):
        parts = [as_vector(obs[name], part) for name, part in space.items()]
    elif isinstance(space, spaces.Tuple):
        parts = [as_vector(x, part) for x, part in zip(obs, space, strict=True)]
    elif isinstance(space, spaces.Discrete):
        choice = jnp.asarray(obs)[..., None] - int(space.start)
        known = (choice >= 0) & (choice < int(space.n))
        parts = [jnp.where(known, choice == np.arange(space.n), jnp.nan)]
    elif isinstance(space, spaces.MultiDiscrete):
        rows = jnp.asarray(obs).reshape(*np.shape(obs)[: np.ndim(obs) - space.nvec.ndim], -1)
        choices = zip(space.nvec.ravel(), space.start.ravel(), strict=True)
        each = [spaces.Discrete(n, start=start) for n, start in choices]
        parts = [as_vector(rows[..., i], part) for i, part in enumerate(each)]
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
    """Returns EnvPool's environments: send and recv are XLA calls, inside of the compiled scan.

    Where an Atari game is over it says itself, as with episodic_life a lost life ends an episode.
    """
    size = len(env_seeds)
    atari = is_atari(args.env_id)
    kwargs = {}
    if atari:
        kwargs = {
            "episodic_life": args.episodic_life,  # in eval mode too: its reset presses FIRE
            "use_fire_reset": args.fire_reset,
            "noop_max": args.noop_max,
            "repeat_action_probability": args.sticky_actions,
            "full_action_space": args.full_action_space,
            "stack_num": args.frame_stack or 4,
        }
    kwargs |= json.loads(args.env_kwargs)
    pool = envpool.make_gymnasium(args.env_id, num_envs=size, seed=env_seeds, **kwargs)
    handle, recv, send, _ = pool.xla()
    space = pool.observation_space
    if args.obs == "ram":
        space = spaces.Box(0, 255, (128,), np.uint8)
    dtype = list(pool.spec.action_array_spec.values())[-1].dtype

    def receive(handle: Array) -> tuple[Array, TimeStep]:
        handle, (obs, reward, terminated, truncated, info) = recv(handle)
        if args.obs == "ram":
            obs = info["ram"]
        new = split_seeds(flat(obs, space), reward, terminated, truncated, args)
        if atari:
            over = truncated | (info["terminated"] > 0)
            new = new._replace(over=over.reshape(new.reward.shape))
        return handle, new

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


def open_gymnax(name: str, kwargs: dict) -> Task:
    """Returns gymnax's environment of that name; kwargs change its parameters."""
    gymnax = importlib.import_module("gymnax")
    require_known(f"gymnax/{name}", [f"gymnax/{x}" for x in gymnax.registered_envs])
    env, params = gymnax.make(name)
    return gymnax_task(env, params.replace(**kwargs))


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


def env_action(action: Array, space: spaces.Discrete, args: Args) -> Array:
    """Returns what the environment gets for choices [...], which count from 0."""
    return action.astype(action_dtype(space)) + int(space.start)


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
    policy, value = jax.vmap(network.apply)(learner.params, obs)
    action = sample_action(policy, noise)
    env_state, new = env.step(runner.env_state, env_action(action, env.action_space, args))

    # After an episode's end the environment has only reset itself; lives end no game
    mask = 1 - (last.terminated | last.truncated).astype(jnp.float32)
    goes_on = 1 - game_over(last).astype(jnp.float32)
    gamma = learner.schedule.gamma[:, None]
    runner = RunnerState(
        env_state=env_state,
        time_step=new,
        episodic_return=(runner.episodic_return + new.reward) * goes_on,
        episodic_length=(runner.episodic_length + mask) * goes_on,
        discounted_return=(gamma * runner.discounted_return + new.reward) * mask,
    )
    transition = Transition(
        obs=last.obs,
        action=action,
        policy=policy,
        value=value,
        reward=new.reward,
        terminated=new.terminated.astype(jnp.float32),
        done=(new.terminated | new.truncated).astype(jnp.float32),
        mask=mask,
        ended=game_over(new) * mask,
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


class DistantNetwork:
    """A network that acts on an accelerator, for rollouts that run beside the environments.

    Programs of accelerators cannot call environments: each step's observations go there, and
    answers come back.
    """

    def __init__(self, network: nn.Module, device: jax.Device) -> None:
        self.network = network
        self.device = device
        self.params = None
        self.answer = jax.jit(jax.vmap(network.apply))

    def take(self, params: Any) -> None:
        """Brings parameters [S, ...] to the device, where they act from now on."""
        self.params = jax.device_put(params, self.device)

    def apply(self, params: Any, obs: Array) -> tuple[Categorical, Array]:
        """Returns what a network does, under vmap, of the parameters that were brought."""
        shapes = jax.eval_shape(self.network.apply, params, obs)
        return jax.pure_callback(self.ask, shapes, obs, vmap_method="broadcast_all")

    def ask(self, obs: Array) -> tuple[Categorical, Array]:
        """Returns answers [S, N, ...], on the host."""
        obs = jax.device_put(np.asarray(obs), self.device)
        return jax.device_get(self.answer(self.params, obs))


# --- Run ---
ROWS_PER_CORE = 512  # of a minibatch; for fewer, another core costs more than it saves
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
def init_learner(
    seed: Array, shown: TimeStep, network: nn.Module, args: Args, **varied: Array
) -> LearnerState:
    """Returns a member's new learner, for environments that show what `shown` is like, [...].

    Args:
        varied: the settings in which a grid's members differ.
    """
    given = dict(args) | varied
    key = jax.random.PRNGKey(seed)
    zeros = jnp.zeros_like(shown.obs)
    zero = jnp.float32(0)
    few = jnp.float32(1e-4)
    params = network.init(key, zeros[None])
    obs_stats = None
    if zeros.ndim == 1:  # no image
        obs_stats = RunningStats(mean=zeros, var=zeros + 1, count=few)
    return LearnerState(
        params=params,
        opt_state=make_optimizer(args).init(params),
        obs_stats=obs_stats,
        return_stats=RunningStats(mean=zero, var=zero + 1, count=few),
        schedule=Schedule(*(jnp.float32(given[name]) for name in Schedule._fields)),
        key=jax.random.fold_in(key, 1),
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


def accelerator_of_policies(env: Environment, args: Args) -> jax.Device | None:
    """Returns where policies of host-side environments act, None: beside the environments.

    Small networks are done before an accelerator has been asked; for images it is worth the way.
    """
    device = jax.local_devices()[0]
    if args.native or args.act_on == "cpu" or device.platform == "cpu":
        return None
    if args.act_on == "device" or is_image(env.observation_space):
        return device
    return None


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
    actor = network
    accelerator = accelerator_of_policies(env, args)
    if accelerator is not None:
        actor = DistantNetwork(network, accelerator)
    step = jax.jit(partial(rollout, first_env=first_env, env=env, network=actor, args=args))

    def init() -> LearnerState:
        # One by one: jaxlib 0.10 can lock up where two batches of matrices are decomposed at once
        members = jax.tree.map(lambda *x: jnp.array(x), *args.members)
        return jax.lax.map(lambda member: init_one(**member), members)

    def act(runner: RunnerState, learner: LearnerState) -> tuple[RunnerState, Transition]:
        learner = jax.device_get(learner._replace(opt_state=None))
        if isinstance(actor, DistantNetwork):
            actor.take(learner.params)
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
    *("platform", "act_on", "distributed", "vectorization"),
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
    opened, for its spaces. With --frame-stack, or of RAM, give the stack, as stack_frames does.

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
    axes = run.env.first[1].obs.ndim - 2  # of one observation
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
            batch = numbers.shape[: numbers.ndim - axes]
            rows = numbers.reshape(-1, *numbers.shape[len(batch) :])
            return np.asarray(act(rows, key, deterministic)).reshape(batch)

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
        ended = transition.ended > 0
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


RANDOM_AND_HUMAN = {  # scores of a random policy and of a human, as DQN Zoo has them
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "Asteroids": (719.1, 47388.7),
    "Atlantis": (12850.0, 29028.1),
    "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5),
    "BeamRider": (363.9, 16926.5),
    "Berzerk": (123.7, 2630.4),
    "Bowling": (23.1, 160.7),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "Centipede": (2090.9, 12017.0),
    "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4),
    "Defender": (2874.5, 18688.9),
    "DemonAttack": (152.1, 1971.0),
    "DoubleDunk": (-18.6, -16.4),
    "Enduro": (0.0, 860.5),
    "FishingDerby": (-91.7, -38.7),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Gravitar": (173.0, 3351.4),
    "Hero": (1027.0, 30826.4),
    "IceHockey": (-11.2, 0.9),
    "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MontezumaRevenge": (0.0, 4753.3),
    "MsPacman": (307.3, 6951.6),
    "NameThisGame": (2292.3, 8049.0),
    "Phoenix": (761.4, 7242.6),
    "Pitfall": (-229.4, 6463.7),
    "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "Riverraid": (1338.5, 17118.0),
    "RoadRunner": (11.5, 7845.0),
    "Robotank": (2.2, 11.9),
    "Seaquest": (68.4, 42054.7),
    "Skiing": (-17098.1, -4336.9),
    "Solaris": (1236.3, 12326.7),
    "SpaceInvaders": (148.0, 1668.7),
    "StarGunner": (664.0, 10250.0),
    "Surround": (-10.0, 6.5),
    "Tennis": (-23.8, -8.3),
    "TimePilot": (3568.0, 5229.2),
    "Tutankham": (11.4, 167.6),
    "UpNDown": (533.4, 11693.2),
    "Venture": (0.0, 1187.5),
    "VideoPinball": (16256.9, 17667.9),
    "WizardOfWor": (563.5, 4756.5),
    "YarsRevenge": (3092.9, 54576.9),
    "Zaxxon": (32.5, 9173.3),
}


def judgement(mean: float, env: Environment, args: Args) -> str:
    """Returns what a mean return is worth, to be printed behind it; empty if nobody knows.

    A game's human-normalised score is 0 for a random policy and 1 for a human.
    """
    game = args.env_id.removesuffix("-v5")
    if is_atari(args.env_id) and game in RANDOM_AND_HUMAN:
        random, human = RANDOM_AND_HUMAN[game]
        return f"; human-normalised {(mean - random) / (human - random):.3f}"
    if env.threshold is None:
        return ""
    return f"; solved from {env.threshold:g}: {mean >= env.threshold}"


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
        print(line + judgement(mean, run.env, args), flush=True)
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
        over = transition.ended.any()
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


def parse(command_line: list[str] | None = None) -> Args:
    """Returns the settings of a command line; a protocol gives other flags their defaults."""
    args = tyro.cli(Args, args=command_line, description=__doc__)
    if args.protocol == "machado":
        return tyro.cli(Args, args=command_line, default=Args(**MACHADO), description=__doc__)
    return args


def main() -> None:
    """Trains or evaluates, as the command line says."""
    for name in ("stdout", "stderr"):  # daemons may have neither
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    args = parse()
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
