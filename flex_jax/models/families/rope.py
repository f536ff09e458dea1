"""The rotary positions of a config.json, in today's form (`rope_parameters`) or the older one (`rope_scaling`)."""

import math

from flex_jax.models.config import Rope


def read_rope(raw: dict, default_theta: float, *, latent: bool) -> tuple[Rope, list[str]]:
    """The Rope of a config.json, and what in it is not supported (empty if nothing). Raises KeyError as `read_config`.

    latent: attention scores are scaled too, as DeepSeek-V2 does.
    """
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or default_theta)
    if (given.get("partial_rotary_factor") or 1.0) != 1.0 or (raw.get("partial_rotary_factor") or 1.0) != 1.0:
        return Rope(theta), ["partial_rotary_factor (only 1.0)"]
    if kind == "default":
        return Rope(theta), []
    if kind not in ("linear", "dynamic", "yarn"):
        return Rope(theta), [f"rope scaling {kind!r} (only 'default', 'linear', 'dynamic', 'yarn')"]
    longest = raw["max_position_embeddings"]
    if kind != "yarn":
        return Rope(theta, kind, float(given["factor"]), longest if kind == "dynamic" else 0), []
    trained = given.get("original_max_position_embeddings") or longest
    factor = float(given.get("factor") or longest / trained)
    mscale, mscale_all = given.get("mscale"), given.get("mscale_all_dim")
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        attention_factor = _mscale(factor, 1.0)
        if mscale and mscale_all:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    rope = Rope(
        theta,
        kind,
        factor,
        trained,
        beta_fast=float(given.get("beta_fast") or 32.0),
        beta_slow=float(given.get("beta_slow") or 1.0),
        truncate=given.get("truncate", True),
        attention_factor=float(attention_factor),
        softmax_mscale=float(mscale_all or 0.0) if latent and factor > 1 else 0.0,
    )
    return rope, []


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
