"""What the kernels are measured on: every kernel at the layer shapes of real models, with its twin and the library.

A case makes its inputs, runs them through each variant, judges a variant against float64, and knows the fewest
operations and bytes that its result takes. The weights' and features' dtype is bf16 on a GPU. On a CPU it is fp32:
Triton's interpreter gets tl.dot wrong on bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import kernel_library as library
import torch
from streammerge.kernels import dispatch
from torch import Tensor

from streammerge.bench.shapes import SHAPES

TOKENS = 8192  # a batch on a GPU
PROTECTED = 48  # Ω_think in such a batch of the authors' set: 6 samples of 8 positions
ROWS = (1080, 4096)  # Ω_think of the whole set without the held-out tenth, and with `thinking.random` raised
QUERIES, SPANS, SPAN = 200, 4, 16  # rows a sample, spans, columns of a span: 1 / 16 is exact in bf16
LAM, WEIGHT, NOISE = 1.0, 0.02, 0.001  # of the synthetic checkpoints
_PART = 2048  # rows that are compared with float64 at a time


@dataclass(frozen=True)
class Dims:
    """A model's layer."""

    hidden: int
    wide: int
    heads: int
    kv_heads: int
    tokens: int = TOKENS
    lengths: tuple[int, ...] = (1024, 4096)
    protected: int = PROTECTED
    rows: tuple[int, ...] = ROWS
    queries: int = QUERIES

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = {name: Dims(s.hidden, s.wide, s.heads, s.kv_heads) for name, s in SHAPES.items() if name != "0.5b"}
TINY = Dims(64, 96, 4, 2, tokens=128, lengths=(64,), protected=6, rows=(20,), queries=5)


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `run` maps a variant's name to a function of the inputs that returns the result."""

    kernel: str
    model: str
    shape: str
    make: Callable[[int], tuple]  # seed -> inputs
    run: dict[str, Callable[..., Tensor]]
    error: Callable[[Callable, tuple], float]  # (variant, inputs) -> relative error; inputs stay as they are
    limit: float  # of `error`: beyond it, a variant does not compute what the method needs
    flops: float  # the fewest: half of a symmetric result
    unit: str  # what does them: "matmul" of the inputs' dtype, or "tf32"
    bytes: float  # the fewest: inputs once, outputs once
    about: dict


def cases(models: dict[str, Dims], device: torch.device) -> Iterator[Case]:
    """All cases of some models, small kernels first."""
    for build in (span_mass_cases, row_gram_cases, gram_cases, project_cases):
        for name, dims in models.items():
            yield from build(name, dims, device)


def element(device: torch.device) -> torch.dtype:
    """The dtype of weights, features, queries and keys."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def draw(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def relative(found: Tensor, exact: Callable[[slice], Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ in float64, a part of the rows at a time; NaN where something is not finite."""
    wrong = total = 0.0
    for start in range(0, len(found), _PART):
        part = slice(start, start + _PART)
        wanted = exact(part)
        wrong += float((found[part].double() - wanted).square().sum())
        total += float(wanted.square().sum())
    return (wrong / total) ** 0.5


def twice(run: Callable[..., Tensor], *inputs) -> Tensor:
    """The second of two results: the first is filled with NaN and freed, and its memory likely given to the second, so
    that an element that nobody writes shows."""
    first = run(*inputs)
    first.fill_(float("nan"))
    del first
    return run(*inputs)


def both(kernel: str) -> dict[str, Callable]:
    """The kernel and its twin."""
    public = getattr(dispatch, kernel)
    return {name: partial(public, impl=impl) for name, impl in (("Triton", "triton"), ("twin", "torch"))}


