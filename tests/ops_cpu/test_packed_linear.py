"""The native linear layers against exact arithmetic on the same rounded activations."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm4.ops.cpu import library
from glm4.ops.cpu.linear import PackedLinear, bf16_linear, make_quantized_linear
from glm4.ops.cpu.memory import Arena, huge_page_tensor
from glm4.ops.cpu.panels import PanelWeight
from glm4.ops.quantized import (
    QuantizedLinear,
    QuantizedWeight,
    dynamic_quantized_linear,
    quantize_activations,
    quantized_linear,
)

slow_to_set_up = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def random_weight(
    rows: int, inputs: int, bits: int = 4, group_size: int = 32, zeros: bool = False, half: bool = True, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group_size
    scales = torch.rand(rows, groups, generator=generator) * 0.02
    shape, low, high, dtype = (
        ((rows, inputs // 2), 0, 256, torch.uint8) if bits == 4 else ((rows, inputs), -128, 128, torch.int8)
    )
    return QuantizedWeight(
        bits,
        group_size,
        torch.randint(low, high, shape, generator=generator, dtype=dtype),
        scales.half().float() if half else scales,
        torch.randint(0, 17, (rows, groups), generator=generator, dtype=torch.uint8) if zeros else None,
    )


def random_activations(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))


def rounding_bound(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, largest: Tensor | None = None) -> Tensor:
    """What float32 may lose: a rounding for each group and a few at the end, of sums no larger than the magnitudes'."""
    values, scale = quantize_activations(x, largest)
    magnitudes = values.double().abs() @ weight.dequantize(torch.float64).abs().t() * scale.double()
    return (weight.scales.shape[1] + 4) * 2.0**-24 * (magnitudes + (0.0 if bias is None else bias.abs()))


four_bits = st.builds(
    lambda rows, groups, size, **more: random_weight(rows, groups * size, 4, size, **more),
    rows=st.integers(1, 100),
    groups=st.integers(1, 5),
    size=st.sampled_from([8, 24, 32, 64, 128]),
    zeros=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 9),
)
eight_bits_grouped = st.builds(
    lambda rows, groups, size, **more: random_weight(rows, groups * size, 8, size, **more),
    rows=st.integers(1, 100),
    groups=st.integers(1, 5),
    size=st.sampled_from([32, 64, 128]),
    half=st.booleans(),
    seed=st.integers(0, 9),
)
eight_bits_by_row = st.builds(
    lambda rows, inputs, **more: random_weight(rows, inputs, 8, inputs, **more),
    rows=st.integers(1, 100),
    inputs=st.integers(1, 300),
    half=st.booleans(),
    seed=st.integers(0, 9),
)


@given(
    weight=four_bits | eight_bits_grouped | eight_bits_by_row,
    tokens=st.integers(0, 20),
    with_bias=st.booleans(),
    threads=st.integers(1, 5),
    before=st.integers(0, 3),
    with_largest=st.booleans(),
)
@slow_to_set_up
def test_equals_exact_arithmetic_on_every_instruction_set(
    isas: list[str],
    weight: QuantizedWeight,
    tokens: int,
    with_bias: bool,
    threads: int,
    before: int,
    with_largest: bool,
) -> None:
    """Odd shapes, no tokens at all, rows of a wider matrix that begin anywhere, scales of a larger whole."""
    bias = random_activations(1, weight.out_features, seed=3)[0] if with_bias else None
    x = random_activations(tokens, weight.in_features + 5)[:, before : before + weight.in_features]
    largest = random_activations(2, tokens, seed=4)[0].abs() * 4 if with_largest else None
    layer = PackedLinear.pack(weight, bias)
    library.set_threads(threads)
    outputs = []
    for isa in isas:
        library.select_isa(isa)
        outputs.append(layer(x, largest))
    exact = dynamic_quantized_linear(x.double(), weight, bias, largest)
    assert outputs[0].shape == exact.shape
    assert ((outputs[0] - exact).abs() <= rounding_bound(x, weight, bias, largest)).all()
    for other in outputs[1:]:
        assert torch.equal(other, outputs[0])


