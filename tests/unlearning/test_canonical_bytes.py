"""Digests and the byte comparison: one spelling per value, one flipped bit is found, nothing is compared vacuously."""

import math
import struct

import pytest
import torch
from safetensors.torch import save_file

from cl_platform.errors import UserError
from cl_platform.unlearning import canonical

HEAD = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
COUNT = torch.tensor([3, 4])
HEAD_DIGEST = "f5fa11e5c97b31b4d73a96b2def2f7bf26ac31af0e56c3daf6afe71fccbda1ea"
COUNT_DIGEST = "da04cb736001bea3430e5f38f1d2f99793a73e5dac3a1714f3107bdfe0bd3a64"


def test_digests_and_root_have_their_known_values():
    found = canonical.digests({"nmc.count": COUNT, "head.2.weight": HEAD})
    assert found == {"head.2.weight": HEAD_DIGEST, "nmc.count": COUNT_DIGEST}
    assert canonical.root(found) == "d575592bcefaa6cf2ef1d9a24fb1331b6717a3e6fde8a7d05bdf25b314dbafb3"


def test_negative_zero_is_another_value():
    changed = HEAD.clone()
    changed[1, 1] = -0.0
    found = canonical.root(canonical.digests({"head.2.weight": changed, "nmc.count": COUNT}))
    assert found == "bbe40bfeeb6bc0f2bb045b2adf2d361e15e0b66c8da1e25bf632cb969f3d81d5"
    (difference,) = canonical.compare({"w": HEAD}, {"w": changed}).differences
    assert (difference.elements, difference.largest) == (1, 0.0)


