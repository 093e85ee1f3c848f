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
"""PPO for images with Discrete actions: Atari from pixels or RAM, MinAtar, Procgen, ViZDoom, yours.

    python ppo_atari.py --env-id Breakout-v5 --seed 1  # the same command again resumes
    python ppo_atari.py --env-id gymnax/Breakout-MinAtar --seed 1 --num-seeds 8  # in one process
    python ppo_atari.py --env-id Breakout-v5 --seed 1 --mode eval --video

PPO: arXiv 1707.06347; GAE: 1506.02438; protocols: 1312.5602 and 1709.06009 (Machado et al.).
Axes are always [S, T, N, K, ...]: seeds, steps, environments per seed, copies of an observation.
E epochs of M minibatches of B rows; P processes. A step of Atari is four frames.

Differs from the papers and from CleanRL's ppo_atari_envpool.py:
1. Time limits are not ends: a truncated step bootstraps from the value of its true last
   observation.
2. The step on which an environment resets itself, ignoring its action, has mask 0 and trains
   nothing. After a lost life that is EnvPool's no-op.
3. Returns are the game's own scores, over all lives; only learning sees clipped rewards, and lost
   lives as ends.
4. RAM and other vectors are normalised by running statistics, images are not.

The defaults are those of baselines' ppo2 and CleanRL for Atari. Baselines' ppo1, as its PyTorch
port has it (8 actors): --anneal-clip --update-epochs 3 --no-norm-adv --norm-adv-once
--no-clip-vloss --vf-coef 2 --max-grad-norm inf --init normc --network ppo1
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
    env_id: str = "Breakout-v5"
    """environment of EnvPool or Gymnasium, or module:EnvId (module is imported first)"""
    env_kwargs: str = "{}"
    """keyword arguments of the environment's constructor, as JSON: '{"terrain": "hills"}'"""
    seed: int = 1
    """random seed; of several, the first"""
    num_seeds: int = 1
    """S, independent runs in this process, with seeds seed, seed + 1, ..."""
    total_timesteps: int = 10_000_000
    """environment steps per seed; whole rollouts, so rounded down"""
    exp_name: str = "ppo"
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
    deterministic: bool = False
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
    overlap: bool = False
    """collect the next rollout while the update computes: its policy is one update older"""
    distributed: bool = False
    """one of P processes started by mpirun or srun; each steps num_envs / P environments"""
    vectorization: Literal["sync", "async"] = "sync"
    """Gymnasium's environments one after another, or each in a process of its own"""
    # Rollout
    num_envs: int = 8
    """N, parallel environments per seed"""
    num_steps: int = 128
    """T, steps per environment and rollout"""
    hard_resets: bool = False
    """begin every rollout of training with new episodes; longer ones than it never end, then"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """GAE mixing: 0 is the one-step error, 1 the Monte Carlo return"""
    norm_obs: bool = True
    """normalise observations by their running mean and variance"""
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return"""
    clip_obs: float = 10.0
    """bound on normalised observations (inf: off)"""
    clip_reward: float = 1.0
    """bound on scaled rewards (inf: off)"""
    # Atari (EnvPool's games)
    protocol: Literal["openai", "machado"] = "openai"
    """published switches: the next five flags, which may then still be given"""
    episodic_life: bool = True
    """a lost life is an end for learning, not for scores"""
    fire_reset: bool = True
    """press FIRE where a game waits for it: as it begins and, with episodic_life, at each life"""
    noop_max: int = 30
    """most no-ops that an episode begins with"""
    sticky_actions: float = 0.0
    """probability that the action before is repeated"""
    full_action_space: bool = False
    """all 18 actions, not only those that the game knows"""
    obs: Literal["pixels", "ram"] = "pixels"
    """what is observed of a game: 84 x 84 grey pixels, or its 128 bytes of RAM"""
    frame_stack: int | None = None
    """observations that are shown at once; by default 4 of Atari, 1 of all others"""
    # Update
    learning_rate: float = 2.5e-4
    """Adam's step size"""
    anneal_lr: bool = True
    """learning rate linearly to zero over the run"""
    adaptive_lr: bool = False
    """after each epoch, learning rate times or over 1.5 towards desired_kl"""
    num_minibatches: int = 4
    """M, minibatches per epoch"""
    update_epochs: int = 4
    """E, passes over the rollout"""
    objective: Literal["clip", "kl-penalty", "none"] = "clip"
    """clipped surrogate; surrogate with adaptive KL penalty; the bare surrogate"""
    clip_coef: float = 0.1
    """epsilon, the bound on |ratio - 1|"""
    anneal_clip: bool = False
    """clip range linearly to zero over the run"""
    clip_vloss: bool = True
    """bound changes of the value by epsilon, too"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    norm_adv_once: bool = False
    """normalise advantages over each environment's part of a rollout (ppo1)"""
    recompute_advantages: bool = False
    """advantages and targets anew before each epoch, not once per rollout"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    anneal_ent: bool = False
    """weight of the entropy bonus linearly to zero over the run"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    l2_coef: float = 0.0
    """weight of half the sum of the squared network weights"""
    max_grad_norm: float = 0.5
    """bound on the global gradient norm (inf: off)"""
    target_kl: float | None = None
    """no further epochs once one's mean approx_kl passes 1.5 times this"""
    desired_kl: float = 0.01
    """KL that the penalty's coefficient and the adaptive learning rate steer to"""
    kl_coef: float = 1.0
    """first coefficient of the KL penalty"""
    kl_rule: tuple[float, float, float] = (2.0, 1.5, 0.667)
    """its factor, applied above and below these times desired_kl (Heess et al.: 1.5 2 0.5)"""
    kl_barrier: float = 0.0
    """weight of max(0, KL - 2 desired_kl) squared in the kl-penalty (Heess et al.)"""
    # Network
    network: Literal["auto", "nature", "impala", "ppo1", "small", "mlp"] = "auto"
    """auto: nature for images, small for those of less than 36 pixels, mlp for vectors"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """widths of the hidden layers"""
    critic_sizes: tuple[int, ...] = (256, 256)
    """widths of the critic's hidden layers"""
    activation: Literal["tanh", "relu", "elu", "silu"] = "relu"
    """nonlinearity of the hidden layers"""
    init: Literal["orthogonal", "normc"] = "orthogonal"
    """gains sqrt 2 hidden, 0.01 policy, 1 value; or units of norm 1 (policy 0.01), as ppo1"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what hidden layers compute in; parameters and losses are float32"""

    @property
    def rollout_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        return self.rollout_size // self.num_minibatches

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
    require_widths(args, "critic_sizes")
    require_between(args, "noop_max", 1, 2**31 - 1)
    require_between(args, "sticky_actions", 0, 1)
    if args.frame_stack is not None:
        require_between(args, "frame_stack", 1, 64)
    require_positive(args, "clip_obs clip_reward learning_rate clip_coef max_grad_norm")
    require_positive(args, "desired_kl kl_coef")
    require_between(args, "num_minibatches update_epochs", 1, 2**31 - 1)
    require_between(args, "ent_coef vf_coef l2_coef kl_barrier", 0)
    require_finite(args, "learning_rate clip_coef ent_coef vf_coef l2_coef desired_kl kl_coef")
    require_finite(args, "kl_barrier")
    if args.rollout_size % args.num_minibatches:
        size = f"--num-envs {args.num_envs} x --num-steps {args.num_steps}"
        fail(f"--num-minibatches {args.num_minibatches} does not divide {size}")
    if args.norm_adv and args.minibatch_size < 2:
        fail(
            f"--num-minibatches {args.num_minibatches} leaves one row in each, whose normalised"
            " advantage is always 0: give fewer, or --no-norm-adv"
        )
    if args.overlap and is_native(args):
        fail("--overlap is for environments on the host: leave it out")
    if args.adaptive_lr and args.anneal_lr:
        fail("--adaptive-lr contradicts --anneal-lr: add --no-anneal-lr")
    if args.target_kl is not None:
        require_positive(args, "target_kl")
        require_finite(args, "target_kl")
    factor, above, below = args.kl_rule
    if not (1 <= factor < math.inf and 0 < below <= above < math.inf):
        fail(f"--kl-rule {args.kl_rule}: give a factor of 1 or more, then above >= below > 0")
    if args.kl_barrier and args.objective != "kl-penalty":
        fail("--kl-barrier belongs to --objective kl-penalty: add that, or leave it out")


