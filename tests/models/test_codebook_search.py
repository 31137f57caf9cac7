"""The nearest code against float64, whatever the precision, the tiles and the cloud; means of codes and k-means."""

import sys

import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpssl import VectorQuantizer
from hf_dpssl.models.codebook_search import _Search, code_statistics, k_means, nearest_codes

DTYPES = (torch.bfloat16, torch.float32, torch.float64)  # in which candidates are found


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.cdist(vectors.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


CLOUDS = {  # vectors, codebook
    "gaussian": (random(300, 16), random(1000, 16, seed=1)),
    "many columns": (random(100, 256), random(2500, 256, seed=1)),
    "two columns": (random(300, 2), random(700, 2, seed=1)),
    "far from the origin": (random(300, 16) + 1000, random(1000, 16, seed=1) + 1000),
    "vectors far from the codes": (random(300, 16) + 100, random(1000, 16, seed=1)),
    "one outlier": (random(300, 16), torch.cat([random(999, 16, seed=1), 1e4 * random(1, 16)])),
    "close together": (1 + 1e-4 * random(300, 16), 1 + 1e-4 * random(1000, 16, seed=1)),
    "unit length": (F.normalize(random(300, 16)), F.normalize(random(1000, 16, seed=1))),
    "vectors that are codes": (random(1000, 16)[::3], random(1000, 16)),
    "start of diffusers": (
        random(300, 16),
        2 / 1000 * torch.rand(1000, 16, generator=torch.Generator().manual_seed(1)),
    ),
    "tiny": (1e-15 * random(300, 16), 1e-15 * random(1000, 16, seed=1)),
    "huge": (1e15 * random(300, 16), 1e15 * random(1000, 16, seed=1)),
}


def test_distance_to_the_code_is_the_smallest_of_float64(monkeypatch):
    for many in (1, 2048):  # by candidates, and by the smallest product
        monkeypatch.setattr(sys.modules["hf_dpssl.models.codebook_search"], "_MANY_CODES", dict.fromkeys(DTYPES, many))
        for cloud, (vectors, codebook) in CLOUDS.items():
            squared = squared_distances(vectors, codebook)
            found = squared.gather(1, nearest_codes(vectors, codebook)[:, None])[:, 0]
            exact = squared.amin(1)
            norms = (vectors - codebook.mean(0)).double().square().sum(1)
            allowed = 1e-6 * (exact if many == 1 else exact + norms)
            assert bool((found - exact <= allowed).all()), (cloud, many)


def test_candidates_in_bfloat16_and_in_float32_end_in_the_very_same_codes():
    inseparable = ("two columns", "vectors far from the codes", "one outlier", "start of diffusers")
    for cloud, (vectors, codebook) in CLOUDS.items():
        fast = _Search(codebook, torch.bfloat16).nearest(vectors)
        assert fast is not None or cloud in inseparable, cloud
        if fast is not None:
            assert torch.equal(fast, _Search(codebook, torch.float32).nearest(vectors)), cloud


def test_every_code_is_its_own_nearest_and_of_equal_ones_the_first():
    codebook = torch.cat([random(2000, 8), random(2000, 8) + 1e-5 * random(2000, 8, seed=1), random(2000, 8)])
    expected = torch.arange(6000)
    expected[4000:] -= 4000
    assert torch.equal(nearest_codes(codebook, codebook), expected)


def test_thousands_of_codes_that_hardly_differ_give_one_that_is_near_enough():
    for count, spread in ((100, 0.0), (100, 1e-6), (5000, 0.0), (5000, 1e-6)):
        vectors, codebook = random(50, 8), 0.5 + spread * random(count, 8, seed=1)
        squared = squared_distances(vectors, codebook)
        found = squared.gather(1, nearest_codes(vectors, codebook)[:, None])[:, 0]
        torch.testing.assert_close(found, squared.amin(1), rtol=1e-5, atol=0)


def test_order_of_the_codes_does_not_matter():
    vectors, codebook = CLOUDS["gaussian"]
    order = torch.randperm(len(codebook), generator=torch.Generator().manual_seed(2))
    assert torch.equal(order[nearest_codes(vectors, codebook[order])], nearest_codes(vectors, codebook))


def test_vector_that_is_not_a_number_gets_code_zero_and_does_not_disturb_others():
    for count in (1000, 3000):
        vectors, codebook = random(300, 16), random(count, 16, seed=1)
        expected = nearest_codes(vectors, codebook)
        broken = vectors.clone()
        broken[3], broken[5, 0] = torch.nan, torch.inf
        found, sound = nearest_codes(broken, codebook), torch.ones(len(vectors), dtype=torch.bool)
        sound[[3, 5]] = False
        assert torch.equal(found[sound], expected[sound]) and found[3] == 0 and 0 <= found[5] < count


def test_float64_tells_apart_what_float32_cannot():
    codebook = 1 + 1e-9 * random(400, 4).double()
    assert nearest_codes(codebook.float(), codebook.float()).unique().numel() < 400
    assert torch.equal(nearest_codes(codebook, codebook), torch.arange(400))


def test_half_precision_is_compared_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        vectors, codebook = random(300, 16).to(dtype), random(1000, 16, seed=1).to(dtype)
        assert torch.equal(nearest_codes(vectors, codebook), nearest_codes(vectors.float(), codebook.float()))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["bfloat16", "float32"])
