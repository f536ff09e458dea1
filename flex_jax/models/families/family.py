"""What tells one family from another, as data: the keys of its config.json and the names of its tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flex_jax.models.attention import adapted_projections
from flex_jax.models.config import ModelConfig
from flex_jax.models.families.rope import read_rope, write_rope
from flex_jax.models.tensors import Tensor

REQUIRED = object()
VALUES = {  # what a number may be; far beyond any model the file is broken, and its tensors are not worth listing
    int: ("an integer from 1 to 1000000", lambda value: 1 <= value <= 10**6),
    "count": ("an integer from 0 to 1000000", lambda value: 0 <= value <= 10**6),  # of what a model may lack
    float: ("a number above 0", lambda value: 0 < value < 1e6),
    bool: ("true or false", lambda value: True),
}
DISK_NAMES = {"kv_a_proj": "kv_a_proj_with_mqa"}  # of projections, where they are not ours


class Key(NamedTuple):
    """A key of config.json, and what a missing one means."""

    name: str
    default: Any = REQUIRED
    alias: str = ""  # another name, under which newer or older config.json files have it


class Family(NamedTuple):
    model_type: str
    architecture: str  # the class of its models
    keys: dict[str, Key]  # field of ModelConfig -> the key that it is
    constants: dict[str, Any] = {}  # fields of ModelConfig that are the same for all of the family
    only: dict[str, tuple] = {}  # keys of config.json and their supported values; the first is what a missing key means
    read: Callable[[dict], dict] = lambda raw: {}  # fields that are not one key each
    write: Callable[[ModelConfig], dict] = lambda config: {}  # and their keys
    default_theta: float = 10000.0
    mlp: str = "mlp"  # name of a layer's feed-forward part on disk, where experts have tensors of their own
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = ""
    in_transformers: bool = True  # False: its checkpoints bring their own code


COMMON = {
    "vocab_size": Key("vocab_size"),
    "width": Key("hidden_size"),
    "layers": Key("num_hidden_layers"),
    "heads": Key("num_attention_heads"),
    "kv_heads": Key("num_key_value_heads", 0),
    "experts_per_token": Key("num_experts_per_tok"),
    "tied_head": Key("tie_word_embeddings", False),
    "norm_epsilon": Key("rms_norm_eps", 1e-6),
    "max_positions": Key("max_position_embeddings"),
}
ONLY = {"hidden_act": ("silu",), "quantization_config": (None,)}


def read_config(family: Family, raw: dict) -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises KeyError for a needed key that is missing, ValueError naming all that is wrong or not supported.
    """
    fields = {"family": family.model_type, **family.constants}
    problems = [
        f"{key} {raw[key]!r} (only {' or '.join(map(repr, allowed))})"
        for key, allowed in (ONLY | family.only).items()
        if raw.get(key) is not None and raw[key] not in allowed
    ]
    for field, key in family.keys.items():
        given = [raw[name] for name in (key.name, key.alias) if raw.get(name) is not None]
        value = given[0] if given else key.default
        if value is REQUIRED:
            raise KeyError(key.name)
        kind = ModelConfig.__annotations__[field]
        fields[field] = float(value) if kind is float and type(value) is int else value
        words, accepts = VALUES["count" if kind is int and key.default == 0 else kind]
        if type(fields[field]) is not kind or not accepts(fields[field]):
            problems.append(f"{key.name} {value!r} (only {words})")
    if problems:
        raise ValueError("; ".join(problems))
    fields |= family.read(raw)
    latent = bool(fields.get("latent_rank"))
    fields["rope"] = read_rope(raw, family.default_theta, latent=latent)
    fields["kv_heads"] = fields["kv_heads"] or fields["heads"]
    if not latent:
        fields["head_dim"] = fields.get("head_dim") or fields["width"] // fields["heads"]
    config = ModelConfig(**fields)
    if problem := _contradiction(config):
        raise ValueError(problem)
    return config


def _contradiction(c: ModelConfig) -> str | None:
    """The first pair of numbers that do not go together."""
    if c.dense_layers >= c.layers:
        return f"{c.dense_layers} layers without experts of {c.layers}"
    if c.experts_per_token > c.experts:
        return f"{c.experts_per_token} experts a token of {c.experts}"
    if c.heads % c.kv_heads:
        return f"{c.heads} query heads over {c.kv_heads} key-value heads"
    if c.expert_groups and (c.experts % c.expert_groups or not 0 < c.groups_per_token <= c.expert_groups):
        return f"{c.experts} experts in {c.expert_groups} groups, {c.groups_per_token} of them a token"
    return None


