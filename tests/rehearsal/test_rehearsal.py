"""What a GPU would meet, without one: tensors of two devices, and values that the host waits for."""

import copy
import functools

import numpy as np
import pytest
import torch
from training_steps import CASES, batch, waits_of

from hf_dpssl.contrastive import losses
from hf_dpssl.contrastive.isotropy import lejepa, random_directions
from hf_dpssl.data.views import PRESETS, TwoViews
from hf_dpssl.latent_training.mean_flow import mean_flow_target
from hf_dpssl.runs.rehearsal import rehearsal

# Of a training step, once a queue is full: norms of embeddings, or whether codes are dead, are read once.
BUDGETS = {
    "contrastive SimCLR": 0,
    "contrastive t-SimCLR": 1,
    "contrastive SimCLR auto": 1,
    "contrastive LeJEPA": 0,
    "contrastive t-SimCLR auto": 1,
    "contrastive MoCo": 0,
    "contrastive t-MoCo": 1,
    "contrastive t-MoCo auto": 1,
    "dae_vq": 1,
    "dae_vq kl": 0,
    "dae_vq equivariant": 1,
    "dae_vq gradient": 1,
    "dae_vq cosine": 1,
    "dae_vq perceptual": 1,
    "dae_vq adversarial": 1,
    "dae_dit flow": 0,
    "dae_dit epsilon": 0,
    "dae_dit learned variance": 0,
    "dae_dit aligned": 0,
    "dae_dit mean_flow": 0,
    "dae_drift": 1,
    "dae_drift mlp": 1,
    "dae_drift decoded": 1,
    "dae_ar gpt2": 0,
    "dae_ar llama": 0,
    "dae_gan dae": 0,
    "dae_gan dae, penalty": 0,
    "dae_gan noise": 0,
    "dae_gan vae": 0,
    "dae_gan simclr": 0,
} | {name: 0 for name in CASES if name.startswith("domains")}
OF_EVERY_SCRIPT = ["contrastive t-MoCo", "dae_vq", "dae_dit flow", "dae_drift", "dae_ar gpt2", "dae_gan dae"]
OF_EVERY_SCRIPT += ["domains sagnet"]


def _counted_and_mixed():
    values = torch.arange(6.0)
    with rehearsal() as rehearsed:
        x = rehearsed.fake_of(values)
        assert x.device.type == "cuda" and (x + 1).sum().device.type == "cuda" and not rehearsed.syncs
        assert float(x.sum()) == 15 and x.tolist() == values.tolist() and len(x[x > 2]) == 3
        waits = [line.split(": ")[1] for line in rehearsed.syncs]
        assert waits == ["_local_scalar_dense", "tolist", "index"] and "test_rehearsal.py" in rehearsed.syncs[0]
        rehearsed.clear()
        x.cpu()
        torch.ones(3).to("cuda")
        torch.ones(3).to("cuda", non_blocking=True)
        assert len(rehearsed.syncs) == 2
        with torch.autocast("cuda", torch.bfloat16):
            float(x.sum())
        assert "test_rehearsal.py" in rehearsed.syncs[-1]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(6)


def _lists_as_indices():
    values = torch.arange(60.0).view(3, 4, 5)
    indices = ([0, 2], (slice(None), slice(None), [1, 4]), (0, range(2)), [True, False, True], (..., [[0, 1], [1, 0]]))
    for index in indices:
        expected = values.clone()
        expected[index] += 1
        with rehearsal() as rehearsed:
            on_gpu, on_cpu = rehearsed.fake_of(values.clone()), torch.arange(60.0).view(3, 4, 5)
            found = on_gpu[index]
            waits = [line.split(": ")[1] for line in rehearsed.syncs]
            on_gpu[index] += 1
            on_cpu[index] += 1
        # A mask is waited for once more.
        assert waits[0] == "_to_copy" and len(waits) == 1 + (index == [True, False, True]), index
        assert torch.equal(found.rehearsed, values[index]), index
        assert torch.equal(on_gpu.rehearsed, expected) and torch.equal(on_cpu.rehearsed, expected), index


def _changes_in_place():
    values = torch.arange(60.0).view(3, 4, 5)
    with rehearsal() as rehearsed:
        x = rehearsed.fake_of(values.clone())
        x.view(-1)[5:].mul_(3)
        x.unsqueeze_(0)
        assert x.shape == (1, 3, 4, 5) and x[0, 0, 1, 0] == 15
        y = torch.zeros(3)
        y.data = x
        assert y.shape == x.shape and y.device == x.device and y[0, 0, 1, 0] == 15
        on_cpu = torch.zeros(2, 2)
        on_cpu[torch.tensor([0, 1]), torch.tensor([0, 1])] = 7
        assert on_cpu.tolist() == [[7, 0], [0, 7]]


