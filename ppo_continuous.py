# /// script
# requires-python = ">=3.11"
# dependencies = ["jax>=0.10", "flax>=0.12", "optax>=0.2.6", "orbax-checkpoint>=0.11.30", "tyro>=0.9", "tqdm>=4.66",
#   "envpool>=1.2", "gymnasium[box2d,mujoco]>=1.2", "tensorboard>=2.19", "tensorboardX>=2.6.4", "imageio[ffmpeg]>=2.37"]
# ///
"""PPO for continuous (Box) actions. One file: run it, copy it, change it.

    python ppo_continuous.py --env-id HalfCheetah-v4 --seed 1  # train; the same command again resumes
    python ppo_continuous.py --env-id HalfCheetah-v4 --seed 1 --num-seeds 8  # eight independent runs in one process
    python ppo_continuous.py --env-id HalfCheetah-v4 --seed 1 --mode eval --video

PPO: arXiv 1707.06347; GAE: 1506.02438; code-level optimisations: 2005.12729. Axes are always [S, T, N, K, ...]: seeds,
steps, environments per seed, copies of an observation; E epochs of M minibatches of B, U action size, P processes.

Differs from the papers and from CleanRL's ppo_continuous_action.py:
1. Time limits are not ends: a truncated step bootstraps from the value of its true last observation.
2. The step on which an environment resets itself, ignoring its action, has mask 0 and trains nothing.
3. Running statistics rest during a rollout; old values and log-probabilities are computed after it, in one batch.
4. Actions in [-1, 1] are mapped to the environment's bounds (--no-scale-actions only clips, as CleanRL does).
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
    env_id: str = "HalfCheetah-v4"  # of EnvPool or Gymnasium, or module:EnvId (module is imported first)
    seed: int = 1  # random seed; of several, the first
    num_seeds: int = 1  # S, independent runs in this process, with seeds seed, seed + 1, ...
    total_timesteps: int = 1_000_000  # environment steps per seed
    exp_name: str = "ppo"  # name of this experiment, a part of the run folder
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
    num_envs: int = 1  # N, parallel environments per seed
    num_steps: int = 2048  # T, steps per environment and rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # GAE mixing: 0 is the one-step error, 1 the Monte Carlo return
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the running standard deviation of the discounted return
    clip_obs: float = 10.0  # bound on normalised observations (inf: off)
    clip_reward: float = 10.0  # bound on scaled rewards (inf: off)
    scale_actions: bool = True  # map actions in [-1, 1] to the environment's bounds, where it has some
    # Update
    learning_rate: float = 3e-4  # Adam's step size
    anneal_lr: bool = True  # learning rate linearly to zero over the run
    adaptive_lr: bool = False  # after each epoch, learning rate times or over 1.5 towards desired_kl
    num_minibatches: int = 32  # M, minibatches per epoch
    update_epochs: int = 10  # E, passes over the rollout
    objective: Literal["clip", "kl-penalty"] = "clip"  # clipped surrogate, or surrogate with adaptive KL penalty
    clip_coef: float = 0.2  # epsilon, the bound on |ratio - 1|
    anneal_clip: bool = False  # clip range linearly to zero over the run
    clip_vloss: bool = True  # bound changes of the value by epsilon, too
    norm_adv: bool = True  # normalise advantages in each minibatch
    recompute_advantages: bool = False  # advantages and targets anew before each epoch, not once per rollout
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # bound on the global gradient norm (inf: off)
    target_kl: float | None = None  # no further epochs once one's mean approx_kl passes 1.5 times this
    desired_kl: float = 0.01  # KL that the penalty's coefficient and the adaptive learning rate steer to
    kl_coef: float = 1.0  # first coefficient of the KL penalty
    kl_rule: tuple[float, float, float] = (2.0, 1.5, 0.667)  # its factor, above and below these times desired_kl
    # Network
    hidden_sizes: tuple[int, ...] = (64, 64)  # widths of the hidden layers, actor and critic alike
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"  # nonlinearity of the hidden layers
    ortho_init: bool = True  # orthogonal weights, gains sqrt 2 hidden, 0.01 policy, 1 value (otherwise LeCun normal)
    log_std_init: float = 0.0  # logarithm of the policy's first standard deviation
    state_dependent_std: bool = False  # log standard deviation from a network of its own, not a free parameter

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.num_envs * self.num_steps)

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
    N, T, M, P, last = args.num_envs, args.num_steps, args.num_minibatches, jax.process_count(), 2**31 - args.num_seeds
    any_sign = "seed gamma gae_lambda ent_coef vf_coef log_std_init".split()
    for name in [k for k, v in asdict(args).items() if type(v) in (int, float) and k not in any_sign and not v > 0]:
        fail(f"--{name.replace('_', '-')} is {getattr(args, name)}: give a number above 0")
    fine = {
        f"--num-envs {N} does not divide among {P} processes: give a multiple of that": N % P == 0,
        f"--num-minibatches {M} x {P} processes does not divide --num-envs {N} x --num-steps {T}": N * T % (M * P) == 0,
        f"--total-timesteps {args.total_timesteps} is below one rollout of {N * T}: raise it": args.num_iterations > 0,
        f"--gamma {args.gamma}: give 0 to 1": 0 <= args.gamma <= 1,
        f"--gae-lambda {args.gae_lambda}: give 0 to 1": 0 <= args.gae_lambda <= 1,
        f"--seed {args.seed} is out of range: give 0 to {last}": 0 <= args.seed <= last,
        "--adaptive-lr contradicts --anneal-lr: add --no-anneal-lr": not (args.adaptive_lr and args.anneal_lr),
    }
    if not all(fine.values()):
        fail(min(fine, key=fine.get))


# --- State ---
class RunningStats(NamedTuple):  # of one leaf of the observations, or of the discounted return
    mean: Array
    var: Array
    count: Array  # []


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


class Batch(NamedTuple):  # what the loss sees, [T*N*K, ...]; a minibatch is [B, ...]
    obs: Any  # normalised
    action: Array
    policy: "Gaussian"  # that acted
    log_prob: Array  # of action under it
    value: Array  # before the update
    advantage: Array
    target: Array
    mask: Array


class Schedule(NamedTuple):  # traced, so that changing them compiles nothing anew
    learning_rate: Array
    clip_coef: Array
    ent_coef: Array
    kl_coef: Array


class LearnerState(NamedTuple):  # what a checkpoint holds
    params: Any
    opt_state: Any
    obs_stats: Any  # like one observation, RunningStats for leaves
    return_stats: RunningStats
    schedule: Schedule
    key: Array  # [2], of the whole run; each iteration's keys are folded from it
    iteration: Array  # []
    episodes: Array  # [], ended so far
    returns: Array  # [100], the last training episodes', nan where there are fewer


# --- Networks ---
def mlp(obs: Any, out_size: int, out_gain: float, name: str, args: Args) -> Array:
    """Returns what dense layers make of observations, any pytree of [B, ...], flattened side by side: [B, out_size]."""
    init = nn.initializers.orthogonal if args.ortho_init else lambda gain: nn.initializers.lecun_normal()
    x = jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(obs)], axis=-1)
    for i, size in enumerate(args.hidden_sizes):
        x = getattr(nn, args.activation)(nn.Dense(size, kernel_init=init(2**0.5), name=f"{name}_{i}")(x))
    return nn.Dense(out_size, kernel_init=init(out_gain), name=f"{name}_{len(args.hidden_sizes)}")(x)


class ActorCritic(nn.Module):  # separate networks; of its outputs, the compiler leaves out what is not used
    action_space: Any
    args: Args

    @nn.compact
    def __call__(self, obs: Any) -> tuple["Gaussian", Array]:
        size = int(np.prod(self.action_space.shape))
        mean, value = mlp(obs, size, 0.01, "mean", self.args), mlp(obs, 1, 1.0, "critic", self.args)[:, 0]
        free = lambda: self.param("log_std", nn.initializers.zeros, (size,), jnp.float32)  # noqa: E731
        log_std = mlp(obs, size, 0.01, "log_std", self.args) if self.args.state_dependent_std else free()
        return Gaussian(mean=mean, log_std=jnp.broadcast_to(log_std + self.args.log_std_init, mean.shape)), value


# --- Distribution ---
class Gaussian(NamedTuple):  # diagonal, leaves [..., U]
    mean: Array
    log_std: Array


def sample_action(policy: Gaussian, noise: Array) -> Array:
    """Returns actions [..., U] from standard normal noise [..., U]; noise 0 gives the deterministic action."""
    return policy.mean + jnp.exp(policy.log_std) * noise


def log_prob(policy: Gaussian, action: Array) -> Array:
    """Returns the log density [...] of actions [..., U]."""
    scaled = (action - policy.mean) * jnp.exp(-policy.log_std)
    return jnp.sum(-0.5 * jnp.square(scaled) - policy.log_std - 0.5 * np.log(2 * np.pi).item(), axis=-1)


def entropy(policy: Gaussian) -> Array:
    """Returns the differential entropy [...] in nats."""
    return jnp.sum(policy.log_std + 0.5 * np.log(2 * np.pi * np.e).item(), axis=-1)


def kl(old: Gaussian, new: Gaussian) -> Array:
    """Returns KL(old || new) [...] in nats, exactly."""
    shift, ratio = (old.mean - new.mean) * jnp.exp(-new.log_std), old.log_std - new.log_std
    return jnp.sum(0.5 * (jnp.exp(2 * ratio) + jnp.square(shift) - 1) - ratio, axis=-1)


# --- Statistics ---
def masked_mean(x: Array, mask: Array) -> Array:
    """Returns the mean of x [*mask.shape, ...] over mask's axes where mask is 1; 0 where it is 1 nowhere."""
    weight = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    return jnp.sum(x * weight, axis=tuple(range(mask.ndim))) / jnp.maximum(jnp.sum(mask), 1)


