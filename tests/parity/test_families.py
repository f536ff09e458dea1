"""Compares logits and router logits of every family with torch, for checkpoints that we read and that we write."""

import numpy as np
import pytest

from flex_jax import load_pretrained
from flex_jax.models.checkpoint import save_pretrained
from tests.parity import oracles


def cases(applies=lambda family, number: True):
    """Parametrises a test with the torch models that it applies to."""
    chosen = [case for case in oracles.CASES if applies(*case)]
    return pytest.mark.parametrize("theirs", chosen, ids=lambda case: f"{case[0]}-{case[1]}", indirect=True)


@pytest.fixture(scope="module")
def theirs(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("torch")
    return oracles.make(*request.param, path), path, request.param


def torch_outputs(model, ids, mask):
    """Torch's outputs at real positions. Each sequence runs separately: dynamic RoPE depends on the padded length."""
    lengths = mask.sum(1)
    each = [oracles.outputs(model, ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)]
    return np.concatenate([out[0][0] for out in each]), np.concatenate([out[1][:, 0] for out in each], axis=1)


def assert_equal(ours, reference, mask):
    logits, router_logits = (np.asarray(array) for array in (ours.logits, ours.router_logits))
    real = mask.astype(bool)
    assert np.abs(reference[0]).max() > 0.1
    np.testing.assert_allclose(logits[real], reference[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(router_logits[:, real], reference[1], atol=1e-4, rtol=0)


@cases()
def test_logits_and_router_logits_agree(theirs):
    ids, mask = oracles.batch()
    model, frozen = load_pretrained(theirs[1])
    out = model.apply({"params": frozen}, ids, mask, output_router_logits=True)
    assert_equal(out, torch_outputs(theirs[0], ids, mask), mask)


# torch's dynamic RoPE counts padding as text
@cases(lambda family, number: "dynamic" not in str(oracles.SHAPES[family][number]))
def test_right_padding_is_torchs(theirs):
    ids, mask = oracles.batch()
    model, frozen = load_pretrained(theirs[1])
    out = model.apply({"params": frozen}, ids, mask, output_router_logits=True)
    logits, router_logits = oracles.outputs(theirs[0], ids, mask)
    real = mask.astype(bool)
    assert_equal(out, (logits[real], router_logits[:, real]), mask)


@cases()
def test_what_we_save_torch_reads(theirs, tmp_path):
    torch_model, path, (family, _) = theirs
    ids, mask = oracles.batch()
    model, frozen = load_pretrained(path)
    save_pretrained(tmp_path, model.config, frozen)
    if family == "deepseek":
        again, frozen_again = load_pretrained(tmp_path)
        assert again.config == model.config
        out = again.apply({"params": frozen_again}, ids, mask, output_router_logits=True)
        assert_equal(out, torch_outputs(torch_model, ids, mask), mask)
        return
    again = oracles.transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(torch_model)
    for before, after in zip(torch_outputs(torch_model, ids, mask), torch_outputs(again, ids, mask), strict=True):
        np.testing.assert_allclose(before, after, atol=1e-4, rtol=0)


@cases(lambda family, number: family in oracles.CLASSES)  # those that transformers has
def test_experts_that_share_a_tensor_on_disk(theirs, tmp_path):
    """The layout of transformers in memory: two tensors for all experts of a layer."""
    torch_model = theirs[0]
    torch_model.save_pretrained(tmp_path, save_original_format=False)
    ids, mask = oracles.batch()
    model, frozen = load_pretrained(tmp_path)
    out = model.apply({"params": frozen}, ids, mask, output_router_logits=True)
    assert_equal(out, torch_outputs(torch_model, ids, mask), mask)
