"""Compares exported models with ours: logits and greedy texts in torch, by PEFT and by transformers."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from flex_jax import load_pretrained
from flex_jax.federated.ownership import merge
from flex_jax.grafting.surgery import fill_slots
from flex_jax.models.adapters import AdapterConfig, init_attention_lora
from flex_jax.models.config import LoraConfig, SlotConfig
from flex_jax.models.export.peft import load_adapter, save_adapter
from flex_jax.models.export.transformers import MODELING, save_transformers
from flex_jax.models.families import FAMILIES
from tests.parity import oracles

peft = pytest.importorskip("peft")
torch, AutoModel = oracles.torch, oracles.transformers.AutoModelForCausalLM

LORA, SLOT_LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.1), LoraConfig(rank=2, alpha=3.0)
FULL, LOW_RANK = SlotConfig(), SlotConfig(training="lora", lora=SLOT_LORA)
CASES = {
    "qwen2_moe": ("qwen2_moe", 1, FULL),
    "qwen2_moe-tied-2-experts-by-lora-closed": (
        "qwen2_moe",
        2,
        dataclasses.replace(LOW_RANK, num_experts=2, gate_init="closed"),
    ),
    "qwen3_moe-by-lora": ("qwen3_moe", 0, LOW_RANK),
    "olmoe-closed": ("olmoe", 1, dataclasses.replace(FULL, gate_init="closed")),
    "mixtral-2-experts": ("mixtral", 0, dataclasses.replace(FULL, num_experts=2)),
    "deepseek_v2-by-lora": ("deepseek_v2", 1, LOW_RANK),
    "deepseek_v2-2-experts-closed": ("deepseek_v2", 0, dataclasses.replace(FULL, num_experts=2, gate_init="closed")),
}
NEW_TOKENS = 12


def personalised(base, slot, quantisation=None):
    """Returns the model of a checkpoint, and a client's collections: adapters are their initial values plus noise."""
    model, params = load_pretrained(base, quantisation=quantisation)
    config, num_experts = model.config, slot.num_experts
    keys = jax.random.split(jax.random.PRNGKey(5), 3)
    expert_index = jax.random.permutation(keys[0], config.num_experts)[: config.num_moe_layers * num_experts]
    slots, grafts = fill_slots(params, expert_index.reshape(config.num_moe_layers, num_experts), slot, keys[1])
    adapters = merge(init_attention_lora(keys[2], config, LORA), slots)
    leaves, tree = jax.tree.flatten(adapters)
    noise = np.random.default_rng(6)
    moved = [leaf + 0.2 * noise.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    variables = {"params": params, "adapters": jax.tree.unflatten(tree, moved), "grafts": grafts}
    return model.clone(adapters=AdapterConfig(LORA, slot)), variables


def without_slot(variables):
    stacks = {stack: {"attention": tree["attention"]} for stack, tree in variables["adapters"].items()}
    return variables | {"adapters": stacks, "grafts": {}}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    family, number, slot = CASES[request.param]
    base = tmp_path_factory.mktemp("base")
    oracles.make(family, number, base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 1, "top_k": 7}))
    return base, *personalised(base, slot)


def real_logits(model, variables):
    """Returns our logits at the real positions of a right-padded batch."""
    ids, mask = oracles.batch()
    return np.asarray(model.apply(variables, ids, mask).logits)[mask.astype(bool)]


@pytest.fixture(scope="module")
def ours(case):
    """Logits of the pretrained model, with the LoRA, and with the LoRA and the personal experts."""
    _, model, variables = case
    stages = {"params": variables["params"]}, without_slot(variables), variables
    logits = [real_logits(model, stage) for stage in stages]
    assert all(np.abs(a - b).max() > 0.05 for a, b in itertools.pairwise(logits))
    return dict(zip(("pretrained", "lora", "personal"), logits, strict=True))


def assert_logits(theirs, logits):
    ids, mask = oracles.batch()
    with torch.no_grad():
        out = theirs.eval()(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    np.testing.assert_allclose(out.logits.numpy()[mask.astype(bool)], logits, atol=1e-4, rtol=0)


def test_peft_adapter(case, ours, tmp_path):
    base, model, variables = case
    save_adapter(tmp_path, model.config, variables["adapters"], LORA, str(base))
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == str(base)
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path)
    assert_logits(theirs, ours["lora"])


def test_merged_weights(case, ours, tmp_path):
    base, model, variables = case
    save_transformers(tmp_path, base, model, without_slot(variables))
    theirs, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_logits(theirs, ours["lora"])
    assert not (tmp_path / MODELING.name).exists()


