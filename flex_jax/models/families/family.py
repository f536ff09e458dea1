"""What distinguishes one family from another, as data: the keys of its config.json and the names of its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flex_jax.models.config import ModelConfig
from flex_jax.models.families.rope import read_rope, write_rope
from flex_jax.models.weight_map import WeightMapping

REQUIRED = object()
VALUES = {  # what a value may be; a number far beyond any model means that the file is broken
    int: ("an integer from 1 to 1000000", lambda value: 1 <= value <= 10**6),
    "count": ("an integer from 0 to 1000000", lambda value: 0 <= value <= 10**6),  # of things that a model may lack
    float: ("a number above 0", lambda value: 0 < value < 1e6),
    bool: ("true or false", lambda value: True),
}
ALIASES = {"num_experts": ("num_experts", "num_local_experts", "n_routed_experts")}  # other names in config.json files
DISK_NAMES = {"kv_a_proj": "kv_a_proj_with_mqa"}  # projections whose name on disk is not ours


class Key(NamedTuple):
    """A key of config.json."""

    name: str = ""  # "": the name of the field
    default: Any = REQUIRED  # what a missing key means


class Family(NamedTuple):
    """A family of models, such as qwen2_moe."""

    model_type: str
    architecture: str  # class of its models in transformers
    keys: dict[str, Key]  # field of ModelConfig -> key of config.json, in addition to COMMON
    constants: dict[str, Any] = {}  # fields of ModelConfig that are the same in the whole family
    supported: dict[str, tuple] = {}  # key of config.json -> supported values; the first is what a missing key means
    read: Callable[[dict], dict] = lambda raw: {}  # reads fields that are not one key each
    write: Callable[[ModelConfig], dict] = lambda config: {}  # writes the keys of those fields
    default_theta: float = 10000.0
    mlp: str = "mlp"  # name of a layer's feed-forward part on disk, if experts have separate weights
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = ""
    in_transformers: bool = True  # False: its checkpoints come with their code


ZERO, FALSE = Key(default=0), Key(default=False)
SAME_NAME = ("vocab_size", "hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
COMMON = dict.fromkeys((*SAME_NAME, "max_position_embeddings"), Key()) | {
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", 0),
    "tie_word_embeddings": FALSE,
    "rms_norm_eps": Key(default=1e-6),
}
SUPPORTED = {"hidden_act": ("silu",), "quantization_config": (None,)}


def read_config(family: Family, raw: dict) -> ModelConfig:
    """Raises KeyError if a required key is missing, or ValueError that names all wrong and unsupported values."""
    fields = {"family": family.model_type, **family.constants}
    problems = [
        f"{key} {raw[key]!r} (only {' or '.join(map(repr, allowed))})"
        for key, allowed in (SUPPORTED | family.supported).items()
        if raw.get(key) is not None and raw[key] not in allowed
    ]
    for field, key in (COMMON | family.keys).items():
        name = key.name or field
        given = {alias: raw[alias] for alias in (name, *ALIASES.get(field, ())) if raw.get(alias) is not None}
        value = next(iter(given.values()), key.default)
        if any(other != value for other in given.values()):
            problems.append(f"{' and '.join(f'{alias} {other!r}' for alias, other in given.items())} (only one value)")
        if value is REQUIRED:
            raise KeyError(name)
        kind = ModelConfig.__annotations__[field]
        words, accepts = VALUES["count" if kind is int and key.default == 0 else kind]
        if type(value) not in ((float, int) if kind is float else (kind,)) or not accepts(value):
            problems.append(f"{name} {value!r} (only {words})")
        else:
            fields[field] = kind(value)
    if problems:
        raise ValueError("; ".join(problems))
    if raw.get("layer_types") is not None and raw["layer_types"] != ["full_attention"] * fields["num_layers"]:
        raise ValueError("layer_types (only 'full_attention' for each layer)")
    fields |= family.read(raw)
    latent = bool(fields.get("kv_lora_rank"))
    fields["rope"] = read_rope(raw, family.default_theta, latent=latent)
    fields["num_kv_heads"] = fields["num_kv_heads"] or fields["num_heads"]
    if not latent:
        fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_heads"]
    config = ModelConfig(**fields)
    if problem := _contradiction(config):
        raise ValueError(problem)
    return config


def _contradiction(c: ModelConfig) -> str | None:
    if c.first_k_dense_replace >= c.num_layers:
        return f"{c.first_k_dense_replace} dense layers (only fewer than the {c.num_layers} layers)"
    if c.num_experts_per_tok > c.num_experts:
        return f"{c.num_experts_per_tok} experts per token (only up to the {c.num_experts} experts of a layer)"
    if c.num_heads % c.num_kv_heads:
        return f"{c.num_kv_heads} key-value heads (only a divisor of the {c.num_heads} query heads)"
    if c.n_group and (c.num_experts % c.n_group or not 0 < c.topk_group <= c.n_group):
        return f"{c.n_group} groups of {c.num_experts} experts, {c.topk_group} per token (only equal groups, up to all)"
    return None


def write_config(family: Family, config: ModelConfig) -> dict:
    raw = {"model_type": family.model_type, "architectures": [family.architecture]}
    raw |= {key.name or field: getattr(config, field) for field, key in (COMMON | family.keys).items()}
    raw |= {key: allowed[0] for key, allowed in (SUPPORTED | family.supported).items() if allowed[0] is not None}
    return raw | family.write(config) | {"rope_parameters": write_rope(config.rope)}


def weight_map(family: Family, config: ModelConfig, *, fused: bool = False) -> list[WeightMapping]:
    """Returns every weight of a checkpoint and its parameter. If `fused`, all experts of a layer share two arrays."""
    c, vocabulary = config, (config.vocab_size, config.hidden_size)
    mappings = [
        WeightMapping("embedding", ("model.embed_tokens.weight",), vocabulary),
        WeightMapping("norm/scale", ("model.norm.weight",), (c.hidden_size,)),
    ]
    if not c.tie_word_embeddings:
        mappings.append(WeightMapping("head", ("lm_head.weight",), vocabulary))
    if c.first_k_dense_replace:
        dense = _Stack("dense_layers", range(c.first_k_dense_replace))
        mappings += _attention(dense, c) + _mlp(dense, ("mlp", "mlp"), c.hidden_size, c.intermediate_size)
    stack = _Stack("layers", range(c.first_k_dense_replace, c.num_layers))
    return mappings + _attention(stack, c) + _moe(stack, family, c, fused)


class _Stack(NamedTuple):
    """Makes the mappings of one stack of layers."""

    name: str
    layers: range

    def vector(self, path: str, disk_name: str, size: int) -> WeightMapping:
        names = (f"model.layers.{{layer}}.{disk_name}",)
        return WeightMapping(f"{self.name}/{path}", names, (size,), layers=self.layers)

    def matrix(self, path: str, disk_names: str | tuple[str, ...], shape: tuple, num_experts: int = 0) -> WeightMapping:
        disk_names = (disk_names,) if isinstance(disk_names, str) else disk_names
        names = tuple(f"model.layers.{{layer}}.{name}" for name in disk_names)
        return WeightMapping(f"{self.name}/{path}", names, shape, True, self.layers, num_experts, quantisable=True)


def _attention(stack: _Stack, c: ModelConfig) -> list[WeightMapping]:
    mappings = [
        stack.vector("attention_norm/scale", "input_layernorm.weight", c.hidden_size),
        stack.vector("feed_forward_norm/scale", "post_attention_layernorm.weight", c.hidden_size),
        stack.matrix("attention/o_proj/kernel", "self_attn.o_proj.weight", (c.hidden_size, c.num_heads * c.value_dim)),
    ]
    for name, (inputs, outputs) in c.lora_projections().items():
        disk_name = f"self_attn.{DISK_NAMES.get(name, name)}"
        mappings.append(stack.matrix(f"attention/{name}/kernel", f"{disk_name}.weight", (outputs, inputs)))
        if c.attention_bias:
            mappings.append(stack.vector(f"attention/{name}/bias", f"{disk_name}.bias", outputs))
    norms = {}
    if c.kv_lora_rank:
        norms = {"kv_a_norm": ("kv_a_layernorm", c.kv_lora_rank)}
        norms |= {"q_a_norm": ("q_a_layernorm", c.q_lora_rank)} if c.q_lora_rank else {}
    elif c.qk_norm:
        heads = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
        norms = {name: (name, n * c.head_dim) for name, n in zip(("q_norm", "k_norm"), heads, strict=True)}
    for name, (disk_name, size) in norms.items():
        mappings.append(stack.vector(f"attention/{name}/scale", f"self_attn.{disk_name}.weight", size))
    return mappings


def _mlp(stack: _Stack, names: tuple[str, str], width: int, hidden: int) -> list[WeightMapping]:
    path, disk_name = names
    gate, up, down = (f"{disk_name}.{part}_proj.weight" for part in ("gate", "up", "down"))
    gate_up = stack.matrix(f"{path}/gate_up", (gate, up), (hidden, width))
    return [gate_up, stack.matrix(f"{path}/down", down, (width, hidden))]


def _moe(stack: _Stack, family: Family, c: ModelConfig, fused: bool) -> list[WeightMapping]:
    mlp, width, hidden = "mlp" if fused else family.mlp, c.hidden_size, c.moe_intermediate_size
    mappings = [stack.matrix("moe/router", f"{mlp}.gate.weight", (c.num_experts, width))._replace(quantisable=False)]
    if c.shared_expert_intermediate_size:
        names = ("moe/shared_expert", f"{mlp}.{family.shared_expert}")
        mappings += _mlp(stack, names, width, c.shared_expert_intermediate_size)
    if c.shared_expert_gate:
        gate = stack.matrix("moe/shared_expert/gate", f"{mlp}.{family.shared_expert}_gate.weight", (1, width))
        mappings.append(gate._replace(quantisable=False))
    if fused:
        return mappings + [
            stack.matrix("moe/gate_up", "mlp.experts.gate_up_proj", (c.num_experts, 2 * hidden, width)),
            stack.matrix("moe/down", "mlp.experts.down_proj", (c.num_experts, width, hidden)),
        ]
    gate, up, down = (f"{mlp}.experts.{{expert}}.{name}.weight" for name in family.expert)
    return mappings + [
        stack.matrix("moe/gate_up", (gate, up), (hidden, width), c.num_experts),
        stack.matrix("moe/down", down, (width, hidden), c.num_experts),
    ]
