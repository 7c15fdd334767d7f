"""How hard is each input, and how much RL does it get? Memory, advantage, distance, weight.

Notation      symbol     shape
  reward      r          (B, K)  higher is better; K rewards of a restoration, one per judged step
  memory      h_i        (inputs, K, size), the latest rewards of every input
  advantage   A          (B, K)  how much better than this input's restorations usually are
  distance    d          (B,)    from an input's restorations to its ground truth, >= 0
  weight      w          (B,)    in [0, 1], the share of RL; 1 - w is that of SFT

  A = (r - mean(h_i)) / (std + delta), centred over the batch, clipped to +-5  [F] Eq. 5
  d = max(M(hq) - mean(h_i), 0), M the judge                                   [A] idea, [R] formula
  w = sigmoid(2 (d - m) / s), m the median and s the spread of d               [F] w_i, [R] formula

Chosen here because we did not have the paper's text [R]:
 1. mean(h_i) holds no reward of the present batch, so it does not depend on the sample that it is
    compared with, and adds no bias to the policy gradient. It lags behind a moving policy. The
    lag that all inputs share is removed with the batch's mean; its differences between inputs stay,
    as variance. Subtracting each input's own mean over this batch would remove these, too, but also
    mean(h_i) itself: the memory would be there in name only.
 2. std is that of r - mean(h_i) over the batch: eight rewards of one input give no steady estimate,
    and would blow up an input whose restorations are all alike.
 3. Each judged step has its own history: the scale of the reward changes along the chain.
 4. s is the interquartile range / 1.349: of a Gaussian its standard deviation, unmoved by
    outliers.
 5. d is computed from the input's memory, not from the sample itself: among samples of one input, a
    sample's own distance falls as its advantage rises, so bad samples would get the larger w, and
    the mean of w A would not be zero. On validation photographs the two choices gain as much LPIPS
    per dB, but with the sample's own distance color noise increases (results/LOG.md).

Needs torch only; the file works copied alone. The loop that uses it:
    python rl.py --task sr --weight baseline                       # laptop
    accelerate launch rl.py --task sr --weight running --out DIR   # GPUs
"""

import torch


class RewardMemory(torch.nn.Module):
    """The latest `size` rewards of each of `inputs` inputs, at each of `steps` judged steps."""

    def __init__(self, inputs, steps=1, size=8):
        super().__init__()
        self.register_buffer("rewards", torch.full((inputs, steps, size), float("nan")))
        self.register_buffer("count", torch.zeros(inputs, steps, dtype=torch.long))

    def push(self, ids, rewards):
        """Remembers rewards (B, K) of inputs ids (B,), in this order; NaN is not remembered."""
        for i, row in zip(ids.tolist(), rewards.tolist(), strict=True):
            for k, reward in enumerate(row):
                if reward == reward:
                    self.rewards[i, k, self.count[i, k] % self.rewards.shape[2]] = reward
                    self.count[i, k] += 1

    def mean(self):
        """Mean of each history, (inputs, K); NaN where there is none."""
        return self.rewards.nanmean(2)


def advantages(rewards, baseline, clip=5.0, delta=1e-4):
    """A = (r - baseline) / (std + delta), centred over the batch, within +-clip.

    rewards (B, K), baseline (B, K): mean of each input's memory -> (B, K), in standard deviations.
    An input without memory takes the batch's mean; a reward that is NaN has advantage 0, as has the
    only one of a batch. Raises ValueError if the shapes differ.
    """
    if rewards.shape != baseline.shape:
        raise ValueError(f"rewards {rewards.shape}, baseline {baseline.shape}: not both (B, K)")
    baseline = torch.where(baseline.isnan(), rewards.nanmean(0), baseline)
    gain = rewards - baseline
    gain = gain - gain.nanmean(0)
    std = gain.square().nanmean(0).sqrt()
    return (gain / (std + delta)).nan_to_num(0.0).clamp(-clip, clip)


def iqa_gap(reward, reward_hq):
    """d = max(M(hq) - M(restored), 0): what the judge still sees between the two; (B,) -> (B,)."""
    return (reward_hq - reward).clamp(min=0)


def median_spread(distance):
    """(median, interquartile range / 1.349) of distances (N,), NaN left out; the spread is > 0."""
    low, middle, high = torch.nanquantile(distance, distance.new_tensor([0.25, 0.5, 0.75]))
    return middle.item(), max((high - low).item() / 1.349, 1e-6)


def weights(spec, distance, distance_sft, distance_now):
    """w = sigmoid(2 (d - m) / s) of distances (B,): 0.5 at the median m, more for the harder.

    spec: "baseline", relative to the distances (N,) of the SFT model, so that w falls and SFT takes
    over as training brings samples close to their ground truth; "running", relative to those of the
    present model, so that half of the inputs always count as hard; "fixed:W", the constant W.
    Raises ValueError for another spec.
    """
    kind, _, number = spec.partition(":")
    if kind == "fixed" and 0 <= float(number) <= 1:
        return torch.full_like(distance, float(number))
    if spec not in ("baseline", "running"):
        raise ValueError(f"weight {spec}: expected baseline, running or fixed:W with W in [0, 1]")
    m, s = median_spread(distance_sft if spec == "baseline" else distance_now)
    w = torch.sigmoid(2 * (distance - m) / s)
    return w.nan_to_num(0.0)  # where nothing is known, SFT only
