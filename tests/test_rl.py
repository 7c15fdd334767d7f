"""The combined loss, the control of fidelity, and the loop: ratio 1, a toy reward rises, determinism, resume."""

import json
import math

import pytest
import torch

import rl
from rl import Config, FidelityPrice, better, check, combined_loss, kl_to_reference, policy_loss
from utils import UserError


def test_clipped_loss_has_the_right_gradient_sign():
    old = torch.zeros(4)
    log_prob = torch.tensor([0.0, 0.0, 0.1, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, info = policy_loss(log_prob, old, advantage, 0.01)
    loss.sum().backward()
    assert log_prob.grad[0] < 0 < log_prob.grad[1]  # descent makes good samples likelier, bad ones less
    assert log_prob.grad[2] == log_prob.grad[3] == 0  # already beyond the clip range in the wanted direction
    assert info["clip_frac"] == 0.5 and info["ratio_error"] == pytest.approx(math.exp(0.1) - 1)
    wrong, _ = policy_loss(torch.tensor([0.1], requires_grad=True), torch.zeros(1), torch.tensor([-1.0]), 0.01)
    assert wrong.item() == pytest.approx(math.exp(0.1))  # the wrong direction is never clipped


def test_kl_equals_torch_distributions(gen):
    mean, ref = (torch.randn(3, 2, 4, 4, generator=gen) for _ in range(2))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    wide = sigma.view(-1, 1, 1, 1)
    Normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(Normal(mean, wide), Normal(ref, wide)).mean((1, 2, 3))
    torch.testing.assert_close(kl_to_reference(mean, ref, sigma), expected)
    assert (kl_to_reference(mean, mean, sigma) == 0).all()


def test_combined_loss_equals_a_loop(gen):
    part, sft, kl, weight = (torch.rand(5, generator=gen) for _ in range(4))
    expected = sum(w * a + (1 - w) * 0.3 * b for w, a, b in zip(weight, part, sft)) / 5 + 0.1 * sum(kl) / 5
    torch.testing.assert_close(combined_loss(part, sft, kl, weight, 0.3, 0.1), expected)
    pure = combined_loss(part, sft, kl, torch.ones(5), 0.3, 0.0)
    assert pure == pytest.approx(part.mean().item())


@pytest.mark.parametrize("worth", (0.5, 1.0, 2.0))
def test_price_holds_the_drop_at_its_budget(worth):
    """A toy: a dB is worth `worth` of the reward, and the drop moves, with inertia, as long as the price is another."""
    price, velocity, drop = FidelityPrice(0.2), torch.zeros(2), torch.zeros(2)
    for _ in range(1500):
        velocity += 0.3 * (0.02 * (worth - price.update(drop)) - velocity)
        drop = drop + velocity
    assert (drop - 0.2).abs().max() < 0.02


def test_price_is_per_unit_and_per_quantity_and_off_without_a_budget():
    assert FidelityPrice(0.2).update(torch.tensor([0.0, 0.2])).tolist() == [0, 0]  # free within the budget
    price = FidelityPrice(0.2, unit=(1.0, 10.0))
    same, first = price.update(torch.tensor([0.4, 0.4])), price.update(torch.tensor([0.5, 0.1]))
    assert same[1] == pytest.approx(10 * same[0].item()) and first[0] > same[0] > 0 and first[1] < same[1] / 10
    assert FidelityPrice(-1.0).update(torch.tensor([3.0, 3.0])).tolist() == [0, 0]


def test_fidelity_of_the_chain_has_the_gradient_of_a_finite_difference(tiny_restorer, gen):
    """The drop through all steps, differentiated: a step along the gradient changes it as predicted."""
    restorer, hq = tiny_restorer(seed=3), torch.rand(4, 3, 32, 32, generator=gen) * 2 - 1
    cfg = Config(steps=4, eta=1.0, samples_per_input=2)
    batch = {"lq": hq.roll(1, 3), "hq": hq, "fidelity_sft": torch.zeros(4, 2)}
    restorer.train_only("modulation")

    def drop():
        return rl.chain_drop(restorer, batch, 0, 1, cfg, torch.Generator().manual_seed(7))
    parameters = restorer.trainable()
    before = drop()
    grads = torch.autograd.grad(before.sum(), parameters)
    norm = sum((g ** 2).sum() for g in grads).sqrt()
    with torch.no_grad():
        for p, g in zip(parameters, grads):
            p -= 1e-3 * g / norm
    after = drop()
    assert before.shape == (2,) and norm > 0
    assert (before - after).sum().item() == pytest.approx(1e-3 * norm.item(), rel=0.1)


def test_better_is_a_higher_reward_within_the_budget():
    def row(reward, psnr, ssim=0.7):
        return {"val_reward": reward, "val_psnr_y": psnr, "val_ssim": ssim}
    sft = row(0.5, 28.0)
    assert better(row(0.6, 27.81), sft, sft, 0.2) and not better(row(0.4, 28.0), sft, sft, 0.2)
    assert not better(row(0.9, 27.79), sft, sft, 0.2) and not better(row(0.6, 28.0, 0.689), sft, sft, 0.2)
    assert not better(row(0.6, 28.0), row(0.7, 28.0), sft, 0.2) and better(row(0.1, 20.0), sft, sft, -1.0)


@pytest.mark.parametrize("changes, words", (
    ({"weight": "fixed:3"}, "--weight"), ({"eta": 0.0}, "--eta"), ({"reward": "judge2"}, "--reward"),
    ({"reward": "pyiqa:piqe"}, "--reward"), ({"reward_mode": "step:0"}, "--reward-mode"), ({"inputs": 999}, "--pool"),
    ({"memory": 2}, "--memory"), ({"average": 1.0}, "--average"), ({"iterations": 0}, "--iterations"),
    ({"distance": "lpips"}, "--distance"), ({"views": 9}, "--views"),
    ({"train": "head"}, "--train")))
def test_bad_flags_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        check(Config(**changes))


SMALL = dict(iterations=4, inputs=2, samples_per_input=2, pool=4, size=64, steps=4, micro_batch=4, views=2,
             save_every=2, dtype="float32", device="cpu")


@pytest.fixture
def run(tmp_path, tiny_restorer, photo_folder, monkeypatch):
    """Trains a tiny restorer for a few iterations with a toy reward (brightness), without the final report."""
    tiny_restorer(seed=5).save(tmp_path / "start")
    import reward
    real = reward.load

    def toy(images, refs=None):
        return images.mean((1, 2, 3))
    monkeypatch.setattr(reward, "load", lambda name, device="cpu": (
        toy if name in ("toy", "judge", "judge2") else real(name, device)))
    monkeypatch.setattr(rl, "report", lambda *args: None)

    def train(out, **changes):
        rl.train(Config(**{**SMALL, "model": str(tmp_path / "start"), "data": str(photo_folder), "reward": "toy",
                           "out": str(tmp_path / out), **changes}))
        return tmp_path / out
    return train


def weights(folder):
    return (folder / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()


def rows(folder):
    import csv
    with open(folder / "metrics.csv") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("mode", ("final", "step", "step:2"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_ratio_is_one_at_the_first_micro_batch(mode, dtype, run):
    log = rows(run("ratio", reward_mode=mode, dtype=dtype))
    assert all(row["ratio_error"] <= 1e-5 for row in log[1:])
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in log[1:])
    assert any(row["approx_kl"] > 0 for row in log[1:])  # later optimizer steps of an iteration do move


def test_a_toy_reward_rises(run):
    log = rows(run("toy", iterations=25, lr=2e-3, weight="fixed:1.0", train="all", kl_coef=0.0, fidelity_budget=-1.0,
                   inputs=4, samples_per_input=4, micro_batch=16, clip_range=0.05, average=0.0, save_every=25))
    first, last = (sum(row["reward"] for row in part) / 5 for part in (log[1:6], log[-5:]))
    assert last > first + 0.005


def test_same_seed_same_weights_and_another_seed_others(run):
    assert weights(run("a")) == weights(run("b")) != weights(run("c", seed=1))


def test_resumed_run_equals_an_unstopped_one(run, monkeypatch):
    whole, calls, original = run("whole"), [], rl.update

    def crash_at_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)
    monkeypatch.setattr(rl, "update", crash_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    monkeypatch.setattr(rl, "update", original)
    stopped = run("stopped", resume=True)
    assert weights(stopped) == weights(whole)
    keys = [k for k in rows(whole)[-1] if not k.startswith("seconds")]
    assert [[r[k] for k in keys] for r in rows(stopped)] == [[r[k] for k in keys] for r in rows(whole)]
    assert json.loads((stopped / "config.json").read_text())["iterations"] == 4


@pytest.mark.parametrize("judged", ((3,), (3, 1), (3, 2, 1, 0)))
def test_advantages_do_not_depend_on_the_micro_batch(judged, gen):
    """Three micro-batches of 2 samples or one of 6: the same advantages, and a step without a judge takes the next."""
    from difficulty import RewardMemory
    rewards, keys = {k: torch.rand(6, generator=gen) for k in judged}, ["0", "0", "1", "1", "2", "2"]

    def batch(part):
        return {"keys": keys[part], "cap": torch.ones(6)[part],
                "rewards": {k: r[part] for k, r in rewards.items()}}
    whole = rl.step_advantages([batch(slice(0, 6))], RewardMemory())[0]
    parts = rl.step_advantages([batch(slice(i, i + 2)) for i in (0, 2, 4)], RewardMemory())
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    for k in range(4):
        assert torch.equal(whole[k], whole[min(j for j in judged if j >= k)])


@pytest.mark.parametrize("part, moves", (("modulation", ("norm", "time_emb", "bias")), ("all", ("",))))
def test_only_the_chosen_part_trains(part, moves, run):
    from safetensors.torch import load_file
    start = run("part", train=part, fidelity_budget=-1.0).parent / "start"
    before, after = (load_file(folder / "unet/diffusion_pytorch_model.safetensors")
                     for folder in (start, start.parent / "part/model"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(any(word in name for word in moves) for name in changed)
    assert part == "modulation" or any(name.endswith("conv1.weight") for name in changed)


@pytest.mark.parametrize("reward, distance", (("psnr", "iqa_gap"), ("ssim", "mse")))
def test_reference_rewards_train(reward, distance, run):
    log = rows(run("ref", reward=reward, distance=distance, iterations=1))
    assert math.isfinite(log[1]["loss"]) and 0 <= log[1]["weight"] <= 1


@pytest.mark.parametrize("updates", (1, 3, 5))
def test_every_optimizer_step_is_taken(updates, run, monkeypatch):
    steps, original = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(1), original(self, *a))[1])
    run("count", updates=updates, iterations=1)
    assert len(steps) == min(updates, 3)  # 4 denoising steps, the last of them without noise


def test_resume_without_a_checkpoint_or_with_another_model_is_an_error(run, tiny_restorer, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        run("nothing", resume=True)
    run("done")
    with pytest.raises(UserError, match="--seed 0"):
        run("done", resume=True, seed=4)
    with pytest.raises(UserError, match="--steps"):
        run("odd", steps=3)
    tiny_restorer(layers_per_block=2).save(tmp_path / "start")
    with pytest.raises(UserError, match="does not fit"):
        run("done", resume=True)


def test_every_logged_column_is_in_the_readme(run):
    from conftest import ROOT
    readme = (ROOT / "README.md").read_text()
    columns = [key for key in rows(run("columns", iterations=1))[-1] if key != "iteration"]
    assert len(columns) > 20 and not [key for key in columns if f"`{key}`" not in readme]