def write_config(family: Family, config: ModelConfig) -> dict:
    """The config.json of a ModelConfig: `read_config`'s inverse."""
    raw = {"model_type": family.model_type, "architectures": [family.architecture]}
    raw |= {key.name: getattr(config, field) for field, key in family.keys.items()}
    raw |= {key: allowed[0] for key, allowed in (ONLY | family.only).items() if allowed[0] is not None}
    return raw | family.write(config) | {"rope_parameters": write_rope(config.rope)}


def tensors(family: Family, config: ModelConfig, *, fused: bool = False) -> list[Tensor]:
    """Every tensor of a checkpoint and where it goes; `fused`: the experts of a layer share two tensors."""
    c = config
    table = [
        Tensor("embedding", ("model.embed_tokens.weight",), (c.vocab_size, c.width)),
        Tensor("norm/scale", ("model.norm.weight",), (c.width,)),
    ]
    if not c.tied_head:
        table.append(Tensor("head", ("lm_head.weight",), (c.vocab_size, c.width)))
    if c.dense_layers:
        dense = _Rows("dense_layers", range(c.dense_layers))
        table += _attention(dense, c) + _mlp(dense, "mlp", "mlp", c.width, c.dense_width)
    rows = _Rows("layers", range(c.dense_layers, c.layers))
    mlp = "mlp" if fused else family.mlp
    table += _attention(rows, c)
    table.append(rows.matrix("moe/router", f"{mlp}.gate.weight", (c.experts, c.width))._replace(quantisable=False))
    if c.shared_expert_width:
        table += _mlp(rows, "moe/shared_expert", f"{mlp}.{family.shared_expert}", c.width, c.shared_expert_width)
    if c.shared_expert_gate:
        gate = rows.matrix("moe/shared_expert/gate", f"{mlp}.{family.shared_expert}_gate.weight", (1, c.width))
        table.append(gate._replace(quantisable=False))
    if fused:
        return table + [
            rows.matrix("moe/gate_up", "mlp.experts.gate_up_proj", (c.experts, 2 * c.expert_width, c.width)),
            rows.matrix("moe/down", "mlp.experts.down_proj", (c.experts, c.width, c.expert_width)),
        ]
    gate, up, down = (f"{mlp}.experts.{{expert}}.{name}.weight" for name in family.expert)
    return table + [
        rows.matrix("moe/gate_up", (gate, up), (c.expert_width, c.width), experts=c.experts),
        rows.matrix("moe/down", down, (c.width, c.expert_width), experts=c.experts),
    ]


class _Rows(NamedTuple):
    """Makes the rows of one stack of layers."""

    stack: str
    layers: range

    def vector(self, path, name, size):
        return Tensor(f"{self.stack}/{path}", (f"model.layers.{{layer}}.{name}",), (size,), layers=self.layers)

    def matrix(self, path, names, shape, experts=0):
        names = (names,) if isinstance(names, str) else names
        names = tuple(f"model.layers.{{layer}}.{name}" for name in names)
        return Tensor(f"{self.stack}/{path}", names, shape, True, self.layers, experts, quantisable=True)


def _attention(rows: _Rows, c: ModelConfig) -> list[Tensor]:
    table = [
        rows.vector("attention_norm/scale", "input_layernorm.weight", c.width),
        rows.vector("feed_forward_norm/scale", "post_attention_layernorm.weight", c.width),
        rows.matrix("attention/o_proj/kernel", "self_attn.o_proj.weight", (c.width, c.heads * c.value_dim)),
    ]
    for name, (inputs, outputs) in adapted_projections(c).items():
        on_disk = f"self_attn.{DISK_NAMES.get(name, name)}"
        table.append(rows.matrix(f"attention/{name}/kernel", f"{on_disk}.weight", (outputs, inputs)))
        if c.attention_bias:
            table.append(rows.vector(f"attention/{name}/bias", f"{on_disk}.bias", outputs))
    norms = {}
    if c.latent_rank:
        norms = {"kv_a_norm": ("kv_a_layernorm", c.latent_rank)}
        norms |= {"q_a_norm": ("q_a_layernorm", c.query_rank)} if c.query_rank else {}
    elif c.qk_norm:
        heads = (1, 1) if c.qk_norm == "head" else (c.heads, c.kv_heads)
        norms = {name: (name, n * c.head_dim) for name, n in zip(("q_norm", "k_norm"), heads, strict=True)}
    for name, (on_disk, size) in norms.items():
        table.append(rows.vector(f"attention/{name}/scale", f"self_attn.{on_disk}.weight", size))
    return table


def _mlp(rows: _Rows, path: str, name: str, width: int, hidden: int) -> list[Tensor]:
    gate_up = tuple(f"{name}.{part}_proj.weight" for part in ("gate", "up"))
    return [
        rows.matrix(f"{path}/gate_up", gate_up, (hidden, width)),
        rows.matrix(f"{path}/down", f"{name}.down_proj.weight", (width, hidden)),
    ]
