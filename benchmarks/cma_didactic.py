"""How policies move on a quadratic without states: PPO against PPO-CMA-m, and a full covariance against a diagonal one.

    python benchmarks/cma_didactic.py  # cma_didactic.gif, cma_didactic.png, cma_full.png and their data, as JSON

The reward is -|a|^2 for actions in [-2, 2]^2, the first policy N((-1, -1), 0.25^2), an iteration 64 actions, H = 5, as
in arXiv 1810.02541. The last picture is of a valley at 45 degrees, which a diagonal covariance cannot follow.
"""

import json
import sys
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

NAMES = {"pg": "policy gradient", "pg-pos": "positive advantages only", "ppo": "PPO", "ppo-cma-m": "PPO-CMA-m"}


def quadratic(action: np.ndarray) -> np.ndarray:
    """Returns -|a|^2 of actions [N, U]."""
    return -np.square(action).sum(axis=1)


def valley(action: np.ndarray) -> np.ndarray:
    """Returns the reward of actions [N, 2] in a valley 20 times as long as wide, at 45 degrees."""
    along, across = (action[:, 0] + action[:, 1]) / 2**0.5, (action[:, 0] - action[:, 1]) / 2**0.5
    return -(np.square(along) + 400 * np.square(across))


def optimize(reward: callable, algorithm: str, iterations: int = 20, seed: int = 1, size: int = 2, **settings) -> dict:
    """Returns actions [iterations, N, U], mean [iterations, U] and covariance [iterations, U, U] of the policies."""
    defaults = {"num_envs": 64, "num_steps": 1, "action_repeat": 1, "gamma": 0.0, "time_scale": 0.0, "batch_size": 64}
    defaults |= {"init_mean": -0.5, "init_std": 0.125, "history_size": 5, "total_timesteps": 10**6}
    args = cma.Args(algorithm=algorithm, **defaults | settings)
    network = cma.ActorCritic(gymnasium.spaces.Box(-2, 2, (size,), np.float32), args)
    init = partial(cma.init_learner, obs=np.zeros(1, np.float32), network=network, args=args)
    learner = jax.jit(init)(np.uint32(seed))
    update = jax.jit(partial(cma.update, network=network, args=args))
    obs, one = np.zeros((2, args.num_envs, 1, 1), np.float32), np.ones((1, args.num_envs), np.float32)
    noise, found = np.random.default_rng(seed), {"action": [], "mean": [], "covariance": []}
    for _ in range(iterations):
        policy, _ = network.apply(learner.params, obs[0, :, 0])
        draws = noise.standard_normal((args.num_envs, size)).astype(np.float32)
        action = np.clip(np.asarray(cma.sample_action(policy, draws)), -2, 2)
        factor = np.diag(np.exp(policy.log_std[0])) @ (np.eye(size) + (0 if policy.skew is None else policy.skew[0]))
        for name, x in (("action", action), ("mean", policy.mean[0]), ("covariance", factor @ factor.T)):
            found[name].append(np.asarray(x))
        rewards = reward(action)[None].astype(np.float32)
        # episodes of one step: each ends, terminated
        transition = cma.Transition(obs, action[None], rewards, one, one, one, rewards, one, rewards)
        learner, _ = update(learner, transition)
    return {name: np.stack(x) for name, x in found.items()}


def draw(axis: plt.Axes, run: dict, i: int, reward: callable) -> None:
    """Draws iteration i of a run: level lines, actions, mean and two standard deviations of the policy."""
    x = np.linspace(-2, 2, 101)
    grid = np.stack(np.meshgrid(x, x), axis=-1)
    axis.contour(x, x, reward(grid.reshape(-1, 2)).reshape(101, 101), levels=8, colors="0.8", linewidths=0.7)
    angle = np.linspace(0, 2 * np.pi, 100)
    ellipse = 2 * np.linalg.cholesky(run["covariance"][i]) @ np.stack([np.cos(angle), np.sin(angle)])
    axis.plot(*run["action"][i].T, ".", color="C0", markersize=3)
    axis.plot(*(run["mean"][i][:, None] + ellipse), color="C3")
    axis.plot(*run["mean"][i], "+", color="C3")
    axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", xticks=[], yticks=[])


def save(figure: plt.Figure, path: Path, content: dict) -> None:
    """Writes a picture and its data beside it."""
    figure.savefig(path, dpi=100)
    plt.close(figure)
    path.with_suffix(".json").write_text(json.dumps(content) + "\n")


def main(out: Path = Path("benchmarks/results"), iterations: int = 20, seeds: int = 10) -> None:
    """Args: out: folder for the pictures; iterations: of each run; seeds: runs of the comparison of covariances."""
    runs = {name: optimize(quadratic, name, iterations) for name in NAMES}
    data = {name: {k: v.round(4).tolist() for k, v in run.items()} for name, run in runs.items()}
    shown = [i for i in (0, 4, 8, 19) if i < iterations]
    figure, axes = plt.subplots(4, len(shown), figsize=(2.2 * len(shown), 9), layout="constrained")
    for row, name in zip(axes, NAMES, strict=True):
        row[0].set_ylabel(NAMES[name])
        for axis, i in zip(row, shown, strict=True):
            draw(axis, runs[name], i, quadratic)
            axis.set_title(f"iteration {i + 1}", fontsize=9)
    save(figure, out / "cma_didactic.png", data)
    frames = []
    for i in range(iterations):
        figure, axes = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
        for axis, name in zip(axes, ("ppo", "ppo-cma-m"), strict=True):
            draw(axis, runs[name], i, quadratic)
            axis.set_title(f"{NAMES[name]}, iteration {i + 1}")
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3])
        plt.close(figure)
    iio.imwrite(out / "cma_didactic.gif", np.stack(frames), duration=300, loop=0)
    kinds = {
        kind: [optimize(valley, "ppo-cma-m", 2 * iterations, s + 1, covariance=kind) for s in range(seeds)]
        for kind in ("diagonal", "full")
    }
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
    for axis, (kind, found) in zip(axes, kinds.items(), strict=False):
        draw(axis, found[0], min(14, 2 * iterations - 1), valley)
        axis.set_title(f"{kind} covariance, iteration 15")
    lines = {
        kind: np.array([[valley(a).mean() for a in run["action"]] for run in found]) for kind, found in kinds.items()
    }
    for kind, y in lines.items():
        axes[2].plot(np.arange(1, y.shape[1] + 1), -y.mean(axis=0), label=kind)
        axes[2].fill_between(np.arange(1, y.shape[1] + 1), -y.min(axis=0), -y.max(axis=0), alpha=0.2)
    axes[2].set(
        yscale="log", xlabel="iteration", ylabel="mean cost of the actions", title=f"{seeds} seeds, mean and range"
    )
    axes[2].legend()
    save(figure, out / "cma_full.png", {kind: y.round(4).tolist() for kind, y in lines.items()})
    print({kind: float(-y[:, -1].mean()) for kind, y in lines.items()})


if __name__ == "__main__":
    tyro.cli(main)
