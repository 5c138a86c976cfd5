"""Every kernel's plain twin against float64: odd shapes, strides, empty inputs, half precision."""

from __future__ import annotations

import pytest
import torch
from streammerge.kernels import KernelUnavailable, forget, gram_update, project, ran, span_mass, why_not
from streammerge.kernels import reference as kernels
from streammerge.kernels.reference import ProjectNorms, attended_inputs

# Relative Frobenius error against float64 on the *same* (already rounded) inputs: arithmetic is fp32 for all of them.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
HALVES = [torch.float32, torch.float16, torch.bfloat16]
ODD = [1, 41, 123]


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    error = float((found.double() - wanted.double()).norm() / max(float(wanted.double().norm()), 1e-30))
    assert error <= TOLERANCE[dtype], error


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between rows and columns."""
    wide = torch.zeros(*(2 * n for n in x.shape), dtype=x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def basis(width: int, rank: int, seed: int = 7) -> torch.Tensor:
    return torch.linalg.qr(randn(width, width, seed=seed))[0][:, :rank].contiguous()


# ---- gram_update


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("width", ODD)
@pytest.mark.parametrize("rows", [0, *ODD])
def test_gram_update(rows, width, dtype):
    x, start = randn(rows, width, dtype=dtype), randn(width, width, seed=1)
    start = start + start.T
    cov = start.clone()
    assert gram_update(cov, strided(x)) is cov
    close(cov, start.double() + x.double().T @ x.double(), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("index", [None, [], [40], [7, 3, 7, 0, 40]])
def test_grams_of_chosen_rows(index, dtype):
    x = randn(41, 123, dtype=dtype)
    index = None if index is None else torch.tensor(index, dtype=torch.long)
    rows = x.double() if index is None else x.double()[index]
    close(gram_update(torch.zeros(123, 123), strided(x), index), rows.T @ rows, dtype)
    found = kernels.row_gram(strided(x), index)
    assert found.dtype == torch.float32
    close(found, rows @ rows.T, dtype)
    assert kernels.row_gram(x.double(), index).dtype == torch.float64


def test_gram_update_adds_up_over_parts():
    x, cov = randn(123, 41), torch.zeros(41, 41, dtype=torch.float64)
    for part in x.split(17):
        gram_update(cov, part)
    close(cov, x.double().T @ x.double(), torch.float64)


# ---- project


def projected(lrm, itm, base, blocks, rows, cols, lam):
    """The formula of method.md, section 2, written out in float64: scale first, project second."""
    delta = rows.double()[:, None] * (itm.double() - base.double()) * cols.double()
    parts = delta.chunk(len(blocks)) if blocks else [delta]
    kept = [p - (p @ u.double()) @ u.double().T for p, u in zip(parts, blocks, strict=True)] if blocks else parts
    return lrm.double() + lam * torch.cat(kept)


def weights(out: int, width: int, dtype=torch.float32):
    return [randn(out, width, seed=n, dtype=dtype) for n in (1, 2, 3)]


def chunks_of(monkeypatch, elements: int) -> None:
    """`project` takes chunks of as many rows as have so many elements, down to one."""
    monkeypatch.setattr(kernels, "_PROJECT_ELEMENTS", elements)
    monkeypatch.setattr(kernels, "_PROJECT_ROWS", 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("out, width, rank, blocks", [
    (1, 1, 1, 1), (1, 41, 3, 1), (41, 1, 0, 1), (123, 41, 40, 1), (41, 123, 5, 1), (123, 123, 41, 1),
    (123, 41, 7, 3), (4, 41, 7, 4), (41, 123, 5, 0),
])  # fmt: skip
def test_project(monkeypatch, out, width, rank, blocks, dtype):
    lrm, itm, base = weights(out, width, dtype)
    bases = [basis(width, rank, seed=10 + b) for b in range(blocks)]
    rows, cols = torch.rand(out) + 0.5, torch.rand(width) + 0.5
    for given in (cols, torch.ones(width)):  # without D_col one product serves two
        wanted = projected(lrm, itm, base, bases, rows, given, 0.7)
        for chunk in (1, 5 * width, 1 << 22):  # one row at a time, odd chunks, all at once
            chunks_of(monkeypatch, chunk)
            merged, _ = project(lrm, itm, base, bases, rows, given, 0.7, torch.float32)
            assert merged.dtype == torch.float32
            close(merged, wanted, dtype)
        merged, _ = project(*map(strided, (lrm, itm, base)), list(map(strided, bases)), rows, given, 0.7, torch.float32)
        close(merged, wanted, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_project_rounds_once(dtype):
    """W* in a narrow dtype is W* in fp32, rounded: never a sum in the narrow dtype, never two roundings."""
    call = (*weights(123, 41, torch.bfloat16), [basis(41, 7)], torch.rand(123), torch.rand(41), 0.7)
    wide, _ = project(*call, torch.float32)
    narrow, _ = project(*call, dtype)
    assert narrow.dtype == dtype and torch.equal(narrow, wide.to(dtype))


@pytest.mark.parametrize("double", [0, 1, 2])
def test_project_computes_in_float64_where_a_model_is(double):
    three = weights(41, 123)
    three[double] = three[double].double()
    u, rows, cols = torch.linalg.qr(randn(123, 9).double())[0], torch.rand(41), torch.rand(123)
    merged, norms = project(*three, [u], rows, cols, 0.7, torch.float64)
    close(merged, projected(*three, [u], rows, cols, 0.7), torch.float64)
    close(norms, measured(*three, [u], rows, cols, 0.7, merged), torch.float64)


def test_project_leaves_its_inputs_alone():
    lrm, itm, base = weights(41, 41)
    kept = [w.clone() for w in (lrm, itm, base)]
    for cols in (torch.ones(41), torch.rand(41)):
        project(lrm, itm, base, [basis(41, 3)], torch.ones(41) * 2, cols, 1.0, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(kept, (lrm, itm, base), strict=True))


@pytest.mark.parametrize("blocks", [[], [torch.zeros(41, 0)], [torch.zeros(41, 0)] * 3])
def test_rank_zero_gives_the_whole_delta(blocks):
    lrm, itm, base = weights(123, 41)
    merged, told = project(lrm, itm, base, blocks, torch.ones(123), torch.ones(41), 0.5, torch.float32)
    norms = ProjectNorms(*told.tolist())
    assert torch.equal(merged, lrm + 0.5 * (itm - base))
    assert norms.delta == norms.applied > 0
    assert norms.lost == norms.inside == norms.sampled == norms.leak == norms.written == 0


def test_full_rank_protects_everything():
    lrm, itm, base = weights(123, 41)
    merged, told = project(lrm, itm, base, [basis(41, 41)], torch.ones(123), torch.ones(41), 1.0, torch.float32)
    norms = ProjectNorms(*told.tolist())
    assert norms.applied < 1e-10 * norms.delta
    close(merged, lrm, torch.float32)


@pytest.mark.parametrize("blocks", [1, 3])
def test_projecting_twice_changes_nothing(blocks):
    lrm, itm, base = weights(123, 41)
    bases = [basis(41, 9, seed=b) for b in range(blocks)]
    ones, zero = (torch.ones(123), torch.ones(41)), torch.zeros(123, 41)
    once, _ = project(zero, itm, base, bases, *ones, 1.0, torch.float32)
    twice, told = project(zero, once, zero, bases, *ones, 1.0, torch.float32)
    norms = ProjectNorms(*told.tolist())
    close(twice, once, torch.float32)
    assert norms.lost / norms.delta < 1e-11


def measured(lrm, itm, base, bases, rows, cols, lam, merged):
    """Every field of ProjectNorms in float64, with D_row and D_col first; `merged` is W* as it was written."""
    delta = itm.double() - base.double()
    scaled = rows.double()[:, None] * delta * cols.double()
    wide = lrm.double()
    kept = projected(torch.zeros_like(wide), itm, base, bases, rows, cols, 1.0).chunk(max(1, len(bases)))
    lost = inside = sampled = leak = written = torch.zeros((), dtype=torch.float64)
    for b, u in enumerate(u.double() for u in bases):
        d, s, w, new = (x.chunk(len(bases))[b] for x in (delta, scaled, wide, merged.double()))
        some = slice(None, None, -(-len(d) // 256))
        lost, inside = lost + (d @ u).square().sum(), inside + (s @ u).square().sum()
        sampled, leak = sampled + (s[some] @ u).square().sum(), leak + (kept[b][some] @ u).square().sum()
        written = written + ((new - w)[some] @ u).square().sum()
    applied = torch.cat(kept).square().sum()
    bad = ~merged.isfinite()
    changed = (merged != lrm.to(merged.dtype)) | bad
    return torch.stack([
        delta.square().sum(), lost, applied, inside, wide.square().sum(), sampled, leak, written,
        changed.sum(), bad.sum(),
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [41, 1000, 1 << 20])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("scaled", [True, False])
def test_norms(monkeypatch, scaled, blocks, chunk, dtype):
    """1539 rows: of one block every seventh is checked for leaks, of three every third."""
    chunks_of(monkeypatch, chunk)
    three = weights(1539, 41)
    three[0][5, 5] = float("inf")
    bases = [basis(41, 9 + b, seed=b) for b in range(blocks)]
    call = (*three, bases, torch.rand(1539), torch.rand(41) if scaled else torch.ones(41), 3.0)
    merged, told = project(*call, dtype)
    found, wanted = ProjectNorms(*told.tolist()), ProjectNorms(*measured(*call, merged).tolist())
    assert found.bad == wanted.bad == 1 and found.changed == wanted.changed > 0
    for name in ("delta", "lost", "applied", "inside", "sampled"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5), name
    assert found.leak <= 1e-10 * found.sampled
    three[0][5, 5] = 0
    merged, told = project(*call, dtype)
    found, wanted = ProjectNorms(*told.tolist()), ProjectNorms(*measured(*call, merged).tolist())
    assert found.bad == 0 and found.weight == pytest.approx(wanted.weight, rel=1e-5)
    assert found.written == pytest.approx(wanted.written, rel=1e-4, abs=1e-9)


def test_a_basis_that_is_not_orthonormal_leaks():
    three, u = weights(1539, 41), 0.9 * basis(41, 9)
    call = (*three, [u], torch.rand(1539), torch.rand(41), 0.3)
    merged, told = project(*call, torch.float32)
    found, wanted = ProjectNorms(*told.tolist()), ProjectNorms(*measured(*call, merged).tolist())
    assert found.leak == pytest.approx(wanted.leak, rel=1e-5) and found.leak > 1e-3 * found.sampled
    assert found.written == pytest.approx(0.3**2 * wanted.leak, rel=1e-4)


def test_overflow_of_the_written_dtype_is_counted():
    merged, told = project(*weights(41, 123), [basis(123, 7)], torch.ones(41), torch.ones(123), 3e4, torch.float16)
    bad = int((~merged.isfinite()).sum())
    assert 0 < bad < merged.numel() and ProjectNorms(*told.tolist()).bad == bad


def test_each_row_block_has_its_own_basis():
    """v_proj: block b of the rows is protected in the span of basis b, and of no other."""
    lrm, itm, base = weights(12, 41)
    bases = [basis(41, 9, seed=b) for b in range(3)]
    merged, _ = project(torch.zeros(12, 41), itm, base, bases, torch.ones(12), torch.ones(41), 1.0, torch.float32)
    for b, rows in enumerate(merged.chunk(3)):
        for other, u in enumerate(bases):
            leak = float((rows @ u).norm() / rows.norm())
            assert leak < 1e-6 if other == b else leak > 0.1


def test_scale_then_project_keeps_the_null_space_and_the_other_order_does_not():
    """o_proj: α scales column blocks, which leaves the null space when it comes second (method.md, section 2)."""
    lrm, itm, base = weights(41, 123)
    u, alpha = basis(123, 20), torch.rand(3).repeat_interleave(41) * 2
    features = randn(50, 20, seed=5) @ u.T
    merged, _ = project(lrm, itm, base, [u], torch.ones(41), alpha, 1.0, torch.float32)
    unscaled, _ = project(torch.zeros_like(lrm), itm, base, [u], torch.ones(41), torch.ones(123), 1.0, torch.float32)
    other_order = unscaled * alpha
    outputs = ((itm - base) @ features.T).norm()
    assert float(((merged - lrm) @ features.T).norm() / outputs) < 1e-5
    assert float((other_order @ features.T).norm() / outputs) > 0.1


# ---- span_mass and attended_inputs


def eager(q, k, sample, at, values, scaling, window=None, dtype=torch.float64):
    """softmax(q kᵀ) V [n, H, m] in float64 with the whole [B, H, T, T], kv heads repeated as transformers does."""
    k = k.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(dtype) @ k.mT * scaling
    columns = torch.arange(k.shape[2])
    hidden = columns > columns[:, None]
    if window is not None:
        hidden |= columns <= columns[:, None] - window
    mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values.to(dtype)[:, None]
    return mixed[sample, :, at]


ROWS = {0: (0, 3, 17, 18, 40), 2: (7, 8), 3: (38, 39, 40)}  # sample 1 of 4 has none


def call(heads=4, kv_heads=2, tokens=41, dim=12, rows=ROWS, spans=3, dtype=torch.float32):
    """q, k, sample, at, spans of a batch; the first two as transformers lays them out, heads inside positions."""
    batch = 1 + max(rows)
    q = 3 * randn(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)
    k = randn(batch, tokens, kv_heads, dim, seed=1, dtype=dtype).transpose(1, 2)
    sample, at = torch.tensor([(b, t) for b, held in rows.items() for t in held]).T
    return q, k, sample, at, (randn(batch, tokens, spans, seed=2) > 0.5).float()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("window", [None, 1, 5, 24, 1000])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 2), (6, 2), (4, 4), (6, 1)])
def test_span_mass(heads, kv_heads, window, dtype):
    q, k, sample, at, spans = call(heads, kv_heads, dtype=dtype)
    found = span_mass(q, k, sample, at, spans, 0.3, window)
    assert found.dtype == torch.float32
    close(found, eager(q, k, sample, at, spans, 0.3, window), dtype)
    close(span_mass(strided(q), strided(k), sample, at, strided(spans), 0.3, window), found, dtype)


@pytest.mark.parametrize("tokens", ODD)
@pytest.mark.parametrize("dim", ODD)
def test_span_mass_over_odd_shapes(tokens, dim):
    given = call(tokens=tokens, dim=dim, rows={0: range(0, tokens, 2), 1: (tokens - 1,)}, spans=1)
    close(span_mass(*given, 0.2), eager(*given, 0.2), torch.float32)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("budget", [1, 4 * 41 * 2, 4 * 41 * 3, 1 << 20])
def test_chunk_boundaries(monkeypatch, budget, window):
    """From one row of one key head a chunk to all at once; rows are far apart, so that chunks see other columns."""
    monkeypatch.setattr(kernels, "_CACHE_ELEMENTS", budget)
    given = call(rows={0: (0, 3, 4, 17, 18, 39, 40)})
    close(span_mass(*given, 0.3, window), eager(*given, 0.3, window), torch.float32)
    q, k, _, at, _ = given
    chunks = [found[:3] for found in kernels._attention(q[0], k[0], at, 0.3, window, torch.float32)]
    assert all(seen.stop == at[rows][-1] + 1 for rows, _, seen in chunks)
    sizes = [(heads.stop - heads.start, len(at[rows])) for rows, heads, _ in chunks]
    assert sizes == {1: [(2, 1)] * 14, 328: [(2, 4), (2, 3)] * 2, 492: [(2, 6), (2, 1)] * 2, 1 << 20: [(4, 7)]}[budget]


@pytest.mark.parametrize("budget", [1, 4 * 41 * 2, 1 << 20])
@pytest.mark.parametrize("window", [None, 5, 1000])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 1)])
def test_span_mass_normalised(monkeypatch, heads, kv_heads, window, budget):
    """With the denominators that attention left, the columns of the spans are enough; a span that nobody sees is 0."""
    monkeypatch.setattr(kernels, "_CACHE_ELEMENTS", budget)
    q, k, sample, at, spans = call(heads, kv_heads)
    spans[0] = 0
    spans[3, :30] = 0
    scores = 0.3 * q @ k.repeat_interleave(heads // kv_heads, 1).mT
    away = torch.arange(41)[:, None] - torch.arange(41)
    lse = scores.masked_fill((away < 0) | (away >= (window or 41)), float("-inf")).logsumexp(-1)
    found = kernels.span_mass_normalised(q, k, sample, at, spans, lse, 0.3, window)
    close(found, eager(q, k, sample, at, spans, 0.3, window), torch.float32)
    assert kernels.span_mass_normalised(q, k, sample[:0], at[:0], spans, lse, 0.3).shape == (0, heads, 3)


def test_gqa_maps_by_group():
    """Query head h reads kv head h // group: with all keys but one at zero, only its group's masses move."""
    q, k, *rest = call(heads=6, kv_heads=2)
    still = span_mass(q, torch.zeros_like(k), *rest, 0.3)
    k[:, 0] = 0
    moved = (span_mass(q, k, *rest, 0.3) - still).abs().amax(dim=(0, 2))
    assert float(moved[:3].max()) == 0 and float(moved[3:].min()) > 0.01


