"""Rules of operators that move, reshape, cut, join or reduce dimensions."""

from __future__ import annotations

from graphs.rules.rule import WHOLE, FactorBuilder, OpRule, register_rule


def _view(ins, outs, operands, results, build, reduced=None) -> OpRule:
    return OpRule(
        operands=tuple(tuple(f) for f in operands),
        results=tuple(tuple(f) for f in results),
        sizes=tuple(build.sizes),
        reduced=reduced or {},
    )


@register_rule("transpose")
def transpose(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    f = build.dims(ins[0])
    return _view(ins, outs, [f], [[f[p] for p in params["permutation"]]], build)


@register_rule("broadcast_in_dim")
def broadcast_in_dim(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    out = build.dims(outs[0])
    where = params["broadcast_dimensions"]
    operand = [out[d] if ins[0][i] == outs[0][d] else WHOLE for i, d in enumerate(where)]
    rest = [[WHOLE] * len(s) for s in ins[1:]]
    return _view(ins, outs, [operand, *rest], [out], build)


@register_rule("squeeze")
def squeeze(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    f = build.dims(ins[0])
    gone = {d % len(ins[0]) for d in params["dimensions"]}
    return _view(ins, outs, [f], [[x for i, x in enumerate(f) if i not in gone]], build)


@register_rule("expand_dims")
def expand_dims(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    out = build.dims(outs[0])
    new = {d % len(outs[0]) for d in params["dimensions"]}
    return _view(ins, outs, [[x for i, x in enumerate(out) if i not in new]], [out], build)


@register_rule("reshape")
def reshape(params, ins, outs) -> OpRule:
    """Dimensions are matched in runs of equal product; in a split or a merge the major factor
    survives, and a run that is neither is whole."""
    build = FactorBuilder()
    source, target = ins[0], outs[0]
    f_in, f_out = [WHOLE] * len(source), [WHOLE] * len(target)
    if 0 not in source:
        for run_in, run_out in reshape_runs(source, target):
            big_in = [i for i in run_in if source[i] > 1]
            big_out = [j for j in run_out if target[j] > 1]
            if not big_in or not big_out:
                continue
            i, j = big_in[0], big_out[0]
            major = min(source[i], target[j])
            if max(source[i], target[j]) % major == 0:
                f_in[i] = f_out[j] = build.new(major)
    rest = [[WHOLE] * len(s) for s in ins[1:]]
    return _view(ins, outs, [f_in, *rest], [f_out], build)


def reshape_runs(source, target) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into the finest runs of dimensions with equal products."""
    runs, i, j = [], 0, 0
    while i < len(source) or j < len(target):
        run_in, run_out, p, q = [], [], 1, 1
        while True:
            if p == q and run_in and run_out:
                break
            if p <= q and i < len(source):
                run_in.append(i)
                p *= source[i]
                i += 1
            elif j < len(target):
                run_out.append(j)
                q *= target[j]
                j += 1
            elif i < len(source):
                run_in.append(i)
                p *= source[i]
                i += 1
            else:
                break
        runs.append((run_in, run_out))
    return runs


def _keep_where(same, ins, outs) -> OpRule:
    """Operands and results share the factors of the dimensions in ``same``; others are whole."""
    build = FactorBuilder()
    rank = len(outs[0])
    f = [build.new(outs[0][d]) if d in same else WHOLE for d in range(rank)]
    operands = [f if len(s) == rank else [WHOLE] * len(s) for s in ins]
    return _view(
        ins, outs, operands, [f if len(s) == rank else [WHOLE] * len(s) for s in outs], build
    )


@register_rule("concatenate")
def concatenate(params, ins, outs) -> OpRule:
    return _keep_where(set(range(len(outs[0]))) - {params["dimension"]}, ins, outs)


@register_rule("split")
def split(params, ins, outs) -> OpRule:
    return _keep_where(set(range(len(outs[0]))) - {params["axis"]}, ins, outs)


@register_rule("pad", "slice", "dynamic_slice", "rev", "dynamic_update_slice")
def cut(params, ins, outs) -> OpRule:
    """Dimensions that keep their size (and, for ``rev``, their order) are shared; an update's
    dimensions are shared where it spans the whole operand."""
    same = {d for d in range(len(outs[0])) if ins[0][d] == outs[0][d]}
    if "dimensions" in params and "padding_config" not in params:  # rev
        same -= set(params["dimensions"])
    if params.get("padding_config") is not None:
        same -= {d for d, c in enumerate(params["padding_config"]) if tuple(c) != (0, 0, 0)}
    if len(ins) > 1 and len(ins[1]) == len(outs[0]):  # dynamic_update_slice
        same = {d for d in same if ins[1][d] == outs[0][d]}
    return _keep_where(same, ins, outs)


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(params, ins, outs) -> OpRule:
    return _keep_where(set(range(len(outs[0]))) - {params["axis"]}, ins, outs)


@register_rule("sort")
def sort(params, ins, outs) -> OpRule:
    return _keep_where(set(range(len(outs[0]))) - {params["dimension"]}, ins, outs)


@register_rule("top_k", "approx_top_k")
def top_k(params, ins, outs) -> OpRule:
    axis = params.get("axis", params.get("reduction_dimension", -1)) % len(ins[0])
    build = FactorBuilder()
    f = [build.new(n) if d != axis else WHOLE for d, n in enumerate(ins[0])]
    return _view(ins, outs, [f], [f] * len(outs), build)


@register_rule("scan_slice")
def scan_slice(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    f = build.dims(outs[0])
    return _view(ins, outs, [[WHOLE, *f]], [f], build)


@register_rule("scan_stack")
def scan_stack(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    f = build.dims(ins[0])
    return _view(ins, outs, [f], [[WHOLE, *f]], build)


def _reduce(params, ins, outs, how) -> OpRule:
    build = FactorBuilder()
    f = build.dims(ins[0])
    gone = {a % len(ins[0]) for a in params["axes"]} if ins[0] else set()
    reduced = {f[d]: how for d in gone if f[d] != WHOLE}
    out = [x for d, x in enumerate(f) if d not in gone]
    return _view(ins, outs, [f] + [[]] * (len(ins) - 1), [out] * len(outs), build, reduced)


@register_rule("reduce_sum", "reduce_window_sum_all")
def reduce_sum(params, ins, outs) -> OpRule:
    return _reduce(params, ins, outs, "sum")


@register_rule("reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_xor", "reduce_prod")
def reduce_max(params, ins, outs) -> OpRule:
    return _reduce(params, ins, outs, "max")


@register_rule("argmax", "argmin")
def argmax(params, ins, outs) -> OpRule:
    build = FactorBuilder()
    gone = {a % len(ins[0]) for a in params["axes"]}
    f = [WHOLE if d in gone else build.new(n) for d, n in enumerate(ins[0])]
    return _view(ins, outs, [f], [[x for d, x in enumerate(f) if d not in gone]], build)


@register_rule(
    "reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min",
    "select_and_scatter_add", "select_and_gather_add", "cumred_reduce_window",
)  # fmt: skip
def windowed(params, ins, outs) -> OpRule:
    """Dimensions with a window of one are shared."""
    window = params.get("window_dimensions", (0,) * len(outs[0]))
    same = {d for d in range(len(outs[0])) if window[d] == 1 and ins[0][d] == outs[0][d]}
    return _keep_where(same, ins, outs)
