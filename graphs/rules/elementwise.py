"""Rules of operators that act on each element: all dimensions are shared by all operands."""

from __future__ import annotations

from graphs.rules.rule import WHOLE, FactorBuilder, OpRule, register_rule

ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type carry_in carry_out cbrt ceil clamp clz complex conj convert_element_type "
    "copy copy_p cos cosh device_put digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt igamma igammac imag integer_pow is_finite layout_constraint le le_to lgamma log log1p "
    "logistic lt lt_to max merge mesh_cast min mul name ne neg nextafter not optimization_barrier "
    "or polygamma population_count pow pvary random_gamma real "
    "reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n "
    "shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt "
    "square stop_gradient sub tan tanh threefry2x32 xor zeta"
).split()


@register_rule(*ELEMENTWISE)
def elementwise(params, ins, outs) -> OpRule:
    """Dimensions aligned from the right; size-one and scalar operands broadcast."""
    if len(outs) > 1 and len(outs) == len(ins):  # optimization_barrier, threefry2x32: one to one
        return _one_to_one(ins, outs)
    build = FactorBuilder()
    shape = max(outs, key=len)
    factors = build.dims(shape)

    def align(s):
        offset = len(shape) - len(s)
        return tuple(
            factors[offset + i] if n == shape[offset + i] else WHOLE for i, n in enumerate(s)
        )

    return OpRule(
        operands=tuple(align(s) for s in ins),
        results=tuple(align(s) for s in outs),
        sizes=tuple(build.sizes),
    )


@register_rule("random_wrap", "random_unwrap")
def key_data(params, ins, outs) -> OpRule:
    """Keys and their words: the words' dimension is whole, the ones before it are shared."""
    build = FactorBuilder()
    shared = tuple(build.dims(min(ins[0], outs[0], key=len)))

    def pad(s):
        return shared + (WHOLE,) * (len(s) - len(shared))

    return OpRule(operands=(pad(ins[0]),), results=(pad(outs[0]),), sizes=tuple(build.sizes))


def _one_to_one(ins, outs) -> OpRule:
    build = FactorBuilder()
    if len(set(ins)) == 1 and set(ins) == set(outs):
        factors = tuple(build.dims(outs[0]))
        return OpRule(
            operands=(factors,) * len(ins), results=(factors,) * len(outs), sizes=tuple(build.sizes)
        )
    factors = [tuple(build.dims(s)) for s in outs]
    return OpRule(operands=tuple(factors), results=tuple(factors), sizes=tuple(build.sizes))


@register_rule(
    "iota", "random_bits", "random_seed", "random_fold_in", "random_split", "literal",
    "rng_uniform", "empty", "axis_index", "rng_bit_generator", "random_clone",
)  # fmt: skip
def generator(params, ins, outs) -> OpRule:
    """Made in place on every device: results take any sharding, operands (keys) are whole."""
    build = FactorBuilder()
    return OpRule(
        operands=tuple((WHOLE,) * len(s) for s in ins),
        results=tuple(tuple(build.dims(s)) for s in outs),
        sizes=tuple(build.sizes),
    )