def test_rows_see_no_later_column_and_no_other_sample():
    """The spans of samples 1 and 3 are all there is, and of sample 3 the columns from 39 on; padding may be garbage."""
    q, k, sample, at, _ = call()
    later = torch.zeros(4, 41, 1)
    later[3, 39:] = later[1] = 1
    mass = span_mass(q, k, sample, at, later, 0.3)[..., 0]
    sees = (sample == 3) & (at >= 39)
    assert torch.equal(mass[~sees], torch.zeros(8, 4)) and float(mass[sees].min()) > 0
    k[2, :, 9:] = k[1] = q[2, :, 9:] = float("nan")
    everything = span_mass(q, k, sample, at, torch.ones(4, 41, 1), 0.3)
    torch.testing.assert_close(everything, torch.ones_like(everything))


def test_large_scores_do_not_overflow():
    q, k, *rest = call()
    found = span_mass(q * 1000, k, *rest, 1.0)
    assert torch.isfinite(found).all()
    close(found, eager(q * 1000, k, *rest, 1.0), torch.float32)


def test_no_rows_and_no_spans():
    q, k, sample, at, spans = call()
    assert span_mass(q, k, sample[:0], at[:0], spans, 0.3).shape == (0, 4, 3)
    assert span_mass(q, k, sample, at, spans[..., :0], 0.3).shape == (10, 4, 0)


