"""Plans: made once per key, anew under other tiles, and by nobody while tiles are tried out."""

from gkd_fast.kernels.common import table
from gkd_fast.kernels.common.plan import forget, planned


def test_a_plan_is_made_once_for_its_key_and_tiles(monkeypatch):
    made = []

    @planned
    def widths(*key):
        made.append(key)
        return table.small_block_width(key[1])

    usual = widths(3, "bfloat16")
    assert usual == widths(3, "bfloat16") == table.SMALL_WIDTHS["short"]
    widths(4, "bfloat16")
    assert made == [(3, "bfloat16"), (4, "bfloat16")]
    with table.forced(16, 16):
        assert widths(3, "bfloat16") == widths(3, "bfloat16") == 16
    assert len(made) == 3 and widths(3, "bfloat16") == usual
    with table.recorded():
        widths(3, "bfloat16")
    monkeypatch.setattr(table, "overrides", {("strip", "sm_90", "bfloat16", 16): table.STRIP})
    widths(3, "bfloat16")
    assert len(made) == 5
    monkeypatch.setattr(table, "overrides", {})
    forget()
    widths(3, "bfloat16")
    assert len(made) == 6
