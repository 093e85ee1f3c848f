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
"""PPO for teams: MAPPO (a centralised critic) and IPPO. One file: run it, copy it, change it.

    python ppo_multiagent.py --env-id jumanji/LevelBasedForaging-v0 --scenario 2s-8x8-2p-2f-coop
    python ppo_multiagent.py --env-id jumanji/RobotWarehouse-v0 --scenario tiny-2ag --num-seeds 3
    python ppo_multiagent.py --env-id rware:rware-tiny-2ag-v2 --algorithm ippo
    python ppo_multiagent.py --env-id jumanji/RobotWarehouse-v0 --scenario tiny-2ag --mode eval

MAPPO: Yu et al. 2021, arXiv 2103.01955; IPPO: de Witt et al. 2020, 2011.09533; PPO: 1707.06347.
Axes are always [S, T, N, A, ...]: seeds, steps, environments per seed, agents. In an update an
agent is a row as an environment is elsewhere: R = N * A rows, E epochs of M minibatches of B
sequences of L steps (L = 1 without memory). D numbers an observation, G numbers a critic sees, U
actions (numbers or choices) an agent, C values a choice, H units of memory; P processes.

Differs from the papers and from most public code:
1. Time limits are not ends: a truncated step bootstraps from the value of its true last
   observation, seen with the memory that belongs to it.
2. The step on which an environment resets itself has mask 0 and trains nothing; so have all steps
   of an agent that is dead.
3. Returns are the team's, over all agents; each agent's own, the best agent's and the task's own
   figure (food eaten, battles won) are beside them, under agents/ and in evaluations.
4. Running statistics rest during a rollout; old values and log-probabilities are computed after
   it, in one batch. Observations are normalised, an agent's one-hot index is not.
5. Policies and critics have one Adam and one gradient bound together, values are normalised by
   the statistics of all targets so far, and advantages in each minibatch (MAPPO's code: one each,
   a moving average, over the rollout).
6. --norm-adv divides by the population's standard deviation (code in torch: the sample's).
7. --clip-vloss takes the larger error, as MAPPO's code does (Stable-Baselines3: the clipped one).
"""

import difflib
import fcntl
import importlib.util
import io
import json
import math
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
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
    env_id: str = "jumanji/LevelBasedForaging-v0"
    """team of Gymnasium; module:EnvId (module is imported first); pettingzoo/module; jumanji/...,
    jaxmarl/... or jax:module:function for teams in JAX"""
    env_kwargs: str = "{}"  # the environment's arguments, as JSON: '{"terrain": "hills"}'
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # random seed; of several, the first
    num_seeds: Count = 1  # independent runs in this process, with seeds seed, seed + 1, ...
    grid: tuple[str, ...] = ()
    """settings to vary in this process, with all seeds each: learning_rate=1e-4,1e-3 gamma=0.9,0.99
    are four; clip_coef:ent_coef=0.1:0,0.2:0.01 are two, which differ in both"""
    total_timesteps: Count = 2_000_000  # per seed; whole rollouts, so rounded down
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
    distributed: bool = False  # one of P processes of mpirun or srun, each with num_envs / P
    vectorization: Literal["sync", "async"] = "sync"  # Gymnasium's, async: a process for each
    # Rollout
    num_envs: Count = 64  # N, parallel environments per seed
    num_steps: Count = 32  # T, steps per environment and rollout
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # GAE mixing: 0 is the one-step error, 1 the Monte Carlo return
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running deviation of the discounted return
    clip_obs: Bound = 10.0  # bound on observations, once scaled (inf: off)
    clip_reward: Bound = 10.0  # bound on rewards, once scaled (inf: off)
    scale_actions: bool = True  # map actions in [-1, 1] to the environment's bounds, if any
    # Update
    learning_rate: Positive = 1e-3  # Adam's step size
    anneal_lr: bool = True  # learning rate linearly to zero over the run
    num_minibatches: Count = 4  # M, minibatches per epoch
    update_epochs: Count = 4  # E, passes over the rollout
    clip_coef: Positive = 0.2  # epsilon, the bound on |ratio - 1|
    clip_vloss: bool = False  # bound changes of the value by epsilon, too
    norm_adv: bool = True  # normalise advantages in each minibatch
    recompute_advantages: bool = False  # and targets before each epoch, not once per rollout
    ent_coef: Weight = 0.01  # weight of the entropy bonus
    anneal_ent: bool = False  # weight of the entropy bonus linearly to zero over the run
    vf_coef: Weight = 0.5  # weight of the value loss
    norm_value: bool = True  # values are of targets normalised by their running mean and variance
    huber_delta: Positive | None = None  # larger errors of values cost linearly (MAPPO's code: 10)
    max_grad_norm: Bound = 0.5  # bound on the global gradient norm (inf: off)
    target_kl: Positive | None = None  # no further epochs once one's approx_kl passes 1.5 times it
    # Agents
    scenario: str = ""
    """tiny-2ag, small-4ag-hard, ... of jumanji/RobotWarehouse-v0; 2s-8x8-2p-2f-coop, ... of
    jumanji/LevelBasedForaging-v0; 3m, ... of JaxMARL's SMAX"""
    algorithm: Literal["mappo", "ippo"] = "mappo"
    """a critic that sees what all agents see, or only what its agent does"""
    critic_input: Literal["auto", "state", "joint", "local"] = "auto"
    """the environment's state; all agents' observations; the agent's own (auto: ippo's; mappo's
    is the state where there is one, else joint)"""
    agent_types: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """each agent's, such as 0 0 0 1: types have networks of their own; by default all share one
    pair, which is told which agent it is"""
    death: Literal["continues", "ends"] = "continues"
    """of an agent before its team's end: the dead train nothing, but the team's later rewards count
    in what the living will have earned; or it is the end of the agent's own episode"""
    team_reward: bool = False  # every agent learns from the team's reward, not from its own
    # Memory
    recurrence: Literal["none", "lstm", "gru"] = "none"  # memory between observations and heads
    memory_size: Count = 128  # H, its units
    sequence_length: Count | None = None
    """L, steps that are trained in one piece; by default a whole rollout"""
    # Network
    hidden_sizes: tuple[Count, ...] = (128, 128)  # widths of the hidden layers
    critic_sizes: tuple[Count, ...] = (128, 128)  # widths of the critic's hidden layers
    activation: Literal["tanh", "relu", "elu", "silu"] = "relu"  # of the hidden layers
    ortho_init: bool = True  # orthogonal weights, gains sqrt 2, 0.01, 1 (off: LeCun normal)
    log_std_init: Annotated[float, Field(allow_inf_nan=False)] = 0.0  # of the first policy

    @property
    def rollout_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def chunk_length(self) -> int:
        if self.recurrence == "none":
            return 1
        return self.sequence_length or self.num_steps

    @property
    def minibatch_size(self) -> int:  # in sequences, which devices share; a team's count as one
        return self.rollout_size // self.chunk_length // self.num_minibatches

    @property
    def num_types(self) -> int:  # of agents; 1: all share one pair of networks
        return max(self.agent_types, default=0) + 1

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
        if self.sequence_length is not None and self.recurrence == "none":
            raise ValueError("--sequence-length belongs to --recurrence lstm or gru")
        if self.num_steps % self.chunk_length:
            raise ValueError("--sequence-length does not divide --num-steps")
        if self.rollout_size // self.chunk_length % self.num_minibatches:
            raise ValueError("--num-minibatches does not divide the rollout's sequences")
        if self.norm_adv and self.minibatch_size * self.chunk_length == 1:
            raise ValueError("--norm-adv needs more than one row in each of --num-minibatches")
        if self.algorithm == "ippo" and self.critic_input not in ("auto", "local"):
            raise ValueError(f"--critic-input {self.critic_input} is mappo's: see --algorithm")
        if self.agent_types and len(set(self.agent_types)) != self.num_types:
            raise ValueError("--agent-types: count them from 0, and leave none out")
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
class RunningStats(NamedTuple):  # of observations [D], or of the discounted return []
    mean: Array
    var: Array
    count: Array  # []


class Views(NamedTuple):  # what an agent's networks see
    actor: Array  # [D], its own observation
    critic: Array  # [G]: the state, all agents' observations, or its own
    agent: Array | None  # [A], who it is, one-hot; None where there is only one
    action_mask: Array  # bool [U, C]: what it may choose; of numbers C = 1: which it has


class Transition(NamedTuple):  # one step; a rollout stacks T of them: [T, N, A, ...]
    obs: Views  # raw; of a rollout [T + 1, N, A, ...]: obs[t + 1] is the true next observation
    action: Array  # [U], as sampled, before the environment's bounds
    reward: Array  # raw
    terminated: Array  # 1: no value beyond this step
    done: Array  # 1: terminated or truncated
    mask: Array  # 0: the environment reset itself on this step, or the agent is dead
    discounted_return: Array  # of raw rewards, so far: what scales rewards
    own_return: Array  # each agent's, so far
    ended: Array  # [T, N], 1: an episode is over, and its return is whole
    episodic_return: Array  # [T, N], the team's, real and unclipped, so far
    episodic_length: Array  # [T, N]
    measure: Array  # [T, N], the task's own figure, such as the part of the food eaten
    memory: Any  # that entered the rollout, leaves [1, N, A, H]; () without recurrence


class Sequence(NamedTuple):  # what networks take: rows of L steps
    obs: Views  # normalised, leaves [R, L, ...]
    mask: Array  # [R, L], 0: memory is empty behind this step
    memory: Any  # that enters the first step, leaves [R, H]; () without recurrence