def _arrays():
    values = torch.arange(6.0)
    with rehearsal() as rehearsed:
        x = rehearsed.fake_of(values)
        with pytest.raises(TypeError, match="copy it first"):
            x.numpy()
        assert not rehearsed.syncs
        on_cpu = x.cpu()
        np.asarray(on_cpu)[0] = 5  # memory of both
        assert on_cpu.numpy().tolist() == [5, 1, 2, 3, 4, 5] and len(rehearsed.syncs) == 1
        assert x.numpy(force=True).tolist() == values.tolist() and len(rehearsed.syncs) == 2
        with pytest.raises(RuntimeError, match="requires grad"):
            on_cpu.requires_grad_().numpy()


def _deep_copies():
    from_before = torch.arange(3.0)
    with rehearsal() as rehearsed:
        part = rehearsed.fake_module_(torch.nn.BatchNorm1d(3))
        part.bias.requires_grad_(False)
        whole = copy.deepcopy([part, part.weight, from_before])
        copied = whole[0]
        assert isinstance(copied.weight, torch.nn.Parameter) and copied.weight is whole[1] is not part.weight
        assert copied.weight.device.type == "cuda" and copied.weight.requires_grad and not copied.bias.requires_grad
        with torch.no_grad():
            copied.weight.zero_()
            whole[2][0] = 7
        assert part.weight.tolist() == [1, 1, 1] and copied.weight.tolist() == [0, 0, 0]
        assert whole[2].tolist() == [7, 1, 2] and whole[2].device.type == "cpu"
    assert from_before.tolist() == [0, 1, 2]


def _forward_derivatives():
    [model], _, _ = CASES["dae_dit mean_flow"]()
    for parameter in model.parameters():  # else blocks that start as the identity pass nothing on
        torch.nn.init.normal_(parameter, std=0.2)
    generator = torch.Generator().manual_seed(0)
    noised, velocity = torch.randn(2, 8, 4, 8, 8, generator=generator)
    times, shares = torch.rand(2, 8, generator=generator)
    given = noised, times, times * shares, velocity, torch.arange(8) % 3
    expected = mean_flow_target(model.eval(), *given)
    with rehearsal() as rehearsed:
        rehearsed.fake_module_(model)
        found = mean_flow_target(model, *map(rehearsed.fake_of, given))
        assert found.device.type == "cuda" and not rehearsed.syncs
    assert not torch.allclose(expected, velocity, atol=0.1)
    torch.testing.assert_close(found.rehearsed, expected, rtol=1e-4, atol=1e-4)


