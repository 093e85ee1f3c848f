"""JAX-native environments that tests can foretell, for --env-id jax:jax_tasks:<function>."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete


class State(NamedTuple):
    time: jax.Array
    start: jax.Array  # drawn at the reset: another in each episode


class Counter:
    """Shows time and start; the reward is the time; every other length of episode terminates."""

    observation_space = Box(-np.inf, np.inf, (2,))
    action_space = Box(-1, 1, (1,))

    def __init__(self, length=3):
        self.length = length

    def reset(self, key):
        state = State(time=jnp.int32(0), start=jax.random.uniform(key))
        return self.observe(state), state

    def step(self, key, state, action):
        state = state._replace(time=state.time + 1)
        ended = state.time >= self.length
        terminated = ended & (state.start < 0.5)
        # as users write them: other dtypes than reset's, and an end that is both
        reward = state.time
        return self.observe(state), state, reward, terminated, ended, {}

    def observe(self, state):
        return jnp.stack([state.time.astype(jnp.float32), state.start])


class Lottery(Counter):
    """Earns 6 and what its start was; that is solved from 6.5 on, about half of the time."""

    threshold = 6.5

    def step(self, key, state, action):
        obs, state, reward, *rest = super().step(key, state, action)
        return obs, state, reward + state.start * (state.time == self.length), *rest


class Rounded(Counter):
    """Its actions are whole numbers; the reward is the action."""

    action_space = Box(-3, 3, (2,), np.int32)

    def step(self, key, state, action):
        obs, state, _, terminated, ended, info = super().step(key, state, action)
        assert action.dtype == jnp.int32
        return obs, state, action[0].astype(jnp.float32), terminated, ended, info


class Parts(Counter):
    """Observations in parts, one of them a number of choices."""

    observation_space = Dict({"left": Discrete(4, start=2), "right": Box(-1, 1, (2, 2))})

    def observe(self, state):
        right = jnp.full((2, 2), state.start)
        return {"left": 2 + state.time % 4, "right": right}


class Broken(Counter):
    """Its reward is no number from a step of the environment on."""

    def step(self, key, state, action):
        obs, state, reward, terminated, ended, info = super().step(key, state, action)
        bad = state.time == self.length
        return obs, state, jnp.where(bad, jnp.nan, reward), terminated, ended, info


class Drift:
    """Moves by 0.25 a step and earns its position: 9 in an episode of 8 steps.

    Its reset writes whole numbers, as one does by hand, and its steps fractions.
    """

    observation_space = Box(-10, 10, (1,))
    action_space = Box(-1, 1, (1,))

    def __init__(self, zero=0):
        self.zero = zero

    def reset(self, key):
        state = {"position": jnp.array(self.zero), "time": jnp.array(0, jnp.int8)}
        return state["position"][None], state

    def step(self, key, state, action):
        time = state["time"] + 1
        state = {"position": state["position"] + 0.25, "time": time}
        return state["position"][None], state, state["position"], False, time >= 8, {}


class Empty(Counter):
    """A part of its state has no elements, as in MuJoCo's where nothing touches."""

    def reset(self, key):
        obs, state = super().reset(key)
        return obs, (state, jnp.zeros((0, 3)))

    def step(self, key, state, action):
        obs, inner, *rest = super().step(key, state[0], action)
        return (obs, (inner, state[1]), *rest)


class Sloppy(Counter):
    """Its rewards and ends have an axis of length 1, and its info is text."""

    def step(self, key, state, action):
        obs, state, reward, terminated, ended, _ = super().step(key, state, action)
        return obs, state, reward[None], terminated[None], ended[None], {"why": "none"}


class Wide(Counter):
    """Steps return a wider observation than resets."""

    def step(self, key, state, action):
        obs, *rest = super().step(key, state, action)
        return (jnp.concatenate([obs, obs]), *rest)


class Narrow(Counter):
    """Observations are not of the space's shape."""

    def observe(self, state):
        return super().observe(state)[:1]


class Painted(Counter):
    """Draws each step into the same picture, brighter than the one before."""

    picture = np.zeros((64, 64, 3), np.uint8)

    def render(self, state):
        self.picture[:] = 50 * int(state.time)
        return self.picture


class Choices(Counter):
    """Its actions are a number of choices."""

    action_space = Discrete(3)


class Typed(Counter):
    """It keeps a typed key."""

    def reset(self, key):
        obs, state = super().reset(key)
        return obs, (state, jax.random.wrap_key_data(key))

    def step(self, key, state, action):
        obs, inner, *rest = super().step(key, state[0], action)
        return (obs, (inner, state[1]), *rest)


class Cue(NamedTuple):
    time: jax.Array
    shown: jax.Array  # 0 or 1, only at the beginning


class Recall:
    """Shows a cue once; five steps later the reward is 1 for the action of its number."""

    observation_space = Box(-1, 1, (2,))
    action_space = Discrete(2)

    def reset(self, key):
        state = Cue(time=jnp.int32(0), shown=jax.random.bernoulli(key).astype(jnp.int32))
        return self.observe(state), state

    def observe(self, state):
        cue = jnp.where(state.time == 0, 2.0 * state.shown - 1, 0.0)
        return jnp.stack([cue, state.time / 5])

    def step(self, key, state, action):
        ended = state.time == 5
        reward = jnp.where(ended & (action == state.shown), 1.0, 0.0)
        state = state._replace(time=state.time + 1)
        return self.observe(state), state, reward, ended, False & ended, {}


def recall():
    return Recall()


class Duty(NamedTuple):
    time: jax.Array
    start: jax.Array


class Team:
    """Three agents; agent i earns 10^i for action 1, and agent 1 dies after its second step.

    Agent i sees (i, time, start); action 2 is masked for agent 0. Episodes have four steps; they
    terminate where start is below 0.5, and are truncated otherwise.
    """

    agents = 3
    action_space = MultiDiscrete([3, 3, 3])
    observation_space = Dict(
        obs=Box(-np.inf, np.inf, (3, 3)),
        reward=Box(-np.inf, np.inf, (3,)),
        alive=Box(0, 1, (3,)),
        action_mask=Box(0, 1, (3, 3)),
        measure=Box(0, 1, ()),
    )

    def observe(self, state, reward):
        number = jnp.arange(3.0)
        time = jnp.full(3, state.time, jnp.float32)
        dies = (number == 1) & (state.time >= 2) & (state.time < 4)
        return {
            "obs": jnp.stack([number, time, jnp.full(3, state.start)], axis=-1),
            "reward": reward,
            "alive": 1.0 - dies,
            "action_mask": jnp.ones((3, 3)).at[0, 2].set(0),
            "measure": state.time / 4,
        }

    def reset(self, key):
        state = Duty(time=jnp.int32(0), start=jax.random.uniform(key))
        return self.observe(state, jnp.zeros(3)), state

    def step(self, key, state, action):
        alive = self.observe(state, jnp.zeros(3))["alive"]
        reward = (action == 1) * 10.0 ** jnp.arange(3) * alive
        state = state._replace(time=state.time + 1)
        ended = state.time == 4
        terminated = ended & (state.start < 0.5)
        obs = self.observe(state, reward)
        return obs, state, jnp.sum(reward), terminated, ended & ~terminated, {}


def team():
    return Team()
