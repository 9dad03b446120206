"""Loops count by their trips, slices by what they take, collectives by who takes part."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from infalign_jax import sampling
from infalign_jax.commands import plan_bounds
from infalign_jax.commands.plan_phases import Phase
from infalign_jax.drawing import SamplingConfig
from infalign_jax.lm import arithmetic
from infalign_jax.lm.arithmetic import Shape
from infalign_jax.runtime import accounts, hlo
from infalign_jax.runtime.accounts import Account
from infalign_jax.runtime.chips import Chip
from infalign_jax.runtime.collectives import Collective

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def counted(function: Any, *operands: Any, trips: Any = ()) -> Account:
    text = jax.jit(function).lower(*operands).compile().as_text()
    return accounts.account(hlo.parse(text), {"data": 1}, trips)


def entry(*lines: str, before: str = "") -> hlo.Module:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"{before}\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}")


def test_a_scan_counts_its_body_by_its_length() -> None:
    x = jnp.zeros((64, 64))

    def seven(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    once, scanned = counted(lambda x: x @ x, x), counted(seven, x)
    assert once.flops == 2 * 64**3
    assert scanned.flops == 7 * once.flops
    assert 7 * once.bytes <= scanned.bytes < 16 * once.bytes  # a copy of what is carried
    assert not scanned.unknown


def test_a_loop_that_ends_by_its_data_counts_as_said() -> None:
    x, most = jnp.ones((16, 16)), jnp.float32(8)

    def inner(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < most, lambda x: x @ x, x)

    def outer(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.max() < most, lambda x: inner(x) + 1, x)

    def both(x: jax.Array) -> jax.Array:
        return inner(outer(x))

    product = 2 * 16**3
    assert counted(both, x, trips=[(3, 5), (7,)]).flops == (3 * 5 + 7) * product
    nothing_said = counted(both, x)
    assert nothing_said.flops == 2 * product
    assert len(nothing_said.unknown) == 3


@pytest.mark.parametrize(("first", "pace", "trips"), [(0, 1, 8), (0, 2, 4), (1, 2, 4), (2, 3, 2)])
def test_a_loop_that_nobody_counted_is_counted(first: int, pace: int, trips: int) -> None:
    """From where its counter begins to the constant that ends it, by what its body adds."""
    module = entry(
        f"%c = s32[] constant({first})",
        "%x = f32[4,4]{1,0} parameter(0)",
        "%t = (f32[4,4]{1,0}, s32[]) tuple(%x, %c)",
        "ROOT %w = (f32[4,4]{1,0}, s32[]) while(%t), condition=%until, body=%body",
        before="\n".join([
            "%body (p: (f32[4,4], s32[])) -> (f32[4,4], s32[]) {",
            "  %p = (f32[4,4]{1,0}, s32[]) parameter(0)",
            "  %a = f32[4,4]{1,0} get-tuple-element(%p), index=0",
            "  %i = s32[] get-tuple-element(%p), index=1",
            f"  %n = s32[] constant({pace})",
            "  %d = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            "  %j = s32[] add(%i, %n)",
            "  ROOT %r = (f32[4,4]{1,0}, s32[]) tuple(%d, %j)",
            "}",
            "%until (p: (f32[4,4], s32[])) -> pred[] {",
            "  %p = (f32[4,4]{1,0}, s32[]) parameter(0)",
            "  %i = s32[] get-tuple-element(%p), index=1",
            "  %m = s32[] constant(8)",
            "  ROOT %l = pred[] compare(%i, %m), direction=LT",
            "}",
        ]),
    )  # fmt: skip
    found = accounts.account(module, {"data": 1})
    assert found.flops == trips * 2 * 4**3
    assert not found.unknown


@pytest.mark.parametrize("lanes", [0, 2])
def test_the_sampler_runs_as_often_as_it_says(lanes: int) -> None:
    """By the steps that it really takes, where no response ends before its T-th token."""
    law = SamplingConfig(length=130, end=99, in_hand=lanes, lanes=lanes)
    said = sampling.longest(law, 4, 6)
    assert sum(rounds * tokens for rounds, tokens in said) == (2 * 3 * 130 if lanes else 130)
    assert len(said) == (1 if lanes else sampling.RING_SIZES)


def test_a_product_as_a_tpu_has_it() -> None:
    """A batch of 8 products [16, 32] @ [32, 64], written as a convolution over padded places."""
    module = entry(
        "%a = bf16[8,16,32]{2,1,0} parameter(0)",
        "%b = bf16[8,64,32]{2,1,0} parameter(1)",
        "ROOT %c = f32[8,16,64]{2,1,0:T(8,128)S(1)} convolution(%a, %b), window={size=8 stride=7 "
        "pad=0_0 lhs_dilate=8}, dim_labels=0bf_0oi->0bf",
    )
    found = accounts.account(module, {"data": 1})
    assert found.flops == 8 * 2 * 16 * 32 * 64
    assert found.bytes == 2 * (8 * 16 * 32 + 8 * 64 * 32)  # the result lies in the chip's memory


def test_a_slice_counts_as_what_it_takes() -> None:
    x, i = jnp.zeros((1000, 8)), jnp.int32(3)
    taken = counted(lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (10, 8)) * 2, x, i)
    assert 2 * 320 <= taken.bytes < 2 * 320 + 100
    written = counted(
        jax.jit(lambda x, i: jax.lax.dynamic_update_slice(x, x[:10] + 1, (i, 0))), x, i
    )
    assert written.bytes < 3.5 * x.nbytes


def test_a_slice_within_fusions_counts_as_what_it_takes() -> None:
    """Of a stack of layers, one: whether the fusion slices it or one that it calls does."""
    inner = (
        "%take (p: f32[100,8], i: s32[]) -> f32[1,8] {",
        "  %p = f32[100,8]{1,0} parameter(0)",
        "  %i = s32[] parameter(1)",
        "  ROOT %s = f32[1,8]{1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8}",
        "}",
        "%outer (p: f32[100,8], i: s32[]) -> f32[8,1] {",
        "  %p = f32[100,8]{1,0} parameter(0)",
        "  %i = s32[] parameter(1)",
        "  %t = f32[1,8]{1,0} fusion(%p, %i), kind=kLoop, calls=%take",
        "  ROOT %c = f32[8,1]{1,0} transpose(%t), dimensions={1,0}",
        "}",
    )
    stack, number = "%a = f32[100,8]{1,0} parameter(0)", "%n = s32[] parameter(1)"
    for body, result in ("take", "f32[1,8]"), ("outer", "f32[8,1]"):
        fusion = f"ROOT %f = {result}{{1,0}} fusion(%a, %n), kind=kLoop, calls=%{body}"
        module = entry(stack, number, fusion, before="\n".join(inner))
        assert accounts.account(module, {"data": 1}).bytes == 32 + 32 + 4


@pytest.mark.parametrize(
    ("moved", "bytes_moved"),
    [
        ("((f32[1000,8]{1,0}), f32[10,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)", 320),
        ("(f32[1000,8]{1,0:S(1)}, f32[1000,8]{1,0}, u32[]{:S(2)}) copy-start(%a)", 32000),
    ],
)
def test_what_begins_now_and_ends_later_counts_once(moved: str, bytes_moved: int) -> None:
    """A TPU brings operands into its own memory while it computes: a part of them, or all."""
    kind = "slice-done" if "slice" in moved else "copy-done"
    module = entry(
        "%a = f32[1000,8]{1,0} parameter(0)",
        f"%b = {moved}, slice={{[0:10], [0:8]}}",
        f"ROOT %c = f32[10,8]{{1,0:S(1)}} {kind}(%b)",
    )
    assert accounts.account(module, {"data": 1}).bytes == bytes_moved


@pytest.mark.parametrize(
    ("operation", "axes", "received"),
    [
        ("all-gather(%a), replica_groups=[2,4]<=[8]", ("fsdp",), 3 * 4096),
        ("all-reduce(%a), replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 4096),
        ("all-reduce-start(%a), replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "fsdp"), 7168),
        ("reduce-scatter(%a), replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",), 3072),
        ("collective-permute(%a), source_target_pairs={{0,4},{4,0}}", ("data",), 4096),
        ("all-to-all(%a), replica_groups={}", ("data", "fsdp"), 3584),
    ],
)
def test_collectives_and_their_axes(operation: str, axes: tuple[str, ...], received: int) -> None:
    loop = '%r = f32[1024]{0} while(%a), condition=%c, body=%b, backend_config={"known_trip_count"'
    body = (
        f"%b (a: f32[]) -> f32[] {{\n  %a = f32[1024] parameter(0)\n  %x = f32[9] {operation}\n}}"
    )
    module = entry("%a = f32[1024]{0} parameter(0)", f'{loop}:{{"n":"3"}}}}', before=body)
    (found,) = accounts.account(module, MESH).collectives
    kind = operation.partition("(")[0].removesuffix("-start")
    assert found == Collective(kind, axes, 3, 3 * received)


def test_kernels_are_listed_and_counted_by_formula() -> None:
    module = entry(
        "%mask = s8[4,4]{1,0} parameter(0)",
        "%q = bf16[2,4,256,64]{3,2,1,0} parameter(1)",
        "%k = bf16[2,2,384,64]{3,2,1,0} parameter(2)",
        "ROOT %splash_mha_fwd.3 = bf16[2,4,256,64] custom-call(%mask, %q, %k, %k), "
        'custom_call_target="tpu_custom_call"',
    )
    (kernel,) = accounts.account(module, {"data": 1}).kernels
    assert kernel[:3] == ("fwd", (2, 4, 256, 64), (2, 2, 384, 64))
    pairs = 256 * 128 + 2 * sum(range(1, 129))  # the prompt's keys, and two causal responses
    assert arithmetic.splash(*kernel[:3], length=128) == 2 * 2 * 2 * 4 * pairs * 64


def test_collectives_of_shards_are_told_apart_by_what_they_are_for() -> None:
    """`shard_map` numbers none of its channels; pieces in several fusions count once."""

    def fusion(name: str, purpose: str) -> str:
        given = "channel_id=1, replica_groups={{0,1}}, metadata={op_name=" + f'"{purpose}"}}'
        return (
            f"%{name} (p: f32[4,2]) -> f32[8,2] {{\n  %p = f32[4,2]{{1,0}} parameter(0)\n"
            f"  ROOT %g = f32[8,2]{{1,0}} all-gather(%p), {given}\n}}\n"
        )

    names = {"start": "responses", "end": "responses", "other": "prompts"}
    call = "%{0} = f32[8,2]{{1,0}} fusion(%a), kind=kCustom, calls=%{1}"
    whole = "%{} = f32[8,2]{{1,0}} all-gather(%a), channel_id=1, replica_groups={{{{0,1}}}}"
    module = entry(
        "%a = f32[4,2]{1,0} parameter(0)",
        *(call.format(f"c{name}", name) for name in names),
        *(whole.format(name) for name in "de"),  # which one line wrote, for two loops say
        before="\n".join(fusion(*item) for item in names.items()),
    )
    found = accounts.account(module, {"data": 2})
    assert found.collectives == (Collective("all-gather", ("data",), 4.0, 4 * 32.0),)


def test_what_a_part_of_a_fusion_hands_on_is_read_beyond_it() -> None:
    """A TPU's fusion of a product takes its weights through a part that only views them."""
    parts = """
%view (v: f32[8,4]) -> f32[8,4] {
  %v = f32[8,4]{1,0} parameter(0)
  ROOT %b = f32[8,4]{1,0} bitcast(%v)
}
%product (x: f32[2,4], w: f32[8,4]) -> f32[2,8] {
  %x = f32[2,4]{1,0} parameter(0)
  %w = f32[8,4]{1,0} parameter(1)
  %f = f32[8,4]{1,0} fusion(%w), kind=kLoop, calls=%view
  ROOT %p = f32[2,8]{1,0} convolution(%x, %f), dim_labels=bf_oi->bf
}
"""
    module = entry(
        "%a = f32[2,4]{1,0} parameter(0)",
        "%c = f32[8,4]{1,0} parameter(1)",
        "ROOT %r = f32[2,8]{1,0} fusion(%a, %c), kind=kOutput, calls=%product",
        before=parts,
    )
    assert accounts.account(module, {"data": 1}).bytes == 4 * (2 * 4 + 8 * 4 + 2 * 8)


