"""PPO's mathematics again, from the papers, in float64 NumPy: plain loops, nothing shared."""

import math

import numpy as np


def gae(reward, terminated, done, value, gamma, gae_lambda):
    """Returns advantages [T, N], by the definition in arXiv 1506.02438.

    That is a sum of discounted errors up to the episode's end.
    value is [T + 1, N]: value[t + 1] is that of the true observation after step t.
    """
    T, N = reward.shape
    advantage = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                future = 0.0 if terminated[k, n] else value[k + 1, n]
                advantage[t, n] += weight * (reward[k, n] + gamma * future - value[k, n])
                if done[k, n]:
                    break
                weight *= gamma * gae_lambda
    return advantage


def log_prob(mean, log_std, action):
    """Returns the log density of one action [U] under a diagonal Gaussian."""
    total = 0.0
    for m, s, a in zip(mean, np.exp(log_std), action, strict=True):
        total += math.log(math.exp(-((a - m) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi)))
    return total


def expectation(mean, log_std, function):
    """Returns E[function(x)], x ~ N(mean, exp(log_std)^2) in R, by the trapezoid rule."""
    std = math.exp(log_std)
    x = np.linspace(mean - 12 * std, mean + 12 * std, 20001)
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    return np.trapezoid(density * function(x), x)


def entropy(log_std):
    return sum(s + 0.5 * math.log(2 * math.pi * math.e) for s in log_std)


def kl(old_mean, old_log_std, new_mean, new_log_std):
    """Returns KL(old || new) of two diagonal Gaussians [U]."""
    total = 0.0
    for m0, s0, m1, s1 in zip(
        old_mean, np.exp(old_log_std), new_mean, np.exp(new_log_std), strict=True
    ):
        total += math.log(s1 / s0) + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5
    return total


def mlp(layers, x):
    """Returns the output and all activations of a tanh network.

    layers: a list of (kernel [in, out], bias [out]).
    """
    activations = [x]
    for i, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        if i < len(layers) - 1:
            x = np.tanh(x)
        activations.append(x)
    return x, activations


def mlp_gradient(layers, activations, gradient):
    """Returns d loss / d (kernel, bias) of each layer, from d loss / d output [B, out]."""
    grads = []
    for i in reversed(range(len(layers))):
        if i < len(layers) - 1:
            gradient = gradient * (1 - activations[i + 1] ** 2)
        grads.append((activations[i].T @ gradient, gradient.sum(axis=0)))
        gradient = gradient @ layers[i][0].T
    return grads[::-1]


def normalized_advantage(advantage, mask):
    """Returns the advantages, of mean 0 and standard deviation 1 over experience."""
    real = advantage[mask > 0]
    return (advantage - real.mean()) / (real.std() + 1e-8)


def loss(policy, value, batch, s):
    """Returns the loss and metrics of a minibatch, and its gradient, one sample after another.

    The gradient is in mean [B, U], log_std [U] and value [B]. policy: (mean [B, U], log_std [U])
    now; batch: a dict of arrays; s: a dict of settings.
    """
    mean, log_std = policy
    B = len(value)
    real = int(batch["mask"].sum())
    out = dict.fromkeys(
        ("policy_loss", "value_loss", "entropy", "approx_kl", "kl", "clipfrac"), 0.0
    )
    d_mean = np.zeros_like(mean)
    d_log_std = np.zeros_like(log_std)
    d_value = np.zeros(B)
    for i in range(B):
        if not batch["mask"][i]:
            continue
        a = batch["action"][i]
        adv = batch["advantage"][i]
        old_mean = batch["old_mean"][i]
        old_log_std = batch["old_log_std"][i]
        log_ratio = log_prob(mean[i], log_std, a) - batch["log_prob"][i]
        ratio = math.exp(log_ratio)
        var = np.exp(2 * log_std)
        d_log_mean = (a - mean[i]) / var
        d_log_log_std = (a - mean[i]) ** 2 / var - 1
        one_kl = kl(old_mean, old_log_std, mean[i], log_std)
        low, high = 1 - s["clip_coef"], 1 + s["clip_coef"]
        if s["objective"] == "none":
            policy_loss = -ratio * adv
            d_log = -ratio * adv
        elif s["objective"] == "clip":
            surrogate = min(ratio * adv, min(max(ratio, low), high) * adv)  # to be maximised
            active = ratio * adv <= min(max(ratio, low), high) * adv
            policy_loss = -surrogate
            d_log = -ratio * adv if active else 0.0
        else:
            policy_loss = -ratio * adv + s["kl_coef"] * one_kl
            d_log = -ratio * adv
            d_mean[i] += s["kl_coef"] * (mean[i] - old_mean) / var / real
            d_log_std += (
                s["kl_coef"]
                * (1 - (np.exp(2 * old_log_std) + (old_mean - mean[i]) ** 2) / var)
                / real
            )
        d_mean[i] += d_log * d_log_mean / real
        d_log_std += d_log * d_log_log_std / real - s["ent_coef"] / real
        error = value[i] - batch["target"][i]
        old = batch["value"][i]
        value_loss = 0.5 * error**2
        d = error
        if s["clip_vloss"]:
            clipped = old + min(max(value[i] - old, -s["clip_coef"]), s["clip_coef"])
            if (clipped - batch["target"][i]) ** 2 > error**2:
                value_loss = 0.5 * (clipped - batch["target"][i]) ** 2
                d = 0.0
        d_value[i] = s["vf_coef"] * d / real
        out["policy_loss"] += policy_loss / real
        out["value_loss"] += value_loss / real
        out["entropy"] += entropy(log_std) / real
        out["approx_kl"] += (ratio - 1 - log_ratio) / real
        out["kl"] += one_kl / real
        out["clipfrac"] += (abs(ratio - 1) > s["clip_coef"]) / real
    total = out["policy_loss"] + s["vf_coef"] * out["value_loss"] - s["ent_coef"] * out["entropy"]
    return total, out, (d_mean, d_log_std, d_value)


