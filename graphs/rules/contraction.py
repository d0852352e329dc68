"""Rules of contractions: dot_general, ragged_dot, convolution."""

from __future__ import annotations

import math

from graphs.rules.rule import WHOLE, FactorBuilder, OpRule, register_rule


@register_rule("dot_general")
def dot_general(params, ins, outs) -> OpRule:
    """Batch, left and right dimensions are parallel; contracting ones leave partial sums."""
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    lhs, rhs = ins[:2]
    build = FactorBuilder()
    f_l, f_r = [WHOLE] * len(lhs), [WHOLE] * len(rhs)
    out = []
    for i, j in zip(lb, rb):
        f_l[i] = f_r[j] = build.new(lhs[i])
        out.append(f_l[i])
    reduced = {}
    for i, j in zip(lc, rc):
        f_l[i] = f_r[j] = build.new(lhs[i])
        if f_l[i] != WHOLE:
            reduced[f_l[i]] = "sum"
    for i in range(len(lhs)):
        if i not in lc and i not in lb:
            f_l[i] = build.new(lhs[i])
            out.append(f_l[i])
    for j in range(len(rhs)):
        if j not in rc and j not in rb:
            f_r[j] = build.new(rhs[j])
            out.append(f_r[j])
    return OpRule(
        operands=(tuple(f_l), tuple(f_r)),
        results=(tuple(out),),
        sizes=tuple(build.sizes),
        reduced=reduced,
        light=False,
        flops=2.0 * math.prod(outs[0]) * math.prod(lhs[i] for i in lc),
    )


@register_rule("ragged_dot", "ragged_dot_general")
def ragged_dot(params, ins, outs) -> OpRule:
    """Rows grouped by expert: [m, k] x [g, k, n] -> [m, n] and its two transposes.

    Groups and rows are whole (their boundaries are data); what is neither ragged nor a group
    dimension is sharded as in a plain contraction.
    """
    lhs, rhs = ins[:2]
    numbers = params.get("ragged_dot_dimension_numbers")
    if numbers is None:
        (lc, rc), (lb, rb) = ((1,), (1,)), ((), ())
        ragged, group = {0}, {0}
    else:
        (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
        ragged = set(numbers.lhs_ragged_dimensions)
        group = set(numbers.rhs_group_dimensions)
    build = FactorBuilder()
    f_l, f_r, reduced = [WHOLE] * len(lhs), [WHOLE] * len(rhs), {}
    out_dims: list[int] = []
    if ragged & set(lc):
        out_dims.append(WHOLE)  # the ragged contraction makes one result per group, leading
    for i, j in zip(lb, rb):
        f_l[i] = f_r[j] = WHOLE if i in ragged else build.new(lhs[i])
        out_dims.append(f_l[i])
    for i, j in zip(lc, rc):
        if i in ragged:
            continue
        f_l[i] = f_r[j] = build.new(lhs[i])
        if f_l[i] != WHOLE:
            reduced[f_l[i]] = "sum"
    for i in range(len(lhs)):
        if i not in lc and i not in lb:
            f_l[i] = WHOLE if i in ragged else build.new(lhs[i])
            out_dims.append(f_l[i])
    for j in range(len(rhs)):
        if j not in rc and j not in rb and j not in group:
            f_r[j] = build.new(rhs[j])
            out_dims.append(f_r[j])
    rows = math.prod(lhs)
    columns = math.prod(rhs[j] for j in range(len(rhs)) if j not in rc and j not in group)
    rest = [(WHOLE,) * len(s) for s in ins[2:]]
    return OpRule(
        operands=(tuple(f_l), tuple(f_r), *rest),
        results=(tuple(out_dims[-len(outs[0]) :]),),
        sizes=tuple(build.sizes),
        reduced=reduced,
        light=False,
        flops=2.0 * rows * columns,
    )


@register_rule("conv_general_dilated")
def convolution(params, ins, outs) -> OpRule:
    """Batch and output features are parallel, input features are contracted, space is whole; a
    depthwise convolution shares its features."""
    numbers = params["dimension_numbers"]
    lhs, rhs = ins[:2]
    groups = params.get("feature_group_count", 1)
    batch_groups = params.get("batch_group_count", 1)
    build = FactorBuilder()
    f_l, f_r, f_o = [WHOLE] * len(lhs), [WHOLE] * len(rhs), [WHOLE] * len(outs[0])
    l_batch, l_feature = numbers.lhs_spec[:2]
    r_out, r_in = numbers.rhs_spec[:2]
    o_batch, o_feature = numbers.out_spec[:2]
    reduced = {}
    if batch_groups == 1:
        f_l[l_batch] = f_o[o_batch] = build.new(lhs[l_batch])
    if groups == 1 and batch_groups == 1:
        f_l[l_feature] = f_r[r_in] = build.new(lhs[l_feature])
        if f_l[l_feature] != WHOLE:
            reduced[f_l[l_feature]] = "sum"
        f_r[r_out] = f_o[o_feature] = build.new(rhs[r_out])
    elif groups == lhs[l_feature] == rhs[r_out]:
        f_l[l_feature] = f_r[r_out] = f_o[o_feature] = build.new(groups)
    elif batch_groups == lhs[l_batch] == rhs[r_out]:
        f_l[l_batch] = f_r[r_out] = f_o[o_feature] = build.new(batch_groups)
        # what is contracted stays whole: XLA's partitioner adds partial sums of such convolutions
        # too often (seen on the CPU: a depthwise weight gradient, times the size of a mesh axis)
    return OpRule(
        operands=(tuple(f_l), tuple(f_r)),
        results=(tuple(f_o),),
        sizes=tuple(build.sizes),
        reduced=reduced,
        light=False,
        flops=2.0 * math.prod(outs[0]) * math.prod(rhs) / max(rhs[r_out], 1),
    )