def masked_var(x: Array, mask: Array) -> Array:
    """Returns the variance of x [*mask.shape, ...] over mask's axes where mask is 1."""
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def update_stats(x: Array, stats: RunningStats, mask: Array) -> RunningStats:
    """Returns statistics that also hold x [T, N, ...] where mask [T, N] is 1. Source: Chan et al. 1979, eq. 2.1."""
    count = jnp.sum(mask)
    total, shift = stats.count + count, masked_mean(x, mask) - stats.mean
    var = stats.var * stats.count + masked_var(x, mask) * count + jnp.square(shift) * stats.count * count / total
    return RunningStats(mean=stats.mean + shift * count / total, var=var / total, count=total)


def normalize(x: Array, stats: RunningStats, bound: float) -> Array:
    """Returns x [..., *stats.mean.shape], centred, scaled to variance 1, clipped to +-bound."""
    return jnp.clip((x - stats.mean) / jnp.sqrt(stats.var + 1e-8), -bound, bound)


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


def ppo_loss(params: Any, batch: Batch, schedule: Schedule, network: nn.Module, args: Args) -> tuple[Array, dict]:
    """Returns loss and metrics, scalars; the mask is a weight of mean 1 here. Source: arXiv 1707.06347, eq. 7, 8."""
    policy, value = network.apply(params, batch.obs)
    log_ratio = log_prob(policy, batch.action) - batch.log_prob
    ratio, kl_div, clip_coef = jnp.exp(log_ratio), kl(batch.policy, policy), schedule.clip_coef
    policy_loss = -batch.advantage * ratio
    if args.objective == "clip":
        policy_loss = jnp.maximum(policy_loss, -batch.advantage * jnp.clip(ratio, 1 - clip_coef, 1 + clip_coef))
    else:
        policy_loss += schedule.kl_coef * kl_div
    value_loss = jnp.square(value - batch.target)
    if args.clip_vloss:
        clipped = batch.value + jnp.clip(value - batch.value, -clip_coef, clip_coef)
        value_loss = jnp.maximum(value_loss, jnp.square(clipped - batch.target))
    samples = {"policy_loss": policy_loss, "value_loss": 0.5 * value_loss, "entropy": entropy(policy)}
    samples |= {"approx_kl": ratio - 1 - log_ratio, "kl": kl_div, "clipfrac": jnp.abs(ratio - 1) > clip_coef}
    mean = jax.tree.map(lambda x: jnp.mean(x * batch.mask), samples)
    return mean["policy_loss"] + args.vf_coef * mean["value_loss"] - schedule.ent_coef * mean["entropy"], mean