class Batch(NamedTuple):  # what the loss sees, [R*T/L, L, ...]; a minibatch is [B, L, ...]
    obs: Sequence  # whose own mask stays 0 or 1, for memory
    action: Array
    policy: "Gaussian | Categorical"  # that acted
    log_prob: Array  # of action under it
    value: Array  # before the update
    advantage: Array
    target: Array
    mask: Array  # of losses; in a minibatch a weight of mean 1


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
    obs_stats: RunningStats  # of actors' observations
    critic_stats: RunningStats  # of what critics see
    return_stats: RunningStats
    value_stats: RunningStats  # of value targets
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
    if args.ortho_init:
        return nn.initializers.orthogonal(gain)
    return nn.initializers.lecun_normal()


class Memory(nn.Module):
    """An LSTM or a GRU over sequences, whose memory is empty behind every step with mask 0."""

    args: Args

    @nn.compact
    def __call__(self, x: Array, seen: Sequence) -> tuple[Array, Any]:
        """Returns outputs [R, L, H] and the memory behind each step, leaves [R, L, H].

        Args:
            x: inputs, [R, L, features].
        """

        def step(cell: nn.Module, memory: Any, t: tuple) -> tuple[Any, tuple]:
            x, mask = t
            memory, out = cell(memory, x)
            memory = jax.tree.map(lambda x: x * mask[:, None], memory)
            return memory, (out, memory)

        kinds = {"lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}
        init = nn.initializers.orthogonal()
        cell = kinds[self.args.recurrence](self.args.memory_size, kernel_init=init, name="cell")
        once = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        _, found = nn.scan(step, in_axes=1, out_axes=1, **once)(cell, seen.memory, (x, seen.mask))
        return found


def empty_memory(shape: tuple[int, ...], args: Args) -> Any:
    """Returns memories of actor and critic that know nothing, leaves [*shape, H]; () without."""
    if args.recurrence == "none":
        return ()
    zeros = jnp.zeros((*shape, args.memory_size), jnp.float32)
    one = {"lstm": (zeros, zeros), "gru": zeros}[args.recurrence]
    return one, one


class Networks(nn.Module):
    """Actor and critic, which share nothing, each with a memory of its own if there is any."""

    action_space: spaces.Space
    args: Args

    @nn.compact
    def __call__(self, seen: Sequence) -> tuple:
        """Returns the policy, values, and memory behind each step, leaves [R, L, ...]."""
        args = self.args
        # Rows, not sequences of one step, with which an update takes 1.4 times as long on a CPU
        views = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen.obs)
        actor, critic = views.actor, views.critic
        if views.agent is not None:
            actor = jnp.concatenate([views.agent, actor], axis=-1)
            critic = jnp.concatenate([views.agent, critic], axis=-1)
        memory = ()
        if args.recurrence != "none":
            of_actor, of_critic = seen.memory
            actor, of_actor = self.remember(actor, seen._replace(memory=of_actor), "actor")
            critic, of_critic = self.remember(critic, seen._replace(memory=of_critic), "critic")
            memory = of_actor, of_critic
        value = mlp(critic, args.critic_sizes, 1, 1.0, "critic", args)
        policy = self.policy_of(actor, views.action_mask)
        shape = seen.mask.shape
        policy = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), policy)
        return policy, value.reshape(shape), memory

    def remember(self, x: Array, seen: Sequence, name: str) -> tuple[Array, Any]:
        """Returns what memory makes of rows x [R*L, D]: [R*L, H], and the memory [R, L, H]."""
        args = self.args
        init = kernel_init(2**0.5, args)
        x = nn.Dense(args.memory_size, kernel_init=init, name=f"{name}_into_memory")(x)
        x = getattr(nn, args.activation)(x).reshape(*seen.mask.shape, -1)
        x, memory = Memory(args, name=f"{name}_memory")(x, seen)
        return x.reshape(-1, args.memory_size), memory

    def policy_of(self, x: Array, action_mask: Array) -> "Gaussian | Categorical":
        """Returns the policy, leaves [R*L, U, ...], for features [R*L, ...]."""
        args = self.args
        actions, values = action_mask.shape[-2:]
        if not isinstance(self.action_space, spaces.Box):
            logits = mlp(x, args.hidden_sizes, actions * values, 0.01, "policy", args)
            logits = logits.reshape(action_mask.shape)
            return Categorical(logits=jnp.where(action_mask, logits, IMPOSSIBLE))
        mean = mlp(x, args.hidden_sizes, actions, 0.01, "mean", args)
        log_std = self.param("log_std", nn.initializers.zeros, (actions,), jnp.float32)
        log_std = jnp.broadcast_to(log_std + args.log_std_init, mean.shape)
        there = action_mask[..., 0]  # numbers that an agent does not have do not count
        log_std = jnp.where(there, log_std, ENTROPY_0)
        return Gaussian(mean=jnp.where(there, mean, 0), log_std=log_std)


class ActorCritic(nn.Module):
    """One pair of networks for all agents, or one for each type of them."""

    action_space: spaces.Space
    args: Args

    @nn.compact
    def __call__(self, seen: Sequence) -> tuple:
        """Returns the policy, values, and memory behind each step, leaves [R, L, ...]."""
        if self.args.num_types == 1:
            return Networks(self.action_space, self.args, name="shared")(seen)
        names = [f"type_{i}" for i in range(self.args.num_types)]
        every = [Networks(self.action_space, self.args, name=name)(seen) for name in names]
        answers = jax.tree.map(lambda *x: jnp.stack(x), *every)  # [types, R, L, ...]
        who = jnp.argmax(seen.obs.agent[:, 0], axis=-1)  # an agent's sequence is its own
        its_type = jnp.array(self.args.agent_types)[who]
        return jax.tree.map(lambda x: x[its_type, jnp.arange(len(who))], answers)


# --- Distribution ---
LOG_2_PI = math.log(2 * math.pi)
ENTROPY_0 = -0.5 * (1 + LOG_2_PI)  # log standard deviation of a Gaussian whose entropy is 0
IMPOSSIBLE = -1e9  # logit of what cannot be chosen


class Gaussian(NamedTuple):  # diagonal, leaves [..., U]
    mean: Array
    log_std: Array


class Categorical(NamedTuple):  # U choices of n options each
    logits: Array  # [..., U, n]


def draw_noise(key: Array, shape: tuple[int, ...], space: spaces.Space) -> Array:
    """Returns what sample_action takes for joint actions [A, U]: float32 [*shape, A, U], for
    choices [*shape, A, U, C]."""
    if isinstance(space, spaces.Box):
        return jax.random.normal(key, (*shape, *space.shape), jnp.float32)
    return jax.random.gumbel(key, (*shape, *space.shape, space.nvec.max()), jnp.float32)


def sample_action(policy: Gaussian | Categorical, noise: Array) -> Array:
    """Returns actions [..., U] from normal or Gumbel noise; noise 0 gives the most likely."""
    if isinstance(policy, Categorical):
        return jnp.argmax(policy.logits + noise, axis=-1).astype(jnp.int32)
    return policy.mean + jnp.exp(policy.log_std) * noise


def log_prob(policy: Gaussian | Categorical, action: Array) -> Array:
    """Returns the log density, or probability, [...] of actions [..., U]."""
    if isinstance(policy, Categorical):
        log_probs = jax.nn.log_softmax(policy.logits)
        chosen = jnp.take_along_axis(log_probs, action[..., None], axis=-1)
        return jnp.sum(chosen[..., 0], axis=-1)
    noise = (action - policy.mean) * jnp.exp(-policy.log_std)
    return jnp.sum(-0.5 * jnp.square(noise) - policy.log_std - 0.5 * LOG_2_PI, axis=-1)


def entropy(policy: Gaussian | Categorical) -> Array:
    """Returns the (differential) entropy [...] in nats."""
    if isinstance(policy, Categorical):
        log_probs = jax.nn.log_softmax(policy.logits)
        return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=(-2, -1))
    return jnp.sum(policy.log_std + 0.5 * (1 + LOG_2_PI), axis=-1)


def kl(old: Gaussian | Categorical, new: Gaussian | Categorical) -> Array:
    """Returns KL(old || new) [...] in nats, exactly."""
    if isinstance(old, Categorical):
        old_log_probs = jax.nn.log_softmax(old.logits)
        new_log_probs = jax.nn.log_softmax(new.logits)
        return jnp.sum(jnp.exp(old_log_probs) * (old_log_probs - new_log_probs), axis=(-2, -1))
    shift = (old.mean - new.mean) * jnp.exp(-new.log_std)
    log_ratio = old.log_std - new.log_std
    return jnp.sum(0.5 * (jnp.exp(2 * log_ratio) + jnp.square(shift) - 1) - log_ratio, axis=-1)


def spread(policy: Gaussian | Categorical, mask: Array) -> dict[str, Array]:
    """Returns metrics, scalars, of how undecided a policy is where mask is 1."""
    if isinstance(policy, Categorical):
        most_likely = jnp.max(jax.nn.softmax(policy.logits), axis=-1)
        return {"policy/most_likely": jnp.mean(masked_mean(most_likely, mask))}
    return {"policy/std": jnp.mean(masked_mean(jnp.exp(policy.log_std), mask))}


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


def normalize(x: Array, stats: RunningStats, bound: float) -> Array:
    """Returns x [..., *stats.mean.shape], centred, scaled to variance 1, clipped to +-bound."""
    return jnp.clip((x - stats.mean) / jnp.sqrt(stats.var + 1e-8), -bound, bound)


