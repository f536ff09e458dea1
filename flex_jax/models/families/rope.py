"""The rotary positions of a config.json, in today's form (`rope_parameters`) or the older one (`rope_scaling`)."""

import math

from flex_jax.models.config import Rope

KINDS = ("default", "linear", "dynamic", "yarn")


def read_rope(raw: dict, default_theta: float, *, latent: bool) -> Rope:
    """The Rope of a config.json. latent: attention scores are scaled too, as DeepSeek-V2 does.

    Raises KeyError for a needed key that is missing, ValueError for what is wrong or not supported.
    """
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"rope_parameters {given!r} (only one object of numbers and names)")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"rope scaling {kind!r} (only {', '.join(map(repr, KINDS))})")
    if {given.get("partial_rotary_factor"), raw.get("partial_rotary_factor")} - {None, 1.0}:
        raise ValueError("partial_rotary_factor (only 1.0)")
    theta = _number(given, "rope_theta", _number(raw, "rope_theta", default_theta))
    if theta <= 1:
        raise ValueError(f"rope_theta {theta!r} (only a number above 1)")
    longest = raw["max_position_embeddings"]
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        return Rope(theta, kind, _number(given, "factor"), longest if kind == "dynamic" else 0)
    trained = int(_number(given, "original_max_position_embeddings", longest))
    factor = _number(given, "factor", longest / trained)
    mscale, mscale_all = (_number(given, key, 0.0) for key in ("mscale", "mscale_all_dim"))
    inferred = _mscale(factor, 1.0)
    if mscale and mscale_all:
        inferred = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    return Rope(
        theta,
        kind,
        factor,
        trained,
        beta_fast=_number(given, "beta_fast", 32.0),
        beta_slow=_number(given, "beta_slow", 1.0),
        truncate=given.get("truncate", True) is not False,
        attention_factor=_number(given, "attention_factor", inferred),
        softmax_mscale=mscale_all if latent and factor > 1 else 0.0,
    )


def _number(given: dict, key: str, default: float | None = None) -> float:
    """A number of the config, or the default for none. Raises ValueError unless it is above 0 and finite."""
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
    """The `rope_parameters` of a config.json: `read_rope`'s inverse."""
    given = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        given["factor"] = rope.factor
    if rope.kind == "yarn":
        given |= {
            "original_max_position_embeddings": rope.trained_length,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }
        given |= {"mscale_all_dim": rope.softmax_mscale} if rope.softmax_mscale else {}
    return given
