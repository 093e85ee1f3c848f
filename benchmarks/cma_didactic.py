"""How policies move on a quadratic without states: PPO against PPO-CMA-m.

    python -m benchmarks.cma_didactic  # cma_didactic.gif and .png, cma_full.png
    python -m benchmarks.cma_didactic --first-policy  # cma_first_policy.json

The reward is -|a|^2 for actions in [-2, 2]^2, the first policy N((-1, -1), 0.25^2), an iteration
64 actions, H = 5, as in arXiv 1810.02541. cma_full.png is of a valley at 45 degrees, which a full
covariance can follow and a diagonal one cannot. --first-policy counts how often PPO-CMA's first
policy reaches MountainCarContinuous-v0's goal, having learnt nothing, with decisions held for 2
(published) to 8 (default) steps.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gymnasium
import imageio.v3 as iio
import jax
import matplotlib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo_cma as cma

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "pg": "policy gradient",
    "pg-pos": "positive advantages only",
    "ppo": "PPO",
    "ppo-cma-m": "PPO-CMA-m",
}


def quadratic(action: np.ndarray) -> np.ndarray:
    """Returns -|a|^2 of actions [N, U]."""
    return -np.square(action).sum(axis=1)


def valley(action: np.ndarray) -> np.ndarray:
    """Returns the reward of actions [N, 2] in a valley 20 times as long as wide, at 45 degrees."""
    along = (action[:, 0] + action[:, 1]) / 2**0.5
    across = (action[:, 0] - action[:, 1]) / 2**0.5
    return -(np.square(along) + 400 * np.square(across))


def covariance(policy: cma.Gaussian) -> np.ndarray:
    """Returns the covariance [U, U] of the policy for the first of its states."""
    factor = np.eye(policy.mean.shape[1])
    if policy.skew is not None:
        factor = factor + policy.skew[0]
    factor = np.diag(np.exp(policy.log_std[0])) @ factor
    return factor @ factor.T


def one_step_episodes(obs: np.ndarray, action: np.ndarray, reward: np.ndarray) -> cma.Transition:
    """Returns a rollout of N episodes of a single step, each of which terminates."""
    one = np.ones((1, len(action)), np.float32)
    return cma.Transition(
        obs=obs,
        action=action[None],
        reward=reward[None],
        terminated=one,
        done=one,
        mask=one,
        episodic_return=reward[None],
        episodic_length=one,
        discounted_return=reward[None],
    )


def optimize(
    reward: Callable, algorithm: str, iterations: int = 20, seed: int = 1, **settings
) -> dict[str, np.ndarray]:
    """Returns actions [iterations, N, 2], and mean and covariance of the policies that acted."""
    defaults = {
        "num_envs": 64,
        "num_steps": 1,
        "action_repeat": 1,
        "gamma": 0.0,
        "time_scale": 0.0,
        "batch_size": 64,
        "init_mean": -0.5,
        "init_std": 0.125,
        "history_size": 5,
    }
    args = cma.Args(algorithm=algorithm, **defaults | settings)
    network = cma.ActorCritic(gymnasium.spaces.Box(-2, 2, (2,), np.float32), args)
    nothing = cma.TimeStep(np.zeros(1, np.float32), np.float32(0), False, False)
    init = partial(cma.init_learner, shown=nothing, network=network, args=args)
    learner = jax.jit(init)(np.uint32(seed))
    update = jax.jit(partial(cma.update, network=network, args=args))
    obs = np.zeros((2, args.num_envs, 1), np.float32)
    random = np.random.default_rng(seed)
    found = {"action": [], "mean": [], "covariance": []}
    for _ in range(iterations):
        policy, _ = network.apply(learner.params, obs[0])
        noise = random.standard_normal((args.num_envs, 2)).astype(np.float32)
        action = np.clip(np.asarray(cma.sample_action(policy, noise)), -2, 2)
        found["action"].append(action)
        found["mean"].append(np.asarray(policy.mean[0]))
        found["covariance"].append(covariance(policy))
        rewards = reward(action).astype(np.float32)
        learner, _ = update(learner, one_step_episodes(obs, action, rewards))
    return {name: np.stack(x) for name, x in found.items()}


def draw(axis: plt.Axes, run: dict, i: int, reward: Callable) -> None:
    """Draws iteration i of a run: level lines, actions, mean and two standard deviations."""
    x = np.linspace(-2, 2, 101)
    grid = np.stack(np.meshgrid(x, x), axis=-1)
    levels = reward(grid.reshape(-1, 2)).reshape(101, 101)
    axis.contour(x, x, levels, levels=8, colors="0.8", linewidths=0.7)
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    ellipse = run["mean"][i][:, None] + 2 * np.linalg.cholesky(run["covariance"][i]) @ circle
    axis.plot(*run["action"][i].T, ".", color="C0", markersize=3)
    axis.plot(*ellipse, color="C3")
    axis.plot(*run["mean"][i], "+", color="C3")
    axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])


def save(figure: plt.Figure, path: Path, content: dict) -> None:
    """Writes a picture and its data beside it."""
    figure.savefig(path, dpi=100)
    plt.close(figure)
    path.with_suffix(".json").write_text(json.dumps(content) + "\n")


def draw_panels(runs: dict[str, dict], iterations: int, path: Path) -> None:
    """Draws the paper's panels, a row per algorithm."""
    shown = [i for i in (0, 4, 8, 19) if i < iterations]
    size = (2.2 * len(shown), 9)
    figure, axes = plt.subplots(4, len(shown), figsize=size, layout="constrained", squeeze=False)
    for row, name in zip(axes, NAMES, strict=True):
        row[0].set_ylabel(NAMES[name])
        for axis, i in zip(row, shown, strict=True):
            draw(axis, runs[name], i, quadratic)
            axis.set_title(f"iteration {i + 1}", fontsize=9)
    data = {}
    for name, run in runs.items():
        data[name] = {key: value.round(4).tolist() for key, value in run.items()}
    save(figure, path, data)


