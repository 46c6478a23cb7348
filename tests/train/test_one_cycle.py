"""The OneCycle schedule against torch's own, rate and beta1."""

import pytest
import torch

from dist_decoder.config.optim import OptimConfig
from dist_decoder.train.optimizer import set_schedule


@pytest.mark.parametrize(("steps", "warmup"), [(30, 6), (101, 2), (50, 25)])
def test_rate_and_beta1_follow_torch(steps: int, warmup: int) -> None:
    config = OptimConfig(steps=steps, lr=3e-4, schedule="onecycle", warmup_steps=warmup)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=3e-4, total_steps=steps, pct_start=warmup / steps, final_div_factor=1000
    )
    group = {"lr": 0.0, "lr_scale": 0.5, "betas": (0.0, 0.0)}
    for step in range(steps):
        set_schedule([group], config, step)
        expected = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(0.5 * expected["lr"], rel=1e-9, abs=1e-15)
        assert group["betas"] == pytest.approx(expected["betas"], rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            schedule.step()
