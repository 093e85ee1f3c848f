"""Other people's programs, each as a function that returns what one whole run of it had.

    PYTHON -m benchmarks.peers sb3_pong '{"steps": 20480}'

benchmarks/speed.py runs them so, with a PYTHON that has the peer: stable-baselines3[extra] with
gymnasium[mujoco], sb3-contrib, what PureJaxRL (luchris429/purejaxrl) and JaxMARL (FLAIROx/JaxMARL)
need, or tensorflow for PPO-CMA's authors' code (ppocma/ppocma). PureJaxRL is older than gymnax 1.0
and today's Flax: either those are older, too, or its wrappers.py and ppo_rnn.py are adapted. A new
peer is a function here and a line in speed.py. Nothing but Python's own library is imported before
a function runs.
"""

import importlib
import json
import os
import runpy
import sys
import time
import types
from collections.abc import Callable
from typing import Any

SETTINGS = {  # that PureJaxRL's and JaxMARL's scripts share
    "LR": 2.5e-4,
    "NUM_ENVS": 4,
    "NUM_STEPS": 128,
    "UPDATE_EPOCHS": 4,
    "NUM_MINIBATCHES": 4,
    "GAMMA": 0.99,
    "GAE_LAMBDA": 0.95,
    "CLIP_EPS": 0.2,
    "ENT_COEF": 0.01,
    "VF_COEF": 0.5,
    "MAX_GRAD_NORM": 0.5,
    "ACTIVATION": "tanh",
    "ANNEAL_LR": True,
    "DEBUG": False,
}
LIBRARIES = (  # whose versions are told
    *("brax", "gymnasium", "gymnax", "jax", "jaxmarl", "jumanji", "numpy"),
    *("sb3_contrib", "stable_baselines3", "tensorflow", "torch"),
)


# --- Stable-Baselines3 ---


def sb3_speed(model: Any, steps: int) -> float:
    """Returns a model's steps per second, after a first rollout and update."""
    model.learn(model.n_steps * model.n_envs)
    start = time.perf_counter()
    model.learn(steps)
    return model.num_timesteps / (time.perf_counter() - start)


def sb3_seconds(model: Any, steps: int, whole: int, goal: float, pressed: float) -> float:
    """Returns the seconds from `pressed` until the last 100 episodes' mean is at the goal.

    Args:
        steps: after which a model is given the time that the whole run takes at this speed.
    """
    from stable_baselines3.common.callbacks import BaseCallback

    class Watch(BaseCallback):
        reached = False

        def _on_step(self) -> bool:
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            self.reached = bool(returns) and sum(returns) / len(returns) >= goal
            return not self.reached and self.num_timesteps < steps

    watch = Watch()
    began = time.time()
    model.learn(whole, callback=watch)
    learning = time.time() - began
    if not watch.reached:
        learning *= whole / model.num_timesteps
    return began - pressed + learning


def sb3_halfcheetah(steps: int) -> float:
    """Returns the steps per second of Stable-Baselines3 on HalfCheetah-v4, 1 x 2048."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    env = VecNormalize(make_vec_env("HalfCheetah-v4", 1, seed=1))
    settings = {"n_steps": 2048, "batch_size": 64, "n_epochs": 10}
    return sb3_speed(PPO("MlpPolicy", env, seed=1, device="cpu", **settings), steps)


def sb3_halfcheetah_score(**clock: float) -> float:
    """Returns the seconds that Stable-Baselines3's own defaults take to a HalfCheetah-v4 return."""
    from stable_baselines3 import PPO

    return sb3_seconds(PPO("MlpPolicy", "HalfCheetah-v4", seed=1, device="cpu"), **clock)


def sb3_pong_model() -> Any:
    """Returns a model for Pong from pixels, 8 x 128, with a step size that goes to zero."""
    import ale_py
    import gymnasium
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    def learning_rate(left: float) -> float:
        return 2.5e-4 * left

    gymnasium.register_envs(ale_py)
    env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", 8, seed=1), 4)
    settings = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "clip_range": 0.1}
    settings |= {"ent_coef": 0.01, "vf_coef": 0.5, "learning_rate": learning_rate}
    return PPO("CnnPolicy", env, seed=1, device="cpu", **settings)


def sb3_pong(steps: int) -> float:
    """Returns the steps per second of Stable-Baselines3 on Pong."""
    return sb3_speed(sb3_pong_model(), steps)