PROTOCOLS = {
    "openai": {
        "episodic_life": True,
        "fire_reset": True,
        "noop_max": 30,
        "sticky_actions": 0.0,
        "full_action_space": False,
    },
    "machado": {  # arXiv 1709.06009
        "episodic_life": False,
        "fire_reset": False,
        "noop_max": 1,
        "sticky_actions": 0.25,
        "full_action_space": True,
    },
}


# --- State ---
class RunningStats(NamedTuple):  # of one leaf of the observations, or of the discounted return
    mean: Array
    var: Array
    count: Array  # []


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


class Batch(NamedTuple):  # what the loss sees, [T*N*K, ...]; a minibatch is [B, ...]
    obs: Any  # normalised
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
    kl_coef: Array
    gamma: Array
    gae_lambda: Array


class LearnerState(NamedTuple):  # what a checkpoint holds
    params: Any
    opt_state: Any
    obs_stats: Any  # like one observation, RunningStats for leaves
    return_stats: RunningStats
    schedule: Schedule  # as given; annealing leaves it alone
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


def multiply(x: Array, kernel: Array, axes: tuple, precision: Any) -> Array:
    """Returns x @ kernel: all that nn.Dense asks a dot_general for."""
    return product(x, kernel)


class Dense(nn.Dense):
    """Flax's dense layer, with that product."""

    dot_general: Callable = multiply


def mlp(
    obs: Any,
    sizes: tuple[int, ...],
    out_size: int,
    out_gain: float,
    name: str,
    args: Args,
    dtype: Any = None,
) -> Array:
    """Returns what dense layers make of observations: [B, out_size].

    Args:
        obs: any pytree of [B, ...]; its leaves are flattened and laid side by side.
        sizes: widths of the hidden layers.
        out_gain: gain of the last layer's orthogonal weights.
        name: of the layers, as parameters: name_0, name_1, ...
        dtype: that hidden layers compute in; by default that of observations and parameters.
    """
    leaves = [leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(obs)]
    x = jnp.concatenate(leaves, axis=-1)
    activation = getattr(nn, args.activation)
    for i, size in enumerate(sizes):
        init = kernel_init(2**0.5, args)
        x = activation(Dense(size, dtype=dtype, kernel_init=init, name=f"{name}_{i}")(x))
    last = f"{name}_{len(sizes)}"
    return Dense(out_size, kernel_init=kernel_init(out_gain, args), name=last)(x)


def kernel_init(gain: float, args: Args) -> nn.initializers.Initializer:
    """Returns the initialiser of a dense layer's weights."""
    if args.init == "orthogonal":
        return nn.initializers.orthogonal(gain)
    return partial(normc, norm=min(gain, 1.0))


