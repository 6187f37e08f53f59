"""Families of the training losses."""

import torch

from ..losses import (
    DFLossConfig,
    by_magnitude,
    df_loss,
    df_weights,
    reference_errors,
    velocity_loss,
)
from .case import Case, Comparison, Comparisons


def df_loss_family(case: Case) -> Comparisons:
    """Replays the released loss and its parts at the timesteps of the case."""
    config = DFLossConfig(variant="reference", alpha=case.sidecar.get("alpha", 2.0))
    pred, gt = case["pred"], case["gt"]
    seed = int(case.in_text("note", r"manual_seed\((\d+)\)"))

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    for name, video in (("pred", pred), ("gt", gt)):
        picks = case.tensors.get(f"quantile_index_{name}")
        low, high, cut = by_magnitude(video[0], None if picks is None else picks.long())
        yield Comparison(cut[None], case[f"cutoff_{name}"])
        for span, ours in (("low", low), ("high", high)):
            if f"{span}_{name}" in case.tensors:
                yield Comparison(ours, case[f"{span}_{name}"])
    low, high = reference_errors(pred, gt, generator())
    v = velocity_loss(case["out_v"], case["target_v"])
    for row in case.sidecar["rows"]:
        t = torch.tensor([row["t"]])
        low_weight, high_weight = df_weights(t, config)
        frequency = df_loss(pred, gt, t, config, generator=generator())
        total = low_weight + high_weight
        for ours, key in (
            (v, "loss_v"),
            (low, "loss_low"),
            (high, "loss_high"),
            (total, "weight_t"),
            (v + frequency, "loss"),
        ):
            yield Comparison(ours, torch.tensor([row[key]]), atol=1e-6)
