"""Goals of result files, as a reader sees them. Needs no torch."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RecordedGoal:
    """A goal as a reader sees it."""

    sentence: str
    measured: str  # what the figure was computed from, where the file says it
    figure: str  # with its spread, where the file has one
    margin: float | None  # 1 or more where the goal is met
    met: bool | None
    why: str  # the reason why there is no figure

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]


PLACEHOLDER = re.compile(r"\{[^}]*\}x?")  # of the value in a goal's text; x stands for times


def parse_goal(goal: Mapping[str, Any]) -> RecordedGoal:
    """Return the goal that a file holds."""
    text, target, value = goal["text"], goal["target"], goal.get("value")
    sign = {">=": "≥", "<=": "≤"}[goal["sense"]]
    form = (PLACEHOLDER.search(text) or ["{:.4g}"])[0]
    sentence = PLACEHOLDER.sub(f"{sign} {target:g}{'x' if form.endswith('x') else ''}", text)
    measured, why = goal.get("measured") or "", goal.get("why", "")
    if value is None and goal.get("failed"):
        return RecordedGoal(sentence, measured, why, 0.0, False, why)
    if value is None:
        return RecordedGoal(sentence, measured, "", None, None, why)
    met = value >= target if sign == "≥" else value <= target
    shown = form.format(value)
    if not met and shown == form.format(target):
        shown = re.sub(r"\{.*\}", f"{value:.4g}", form)  # missed by less than is shown
    if goal.get("low") is not None and goal.get("high") is not None:
        shown += f" ({form.format(goal['low'])} to {form.format(goal['high'])})"
    over, under = (value, target) if sign == "≥" else (target, value)
    return RecordedGoal(sentence, measured, shown, over / under if under else math.inf, met, "")
