"""The rotary positions of a config.json, in the current form (`rope_parameters`) or the older one (`rope_scaling`)."""

import math

from flex_jax.models.config import Rope

KINDS = ("default", "linear", "dynamic", "yarn")
ORIGINAL = "original_max_position_embeddings"


def read_rope(raw: dict, default_theta: float, *, latent: bool) -> Rope:
    """Reads a config.json. If `latent`, attention scores are scaled as well, as in DeepSeek-V2.

    Raises ValueError with both readings if the two forms, or two places of a number, say different things.
    """
    readings = {
        form: _read_form(form, raw, default_theta, latent)
        for form in ("rope_parameters", "rope_scaling")
        if raw.get(form)
    }
    current, older = readings.get("rope_parameters"), readings.get("rope_scaling")
    if current and older and current != older:
        raise ValueError(
            f"rope_parameters {raw['rope_parameters']!r} and rope_scaling {raw['rope_scaling']!r}, which differ (only "
            "one of them, with rope_theta; transformers takes rope_scaling)"
        )
    return current or older or _read_form("rope_parameters", raw, default_theta, latent)


def _read_form(form: str, raw: dict, default_theta: float, latent: bool) -> Rope:
    given = raw.get(form) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{form} {given!r} (only one object of numbers and names)")
    for key, other, place in (
        ("rope_type", "type", given),
        ("rope_theta", "rope_theta", raw),
        (ORIGINAL, ORIGINAL, raw),
    ):
        if None not in (given.get(key), place.get(other)) and given[key] != place[other]:
            where = f"{form}.{other}" if place is given else other
            raise ValueError(f"{form}.{key} {given[key]!r} and {where} {place[other]!r} (only one value)")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"rope scaling {kind!r} (only {', '.join(map(repr, KINDS))})")
    if any(place.get("partial_rotary_factor") not in (None, 1.0) for place in (given, raw)):
        raise ValueError("partial_rotary_factor (only 1.0)")
    theta = _number(given, "rope_theta", _number(raw, "rope_theta", default_theta))
    if theta <= 1:
        raise ValueError(f"rope_theta {theta!r} (only a number above 1)")
    longest = raw["max_position_embeddings"]
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        return Rope(theta, kind, _number(given, "factor"), longest if kind == "dynamic" else 0)
    trained = int(_number(given, ORIGINAL, _number(raw, ORIGINAL, longest)))
    if not trained:
        raise ValueError(f"{ORIGINAL} {given.get(ORIGINAL, raw.get(ORIGINAL))!r} (only a number of at least 1)")
    factor = _number(given, "factor", longest / trained)
    mscale, mscale_all = (_number(given, key, 0.0) for key in ("mscale", "mscale_all_dim"))
    both = mscale and mscale_all
    inferred = _mscale(factor, mscale) / _mscale(factor, mscale_all) if both else _mscale(factor, 1.0)
    fast, slow = _number(given, "beta_fast", 32.0), _number(given, "beta_slow", 1.0)
    truncate, attention_factor = bool(given.get("truncate", True)), _number(given, "attention_factor", inferred)
    softmax_mscale = mscale_all if latent and factor > 1 else 0.0
    return Rope(theta, kind, factor, trained, fast, slow, truncate, attention_factor, softmax_mscale)


def _number(given: dict, key: str, default: float | None = None) -> float:
    value = given.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise KeyError(key)
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise ValueError(f"{key} {value!r} (only a number above 0)")
    return float(value)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(rope: Rope) -> dict:
    given = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        given["factor"] = rope.factor
    if rope.kind == "yarn":
        given["original_max_position_embeddings"] = rope.trained_length
        given |= {key: getattr(rope, key) for key in ("beta_fast", "beta_slow", "truncate", "attention_factor")}
        given |= {"mscale_all_dim": rope.softmax_mscale} if rope.softmax_mscale else {}
    return given