def barred(s, batch, mean, log_std):
    """Returns settings whose KL penalty also has the slope of Heess et al.'s barrier.

    Of b max(0, KL - 2 desired)^2, with KL the minibatch's mean, it is 2 b max(0, KL - 2 desired).
    """
    rows = zip(batch["old_mean"], batch["old_log_std"], mean, strict=True)
    divergence = np.array([kl(*row, log_std) for row in rows])[batch["mask"] > 0].mean()
    slope = 2 * s["kl_barrier"] * max(0.0, divergence - 2 * s["desired_kl"])
    return s | {"kl_coef": s["kl_coef"] + slope}


class Adam:
    """Kingma and Ba 2014, algorithm 1, behind a bound on the global gradient norm."""

    def __init__(self, params, max_norm, eps=1e-5):
        self.m = [0 * p for p in params]
        self.v = [0 * p for p in params]
        self.t = 0
        self.max_norm = max_norm
        self.eps = eps

    def step(self, params, grads, learning_rate):
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, self.max_norm / norm) for g in grads]
        self.t += 1
        new = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            self.m[i] = 0.9 * self.m[i] + 0.1 * g
            self.v[i] = 0.999 * self.v[i] + 0.001 * g**2
            m = self.m[i] / (1 - 0.9**self.t)
            v = self.v[i] / (1 - 0.999**self.t)
            new.append(p - learning_rate * m / (np.sqrt(v) + self.eps))
        return new


def moments(x, mask, mean, var, count):
    """Returns mean, variance and count that also stand for x where mask is 1."""
    real = x[mask > 0]
    total = count + len(real)
    new_mean = (mean * count + real.sum(axis=0)) / total
    second = (count * (var + mean**2) + (real**2).sum(axis=0)) / total
    return new_mean, second - new_mean**2, total