def normc(key: Array, shape: tuple[int, int], dtype: Any, norm: float) -> Array:
    """Returns random weights [in, out], those of each output with one norm. Source: ppo1."""
    weights = jax.random.normal(key, shape, dtype)
    return norm * weights / jnp.linalg.norm(weights, axis=0, keepdims=True)


def channels_last(image: Array) -> Array:
    """Returns images [B, height, width, channels] of whatever layout, bytes in [0, 1].

    Args:
        image: [B, height, width], with channels behind or, if there are fewer, in front; or a
            stack of such images, whose first axis becomes channels.
    """
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 255
    if image.ndim == 3:
        return image[..., None]
    if image.ndim == 5:
        frames = jax.vmap(channels_last, in_axes=1, out_axes=-2)(image)
        return frames.reshape(*frames.shape[:3], -1)
    if image.shape[1] < image.shape[3]:
        return jnp.moveaxis(image, 1, -1)
    return image


def conv(x: Array, kernel: Array, stride: int) -> Array:
    """Returns a convolution without padding: [B, height, width, features].

    Args:
        x: [B, height, width, channels].
        kernel: [rows, columns, channels, features].
    """
    if max(x.shape[1:3]) <= 16:  # on an H100, too: with 5 seeds MinAtar trains 1.6 times as fast
        return conv_by_products(x, kernel, stride)
    by_products = partial(conv_by_products, stride=stride)
    by_library = partial(conv_by_library, stride=stride)
    return jax.lax.platform_dependent(x, kernel, cpu=by_products, default=by_library)


def conv_by_library(x: Array, kernel: Array, stride: int) -> Array:
    """Returns the same, as accelerators have it."""
    strides = (stride, stride)
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=axes)


def conv_by_products(x: Array, kernel: Array, stride: int) -> Array:
    """Returns the same, as a sum over the kernel's rows of matrix products.

    XLA's own convolutions take a loop for gradients inside of a scan on a CPU: over 20 times this.
    """
    if stride > 1 and kernel.shape[0] % stride == 0 and kernel.shape[1] % stride == 0:
        x, kernel = space_to_depth(x, kernel, stride)
        stride = 1
    rows, columns, channels, features = kernel.shape
    batch, height, width, _ = x.shape
    out_height = (height - rows) // stride + 1
    out_width = (width - columns) // stride + 1
    down = stride * (out_height - 1) + 1
    right = stride * (out_width - 1) + 1
    beside = [x[:, :, j : j + right : stride] for j in range(columns)]
    patches = jnp.concatenate(beside, axis=-1)  # of one row
    out = jnp.zeros((batch * out_height * out_width, features), x.dtype)
    for i in range(rows):
        row = patches[:, i : i + down : stride].reshape(-1, columns * channels)
        out += product(row, kernel[i].reshape(columns * channels, features))
    return out.reshape(batch, out_height, out_width, features)


