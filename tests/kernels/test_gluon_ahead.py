"""The Gluon candidate of bench/gluon_attention.py: compiled for sm_90, and its functions run on the CPU by a model of what they call.

The model runs the three roles as threads, with barriers that have phases and with products that read shared memory as late as they may:
when they are waited for. Copies write as early as they may. It knows no layouts, no registers and no instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
from ahead import CUOBJDUMP, SHARED, resources
from ahead_rows import BF16, FP16, empty
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.experimental import gluon
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import constexpr
from triton.runtime.jit import JITFunction, create_function_from_signature

from pyembed.kernels.attention import schedule
from pyembed.ops import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gluon_attention
from gluon_attention import FORMS, Form, attention

TARGET = GPUTarget("cuda", 90, 32)
WRITTEN = dict(vars(gluon_attention))


def compiled(width: int, dtype: torch.dtype, heads: int, causal: bool, form: Form) -> Any:
    """What a call would launch, compiled for sm_90."""
    backend, found = make_backend(TARGET), []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            bound, special, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
            options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, special, None)
            found.append((GluonASTSource(kernel, signature, constants, attributes), options.__dict__))

        return launch

    q, k = empty(300, 2 * heads, width, dtype=dtype), empty(300, 2, width, dtype=dtype)
    cu = torch.tensor([0, 300], dtype=torch.int32)
    with mock.patch.object(JITFunction, "__getitem__", launcher):
        attention(q, k, k, cu, cu, schedule([300]), causal=causal, scale=1.0, form=form)
    ((source, options),) = found
    return triton.compile(source, target=TARGET, options=options)


@pytest.mark.parametrize(
    ("width", "dtype", "heads", "causal"),
    [(64, BF16, 4, True), (128, BF16, 4, True), (128, FP16, 3, False), (256, BF16, 4, True)],
)
def test_compiles_for_hopper(width: int, dtype: torch.dtype, heads: int, causal: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    form = FORMS[width]
    made = compiled(width, dtype, heads, causal, form)
    assert made.metadata.num_warps == 12
    assert made.metadata.shared <= SHARED[90]

    used = resources(made.asm["cubin"], str(tmp_path))
    sass = subprocess.run([CUOBJDUMP, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    print(f"{width} {dtype}: {used['REG']} registers, {used['STACK']} bytes of stack, {made.metadata.shared} bytes shared")
    # Triton 3.9 gives the assembler --regAllocOptLevel=2, with which one word is stored once, at the start, and read outside the loops.
    spilled = 1 if triton.__version__.startswith("3.9") and width == 128 else 0
    assert len(re.findall(r"\bSTL\b", sass)) <= spilled
    assert used["STACK"] <= 8 * spilled
    assert "UTMALDG" in sass
    assert re.search(r"USETMAXREG\.TRY_ALLOC\S* UP\d, 0xf0", sass)
    assert re.search(r"USETMAXREG\.DEALLOC\S* 0x18", sass)
    # Per group: scores and values of the first and last block, and of both loops; a product is 16 deep.
    scores, values = width // 16, form.keys // 16
    assert len(re.findall(r"\bHGMMA\b", sass)) == 2 * 3 * (scores + values)

    # In the loops both products are issued before the first is waited for, and the exponentials come before the second is.
    words = re.findall(r"\b(HGMMA|MUFU\.EX2|LDL|STL|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01])", sass)
    loops = re.findall("(H*)1(E*)0", "".join({"HGMMA": "H", "MUFU.EX2": "E", "LDL": "L", "STL": "L"}.get(w, w[-1]) for w in words))
    assert len(loops) == 4  # whole and masked blocks, of two groups
    exponentials = 64 * form.keys // 128 + 2
    assert all((len(h), len(e)) == (scores + values, exponentials) for h, e in loops)

    # A buffer is given back by one thread: when all of its group have waited for their products.
    events = re.findall(r"wgmma\.wait_group|mbarrier\.arrive\.shared::cta\.b64|bar\.sync", made.asm["ptx"])
    after = [events[i + 1] for i, event in enumerate(events) if event.startswith("wgmma")]
    assert len(after) == 12
    assert set(after) == {"bar.sync"}


class Pointer:
    def __init__(self, x: torch.Tensor, at: Any = 0) -> None:
        self.x, self.at = x, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.x, self.at + more)

    def load(self, mask: Any = None, other: Any = None) -> torch.Tensor:
        there = torch.as_tensor(True if mask is None else mask)
        at = torch.where(there, torch.as_tensor(self.at), 0)
        return torch.where(there, self.x.as_strided((self.reach,), (1,))[at], torch.tensor(other or 0, dtype=self.x.dtype))

    def store(self, y: torch.Tensor, mask: torch.Tensor) -> None:
        at, mask = torch.broadcast_tensors(self.at, mask)
        self.x.as_strided((self.reach,), (1,))[at[mask]] = y[mask]

    @property
    def reach(self) -> int:
        return 1 + sum((size - 1) * stride for size, stride in zip(self.x.shape, self.x.stride(), strict=True))


class Shared:
    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.dtype = x, x.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.x[i])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.x.view(shape))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.x.permute(order))

    def store(self, x: torch.Tensor) -> None:
        self.x.copy_(x)

    def load(self, layout: Any) -> torch.Tensor:
        return self.x.clone()


class Barrier:
    """Completes a phase when `count` threads have come and all bytes that were announced."""

    changed = threading.Condition()

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phases = 0

    def come(self, threads: int, more: int) -> None:
        with self.changed:
            self.missing -= threads
            self.bytes += more
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.phases, self.missing = self.phases + 1, self.count
            self.changed.notify_all()

    def wait(self, parity: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.phases & 1 != int(parity), timeout=60), "nobody comes any more"


class Bars(list[Barrier]):
    def index(self, i: Any) -> Barrier:
        return self[int(i)]


class Product:
    def __init__(self, a: Any, b: Shared, sum: torch.Tensor, fresh: bool) -> None:
        assert a.dtype == b.dtype
        self.a, self.b, self.sum, self.fresh = a, b, sum, fresh

    def done(self) -> torch.Tensor:
        product = (self.a.x if isinstance(self.a, Shared) else self.a).float() @ self.b.x.float()
        return product if self.fresh else self.sum + product


class Descriptor:
    """A box of rows that are there; zeros for the others. Addresses have 64 bits, as those of the copy engine."""

    def __init__(self, made: Any) -> None:
        self.made, self.dtype, self.layout = made, made.base.dtype, None
        self.block_type = SimpleNamespace(nbytes=made.base.element_size() * torch.Size(made.block_shape).numel())

    def copy(self, at: list[Any], bar: Barrier, to: Shared) -> None:
        made, size = self.made, self.made.base.element_size()
        offset, there = torch.zeros([], dtype=torch.int64), torch.tensor(True)
        for first, count, shape, stride in zip(at, made.block_shape, made.shape, made.strides, strict=True):
            index = int(first) + torch.arange(count)
            offset = offset[..., None] + index * stride * size  # wraps
            there = there[..., None] & (index >= 0) & (index < shape)
        assert (offset[there] % size == 0).all()
        to.store(Pointer(made.base, offset // size).load(there, 0.0))
        bar.come(0, -self.block_type.nbytes)


def modelled(program: int, programs: int) -> dict[str, Any]:
    """The module's functions over the model."""

    def together(roles: Any, warps: list[int], registers: list[int]) -> None:
        faults: list[BaseException] = []

        def run(role: Any, arguments: Any) -> None:
            try:
                role(*arguments)
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=run, args=each) for each in roles]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if faults:
            raise faults[0]

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
        return Bars(Barrier() for _ in range(shape[0])) if dtype is torch.int64 else Shared(torch.full(shape, torch.nan, dtype=dtype))

    def set_up(bar: Barrier, count: int) -> None:
        bar.count = bar.missing = count

    def wait(outstanding: int, deps: list[Any]) -> Any:
        done = [each.done() if isinstance(each, Product) else each for each in deps]
        return done[0] if len(done) == 1 else done

    def no_layout(*_: Any) -> None:
        return None

    names: dict[str, Any] = dict(WRITTEN)
    names["gl"] = SimpleNamespace(
        int32=torch.int32, int64=torch.int64, float32=torch.float32, constexpr=lambda x: x, static_range=range,
        program_id=lambda _: program, num_programs=lambda _: programs, load=Pointer.load, store=Pointer.store, where=torch.where,
        arange=lambda a, b, _: torch.arange(a, b, dtype=torch.int32), full=lambda shape, x, dtype, _: torch.full(shape, x, dtype=dtype),
        zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype), convert_layout=lambda x, _: x, maximum=torch.fmax,
        minimum=torch.minimum, max=lambda x, dim: x.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(dim), sum=torch.sum,
        exp2=torch.exp2, inline_asm_elementwise=lambda asm, kinds, args, *_, **__: args[0], warp_specialize=together,
        allocate_shared_memory=allocate, NVMMASharedLayout=SimpleNamespace(get_default_for=no_layout), SliceLayout=no_layout,
        NVMMADistributedLayout=no_layout, BlockedLayout=no_layout, DotOperandLayout=no_layout,
    )  # fmt: skip
    names["mbarrier"] = SimpleNamespace(
        MBarrierLayout=no_layout, init=set_up, wait=Barrier.wait,
        arrive=lambda bar: bar.come(1, 0), expect=lambda bar, bytes: bar.come(1, bytes),
    )  # fmt: skip
    names["hopper"] = SimpleNamespace(
        fence_async_shared=lambda: None, warpgroup_mma_wait=wait,
        warpgroup_mma=lambda a, b, acc, use_acc=True, is_async=False: Product(a, b, acc, not use_acc),
    )  # fmt: skip
    names |= {"copy": Descriptor.copy, "meet": lambda: None, "range": lambda *ends: map(torch.tensor, range(*map(int, ends)))}
    for name, value in list(names.items()):
        if isinstance(value, gluon._runtime.GluonJITFunction):
            names[name] = FunctionType(value.fn.__code__, names)
        elif isinstance(value, constexpr):
            names[name] = value.value
    return names