def all_finite(tree: Any) -> Array:
    """Returns whether no leaf has an element that is infinite or no number."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))


def prepare(views: Views, learner: LearnerState, args: Args) -> Views:
    """Returns views as networks take them: normalised and clipped."""
    return views._replace(
        actor=normalize(views.actor, learner.obs_stats, args.clip_obs),
        critic=normalize(views.critic, learner.critic_stats, args.clip_obs),
    )


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


def value_cost(error: Array, args: Args) -> Array:
    """Returns half the squares of errors of values, or their Huber loss.

    Source: Huber 1964, of MAPPO's code (arXiv 2103.01955).
    """
    if args.huber_delta is None:
        return 0.5 * jnp.square(error)
    return optax.huber_loss(error, delta=args.huber_delta)


def ppo_loss(
    params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args
) -> tuple[Array, dict[str, Array]]:
    """Returns the loss of a minibatch [B, L, ...], a scalar, and metrics, scalars.

    Source: arXiv 1707.06347, eq. 7; value clipping: baselines' ppo2.
    """
    policy, value, _ = network.apply(params, batch.obs)
    log_ratio = log_prob(policy, batch.action) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clip_coef = schedule.clip_coef

    policy_loss = -batch.advantage * ratio
    clipped_ratio = jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef)
    policy_loss = jnp.maximum(policy_loss, -batch.advantage * clipped_ratio)

    value_loss = value_cost(value - batch.target, args)
    if args.clip_vloss:
        clipped_value = batch.value + jnp.clip(value - batch.value, -clip_coef, clip_coef)
        value_loss = jnp.maximum(value_loss, value_cost(clipped_value - batch.target, args))

    samples = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
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


def minibatch_step(
    learner: LearnerState, batch: Batch, network: nn.Module, args: Args
) -> tuple[LearnerState, dict[str, Array]]:
    """Returns the learner after one gradient step on a minibatch [B, L, ...], and metrics."""
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
    gradient = jax.grad(ppo_loss, has_aux=True)
    grads, metrics = gradient(learner.params, batch, learner.schedule, network, args)
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
        batch: of the whole rollout, [R*T/L, L, ...].
        rollout: of this process's environments, normalised, for advantages that are recomputed.
    """
    learner = epochs.learner
    if args.recompute_advantages:
        _, *evaluated = evaluate_rollout(learner, rollout, network, args)
        advantage, target = as_sequences(gather_envs(evaluated, args), args)
        batch = batch._replace(advantage=advantage, target=target)

    def step(learner: LearnerState, rows: Array) -> tuple[LearnerState, dict[str, Array]]:
        minibatch = jax.tree.map(lambda x: x[rows], batch)  # [B, L, ...]
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


def as_sequences(tree: Any, args: Args) -> Any:
    """Returns leaves [T, R, ...] as sequences of L steps, [T*R/L, L, ...], never across rows."""

    def cut(x: Array) -> Array:
        x = x.reshape(-1, args.chunk_length, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(cut, tree)


def evaluate_rollout(
    learner: LearnerState, rollout: Transition, network: nn.Module, args: Args
) -> tuple[tuple, Array, Array]:
    """Returns (policy, values, memory), [T + 1, R, ...], advantages and targets, [T, R].

    Memory is that behind each step, from what entered the rollout on. Values in the first are as
    the network gives them, and so are targets: normalised, with --norm-value.
    """
    mask = jnp.concatenate([rollout.mask, jnp.ones_like(rollout.mask[:1])])
    memory = jax.tree.map(lambda x: x[0], rollout.memory)
    of_rows = partial(jax.tree.map, lambda x: x.swapaxes(0, 1))
    seen = of_rows(network.apply(learner.params, Sequence(*of_rows((rollout.obs, mask)), memory)))

    value = seen[1]
    stats = learner.value_stats
    deviation = jnp.sqrt(stats.var + 1e-8)
    if args.norm_value:
        value = value * deviation + stats.mean
    schedule = learner.schedule
    advantage, target = compute_gae(rollout, value, schedule.gamma, schedule.gae_lambda)
    if args.norm_value:
        target = (target - stats.mean) / deviation
    return seen, advantage, target


def make_batch(learner: LearnerState, rollout: Transition, network: nn.Module, args: Args) -> Batch:
    """Returns what the losses see of a normalised rollout: leaves [R*T/L, L, ...]."""
    seen, advantage, target = evaluate_rollout(learner, rollout, network, args)
    policy, value, behind = jax.tree.map(lambda x: x[:-1], seen)  # not of the last observation

    memory = jax.tree.map(lambda x, y: jnp.concatenate([x, y[:-1]]), rollout.memory, behind)
    batch = Batch(
        obs=Sequence(jax.tree.map(lambda x: x[:-1], rollout.obs), rollout.mask, memory),
        action=rollout.action,
        policy=policy,
        log_prob=log_prob(policy, rollout.action),
        value=value,
        advantage=advantage,
        target=target,
        mask=rollout.mask,
    )
    batch = as_sequences(gather_envs(batch, args), args)
    entering = jax.tree.map(lambda x: x[:, 0], batch.obs.memory)
    return batch._replace(obs=batch.obs._replace(memory=entering))


def anneal(learner: LearnerState, args: Args) -> Schedule:
    """Returns this iteration's schedule: what is annealed goes linearly to 0 over the run."""

    def left(x: Array) -> Array:
        return x - x * learner.iteration / args.num_iterations

    schedule = learner.schedule
    if args.anneal_lr:
        schedule = schedule._replace(learning_rate=left(schedule.learning_rate))
    if args.anneal_ent:
        schedule = schedule._replace(ent_coef=left(schedule.ent_coef))
    return schedule


def update_statistics(
    learner: LearnerState, rollout: Transition, args: Args
) -> dict[str, RunningStats]:
    """Returns the learner's statistics that also hold a raw rollout [T, R, ...], by name."""
    new = {}
    if args.norm_obs:
        views = jax.tree.map(lambda x: x[:-1], rollout.obs)
        new["obs_stats"] = update_stats(views.actor, learner.obs_stats, rollout.mask)
        new["critic_stats"] = update_stats(views.critic, learner.critic_stats, rollout.mask)
    if args.norm_reward:
        returns = rollout.discounted_return
        new["return_stats"] = update_stats(returns, learner.return_stats, rollout.mask)
    return new


def update_value_stats(learner: LearnerState, batch: Batch, args: Args) -> LearnerState:
    """Returns the learner whose statistics also hold a rollout's value targets.

    The critic's last layer is rescaled with them, so that its values, in the unit of rewards, stay
    what they are. Otherwise the values would be stretched, and so would the targets, which are made
    of values: where little else is in them, further with every update.

    Source: van Hasselt et al. 2016, arXiv 1602.07714, proposition 1 (PopArt).
    """
    old = learner.value_stats
    old_std = jnp.sqrt(old.var + 1e-8)
    new = update_stats(batch.target * old_std + old.mean, old, batch.mask)
    new_std = jnp.sqrt(new.var + 1e-8)

    def rescaled(path: tuple, x: Array) -> Array:
        layer, kind = (key.key for key in path[-2:])
        if layer != f"critic_{len(args.critic_sizes)}":
            return x
        x = x * old_std / new_std
        if kind == "bias":
            x = x + (old.mean - new.mean) / new_std
        return x

    params = jax.tree_util.tree_map_with_path(rescaled, learner.params)
    return learner._replace(params=params, value_stats=new)


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


def agents_as_rows(rollout: Transition) -> Transition:
    """Returns a rollout whose leaves [T, N, A, ...] are [T, N*A, ...]; what is the team's stays."""
    team = ("ended", "episodic_return", "episodic_length", "measure")
    agents = {name: x for name, x in rollout._asdict().items() if name not in team}
    rows = jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), agents)
    return rollout._replace(**rows)