@given(tokens=st.integers(1, 9), seed=st.integers(0, 9))
@slow_to_set_up
def test_parts_of_the_inputs_add_up_to_the_whole(isas: list[str], tokens: int, seed: int) -> None:
    """Where each is told the whole's largest magnitude: a sum is cut between groups, so only its rounding differs."""
    weight = random_weight(50, 256, group_size=64, zeros=True, seed=seed)
    assert weight.zeros is not None
    x = random_activations(tokens, 256, seed)
    x[0, 200] = torch.inf
    largest = x.abs().amax(1)
    halves = [
        PackedLinear.pack(
            QuantizedWeight(
                4, 64, weight.values[:, n : n + 64], weight.scales[:, k : k + 2], weight.zeros[:, k : k + 2]
            )
        )
        for n, k in ((0, 0), (64, 2))
    ]
    for isa in isas:
        library.select_isa(isa)
        first, second = halves[0](x[:, :128], largest), halves[1](x[:, 128:], largest)
        whole = PackedLinear.pack(weight)(x)
        assert first[0].isnan().all() and second[0].isnan().all() and whole[0].isnan().all()
        assert ((first + second - whole)[1:].abs() <= 2 * rounding_bound(x, weight, None)[1:]).all()


@given(weight=four_bits | eight_bits_by_row, tokens=st.integers(1, 20), threads=st.integers(1, 3))
@slow_to_set_up
def test_a_token_does_not_depend_on_its_neighbours(
    isas: list[str], weight: QuantizedWeight, tokens: int, threads: int
) -> None:
    x = random_activations(tokens, weight.in_features)
    layer = PackedLinear.pack(weight)
    for isa in isas:
        library.select_isa(isa)
        library.set_threads(threads)
        together = layer(x)
        library.set_threads(1)
        assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))


def test_bfloat16_is_the_float32_result_rounded(isas: list[str]) -> None:
    weight = random_weight(77, 256, group_size=64)
    x = random_activations(9, 256).bfloat16()
    layer = PackedLinear.pack(weight)
    for isa in isas:
        library.select_isa(isa)
        assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_many_tokens_are_cut_into_blocks_that_change_nothing(isas: list[str]) -> None:
    layer = PackedLinear.pack(random_weight(40, 64))
    x = random_activations(1100, 64)
    assert torch.equal(layer(x), torch.cat([layer(part) for part in x.split(7)]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others_alone(isas: list[str], bad: float) -> None:
    weight = random_weight(33, 64)
    x = random_activations(5, 64)
    clean = PackedLinear.pack(weight)(x)
    x[2, 63] = bad
    for dtype in (torch.float32, torch.bfloat16):
        for isa in isas:
            library.select_isa(isa)
            out = PackedLinear.pack(weight)(x.to(dtype))
            assert out[2].isnan().all()
            if dtype is torch.float32:
                assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-45, 3e38])
def test_the_smallest_and_largest_numbers(isas: list[str], size: float) -> None:
    weight = random_weight(33, 64)
    x = torch.full((1, 64), size)
    for isa in isas:
        library.select_isa(isa)
        out = PackedLinear.pack(weight)(x)
        expected = dynamic_quantized_linear(x.double(), weight).float()
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-30)


def test_scales_below_the_normal_range_of_float16(isas: list[str]) -> None:
    weight = random_weight(64, 32)
    weight.scales.copy_(torch.arange(64)[:, None] * 2.0**-24)
    x = random_activations(3, 32)
    for isa in isas:
        library.select_isa(isa)
        layer = PackedLinear.pack(weight)
        assert (
            (layer(x) - dynamic_quantized_linear(x.double(), weight)).abs() <= rounding_bound(x, weight, None)
        ).all()


