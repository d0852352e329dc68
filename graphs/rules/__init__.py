"""The sharding rule of every primitive. ``register_rule`` adds one for a primitive of your own,
``register_local`` says how each device calls one that XLA cannot partition."""

from graphs.rules import contraction, elementwise, indexing, kernel, manual, mapped, structural
from graphs.rules.rule import (
    WHOLE,
    FactorBuilder,
    OpRule,
    local_of,
    register_local,
    register_rule,
    registered,
    rule_of,
)

__all__ = [
    "WHOLE",
    "FactorBuilder",
    "OpRule",
    "contraction",
    "elementwise",
    "indexing",
    "kernel",
    "local_of",
    "manual",
    "mapped",
    "register_local",
    "register_rule",
    "registered",
    "rule_of",
    "structural",
]