def agent_metrics(rollout: Transition) -> dict[str, Array]:
    """Returns metrics, scalars, of each agent in the episodes that ended, NaN if there are none."""

    def mean(x: Array) -> Array:  # x may be NaN elsewhere
        return jnp.mean(x, where=rollout.ended > 0)

    own = rollout.own_return  # [T, N, A]
    metrics = {f"agents/episodic_return_{i}": mean(own[..., i]) for i in range(own.shape[-1])}
    metrics["agents/episodic_return_mean"] = mean(jnp.mean(own, axis=-1))
    metrics["agents/episodic_return_max"] = mean(jnp.max(own, axis=-1))
    metrics["agents/episodic_measure"] = mean(rollout.measure)
    return metrics


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
        rollout: of this process's environments, leaves [T, N / P, A, ...], observations
            [T + 1, N / P, A, ...], as the environment gave them.
    """
    own_rows = agents_as_rows(rollout)
    rollout = gather_envs(rollout, args)
    rows = agents_as_rows(rollout)

    # The policy acted on observations scaled by the old statistics; rewards take the new ones
    stats = update_statistics(learner, rows, args)
    scale = stats.get("return_stats", learner.return_stats)
    scale = scale._replace(mean=jnp.zeros_like(scale.mean))
    scaled = own_rows._replace(
        obs=prepare(own_rows.obs, learner, args),
        reward=normalize(own_rows.reward, scale, args.clip_reward),
    )

    given = learner.schedule
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
    metrics |= spread(batch.policy, batch.mask)
    metrics["policy/param_norm"] = optax.tree.norm(learner.params)
    metrics["policy/epochs"] = jnp.sum(ran)

    learner = learner._replace(**stats, schedule=given, iteration=learner.iteration + 1)
    if args.norm_value:
        learner = update_value_stats(learner, batch, args)
    must_be_finite = {  # in the order in which they arise, which is that of the alphabet
        "bad/1 the environment's observation": (rollout.obs.actor, rollout.obs.critic),
        "bad/2 the environment's reward": rollout.reward,
        "bad/3 the discounted return": rollout.discounted_return,
        "bad/4 a running statistic": (stats, learner.value_stats),
        "bad/5 a parameter of the network": (learner.params, learner.opt_state),
    }
    for name, tree in must_be_finite.items():
        metrics[name] = jnp.where(all_finite(tree), 0, learner.iteration)
    of_team = rollout._replace(done=rollout.ended, mask=jnp.ones_like(rollout.ended))
    learner, episode_metrics = count_episodes(learner, of_team)
    metrics |= episode_metrics | agent_metrics(rollout)
    return learner, metrics | rollout_samples(rows._replace(obs=rows.obs.actor))


# --- Environments ---
class TimeStep(NamedTuple):  # what teams show, leaves [S, N, A, ...]; one team's are [A, ...]
    obs: Array  # float32 [D]: the agent's own numbers, choices one-hot, then zeros
    action_mask: Array  # bool [U, C]: what may be chosen next; of numbers C = 1: which there are
    alive: Array  # bool, whether the agent acts in the next step: that step's mask
    reward: Array  # the agent's own, as the environment gives it, also after its end
    terminated: Array  # bool, at its own last step alone
    truncated: Array  # bool, likewise; never both
    score: Array  # [S, N], the team's reward
    state: Array  # [S, N, G], the environment's own; G = 0 where it shows none
    measure: Array  # [S, N], the task's own figure so far, NaN where there is none


class Environment(NamedTuple):  # S*N teams behind one function
    first: tuple[Any, TimeStep]  # env_state, and what it shows after a reset
    step: Callable[[Any, Array], tuple[Any, TimeStep]]  # (env_state, action [S, N, A, U])
    action_space: spaces.MultiDiscrete | spaces.Box  # of joint actions [A, U]
    team: "Team"
    threshold: float | None  # mean return of the team from which it counts as solved
    render: Callable | None  # env_state to a frame [height, width, 3] of the first


def make_env(args: Args, env_seeds: list[int]) -> Environment:
    """Returns one team per seed. Raises: InputError at unknown ids, and what cannot be taken."""
    sys.path.append(os.getcwd())  # where a user's module may be, wherever this script lies
    libraries = ("gymnax/", "brax/", "playground/")
    if args.env_id in envpool.list_all_envs() or args.env_id.startswith(libraries):
        raise InputError(f"--env-id {args.env_id} is {OF_ONE_AGENT}")
    if args.scenario and not args.env_id.startswith(("jumanji/", "jaxmarl/")):
        raise InputError("--scenario is jumanji's and jaxmarl's: see --env-kwargs")
    if args.native:
        env = make_native(args, env_seeds)
    else:
        if ":" not in args.env_id and not args.env_id.startswith("pettingzoo/"):
            require_known(args.env_id, gymnasium.registry)
        env = make_host(args, env_seeds)
    agents = len(env.team.names)
    if len(args.agent_types) not in (0, agents):
        raise InputError(f"--agent-types: {args.env_id} has {agents} agents: give one each")
    if args.critic_input == "state" and env.first[1].state.shape[-1] == 0:
        raise InputError(f"--critic-input state: {args.env_id} has none: leave it out")
    return env


def require_known(env_id: str, known: Iterable[str]) -> None:
    """Raises InputError at an id that is none of the known ones, naming the nearest."""
    known = set(known)
    if env_id not in known:
        nearest = ", ".join(difflib.get_close_matches(env_id, known)) or "none"
        raise InputError(f"--env-id {env_id} is unknown; nearest: {nearest}")


OF_ONE_AGENT = (
    "of one agent: see ppo_continuous.py for numbers as actions, ppo_icm_lstm.py for choices,"
    " ppo_atari.py for images"
)


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


def make_views(shown: TimeStep, args: Args) -> Views:
    """Returns what agents' networks see of a step, leaves [..., A, ...]."""
    obs = shown.obs
    *leading, agents, _ = obs.shape
    critic = obs
    if args.algorithm == "mappo" and args.critic_input != "local":
        common = obs.reshape(*leading, 1, -1)
        if args.critic_input != "joint" and shown.state.shape[-1]:
            common = shown.state[..., None, :]
        critic = jnp.broadcast_to(common, (*leading, agents, common.shape[-1]))
    agent = jnp.broadcast_to(jnp.eye(agents, dtype=jnp.float32), (*leading, agents, agents))
    return Views(
        actor=obs,
        critic=critic,
        agent=agent if agents > 1 else None,
        action_mask=shown.action_mask,
    )


# Agents and their spaces
class Team(NamedTuple):  # who plays; lists have a place for each agent
    names: list
    observation_spaces: list[spaces.Space]  # without masks of actions
    action_spaces: list[spaces.Space]
    joint: spaces.Space  # of actions, as the environment takes them
    action_space: spaces.MultiDiscrete | spaces.Box  # of actions, as policies give them: [A, U]
    masked: list[bool]  # whether its observations have a mask of actions beside them
    there: np.ndarray  # bool [A, U, C]: what each could do


def make_team(observations: spaces.Space, actions: spaces.Space) -> Team:
    """Returns the agents of two joint spaces. Raises: InputError where they cannot play."""
    observed = spaces_of_agents(observations)
    acted = spaces_of_agents(actions)
    if set(observed) != set(acted):
        raise InputError(f"agents {list(observed)} observe, and {list(acted)} act")
    own = [observed[name] for name in acted]
    masked = [isinstance(space, spaces.Dict) and has_mask(space.spaces) for space in own]
    for i in np.flatnonzero(masked):
        own[i] = spaces.Dict({k: x for k, x in own[i].items() if k != "action_mask"})
    size = sum(len(own_obs(x, None, np)) for x in own)  # refuses what networks cannot take
    if size == 0:
        raise InputError("agents' observations are empty")
    action_spaces = list(acted.values())
    joint = joint_action_space(action_spaces)
    there = everything(joint, action_spaces)
    return Team(list(acted), own, action_spaces, actions, joint, masked, there)


def has_mask(parts: Any) -> bool:
    """Returns whether there is a mask of actions among named parts."""
    return isinstance(parts, Mapping) and "action_mask" in parts


def spaces_of_agents(space: spaces.Space) -> dict[Any, spaces.Space]:
    """Returns each agent's space by its name, of a Dict, or its number, of any other joint space.

    Raises: InputError where it has no parts.
    """
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    if isinstance(space, spaces.Tuple):
        return dict(enumerate(space.spaces))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        pairs = zip(space.nvec, space.start, strict=True)
        return {i: spaces.Discrete(n, start=start) for i, (n, start) in enumerate(pairs)}
    if isinstance(space, spaces.Box) and space.shape:
        rows = zip(space.low, space.high, strict=True)
        return {i: spaces.Box(low, high, dtype=space.dtype) for i, (low, high) in enumerate(rows)}
    raise InputError(f"{space} is no joint space of several agents")