def test_float64_stays():
    given = [x.double() if x.is_floating_point() else x for x in call()]
    found = span_mass(*given, 0.3)
    assert found.dtype == torch.float64
    close(found, eager(*given, 0.3), torch.float64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("width", ODD)
def test_attended_inputs(width, window, dtype):
    q, k, sample, at, _ = call(dtype=dtype, rows={0: ROWS[0]})
    x = randn(1, 41, width, seed=3, dtype=dtype)
    found = attended_inputs(q[0], k[0], at, strided(x)[0], 0.3, window)
    close(found, eager(q, k, sample, at, x, 0.3, window).transpose(0, 1), dtype)


# ---- the masses of a whole model


def test_masses_equal_eager_attention_weights(any_trio):
    """AttentionMass over the streamed forward against transformers' eager attention, to 1e-5, layer by layer: rotary
    embedding, q/k norm, biases, sliding window, head_dim and GQA are all as the model has them."""
    from transformers import AutoModelForCausalLM

    from streammerge.arch import family_of
    from streammerge.attention import AttentionMass
    from streammerge.batches import make_batches
    from streammerge.calibration import Instruction, InstructionSample
    from streammerge.forward import Stream, StreamedModel
    from streammerge.io.checkpoint import open_checkpoint

    family, paths = any_trio
    samples = []
    for n, length in enumerate((52, 37, 61)):
        ids = tuple(torch.randint(0, 400, (length,), generator=torch.Generator().manual_seed(n)).tolist())
        near = Instruction("near", (20, 21, 25), (30, 31, length - 1), (33,))
        far = Instruction("far", (2, 3, 4, 30), (29, 35), (31, length - 2))
        samples.append(InstructionSample(str(n), ids, (near, far)))
    checkpoint = open_checkpoint(paths["lrm"], "reasoning_model")
    arch = family_of(checkpoint.config, "here")
    cpu = torch.device("cpu")
    model = StreamedModel(checkpoint, arch, cpu, torch.float32)
    resident = AutoModelForCausalLM.from_pretrained(paths["lrm"], dtype=torch.float32, attn_implementation="eager")
    resident.eval()
    for rows, shift in (("predicting", 1), ("token", 0)):
        stream = Stream(make_batches(samples, 128), cpu)
        assert [len(b.samples) for b in stream.batches] == [2, 1]
        model.embed(stream)
        found = []
        for layer in range(3):
            observer = AttentionMass(samples, stream.batches, 4, rows)
            prefix = arch.layer_prefix(layer)
            tensors = {n: checkpoint.read(n) for n in checkpoint.tensors if n.startswith(prefix)}
            model.advance(layer, {n.removeprefix(prefix): t for n, t in tensors.items()}, stream, observer=observer)
            found.append(observer.result())
        a, u = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
        for sample in samples:
            with torch.no_grad():
                weights = resident(torch.tensor([sample.ids]), output_attentions=True).attentions
            for layer, attention in enumerate(weights):
                for one in sample.instructions:
                    for total, tokens in ((a, one.aligned), (u, one.unrelated)):
                        at = torch.tensor(tokens) - shift
                        total[layer] += attention[0, :, at][:, :, list(one.columns)].double().mean((1, 2)) / 6
        for layer in range(3):
            torch.testing.assert_close(found[layer].alignment, a[layer], rtol=0, atol=1e-5)
            torch.testing.assert_close(found[layer].leakage, u[layer], rtol=0, atol=1e-5)
        assert float(a.min()) >= 0 and float(a.max()) > 0.01 and float(u.max()) > 0.01, family


# ---- dispatch


def gram_call(impl: str, **dtypes):
    cov = torch.zeros(3, 3, dtype=dtypes.get("cov", torch.float32))
    return gram_update(cov, randn(5, 3).to(dtypes.get("x", torch.float32)), impl=impl)


def test_asking_for_triton_where_it_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelUnavailable, match="gram_update: .*no GPU"):
        gram_call("triton")
    with pytest.raises(ValueError, match="'fast'.*'triton'"):
        gram_call("fast")


def test_what_ran_is_counted_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    gram_call("auto")
    gram_call("auto")
    gram_call("torch")
    assert ran() == {"gram_update: torch (asked for)": 1,
                     "gram_update: torch (no GPU: Triton kernels run on CUDA devices)": 2}  # fmt: skip
    forget()
    assert ran() == {}


def test_dtypes_that_triton_does_not_take_are_the_twins(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(torch.zeros(2, dtype=torch.float64), torch.zeros(2)) == "dtype float64"
    assert why_not(torch.zeros(2, dtype=torch.long)) is None
    forget()
    gram_call("auto", cov=torch.float64)
    gram_call("auto", cov=torch.float16, x=torch.float16)
    assert ran() == {"gram_update: torch (C is float16, not float32)": 1, "gram_update: torch (dtype float64)": 1}