# --- Update ---
def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam behind a bound on the global gradient norm, without the step size, which is traced."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def minibatch_step(learner: LearnerState, batch: Batch, network: nn.Module, args: Args) -> tuple[LearnerState, dict]:
    """Returns the learner after one gradient step on a minibatch [B, ...]. Of P processes, each takes its P-th part."""
    batch = batch._replace(mask=batch.mask / jnp.maximum(jnp.mean(batch.mask), 1e-8))
    if args.norm_adv:
        centred = batch.advantage - jnp.mean(batch.advantage * batch.mask)
        std = jnp.sqrt(jnp.mean(jnp.square(centred) * batch.mask))
        batch = batch._replace(advantage=centred / (std + 1e-8))
    if args.distributed:
        processes, process = jax.lax.axis_size("process"), jax.lax.axis_index("process")
        batch = jax.tree.map(lambda x: x.reshape(processes, -1, *x.shape[1:])[process], batch)
    grads, metrics = jax.grad(ppo_loss, has_aux=True)(learner.params, batch, learner.schedule, network, args)
    if args.distributed:
        flat, unravel = ravel_pytree((grads, metrics))  # one collective costs as much as one of its leaves would
        grads, metrics = unravel(jax.lax.pmean(flat, "process"))
    direction, opt_state = make_optimizer(args).update(grads, learner.opt_state, learner.params)
    params = jax.tree.map(lambda p, d: p - learner.schedule.learning_rate * d, learner.params, direction)
    return learner._replace(params=params, opt_state=opt_state), metrics