class Kernel:
    """In place of the compiled one."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            shown = [Pointer(x) if isinstance(x, torch.Tensor) else Descriptor(x) if hasattr(x, "block_shape") else x for x in args]
            for program in range(grid[0]):
                modelled(program, grid[0])["_kernel"](*shown, **constants)

        return launch


@pytest.fixture
def model() -> Iterator[None]:
    with (
        mock.patch.object(gluon_attention, "_kernel", Kernel()),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(multi_processor_count=3)),
    ):
        yield


def batch(queries: list[int], keys: list[int], heads: int, width: int = 64, seed: int = 0) -> list[Any]:
    """Rows of texts, and NaN beyond the last."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (sum(queries), 2 * heads), (sum(keys), 2), (sum(keys), 2)
    rows = [torch.randn(*shape, width, generator=generator).to(BF16) for shape in shapes]
    cus = [torch.tensor([0, *each]).cumsum(0).to(torch.int32) for each in (queries, keys)]
    return [*(torch.cat([x, torch.full_like(x[:9], torch.nan)]) for x in rows), *cus]


def error(y: torch.Tensor, r: torch.Tensor) -> float:
    return float(((y.double() - r).abs().amax(-1) / r.abs().amax(-1)).nan_to_num(nan=torch.inf).max())


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 9])  # of a group; nine are cut into five and four
@pytest.mark.parametrize("form", [Form(32, 2), Form(16, 3, turns=True, persistent=True)])
def test_model_equals_reference(form: Form, heads: int, causal: bool) -> None:
    queries, keys = [70, 33, 150], [70, 50, 190]
    given, options = batch(queries, keys, heads), {"causal": causal, "scale": 0.2}
    plan, count = schedule(queries), sum(queries)
    y = attention(*given, plan, **options, form=form)[:count]
    cut = [x[: sum(n)] for x, n in zip(given, (queries, keys, keys), strict=False)]
    same = reference.attention(*cut, *given[3:], None, **options)
    r = reference.attention(*(x.double() for x in cut), *given[3:], None, **options)
    assert error(y, r) <= 2 * error(same, r) + 2 * torch.finfo(BF16).eps


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_model_keeps_texts_apart(poison: float) -> None:
    given = batch([70, 45, 70], [70, 45, 70], 3)
    plan, form = schedule([70, 45, 70]), Form(32, 2, turns=True)
    before = attention(*given, plan, causal=False, scale=0.2, form=form)
    for x in given[:3]:
        x[:70] = poison
        x[115:] = poison
    after = attention(*given, plan, causal=False, scale=0.2, form=form)
    assert torch.equal(after[70:115], before[70:115])
    assert not torch.equal(after[:70], before[:70])