def _losses():
    torch.manual_seed(0)
    views = torch.randn(16, 8), torch.randn(16, 8)
    t_kernel = {"kernel": "student_t", "dof": 5.0}
    rows = (1 - torch.eye(16)) / 15
    cases = {
        "info_nce": (0, lambda x, y: losses.info_nce(x, y, temperature=0.5)),
        "clip": (0, lambda x, y: losses.clip(x, y, temperature=0.5)),
        "moco": (0, lambda x, y: losses.moco(x, y.detach(), y.detach(), temperature=0.2)),
        "t_simclr": (1, lambda x, y: losses.t_simclr(x, y, temperature=1.0, dof=5.0)),
        "t-moco": (1, lambda x, y: losses.moco(x, y.detach(), y.detach(), temperature=5.0, **t_kernel)),
        "weighted info_nce": (0, lambda x, y: losses.info_nce(x, y, temperature=0.5, weights=y.detach()[:, 0].abs())),
        "sup_con": (0, lambda x, y: losses.sup_con(x, (16 * y[:, 0]).long() % 3, temperature=0.5)),
        "uniformity": (0, lambda x, y: losses.uniformity(torch.cat([x, y]))),
        "uniformity, far": (0, lambda x, y: losses.uniformity(torch.cat([x, y]), t=9.0)),
        "alignment": (0, lambda x, y: losses.alignment(x, y)),
        "sne": (2, lambda x, y: losses.sne(rows.to(x.device, non_blocking=True), x + y)),
        "lejepa": (0, lambda x, y: lejepa(x, y, random_directions(16, 8, step=0), weight=0.1)),
    }
    for name, (most, loss) in cases.items():
        on_cpu = [view.clone().requires_grad_() for view in views]
        expected = loss(*on_cpu)
        expected.backward()
        with rehearsal() as rehearsed:
            on_gpu = [rehearsed.fake_of(view).requires_grad_() for view in views]
            value = loss(*on_gpu)
            value.backward()
            assert value.device.type == on_gpu[0].grad.device.type == "cuda"
            assert len(rehearsed.syncs) <= most, (name, rehearsed.syncs)
        torch.testing.assert_close(value.rehearsed, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(on_gpu[0].grad.rehearsed, on_cpu[0].grad, rtol=1e-4, atol=1e-6)
    with rehearsal() as rehearsed:  # what a CPU refuses is not waited for, and is no number
        x, y = map(rehearsed.fake_of, views)
        refused = [
            losses.info_nce(x, y, temperature=0.5, weights=x[:, 0]),
            losses.info_nce(x, y, temperature=0.5, weights=torch.zeros_like(x[:, 0])),
            losses.sup_con(x, torch.arange(16, device="cuda"), temperature=0.5),
            losses.uniformity(x / torch.zeros_like(x)),
        ]
        assert not rehearsed.syncs, rehearsed.syncs
    assert all(torch.isnan(value.rehearsed) for value in refused), refused


def _exact_views(names):
    images, ids = batch()["images"], batch()["sample_ids"]
    for name, augmentation in ((name, PRESETS[name]) for name in names):
        most = int(augmentation.jitter > 0)  # how many views have each order of the jitter is read once
        for crop, given in ((True, images), (False, torch.stack([images, images.flip(-1)], 1))):
            views = TwoViews(augmentation, [0.5] * 3, [0.2] * 3, 0, crop=crop, mode="exact")
            expected = views(given, ids, 0)
            with rehearsal() as rehearsed:
                found = views(rehearsed.fake_of(given), rehearsed.fake_of(ids), 0)
                assert len(rehearsed.syncs) == most, (name, crop, rehearsed.syncs)
                assert {view.device.type for view in found} == {"cuda"}
            for view, on_cpu in zip(found, expected, strict=True):
                torch.testing.assert_close(view.rehearsed, on_cpu, rtol=1e-5, atol=1e-5)


def _training_steps(names):
    """Of every step that is over its budget: what waits."""
    over = {name: lines for name in names if len(lines := waits_of(name)) > BUDGETS[name]}
    assert not over, "\n".join(f"{name}: {line}" for name, lines in over.items() for line in lines)


def test_what_waits_for_a_gpu_is_counted_and_what_mixes_devices_raises(rehearse):
    rehearse(_counted_and_mixed)


def test_lists_as_indices_are_copied_to_the_gpu_and_pick_the_values_of_a_cpu(rehearse):
    rehearse(_lists_as_indices)


def test_what_is_changed_in_place_has_values_shape_and_device_of_its_change(rehearse):
    rehearse(_changes_in_place)


def test_arrays_are_of_what_is_copied_to_the_cpu_and_share_its_memory(rehearse):
    rehearse(_arrays)


def test_deep_copies_stay_on_their_device_and_are_changed_alone(rehearse):
    rehearse(_deep_copies)


def test_forward_derivatives_have_the_values_of_a_cpu(rehearse):
    rehearse(_forward_derivatives)


def test_losses_on_a_gpu_wait_once_at_most_and_with_a_cosine_never(rehearse):
    rehearse(_losses)


def test_exact_views_wait_once_for_jitter_and_never_for_blur_with_the_pixels_of_a_cpu(rehearse):
    rehearse(functools.partial(_exact_views, ["imagenet"]))


@pytest.mark.extended
def test_exact_views_of_all_augmentations_wait_once_for_jitter_with_the_pixels_of_a_cpu(rehearse):
    rehearse(functools.partial(_exact_views, [name for name in PRESETS if name != "imagenet"]))


def test_a_training_step_of_every_script_mixes_no_devices_and_waits_no_more_than_its_budget(rehearse):
    rehearse(functools.partial(_training_steps, OF_EVERY_SCRIPT))


@pytest.mark.extended
def test_training_steps_of_all_options_mix_no_devices_and_wait_no_more_than_their_budgets(rehearse):
    assert BUDGETS.keys() == CASES.keys()
    rehearse(functools.partial(_training_steps, [name for name in CASES if name not in OF_EVERY_SCRIPT]))