def epoch_step(carry: tuple, shuffle_key: Array, data: tuple, network: nn.Module, args: Args) -> tuple[tuple, dict]:
    """Returns (learner, stop) after one pass over the rollout in M random minibatches, and the pass's mean metrics."""
    (learner, stop), (batch, obs, transition) = carry, data
    if args.recompute_advantages:
        advantage, target, _ = advantages(learner.params, obs, transition, network, args)
        batch = batch._replace(advantage=advantage, target=target)
    order = jax.random.permutation(shuffle_key, batch.mask.shape[0]).reshape(args.num_minibatches, -1)
    minibatches = jax.tree.map(lambda x: x[order], batch)  # [M, B, ...]
    new, metrics = jax.lax.scan(partial(minibatch_step, network=network, args=args), learner, minibatches)
    metrics = jax.tree.map(jnp.mean, metrics) | {"epochs": 1 - stop.astype(batch.mask.dtype)}
    if args.adaptive_lr:  # Source: rl_games and RSL-RL
        rate = new.schedule.learning_rate * steer(metrics["kl"], args.desired_kl, 1 / 1.5, 2, 0.5)
        new = new._replace(schedule=new.schedule._replace(learning_rate=jnp.clip(rate, 1e-6, 1e-2)))
    if args.target_kl is not None:
        new = jax.tree.map(partial(jnp.where, stop), learner, new)
        stop |= metrics["approx_kl"] > 1.5 * args.target_kl
    return (new, stop), metrics


def steer(kl_div: Array, desired: float, factor: float, above: float, below: float) -> Array:
    """Returns factor where the KL is more than `above` times the desired one, 1 / factor where less than `below`."""
    return jnp.where(kl_div > above * desired, factor, jnp.where(kl_div < below * desired, 1 / factor, 1))


