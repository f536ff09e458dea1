"""How much quality a quantised backbone loses (on the embedded model), and how much memory it saves (real shape)."""

import plan

from benchmarks.quantised import perplexity


def test_perplexity_stays_within_one_percent_at_8_bits_and_five_at_4():
    plain, eight, four = (perplexity(kind, texts=256, seed=777)[0] for kind in ("none", "int8", "int4"))
    assert 1.5 < plain < 10
    assert abs(eight / plain - 1) < 0.01
    assert 0.001 < four / plain - 1 < 0.05


def test_qwen_moe_of_14_billion_parameters_takes_less_than_9_gb_at_4_bits():
    changes = ["--config.model.dtype=bfloat16", "--config.model.quantisation=int4", "--config.slot.training=lora"]
    planned = plan.main(["benchmarks/shapes/Qwen1.5-MoE-A2.7B.json", *changes])
    assert planned["parameters"] == 14_315_784_192
    assert 8 < planned["backbone_gb"] < 9
    assert planned["peak_gb"]["flex"] < 16
