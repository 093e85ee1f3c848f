"""The environments of benchmarks/envs.py, against their rules."""

import importlib
import math

import gymnasium
import numpy as np
import pytest

importlib.import_module("benchmarks.envs")


def plate(**settings):
    env = gymnasium.make("PressurePlate-4p-v0", **settings)
    obs, _ = env.reset(seed=1)
    return env.unwrapped, obs


def test_pressure_plate_begins_as_published():
    env, obs = plate()
    assert len(obs) == 4 and all(x.shape == (102,) for x in obs)
    np.testing.assert_array_equal(obs[0][-2:], [5, 13])
    agents, plates, doors, chest = (obs[0][25 * i : 25 * i + 25].reshape(5, 5) for i in range(4))
    assert agents.sum() == 4 and agents[2, 2] == 1 and agents[1, 1] == 1
    assert plates.sum() == 1 and plates[2, 4] == 1  # (7, 13), two to the right
    assert doors.sum() == 2 and chest.sum() == 0  # (6, 11) and (7, 11)
    assert [env.reward(i) for i in range(4)] == [-0.2, -3, -3, -3]


def test_doors_open_while_their_agent_stands_on_the_plate():
    env, _ = plate()
    env.agents = [(7, 13), (6, 12), (1, 1), (1, 2)]
    env.step((4, 0, 4, 4))
    assert env.agents[1] == (6, 11)  # in the open door
    env.agents = [(6, 13), (6, 12), (1, 1), (1, 2)]
    env.step((4, 0, 4, 4))
    assert env.agents[1] == (6, 12)
    env.agents = [(6, 12), (7, 13), (1, 1), (1, 2)]
    env.step((0, 4, 4, 4))
    assert env.agents[0] == (6, 12)  # another's plate


def test_agents_are_blocked_and_rewarded_by_room():
    env, _ = plate()
    env.agents = [(0, 14), (1, 14), (4, 9), (3, 2)]
    _, rewards, over, _, _ = env.step((3, 4, 4, 0))
    assert env.agents == [(0, 14), (1, 14), (4, 9), (3, 1)] and over
    assert rewards == [-(7 + 1) / 10, -3, -2, 0]
    env.agents = [(0, 14), (1, 12), (4, 8), (3, 9)]
    env.step((2, 0, 0, 4))
    assert env.agents[:3] == [(0, 14), (1, 12), (4, 8)]  # edge, wall, wall


def distances(env, goal):
    """Returns every cell's steps to a cell, as if all doors were open."""
    found = {goal: 0}
    queue = [goal]
    for x, y in queue:
        for dx, dy in env.moves[:4]:
            cell = (x + dx, y + dy)
            inside = 0 <= cell[0] < env.width and 0 <= cell[1] < env.height
            if inside and cell not in env.walls and cell not in found:
                found[cell] = found[x, y] + 1
                queue.append(cell)
    return found


def test_shortest_paths_earn_what_is_published():
    """PPO-and-friends' single test of a trained team, -19.27 per agent, is a common result."""
    env, _ = plate()
    ways = [distances(env, goal) for goal in (*env.plates, env.chest)]
    random = np.random.default_rng(0)
    team = []
    for seed in range(200):
        env.reset(seed=seed)
        team.append(0)
        over = False
        while not over:
            action = []
            for (x, y), way in zip(env.agents, ways, strict=True):
                ahead = [way.get((x + dx, y + dy), np.inf) for dx, dy in env.moves]
                action.append(random.choice(np.flatnonzero(np.equal(ahead, min(ahead)))))
            _, rewards, over, _, _ = env.step(action)
            team[-1] += sum(rewards)
    each = np.array(team) / 4
    assert np.isclose(each, -19.27, atol=0.01).mean() > 0.1
    assert -21 < each.mean() < -19.5


def test_published_agents_layer_stands_still():
    for frozen in (False, True):
        env, _ = plate(frozen_agents=frozen)
        env.agents = [(1, 13), (5, 12), (4, 13), (4, 12)]
        obs, *_ = env.step((4, 4, 4, 4))
        assert obs[0][12] == (not frozen)


def test_continuous_cart_pole_is_gymnasiums_at_a_third_of_its_force():
    """CartPole pushes with 10 N: the same steps from the same state."""
    ours = gymnasium.make("ContinuousCartPole-v0").unwrapped
    theirs = gymnasium.make("CartPole-v1").unwrapped
    ours.reset(seed=0)
    theirs.reset(seed=0)
    theirs.state = ours.state.copy()
    for step in range(30):
        right = step % 2
        obs, reward, over, _, _ = ours.step(np.array([right * 2 / 3 - 1 / 3]))
        same, _, ended, _, _ = theirs.step(right)
        np.testing.assert_allclose(obs, same, rtol=1e-5, atol=1e-6)
        assert over == ended and reward == 1
    ours.state = np.array([0, 0, math.radians(13), 0])
    assert ours.step(np.zeros(1))[2]


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0"])
def test_velocities_are_hidden(name):
    stem, _, version = name.rpartition("-")
    hidden = gymnasium.make(f"{stem}NoVel-{version}")
    whole = gymnasium.make(name)
    part, _ = hidden.reset(seed=3)
    obs, _ = whole.reset(seed=3)
    places = {"CartPole-v1": [0, 2], "Pendulum-v1": [0, 1]}.get(name, [0])
    np.testing.assert_array_equal(part, obs[places])
