"""The sharding rule of every primitive. ``register_rule`` adds one for a primitive of your own."""

from graphs.rules import contraction, elementwise, indexing, manual, structural
from graphs.rules.rule import WHOLE, FactorBuilder, OpRule, register_rule, registered, rule_of

__all__ = [
    "WHOLE",
    "FactorBuilder",
    "OpRule",
    "contraction",
    "elementwise",
    "indexing",
    "manual",
    "register_rule",
    "registered",
    "rule_of",
    "structural",
]