def advantages(params: Any, obs: Any, transition: Transition, network: nn.Module, args: Args) -> tuple:
    """Returns advantages, targets, values, each [T*N*K]; copies have the original's, and values of their own."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), obs)
    value = network.apply(params, flat)[1].reshape(jax.tree.leaves(obs)[0].shape[:3])  # [T + 1, N, K]
    both = compute_gae(transition, value[:, :, 0], args.gamma, args.gae_lambda)
    return *(jnp.repeat(x, value.shape[2]) for x in both), value[:-1].reshape(-1)


def update(learner: LearnerState, transition: Transition, network: nn.Module, args: Args) -> tuple[LearnerState, dict]:
    """Returns the learner after E epochs over a rollout [T, N, ...] (obs [T + 1, N, K, ...]), and metrics, scalars."""
    if args.distributed:  # everybody sees the whole rollout, so that P processes compute exactly what one does
        transition = jax.lax.all_gather(transition, "process", axis=1, tiled=True)
    obs = jax.tree.map(partial(normalize, bound=args.clip_obs), transition.obs, learner.obs_stats)
    obs_stats, return_stats, given = learner.obs_stats, learner.return_stats, learner.schedule
    if args.norm_obs:
        obs_stats = jax.tree.map(lambda x, s: update_stats(x[:-1, :, 0], s, transition.mask), transition.obs, obs_stats)
    if args.norm_reward:
        return_stats = update_stats(transition.discounted_return, return_stats, transition.mask)
    scale = return_stats._replace(mean=jnp.zeros_like(return_stats.mean))
    transition = transition._replace(reward=normalize(transition.reward, scale, args.clip_reward))
    flat_obs = jax.tree.map(lambda x: x[:-1].reshape(-1, *x.shape[3:]), obs)  # [T*N*K, ...]
    policy, _ = network.apply(learner.params, flat_obs)
    advantage, target, value = advantages(learner.params, obs, transition, network, args)
    copy = partial(jnp.repeat, repeats=jax.tree.leaves(obs)[0].shape[2], axis=0)
    action, mask = (copy(x.reshape(-1, *x.shape[2:])) for x in (transition.action, transition.mask))
    batch = Batch(flat_obs, action, policy, log_prob(policy, action), value, advantage, target, mask)
    anneal = lambda x, on: x - x * learner.iteration / args.num_iterations * on  # noqa: E731
    rate, clip = anneal(given.learning_rate, args.anneal_lr), anneal(given.clip_coef, args.anneal_clip)
    schedule = given._replace(learning_rate=rate, clip_coef=clip)
    keys = jax.random.split(jax.random.fold_in(learner.key, 2 * learner.iteration + 1), args.update_epochs)
    step = partial(epoch_step, data=(batch, obs, transition), network=network, args=args)
    (learner, _), metrics = jax.lax.scan(step, (learner._replace(schedule=schedule), jnp.array(False)), keys)
    epochs = metrics.pop("epochs")  # [E], 0 after an early stop
    metrics = {f"losses/{name}": masked_mean(x, epochs) for name, x in metrics.items()}
    explained = 1 - masked_var(target - value, mask) / jnp.maximum(masked_var(target, mask), 1e-8)
    metrics |= {"losses/explained_variance": explained, "charts/learning_rate": learner.schedule.learning_rate}
    metrics |= {"policy/std": jnp.mean(jnp.exp(policy.log_std)), "policy/param_norm": optax.tree.norm(learner.params)}
    metrics |= {"policy/kl_coef": given.kl_coef, "policy/epochs": jnp.sum(epochs)}
    if args.adaptive_lr:
        given = given._replace(learning_rate=learner.schedule.learning_rate)
    if args.objective == "kl-penalty":
        kl_div = masked_mean(kl(policy, network.apply(learner.params, flat_obs)[0]), mask)
        given = given._replace(kl_coef=given.kl_coef * steer(kl_div, args.desired_kl, *args.kl_rule))
    ended = transition.done * transition.mask
    for name in ("episodic_return", "episodic_length"):
        metrics[f"charts/{name}"] = jnp.where(jnp.any(ended), masked_mean(getattr(transition, name), ended), jnp.nan)
    new = {"obs_stats": obs_stats, "return_stats": return_stats, "schedule": given, "iteration": learner.iteration + 1}
    returns = jnp.concatenate([learner.returns, jnp.where(ended > 0, transition.episodic_return, jnp.nan).ravel()])
    new |= {"returns": returns[jnp.argsort(~jnp.isnan(returns), stable=True)[-100:]]}
    metrics |= {"charts/episodic_return_100": jnp.nanmean(new["returns"])}
    return learner._replace(**new, episodes=learner.episodes + jnp.sum(ended).astype(jnp.int32)), metrics


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
    """Returns one environment per seed. Stops with exit code 2 if the id is unknown or its actions are not a Box."""
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
    return env


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
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    finite = np.isfinite(low) & np.isfinite(high) & np.bool_(args.scale_actions)
    centre, half = np.where(finite, low / 2 + high / 2, 0), np.where(finite, high / 2 - low / 2, 1)
    return jnp.clip(centre + half * action.reshape(*action.shape[:-1], *space.shape), low, high).astype(action.dtype)


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
    if args.platform != "auto":
        jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu"}[args.platform])
    try:
        one_process = partial(jax.config.update, "jax_num_cpu_devices", min(args.num_seeds, os.cpu_count()))
        (jax.distributed.initialize if args.distributed else one_process)()
        devices = np.array(jax.devices("gpu" if args.platform == "gpu" else None)).reshape(jax.process_count(), -1)
    except (RuntimeError, ValueError) as error:
        fail(f"--platform gpu needs jax[cuda13], --distributed a start by mpirun or srun: {error}")
    fit = 1 if args.distributed else max(d for d in range(1, devices.size + 1) if args.num_seeds % d == 0)
    return Mesh(devices[:, :fit], ("process", "seed"))


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
    """Returns one seed's new learner; obs is one observation."""
    key = jax.random.PRNGKey(seed)
    params = network.init(key, jax.tree.map(lambda x: x[None], obs))
    identity = lambda x: RunningStats(jnp.zeros_like(x), jnp.ones_like(x), jnp.float32(1e-4))  # noqa: E731
    schedule = Schedule(*map(jnp.float32, (args.learning_rate, args.clip_coef, args.ent_coef, args.kl_coef)))
    state = params, make_optimizer(args).init(params), jax.tree.map(identity, obs), identity(jnp.float32(0))
    counts = {"iteration": jnp.int32(0), "episodes": jnp.int32(0), "returns": jnp.full(100, jnp.nan, jnp.float32)}
    return LearnerState(*state, schedule, key=jax.random.fold_in(key, 1), **counts)


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
            action = bounded(apply(learner.params, obs)[0].mean, env.action_space, args)
            obs, _, *done, _ = vector.step(np.asarray(action))
    except Exception as error:  # no OpenGL, no such environment in Gymnasium: whatever keeps a renderer from working
        return print(f"--video: {args.env_id} cannot be filmed, see README: {str(error)[:99]}", file=sys.stderr)
    path = args.folder / "videos" / args.env_id.replace("/", "_").replace(":", "_")
    path.parent.mkdir(exist_ok=True)
    imageio.v3.imwrite(f"{path}.mp4", np.stack(frames), fps=30)
    imageio.v3.imwrite(f"{path}.gif", np.stack(frames)[:300:3, ::2, ::2], duration=100, loop=0)
    print(f"filmed {len(frames)} steps: {path}.mp4, {path}.gif")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    mesh = configure(args)
    validate(args)
    train(args, mesh) if args.mode == "train" else evaluate(args)


if __name__ == "__main__":
    main()