def test_no_tensor_is_larger_than_a_tile(scale):
    vectors, codebook = random(20_000, 32), scale * random(6000, 32, seed=1)  # 458 MiB as one matrix of float32
    with Largest() as largest:
        nearest_codes(vectors, codebook)
    assert largest.bytes <= 2**24


def test_derivatives_by_functional_transforms_pass_through_a_quantiser():
    vq, latents = VectorQuantizer(300, 3).eval(), random(2, 3, 4, 4)
    tangent = random(2, 3, 4, 4, seed=1)
    _, moved = torch.func.jvp(lambda x: vq(x).quantized, (latents,), (tangent,))
    assert torch.equal(moved, tangent)


def test_no_vectors_have_no_codes():
    assert nearest_codes(torch.empty(0, 3), random(5, 3)).shape == (0,)


def test_shapes_that_do_not_fit_are_refused():
    for vectors, codebook in (((4, 3), (5, 2)), ((4, 3, 1), (5, 3)), ((4, 3), (0, 3))):
        with pytest.raises(ValueError, match="do not fit"):
            nearest_codes(torch.zeros(vectors), torch.zeros(codebook))


@for_each("tile", [(1, 1, 1), (7, 8, 4), (512, 2048, 128)])
def test_nearest_codes_equal_brute_force_also_in_tiles(tile, monkeypatch):
    for name, size in zip(("_TILE_VECTORS", "_TILE_CODES", "_BLOCK"), tile, strict=True):
        monkeypatch.setattr(sys.modules["hf_dpssl.models.codebook_search"], name, size)
    for rows, codes, columns in ((1, 1, 1), (40, 7, 3), (101, 32, 4)):
        vectors, codebook = random(rows, columns), random(codes, columns, seed=1)
        squared = (vectors.double()[:, None] - codebook.double()[None]).pow(2).sum(2)
        for many in (1, 2048):
            monkeypatch.setattr(
                sys.modules["hf_dpssl.models.codebook_search"], "_MANY_CODES", dict.fromkeys(DTYPES, many)
            )
            assert torch.equal(nearest_codes(vectors, codebook), squared.argmin(1))


def test_code_statistics_equal_the_loop():
    vectors, codes = random(30, 2), torch.randint(5, (30,), generator=torch.Generator().manual_seed(0))
    expected_counts, expected_sums = torch.zeros(6), torch.zeros(6, 2)
    for vector, code in zip(vectors, codes.tolist(), strict=True):
        expected_counts[code] += 1
        expected_sums[code] += vector
    counts, sums = code_statistics(vectors, codes, 6)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums)


def four_clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """100 vectors in 4 clusters of 25, far apart, and the clusters' means."""
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = corners.repeat_interleave(25, 0) + 0.1 * random(100, 2)
    return vectors, vectors.view(4, 25, 2).mean(1)


def test_k_means_finds_the_means_of_separated_clusters():
    vectors, means = four_clusters()
    errors = []
    for seed in range(10):  # Lloyd's algorithm stays in local optima, so not every start finds them
        torch.manual_seed(seed)
        errors.append(float(torch.cdist(means, k_means(vectors, 4)).amin(1).max()))
    assert min(errors) < 1e-5


def test_k_means_ends_with_every_row_at_the_mean_of_its_vectors():
    vectors, means = four_clusters()
    found = k_means(vectors, 16, iterations=50)
    assert torch.cdist(means, found).amin(1).max() < 0.3, "a cluster has no row"
    codes = nearest_codes(vectors, found)
    for code in codes.unique():
        torch.testing.assert_close(found[code], vectors[codes == code].mean(0))


def test_k_means_with_fewer_vectors_than_codes_gives_finite_rows_near_the_vectors():
    vectors = random(5, 3)
    found = k_means(vectors, 12)
    assert found.shape == (12, 3)
    assert torch.cdist(found, vectors).amin(1).max() < 0.1
    assert torch.cdist(vectors, found).amin(1).max() < 0.1