def space_to_depth(x: Array, kernel: Array, stride: int) -> tuple[Array, Array]:
    """Returns x and kernel with blocks of stride x stride pixels as channels: their stride is 1."""
    batch, height, width, channels = x.shape
    rows, columns, _, features = kernel.shape
    high = (height - rows) // stride + rows // stride  # blocks that the convolution reaches
    wide = (width - columns) // stride + columns // stride
    x = x[:, : high * stride, : wide * stride]
    x = x.reshape(batch, high, stride, wide, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, high, wide, -1)
    rows, columns = rows // stride, columns // stride
    kernel = kernel.reshape(rows, stride, columns, stride, channels, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(rows, columns, -1, features)
    return x, kernel


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
        x = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
        return conv(x, kernel.astype(x.dtype), self.stride) + bias.astype(x.dtype)


# (features, size, stride) of convolutions, and the width of the layer behind them
PLAIN = {
    "nature": (((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),
    "ppo1": (((16, 8, 4), (32, 4, 2)), 256),
    "small": (((16, 3, 1),), 128),  # MinAtar's
}


def plain_features(x: Array, name: str, args: Args) -> Array:
    """Returns what a chain of convolutions makes of images: [B, height, width, features]."""
    activation = getattr(nn, args.activation)
    layers, _ = PLAIN[name]
    for i, (features, size, stride) in enumerate(layers):
        x = activation(Conv(features, size, stride, args, name=f"conv_{i}")(x))
    return x


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


def network_of(obs: Any, args: Args) -> str:
    """Returns which network --network means for observations [B, ...], or is."""
    if args.network != "auto":
        return args.network
    leaves = jax.tree.leaves(obs)
    if len(leaves) > 1 or leaves[0].ndim < 3:
        return "mlp"
    _, height, width, _ = jax.eval_shape(channels_last, leaves[0]).shape
    return "small" if min(height, width) < 36 else "nature"


class ActorCritic(nn.Module):
    """Images: common convolutions below policy and value. Vectors: two separate networks."""

    action_space: spaces.Discrete
    args: Args

    @nn.compact
    def __call__(self, obs: Any) -> tuple["Categorical", Array]:
        """Returns the policy, leaves [B, U], and values [B], for observations [B, ...]."""
        args = self.args
        choices = int(self.action_space.n)
        name = network_of(obs, args)
        if name == "mlp":
            obs = jax.tree.map(bytes_to_numbers, obs)
            dtype = jnp.bfloat16 if args.dtype == "bfloat16" else None
            logits = mlp(obs, args.hidden_sizes, choices, 0.01, "policy", args, dtype)
            value = mlp(obs, args.critic_sizes, 1, 1.0, "critic", args, dtype)[:, 0]
            return Categorical(logits=logits), value

        (image,) = jax.tree.leaves(obs)
        x = channels_last(image)
        if args.dtype == "bfloat16":
            x = x.astype(jnp.bfloat16)
        if name == "impala":
            x = impala_features(x, args)
            width = 256
        else:
            x = plain_features(x, name, args)
            _, width = PLAIN[name]
        x = x.reshape(len(x), -1)
        hidden = Dense(width, dtype=x.dtype, kernel_init=kernel_init(2**0.5, args), name="dense")
        x = getattr(nn, args.activation)(hidden(x))
        logits = Dense(choices, kernel_init=kernel_init(0.01, args), name="policy")(x)
        value = Dense(1, kernel_init=kernel_init(1.0, args), name="critic")(x)
        return Categorical(logits=logits), value[:, 0]


def bytes_to_numbers(x: Array) -> Array:
    """Returns bytes as numbers in [0, 1], and all else as it is."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x


# --- Distribution ---
class Categorical(NamedTuple):  # over U choices
    logits: Array  # [..., U]


def draw_noise(key: Array, shape: tuple[int, ...], space: spaces.Discrete) -> Array:
    """Returns what sample_action takes for actions of a space: float32 [*shape, U]."""
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


def spread(policy: Categorical) -> dict[str, Array]:
    """Returns metrics, scalars, of how undecided a policy is."""
    return {"policy/most_likely": jnp.mean(jnp.max(jax.nn.softmax(policy.logits), axis=-1))}


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
    """Returns statistics that also hold x [T, N, ...] where mask [T, N] is 1; none of images.

    Source: Chan et al. 1979, eq. 2.1.
    """
    if is_image(stats):
        return stats
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


def is_image(stats: RunningStats) -> bool:
    """Returns whether statistics are an image's, which networks take as it is."""
    return stats.mean.ndim > 1


def normalize(x: Array, stats: RunningStats, bound: float) -> Array:
    """Returns x [..., *stats.mean.shape], centred, scaled to variance 1, clipped to +-bound.

    Images are left as they are.
    """
    if is_image(stats):
        return x
    return jnp.clip((x - stats.mean) / jnp.sqrt(stats.var + 1e-8), -bound, bound)


def centre_and_scale(x: Array, mask: Array) -> Array:
    """Returns x with mean 0 and standard deviation 1 where mask, of x's shape, weighs it."""
    weight = mask / jnp.maximum(jnp.mean(mask), 1e-8)
    centred = x - jnp.mean(x * weight)
    return centred / (jnp.sqrt(jnp.mean(jnp.square(centred) * weight)) + 1e-8)


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


def ppo_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a minibatch [B, ...], a scalar, and metrics, scalars.

    Source: arXiv 1707.06347, eq. 7 and 8; value clipping: baselines' ppo2; L2: 2005.12729's code.
    """
    policy, value = network.apply(params, batch.obs)
    log_ratio = log_prob(policy, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    kl_divergence = kl(batch.policy, policy)
    clip_coef = schedule.clip_coef

    policy_loss = -batch.advantage * ratio
    if args.objective == "clip":
        clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
        policy_loss = jnp.maximum(policy_loss, -batch.advantage * clipped_ratio)
    if args.objective == "kl-penalty":
        kl_coef = schedule.kl_coef
        if args.kl_barrier:
            kl_coef += barrier_coef(jnp.mean(kl_divergence * batch.mask), args)
        policy_loss += kl_coef * kl_divergence

    value_loss = jnp.square(value - batch.target)
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -clip_coef, clip_coef)
        value_loss = jnp.maximum(value_loss, jnp.square(clipped_value - batch.target))

    samples = {
        "policy_loss": policy_loss,
        "value_loss": 0.5 * value_loss,
        "entropy": entropy(policy),
        "approx_kl": ratio - 1 - log_ratio,
        "kl": kl_divergence,
        "clipfrac": jnp.abs(ratio - 1) > clip_coef,
    }
    mean = jax.tree.map(lambda x: jnp.mean(x * batch.mask), samples)
    loss = mean["policy_loss"] + schedule.vf_coef * mean["value_loss"]
    loss -= schedule.ent_coef * mean["entropy"]
    if args.l2_coef:
        loss += args.l2_coef * sum_of_squares(params) / 2
    return loss, mean


def barrier_coef(kl_divergence: Array, args: Args) -> Array:
    """Returns what a quadratic barrier adds to the coefficient of the minibatch's mean KL.

    The gradient of kl_barrier * max(0, KL - 2 * desired_kl)^2 is that of KL times this.
    Source: Heess et al. 2017, arXiv 1707.02286, algorithm 2.
    """
    excess = average_over_processes(kl_divergence, args) - 2 * args.desired_kl
    return jax.lax.stop_gradient(2 * args.kl_barrier * jnp.maximum(excess, 0))


def sum_of_squares(params: Any) -> Array:
    """Returns the sum of the squared weights of all layers, biases and log_std left out."""
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params) if x.ndim > 1)


# --- Update ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam behind a bound on the global gradient norm; its step size is traced."""
    return optax.chain(
        optax.clip_by_global_norm(args.max_grad_norm),
        optax.scale_by_adam(eps=1e-5),
    )


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


def loss_gradient(
    learner: LearnerState, batch: Batch, network: nn.Module, args: Args
) -> tuple[Any, dict[str, Array]]:
    """Returns the gradient of ppo_loss in the parameters, like them, and its metrics.

    They are means over equal parts of the minibatch, each of rows_at_once rows.
    """
    size = rows_at_once(batch.obs, args)
    chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)

    def gradient(chunk: Batch) -> tuple[Any, dict[str, Array]]:
        slope = jax.grad(ppo_loss, has_aux=True)
        return slope(learner.params, chunk, learner.schedule, network, args)

    def add(total: tuple, chunk: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, gradient(chunk)), None

    one = jax.tree.map(lambda x: x[0], chunks)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, one))
    total, _ = jax.lax.scan(add, zeros, chunks)
    return jax.tree.map(lambda x: x * (size / len(batch.mask)), total)


