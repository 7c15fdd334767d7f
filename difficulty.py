"""How hard is each input, and how much reinforcement does it get? Memory, advantage, distance, weight.

Notation      symbol     shape
  reward      r          (B,)   higher is better
  history     h_i        the latest rewards of input i, at most `size` of them
  advantage   A          (B,)   (r - mean(h_i)) / (std(h_i) + delta), centred, clipped   METHOD [F], Eq. 5
  distance    d          (B,)   from the restored image to its ground truth, >= 0        [A] what it is for, [R] how
  weight      w          (B,)   sigmoid(k (d - m) / s), m median and s spread of d       [F] w_i, [R] the formula

Chosen here:
 1. The rewards of the present batch join the history before its mean is taken, so that a first visit is judged
    against its own group of samples; below `min_count` rewards the batch's mean and std serve [R]. Then the mean
    advantage of an input's own samples in this batch is removed: histories lag behind a policy that moves, and a lag
    pushes all samples of an input one way, which is noise. The history's std stays, steadier than that of a group. [R]
 2. s is the interquartile range / 1.349, the standard deviation of a Gaussian that outliers do not move [R].
 3. anchor=baseline keeps m and s as the SFT model had them: as samples come close to their ground truth, w falls and
    SFT takes over. anchor=running follows the present model: half the inputs always count as hard. [R]

Needs torch only; the file works copied alone. It runs no training:
    python rl.py --task sr --weight baseline                       # laptop: the loop that uses it
    python rl.py --task sr --weight running --device cuda          # GPU
"""

from collections import deque

import torch


class RewardMemory:
    """The latest rewards of each input (Memory of Reward for Each Inputs), bounded and serializable.

    Keys are strings: "17" for input 17, "17:3" for its step 3 when every step has a reward of its own.
    """

    def __init__(self, size=32):
        self.size, self.history = size, {}

    def push(self, key, reward):
        self.history.setdefault(key, deque(maxlen=self.size)).append(float(reward))

    def stats(self, key):
        """(mean, population std, count) of the history of `key`; (0, 0, 0) if there is none."""
        values = torch.tensor(list(self.history.get(key, ())), dtype=torch.float64)
        if len(values) == 0:
            return 0.0, 0.0, 0
        return values.mean().item(), values.std(correction=0).item(), len(values)

    def state_dict(self):
        return {"size": self.size, "history": {key: list(values) for key, values in self.history.items()}}

    def load_state_dict(self, state):
        self.size = state["size"]
        self.history = {key: deque(values, maxlen=self.size) for key, values in state["history"].items()}


def advantages(rewards, keys, memory, min_count=4, clip=5.0, delta=1e-4):
    """Pushes rewards (B,) under keys (B strings) into memory and returns their advantages (B,), within +-clip.

    A = (r - mean) / (max(std, floor) + delta), with mean and std of the key's history, or of the batch where the
    history holds fewer than min_count rewards. floor is the root mean square of these std over the batch: the small
    differences of an input whose restorations are all alike are mostly noise and must not be blown up. Then the mean A
    of the samples of a key in this batch is removed; keys with one sample count as one group, if there are several.
    The unit of A is one standard deviation of the reward. A reward that is NaN (a judge whose answer could not be read)
    is not remembered, and its advantage is 0.
    """
    judged = ~rewards.isnan()
    for key, reward in zip(keys, rewards.tolist()):
        if reward == reward:
            memory.push(key, reward)
    batch = (rewards[judged].mean().item(), rewards[judged].std(correction=0).item())
    stats = {key: memory.stats(key) for key in set(keys)}
    chosen = [stats[key][:2] if stats[key][2] >= min_count else batch for key in keys]
    mean, std = torch.tensor(chosen, dtype=rewards.dtype, device=rewards.device).T
    std = std.clamp(min=std.square().mean().sqrt().item())
    advantage = (rewards - mean) / (std + delta)
    groups = [key if keys.count(key) > 1 else None for key in keys]
    for group in set(groups):
        own = torch.tensor([g == group for g in groups], device=rewards.device) & judged
        if own.sum() > 1:
            advantage[own] -= advantage[own].mean()
    return advantage.nan_to_num(0.0).clamp(-clip, clip)


def iqa_gap(reward, reward_hq):
    """d = max(M(hq) - M(x_hat), 0): what the judge still sees between a restored image and its ground truth; (B,)."""
    return (reward_hq - reward).clamp(min=0)


def mse(images, hq):
    """d = mean squared error over C, H, W of (B, 3, H, W) in [-1, 1] -> (B,)."""
    return ((images - hq) ** 2).flatten(1).mean(1)


def ssim_distance(ssim):
    """d = 1 - ssim, for the structural similarity (B,) in [-1, 1] of the pairs."""
    return 1 - ssim


def median_spread(distance):
    """(median, interquartile range / 1.349) of distances (N,), two floats; the spread is at least 1e-6."""
    low, middle, high = torch.quantile(distance.double().cpu(), torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return middle, max((high - low) / 1.349, 1e-6)


def relative_weight(distance, median, spread, k=2.0):
    """w = sigmoid(k (d - m) / s), (B,) -> (B,) in (0, 1): 0.5 at the median, more for harder samples."""
    return torch.sigmoid(k * (distance - median) / spread)


class Difficulty:
    """Turns distances into weights. spec: "baseline", "running", or "fixed:w" with w in [0, 1].

    Holds the latest mean distance of each input, seen first under the SFT model. Raises ValueError for another spec.
    """

    def __init__(self, spec, k=2.0):
        self.spec, self.k, self.anchor, self.latest = spec, k, None, {}
        self.fixed = None
        if spec.startswith("fixed:"):
            self.fixed = float(spec[len("fixed:"):])
        if (self.fixed is None and spec not in ("baseline", "running")) or not 0 <= (self.fixed or 0) <= 1:
            raise ValueError(f"weight {spec!r}: expected baseline, running or fixed:W with W from 0 to 1")

    def observe(self, keys, distance):
        """Records distance (B,) under keys (B strings); several of one key count as their mean, NaN does not count."""
        for key in dict.fromkeys(keys):
            own = [d for other, d in zip(keys, distance.tolist()) if other == key and d == d]
            if own:
                self.latest[key] = sum(own) / len(own)

    def set_anchor(self):
        """Freezes m and s at what the SFT model's distances, observed so far, give."""
        self.anchor = list(median_spread(torch.tensor(list(self.latest.values()))))

    def weight(self, distance):
        """Weights (B,) in [0, 1] of distances (B,); 0 where the distance is NaN: nothing is known, so SFT only."""
        if self.fixed is not None:
            return torch.full_like(distance, self.fixed)
        m, s = self.anchor if self.spec == "baseline" else median_spread(torch.tensor(list(self.latest.values())))
        return relative_weight(distance, m, s, self.k).nan_to_num(0.0)

    def state_dict(self):
        return {"anchor": self.anchor, "latest": self.latest}

    def load_state_dict(self, state):
        self.anchor, self.latest = state["anchor"], dict(state["latest"])
