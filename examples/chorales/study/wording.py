"""How tables and figures call arms and settings, and the settings that they single out."""

from typing import Any

Setting = dict[str, Any]  # window, masking, phase, voice, schedule: a cell but for its arm and seed

NOTEBOOK: Setting = dict(window=16, masking="time", phase="any", voice=False, schedule="short")
OWN_SCHEDULE = NOTEBOOK | {"schedule": "notebook"}
LONGER: Setting = dict(window=128, masking="step", phase="any", voice=False, schedule="short")

PUBLISHED_LOSS = {"absolute": 0.4014, "relative.published.normal": 0.4865}  # the seed notebook's last lines

# arm (Cell.arm) -> how tables and figures call it
ARM_TEXT = {
    "absolute": "absolute",
    "relative.published.normal": "relative as published: its skew, N(0, 1) tables",
    "relative.published": "relative, published skew, small tables",
    "relative.normal": "relative, right skew, N(0, 1) tables",
    "relative": "relative, right skew, small tables",
    "both": "both, right skew, small tables",
    "both.published.normal": "both, published skew, N(0, 1) tables",
    "none": "no positions at all",
}


def factor_text(field: str, value: str | int | bool) -> str:
    """A level of a factor in a few words; "" for what goes without saying."""
    starts = {"any": "any start", "steps": "starts at steps", "beats": "starts at beats"}
    budgets = {"short": "", "long": "4x budget", "notebook": "notebook's schedule", "tiny": "tiny"}
    return {
        "window": f"window {value}",
        "masking": f"{value} masks",
        "phase": starts.get(str(value), ""),
        "voice": "voice given" if value else "",
        "schedule": budgets.get(str(value), ""),
    }[field]


def setting_text(setting: Setting, leave_out: str | None = None) -> str:
    """A setting in a few words."""
    words = [factor_text(field, value) for field, value in setting.items() if field != leave_out]
    return ", ".join(word for word in words if word)