ROWS_IN_CACHE = 32  # of images: what these leave behind in a network fits a CPU's cache


def rows_at_once(obs: Any, args: Args) -> int:
    """Returns how many observations go through the network at once, a divisor of their number.

    All of them, but on a CPU few images. A barrier on a minibatch's KL needs it whole.
    """
    rows = len(jax.tree.leaves(obs)[0])
    if network_of(obs, args) == "mlp" or jax.default_backend() != "cpu" or args.kl_barrier:
        return rows
    return largest_divisor(rows, ROWS_IN_CACHE)


def minibatch_step(
    learner: LearnerState, batch: Batch, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner after one gradient step on a minibatch [B, ...], and metrics."""
    # As a weight of mean 1, the mask makes means over all rows means over experience
    batch = batch._replace(mask=batch.mask / jnp.maximum(jnp.mean(batch.mask), 1e-8))
    if args.norm_adv:
        advantage = centre_and_scale(batch.advantage, batch.mask)
        batch = batch._replace(advantage=advantage)
    batch = own_share(batch, args)
    grads, metrics = loss_gradient(learner, batch, network, args)
    grads, metrics = average_over_processes((grads, metrics), args)
    optimizer = make_optimizer(args)
    direction, opt_state = optimizer.update(grads, learner.opt_state, learner.params)
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
        batch: of the whole rollout, [T*N*K, ...].
        rollout: normalised, for advantages that are recomputed.
    """
    learner = epochs.learner
    if args.recompute_advantages:
        _, value = apply_to_rollout(learner, rollout, network)
        advantage, target = estimate_advantages(learner, rollout, value, args)
        batch = batch._replace(advantage=advantage, target=target)

    def step(learner: LearnerState, rows: Array) -> tuple[LearnerState, dict[str, Array]]:
        minibatch = jax.tree.map(lambda x: x[rows], batch)  # [B, ...]
        return minibatch_step(learner, minibatch, network, args)

    order = random_order(shuffle_key, len(batch.mask))
    new, metrics = jax.lax.scan(step, learner, order.reshape(args.num_minibatches, -1))
    metrics = jax.tree.map(jnp.mean, metrics)
    metrics["ran"] = 1 - epochs.stopped.astype(batch.mask.dtype)

    if args.adaptive_lr:
        new = new._replace(schedule=steer_learning_rate(new.schedule, metrics["kl"], args))
    stopped = epochs.stopped
    if args.target_kl is not None:
        new = jax.tree.map(partial(jnp.where, stopped), learner, new)
        stopped |= metrics["approx_kl"] > 1.5 * args.target_kl
    return Epochs(learner=new, stopped=stopped), metrics


def steer(divergence: Array, desired: float, factor: float, above: float, below: float) -> Array:
    """Returns factor where the KL is above `above` times the desired one, 1 / factor below."""
    shrink = jnp.where(divergence < below * desired, 1 / factor, 1)
    return jnp.where(divergence > above * desired, factor, shrink)


def steer_learning_rate(schedule: Schedule, divergence: Array, args: Args) -> Schedule:
    """Returns the schedule after an epoch with that mean KL. Source: rl_games and RSL-RL."""
    factor = steer(divergence, args.desired_kl, 1 / 1.5, 2, 0.5)
    rate = jnp.clip(schedule.learning_rate * factor, 1e-6, 1e-2)
    return schedule._replace(learning_rate=rate)


def apply_to_rollout(
    learner: LearnerState, rollout: Transition, network: nn.Module
) -> tuple[Any, Array]:
    """Returns policy and values, [T + 1, N, K, ...], of a normalised rollout's observations.

    Those of the rollout are known already, but not of the last observation, nor of other copies.
    """
    copies = jax.tree.leaves(rollout.obs)[0].shape[2]
    if rollout.said is not None and copies == 1:
        last = jax.tree.map(lambda x: x[-1, :, 0], rollout.obs)
        of_last = network.apply(learner.params, last)
        found = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), rollout.said, of_last)
        return jax.tree.map(lambda x: x[:, :, None], found)
    axes = jax.tree.leaves(rollout.obs)[0].shape[:3]
    flat_obs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), rollout.obs)
    size = rows_at_once(flat_obs, network.args)
    chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), flat_obs)
    found = jax.lax.map(partial(network.apply, learner.params), chunks)
    return jax.tree.map(lambda x: x.reshape(*axes, *x.shape[2:]), found)


def estimate_advantages(
    learner: LearnerState, rollout: Transition, value: Array, args: Args
) -> tuple[Array, Array]:
    """Returns advantages and targets, each [T*N*K], from values [T + 1, N, K].

    Copies of an observation have the original's advantage and target.
    """
    schedule = learner.schedule
    advantage, target = compute_gae(rollout, value[:, :, 0], schedule.gamma, schedule.gae_lambda)
    if args.norm_adv_once:
        per_env = jax.vmap(centre_and_scale, in_axes=1, out_axes=1)
        advantage = per_env(advantage, rollout.mask)
    copies = value.shape[2]
    return jnp.repeat(advantage, copies), jnp.repeat(target, copies)