def test_nans_with_other_payloads_are_other_values():
    payload = torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32)
    plain = torch.tensor([0x7FC00000, 0], dtype=torch.int32).view(torch.float32)
    assert canonical.tensor_digest("w", payload) != canonical.tensor_digest("w", plain)
    outcome = canonical.compare({"w": plain}, {"w": payload})
    assert not outcome.equal
    assert outcome.differences[0].elements == 1
    assert canonical.compare({"w": plain}, {"w": plain.clone()}).equal


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float16, torch.float64, torch.complex64],
    ids=str,
)
def test_the_layout_in_memory_does_not_count(dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    strided = whole.t()[::2]
    packed = strided.contiguous()
    assert not strided.is_contiguous()
    assert canonical.tensor_digest("w", strided) == canonical.tensor_digest("w", packed)


@pytest.mark.parametrize("tensor", [torch.tensor(3.5), torch.empty(0, 4), torch.tensor([[2.0]])], ids=str)
def test_scalars_and_empty_tensors_have_digests(tensor):
    assert len(canonical.tensor_digest("w", tensor)) == 64


def test_name_dtype_and_shape_are_part_of_the_digest():
    one = torch.arange(4, dtype=torch.int32)
    others = [one.view(torch.float32), one.reshape(2, 2), one.reshape(4, 1)]
    found = {canonical.tensor_digest("w", t) for t in [one, *others]} | {canonical.tensor_digest("v", one)}
    assert len(found) == 5


def test_a_sparse_tensor_is_refused():
    with pytest.raises(TypeError, match="no canonical bytes"):
        canonical.tensor_digest("w", torch.eye(2).to_sparse())


def test_scalars_and_lists_go_in_as_canonical_json():
    import hashlib

    expected = hashlib.sha256(b'["chosen","JSON",[]]\n["a",1]').hexdigest()
    assert canonical.tensor_digest("chosen", ["a", 1]) == expected
    scalar = torch.tensor(0.1, dtype=torch.float64)
    assert canonical.tensor_digest("ridge", 0.1) == canonical.tensor_digest("ridge", scalar)


def test_a_salt_changes_every_digest_and_goes_first():
    import hashlib

    body = b'["nmc.count","I64",[2]]\n' + struct.pack("<qq", 3, 4)
    assert canonical.tensor_digest("nmc.count", COUNT, b"salt") == hashlib.sha256(b"salt" + body).hexdigest()


def test_canonical_json_has_one_spelling():
    assert canonical.canonical_json({"b": [1, True, None], "a": "Ä"}) == '{"a":"Ä","b":[1,true,null]}'.encode()


@pytest.mark.parametrize(
    "value,place",
    [({"a": {"b": 1.5}}, "value.a.b"), ([math.nan], "value[0]"), ({1: "a"}, "key 1"), ({"a": {1, 2}}, "value.a")],
)
def test_what_has_several_spellings_is_refused_with_its_place(value, place):
    with pytest.raises(TypeError) as refusal:
        canonical.canonical_json(value)
    assert place in str(refusal.value)


def test_a_line_feed_in_a_name_is_refused():
    with pytest.raises(ValueError, match="line feed"):
        canonical.root({"a\nb": "0" * 64})


def test_one_flipped_bit_is_found_and_named():
    generator = torch.Generator().manual_seed(3)
    state = {f"layer.{i}.weight": torch.randn(7, 5, generator=generator) for i in range(4)}
    other = {name: tensor.clone() for name, tensor in state.items()}
    assert canonical.compare(state, other).equal
    other["layer.2.weight"].view(torch.int32)[3, 1] ^= 1
    outcome = canonical.compare(state, other)
    assert (outcome.equal, outcome.tensors, outcome.bytes, outcome.differing) == (False, 4, 4 * 35 * 4, 1)
    (difference,) = outcome.differences
    assert (difference.name, difference.kind, difference.elements) == ("layer.2.weight", "values", 1)
    assert 0 < difference.largest < 1e-6
    roots = [canonical.root(canonical.digests(s)) for s in (state, other)]
    assert roots[0] != roots[1]


def test_another_set_of_names_or_another_type_is_a_difference():
    outcome = canonical.compare({"a": COUNT, "b": HEAD}, {"b": HEAD.clone().double(), "c": COUNT})
    assert [(d.name, d.kind) for d in outcome.differences] == [("a", "extra"), ("b", "type"), ("c", "missing")]


def test_twenty_differences_are_named_and_all_are_counted():
    one = {f"w{i:02}": torch.tensor([i]) for i in range(25)}
    other = {name: tensor + 1 for name, tensor in one.items()}
    outcome = canonical.compare(one, other)
    assert (outcome.differing, len(outcome.differences)) == (25, 20)
    assert outcome.differences[0].largest == 1.0


def test_a_difference_at_infinity_has_no_size():
    outcome = canonical.compare({"w": torch.tensor([math.inf, 1.0])}, {"w": torch.tensor([0.0, 1.0])})
    assert (outcome.differences[0].elements, outcome.differences[0].largest) == (1, None)


def test_a_state_is_not_compared_with_itself():
    state = {"w": HEAD, "n": COUNT}
    for same in (state, dict(state), {name: t.detach() for name, t in state.items()}):
        with pytest.raises(UserError, match="the state itself"):
            canonical.compare(state, same)


def test_two_states_may_share_a_frozen_part():
    assert canonical.compare({"w": HEAD, "n": COUNT}, {"w": HEAD, "n": COUNT.clone()}).equal


def test_files_are_compared_and_a_file_is_not_compared_with_itself(tmp_path):
    one, other, link = (tmp_path / f"{name}.safetensors" for name in ("one", "other", "link"))
    save_file({"w": HEAD, "n": COUNT}, one)
    save_file({"n": COUNT, "w": HEAD + 1}, other)
    link.symlink_to(one)
    outcome = canonical.compare_files(one, other)
    assert [(d.name, d.elements, d.largest) for d in outcome.differences] == [("w", 4, 1.0)]
    with pytest.raises(UserError, match="the file itself"):
        canonical.compare_files(one, link)


def test_other_numerics_refuse_the_comparison():
    here = canonical.fingerprint("cpu")
    canonical.refuse_other_numerics(here, canonical.fingerprint("cpu"))
    with pytest.raises(UserError, match=r"threads 99 and here"):
        canonical.refuse_other_numerics(here, {**here, "threads": 99})


def test_a_fingerprint_can_be_hashed():
    here = canonical.fingerprint("cpu")
    canonical.canonical_json(here)
    assert {"torch", "numpy", "blas", "device", "cpu_capability", "threads", "deterministic", "dtype"} <= set(here)
