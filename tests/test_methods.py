"""Every deterministic method against a twin that takes whole tensors, in D's own operations: the same bits, whatever
the chunks and the threads. mergekit itself is compared in tests/parity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from method_runs import merged, same_bits

from streammerge.methods import METHODS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE = (37, 141)  # 5217 elements: 82 chunks of 64, in three to a stretch of the counters


def tensors(dtype, *, models=3, shape=SHAPE, seed=0, levels=0):
    """A base and models near it; `levels`: task vectors of that many magnitudes only, so that thresholds are tied."""
    torch.manual_seed(seed)
    base = torch.randn(shape)
    found = []
    for i in range(models):
        delta = torch.randn(shape) * 0.05 * (i + 1)
        if levels:
            delta = torch.randint(-levels, levels + 1, shape) / 8
            base = base.round()
        found.append((base + delta).to(dtype))
    base.view(-1)[:9] = -0.0
    for x in found[:2]:
        x.view(-1)[:9] = -0.0
    return base.to(dtype), found


def largest(delta, k):
    """int mask of the k largest magnitudes, the first of equals."""
    order = delta.abs().double().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=delta.dtype)
    mask[order[:k]] = 1
    return mask.reshape(delta.shape)


def inner(delta, density, gamma):
    """int mask without the largest `gamma`, then the largest `density` of the rest, by ascending rank."""
    n = delta.numel()
    keep = int(density * n)
    low = max(0, n - keep - int(gamma * n))
    order = delta.abs().double().flatten().argsort(stable=True)
    mask = torch.zeros(n, dtype=delta.dtype)
    mask[order[low : low + keep]] = 1
    return mask.reshape(delta.shape)


def restored(delta, masked):
    """The L1 norm of delta, in D."""
    before, after = (x.abs().sum(dtype=torch.float64).to(x.dtype) for x in (delta, masked))
    return masked * (before / after) if before >= 1e-7 and after >= 1e-7 else masked


def task_vectors(base, deltas, weight, consensus, normalize, lam=1.0):
    """The common end of TIES and its kin, on stacked tensors."""
    stacked = torch.stack(deltas)
    w = torch.tensor(weight, dtype=base.dtype).reshape(-1, *[1] * base.dim())
    stacked = stacked * w
    counted = torch.ones_like(stacked, dtype=torch.bool)
    if consensus:
        elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(base.dtype)
        counted = stacked.sign() == elected
    mixed = (stacked * counted).sum(0)
    divisor = (w * counted).sum(0)
    divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    mixed = mixed / divisor if normalize else mixed
    return base + (mixed * lam if lam != 1 else mixed)


WEIGHT, DENSITY, GAMMA = [0.7, -0.45, 0.3], [0.53, 0.2, 1.0], [0.02, 0.1, 0.3]


def twin(method, base, sources, options):
    """The method on whole tensors."""
    deltas = [x - base for x in sources] if base is not None else []
    own, density = options.get("parameters", {}), options.get("density", [1.0] * 3)
    normalize = own.get("normalize", METHODS[method].parameters.get("normalize", METHODS["ties"]).default
                        if "normalize" in METHODS[method].parameters else False)  # fmt: skip
    if method == "linear":
        wide = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
        result = torch.zeros(sources[0].shape, dtype=wide)
        for x, w in zip(sources, options["weight"], strict=True):
            result.addcmul_(x, torch.tensor(w, dtype=wide))
        total = torch.tensor(options["weight"], dtype=wide).sum()
        return (result / total if normalize else result).to(sources[0].dtype)
    if method in ("ties", "task_arithmetic", "breadcrumbs", "breadcrumbs_ties"):
        if method != "task_arithmetic":
            for i, d in enumerate(deltas):
                if density[i] < 1:
                    k = max(1, int(density[i] * d.numel())) if density[i] > 0 else 0
                    mask = largest(d, k) if method == "ties" else inner(d, density[i], options["gamma"][i])
                    deltas[i] = restored(d, d * mask) if own.get("rescale") else d * mask
        return task_vectors(base, deltas, options["weight"], "ties" in method, normalize, own.get("lambda", 1.0))
    if method == "passthrough":
        return sources[0] * options["scale"][0]
    if method == "model_stock":
        return stock(base, sources, own.get("filter_wise", False))
    if method == "nuslerp":
        return arcs(base, sources, options["weight"], own)
    assert method == "sce"
    return selected(base, deltas, own.get("select_topk", 1.0))


def norm(x, dim):
    return x.double().square().sum(dim, keepdim=True).sqrt().to(x.dtype)


def stock(base, sources, by_row):
    w0, ws = (base.reshape(-1), [x.reshape(-1) for x in sources]) if not by_row else (base, sources)
    offsets = [w - w0 for w in ws]
    cosines = [
        ((a * b).sum(-1, keepdim=True, dtype=torch.float64).to(a.dtype) / (norm(a, -1) * norm(b, -1)).clamp(min=1e-6))
        .clamp(-1, 1) for a, b in itertools.combinations(offsets, 2)
    ]  # fmt: skip
    cos, n = torch.stack(cosines).mean(0), len(ws)
    t = n * cos / (1 + (n - 1) * cos)
    return (t * (sum(ws) / n) + (1 - t) * w0).reshape(base.shape)


def arcs(base, sources, weight, own):
    vs = [x - base if base is not None else x for x in sources]
    t = weight[1] / sum(weight)
    dim = -1 if not own.get("nuslerp_row_wise") else 0
    if own.get("nuslerp_flatten", True):
        vs, dim = [v.reshape(-1) for v in vs], -1
    units = [v / norm(v, dim).clamp(min=1e-7) for v in vs]
    cos = (units[0] * units[1]).sum(dim, keepdim=True, dtype=torch.float64).to(vs[0].dtype).clamp(-1, 1)
    theta = torch.acos(cos)
    arc = (torch.sin((1 - t) * theta) * vs[0] + torch.sin(t * theta) * vs[1]) / torch.sin(theta)
    line = (1 - t) * vs[0] + t * vs[1]
    result = torch.where((1 - cos.square()) <= 1e-16, line, arc).reshape(sources[0].shape)
    return result if base is None else base + result


def selected(base, deltas, topk):
    stacked = torch.stack(deltas)
    if topk < 1:
        variance = torch.var(stacked, dim=0, unbiased=False)
        k = int(torch.count_nonzero(variance) * topk)
        stacked = stacked * largest(variance, k)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(base.dtype)
    energy = (stacked.square().flatten(1).sum(1, dtype=torch.float64) / base.numel()).to(base.dtype)
    weights = energy / energy.sum().item() if energy.sum() >= 1e-6 else torch.ones_like(energy) / len(deltas)
    w = weights.reshape(-1, *[1] * base.dim()) * (stacked.sign() == elected)
    return base + (stacked * w).sum(0) / w.sum(0).clamp(min=1e-6)


CASES = {
    "linear": ("linear", False, {"weight": WEIGHT}),
    "linear, not normalised": ("linear", False, {"weight": WEIGHT, "parameters": {"normalize": False}}),
    "task_arithmetic": ("task_arithmetic", True, {"weight": WEIGHT, "parameters": {"lambda": 0.7}}),
    "task_arithmetic, normalised": ("task_arithmetic", True, {"weight": WEIGHT, "parameters": {"normalize": True}}),
    "ties": ("ties", True, {"weight": WEIGHT, "density": DENSITY}),
    "ties, of all and none": ("ties", True, {"weight": WEIGHT, "density": [0.0, 1e-9, 0.9999]}),
    "ties, rescaled": ("ties", True, {"weight": WEIGHT, "density": DENSITY,
                                      "parameters": {"rescale": True, "normalize": False, "lambda": 1.3}}),
    "breadcrumbs": ("breadcrumbs", True, {"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA}),
    "breadcrumbs_ties": ("breadcrumbs_ties", True, {"weight": WEIGHT, "density": [0.9, 0.3, 0.6], "gamma": GAMMA,
                                                    "parameters": {"normalize": True}}),
    "passthrough": ("passthrough", False, {"scale": [0.3]}),
    "model_stock": ("model_stock", True, {}),
    "model_stock, by row": ("model_stock", True, {"parameters": {"filter_wise": True}}),
    "nuslerp": ("nuslerp", False, {"weight": [0.7, 0.4]}),
    "nuslerp, of deltas": ("nuslerp", True, {"weight": [0.7, 0.4]}),
    "nuslerp, last dimension": ("nuslerp", False, {"weight": [0.7, 0.4], "parameters": {"nuslerp_flatten": False}}),
    "nuslerp, first dimension": ("nuslerp", False, {"weight": [0.7, 0.4], "parameters": {"nuslerp_flatten": False,
                                                                                         "nuslerp_row_wise": True}}),
    "sce": ("sce", True, {}),
    "sce, selected": ("sce", True, {"parameters": {"select_topk": 0.4}}),
}  # fmt: skip


def arranged(case, dtype, **how):
    method, has_base, options = CASES[case]
    base, sources = tensors(dtype, **how)
    sources = sources[: METHODS[method].count[1] or len(sources)]
    return method, base if has_base else None, sources, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_twin_has_the_same_bits(case, dtype, tmp_path):
    method, base, sources, options = arranged(case, dtype)
    wanted = twin(method, base, sources, options)
    for chunk, threads in ((1 << 17, 1), (64, 3)):
        found = merged(tmp_path, method, sources, base, chunk=chunk, threads=threads, **options)
        assert same_bits(found, wanted), f"chunks of {chunk}"


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("case", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce, selected", "linear"])
def test_entries_tied_at_the_threshold_go_by_position(case, dtype, tmp_path):
    method, base, sources, options = arranged(case, dtype, levels=5)
    wanted = twin(method, base, sources, options)
    for chunk in (1 << 17, 64, 1000):
        assert same_bits(merged(tmp_path, method, sources, base, chunk=chunk, threads=2, **options), wanted)


@pytest.mark.parametrize("shape", [(1,), (5,), (4, 3, 7), (2, 1)], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "dimension" not in c and "by row" not in c])
def test_other_shapes(case, shape, tmp_path):
    method, base, sources, options = arranged(case, torch.float32, shape=shape)
    if method == "model_stock":  # of parallel offsets; t is 1, up to the last bit of the norms
        wanted = twin(method, base, sources, options)
        assert torch.allclose(merged(tmp_path, method, sources, base, chunk=64, **options), wanted, rtol=1e-6)
        return
    assert same_bits(merged(tmp_path, method, sources, base, chunk=2, **options), twin(method, base, sources, options))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties", "della", "breadcrumbs", "sce"])
def test_no_model_beside_the_base_gives_the_base(method, tmp_path):
    base, _ = tensors(torch.bfloat16)
    assert same_bits(merged(tmp_path, method, [], base), base)


def test_inputs_of_several_dtypes_are_promoted(tmp_path):
    base, sources = tensors(torch.float32, models=2)
    mixed = [sources[0].bfloat16(), sources[1].half()]
    wanted = twin("linear", None, [x.float() for x in mixed], {"weight": [0.5, 0.5]})
    assert same_bits(merged(tmp_path, "linear", mixed, weight=[0.5, 0.5], out=torch.float32), wanted)
    cast = twin("linear", None, [x.bfloat16() for x in mixed], {"weight": [0.5, 0.5]})
    found = merged(tmp_path, "linear", mixed, weight=[0.5, 0.5], dtype="BF16", out=torch.float16)
    assert same_bits(found, cast.half())


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_the_arc(t, tmp_path, monkeypatch):
    """Against the formula in float64; with several pieces, so that norms and dot products are of all of them."""
    monkeypatch.setitem(METHODS["slerp"].run.__globals__, "_PIECE", 1000)
    torch.manual_seed(0)
    a, b = torch.randn(SHAPE), torch.randn(SHAPE)
    theta = torch.acos((a.double() * b).sum() / (a.double().norm() * b.double().norm()))
    wanted = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    found = merged(tmp_path, "slerp", [b], a, parameters={"t": t}, threads=2)
    assert (found - wanted).abs().max() < 1e-6
    near = merged(tmp_path, "slerp", [a + 1e-3 * b], a, parameters={"t": t})
    assert (near - (a + t * 1e-3 * b)).abs().max() < 1e-6
    axis = torch.eye(40)[:1]
    assert torch.equal(merged(tmp_path, "slerp", [axis], axis, parameters={"t": t}), axis)  # θ is 0


@pytest.mark.parametrize("cos, straight", [(0.9994, False), (0.9996, True)])
def test_slerp_is_a_line_where_cos_passes_0_9995(cos, straight, tmp_path):
    a, b = torch.eye(40, dtype=torch.float64)[:2]
    b = cos * a + math.sqrt(1 - cos * cos) * b
    line, arc = (a + b) / 2, (a + b) / 2 / math.cos(math.acos(cos) / 2)
    assert (line - arc).abs().max() > 5e-5
    found = merged(tmp_path, "slerp", [b.float()], a.float(), parameters={"t": 0.5})
    assert (found - (line if straight else arc)).abs().max() < 2e-6


def test_slerp_and_karcher_do_not_know_their_chunks(tmp_path, monkeypatch):
    for dtype in DTYPES:
        base, sources = tensors(dtype)
        for method, under, options in (("slerp", base, {"t": 0.4}), ("karcher", None, {})):
            runs = [merged(tmp_path, method, sources[: 1 if under is not None else 3], under, parameters=options,
                           chunk=chunk, threads=threads) for chunk, threads in ((1 << 17, 1), (64, 3))]  # fmt: skip
            assert same_bits(*runs)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_karcher_mean_is_where_the_tangents_cancel(dtype, bound, tmp_path):
    """The defining equation in float64, to the tolerance at which the steps end; its length is the mean norm."""
    torch.manual_seed(0)
    common = torch.randn(SHAPE)
    sources = [(common + 0.7 * torch.randn(SHAPE) * i).to(dtype) for i in (1, 2, 3)]
    found = merged(tmp_path, "karcher", sources).double().flatten()
    norms = [x.double().norm() for x in sources]
    assert abs(found.norm() / (sum(norms) / 3) - 1) < bound
    m = found / found.norm()
    tangent = torch.zeros_like(m)
    for x, n in zip(sources, norms, strict=True):
        u = x.double().flatten() / n
        theta = torch.acos(u @ m)
        tangent += theta / torch.sin(theta) * (u - (u @ m) * m) / 3
    assert tangent.norm() < bound
    start = sum(x.double().flatten() / n for x, n in zip(sources, norms, strict=True))
    assert (start / start.norm() - m).norm() > 10 * bound or dtype != torch.float32, "the steps must matter"


def test_karcher_of_zeros_and_of_one(tmp_path):
    base, sources = tensors(torch.float32)
    zeros = torch.zeros(SHAPE)
    assert same_bits(merged(tmp_path, "karcher", sources[:1]), sources[0])
    assert not merged(tmp_path, "karcher", [zeros, zeros]).any()
    half = merged(tmp_path, "karcher", [zeros, sources[0]])
    assert torch.allclose(half, sources[0] / 2, rtol=1e-6)  # a model without direction counts in the length alone
    opposite = merged(tmp_path, "karcher", [sources[0], -sources[0]])  # no mean to begin with: the first unit does
    assert math.isclose(opposite.norm(), sources[0].norm(), rel_tol=1e-2)
    once = {"parameters": {"max_iter": 1}}  # a model without direction does not shorten the steps
    four, three = (merged(tmp_path, "karcher", models, **once) for models in ([zeros, *sources], sources))
    assert torch.allclose(four * 4 / 3, three, rtol=1e-5, atol=1e-6)


def test_the_norm_of_a_large_fp16_delta_is_no_infinity(tmp_path):
    """65504 is fp16's largest: the L1 norm of a task vector passes it, and the quotient must not become NaN."""
    torch.manual_seed(0)
    base = torch.zeros(300, 300, dtype=torch.float16)
    source = (torch.randn(300, 300) * 4).half()
    found = merged(tmp_path, "ties", [source], base, parameters={"rescale": True}, weight=[1.0], density=[0.5])
    ratio = found.double().abs().sum() / source.double().abs().sum()
    assert math.isclose(ratio, 1, rel_tol=2e-3)