def update_statistics(
    learner: LearnerState, rollout: Transition, args: Args
) -> tuple[Any, RunningStats]:
    """Returns the statistics of observations and of returns that also hold a raw rollout."""
    obs_stats = learner.obs_stats
    return_stats = learner.return_stats
    if args.norm_obs:
        original = jax.tree.map(lambda x: x[:-1, :, 0], rollout.obs)  # of an observation's copies
        update_leaf = partial(update_stats, mask=rollout.mask)
        obs_stats = jax.tree.map(update_leaf, original, obs_stats)
    if args.norm_reward:
        return_stats = update_stats(rollout.discounted_return, return_stats, rollout.mask)
    return obs_stats, return_stats


def make_batch(learner: LearnerState, rollout: Transition, network: nn.Module, args: Args) -> Batch:
    """Returns what the losses see of a normalised rollout: leaves [T*N*K, ...]."""

    def rows(x: Array) -> Array:  # of T steps, not of the last observation
        return x[:-1].reshape(-1, *x.shape[3:])

    policy, value = apply_to_rollout(learner, rollout, network)
    advantage, target = estimate_advantages(learner, rollout, value, args)
    policy = jax.tree.map(rows, policy)
    copies = value.shape[2]
    action = rollout.action.reshape(-1, *rollout.action.shape[2:])
    action = jnp.repeat(action, copies, axis=0)
    return Batch(
        obs=jax.tree.map(rows, rollout.obs),
        action=action,
        policy=policy,
        log_prob=log_prob(policy, action),
        value=rows(value),
        advantage=advantage,
        target=target,
        mask=jnp.repeat(rollout.mask.reshape(-1), copies),
    )


def correct_for_age(learner: LearnerState, rollout: Transition, network: nn.Module) -> Transition:
    """Returns an older policy's normalised rollout as the learner's policy would weigh it.

    The network is asked anew, so that clip ranges lie around its own policy and values; the mask
    weighs each step by how much likelier its action is now, pi(a|s) / pi_older(a|s).
    Source: the decoupled objective of Hilton et al. 2021, arXiv 2110.00641.
    """
    older_policy, _ = rollout.said
    found = apply_to_rollout(learner, rollout._replace(said=None), network)
    policy, value = jax.tree.map(lambda x: x[:-1, :, 0], found)
    weight = jnp.exp(log_prob(policy, rollout.action) - log_prob(older_policy, rollout.action))
    return rollout._replace(said=(policy, value), mask=rollout.mask * weight)


def anneal(learner: LearnerState, args: Args) -> Schedule:
    """Returns this iteration's schedule: what is annealed goes linearly to 0 over the run."""

    def left(x: Array) -> Array:
        return x - x * learner.iteration / args.num_iterations

    schedule = learner.schedule
    if args.anneal_lr:
        schedule = schedule._replace(learning_rate=left(schedule.learning_rate))
    if args.anneal_clip:
        schedule = schedule._replace(clip_coef=left(schedule.clip_coef))
    if args.anneal_ent:
        schedule = schedule._replace(ent_coef=left(schedule.ent_coef))
    return schedule


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
    """Returns the learner after E epochs over a rollout, and metrics, scalars.

    Args:
        rollout: leaves [T, N, ...], observations [T + 1, N, K, ...], as the environment gave them.
    """
    if args.distributed:  # everybody sees the whole rollout: P processes compute what one does
        rollout = jax.lax.all_gather(rollout, "process", axis=1, tiled=True)

    # The policy acted on observations scaled by the old statistics; rewards take the new ones
    obs_stats, return_stats = update_statistics(learner, rollout, args)
    obs = jax.tree.map(partial(normalize, bound=args.clip_obs), rollout.obs, learner.obs_stats)
    scale = return_stats._replace(mean=jnp.zeros_like(return_stats.mean))
    reward = normalize(rollout.reward, scale, args.clip_reward)
    scaled = rollout._replace(obs=obs, reward=reward)
    if args.overlap:
        scaled = correct_for_age(learner, scaled, network)

    given = learner.schedule
    learner = learner._replace(schedule=anneal(learner, args))
    batch = make_batch(learner, scaled, network, args)

    key = jax.random.fold_in(learner.key, 2 * learner.iteration + 1)
    shuffle_keys = jax.random.split(key, args.update_epochs)
    asking = scaled._replace(said=None)  # epochs change the network, and ask it again
    step = partial(epoch_step, batch=batch, rollout=asking, network=network, args=args)
    epochs = Epochs(learner=learner, stopped=jnp.array(False))
    (learner, _), seen = jax.lax.scan(step, epochs, shuffle_keys)

    ran = seen.pop("ran")  # [E], 0 after an early stop
    metrics = {f"losses/{name}": masked_mean(x, ran) for name, x in seen.items()}
    metrics["losses/explained_variance"] = explained_variance(batch.value, batch.target, batch.mask)
    metrics["charts/learning_rate"] = learner.schedule.learning_rate
    metrics |= spread(batch.policy)
    metrics["policy/param_norm"] = optax.tree.norm(learner.params)
    metrics["policy/kl_coef"] = given.kl_coef
    metrics["policy/epochs"] = jnp.sum(ran)

    if args.adaptive_lr:
        given = given._replace(learning_rate=learner.schedule.learning_rate)
    if args.objective == "kl-penalty":
        policy, _ = network.apply(learner.params, batch.obs)
        divergence = masked_mean(kl(batch.policy, policy), batch.mask)
        factor = steer(divergence, args.desired_kl, *args.kl_rule)
        given = given._replace(kl_coef=given.kl_coef * factor)
    learner = learner._replace(
        obs_stats=obs_stats,
        return_stats=return_stats,
        schedule=given,
        iteration=learner.iteration + 1,
    )
    learner, episode_metrics = count_episodes(learner, rollout)
    return learner, metrics | episode_metrics