def ranges(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many values each number of a space of choices has, and its least ones: [U]."""
    if isinstance(space, spaces.Discrete):
        return np.array([space.n]), np.array([space.start])
    if isinstance(space, spaces.MultiDiscrete):
        return space.nvec.ravel(), space.start.ravel()
    if isinstance(space, spaces.MultiBinary):
        size = math.prod(space.shape)
        return np.full(size, 2), np.zeros(size, int)
    raise InputError(f"{space} is of no kind that networks can take")


def joint_action_space(own: list[spaces.Space]) -> spaces.MultiDiscrete | spaces.Box:
    """Returns the space of joint actions [A, U], U the most that an agent has.

    Choices count from 0, and one that an agent does not have has one value; numbers that it does
    not have are within -1 and 1. Raises: InputError where agents' actions are of both kinds.
    """
    kinds = {isinstance(space, spaces.Box) for space in own}
    if len(kinds) != 1:
        raise InputError(f"agents' actions are not all choices and not all numbers: {own}")
    shape = len(own), max(math.prod(space.shape or (1,)) for space in own)
    if 0 in shape:
        raise InputError(f"agents have nothing to do, their actions are empty: {own}")
    if kinds == {True}:
        low = -np.ones(shape)
        high = np.ones(shape)
        for i, space in enumerate(own):
            size = math.prod(space.shape)
            low[i, :size] = np.where(space.bounded_below, space.low, -np.inf).ravel()
            high[i, :size] = np.where(space.bounded_above, space.high, np.inf).ravel()
        return spaces.Box(low, high, dtype=np.float64)
    nvec = np.ones(shape, int)
    for i, space in enumerate(own):
        values, _ = ranges(space)
        nvec[i, : len(values)] = values
    return spaces.MultiDiscrete(nvec)


def everything(joint: spaces.MultiDiscrete | spaces.Box, own: list[spaces.Space]) -> np.ndarray:
    """Returns what agents with these spaces of actions may do without a mask, bool [A, U, C]."""
    if isinstance(joint, spaces.MultiDiscrete):
        return np.arange(joint.nvec.max()) < joint.nvec[..., None]
    sizes = np.array([math.prod(space.shape) for space in own])
    return (np.arange(joint.shape[1]) < sizes[:, None])[..., None]


def own_obs(space: spaces.Space, obs: Any, xp: ModuleType) -> Array:
    """Returns an observation, or zeros for None, as float32 [D]; choices are one-hot.

    Raises: InputError where it is none of its space, or networks cannot take any of it.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        keys = space.keys() if isinstance(space, spaces.Dict) else range(len(space))
        parts = [own_obs(space[key], None if obs is None else obs[key], xp) for key in keys]
        return xp.concatenate(parts) if parts else xp.zeros(0, "float32")
    numeric = isinstance(space, spaces.Box | spaces.MultiBinary)
    if obs is None:
        size = math.prod(space.shape) if numeric else ranges(space)[0].sum()
        return xp.zeros(size, "float32")
    obs = xp.asarray(obs)
    if obs.shape != space.shape:
        raise InputError(f"an observation has shape {obs.shape}, not {space}")
    if numeric:
        return obs.ravel().astype("float32")
    nvec, start = ranges(space)
    numbers = zip(obs.ravel(), nvec, start, strict=True)
    hot = xp.concatenate([x == xp.arange(least, least + n) for x, n, least in numbers])
    known = hot.sum() == len(nvec)
    if xp is np and not known:
        raise InputError(f"an observation is {obs}, which is none of {space}")
    return xp.where(known, hot.astype("float32"), np.float32(np.nan))  # NaN stops the run


def allowed(space: spaces.Space, mask: Any, there: np.ndarray, xp: ModuleType) -> Array:
    """Returns what an agent may do, bool [U, C]; where a choice has nothing allowed, all of it.

    Args:
        space: of its actions.
        mask: a place a value, one choice behind another, or a part a choice; None allows all.
        there: what it could do, bool [U, C].

    Raises: InputError where the mask is of another size.
    """
    if mask is None:
        return xp.asarray(there)
    if isinstance(space, spaces.Box):
        raise InputError(f"a mask is for choices, and actions are {space}")
    parts = mask if isinstance(mask, list | tuple) else [mask]
    flat = xp.concatenate([xp.ravel(xp.asarray(part)) for part in parts]) > 0
    size = ranges(space)[0].sum()
    if len(flat) != size:
        raise InputError(f"a mask has {len(flat)} places, and actions are {space}")
    place = np.cumsum(there).reshape(there.shape) - 1  # in the mask, of choices that it has
    given = flat[np.minimum(place, size - 1)] & there
    return given | (there & ~given.any(axis=-1, keepdims=True))


def env_action(action: Array, space: spaces.MultiDiscrete | spaces.Box, args: Args) -> Array:
    """Returns policies' joint actions [..., A, U] with numbers in [-1, 1] scaled to their bounds.

    Each agent's own part is clipped, rounded and cast where the environment gets it.
    """
    if isinstance(space, spaces.MultiDiscrete) or not args.scale_actions:
        return action
    bounded = (space.low > -1e30) & (space.high < 1e30)
    low = np.where(bounded, space.low, -1)
    high = np.where(bounded, space.high, 1)
    return np.float32(low / 2 + high / 2) + np.float32(high / 2 - low / 2) * action


def own_action(space: spaces.Space, row: Array, xp: ModuleType) -> Any:
    """Returns an agent's action, inside of its own space, from its row [U] of a joint action.

    Args:
        xp: numpy, or jax.numpy, whose dtypes have 32 bits.
    """
    dtype = space.dtype if xp is np else jax.dtypes.canonicalize_dtype(space.dtype)
    row = row[: math.prod(space.shape)].reshape(space.shape)
    if not isinstance(space, spaces.Box):
        _, start = ranges(space)
        return (row + start.reshape(space.shape)).astype(dtype)
    low = space.low.astype(dtype)
    high = space.high.astype(dtype)
    if np.issubdtype(dtype, np.integer):
        row = xp.rint(row)
    # Bounds of this dtype stay where they are in the cast, and what is between them, between them
    return xp.asarray(xp.clip(row, low, high)).astype(dtype)


def own_actions(action: Array, team: Team, xp: ModuleType) -> Any:
    """Returns actions as the environment takes them, of joint actions [A, U]."""
    own = [own_action(space, action[i], xp) for i, space in enumerate(team.action_spaces)]
    if isinstance(team.joint, spaces.Dict):
        return dict(zip(team.names, own, strict=True))
    return tuple(own) if isinstance(team.joint, spaces.Tuple) else xp.stack(own)


# Steps
class Shown(NamedTuple):  # what a step shows, each agent's: by name, in order, or one for all
    obs: Any  # of its space
    reward: Any
    terminated: Any
    truncated: Any
    info: Mapping  # "alive" and "action_mask", each agent's; "state", "score" and "measure"


class Presence(NamedTuple):  # of a team, bool [A]
    alive: Array  # who acts in the next step
    ended: Array  # who has had its end in this episode


def nobody(team: Team, xp: ModuleType) -> Presence:
    """Returns who is alive before a reset."""
    return Presence(xp.zeros(len(team.names), bool), xp.zeros(len(team.names), bool))


def one_for_all(values: Any) -> bool:
    """Returns whether agents do not have parts of their own."""
    return not isinstance(values, Mapping | list | tuple) and np.ndim(values) == 0


def of_agents(values: Any, team: Team) -> list:
    """Returns each agent's part of what is shown; None where it is missing."""
    names = team.names
    if isinstance(values, Mapping):
        return [values.get(name) for name in names]
    if one_for_all(values):
        return [values] * len(names)
    if len(values) != len(names):
        raise InputError(f"{len(names)} agents are shown {len(values)} parts")
    return [values[i] for i in range(len(names))]


def numbers(values: Any, needed: Array, what: str, team: Team, xp: ModuleType) -> Array:
    """Returns agents' numbers [A], zero where one is missing. Raises: InputError if needed."""
    found = of_agents(values, team)
    for i in missing(found, needed, what, team):
        found[i] = 0.0
    return xp.concatenate([xp.ravel(x) for x in found]).reshape(len(found))


def missing(found: list, needed: Array, what: str, team: Team) -> list[int]:
    """Returns which agents' parts are missing. Raises: InputError if needed, or on the device."""
    gaps = [i for i, x in enumerate(found) if x is None]
    for i in gaps:
        if isinstance(needed, Array) or needed[i]:  # on the device it is for good
            raise InputError(f"agent {team.names[i]} is shown no {what}")
    return gaps


def pack(shown: Shown, before: Presence, team: Team, xp: ModuleType) -> tuple[TimeStep, Presence]:
    """Returns a step of one team, leaves [A, ...], and who is alive behind it.

    An end is the agent's own, and its last until the next reset. One that is both is a termination,
    and so is that of an agent who is gone without a word.

    Args:
        before: who was alive; at a reset nobody.
        xp: numpy or jax.numpy.

    Raises: InputError where something is missing of who acted, or acts next.
    """
    obs, reward, terminated, truncated, info = shown
    acted = before.alive
    nobodys = xp.zeros_like(acted)
    present = numbers(info.get("alive", True), nobodys, "sign of life", team, xp) > 0
    stayed = acted & present
    said_terminated = acted & (numbers(terminated, stayed, "termination", team, xp) > 0)
    said_truncated = acted & (numbers(truncated, stayed, "truncation", team, xp) > 0)
    truncated = said_truncated & ~said_terminated
    ended = before.ended | said_terminated | truncated
    alive = present & ~ended
    terminated = acted & ~alive & ~truncated

    obs = of_agents(obs, team)
    masks = of_agents(info.get("action_mask"), team)
    missing(obs, alive | truncated, "observation", team)
    for i in np.flatnonzero(team.masked):
        masks[i] = None if obs[i] is None else obs[i]["action_mask"]
    allowances = zip(team.action_spaces, masks, team.there, strict=True)
    rows = [own_obs(own, x, xp) for own, x in zip(team.observation_spaces, obs, strict=True)]
    width = max(len(row) for row in rows)
    rewards = numbers(reward, acted, "reward", team, xp)
    total = reward if one_for_all(reward) else rewards.sum()
    time_step = TimeStep(
        obs=xp.stack([xp.concatenate([x, xp.zeros(width - len(x), "float32")]) for x in rows]),
        action_mask=xp.stack([allowed(*x, xp) for x in allowances]),
        alive=alive,
        reward=rewards.astype("float32"),
        terminated=terminated,
        truncated=truncated,
        score=xp.asarray(info.get("score", total), "float32"),
        state=xp.ravel(xp.asarray(info.get("state", ()), "float32")),
        measure=xp.asarray(info.get("measure", np.nan), "float32"),
    )
    return time_step, Presence(alive, ended | terminated)


# On the host
class Parallel(gymnasium.Env):
    """PettingZoo's parallel environment as one of Gymnasium, with spaces and values by agent."""

    def __init__(self, module: str, **kwargs: Any) -> None:
        self.inner = importlib.import_module(module).parallel_env(**kwargs)
        self.render_mode = kwargs.get("render_mode")
        names = self.inner.possible_agents
        observations = [(name, self.inner.observation_space(name)) for name in names]
        self.observation_space = spaces.Dict(OrderedDict(observations))  # a dict would be sorted
        actions = [(name, self.inner.action_space(name)) for name in names]
        self.action_space = spaces.Dict(OrderedDict(actions))

    def info(self, infos: dict) -> dict:
        """Returns agents' infos, and beside them who is there and the state, if any."""
        found = infos | {"alive": dict.fromkeys(self.inner.agents, True)}
        with suppress(NotImplementedError, AttributeError):
            found["state"] = self.inner.state()
        return found

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Returns what a reset shows."""
        obs, infos = self.inner.reset(seed=seed, options=options)
        return obs, self.info(infos)

    def step(self, action: dict) -> tuple:
        """Returns what a step shows, in which all act whom the environment lists, ended or not."""
        *found, infos = self.inner.step({name: action[name] for name in self.inner.agents})
        return *found, self.info(infos)

    def render(self) -> Any:
        """Returns a frame."""
        return self.inner.render()

    def close(self) -> None:
        """Ends the environment, where it is of a kind that has to be ended."""
        if hasattr(self.inner, "close"):
            self.inner.close()


class HostTeam(gymnasium.Wrapper):
    """An environment with joint spaces as one that shows TimeSteps, as dicts of float32 [A, ...].

    So whatever is each agent's comes through Gymnasium's vector environments whole. Of its info it
    reads "alive", "state", "measure" and "action_mask", which may also be in agents' own infos.
    """

    def __init__(self, env: gymnasium.Env, trainer: int) -> None:
        super().__init__(env)
        if os.getpid() != trainer:  # which alone heeds signals
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.modules["__main__"].InputError = InputError  # by this name it can be sent there
        if env.has_wrapper_attr("augment_observation"):
            raise InputError("augment_observation is ppo_icm_lstm.py's")
        space = env.action_space
        if not isinstance(space, spaces.Tuple | spaces.Dict):
            raise InputError(f"{space} is {OF_ONE_AGENT}")
        self.team = make_team(env.observation_space, space)
        self.action_space = self.team.action_space
        first, _ = self.reset()  # refuses what cannot be taken, and says the state's size
        bounds = {name: spaces.Box(-np.inf, np.inf, x.shape) for name, x in first.items()}
        self.observation_space = spaces.Dict(bounds)

    def reset(self, **options: Any) -> tuple[dict, dict]:
        """Returns the first TimeStep of an episode."""
        obs, info = self.env.reset(**options)
        self.presence = nobody(self.team, np)
        first = self.show(obs, 0.0, False, False, info)
        if not first["alive"].any():
            raise InputError("no agent is there after a reset")
        return first, {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Returns a TimeStep, for joint actions [A, U]."""
        new = self.show(*self.env.step(own_actions(action, self.team, np)))
        return new, 0.0, not new["alive"].any(), False, {}

    def show(self, obs: Any, reward: Any, terminated: Any, truncated: Any, info: dict) -> dict:
        """Returns a TimeStep as a dict."""
        own = {k: x["action_mask"] for k, x in info.items() if has_mask(x)}
        known = {"alive", "state", "measure", "action_mask"}.difference(self.team.names)
        read = {k: info[k] for k in known if k in info}
        for name in ("state", "measure"):  # others may use these words, too
            if name in read and np.asarray(read[name]).dtype.kind not in "biuf":
                del read[name]
        shown = Shown(obs, reward, terminated, truncated, {"action_mask": own} | read)
        time_step, self.presence = pack(shown, self.presence, self.team, np)
        return {name: np.asarray(x, np.float32) for name, x in time_step._asdict().items()}


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


def open_host(env_id: str, kwargs: dict, trainer: int) -> HostTeam:
    """Returns PettingZoo's module of an id pettingzoo/module, or Gymnasium's environment."""
    library, _, module = env_id.partition("/")
    try:
        if library == "pettingzoo":
            env = Parallel(module, **kwargs)
        else:
            env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except (ModuleNotFoundError, gymnasium.error.UnregisteredEnv) as error:
        raise InputError(f"--env-id {env_id}: {error}") from error
    return HostTeam(env, trainer)


def make_host(args: Args, env_seeds: list[int]) -> Environment:
    """Returns teams on the host, called in order from the compiled rollout."""
    size = len(env_seeds)
    make = partial(open_host, args.env_id, json.loads(args.env_kwargs), os.getpid())
    probe = make()  # in this process, for its errors
    team = probe.team
    threshold = getattr(probe.unwrapped.spec, "reward_threshold", None)
    probe.close()
    if args.vectorization == "async":
        # A fork of this process could not use JAX itself
        vector = gymnasium.vector.AsyncVectorEnv([make] * size, context="forkserver")
    else:
        vector = gymnasium.vector.SyncVectorEnv([make] * size)

    def by_seed(shown: dict) -> TimeStep:
        shape = len(args.members), size // len(args.members)
        shown = {name: x.reshape(*shape, *x.shape[1:]) for name, x in shown.items()}
        boolean = ("action_mask", "alive", "terminated", "truncated")
        return TimeStep(**shown | {name: shown[name] > 0 for name in boolean})

    def host_step(action: Array) -> TimeStep:
        with called_upon(vector):
            shown, *_ = vector.step(np.asarray(action).reshape(size, *team.action_space.shape))
        return by_seed(shown)

    def step(env_state: tuple, action: Array) -> tuple[tuple, TimeStep]:
        return env_state, io_callback(host_step, shapes, action, ordered=True)

    with called_upon(vector):
        shown, _ = vector.reset(seed=env_seeds)
    first = by_seed(shown)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)
    return Environment(
        first=((), first),
        step=step,
        action_space=team.action_space,
        team=team,
        threshold=threshold,
        render=lambda _: np.asarray(vector.render()[0]),
    )