def gram_cases(model: str, dims: Dims, device: torch.device) -> Iterator[Case]:
    """C += XᵀX at the widths of the four sites (q, k, v; o; gate, up; down), which are two."""
    dtype = element(device)
    for width in dict.fromkeys((dims.hidden, dims.wide)):
        for n in (dims.protected, None):
            rows = n or dims.tokens

            def make(seed: int, width=width, n=n, rows=rows) -> tuple:
                cov = draw(device, seed, width, width).mul_(rows**0.5)
                cov = cov.triu_().add_(cov.triu(1).T)
                at = torch.randperm(dims.tokens, generator=torch.Generator().manual_seed(seed))[:n].sort()[0]
                x = draw(device, seed + 1, dims.tokens, width, dtype=dtype)
                return cov, x, None if n is None else at.to(device)

            def error(run: Callable, inputs: tuple) -> float:
                cov, x, index = inputs
                chosen = (x if index is None else x[index]).double()
                found = run(cov.clone(), x, index)
                return relative(found, lambda part: cov[part].double() + chosen[:, part].T @ chosen)

            shape = f"d {width}, " + (f"{n} rows of {dims.tokens}" if n else f"all of {dims.tokens} rows")
            yield Case(
                "gram_update", model, shape, make,
                both("gram_update") | {"torch.mm, add": library.mm_update, "torch.addmm": library.addmm_update},
                error, 1e-3, rows * width * (width + 1), "matmul",
                rows * width * dtype.itemsize + 6 * width**2,  # of C, read half of it and write all
                {"d": width, "n": rows, "gathered": n is not None},
            )  # fmt: skip


def row_gram_cases(model: str, dims: Dims, device: torch.device) -> Iterator[Case]:
    """X Xᵀ of all protected rows."""
    dtype = element(device)

    def error(run: Callable, inputs: tuple) -> float:
        wide = inputs[0].double()
        return relative(twice(run, *inputs), lambda part: wide[part] @ wide.T)

    for width in dict.fromkeys((dims.hidden, dims.wide)):
        for n in dims.rows:
            yield Case(
                "row_gram", model, f"{n} rows, d {width}",
                lambda seed, n=n, width=width: (draw(device, seed, n, width, dtype=dtype),),
                both("row_gram") | {"torch.mm": lambda x: library.product(x, x.T)},
                error, 1e-3, width * n * (n + 1), "matmul", n * width * dtype.itemsize + 4 * n**2,
                {"d": width, "n": n},
            )  # fmt: skip


@lru_cache(maxsize=2)
def _basis(device: torch.device, width: int, rank: int) -> Tensor:
    return torch.linalg.qr(draw(device, 1, width, rank))[0].contiguous()


