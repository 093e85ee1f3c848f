"""Environments of the benchmarks, for --env-id benchmarks.envs:<id>.

    python ppo_icm_lstm.py --env-id benchmarks.envs:CartPoleNoVel-v1 --recurrence lstm

CartPoleNoVel-v1, PendulumNoVel-v1, MountainCarContinuousNoVel-v0: without velocities, as in the zoo
of Stable-Baselines3. ContinuousCartPole-v0: the cart is pushed with any force.
"""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

POSITIONS = {  # the places of an observation that are no velocity
    "CartPole-v1": [0, 2],
    "Pendulum-v1": [0, 1],
    "MountainCarContinuous-v0": [0],
}


class NoVelocity(gymnasium.ObservationWrapper):
    """An environment that shows positions only."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.places = POSITIONS[env.spec.id]
        space = env.observation_space
        self.observation_space = Box(space.low[self.places], space.high[self.places])

    def observation(self, obs: np.ndarray) -> np.ndarray:
        return obs[self.places]


def without_velocity(name: str, **settings: Any) -> gymnasium.Env:
    """Returns one of the environments above without its velocities."""
    return NoVelocity(gymnasium.make(name, **settings))


class ContinuousCartPole(gymnasium.Env):
    """The classic cart-pole, pushed with action * 30 N; a reward of 1 a step, at most 500.

    Source: Barto, Sutton and Anderson 1983, in Euler steps of 0.02 s.
    """

    gravity = 9.8
    pole_mass = 0.1
    total_mass = 1.1
    half_length = 0.5
    force = 30.0
    seconds = 0.02

    def __init__(self) -> None:
        high = np.array([4.8, np.inf, math.radians(24), np.inf], np.float32)
        self.observation_space = Box(-high, high)
        self.action_space = Box(-1.0, 1.0, (1,))
        self.state = np.zeros(4)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.05, 0.05, 4)
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple:
        x, speed, angle, spin = self.state
        force = self.force * float(np.clip(action[0], -1, 1))
        sine, cosine = math.sin(angle), math.cos(angle)
        pole = self.pole_mass * self.half_length
        push = (force + pole * spin**2 * sine) / self.total_mass
        inertia = self.half_length * (4 / 3 - self.pole_mass * cosine**2 / self.total_mass)
        turn = (self.gravity * sine - cosine * push) / inertia
        acceleration = push - pole * turn * cosine / self.total_mass
        change = np.array([speed, acceleration, spin, turn])
        self.state = self.state + self.seconds * change
        x, _, angle, _ = self.state
        over = abs(x) > 2.4 or abs(angle) > math.radians(12)
        return self.state.astype(np.float32), 1.0, bool(over), False, {}


for name in POSITIONS:
    stem, _, version = name.rpartition("-")
    gymnasium.register(
        f"{stem}NoVel-{version}", entry_point=without_velocity, kwargs={"name": name}
    )
gymnasium.register("ContinuousCartPole-v0", ContinuousCartPole, max_episode_steps=500)
