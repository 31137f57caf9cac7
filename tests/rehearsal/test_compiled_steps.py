"""What torch.compile makes of a training step: how many graphs, and the same numbers. Traced only, so without C++."""

import copy

import pytest
import torch
from training_steps import CASES, Graphs, autoencoder, batch

from hf_dpssl.data.views import NATURAL, TwoViews
from hf_dpssl.models import matrix_products
from hf_dpssl.models.codebook_search import nearest_codes
from hf_dpssl.models.matrix_products import differentiable_product

METHODS = ["t-MoCo"] + [
    pytest.param(method, marks=pytest.mark.extended) for method in ("SimCLR", "t-SimCLR", "t-SimCLR auto", "MoCo")
]
CODEBOOKS = [
    {},
    pytest.param({"num_codes": 2500}, marks=pytest.mark.extended),  # with so many codes candidates are searched for
    pytest.param(
        {"codebook_update": "gradient", "code_distance": "cosine", "entropy_weight": 0.1}, marks=pytest.mark.extended
    ),
]


@pytest.fixture(autouse=True)
def traced_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_copy(model, backend, **options):
    copied = copy.deepcopy(model)
    copied.compile(backend=backend, **options)
    return copied


def check_same(model, other):
    """Gradients, parameters and buffers."""
    for (name, value), its in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (value.grad is None) == (its.grad is None), name
        if value.grad is not None:
            torch.testing.assert_close(its.grad, value.grad, rtol=1e-4, atol=1e-7, msg=name)
    for (name, value), its in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(its, value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_contrastive_training_step_is_two_graphs_at_most_with_the_results_of_eager_mode(method):
    model = CASES[f"contrastive {method}"]()[0][0]
    graphs = Graphs()
    compiled = compiled_copy(model, graphs)
    given, views = batch(), TwoViews(NATURAL, [0.5] * 3, [0.2] * 3, 0)
    for epoch in range(2):  # the first starts queue and temperature
        both = views(given["images"], given["sample_ids"], epoch)
        options = {"momentum": 0.99 + 0.001 * epoch} if "MoCo" in method else {}
        losses = []
        for each in (model, compiled):
            each.zero_grad()
            losses.append(each(*both, **options).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)
        check_same(model, compiled)
        assert graphs.count <= 2, f"{graphs.count} graphs after {epoch + 1} steps"


@pytest.mark.parametrize("options", CODEBOOKS)
def test_an_autoencoder_is_one_graph_in_training_and_in_evaluation_with_the_results_of_eager_mode(options):
    model = autoencoder(**options)[0][0]
    model.quantizer.defer_update = False  # so that the codebook moves within the graph
    graphs = Graphs()
    compiled = compiled_copy(model, graphs, fullgraph=True)
    images = batch()["images"].float() / 127.5 - 1
    for seed in range(2):  # the first starts the codebook
        outputs = []
        for each in (model, compiled):
            each.zero_grad()
            torch.manual_seed(seed)
            outputs.append(each(images))
            outputs[-1].loss.backward()
        torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=1e-7)
        assert torch.equal(outputs[1].codes, outputs[0].codes)
        check_same(model, compiled)
    assert int(compiled.quantizer.is_initialized) == 1 and graphs.count == 1
    with torch.no_grad():
        outputs = [each.eval()(images) for each in (model, compiled)]
    torch.testing.assert_close(outputs[1].pixel_values, outputs[0].pixel_values, rtol=1e-5, atol=1e-6)
    assert torch.equal(outputs[1].codes, outputs[0].codes)


COMPILED = ["dae_dit flow", "dae_drift mlp"]
COMPILED += [
    pytest.param(name, marks=pytest.mark.extended)
    for name in (
        "dae_dit mean_flow",
        "dae_drift",
        "dae_ar gpt2",
        "dae_ar llama",
        "dae_gan dae",
        "dae_gan dae, penalty",
        "dae_gan noise",
        "dae_gan vae",
        "dae_gan simclr",
    )
]


@pytest.mark.parametrize("name", COMPILED)
def test_a_generators_training_step_is_one_graph_with_the_gradients_of_eager_mode(name):
    """What --compile compiles: of a GAN not the discriminator, whose penalty is differentiated twice."""
    graphs, made = Graphs(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        modules, prepare, step = CASES[name]()
        if name.startswith("dae_dit") or name == "dae_drift":
            for parameter in modules[0].parameters():  # whose blocks begin as the identity
                parameter.data += 0.05 * torch.randn_like(parameter)
        if compiled:
            modules[0].compile(backend=graphs)
        prepare()
        for seed in range(2):
            modules[0].zero_grad()
            torch.manual_seed(seed)  # of the dropout
            step(batch())
        made.append(modules[0])
    check_same(*made)
    assert graphs.count == 1


def test_products_and_searches_within_a_graph_ask_for_all_bits_when_it_runs(monkeypatch):
    """A graph that was traced under one setting runs under another."""
    seen = []
    computed = matrix_products._product

    def watched(*given):
        seen.append(matrix_products._precision())
        return computed(*given)

    def both(x, y):
        return differentiable_product(x, y), nearest_codes(x.detach(), y.detach())

    x, y = torch.randn(12, 4, requires_grad=True), torch.randn(9, 4)
    traced = torch.compile(both, backend="eager", fullgraph=True)
    traced(x, y)
    monkeypatch.setattr(matrix_products, "_product", watched)
    before = matrix_products._precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert not set(matrix_products._precision()) <= set(matrix_products._FULL)
        found, codes = traced(x, y)
        found.sum().backward()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        matrix_products._set_precision(before)
    assert len(seen) >= 3 and all(set(setting) <= set(matrix_products._FULL) for setting in seen)
    torch.testing.assert_close(found, x @ y.T)
    torch.testing.assert_close(x.grad, y.sum(0).expand(12, 4))
    assert torch.equal(codes, torch.cdist(x, y).argmin(1))
