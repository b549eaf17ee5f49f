"""Faults that the emulator finds: each is planted in a toy kernel, next to a version of the kernel without it."""

import pytest
import torch

SEEDS = range(20)


@pytest.mark.parametrize("threads", [32, 65, 256])
def test_a_missing_barrier_shows_under_some_order(emulated, threads):
    reverse = emulated("toy_reverse")
    given = torch.arange(3 * threads, dtype=torch.int32)
    wanted = given.view(3, threads).flip(1).flatten()
    right = {True: 0, False: 0}
    for seed in SEEDS:
        for barrier in right:
            found = torch.empty_like(given)
            reverse(given, found, 3, threads, int(barrier), seed=seed)
            right[barrier] += torch.equal(found, wanted)
    assert right == {True: len(SEEDS), False: 0}


def test_an_order_is_repeated_by_its_seed(emulated):
    given = torch.arange(256, dtype=torch.int32)

    def run(seed):
        found = torch.empty_like(given)
        emulated("toy_reverse")(given, found, 1, 256, 0, seed=seed)
        return found

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))


def test_shared_memory_is_not_inherited_from_the_block_before(emulated):
    given = torch.arange(512, dtype=torch.int32)
    found = torch.empty_like(given)
    emulated("toy_reverse")(given, found, 2, 256, 0, seed=1)
    assert set(found[found != given.view(2, 256).flip(1).flatten()].tolist()) == {-1}


def test_different_barriers_and_missing_threads_are_named(emulated):
    divergent = emulated("toy_divergent")
    out = torch.zeros(64, dtype=torch.int32)
    divergent(out, 64)
    assert out.all()
    with pytest.raises(RuntimeError, match=r"different barriers: __syncthreads .*toys.cu:\d+ and __syncthreads"):
        divergent(out, 40)


def test_a_launch_that_cuda_refuses_is_refused(emulated):
    given = torch.zeros(2048, dtype=torch.int32)
    for blocks, threads in ((1, 2048), (0, 32), (1, 0)):
        with pytest.raises(RuntimeError, match="invalid configuration"):
            emulated("toy_reverse")(given, given, blocks, threads, 1)


def test_warp_collectives_under_masks(emulated):
    warp_sum = emulated("toy_warp_sum")
    given, out = torch.randn(32, generator=torch.Generator().manual_seed(0)), torch.zeros(2)
    for seed in SEEDS:
        warp_sum(given, out, -1, 32, seed=seed)
        assert torch.allclose(out[0], given.sum())
        assert out[1] == torch.tensor(float(sum(1 << i for i in range(32) if given[i] > 0)))
    with pytest.raises(RuntimeError, match=r"deadlock.*thread 0 waits at __shfl_down_sync.*thread 20 has ended"):
        warp_sum(given, out, -1, 20)
    with pytest.raises(RuntimeError, match="lane 16 calls it but is not in its mask"):
        warp_sum(given, out, 0xFFFF, 17)
    with pytest.raises(RuntimeError, match="lane 0 reads lane 16, which takes no part"):
        warp_sum(given, out, 0xFFFF, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_core_fragments_give_a_matrix_product(emulated, dtype):
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(16, 16, generator=generator).to(dtype), torch.randn(8, 16, generator=generator).to(dtype)
    for seed in SEEDS:
        c = torch.full((16, 8), torch.nan)
        emulated("toy_mma")(a, b, c, int(dtype == torch.bfloat16), 1, seed=seed)
        assert torch.allclose(c.double(), a.double() @ b.double().t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("small", "steps"), [(2.0**-25, 0), (2.0**-24, 7), (2.0**-23, 15)])
def test_tensor_cores_truncate(emulated, sign, small, steps):
    """Add fifteen products to 1: a quarter of fp32's spacing is lost in each, half of it in their sum."""
    a, b, c = torch.zeros(16, 16).half(), torch.zeros(8, 16).half(), torch.zeros(16, 8)
    a[3], b[5], b[5, 0] = 2.0**-11, small * 2.0**11, 1
    a[3, 0] = 1
    a *= sign
    emulated("toy_mma")(a, b, c, 0, 1)
    assert c[3, 5] == sign * (1 + steps * 2.0**-23)


def test_an_asynchronous_copy_has_not_arrived_before_it_is_waited_for(emulated):
    a, b, c = torch.ones(16, 16).half(), torch.ones(8, 16).half(), torch.zeros(16, 8)
    emulated("toy_mma")(a, b, c, 0, 0)
    assert c.isnan().all()


def test_transposed_matrices_and_zero_filled_copies(emulated):
    given = torch.arange(1, 129, dtype=torch.int16).view(2, 8, 8)
    found = torch.zeros(2, 8, 8, dtype=torch.int16)
    emulated("toy_transpose")(given, found)
    wanted = given.clone()
    wanted[1, :, 3:] = 0  # 6 of 16 bytes were copied
    assert torch.equal(found, wanted.transpose(1, 2))


def test_blocks_of_a_cluster_read_each_other(emulated):
    cluster = emulated("toy_cluster")
    own = torch.arange(8 * 64, dtype=torch.float32).view(2, 4, 64)
    for seed in SEEDS:
        found = torch.zeros(2, 4, 64)
        cluster(found, 4, 8, 1, 1, seed=seed)
        assert torch.equal(found, own.roll(-1, 1))
        with pytest.raises(RuntimeError, match=r"that block has ended|has ended where others wait"):
            cluster(found, 4, 8, 1, 0, seed=seed)
        with pytest.raises(RuntimeError, match="invalid configuration"):
            cluster(found, 4, 6, 1, 1, seed=seed)
    found = torch.zeros(2, 4, 64)
    with pytest.raises(RuntimeError, match="has not begun"):
        cluster(found, 4, 8, 0, 1)


@pytest.mark.nightly
def test_reads_out_of_range_are_found_by_the_address_sanitizer(sanitized):
    assert sanitized("read", 100).stdout == "nothing found\n"
    found = sanitized("read", 101)
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr and "neighbour_kernel" in found.stderr


@pytest.mark.nightly
def test_writes_beyond_shared_memory_are_found_by_the_sanitizers(sanitized):
    assert sanitized("shared", 31).stdout == "nothing found\n"
    found = sanitized("shared", 32)
    assert found.returncode != 0 and "out of bounds" in found.stderr + found.stdout.replace("-of-", " of ")