def _projected(inputs: tuple, part: slice) -> tuple[Tensor, Tensor]:
    """λ D_row Δ D_col of some rows in float64, before and after the projection."""
    _, itm, base, blocks, rows, cols, lam, _ = inputs
    delta = lam * rows[part, None].double() * (itm[part].double() - base[part].double()) * cols.double()
    if not blocks:
        return delta, delta
    height, kept = len(itm) // len(blocks), []
    for r in range(0, len(delta), height):  # a part lies in a block, or holds whole ones
        u = blocks[(part.start + r) // height].double()
        some = delta[r : r + height]
        kept.append(some - (some @ u) @ u.T)
    return delta, torch.cat(kept)


def project_error(run: Callable, inputs: tuple) -> float:
    """‖(W* − W_R) U‖ / ‖λ Δ U‖ with W* in fp32, so before the rounding; without a basis the error of W* − W_R.

    Where W* as timed is further from float64 than its rounding, that distance if it is larger.
    """
    lrm, blocks, dtype = inputs[0], inputs[3], inputs[-1]
    narrow = relative(twice(run, *inputs), lambda part: lrm[part].double() + _projected(inputs, part)[1])
    if narrow <= torch.finfo(dtype).eps / 2 + 5e-6:
        narrow = 0.0
    wide = run(*inputs[:-1], torch.float32)
    if not blocks:
        return _larger(narrow, relative(wide - lrm.float(), lambda part: _projected(inputs, part)[1]))
    left, total, height = 0.0, 0.0, len(lrm) // len(blocks)
    for b, u in enumerate(blocks):
        for start in range(b * height, (b + 1) * height, _PART):
            part = slice(start, min(start + _PART, (b + 1) * height))
            left += float(((wide[part].double() - lrm[part].double()) @ u.double()).square().sum())
            total += float((_projected(inputs, part)[0] @ u.double()).square().sum())
    return _larger(narrow, (left / total) ** 0.5)


def _larger(a: float, b: float) -> float:
    return a if a != a or a > b else b  # max() may drop NaN


def project_cases(model: str, dims: Dims, device: torch.device) -> Iterator[Case]:
    """Every module that differs, at ranks of 0, 5 and 20 % of its width. v has a basis a head, o has D_col."""
    h, kv, dtype = dims.hidden, dims.head_dim * dims.kv_heads, element(device)
    modules = {
        "q": (h, h, 1, False), "k": (kv, h, 1, False), "v": (kv, h, dims.kv_heads, False), "o": (h, h, 1, True),
        "gate, up": (dims.wide, h, 1, False), "down": (h, dims.wide, 1, False),
    }  # fmt: skip
    for name, (out, width, count, scaled) in modules.items():
        for share in (0, 0.05, 0.2) if name != "v" else (0.05, 0.2):
            rank, size = round(share * width), out * width

            def make(seed: int, out=out, width=width, rank=rank, count=count, scaled=scaled) -> tuple:
                base = draw(device, seed, out, width).mul_(WEIGHT)
                two = [(base + draw(device, seed + n, out, width).mul_(NOISE)).to(dtype) for n in (1, 2)]
                blocks = [_basis(device, width, rank).roll(seed + b, 0) for b in range(count)] if rank else []
                rows, cols = (draw(device, seed + 3 + i, n).abs() + 0.5 for i, n in enumerate((out, width)))
                cols = cols if scaled else torch.ones_like(cols)
                return *two, base.to(dtype), blocks, rows, cols, LAM, dtype

            run = {name: lambda *inputs, call=call: call(*inputs)[0] for name, call in both("project").items()}
            run["torch.addmm"] = partial(library.unfused, scaled=scaled)
            if rank:
                run["torch.addmm, TF32"] = partial(library.unfused_tf32, scaled=scaled)
            yield Case(
                "project", model, f"{name}: {out} x {width}, r {rank}", make, run, project_error, 1e-4,
                # Δ U and P Uᵀ; residuals of 1e-4 need three TF32 products each
                3 * 4 * size * rank, "tf32",
                4 * size * dtype.itemsize + 4 * (count * width * rank + out + width),
                {"out": out, "in": width, "r": rank, "blocks": count if rank else 0, "D_col": scaled},
            )  # fmt: skip


def span_error(run: Callable, inputs: tuple) -> float:
    """Against float64, a row at a time."""
    q, k, sample, at, spans, scaling = inputs
    group = q.shape[1] // k.shape[1]
    exact = []
    for b, t in zip(sample.tolist(), at.tolist(), strict=True):
        keys = k[b, :, : t + 1].double().repeat_interleave(group, 0)
        shares = ((keys @ q[b, :, t].double()[..., None])[..., 0] * scaling).softmax(-1)
        exact.append(shares @ spans[b, : t + 1].double())
    exact = torch.stack(exact)
    return relative(twice(run, *inputs), lambda part: exact[part])


def span_mass_cases(model: str, dims: Dims, device: torch.device) -> Iterator[Case]:
    """The spans' masses for rows in the second half of every sample of a batch."""
    dtype, heads, kv, dim = element(device), dims.heads, dims.kv_heads, dims.head_dim
    for tokens in dims.lengths:
        batch, n = dims.tokens // tokens, dims.queries

        def places(seed: int, tokens=tokens, batch=batch, n=n) -> Tensor:
            source = torch.Generator().manual_seed(seed)
            half = tokens // 2
            return torch.stack([half + torch.randperm(half, generator=source)[:n].sort()[0] for _ in range(batch)])

        def make(seed: int, tokens=tokens, batch=batch, n=n, places=places) -> tuple:
            q = draw(device, seed, batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)  # as transformers has it
            k = draw(device, seed + 1, batch, tokens, kv, dim, dtype=dtype).transpose(1, 2)
            spans = torch.zeros(batch, tokens, SPANS)
            first = torch.randint(tokens // 2 - SPAN, (SPANS,), generator=torch.Generator().manual_seed(seed))
            for m, start in enumerate(first.tolist()):
                spans[:, start : start + SPAN, m] = 1 / SPAN
            sample = torch.arange(batch).repeat_interleave(n).to(device)
            return q, k, sample, places(seed).flatten().to(device), spans.to(device), dim**-0.5

        keys = float(batch * n * 0.75 * tokens)  # that the rows see, on average
        yield Case(
            "span_mass", model, f"{batch} x {tokens} tokens, {n} rows each, heads {heads} / {kv} x {dim}", make,
            both("span_mass") | {"SDPA": library.sdpa}, span_error, 1e-3, 2 * heads * dim * keys, "matmul",
            dtype.itemsize * dim * batch * (n * heads + tokens * kv) + 4 * batch * SPANS * (tokens + n * heads),
            {"tokens": tokens, "batch": batch, "rows": batch * n, "spans": SPANS},
        )  # fmt: skip