# --- Environments ---
class TimeStep(NamedTuple):  # what S*N environments return, leaves [S*N, ...]
    obs: Any  # float32 [S*N, K, ...]; after an episode's last, the next step has a new one's first
    reward: Array
    terminated: Array  # bool
    truncated: Array  # bool; never both
    over: Array  # bool, whether the game is over: a lost life only counts as terminated


def make_time_step(
    obs: Any, reward: Array, terminated: Array, truncated: Array, over: Array | None = None
) -> TimeStep:
    """Returns what an environment shows; an end that is both counts as terminated.

    Args:
        over: whether the game is over, where that is not whether the episode has ended.
    """
    ended = terminated | truncated
    return TimeStep(
        obs=obs,
        reward=reward.astype("float32"),
        terminated=terminated,
        truncated=truncated & ~terminated,
        over=ended if over is None else over,
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
    """Returns environments with Discrete actions, one per seed.

    Stops (2) at other actions, at observations that --network cannot take, and as open_env does.
    """
    if args.obs == "ram" and not is_atari(args.env_id):
        fail(f"--obs ram is for EnvPool's Atari games, not for {args.env_id}: leave it out")
    env = open_env(args, env_seeds, render)
    if not isinstance(env.action_space, spaces.Discrete):
        kind = type(env.action_space).__name__
        fail(f"--env-id {args.env_id} has {kind} actions: this script is for Discrete actions")
    frames = args.frame_stack
    if is_atari(args.env_id) and args.obs == "pixels":
        frames = 1  # EnvPool stacks pixels itself
    elif frames is None:
        frames = 4 if is_atari(args.env_id) else 1
    if frames > 1:
        env = stack_frames(env, frames)
    require_network(env, args)
    return env


def require_network(env: Environment, args: Args) -> None:
    """Stops with exit code 2 where --network cannot take the environment's observations."""
    _, first = env.first
    obs = jax.tree.map(lambda x: x[:1, 0], first.obs)
    leaves = jax.tree.leaves(obs)
    name = network_of(obs, args)
    if name == "mlp":
        return
    if len(leaves) > 1 or leaves[0].ndim not in (3, 4, 5):
        shapes = [x.shape[1:] for x in leaves]
        fail(f"--network {name} is for one image, and {args.env_id} shows {shapes}: --network mlp")
    image = jax.eval_shape(channels_last, leaves[0])
    if name != "impala":
        height, width = image.shape[1:3]
        for _, size, stride in PLAIN[name][0]:
            if min(height, width) < size:
                fail(f"--network {name} is for larger images than {image.shape[1:3]}: try small")
            height = (height - size) // stride + 1
            width = (width - size) // stride + 1


def stack_frames(env: Environment, count: int) -> Environment:
    """Returns environments that show their last `count` observations, the oldest first.

    Images are stacked on a new first axis, vectors joined. An episode's first observation stands
    for those before it.
    """

    def repeated(x: Array) -> Array:
        return jnp.repeat(x[:, None], count, axis=1)

    def show(time_step: TimeStep, frames: Any) -> TimeStep:
        return time_step._replace(obs=jax.tree.map(join_frames, frames))

    def add(fresh: Array, old: Array, x: Array) -> Array:
        moved = jnp.concatenate([old[:, 1:], x[:, None]], axis=1)
        return jnp.where(fresh.reshape(-1, *(1,) * (old.ndim - 1)), repeated(x), moved)

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        inner, frames, fresh = env_state
        inner, new = env.step(inner, action)
        frames = jax.tree.map(partial(add, fresh), frames, new.obs)
        return (inner, frames, new.over), show(new, frames)

    def begin(env_state: Any, first: TimeStep) -> tuple[tuple, TimeStep]:
        frames = jax.tree.map(repeated, first.obs)
        return (env_state, frames, first.over), show(first, frames)

    return env._replace(
        first=begin(*env.first),
        restart=lambda env_state: begin(*env.restart(env_state[0])),
        step=step,
        observation_space=stack_space(env.observation_space, count),
        render=lambda env_state: env.render(env_state[0]),
    )


def join_frames(frames: Array) -> Array:
    """Returns frames [S*N, count, K, ...] as one observation [S*N, K, ...]."""
    frames = jnp.moveaxis(frames, 1, 2)
    if frames.ndim == 4:  # vectors
        return frames.reshape(*frames.shape[:2], -1)
    return frames


def stack_space(space: spaces.Space, count: int) -> spaces.Space:
    """Returns the space of stacked observations. Stops (2) where they are not numbers."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: stack_space(part, count) for name, part in space.items()})
    if not isinstance(space, spaces.Box):
        fail(f"--frame-stack is for observations of numbers, not {space}: leave it out")
    low = np.stack([space.low] * count)
    high = np.stack([space.high] * count)
    if space.low.ndim == 1:
        low = low.ravel()
        high = high.ravel()
    return spaces.Box(low, high, dtype=space.dtype)


def is_atari(env_id: str) -> bool:
    """Returns whether an environment is one of EnvPool's Atari games."""
    return "atari" in str(envpool.registration.registry.specs.get(env_id, ""))


def envpool_settings(args: Args) -> dict:
    """Returns keyword arguments of EnvPool's constructor: the protocol's, and --env-kwargs."""
    settings = {}
    if is_atari(args.env_id):
        settings = {
            "episodic_life": args.episodic_life,  # in eval mode too: its reset presses FIRE
            "use_fire_reset": args.fire_reset,
            "noop_max": args.noop_max,
            "repeat_action_probability": args.sticky_actions,
            "full_action_space": args.full_action_space,
            "stack_num": args.frame_stack or 4,
        }
    return settings | read_env_kwargs(args)


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

    Where an Atari game is over it says itself, as with episodic_life a lost life ends an episode.
    """
    settings = envpool_settings(args)
    if render:
        settings["render_mode"] = "rgb_array"
    size = len(env_seeds)
    pool = envpool.make(
        args.env_id, env_type="gymnasium", num_envs=size, seed=env_seeds, **settings
    )
    handle, recv, send, _ = pool.xla()
    ids = np.arange(size, dtype=np.int32)
    action_dtype = list(pool.spec.action_array_spec.values())[-1].dtype
    atari = is_atari(args.env_id)
    space = pool.observation_space
    if args.obs == "ram":
        space = spaces.Box(0, 255, (128,), np.uint8)

    def receive(handle: Array) -> tuple[Array, TimeStep]:
        handle, (obs, reward, terminated, truncated, info) = recv(handle)
        over = None
        if atari:
            over = truncated | (info["terminated"] > 0)
        if args.obs == "ram":
            obs = info["ram"]
        obs = jax.tree.map(lambda x: x[:, None], obs)  # K = 1
        return handle, make_time_step(encode_obs(obs, space), reward, terminated, truncated, over)

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
        observation_space=space,
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


def as_space_dtype(action: np.ndarray, space: spaces.Discrete) -> np.ndarray:
    """Returns actions in the dtype of their space."""
    return action.astype(space.dtype)


def env_action(action: Array, space: spaces.Discrete, args: Args) -> Array:
    """Returns what the environment gets for choices [...], which count from 0."""
    return action + int(space.start)


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
    """Returns 1 where a game is over, [S*N]."""
    return time_step.over.astype(jnp.float32)


def go_on(episode: Episode, last: TimeStep, new: TimeStep, gamma: Array) -> Episode:
    """Returns episodes after a step from `last` to `new`; where that was a reset, they begin.

    A lost life begins only the discounted return anew, and its no-op is not counted.
    """
    goes_on = 1 - episode_over(last)
    mask = 1 - (last.terminated | last.truncated).astype(jnp.float32)
    return Episode(
        total=(episode.total + new.reward) * goes_on,
        length=(episode.length + mask) * goes_on,
        discounted=(gamma * episode.discounted + new.reward) * mask,
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


def keep(policy: Categorical, value: Array) -> tuple[Categorical, Array]:
    """Returns all of what a network said: asking again would cost as much as half an epoch."""
    return policy, value


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
ROWS_PER_CORE = 512  # of a minibatch; for fewer, another core costs more than it saves
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
    """Returns one seed's new learner; obs is one encoded observation."""
    key = jax.random.PRNGKey(seed)
    params = network.init(key, jax.tree.map(lambda x: x[None], obs))

    def no_stats(x: Array) -> RunningStats:
        dtype = jnp.result_type(x, jnp.float32)  # float32 of bytes
        mean = jnp.zeros(x.shape, dtype)
        return RunningStats(mean=mean, var=jnp.ones_like(mean), count=jnp.float32(1e-4))

    return LearnerState(
        params=params,
        opt_state=make_optimizer(args).init(params),
        obs_stats=jax.tree.map(no_stats, obs),
        return_stats=no_stats(jnp.float32(0)),
        schedule=Schedule(*(jnp.float32(getattr(args, name)) for name in Schedule._fields)),
        key=jax.random.fold_in(key, 1),
        iteration=jnp.int32(0),
        episodes=jnp.int32(0),
        returns=jnp.zeros(100, jnp.float32),
    )


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

    def act(runner: RunnerState, learner: LearnerState, seconds: dict) -> tuple:
        with timed(seconds, "acting"):
            runner, transition = run.act(runner, learner._replace(opt_state=None))
            return runner, collect(transition)

    def improve(learner: LearnerState, transition: Transition, seconds: dict) -> tuple:
        with timed(seconds, "learning"):
            given = put(learner, pspecs=BY_SEED), put(transition, pspecs=ROLLOUT)
            return jax.device_get(update_all(*given))

    def advance(learner: LearnerState, runner: RunnerState, count: int, seconds: dict) -> Iteration:
        runner, transition = act(runner, learner, seconds)
        learner, metrics, bad = improve(learner, transition, seconds)
        return Iteration(learner, runner, transition, metrics, bad)

    if args.overlap:
        advance = overlapped(act, improve, args)
    return advance, run.runner


def overlapped(act: Callable, improve: Callable, args: Args) -> Callable:
    """Returns an `advance` that collects the next rollout while the update computes.

    All rollouts but the first are by the policy that was there before the update beside them,
    which correct_for_age makes up for.
    """
    worker = ThreadPoolExecutor(max_workers=1)
    ahead = []  # the runner and the rollout that were collected beside the last update

    def advance(learner: LearnerState, runner: RunnerState, count: int, seconds: dict) -> Iteration:
        if ahead:
            runner, transition = ahead.pop()
        else:
            runner, transition = act(runner, learner, seconds)
        collecting = None
        if learner.iteration[0] + 1 < args.num_iterations:
            collecting = worker.submit(act, runner, with_fresh_noise(learner), seconds)
        learner, metrics, bad = improve(learner, transition, seconds)
        if collecting is not None:
            ahead.append(collecting.result())
        return Iteration(learner, runner, transition, metrics, bad)

    return advance


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


def parse(command_line: list[str], default: Args) -> Args:
    """Returns the settings of a command line. Exits at --help (0) and at an unknown flag (2).

    A protocol that is asked for gives other flags their defaults.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends quietly
    args = tyro.cli(Args, args=command_line, default=default, description=__doc__)
    if args.protocol != default.protocol:
        default = replace(default, protocol=args.protocol, **PROTOCOLS[args.protocol])
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
