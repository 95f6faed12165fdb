"""Mapping: the arithmetic of ranks and layers."""

from __future__ import annotations

import pytest

from puna.mapping import Mapping


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 3), (2, 3), (4, 2)])
def test_every_rank_has_its_own_place(tp_size: int, pp_size: int) -> None:
    ranks = [Mapping(tp_size=tp_size, pp_size=pp_size, rank=rank) for rank in range(tp_size * pp_size)]
    assert len({(rank.tp_rank, rank.pp_rank) for rank in ranks}) == len(ranks)
    for rank in ranks:
        assert rank.rank in rank.tp_group
        assert rank.rank in rank.pp_group
        assert rank.tp_group[rank.tp_rank] == rank.rank
        assert rank.pp_group[rank.pp_rank] == rank.rank
        assert {ranks[other].pp_rank for other in rank.tp_group} == {rank.pp_rank}
        assert {ranks[other].tp_rank for other in rank.pp_group} == {rank.tp_rank}
        if not rank.is_last_pp_rank():
            assert ranks[rank.next_pp_rank()].prev_pp_rank() == rank.rank
            assert ranks[rank.next_pp_rank()].tp_rank == rank.tp_rank
    assert sum(rank.is_first_pp_rank() for rank in ranks) == tp_size
    assert sum(rank.is_last_pp_rank() for rank in ranks) == tp_size


@pytest.mark.parametrize("num_layers", [3, 4, 7, 8, 32])
def test_stages_share_the_layers(num_layers: int) -> None:
    stages = [Mapping(pp_size=3, rank=rank).pp_layers(num_layers) for rank in range(3)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tp_size": 0}, "tp_size is 0"),
        ({"pp_size": -1}, "pp_size is -1"),
        ({"tp_size": 2, "pp_size": 2, "rank": 4}, "rank is 4: it must be in 0..3"),
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_places_outside_of_the_grid(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mapping(**arguments)


def test_more_stages_than_layers() -> None:
    with pytest.raises(ValueError, match="pp_size is 3"):
        Mapping(pp_size=3).pp_layers(2)


def test_no_neighbour_at_the_ends() -> None:
    with pytest.raises(ValueError, match="first pipeline stage"):
        Mapping().prev_pp_rank()
    with pytest.raises(ValueError, match="last pipeline stage"):
        Mapping().next_pp_rank()