def load_personalised(path):
    theirs, report = AutoModel.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    assert type(theirs).__name__ == f"Flex{FAMILIES[theirs.config.model_type].architecture}"
    return theirs.eval()


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory):
    """The directory with the personal experts, and its torch model."""
    path = tmp_path_factory.mktemp("exported")
    save_transformers(path, *case)
    return path, load_personalised(path)


def test_personal_experts_also_when_transformers_saves_them_again(case, ours, exported, tmp_path):
    base, (path, theirs) = case[0], exported
    assert_logits(theirs, ours["personal"])
    theirs.save_pretrained(tmp_path)
    assert_logits(load_personalised(tmp_path), ours["personal"])
    ours_raw, base_raw = (json.loads((directory / "config.json").read_text()) for directory in (path, base))
    changed = {"architectures", "auto_map", "flex", "dtype"}
    unchanged = ours_raw.keys() - changed
    assert unchanged == base_raw.keys() - changed and all(ours_raw[key] == base_raw[key] for key in unchanged)
    assert theirs.generation_config.top_k == 7


def our_greedy(model, variables, prompts):
    """Returns the most likely tokens after each prompt, up to the end token 0. Each step runs the whole sequence."""
    apply = jax.jit(lambda tokens, mask: model.apply(variables, tokens, mask).logits)
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), lengths.max() + NEW_TOKENS), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    each = np.arange(len(prompts))
    for step in range(NEW_TOKENS):
        mask = (np.arange(tokens.shape[1]) < (lengths + step)[:, None]).astype(np.int32)
        tokens[each, lengths + step] = np.asarray(apply(tokens, mask))[each, lengths + step - 1].argmax(-1)
    texts = [row[n : n + NEW_TOKENS].tolist() for row, n in zip(tokens, lengths, strict=True)]
    return [text[: text.index(0) + 1] if 0 in text else text for text in texts]


def test_greedy_texts_are_equal_token_for_token(case, exported):
    """Torch reads the prompts with left padding, as its `generate` needs, and continues with its cache."""
    (_, model, variables), (_, theirs) = case, exported
    noise = np.random.default_rng(7)
    prompts = [noise.integers(2, oracles.VOCABULARY, 3 + i).tolist() for i in range(20)]
    texts = our_greedy(model, variables, prompts)
    longest = max(map(len, prompts))
    padded = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
    out = theirs.generate(padded, attention_mask=(padded != 1).long(), max_new_tokens=NEW_TOKENS, do_sample=False)
    for text, row in zip(texts, out[:, longest:].tolist(), strict=True):
        assert row[: len(text)] == text and set(row[len(text) :]) <= {1}
    assert texts != our_greedy(model, without_slot(variables), prompts)


def test_an_adapter_that_peft_wrote_is_read(case, ours, tmp_path):
    base, model, variables = case
    names = variables["adapters"]["layers"]["attention"]
    targets = [name.replace("kv_a_proj", "kv_a_proj_with_mqa") for name in names]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModel.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    read = variables | {"adapters": load_adapter(tmp_path, model.config, LORA)}
    logits = real_logits(model, read)
    assert_logits(theirs, logits)
    assert np.abs(logits - ours["pretrained"]).max() > 0.05


@pytest.mark.parametrize(("family", "slot"), [("qwen2_moe", LOW_RANK), ("deepseek_v2", FULL)])
def test_a_quantised_backbone_is_exported_dequantised(family, slot, tmp_path):
    (tmp_path / "base").mkdir()
    oracles.make(family, 0, tmp_path / "base")
    model, variables = personalised(tmp_path / "base", slot, quantisation="int4")
    (tmp_path / "out").mkdir()
    save_transformers(tmp_path / "out", tmp_path / "base", model, variables)
    logits = real_logits(model, variables)
    assert np.abs(logits - real_logits(model, personalised(tmp_path / "base", slot)[1])).max() > 0.05
    assert_logits(load_personalised(tmp_path / "out"), logits)


def test_a_family_that_transformers_lacks_keeps_the_code_of_its_checkpoint(tmp_path):
    (tmp_path / "base").mkdir()
    oracles.make("deepseek", 0, tmp_path / "base")
    (tmp_path / "base/modeling_deepseek.py").write_text("# came with the checkpoint\n")
    model, variables = personalised(tmp_path / "base", FULL)
    plain = without_slot(variables)
    (tmp_path / "out").mkdir()
    save_transformers(tmp_path / "out", tmp_path / "base", model, plain)
    assert (tmp_path / "out/modeling_deepseek.py").exists()
    again, merged = load_pretrained(tmp_path / "out")
    ids, mask = oracles.batch()
    ours, theirs = model.apply(plain, ids, mask).logits, again.apply({"params": merged}, ids, mask).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert again.config == model.config


def test_every_family_has_its_class():
    code = MODELING.read_text()
    for family in FAMILIES.values():
        assert (f"class Flex{family.architecture}(" in code) == family.in_transformers