def update(nets, rollout, stats, orders, s):
    """Returns (actor, log_std, critic), statistics and mean metrics after PPO on one rollout.

    nets: (actor, log_std, critic), of which actor and critic are lists of (kernel, bias);
    rollout: a dict, obs [T + 1, N, D], else [T, N, ...]; stats: a dict of obs and ret, each
    (mean, var, count); orders: [E, M, B] indices into [T*N]; s: a dict of settings.
    """
    actor, log_std, critic = nets
    mean, var, _ = stats["obs"]
    obs = np.clip((rollout["obs"] - mean) / np.sqrt(var + 1e-8), -s["clip_obs"], s["clip_obs"])
    mask = rollout["mask"]
    new_stats = {
        "obs": moments(rollout["obs"][:-1], mask, *stats["obs"]),
        "ret": moments(rollout["discounted_return"], mask, *stats["ret"]),
    }
    scale = math.sqrt(new_stats["ret"][1] + 1e-8)
    reward = np.clip(rollout["reward"] / scale, -s["clip_reward"], s["clip_reward"])
    T, N = mask.shape

    def values(critic):
        return mlp(critic, obs.reshape((T + 1) * N, -1))[0].reshape(T + 1, N)

    def advantages(critic):
        value = values(critic)
        advantage = gae(
            reward, rollout["terminated"], rollout["done"], value, s["gamma"], s["gae_lambda"]
        )
        target = advantage + value[:-1]
        return advantage.ravel(), target.ravel()

    flat = obs[:-1].reshape(T * N, -1)
    old_mean = mlp(actor, flat)[0]
    action = rollout["action"].reshape(T * N, -1)
    old_value = values(critic)[:-1].ravel()
    old_log_prob = np.array(
        [log_prob(m, log_std, a) for m, a in zip(old_mean, action, strict=True)]
    )
    old_log_std = np.tile(log_std, (T * N, 1))
    advantage, target = advantages(critic)
    params = [x for layer in actor + critic for x in layer] + [log_std]
    adam = Adam(params, s["max_grad_norm"])
    seen = []
    for epoch in orders:
        if s["recompute_advantages"]:
            advantage, target = advantages(critic)
        for index in epoch:
            weights = mask.ravel()[index]
            batch = {
                "mask": weights,
                "action": action[index],
                "old_mean": old_mean[index],
                "target": target[index],
            }
            batch |= {
                "old_log_std": old_log_std[index],
                "log_prob": old_log_prob[index],
                "value": old_value[index],
            }
            batch["advantage"] = advantage[index]
            if s["norm_adv"]:
                batch["advantage"] = normalized_advantage(advantage[index], weights)
            mean, actor_activations = mlp(actor, flat[index])
            value, critic_activations = mlp(critic, flat[index])
            now = barred(s, batch, mean, log_std)
            _, metrics, gradient = loss((mean, log_std), value[:, 0], batch, now)
            d_mean, d_log_std, d_value = gradient
            seen.append(metrics)
            grads = mlp_gradient(actor, actor_activations, d_mean)
            grads += mlp_gradient(critic, critic_activations, d_value[:, None])
            flat_grads = [x for layer in grads for x in layer] + [d_log_std]
            params = adam.step(params, flat_grads, s["learning_rate"])
            layers = list(zip(params[:-1:2], params[1:-1:2], strict=True))
            actor, critic, log_std = layers[: len(actor)], layers[len(actor) :], params[-1]
    return (actor, log_std, critic), new_stats, {k: np.mean([m[k] for m in seen]) for k in seen[0]}


# --- PPO-CMA, arXiv 1810.02541: each sample by itself, covariances as matrices ---


def covariance(log_std, skew):
    """Returns the covariance [U, U] whose Cholesky factor is diag(std) (1 + skew)."""
    factor = np.diag(np.exp(log_std)) @ (np.eye(len(log_std)) + np.tril(skew, -1))
    return factor @ factor.T


def log_prob_full(mean, cov, action):
    """Returns the log density of one action [U] under a Gaussian with any covariance."""
    x = np.asarray(action) - mean
    return -0.5 * (x @ np.linalg.inv(cov) @ x + math.log(np.linalg.det(2 * math.pi * cov)))


def cma_std_loss(advantage, mean, covs, action):
    terms = [
        max(a, 0.0) * log_prob_full(*row)
        for a, *row in zip(advantage, mean, covs, action, strict=True)
    ]
    return -sum(terms) / len(terms)


def cma_mean_loss(advantage, mean, covs, action, old_mean, mirror, full):
    """The loss of the mean.

    mirror: also -A times the kernel for the mirror image of an action with A < 0.
    """
    total = 0.0
    for a, m, cov, x, old in zip(advantage, mean, covs, action, old_mean, strict=True):
        if a > 0:
            total -= a * log_prob_full(m, cov, x)
        elif mirror:
            d = x - old
            if full:
                kernel = math.exp(-0.5 * d @ np.linalg.inv(cov) @ d / len(d))
            else:
                kernel = sum(math.exp(-0.5 * d[i] ** 2 / cov[i, i]) for i in range(len(d))) / len(d)
            total -= -a * kernel * log_prob_full(m, cov, old - d)
    return total / len(advantage)


def critic_loss(value, target, kind):
    total = 0.0
    for v, t in zip(value, target, strict=True):
        e = abs(v - t)
        total += {"l1": e, "l2": e * e, "soft-l1": e * e if e <= 0.5 else e - 0.25}[kind]
    return total / len(value)


def decisions(t, repeat):
    """Returns, per environment, a list of its decisions.

    Each is (first step, reward, terminated, done, next index).
    t is a dict of [T, N]; the next index is that of the row whose observation follows the decision.
    """
    T, N = t["mask"].shape
    found = []
    for n in range(N):
        mine = []
        step = 0
        while step < T:
            length = t["episodic_length"][step, n]
            if not t["mask"][step, n] or (length - 1) % repeat:
                step += 1
                continue
            first = step
            reward = 0.0
            terminated = 0.0
            done = 0.0
            for _ in range(repeat):
                reward += t["reward"][step, n]
                terminated = t["terminated"][step, n]
                done = t["done"][step, n]
                step += 1
                if done or step == T:
                    break
            mine.append((first, reward, terminated, done, step))
        found.append(mine)
    return found
