"""The reader of compiled programs, on a short program whose costs can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2jax.plan.devices import find_device

PROGRAM = """HloModule program

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element((s32[], f32[8,4]{1,0}) %p), index=1
  %i = s32[] get-tuple-element((s32[], f32[8,4]{1,0}) %p), index=0
  %y = f32[8,4]{1,0} add(f32[8,4]{1,0} %x, f32[8,4]{1,0} %x)
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(s32[] %i, f32[8,4]{1,0} %y)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

%fused (p: f32[100,4], at: s32[]) -> f32[1,4] {
  %p = f32[100,4]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %s = f32[1,4]{1,0} dynamic-slice(f32[100,4]{1,0} %p, s32[] %at, s32[] %at), dynamic_slice_sizes={1,4}
}

ENTRY %main (a: bf16[8,16], b: bf16[16,4], z: f32[100,4]) -> f32[8,4] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,4]{1,0} parameter(1)
  %z = f32[100,4]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %d = f32[8,4]{1,0} dot(bf16[8,16]{1,0} %a, bf16[16,4]{1,0} %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %row = f32[1,4]{1,0} fusion(f32[100,4]{1,0} %z, s32[] %zero), kind=kLoop, calls=%fused
  %start = (s32[], f32[8,4]{1,0}) tuple(s32[] %zero, f32[8,4]{1,0} %d)
  %w = (s32[], f32[8,4]{1,0}) while((s32[], f32[8,4]{1,0}) %start), condition=%condition, body=%body TRIPS
  ROOT %r = f32[8,4]{1,0} get-tuple-element((s32[], f32[8,4]{1,0}) %w), index=1
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


FLASH = """HloModule program

ENTRY %main (q: bf16[2,128,3,64], s: u32[2]) -> (bf16[2,128,3,64], f32[2,3,128]) {
  %q = bf16[2,128,3,64]{3,2,1,0} parameter(0)
  %s = u32[2]{0} parameter(1)
  ROOT %c = (bf16[2,128,3,64]{3,2,1,0}, f32[2,3,128]{2,1,0}) custom-call(%q, %q, %q, %s), REST
}
"""
CALL = (
    'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jvp(flash_attention_forward)/pallas_call"}'
)


def test_read_roofline_counts_flash_attention(monkeypatch):
    """Two products of half of the scores, and what a kernel reads and writes once."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from roofline import read_roofline

    cost = read_roofline(FLASH.replace("REST", CALL), find_device("h100")).kinds["flash_attention_forward"]
    assert cost.flops == 2 * (2 * 3 * 128 * 128 * 64)
    assert cost.bytes == 4 * 2 * (2 * 128 * 3 * 64) + 4 * 2 + 4 * (2 * 3 * 128)


def test_read_roofline_counts_what_a_slice_of_a_conversion_needs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from roofline import read_roofline

    converted = PROGRAM.replace(
        "  ROOT %s = f32[1,4]{1,0} dynamic-slice(f32[100,4]{1,0} %p,",
        "  %q = bf16[100,4]{1,0} convert(f32[100,4]{1,0} %p)\n"
        "  ROOT %s = bf16[1,4]{1,0} dynamic-slice(bf16[100,4]{1,0} %q,",
    )
    assert converted != PROGRAM
    cost = read_roofline(converted.replace(" TRIPS", KNOWN), find_device("h100")).kinds["fusion"]
    assert cost.bytes == 4 * 4 + 4 + 2 * 4  # a row of the float32 table, its place, and the 16-bit row


@pytest.mark.parametrize(("trips", "turns", "waits"), [(KNOWN, 5, 0), ("", 1, 1)], ids=["known", "unknown"])
def test_read_roofline_counts_turns_slices_and_products(monkeypatch, trips, turns, waits):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from roofline import read_roofline

    h100 = find_device("h100")
    found = read_roofline(PROGRAM.replace(" TRIPS", trips), h100)
    assert found.kinds["dot"].flops == 2 * 8 * 16 * 4
    assert found.kinds["dot"].bytes == 2 * (8 * 16 + 16 * 4) + 4 * 8 * 4
    # of the table, only the row that the slice reads; its place, and the row that is written
    assert found.kinds["fusion"].bytes == 4 * 4 + 4 + 4 * 4
    assert found.kinds["add"].kernels == turns and found.kinds["add"].bytes == turns * 3 * 4 * 8 * 4
    assert found.total.kernels == 2 + turns and found.waits == waits
    assert found.total.seconds == pytest.approx(found.total.bytes / h100.bandwidth)