def draw_film(runs: dict[str, dict], iterations: int, path: Path) -> None:
    """Draws PPO beside PPO-CMA-m, a frame per iteration."""
    frames = []
    for i in range(iterations):
        figure, axes = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
        for axis, name in zip(axes, ("ppo", "ppo-cma-m"), strict=True):
            draw(axis, runs[name], i, quadratic)
            axis.set_title(f"{NAMES[name]}, iteration {i + 1}")
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3])
        plt.close(figure)
    iio.imwrite(path, np.stack(frames), duration=300, loop=0)


def draw_covariances(iterations: int, seeds: int, path: Path) -> None:
    """Draws a full covariance against a diagonal one in the valley, and prints the last costs."""
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
    data = {}
    for axis, kind in zip(axes[:2], ("diagonal", "full"), strict=True):
        runs = []
        for seed in range(1, seeds + 1):
            runs.append(optimize(valley, "ppo-cma-m", iterations, seed, covariance=kind))
        shown = min(14, iterations - 1)
        draw(axis, runs[0], shown, valley)
        axis.set_title(f"{kind} covariance, iteration {shown + 1}")
        cost = -np.array([[valley(action).mean() for action in run["action"]] for run in runs])
        x = np.arange(1, iterations + 1)
        axes[2].plot(x, cost.mean(axis=0), label=kind)
        axes[2].fill_between(x, cost.min(axis=0), cost.max(axis=0), alpha=0.2)
        data[kind] = (-cost).round(4).tolist()
        print(f"{kind}: the last iteration's actions cost {cost[:, -1].mean():.4f}")
    title = f"{seeds} seeds, mean and range"
    axes[2].set(yscale="log", xlabel="iteration", ylabel="mean cost of the actions", title=title)
    axes[2].legend()
    save(figure, path, data)


def share_that_reached(action_repeat: int, episodes: int) -> float:
    """Returns the share of first episodes that end at the goal, not at the time limit."""
    small = {"num_envs": episodes, "num_steps": 999, "history_size": 1, "init_updates": 0}
    run = cma.make_run(cma.Args(action_repeat=action_repeat, **small))
    _, transition = run.act(cma.first_runner(run), run.init())
    return float(np.mean(np.asarray(transition.terminated[0]).any(axis=0)))


def count_first_goals(path: Path, episodes: int = 1000) -> None:
    """Writes how often the first policy reaches the goal, by how long a decision is held."""
    found = {}
    for repeat in (2, 4, 6, 8):
        found[f"--action-repeat {repeat}"] = share_that_reached(repeat, episodes)
    content = {
        "share of episodes that reach the goal": found,
        "episodes": episodes,
        "env_id": cma.Args().env_id,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(found)


def main(
    out: Path = Path("benchmarks/results"),
    iterations: int = 20,
    seeds: int = 10,
    first_policy: bool = False,
) -> None:
    """Draws all three pictures, or counts the first policy's goals.

    Args:
        out: folder for the pictures and their data.
        iterations: of each run; of those in the valley twice as many.
        seeds: runs of the comparison of covariances.
        first_policy: counts, and draws nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    if first_policy:
        count_first_goals(out / "cma_first_policy.json")
        return
    runs = {name: optimize(quadratic, name, iterations) for name in NAMES}
    draw_panels(runs, iterations, out / "cma_didactic.png")
    draw_film(runs, iterations, out / "cma_didactic.gif")
    draw_covariances(2 * iterations, seeds, out / "cma_full.png")


if __name__ == "__main__":
    tyro.cli(main)