@given(weight=four_bits | eight_bits_grouped | eight_bits_by_row)
@slow_to_set_up
def test_the_readable_order_of_panels_is_the_kernels(isas: list[str], weight: QuantizedWeight) -> None:
    panels = PanelWeight.pack(weight)
    packed = PackedLinear.pack(weight)
    for ours, theirs in zip((panels.values, panels.scales, panels.zeros), packed._memory, strict=False):
        assert ours is not None
        assert torch.equal(ours.flatten().view(torch.uint8), theirs[: ours.nbytes])
    back = panels.unpack()
    assert torch.equal(back.values, weight.values) and torch.equal(back.scales, weight.scales)
    assert weight.zeros is None or (back.zeros is not None and torch.equal(back.zeros, weight.zeros))
    x = random_activations(2, weight.in_features)
    assert torch.equal(make_quantized_linear(panels)(x), packed(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_panels_are_used_where_they_lie_in_a_file(isas: list[str], tmp_path: Path) -> None:
    weight, x = random_weight(77, 128, group_size=64, zeros=True), random_activations(3, 128)
    panels = PanelWeight.pack(weight)
    parts = [panels.values, panels.scales, panels.zeros]
    mapped = []
    for number, part in enumerate(parts):
        assert part is not None
        (tmp_path / str(number)).write_bytes(bytes(part.flatten().view(torch.uint8).tolist()))
        with (tmp_path / str(number)).open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped.append(torch.frombuffer(view, dtype=part.dtype).view(part.shape))
    layer = PackedLinear.over(PanelWeight(77, 128, 4, 64, *mapped))
    assert layer._memory[0].data_ptr() == mapped[0].data_ptr()
    assert torch.equal(layer(x), PackedLinear.pack(weight)(x))
    with pytest.raises(ValueError, match="used where it lies"):
        layer.fill(0, weight)
    with pytest.raises(ValueError, match="no weight in panels"):
        PackedLinear.over(PanelWeight(78 + 32, 128, 4, 64, *mapped))


def test_weights_that_come_in_blocks_of_rows(isas: list[str]) -> None:
    weight = random_weight(100, 128, zeros=True)
    layer = PackedLinear(100, 128, 4, 32, zeros=True)
    for first, end in ((64, 100), (0, 32), (32, 64)):
        assert weight.zeros is not None
        part = QuantizedWeight(4, 32, weight.values[first:end], weight.scales[first:end], weight.zeros[first:end])
        layer.fill(first, part)
    x = random_activations(3, 128)
    assert torch.equal(layer(x), PackedLinear.pack(weight)(x))


def test_blocks_that_do_not_fit_are_refused(isas: list[str]) -> None:
    layer = PackedLinear(100, 128, 4, 32, half_scales=True)
    for first, block in (
        (16, random_weight(32, 128)),  # not at a panel's border
        (96, random_weight(32, 128)),  # past the end
        (0, random_weight(16, 128)),  # ends inside a panel
        (0, random_weight(32, 128, group_size=64)),
        (0, random_weight(32, 128, zeros=True)),
        (0, random_weight(32, 64)),
        (0, random_weight(32, 128, half=False)),
    ):
        with pytest.raises(ValueError, match="rows"):
            layer.fill(first, block)


def test_activations_that_do_not_fit_are_refused(isas: list[str]) -> None:
    layer = PackedLinear.pack(random_weight(32, 64))
    for x in (torch.zeros(2, 32), torch.zeros(64), torch.zeros(1, 2, 64)):
        with pytest.raises(ValueError, match="64 inputs"):
            layer(x)
    with pytest.raises(ValueError, match="float16"):
        layer(torch.zeros(1, 64, dtype=torch.float16))
    for largest in (torch.zeros(2), torch.zeros(1, 1), torch.zeros(1, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="largest"):
            layer(torch.zeros(1, 64), largest)


def test_threads_that_call_at_the_same_time(isas: list[str]) -> None:
    layers = [PackedLinear.pack(random_weight(200, 128, seed=seed)) for seed in range(4)]
    inputs = [random_activations(1 + seed, 128, seed) for seed in range(4)]
    library.set_threads(3)
    wanted = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        wrong.extend(i for _ in range(300) if not torch.equal(layers[i](inputs[i]), wanted[i]))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_child_of_fork_has_threads_of_its_own(isas: list[str]) -> None:
    layer, x = PackedLinear.pack(random_weight(200, 128)), random_activations(3, 128)
    library.set_threads(2)
    wanted = layer(x)

    def check() -> None:
        os._exit(0 if torch.equal(layer(x), wanted) and library.need().glm4_threads() == 2 else 1)

    child = multiprocessing.get_context("fork").Process(target=check)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert torch.equal(layer(x), wanted)


def test_memory_goes_back_when_a_layer_does(isas: list[str]) -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    for _ in range(20):
        PackedLinear(4096, 4096, 8, 4096)
    gc.collect()
    assert mapped() - before < 4 * 4096 * 4096


@given(sizes=st.lists(st.integers(0, 5000), max_size=30))
def test_pieces_of_an_arena_lie_apart(sizes: list[int]) -> None:
    """Each is as long as asked for, begins on a cache line, starts as zeros and keeps what is written to it."""
    arena = Arena(4096)
    pieces = [arena.take(size) for size in sizes]
    for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert len(piece) == size and not piece.any()
        assert size == 0 or piece.data_ptr() % 64 == 0
        piece.fill_(number + 1)
    assert all((piece == number + 1).all() for number, piece in enumerate(pieces))


def test_layers_share_an_arena(isas: list[str]) -> None:
    """The small ones lie on the same pages, and give what they give alone, also when others are gone."""
    arena, x = Arena(), random_activations(3, 64)
    weights = [random_weight(40, 64, bits, seed=bits) for bits in (4, 8)]
    layers = [make_quantized_linear(weight, arena=arena) for weight in weights]
    first, second = (layer._memory[0].data_ptr() for layer in layers)
    assert first < second < first + 8192
    wanted = make_quantized_linear(weights[1])(x)
    del layers[0], arena
    gc.collect()
    assert torch.equal(layers[0](x), wanted)


def test_threads_sleep_when_there_is_nothing_to_do(isas: list[str]) -> None:
    code = (
        "import time, torch; from glm4.ops.cpu import library; from glm4.ops.cpu.linear import PackedLinear\n"
        "library.set_threads(4); layer = PackedLinear(256, 256, 8, 256); layer(torch.ones(1, 256))\n"
        "start = time.process_time(); time.sleep(0.5); print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1


def test_the_environment_chooses_the_instruction_set(isas: list[str]) -> None:
    code = "from glm4.ops.cpu import library; print(library.kernels_summary())"

    def summary(isa: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {library.ISA_VARIABLE: isa}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    for isa in isas:
        assert f"native, {isa}, forced by GLM4_CPU_ISA" in summary(isa).stdout
    assert "GLM4_CPU_ISA: 'sse9' is none of plain, avx2, avx512vnni, avx512bf16" in summary("sse9").stderr


def test_without_the_library_the_readable_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library, "_MODULE", "glm4.ops.cpu._no_such_kernels")
    library._open.cache_clear()
    try:
        weight, x = random_weight(40, 64), random_activations(2, 64)
        layer = make_quantized_linear(weight)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(layer(x), quantized_linear(x, weight))
        assert library.kernels_summary().startswith("PyTorch: the native kernels were not built")
        library.set_threads(2)
    finally:
        library._open.cache_clear()


def test_group_sizes_that_the_kernels_do_not_know_run_on_the_reference(isas: list[str]) -> None:
    assert isinstance(make_quantized_linear(random_weight(8, 60, 8, 30)), QuantizedLinear)
    assert isinstance(make_quantized_linear(random_weight(8, 512, 4, 512, zeros=True)), QuantizedLinear)
    with pytest.raises(ValueError, match="groups of 30"):
        PackedLinear.pack(random_weight(8, 60, 8, 30))


@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 300),
    tokens=st.integers(0, 8),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
)
@slow_to_set_up
def test_bfloat16_weights(isas: list[str], rows: int, inputs: int, tokens: int, with_bias: bool, threads: int) -> None:
    """Float32 sums, rounded once; a token alone gives the same bits; the weight may be columns of a wider one."""
    weight = random_activations(rows, inputs + 3, seed=1).bfloat16()[:, 2:-1]
    bias = random_activations(1, rows, seed=2)[0] if with_bias else None
    x = random_activations(tokens, inputs + 1, seed=3).bfloat16()[:, 1:]
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    magnitudes = x.double().abs() @ weight.double().abs().t() + (0.0 if bias is None else bias.double().abs())
    bound = 2**-8 * exact.abs() + 2**-18 * magnitudes
    library.set_threads(threads)
    for isa in isas:
        library.select_isa(isa)
        out = bf16_linear(x, weight, bias)
        assert out.shape == exact.shape
        assert ((out.double() - exact).abs() <= bound).all()
        for t in range(tokens):
            assert torch.equal(bf16_linear(x[t : t + 1], weight, bias)[0], out[t])


def test_pages_are_dealt_out_to_the_memory_nodes(isas: list[str]) -> None:
    """Here to the one that there is: the system's list of this process's memory says how."""
    kernels, tensor = library.need(), huge_page_tensor((4 << 20,), torch.uint8)
    maps, nodes = Path("/proc/self/numa_maps"), list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if not maps.exists():
        pytest.skip("this system knows no memory nodes")
    if not kernels.glm4_spread(tensor.data_ptr(), tensor.nbytes):
        assert "Seccomp:\t2" in Path("/proc/self/status").read_text(), "nothing forbids it"
        pytest.skip("this container may not choose where memory lies")
    assert kernels.glm4_memory_nodes() == len(nodes)
    [line] = [
        line for line in maps.read_text().splitlines()
        if line.startswith(f"{tensor.data_ptr():x} ")
    ]  # fmt: skip
    assert line.split()[1].startswith("interleave")


def test_tensors_on_huge_pages_begin_as_zeros_and_live_as_long_as_their_views(isas: list[str]) -> None:
    tensor = huge_page_tensor((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5) and tensor.dtype is torch.bfloat16 and not tensor.any()
    view = tensor.fill_(7)[1:, 2]
    del tensor
    gc.collect()
    other = huge_page_tensor((3, 5), torch.bfloat16).fill_(1)
    assert (view == 7).all() and (other == 1).all()
