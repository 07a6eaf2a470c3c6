"""`elastic simulate stragglers`: delays and policies as a user names them, the table, pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elastic.cli import main
from elastic.core.errors import ConfigError
from elastic.core.simulator.stragglers import (
    POLICIES,
    compare,
    make_delays,
    map_regimes,
    parse_policy,
    read_delays,
    read_trace,
    regime,
)
from elastic.report.straggler_picture import draw_map
from policies.coding.m_sgc import MSgc
from policies.coding.simulation import Coded, Frc
from policies.coding.sr_sgc import SrSgc


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def a_trace(folder: Path, **arrays: object) -> Path:
    path = folder / "delays.npz"
    np.savez(path, **arrays)
    return path


def test_the_command_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "p.png"
    source = "gilbert-elliott:p_slow=0.1,p_ok=0.5"
    words = ("--workers", "16", "--gradients", "60", "--policies", "uncoded,frc/1,auto")
    assert run("simulate", "stragglers", source, *words, "-o", str(picture)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["policy", "total"]
    assert "frc with s=1" in out
    assert "auto: " in out
    assert "does not shrink with its load" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_trace_is_drawn_again_with_all_its_workers(tmp_path: Path) -> None:
    path = a_trace(tmp_path, dur=np.full((7, 5), 2.0))
    seconds_RN = read_delays(str(path), num_rounds=20, num_workers=256, seed=0)
    assert seconds_RN.shape == (20, 5)
    added = make_delays(seconds_RN, load=0.0, fixed=0.5, rate_s=3.0)
    assert added.at(0, 0.5).tolist() == [3.5] * 5
    shared = make_delays(seconds_RN, load=None, fixed=0.5, rate_s=None)
    assert shared.at(0, 0.4).tolist() == pytest.approx([3.0] * 5)


def test_every_policy_by_default_is_known_and_keeps_its_order() -> None:
    seconds_RN = regime(0.05, 2).draw(80, 32, np.random.default_rng(0))
    delays = make_delays(seconds_RN, load=None, fixed=0.9, rate_s=None)
    outcomes = compare(POLICIES, delays, 60, seed=0)
    assert [one.policy for one in outcomes][:3] == [
        *("uncoded", "speculation at 1.5 times the median", "frc with s=1")
    ]
    assert outcomes[-1].policy == "auto"
    assert outcomes[3].total_s < outcomes[0].total_s
    assert outcomes[3].load == pytest.approx(4 / 32)


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ("frc/3", Frc(stragglers=3)),
        ("c_code/3", Coded(stragglers=3)),
        ("crc/3", Coded(stragglers=3, kind="crc")),
        ("sr_sgc/1/2/5", SrSgc(burst=1, window=2, distinct=5)),
        ("m_sgc/1/2/5", MSgc(burst=1, window=2, distinct=5)),
    ],
)
def test_policies_by_name(words: str, policy: object) -> None:
    assert parse_policy(words) == policy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("frc", "policy 'frc': known are uncoded, speculation, frc/S"),
        ("frc/x", "policy 'frc/x': invalid literal"),
        ("m_sgc/2/2/5", "burst must be 1 to window - 1, not 2 of 2"),
        ("frc/32", "policy 'frc/32': 32 stragglers of 32 workers"),
        ("m_sgc/1/2/40", "distinct is 40, with 32 workers at most 32"),
    ],
)
def test_policies_that_make_no_sense(words: str, message: str) -> None:
    delays = make_delays(np.ones((9, 32)), load=None, fixed=0.9, rate_s=None)
    with pytest.raises(ConfigError, match=message):
        compare([words], delays, 5, seed=0)


def test_traces_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no trace: an \.npz file"):
        read_trace(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ConfigError, match="no trace"):
        read_trace(tmp_path / "text.npz")
    with pytest.raises(ConfigError, match="no trace"):
        read_trace(a_trace(tmp_path, other=np.ones((2, 2))))
    with pytest.raises(ConfigError, match=r"has shape \(3,\); seconds > 0"):
        read_trace(a_trace(tmp_path, dur=np.ones(3)))
    with pytest.raises(ConfigError, match="seconds > 0"):
        read_trace(a_trace(tmp_path, dur=np.zeros((2, 2))))


@pytest.mark.parametrize("settings", ["p_fast=1", "p_ok=much"])
def test_settings_of_the_model_that_make_no_sense(settings: str) -> None:
    with pytest.raises(ConfigError, match=f"gilbert-elliott: '{settings}'"):
        read_delays(f"gilbert-elliott:{settings}", num_rounds=5, num_workers=4, seed=0)


def test_the_map_of_regimes(tmp_path: Path) -> None:
    cells = map_regimes((0.1, 0.95), (0.0, 0.1), num_workers=32, num_gradients=60)
    assert len(cells) == 4
    assert all(cell.ratio <= 1 for cell in cells)
    kinds = {(cell.fixed, cell.straggler_rate): cell.scheme.kind for cell in cells}
    assert kinds[0.1, 0.0] in ("uncoded", "speculation")
    assert kinds[0.95, 0.1] == "frc"
    assert draw_map(cells, tmp_path / "map.png", "regimes").stat().st_size > 1000
