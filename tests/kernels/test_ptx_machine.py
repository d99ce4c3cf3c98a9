"""The machine that runs PTX: it names what it is there to find."""

import pytest
import torch

from .ptx.machine import Machine
from .ptx.memory import Fault, Global
from .ptx.program import parse

COPY_THROUGH_SHARED = """
.visible .entry copy(
	.param .u64 .ptr .global .align 1 copy_param_0,
	.param .u64 .ptr .global .align 1 copy_param_1,
	.param .u32 copy_param_2
)
.reqntid 64
{
	.reg .pred %p<3>;
	ld.param.b64 	%rd1, [copy_param_0];
	ld.param.b64 	%rd2, [copy_param_1];
	ld.param.b32 	%r1, [copy_param_2];
	mov.u32 	%r2, %tid.x;
	setp.lt.s32 	%p1, %r2, %r1;
	mul.wide.u32 	%rd3, %r2, 4;
	add.s64 	%rd4, %rd1, %rd3;
	mov.b32 	%r3, 0;
	@%p1 ld.global.b32 { %r3 }, [ %rd4 + 0 ];
	shl.b32 	%r4, %r2, 2;
	st.shared.b32 	[%r4], %r3;
	bar.sync 	0;
	xor.b32 	%r5, %r4, 252;
	ld.shared.b32 	%r6, [%r5];
	add.s64 	%rd5, %rd2, %rd3;
	st.global.b32 [ %rd5 + 0 ], { %r6 };
	ret;
}
"""


def run(text: str, count: int = 64, out_count: int = 64) -> tuple[torch.Tensor, set[str]]:
    values, out, memory = torch.arange(count, dtype=torch.float32), torch.full((out_count,), torch.nan), Global()
    machine = Machine(parse(text), [memory.hold(values), memory.hold(out), count], memory, 256, (0, 0, 0), (1, 1, 1))
    machine.run()
    return out, machine.hazards


def test_a_program_that_is_right():
    out, hazards = run(COPY_THROUGH_SHARED, count=60)
    assert out.tolist() == [0] * 4 + list(range(59, -1, -1)) and hazards == set()


def test_a_missing_barrier():
    _, hazards = run(COPY_THROUGH_SHARED.replace("bar.sync 	0;", ""))
    assert len(hazards) == 1 and "read of what another warp wrote, no barrier between: ld.shared.b32" in hazards.pop()


def test_a_missing_mask():
    with pytest.raises(Fault, match=r"load of 4 bytes at 0x.* outside all buffers"):
        run(COPY_THROUGH_SHARED.replace("@%p1 ld.global", "ld.global"), count=60)


def test_a_store_out_of_bounds():
    with pytest.raises(Fault, match="store of 4 bytes"):
        run(COPY_THROUGH_SHARED, out_count=63)


def test_shared_memory_out_of_bounds():
    with pytest.raises(Fault, match="4 bytes of shared memory at 256, of 256: st.shared.b32"):
        run(COPY_THROUGH_SHARED.replace("shl.b32 	%r4, %r2, 2;", "mad.lo.s32 %r4, %r2, 4, 4;"))


def test_a_register_that_is_never_written_and_an_unknown_instruction():
    with pytest.raises(Fault, match="%r3 is read and was never written"):
        run(
            COPY_THROUGH_SHARED.replace("mov.b32 	%r3, 0;", "").replace(
                "@%p1 ld.global.b32 { %r3 }", "ld.global.b32 { %r7 }"
            )
        )
    with pytest.raises(Fault, match="brev"):
        run(COPY_THROUGH_SHARED.replace("mov.b32 	%r3, 0;", "brev.b32 %r3, %r2;"))


def test_a_copy_that_nobody_waited_for():
    copy = "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 4;\n cp.async.commit_group;\n"
    waited = COPY_THROUGH_SHARED.replace("st.shared.b32 	[%r4], %r3;", copy + "cp.async.wait_group 0;")
    assert run(waited)[0].tolist() == list(range(63, -1, -1))
    out, _ = run(waited.replace("cp.async.wait_group 0;", ""))
    assert out.isnan().all()


def test_threads_that_go_different_ways_meet_again():
    """Odd threads go round once more, and skip what the even ones do."""
    loop = """
	and.b32 	%r8, %r2, 1;
	setp.ne.b32 	%p2, %r8, 0;
	mov.b32 	%r9, 0;
$L_again:
	add.s32 	%r9, %r9, 1;
	setp.lt.s32 	%p3, %r8, %r9;
	@!%p3 bra 	$L_again;
	@%p2 bra 	$L_met;
	add.s32 	%r9, %r9, 10;
$L_met:
	cvt.rn.f32.s32 	%r3, %r9;
"""
    text = COPY_THROUGH_SHARED.replace("@%p1 ld.global.b32 { %r3 }, [ %rd4 + 0 ];", loop)
    assert run(text)[0].tolist() == [2.0, 11.0] * 32
    with pytest.raises(Fault, match="not all threads come to bar.sync 0"):
        run(text.replace("add.s32 	%r9, %r9, 10;", "bar.sync 	0;"))