# On the device
class Task(NamedTuple):  # one team in JAX, as pure functions
    team: Team
    reset: Callable  # key to (Shown, state)
    step: Callable  # (key, state, action), as the joint space has actions, to (Shown, state)
    render: Callable | None = None  # state to a frame [height, width, 3]
    threshold: float | None = None  # mean return of the team from which it counts as solved


def jumanji_task(env: Any) -> Task:
    """Returns Jumanji's RobotWarehouse or LevelBasedForaging.

    Its clock is ours: at its time limit RobotWarehouse says what it says at a collision.
    """
    limit = env.time_limit
    env.time_limit = 2**31 - 1
    view = spaces.Box(-np.inf, np.inf, env.observation_spec.agents_view.shape)
    team = make_team(view, spaces.MultiDiscrete(np.asarray(env.action_spec.num_values)))
    os.environ.setdefault("MPLBACKEND", "agg")  # no window is opened
    size = (env.grid_size, env.goals) if hasattr(env, "goals") else (env.grid_size,)
    viewer = type(env._viewer)(*size, render_mode="rgb_array")

    def show(time_step: Any) -> Shown:
        seen = time_step.observation
        eaten = time_step.extras.get("percent_eaten", np.nan)
        info = {"action_mask": seen.action_mask, "measure": eaten / 100}
        truncated = seen.step_count >= limit
        return Shown(seen.agents_view, time_step.reward, time_step.last(), truncated, info)

    def reset(key: Array) -> tuple[Shown, Any]:
        state, time_step = env.reset(key)
        return show(time_step), state

    def step(key: Array, state: Any, action: Array) -> tuple[Shown, Any]:
        state, time_step = env.step(state, action)
        return show(time_step), state

    return Task(team, reset, step, lambda state: np.asarray(viewer.render(state))[..., :3])


def jaxmarl_task(env: Any) -> Task:
    """Returns a JaxMARL environment, such as MPE's and SMAX's.

    An end that it would not have without its clock is a truncation.
    """
    obs, state = jax.eval_shape(env.reset, jax.random.PRNGKey(0))
    observed = [(x, spaces.Box(-np.inf, np.inf, obs[x].shape)) for x in env.agents]
    acted = [(x, gym_space(env.action_space(x))) for x in env.agents]
    team = make_team(spaces.Dict(OrderedDict(observed)), spaces.Dict(OrderedDict(acted)))
    has_clock = hasattr(env, "max_steps")
    if not has_clock:
        note(f"{type(env).__name__} has no max_steps: whatever ends it counts as a termination")
    masked = False
    with suppress(NotImplementedError):
        jax.eval_shape(env.get_avail_actions, state)
        masked = isinstance(team.action_space, spaces.MultiDiscrete)

    def more(obs: dict, state: Any) -> dict:
        masks = env.get_avail_actions(state) if masked else None
        return {"action_mask": masks, "state": obs.get("world_state", ())}

    def ends_without_clock(key: Array, state: Any, action: dict, new: Any) -> Array:
        if hasattr(env, "is_terminal"):
            return env.is_terminal(without_clock(new))
        _, _, _, done, _ = env.step_env(key, without_clock(state), action)
        return done["__all__"]

    def reset(key: Array) -> tuple[Shown, Any]:
        obs, state = env.reset(key)
        return Shown(obs, 0.0, False, False, more(obs, state)), state

    def step(key: Array, state: Any, action: dict) -> tuple[Shown, Any]:
        obs, new, reward, done, _ = env.step_env(key, state, action)
        reward = jnp.stack([reward[name] for name in env.agents])  # without the "__all__" of some
        own = jnp.stack([done[name] for name in env.agents])
        over = done["__all__"]
        truncated = jnp.bool_(False)
        if has_clock:
            truncated = over & ~ends_without_clock(key, state, action, new)
        own &= ~(truncated & jnp.all(own))  # all at once are the clock's
        terminated = own | (over & ~truncated)
        info = more(obs, new)
        if hasattr(env, "won_battle_bonus"):  # SMAX's
            info["measure"] = jnp.max(reward) >= env.won_battle_bonus
        return Shown(obs, reward, terminated, truncated, info), new

    return Task(team, reset, step)


def without_clock(state: Any) -> Any:
    """Returns a JaxMARL state, also inside of a wrapper's, as one of an episode's beginning."""
    if not hasattr(state, "step"):
        return state.replace(state=without_clock(state.state))
    return state.replace(step=jnp.zeros_like(state.step), done=jnp.zeros_like(state.done))


def gym_space(space: Any) -> spaces.Space:
    """Returns a JaxMARL space of actions as Gymnasium has it."""
    if hasattr(space, "n"):
        return spaces.Discrete(int(space.n))
    if hasattr(space, "num_categories"):
        return spaces.MultiDiscrete(np.asarray(space.num_categories))
    return spaces.Box(
        np.broadcast_to(space.low, space.shape), np.broadcast_to(space.high, space.shape)
    )


def own_task(env: Any) -> Task:
    """Returns a user's team: `reset`, `step` and two joint spaces of Gymnasium.

    reset(key) gives (obs, state); step(key, state, action) gives (obs, state, reward, terminated,
    truncated, info). What is each agent's is as its joint space is: a dict, a tuple, or an array
    [A, ...]; the three behind state may be one for all. Observations may also be a dict with "obs",
    which is that, and what a Shown's info has; with "reward", that is each agent's, and the step's
    is the team's.
    """
    space = env.observation_space
    whole = isinstance(space, spaces.Dict) and "obs" in space.spaces

    def show(obs: Any, reward: Any, terminated: Any, truncated: Any) -> Shown:
        if not whole:
            return Shown(obs, reward, terminated, truncated, {})
        info = dict(obs)
        if "reward" in obs:
            info["score"] = reward
        return Shown(obs["obs"], obs.get("reward", reward), terminated, truncated, info)

    def reset(key: Array) -> tuple[Shown, Any]:
        obs, state = env.reset(key)
        return show(obs, 0.0, False, False), state

    def step(key: Array, state: Any, action: Any) -> tuple[Shown, Any]:
        obs, state, reward, terminated, truncated, _ = env.step(key, state, action)
        return show(obs, reward, terminated, truncated), state

    team = make_team(space["obs"] if whole else space, env.action_space)
    optional = {name: getattr(env, name, None) for name in ("render", "threshold")}
    return Task(team, reset, step, **optional)


WAREHOUSES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5)}  # rows, columns