@pytest.mark.usefixtures("model")
def test_model_of_rows_that_see_nothing_and_of_empty_tiles() -> None:
    given, plan, form = batch([40, 40], [0, 7], 1), schedule([40, 40]), Form(16, 2, turns=True)
    tiles = plan.tiles("long", 128, torch.device("cpu"))
    plan.made["long", 128, torch.device("cpu")] = torch.cat([tiles, torch.full_like(tiles, -1)])
    y = attention(*given, plan, causal=True, scale=0.2, form=form)
    assert (y[:73] == 0).all()  # no keys; and before the first of seven
    assert (y[73:80] != 0).all()
    assert torch.equal(y[73], given[2][0])  # the one key that it sees


def test_others_are_refused() -> None:
    given, plan = batch([40], [40], 1), schedule([40])
    with pytest.raises(ValueError, match="takes no window"):
        attention(*given, plan, causal=True, scale=1.0, window=(3, 3))
    with pytest.raises(ValueError, match="long texts only"):
        attention(*batch([8], [8], 1), schedule([8]), causal=True, scale=1.0)
    with pytest.raises(ValueError, match=r"got torch\.float32 heads of 64"):
        attention(*(x.float() if x.is_floating_point() else x for x in given), plan, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="heads of 80"):
        attention(*batch([40], [40], 1, width=80), plan, causal=True, scale=1.0)