def sb3_pong_score(**clock: float) -> float:
    """Returns the seconds that Stable-Baselines3 takes to a return on Pong."""
    return sb3_seconds(sb3_pong_model(), **clock)


def sb3_contrib_lstm(steps: int) -> float:
    """Returns the steps per second of sb3-contrib's RecurrentPPO on CartPole-v1, 8 x 128."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env("CartPole-v1", 8, seed=1)
    network = {"lstm_hidden_size": 64, "shared_lstm": True, "enable_critic_lstm": False}
    network["net_arch"] = [64, 64]
    settings = {"n_steps": 128, "batch_size": 128, "n_epochs": 10, "policy_kwargs": network}
    model = RecurrentPPO("MlpLstmPolicy", env, seed=1, device="cpu", **settings)
    return sb3_speed(model, steps)


# --- PureJaxRL and JaxMARL, with the settings that stand in their files ---


def compiled_speed(folder: str, module: str, steps: int, **settings: Any) -> float:
    """Returns the steps per second of the make_train of a script, without compilation."""
    import jax

    sys.path.insert(0, folder)
    config = SETTINGS | settings | {"TOTAL_TIMESTEPS": steps}
    train = importlib.import_module(module).make_train(config)
    train = jax.jit(train).lower(jax.random.PRNGKey(30)).compile()
    start = time.perf_counter()
    jax.block_until_ready(train(jax.random.PRNGKey(30)))
    done = config["NUM_UPDATES"] * config["NUM_STEPS"] * config["NUM_ENVS"]
    return done / (time.perf_counter() - start)


def purejaxrl_cartpole(steps: int, checkout: str) -> float:
    """Returns the steps per second of PureJaxRL's ppo.py on gymnax's CartPole-v1."""
    return compiled_speed(f"{checkout}/purejaxrl", "ppo", steps, ENV_NAME="CartPole-v1")


def purejaxrl_gru(steps: int, checkout: str) -> float:
    """Returns the steps per second of PureJaxRL's ppo_rnn.py on gymnax's CartPole-v1."""
    return compiled_speed(f"{checkout}/purejaxrl", "ppo_rnn", steps, ENV_NAME="CartPole-v1")


def purejaxrl_minatar(steps: int, checkout: str) -> float:
    """Returns the steps per second of PureJaxRL's ppo.py on Breakout, as its notebook sets it."""
    settings = {"LR": 5e-3, "NUM_ENVS": 64, "NUM_MINIBATCHES": 8, "ACTIVATION": "relu"}
    folder = f"{checkout}/purejaxrl"
    return compiled_speed(folder, "ppo", steps, ENV_NAME="Breakout-MinAtar", **settings)


def purejaxrl_hopper(steps: int, checkout: str) -> float:
    """Returns the steps per second of PureJaxRL's ppo_continuous_action.py on Brax's hopper."""
    settings = {"LR": 3e-4, "NUM_ENVS": 2048, "NUM_STEPS": 10, "NUM_MINIBATCHES": 32}
    settings |= {"ENT_COEF": 0.0, "ANNEAL_LR": False, "NORMALIZE_ENV": True, "ENV_NAME": "hopper"}
    return compiled_speed(f"{checkout}/purejaxrl", "ppo_continuous_action", steps, **settings)


def jaxmarl_spread(steps: int, checkout: str) -> float:
    """Returns the steps per second of JaxMARL's ippo_ff_mpe.py with 64 environments (there: 16)."""
    import wandb

    wandb.init(mode="disabled")  # the script tells it of every update
    settings = {"NUM_ENVS": 64, "ENV_NAME": "MPE_simple_spread_v3", "ENV_KWARGS": {}}
    return compiled_speed(f"{checkout}/baselines/IPPO", "ippo_ff_mpe", steps, **settings)


