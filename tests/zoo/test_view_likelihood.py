"""The likelihood of held-out views against a loop from its formula."""

import numpy as np
import pytest
import torch

from hf_dpssl.zoo import held_out_views


def test_likelihood_of_views_is_that_of_the_loop_at_the_other_domains_best_scale():
    domains = torch.tensor([0] * 12 + [1] * 9 + [2] * 15)
    first = torch.randn(36, 5)
    second = first + torch.tensor([0.1, 0.6, 1.5])[domains][:, None] * torch.randn(36, 5)
    found = held_out_views(first, second, domains)

    def mean_log(domain, scale):
        x, y = (views[domains == domain].double().numpy() for views in (first, second))
        unit = np.mean([((a - b) ** 2).sum() for a in x for b in y])
        total = 0.0
        for row, a in enumerate(x):
            kernel = [1 / (1 + scale * ((a - b) ** 2).sum() / unit) for b in y]
            total += np.log(kernel[row] / sum(kernel) * len(y))
        return total / len(x)

    for domain in range(3):
        others = [other for other in range(3) if other != domain]
        scale = max(np.logspace(-3, 5, 33), key=lambda s: sum(mean_log(other, s) for other in others))
        assert found[domain] == pytest.approx(mean_log(domain, scale), rel=1e-9, abs=1e-9)


def test_likelihood_of_views_orders_told_from_noise_from_collapsed():
    domains = torch.arange(90) // 30
    told = torch.randn(90, 8)
    close = held_out_views(told, told + 0.1 * torch.randn(90, 8), domains)
    noise = held_out_views(told, torch.randn(90, 8), domains)
    collapsed = held_out_views(torch.ones(90, 8), torch.ones(90, 8), domains)
    assert min(close) > 2 and max(map(abs, noise)) < 0.1 and collapsed == pytest.approx([0, 0, 0], abs=1e-12)