def test_a_fused_reduce_scatter_is_no_all_reduce() -> None:
    """As a TPU has it: an all-reduce, of which each device keeps its part."""
    fused = (
        "%all-reduce-scatter.3 (p: f32[8,2]) -> f32[2,2] {",
        "  %p = f32[8,2]{1,0} parameter(0)",
        "  %r = f32[8,2]{1,0} all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}",
        "  %i = s32[] partition-id()",
        "  ROOT %s = f32[2,2]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,2}",
        "}",
    )
    call = "ROOT %f = f32[2,2]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3"
    module = entry("%a = f32[8,2]{1,0} parameter(0)", call, before="\n".join(fused))
    found = accounts.account(module, {"fsdp": 4})
    assert found.collectives == (Collective("reduce-scatter", ("fsdp",), 1.0, 48.0),)


def test_what_comes_from_other_slices_is_counted_apart() -> None:
    """It passes through the hosts, on channels that are numbered apart from the chips' own."""
    host = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="'
        'xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0"}'
    )
    module = entry(
        "%a = f32[4,2]{1,0} parameter(0)",
        "%t = token[] after-all()",
        "%g = f32[16,2]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}",
        f"%s = (f32[4,2]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=2, {host}",
        f"%r = (f32[4,2]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, {host}",
    )
    found = accounts.account(module, {"replica": 2, "data": 1, "fsdp": 4, "tensor": 1})
    assert set(found.collectives) == {
        Collective("all-gather", ("fsdp",), 1.0, 3 * 32.0),
        Collective("all-reduce", ("replica",), 1.0, 32.0),
    }
    phase = Phase(lambda: None, Shape(1, 2, 3, 4), lambda shape, shards: arithmetic.Cost(0.0, 0.0))
    least = plan_bounds.needs(found, phase, Chip(1.0, 1, 1.0, 48.0, 16.0))
    assert (least["network"], least["slices"]) == (2.0, 2.0)
    assert "slices" not in plan_bounds.needs(found, phase, Chip(1.0, 1, 1.0, 48.0))