def jaxmarl_smax(steps: int, checkout: str, scenario: str, seed: int) -> float:
    """Returns the part of its battles that JaxMARL's mappo_rnn_smax.py wins in the end.

    That is the mean over the last tenth of its updates. Its settings are those of its own
    configuration, but for the steps, to whose end its step size goes to zero.
    """
    import jax
    import wandb
    from omegaconf import OmegaConf

    won = []

    def keep(metrics: dict) -> None:
        won.append(float(metrics["win_rate"]))

    wandb.log = keep  # the script tells it of every update
    folder = f"{checkout}/baselines/MAPPO"
    sys.path.insert(0, folder)
    config = OmegaConf.load(f"{folder}/config/mappo_homogenous_rnn_smax.yaml")
    config = OmegaConf.to_container(config) | {"TOTAL_TIMESTEPS": steps, "MAP_NAME": scenario}
    train = importlib.import_module("mappo_rnn_smax").make_train(config)
    jax.block_until_ready(jax.jit(train)(jax.random.PRNGKey(seed)))
    last = won[-(len(won) // 10) :]
    return sum(last) / len(last)


# --- Teams' environments alone ---


def jumanji_loop(name: str, scenario: str) -> tuple[Callable, Callable]:
    """Returns reset and step of environments of Jumanji with random actions that are allowed."""
    import jax
    import jax.numpy as jnp
    import jumanji
    from jumanji.wrappers import VmapAutoResetWrapper

    from ppo_multiagent import JUMANJI

    read, folder = JUMANJI[name]
    module = importlib.import_module(f"jumanji.environments.routing.{folder}.generator")
    env = jumanji.make(name, generator=module.RandomGenerator(**read(scenario)))
    env = VmapAutoResetWrapper(env)

    def reset(keys: jax.Array) -> tuple:
        state, time_step = env.reset(keys)
        return state, time_step.observation.action_mask

    def step(carry: tuple, key: jax.Array) -> tuple:
        state, mask = carry
        logits = jnp.where(mask, 0.0, -jnp.inf)
        action = jax.random.categorical(key, logits).astype(jnp.int32)
        state, time_step = env.step(state, action)
        return (state, time_step.observation.action_mask), time_step.reward.sum()

    return reset, step


def jaxmarl_loop(name: str, envs: int) -> tuple[Callable, Callable]:
    """Returns reset and step of environments of JaxMARL with random actions."""
    import jax
    import jaxmarl

    env = jaxmarl.make(name)

    def reset(keys: jax.Array) -> tuple:
        return jax.vmap(env.reset)(keys)[1]

    def step(state: tuple, key: jax.Array) -> tuple:
        drawn = jax.random.randint(key, (len(env.agents), envs), 0, 5)
        action = dict(zip(env.agents, drawn, strict=True))
        keys = jax.random.split(key, envs)
        _, state, reward, _, _ = jax.vmap(env.step)(keys, state, action)
        return state, sum(x.sum() for x in reward.values())

    return reset, step


def bare(steps: int, env_id: str, scenario: str = "", envs: int = 64) -> float:
    """Returns the steps per second of environments alone, in one compiled loop."""
    import jax

    library, _, name = env_id.partition("/")
    loop = jumanji_loop(name, scenario) if library == "jumanji" else jaxmarl_loop(name, envs)
    reset, step = loop
    length = steps // envs

    def walk(key: jax.Array) -> jax.Array:
        first, rest = jax.random.split(key)
        started = reset(jax.random.split(first, envs))
        return jax.lax.scan(step, started, jax.random.split(rest, length))[1].sum()

    compiled = jax.jit(walk).lower(jax.random.PRNGKey(0)).compile()
    start = time.perf_counter()
    jax.block_until_ready(compiled(jax.random.PRNGKey(0)))
    return envs * length / (time.perf_counter() - start)


# --- PPO-CMA's authors ---


def authors_cma(steps: int, checkout: str) -> float:
    """Returns the steps per second of the authors' Run.py, without fitting the first policy.

    It runs as it is, on TensorFlow 2's first-version interface, with Gymnasium for Gym.
    """
    import gymnasium
    import tensorflow.compat.v1 as tf

    class Env(gymnasium.Wrapper):
        began = None
        steps = 0

        def reset(self) -> Any:
            Env.began = Env.began or time.perf_counter()
            return self.env.reset()[0]

        def step(self, action: Any) -> tuple:
            Env.steps += 1
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated or truncated, info

    def make(name: str) -> Env:
        return Env(gymnasium.make(name))

    tf.disable_v2_behavior()
    sys.modules |= {"tensorflow": tf, "gym": types.SimpleNamespace(make=make)}
    os.chdir(checkout)
    sys.path.insert(0, "")
    env_id = "MountainCarContinuous-v0"
    sys.argv = ["Run.py", "--env_name", env_id, "--max_steps", str(steps)]
    runpy.run_path("Run.py", run_name="__main__")
    return Env.steps / (time.perf_counter() - Env.began)


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that are loaded."""
    loaded = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    return {name: x.__version__ for name, x in loaded.items() if hasattr(x, "__version__")}


if __name__ == "__main__":
    value = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps({"value": value, "versions": versions()}))
