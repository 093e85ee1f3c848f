"""Environments of the benchmarks, for --env-id benchmarks.envs:<id>.

    python ppo_icm_lstm.py --env-id benchmarks.envs:CartPoleNoVel-v1 --recurrence lstm

CartPoleNoVel-v1, PendulumNoVel-v1, MountainCarContinuousNoVel-v0: without velocities, as in the zoo
of Stable-Baselines3. ContinuousCartPole-v0: the cart is pushed with any force. For teams
(ppo_multiagent.py): PressurePlate-4p-v0.
"""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Tuple

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


class PressurePlate(gymnasium.Env):
    """Four agents in a tower of rooms; each but the last must stand on its plate to open a door.

    Positions are (x, y), from the top left. Agents move one after another, in random order, and
    stop at walls, edges, closed doors and each other. An agent in its own room earns minus a tenth
    of the steps to its plate (the last agent's is the chest), elsewhere -1 for each room below its
    own. The episode ends for all when one is at the chest, or after 500 steps.

    Args:
        frozen_agents: show the agents where they began, as the published code does.

    Source: the rules of the linear task for four players as published by its authors
    (github.com/uoe-agents/pressureplate).
    """

    width, height, sight = 9, 15, 2
    plates = ((7, 13), (2, 9), (7, 5))
    chest = (3, 1)
    starts = ((5, 13), (5, 12), (4, 13), (4, 12))
    doors = (((6, 11), (7, 11)), ((2, 7), (3, 7)), ((6, 3), (7, 3)))
    boundaries = (11, 7, 3)  # the rows of walls, between rooms counted from the bottom
    moves = ((0, -1), (0, 1), (-1, 0), (1, 0), (0, 0))  # up, down, left, right, none

    def __init__(self, frozen_agents: bool = False) -> None:
        self.frozen_agents = frozen_agents
        cells = 4 * (2 * self.sight + 1) ** 2
        view = Box(0, max(self.width, self.height), (cells + 2,), np.float32)
        self.observation_space = Tuple([view] * 4)
        self.action_space = Tuple([Discrete(5)] * 4)
        open_doors = {cell for door in self.doors for cell in door}
        every = {(x, y) for y in self.boundaries for x in range(self.width)}
        self.walls = every - open_doors
        self.agents = list(self.starts)

    def pressed(self, number: int) -> bool:
        """Returns whether the agent of a plate stands on it, which opens its door."""
        return self.agents[number] == self.plates[number]

    def closed(self) -> set:
        """Returns the cells of closed doors."""
        return {cell for i, door in enumerate(self.doors) if not self.pressed(i) for cell in door}

    def room(self, agent: tuple) -> int:
        """Returns in which room an agent is, from 0 at the bottom."""
        return sum(agent[1] < y for y in self.boundaries)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.agents = list(self.starts)
        return self.observe(), {}

    def observe(self) -> tuple:
        """Returns what each agent sees: layers of agents, plates, doors, chest; then x and y."""
        shown = self.starts if self.frozen_agents else self.agents
        doors = [cell for door in self.doors for cell in door]
        layers = [self.layer(x) for x in (shown, self.plates, doors, [self.chest])]
        size = 2 * self.sight + 1
        views = []
        for x, y in self.agents:
            window = [layer[y : y + size, x : x + size].ravel() for layer in layers]
            views.append(np.concatenate([*window, [x, y]]).astype(np.float32))
        return tuple(views)

    def layer(self, cells: list) -> np.ndarray:
        """Returns the field with 1 at some cells, and a margin of zeros."""
        field = np.zeros((self.height + 2 * self.sight, self.width + 2 * self.sight))
        for x, y in cells:
            field[y + self.sight, x + self.sight] = 1
        return field

    def step(self, action: tuple) -> tuple:
        for i in self.np_random.permutation(4):
            dx, dy = self.moves[int(action[i])]
            x, y = self.agents[i]
            new = (x + dx, y + dy)
            inside = 0 <= new[0] < self.width and 0 <= new[1] < self.height
            blocked = new in self.walls or new in self.closed() or new in self.agents
            if inside and not blocked:
                self.agents[i] = new
        rewards = [self.reward(i) for i in range(4)]
        return self.observe(), rewards, self.chest in self.agents, False, {}

    def reward(self, number: int) -> float:
        """Returns what an agent earns where it stands."""
        x, y = self.agents[number]
        if self.room((x, y)) == number:
            goal = (*self.plates, self.chest)[number]
            return -(abs(x - goal[0]) + abs(y - goal[1])) / 10
        return float(-len(self.boundaries) + self.room((x, y)))


for name in POSITIONS:
    stem, _, version = name.rpartition("-")
    gymnasium.register(
        f"{stem}NoVel-{version}", entry_point=without_velocity, kwargs={"name": name}
    )
gymnasium.register(
    "PressurePlate-4p-v0", PressurePlate, max_episode_steps=500, disable_env_checker=True
)
gymnasium.register("ContinuousCartPole-v0", ContinuousCartPole, max_episode_steps=500)
