"""The grid: every row is in one block, whoever cuts, and however the number of workers changes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from evmp.grid import Block, Grid, shard

GRIDS = st.builds(Grid, st.integers(1, 200), st.integers(1, 9), st.integers(1, 50))


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_shards_cover_all_rows_in_order(n_rows: int, n_workers: int) -> None:
    shards = [shard(n_rows, worker, n_workers) for worker in range(n_workers)]

    assert (shards[0].start, shards[-1].stop) == (0, n_rows)
    assert all(left.stop == right.start for left, right in itertools.pairwise(shards))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(GRIDS)
def test_cells_are_those_of_each_shard_in_turn(grid: Grid) -> None:
    cells = [
        Block(start, min(start + grid.block_rows, rows.stop))
        for rows in (shard(grid.n_rows, worker, grid.n_shards) for worker in range(grid.n_shards))
        for start in range(rows.start, rows.stop, grid.block_rows)
    ]

    assert [grid[number] for number in range(len(grid))] == cells
    assert all(
        grid.cell_of(row) == number
        for number, cell in enumerate(cells)
        for row in range(cell.start, cell.stop)
    )


@given(GRIDS, st.integers(1, 12))
def test_workers_of_any_number_have_every_cell_once(grid: Grid, n_workers: int) -> None:
    shards = [grid.shard(worker, n_workers) for worker in range(n_workers)]

    edges = {grid[number].start for number in range(len(grid))} | {grid.n_rows}
    assert (shards[0].start, shards[-1].stop) == (0, grid.n_rows)
    assert all(left.stop == right.start for left, right in itertools.pairwise(shards))
    assert {rows.start for rows in shards} <= edges
    if n_workers == grid.n_shards:
        assert shards == [shard(grid.n_rows, worker, n_workers) for worker in range(n_workers)]


@st.composite
def some_done(draw: st.DrawFn) -> tuple[Grid, list[Block]]:
    """Rows, and disjoint blocks of them."""
    grid = draw(GRIDS)
    edges = sorted(draw(st.sets(st.integers(0, grid.n_rows), max_size=12)))
    blocks = [Block(start, stop) for start, stop in itertools.pairwise(edges)]
    return grid, draw(st.permutations([block for block in blocks if draw(st.booleans())]))


@given(some_done(), st.integers(1, 5))
def test_what_is_done_and_what_is_left_is_every_row_once(
    rows: tuple[Grid, list[Block]], n_workers: int
) -> None:
    grid, done = rows
    todo = [
        block
        for worker in range(n_workers)
        for block in grid.cut(done, grid.shard(worker, n_workers))
    ]

    # What a worker has committed beyond its shard, as no worker of this grid does, is done, too.
    covered = {row for block in [*todo, *done] for row in range(block.start, block.stop)}
    assert covered == set(range(grid.n_rows))
    assert sum(map(len, todo)) + sum(map(len, done)) == grid.n_rows
    assert all(0 < len(block) <= grid.block_rows for block in todo)
    assert todo == sorted(todo, key=lambda block: block.start)


def test_blocks_begin_where_they_did_before_the_stop() -> None:
    assert Grid(100, 2, 10).cut([Block(0, 10), Block(10, 13)], Block(0, 50)) == [
        Block(13, 20),
        Block(20, 30),
        Block(30, 40),
        Block(40, 50),
    ]


def test_grid_of_no_rows_has_no_cells() -> None:
    assert len(Grid(0, 3, 10)) == 0
    assert Grid(0, 3, 10).cut([], Grid(0, 3, 10).shard(1, 3)) == []