def robot_warehouse(scenario: str) -> dict:
    """Returns the generator's settings of a name such as tiny-2ag or small-4ag-easy.

    Source: Papoudakis et al. 2020, arXiv 2006.07869, appendix; requests are as many as agents,
    twice as many in -easy and half in -hard.
    """
    found = re.fullmatch(r"([a-z]+)-(\d+)ag(-easy|-hard)?", scenario)
    if not found:
        raise ValueError(scenario)
    size, agents, level = found.groups()
    count = int(agents)
    requests = {None: count, "-easy": 2 * count, "-hard": count // 2}[level]
    shelf_rows, shelf_columns = WAREHOUSES[size]
    return {
        "shelf_rows": shelf_rows,
        "shelf_columns": shelf_columns,
        "column_height": 8,
        "num_agents": count,
        "sensor_range": 1,
        "request_queue_size": requests,
    }


def foraging(scenario: str) -> dict:
    """Returns the generator's settings of a name such as 2s-8x8-2p-2f-coop or 15x15-4p-3f.

    2s is how far agents see, the whole field without; 8x8, 2p and 2f are the field's size, the
    numbers of agents and of food; coop: food needs all of them.
    """
    found = re.fullmatch(r"(?:(\d+)s-)?(\d+)x\2-(\d+)p-(\d+)f(-coop)?", scenario)
    if not found:
        raise ValueError(scenario)
    sight, grid, agents, food, coop = found.groups()
    return {
        "grid_size": int(grid),
        "fov": int(sight or grid),
        "num_agents": int(agents),
        "num_food": int(food),
        "max_agent_level": 2,
        "force_coop": coop is not None,
    }


JUMANJI = {  # its teams: how to read a scenario, and where its generator is
    "RobotWarehouse-v0": (robot_warehouse, "robot_warehouse"),
    "LevelBasedForaging-v0": (foraging, "lbf"),
}


def open_jumanji(name: str, kwargs: dict, scenario: str) -> Task:
    """Returns Jumanji's environment; kwargs' "generator" are settings of its generator.

    Raises: InputError at a scenario that it does not have.
    """
    require_known(f"jumanji/{name}", [f"jumanji/{x}" for x in JUMANJI])
    read, module = JUMANJI[name]
    settings = kwargs.pop("generator", {})
    try:
        settings = (read(scenario) if scenario else {}) | settings
    except (KeyError, ValueError) as error:
        raise InputError(f"--scenario {scenario} is none of {name}'s: see --help") from error
    if settings:
        generator = importlib.import_module(f"jumanji.environments.routing.{module}.generator")
        kwargs["generator"] = generator.RandomGenerator(**settings)
    return jumanji_task(importlib.import_module("jumanji").make(name, **kwargs))


def open_jaxmarl(name: str, kwargs: dict, scenario: str) -> Task:
    """Returns JaxMARL's environment; a scenario is one of SMAX's maps."""
    jaxmarl = importlib.import_module("jaxmarl")
    require_known(f"jaxmarl/{name}", [f"jaxmarl/{x}" for x in jaxmarl.registered_envs])
    if scenario:
        maps = importlib.import_module("jaxmarl.environments.smax")
        kwargs["scenario"] = maps.map_name_to_scenario(scenario)
    return jaxmarl_task(jaxmarl.make(name, **kwargs))


def open_own(name: str, kwargs: dict, _: str) -> Task:
    """Returns what a user's factory, "module:function", makes: own_task's kind, or JaxMARL's."""
    module, _, function = name.partition(":")
    factory = getattr(importlib.import_module(module), function, None)
    if factory is None:
        raise InputError(f"--env-id jax:{name}: {module} has no function {function or 'named'}")
    env = factory(**kwargs)
    return jaxmarl_task(env) if hasattr(env, "step_env") else own_task(env)


NATIVE = {  # by the beginning of --env-id
    "jumanji/": open_jumanji,
    "jaxmarl/": open_jaxmarl,
    "jax:": open_own,
}


class NativeState(NamedTuple):  # of teams in JAX, leaves [S, N, ...]
    key: Array
    task: Any
    presence: Presence


def over_envs(function: Callable) -> Callable:
    """Returns a function of one environment as one of all, [S, N, ...]."""
    return jax.vmap(jax.vmap(function))


def begin(key: Array, task: Task) -> tuple[Any, tuple[TimeStep, Presence]]:
    """Returns one team's state after a reset, and what it shows."""
    shown, state = task.reset(key)
    return state, pack(shown, nobody(task.team, jnp), task.team, jnp)


def go_on(
    key: Array, state: Any, presence: Presence, action: Array, task: Task
) -> tuple[Any, tuple[TimeStep, Presence]]:
    """Returns one team's state after a step with joint actions [A, U], and what it shows."""
    shown, new = task.step(key, state, own_actions(action, task.team, jnp))
    state = jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)
    return state, pack(shown, presence, task.team, jnp)


def open_task(args: Args) -> Task:
    """Returns the team in JAX of --env-id. Raises: InputError where it is not sound.

    Its reset's state has the dtypes that a step returns, where these hold more.
    """
    prefix = next(x for x in NATIVE if args.env_id.startswith(x))
    kwargs = json.loads(args.env_kwargs)
    try:
        task = NATIVE[prefix](args.env_id.removeprefix(prefix), kwargs, args.scenario)
    except ModuleNotFoundError as error:
        raise InputError(f"--env-id {args.env_id}: {error}: pip install it") from error
    action = own_actions(jnp.zeros(task.team.action_space.shape), task.team, jnp)
    while True:
        _, state = jax.eval_shape(task.reset, jax.random.PRNGKey(0))
        _, stepped = jax.eval_shape(task.step, jax.random.PRNGKey(0), state, action)
        shapes = [jax.tree.map(np.shape, x) for x in (state, stepped)]
        if shapes[0] != shapes[1]:
            where = f"--env-id {args.env_id}: a step returns shapes {shapes[1]}"
            raise InputError(f"{where}, but reset {shapes[0]}")
        if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)):
            keep = "keep jax.random.key_data of it"
            raise InputError(f"--env-id {args.env_id}: its state has a typed key: {keep}")
        wide = jax.tree.map(lambda x, y: jnp.promote_types(x.dtype, y.dtype), state, stepped)
        if wide == jax.tree.map(lambda x: x.dtype, state):
            return task
        task = task._replace(reset=partial(widened_reset, reset=task.reset, dtypes=wide))


def widened_reset(key: Array, reset: Callable, dtypes: Any) -> tuple:
    """Returns (obs, state) of a reset, the state in these dtypes."""
    obs, state = reset(key)
    return obs, jax.tree.map(jnp.asarray, state, dtypes)


def make_native(args: Args, env_seeds: list[int]) -> Environment:
    """Returns teams in JAX: pure functions, to be compiled into the training loop."""
    task = open_task(args)
    keys = over_envs(jax.random.PRNGKey)(np.uint32(env_seeds).reshape(len(args.members), -1))
    keys, reset_keys = jnp.moveaxis(over_envs(jax.random.split)(keys), 2, 0)
    state, (time_step, presence) = jax.jit(over_envs(partial(begin, task=task)))(reset_keys)

    def render(env_state: NativeState) -> np.ndarray:
        return task.render(jax.tree.map(lambda x: x[0, 0], env_state.task))

    return Environment(
        first=(NativeState(keys, state, presence), time_step),
        step=partial(step_teams, task=task),
        action_space=task.team.action_space,
        team=task.team,
        threshold=task.threshold,
        render=task.render and render,
    )


def step_teams(env_state: NativeState, action: Array, task: Task) -> tuple[NativeState, TimeStep]:
    """Returns teams in JAX after a step, which only resets those whose episode is over."""
    over = ~jnp.any(env_state.presence.alive, axis=-1)
    keys = over_envs(partial(jax.random.split, num=3))(env_state.key)
    keys, step_keys, reset_keys = jnp.moveaxis(keys, 2, 0)
    step = over_envs(partial(go_on, task=task))
    stepped = step(step_keys, env_state.task, env_state.presence, action)

    def choose(fresh: Array, old: Array) -> Array:
        return jnp.where(over.reshape(*over.shape, *(1,) * (old.ndim - 2)), fresh, old)

    def reset(old: tuple) -> tuple:
        return jax.tree.map(choose, over_envs(partial(begin, task=task))(reset_keys), old)

    state, (time_step, presence) = jax.lax.cond(jnp.any(over), reset, lambda old: old, stepped)
    return NativeState(keys, state, presence), time_step


# --- Rollout ---
class RunnerState(NamedTuple):  # the carry of the rollout, leaves [S, N, ...]
    env_state: Any
    time_step: TimeStep
    episodic_return: Array  # the team's
    episodic_length: Array
    own_return: Array  # [S, N, A]
    discounted_return: Array  # [S, N, A]
    memory: Any  # leaves [S, N, A, H]; () without recurrence


def first_runner(run: "Run") -> RunnerState:
    """Returns the runner before the first step."""
    env_state, time_step = run.env.first
    zeros = jnp.zeros(time_step.reward.shape, jnp.float32)
    return RunnerState(
        env_state=env_state,
        time_step=time_step,
        episodic_return=zeros[..., 0],
        episodic_length=zeros[..., 0],
        own_return=zeros,
        discounted_return=zeros,
        memory=empty_memory(zeros.shape, run.args),
    )


