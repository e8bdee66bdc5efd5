"""Axis rules of operators: data first, little code. Nothing here imports torch."""

from graphpart.rules.lookup import names_of, rule_for
from graphpart.rules.reasons import may_repeat, reason_without_rule
from graphpart.rules.register import register_rule

__all__ = ["may_repeat", "names_of", "reason_without_rule", "register_rule", "rule_for"]
