"""Draws that are made together are those that are made one by one; a key that is told what comes makes them at once."""

import pytest
import torch

from dit_fast import philox
from dit_fast.errors import ConfigError, UserError
from dit_fast.ops import draws as op
from dit_fast.ops.draws import Key, draws, draws_op

POSITIONS = torch.tensor([5, 2**40, 7])
ASKED = [(True, 4, (3, 5)), (False, 2**31, ()), (True, 4, (2,)), (True, 9, (1,))]


def alone(normal, stream, shape):
    return (philox.normal if normal else philox.uniform)(7, POSITIONS, stream, shape)


def test_each_draw_is_that_of_the_generator():
    for ours, wanted in zip(draws(7, POSITIONS, ASKED, "torch"), ASKED, strict=True):
        assert torch.equal(ours, alone(*wanted))


def test_the_registered_op_pads_draws_to_16_bytes():
    normals, streams = [each[0] for each in ASKED], [each[1] for each in ASKED]
    flat = draws_op(POSITIONS, 7, normals, streams, [15, 1, 2, 1], "torch")
    place = 0
    for wanted in ASKED:
        expected = alone(*wanted).flatten()
        assert torch.equal(flat[place : place + len(expected)], expected)
        place += -(-len(expected) // 4) * 4
    assert len(flat) == place


def test_a_key_draws_at_once_what_it_is_told(monkeypatch):
    launched = []
    monkeypatch.setattr(op, "draws", lambda *rest: launched.append(rest[2]) or draws(*rest))

    def step(ahead, asked):
        key, launched[:] = Key(7, POSITIONS, ahead), []
        for normal, stream, shape in asked:
            drawn = (key.normal if normal else key.uniform)(stream, shape)
            assert torch.equal(drawn, alone(normal, stream, shape))
        return key.asked, [len(each) for each in launched]

    told, first = step((), ASKED)
    assert (told, first) == (ASKED, [1, 1, 1, 1])
    assert step(told, ASKED)[1] == [4]
    assert step(told, ASKED[1:])[1] == [4]  # one of them is not asked for any more
    assert step(ASKED[:2], ASKED)[1] == [2, 1, 1]
    assert step(told, [ASKED[0], ASKED[0]])[1] == [4, 1]  # one tensor per use, whatever is done to it


@pytest.mark.parametrize(
    ("seed", "positions", "wanted"),
    [(-1, POSITIONS, (True, 4, ())), (7, POSITIONS.int(), (True, 4, ())), (7, POSITIONS, (True, 1 << 32, ()))],
    ids=["seed", "positions", "stream"],
)
def test_what_is_out_of_range_is_refused(seed, positions, wanted):
    with pytest.raises(UserError):
        draws(seed, positions, [wanted])
    with pytest.raises(ConfigError, match="draws: unknown backend 'cpp'"):
        draws(7, POSITIONS, ASKED, "cpp")