def choose_action(
    views: Views, memory: Any, noise: Array, learner: LearnerState, network: nn.Module, args: Args
) -> tuple[Array, Any]:
    """Returns sampled joint actions [S, N, A, U], and memory behind them, leaves [S, N, A, H].

    Args:
        noise: for sample_action, [S, N, A, ...].
        learner: leaves [S, ...].
    """

    def rows(x: Array) -> Array:  # [S, N, A, ...] to [S, R, ...]
        return x.reshape(len(x), -1, *x.shape[3:])

    views = jax.vmap(partial(prepare, args=args))(views, learner)
    seen = Sequence(
        obs=jax.tree.map(lambda x: rows(x)[:, :, None], views),  # sequences of one step
        mask=jnp.ones((*rows(views.actor).shape[:2], 1), jnp.float32),
        memory=jax.tree.map(rows, memory),
    )
    policy, _, memory = jax.vmap(network.apply)(learner.params, seen)
    shape = views.actor.shape[:3]
    policy, memory = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[3:]), (policy, memory))
    return sample_action(policy, noise), memory


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
        noise: for sample_action, [S, N, A, ...].
        learner: leaves [S, ...].
    """
    last = runner.time_step
    views = make_views(last, args)
    action, memory = choose_action(views, runner.memory, noise, learner, network, args)
    env_state, new = env.step(runner.env_state, env_action(action, env.action_space, args))

    # After an episode's end the environment has only reset itself, and the dead do nothing
    goes_on = jnp.any(last.alive, axis=-1)
    mask = last.alive.astype(jnp.float32)
    reward = new.reward
    if args.team_reward:
        reward = jnp.broadcast_to(new.score[..., None], reward.shape)
    ended = goes_on & ~jnp.any(new.alive, axis=-1)
    terminated, truncated = new.terminated, new.truncated
    if args.death == "continues":  # the team's end is everybody's, cut off if it is for somebody
        cut = jnp.any(truncated, axis=-1)
        terminated = jnp.broadcast_to((ended & ~cut)[..., None], terminated.shape)
        truncated = jnp.broadcast_to((ended & cut)[..., None], terminated.shape)
    discounted = learner.schedule.gamma[:, None, None] * runner.discounted_return + reward
    runner = RunnerState(
        env_state=env_state,
        time_step=new,
        episodic_return=(runner.episodic_return + new.score) * goes_on,
        episodic_length=(runner.episodic_length + 1) * goes_on,
        own_return=(runner.own_return + new.reward) * goes_on[..., None],
        discounted_return=discounted * goes_on[..., None],
        memory=jax.tree.map(lambda x: x * mask[..., None], memory),
    )
    transition = Transition(
        obs=views,
        action=action,
        reward=reward,
        terminated=terminated.astype(jnp.float32),
        done=(terminated | truncated).astype(jnp.float32),
        mask=mask,
        discounted_return=runner.discounted_return,
        own_return=runner.own_return,
        ended=ended.astype(jnp.float32),
        episodic_return=runner.episodic_return,
        episodic_length=runner.episodic_length,
        measure=new.measure,
        memory=(),
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

    Observations are [S, T + 1, N, A, ...]: the last are those that the rollout ended on.

    Args:
        first_env: of a seed's num_envs environments, which one the runner's begin with. Noise is
            the same for an environment, however many processes or devices share them out.
    """
    envs = runner.time_step.reward.shape[1]

    def draw(key: Array) -> Array:
        noise = draw_noise(key, (args.num_steps, args.num_envs), env.action_space)
        noise *= not (args.mode == "eval" and args.deterministic)
        return jax.lax.dynamic_slice_in_dim(noise, first_env, envs, axis=1)

    # Even numbers are folded in for rollouts, odd ones for updates
    keys = jax.vmap(jax.random.fold_in)(learner.key, 2 * learner.iteration)
    noise = jax.vmap(draw, out_axes=1)(keys)  # [T, S, N, A, ...]
    step = partial(env_step, learner=learner, env=env, network=network, args=args)
    memory = jax.tree.map(lambda x: x[None], runner.memory)
    runner, transition = jax.lax.scan(step, runner, noise)
    last = make_views(runner.time_step, args)
    obs = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), transition.obs, last)
    by_seed = partial(jnp.swapaxes, axis1=0, axis2=1)
    return runner, jax.tree.map(by_seed, transition._replace(obs=obs, memory=memory))


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
    """Returns a member's new learner, for teams that show what `shown` is like, [A, ...].

    Args:
        varied: the settings in which a grid's members differ.
    """
    given = dict(args) | varied
    key = jax.random.PRNGKey(seed)
    views = jax.tree.map(lambda x: jnp.zeros_like(x[0]), make_views(shown, args))
    one_step = jax.tree.map(lambda x: x[None, None], views)
    mask = jnp.ones((1, 1), jnp.float32)
    params = network.init(key, Sequence(one_step, mask, empty_memory((1,), args)))
    few = jnp.float32(1e-4)

    def no_stats(x: Array) -> RunningStats:
        zeros = jnp.zeros(x.shape, jnp.float32)
        return RunningStats(mean=zeros, var=zeros + 1, count=few)

    return LearnerState(
        params=params,
        opt_state=make_optimizer(args).init(params),
        obs_stats=no_stats(views.actor),
        critic_stats=no_stats(views.critic),
        return_stats=no_stats(few),
        value_stats=no_stats(few),
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

    Takes a joint observation, as the environment gives it, or a list of them, and returns as many
    joint actions, as the environment takes them: the most likely ones, or samples, with
    deterministic=False. Agents without an observation are not alive; their actions mean nothing.
    Masks of actions that are not in observations are its `action_mask`. With recurrence it is
    `action, memory = policy(obs, memory)`; None at an episode's beginning. The environment is
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
    learner = jax.tree.map(lambda x: x[index : index + 1], read_learner(args, run, best))
    team = run.env.team
    space = run.env.action_space
    state = np.zeros(run.env.first[1].state.shape[-1])  # which only critics see
    random = np.random.default_rng()

    @partial(jax.jit, static_argnames="deterministic")
    def act(shown: TimeStep, memory: Any, key: Array, deterministic: bool) -> tuple[Array, Any]:
        noise = draw_noise(key, shown.alive.shape[:2], space) * (not deterministic)
        views = make_views(shown, args)
        action, memory = choose_action(views, memory, noise, learner, run.network, args)
        return env_action(action, space, args), memory

    def show(obs: Any, action_mask: Any) -> TimeStep:
        alive = [x is not None for x in of_agents(obs, team)]
        if not any(alive):
            raise InputError(f"an observation has a part for none of {team.names}")
        info = {"alive": alive, "action_mask": action_mask, "state": state}
        shown, _ = pack(Shown(obs, 0.0, False, False, info), nobody(team, np), team, np)
        return shown

    def policy(
        obs: Any, memory: Any = None, action_mask: Any = None, deterministic: bool = True
    ) -> Any:
        alone = not isinstance(obs, list)
        every = [obs] if alone else obs
        masks = [action_mask] if alone else action_mask or [None] * len(every)
        shown = [show(*x) for x in zip(every, masks, strict=True)]
        shown = jax.tree.map(lambda *x: np.stack(x)[None], *shown)  # [1, B, A, ...]
        if not all_finite(shown.obs):
            raise InputError("an observation is not finite, or not of its space")
        if memory is None:
            memory = empty_memory(shown.alive.shape, args)
        with beside_environments(args):
            key = jax.random.PRNGKey(random.integers(2**31))
            rows, memory = act(shown, memory, key, deterministic)
        action = [own_actions(row, team, np) for row in np.asarray(rows)[0]]
        action = action[0] if alone else action
        return (action, memory) if memory else action

    return policy


class Score(NamedTuple):  # of an episode
    team: float  # the return of all agents
    agents: np.ndarray  # each one's, [A]
    measure: float  # the task's own figure, NaN where it has none


def play(run: Run, learner: LearnerState) -> list[list[Score]]:
    """Returns the scores of eval_episodes episodes for each seed.

    Every environment plays as many, so that short episodes weigh no more than long ones; one whose
    episode does not end plays no further one.
    """
    args = run.args
    scores = [[] for _ in args.members]
    left = np.full((len(args.members), args.num_envs), args.eval_episodes // args.num_envs)
    runner = first_runner(run)
    while left.any():
        runner, transition = run.act(runner, learner)
        learner = learner._replace(iteration=learner.iteration + 1)  # of other noise
        ended = transition.ended > 0
        for seed, step, env in np.argwhere(ended):
            if left[seed, env]:
                left[seed, env] -= 1
                scores[seed].append(score_at(transition, (seed, step, env)))
        endless = (transition.episodic_length[:, -1] >= args.eval_steps) & ~ended[:, -1]
        for seed, env in np.argwhere(endless & (left > 0)):
            left[seed, env] = 0
            scores[seed].append(score_at(transition, (seed, -1, env)))
            note(f"an episode has not ended after --eval-steps {args.eval_steps}: it counts so far")
    return scores


def score_at(transition: Transition, place: tuple) -> Score:
    """Returns what an episode came to by a place in a rollout [S, T, N, ...]."""
    team = float(transition.episodic_return[place])
    return Score(team, transition.own_return[place], float(transition.measure[place]))


def summary(scores: list[Score]) -> dict[str, Any]:
    """Returns what a seed's episodes came to: means over them, and the team's spread."""
    team = [score.team for score in scores]
    agents = np.stack([score.agents for score in scores])  # [episodes, A]
    measure = float(np.mean([score.measure for score in scores]))
    row = {
        "mean": float(np.mean(team)),
        "std": float(np.std(team)),
        "episodes": len(scores),
        "agents": agents.mean(axis=0).tolist(),
        "agents_mean": float(agents.mean()),
        "agents_max": float(agents.max(axis=1).mean()),
    }
    if not math.isnan(measure):
        row["measure"] = measure
    return row


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
        raise InputError(f"--video, --render: {args.env_id} has no pictures of itself")
    learner = read_learner(args, run, args.use_best)
    rows = []
    width = max(len(member_name(member)) for member in args.members)
    for member, scores in zip(args.members, play(run, learner), strict=True):
        row = summary(scores)
        team = [score.team for score in scores]
        line = f"{member_name(member):{width}}: return {row['mean']:.2f} +- {row['std']:.2f}"
        line += f" over {len(team)} episodes, {min(team):.2f} to {max(team):.2f}"
        line += f"; agents {' '.join(f'{x:.2f}' for x in row['agents'])}"
        line += f", mean {row['agents_mean']:.2f}, best {row['agents_max']:.2f}"
        if "measure" in row:
            line += f"; measure {row['measure']:.2f}"
        print(line, flush=True)
        rows.append(row)
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
